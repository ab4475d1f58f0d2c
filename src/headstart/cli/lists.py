"""``recipes`` and ``methods``: what there is."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from headstart.console import results
from headstart.methods import SUMMARIES


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe to print, with all its numbers.", metavar="[NAME]", show_default=False)
    ] = None,
) -> None:
    """List the recipes that come with Headstart, numbers of one experiment of a paper each; or print one of them."""
    from headstart.recipes import describe, names

    if name is not None:
        results.print(describe(name).text(), markup=False, highlight=False, soft_wrap=True)
        return
    papers: dict[str, list[Any]] = {}
    for recipe in map(describe, names()):
        papers.setdefault(recipe.paper, []).append(recipe)
    for paper, rows in papers.items():
        table = Table(title=paper, title_justify="left", box=None, pad_edge=False)
        table.add_column("recipe", no_wrap=True)  # names are for copying
        for column in ("what", "the paper's result"):
            table.add_column(column, overflow="fold", ratio=1)
        for recipe in rows:
            table.add_row(f"[cyan]{recipe.name}[/cyan]", escape(recipe.what), escape(recipe.result))
        results.print(table)
    results.print("\nOne with all its numbers, and the commands: [bold]headstart recipes NAME[/bold]")


def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
) -> None:
    """Which method pretrains which detector."""
    from headstart.methods import table as rows_of

    header, *rows = rows_of()
    if markdown:
        lines = [["", *(f"`{name}`" for name in header[1:])], ["---"] * len(header)]
        lines += [[f"`{row[0]}`", *row[1:]] for row in rows]
        for line in lines:
            typer.echo(f"| {' | '.join(line)} |")
        return
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(f"[cyan]{row[0]}[/cyan]", *row[1:])
    results.print(table)
    for name, summary in SUMMARIES.items():
        results.print(f"[cyan]{name}[/cyan]  {summary}", soft_wrap=True)
