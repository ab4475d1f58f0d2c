"""The ways of starting that are compared, from the words on the command line.

========================  =============================================================================================
``scratch``               random weights
``imagenet``              the library's own supervised weights of the backbone
``runs/x``, ``w.pth``     a run folder, weights file or transformers folder that is there
``soco``                  a method: pretrained here, once, on the unlabelled images
``aligndet@soco``         a method on another start: aligndet from soco's weights; ``proseco@w.pth``,
                          ``detreg@imagenet``, ``proseco@aligndet@soco``, from right to left
``aligndet``              a method that makes no sense on random weights: on soco, which needs the images alone
========================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headstart.errors import SettingsError
from headstart.methods import METHODS
from headstart.verbs.start import WORDS

FIRST = "soco"  # what methods start from that need a trained backbone, where nothing else is said


@dataclass(frozen=True)
class Start:
    """``method`` is None for weights that are there. ``on``: what the method starts from; None: nothing was said."""

    name: str
    source: str = ""  # a word, or a path
    method: str | None = None
    on: Start | None = None


def parse_starts(texts: Sequence[str]) -> list[Start]:
    """Raises: SettingsError for what is neither there nor a method, for fewer than two starts, and for one twice."""
    starts = [parse_start(text.strip()) for text in texts if text.strip()]
    if len(starts) < 2:
        raise SettingsError(f"--starts {','.join(texts)}: expected two or more, for example scratch,soco")
    names = [start.name for start in starts]
    for name in names:
        if names.count(name) > 1:
            raise SettingsError(f"--starts: {name} is named twice; files and runs need different names")
    return starts


def parse_start(text: str) -> Start:
    method, at, rest = text.partition("@")
    if text in WORDS:
        return Start(text, text)
    if method in METHODS:
        on = parse_start(rest) if at else None
        return Start(f"{method}@{on.name}" if on is not None else method, method=method, on=on)
    path = Path(text)
    if path.exists():
        return Start(path.stem if path.is_file() else path.resolve().name, text)
    raise SettingsError(
        f"--starts: {text!r} is no file or run folder that is there, no word ({', '.join(WORDS)}) and no method "
        f"({', '.join(METHODS)}); a method on other weights is written METHOD@START, for example aligndet@soco"
    )
