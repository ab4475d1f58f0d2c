"""``protocol``: data sets and splits that papers measure on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from headstart.cli.options import CONTEXT
from headstart.console import notes, results

protocol = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings=CONTEXT,
    help="The data sets and splits that papers measure on: COCO, Mini-COCO, VOC, Mini-VOC, few-shot VOC, LVIS, FSOD, "
    "SODA10M; and ImageNet's linear evaluation.",
)

ProtocolName = Annotated[str, typer.Argument(help="Of the protocol (headstart protocol list).", metavar="NAME")]
Root = Annotated[Path, typer.Option("--root", help="Folder of the data set as it is published.", metavar="DIR")]


@protocol.command("list")
def list_protocols(
    name: Annotated[
        str | None, typer.Argument(help="One of them, in full.", metavar="[NAME]", show_default=False)
    ] = None,
) -> None:
    """Which there are; or one of them: its files, what is scored, and the recipes with papers' schedules for it."""
    from headstart.protocols import PROTOCOLS, find

    if name is not None:
        results.print(find(name).text(), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("protocol", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("metrics", no_wrap=True)
    for spec in PROTOCOLS.values():
        table.add_row(f"[cyan]{spec.name}[/cyan]", escape(spec.what), ", ".join(spec.metrics))
    results.print(table)
    results.print("\nOne with its files and the recipes for it: [bold]headstart protocol list NAME[/bold]")


@protocol.command("check")
def check_protocol(name: ProtocolName, root: Root) -> None:
    """Is everything there that a protocol needs, and is it the official release? Exit code 1 when something is missing.

    Names are compared; no image is opened.
    """
    from headstart.protocols import check

    done = check(name, root)
    marks = {
        "ok": "[green]ok[/green]",
        "missing": "[bold red]missing[/bold red]",
        "differs": "[yellow]differs[/yellow]",
    }
    table = Table(title=f"{name} in {done.root}", title_justify="left", box=None, pad_edge=False)
    for column in ("", "file or folder", "what is there"):
        table.add_column(column, overflow="fold")
    for finding in done.findings:
        table.add_row(marks[finding.state], escape(finding.path), escape(finding.text))
    results.print(table)
    if not done.complete:
        data = done.protocol.data
        results.print(f"\nAs it should be ({data.url}):\n{data.layout()}", markup=False, soft_wrap=True)
        raise typer.Exit(1)
    if not done.official:
        results.print("Usable, but not the official release: results are not comparable with papers'.")


@protocol.command("split")
def split_protocol(
    name: ProtocolName,
    root: Root,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of train.json and val.json.  \\[default: splits/NAME-...]"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    shots: Annotated[
        int | None, typer.Option("--shots", help="Boxes of each class, for voc_split1 to 3: 1, 2, 3, 5, 10.")
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            "--ids",
            help="A published list instead of drawing: a split file, a COCO file, image ids or file names (.json or "
            ".txt), or a folder of box_<K>shot_<class>_train.txt.",
            show_default=False,
        ),
    ] = None,
    val_ids: Annotated[
        Path | None,
        typer.Option(
            "--val-ids", help="The same for the other part, for fsod_test and fsod_train.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a protocol's exact images, and boxes, to train.json and val.json, which --train and --val take.

    Of imagenet_linear nothing is drawn and nothing written; the commands are printed all the same.

    The same seed gives the same on any machine and in any version.
    """
    from headstart.protocols import split

    done = split(name, root, out, seed=seed, shots=shots, ids=ids, val_ids=val_ids)
    table = Table(box=None, pad_edge=False)
    for column in ("file", "images", "boxes", "sha256 of the ids"):
        table.add_column(column, overflow="fold", justify="right" if column in ("images", "boxes") else "left")
    for part in (done.train_part, done.val_part):
        table.add_row(str(part.path), str(part.images), "–" if part.boxes is None else str(part.boxes), part.sha256)
    results.print(table)
    for note in done.protocol.notes:
        notes.print(f"  {note}", soft_wrap=True, markup=False)
    for command in done.commands():
        results.print(command, markup=False, highlight=False, soft_wrap=True)


@protocol.command("score")
def score_protocol(
    name: ProtocolName,
    evaluations: Annotated[
        list[Path], typer.Argument(help="eval.json of runs, for example one a seed.", metavar="EVAL...")
    ],
) -> None:
    """AP50 of the novel classes of voc_split1 to 3, of the others, and of all; accuracies of imagenet_linear.

    With several seeds their mean too.
    """
    from headstart.protocols import score

    rows = score(name, evaluations)
    table = Table(title=f"{name}, {rows[0].title} in %", title_justify="left", box=None, pad_edge=False)
    table.add_column("evaluation", overflow="fold")
    for column in ("metric", *rows[0].values()):
        table.add_column(column, justify="right")

    def percent(values: Sequence[float | None]) -> str:
        defined = [100 * value for value in values if value is not None]
        if len(defined) < len(values) or not defined:
            return "–"
        spread = f" ± {stdev(defined):.1f}" if len(defined) > 1 else ""
        return f"{sum(defined) / len(defined):.1f}{spread}"

    for row in rows:
        groups = (percent([value]) for value in row.values().values())
        table.add_row(escape(str(row.path)), row.metric, *groups)
    if len(rows) > 1:
        groups = (percent(values) for values in zip(*(row.values().values() for row in rows), strict=True))
        table.add_row("mean ± standard deviation", "", *groups)
    results.print(table)
