"""The verbs of :mod:`headstart` for the shell. Nothing here that the Python API lacks.

Heavy libraries are imported inside the commands, so that ``headstart --help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from headstart import __version__
from headstart.cli import boxes, lists, outcomes, training
from headstart.cli.options import CONTEXT
from headstart.cli.protocol import protocol
from headstart.console import notes, results
from headstart.errors import HeadstartError

app = typer.Typer(
    name="headstart",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
    help="Pretrain whole object detectors, heads included, on images nobody has labelled; fine-tune them with few "
    "labels; see honestly whether it helped.\n\n"
    "[bold]headstart pretrain soco PHOTOS/ --out runs/x[/bold]\n\n"
    "[bold]headstart finetune runs/x --train train.json --val val.json --labels 10%[/bold]\n\n"
    "[bold]headstart report runs/*[/bold]",
)
app.command()(boxes.scenes)
app.command(cls=boxes.Propose)(boxes.propose)
app.add_typer(training.pretrain, name="pretrain")
app.command(cls=training.Finetune)(training.finetune)
app.command(cls=training.Linear)(training.linear)
app.command()(outcomes.evaluate)
app.command(cls=outcomes.Compare)(outcomes.compare)
app.command()(outcomes.report)
app.command()(outcomes.export)
app.command()(lists.recipes)
app.add_typer(protocol, name="protocol")
app.command()(lists.methods)


@app.callback(invoke_without_command=True)
def _headstart(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        results.print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: what a user can mend is one message, not a traceback."""
    try:
        app()
    except HeadstartError as error:
        notes.print("[bold red]error:[/bold red] ", end="")
        notes.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)
