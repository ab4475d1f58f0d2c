"""``python -m headstart``, which is also what ``torchrun -m headstart`` starts."""

from headstart.cli import main

main()
