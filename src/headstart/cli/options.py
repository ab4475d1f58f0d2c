"""What commands share: options that mean the same everywhere, and --help that shows every setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from headstart.console import results

CONTEXT = {"help_option_names": ["-h", "--help"]}
STOPPED = 130  # what a shell expects of a command that Ctrl-C ended

Images = Annotated[
    Path,
    typer.Argument(
        help="Folder of images, read with all its subfolders and the .tar shards in them; or one .tar file.",
        metavar="PHOTOS",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="Where the result goes.", show_default=False)]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Name (headstart recipes lists them) or YAML file of a recipe: its numbers become the defaults.",
    ),
]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Length, in passes over the images.")]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", help="Length, in steps of the optimiser; wins over --epochs.")
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", help="Images a step, over all processes.  \\[default: for the device]"),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.  \\[default: 0]")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:1.  \\[default: auto]")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other setting; may be repeated.", metavar="KEY=VALUE", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")]
Backbone = Annotated[
    str | None,
    typer.Option("--backbone", help="torchvision or timm backbone, for example resnet18.  \\[default: resnet50]"),
]


def settings_table(model: Any, title: str) -> Table:
    from headstart.settings import leaves

    table = Table(title=title, title_justify="left", show_lines=False, box=None, pad_edge=False)
    for column in ("setting", "default", "meaning"):
        table.add_column(column, overflow="fold")
    group = ""
    for key, field in sorted(leaves(model), key=lambda item: not item[0].startswith("method.")):
        section, _, _ = key.partition(".")
        if section != group:
            table.add_section()
            group = section
        default = field.get_default(call_default_factory=True)
        meaning = escape(field.description or "")  # which may have lists in it
        table.add_row(f"[cyan]{key}[/cyan]", "unset" if default is None else escape(str(default)), meaning)
    return table


def given(arguments: Sequence[str], option: str) -> str | None:
    """The value of ``option`` on a command line that has not been parsed yet."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


class WithSettings(TyperCommand):
    """``--help`` shows, under the options, every setting that ``--set`` takes, with default and unit."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[WithSettings] = list(args)  # --help is answered before the other options are read
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        kind, what = self.settings_type(ctx.meta[WithSettings])
        results.print(settings_table(kind, f"Settings of {what}, and their defaults"))
        results.print(
            "Set them with [bold]--set KEY=VALUE[/bold]; the last part of a key is enough where it is the only one."
        )

    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        """The settings that a command line with these ``arguments`` takes, and whose they are."""
        raise NotImplementedError


def detector_given(arguments: Sequence[str], verb: str, otherwise: str) -> str:
    from headstart.recipes import read

    recipes_own = read(given(arguments, "--recipe"), verb).get("detector", {}).get("name")
    return given(arguments, "--detector") or recipes_own or otherwise
