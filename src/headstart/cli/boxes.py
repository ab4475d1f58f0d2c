"""``scenes`` and ``propose``: images, and boxes on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from headstart.cli.options import Images, Seed, Set, WithSettings
from headstart.console import results


def scenes(
    out: Annotated[Path, typer.Argument(help="Folder to create.", metavar="OUT")],
    unlabelled: Annotated[int, typer.Option(help="Images without labels.")] = 1000,
    train: Annotated[int, typer.Option(help="Labelled images to train on.")] = 64,
    val: Annotated[int, typer.Option(help="Labelled images to evaluate on.")] = 200,
    size_px: Annotated[int, typer.Option("--size", help="Side of the images, px.")] = 96,
    seed: Annotated[int, typer.Option(help="Same seed, same pixels.")] = 0,
) -> None:
    """Generate a small detection data set: images, boxes and masks of six kinds of shapes on textured grounds."""
    from headstart.datasets.scenes import make_scenes

    summary = make_scenes(out, unlabelled=unlabelled, train=train, val=val, size_px=size_px, seed=seed)
    results.print(summary)


class Propose(WithSettings):
    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        from headstart.proposals import ProposalSettings

        return ProposalSettings, str(self.name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        results.print(_presets_table())


def _presets_table() -> Table:
    from headstart.proposals.presets import PRESETS

    table = Table(title="Presets", title_justify="left", show_lines=False, box=None, pad_edge=False)
    for column in ("preset", "sets", "what"):
        table.add_column(column, overflow="fold")
    for name, preset in PRESETS.items():
        values = ", ".join(f"{key}={'null' if value is None else value}" for key, value in preset.values.items())
        table.add_row(f"[cyan]{name}[/cyan]", values, preset.summary)
    return table


def propose(
    images: Images,
    out: Annotated[
        Path | None, typer.Option("--out", help="Parquet file.  \\[default: PHOTOS.proposals.parquet]")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Settings of a paper, listed below; --engine, --seed and --set win over them."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="What finds the boxes: selective_search, opencv, random, random_patches, or attention, which needs "
            "--weights.  \\[default: selective_search]",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            "--backbone",
            help="--engine attention: torchvision or timm backbone.  \\[default: that of the run in --weights, or "
            "resnet50]",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="--engine attention: the backbone's weights; a run folder, a weights file, imagenet (the library's "
            "own supervised ones), or random.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes.  \\[default: all cores]")] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            help="Do the i-th of n equal shares of the images, i from 0 to n-1: for the jobs of a cluster, all with "
            "the same --out. The one that finishes last writes it.",
            metavar="i/n",
        ),
    ] = None,
    seed: Seed = None,
    settings: Set = None,
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Also draw a picture: boxes on 24 images; how many there are, and how large."),
    ] = False,
    preview_out: Annotated[
        Path | None,
        typer.Option("--preview-out", help="PNG file of the preview.  \\[default: as --out, with .png]"),
    ] = None,
) -> None:
    """Find class-less boxes (Selective Search, or what stands out in a backbone's features) in a folder of images.

    Methods train on them, but those that make boxes of their own. Without Selective Search:
    headstart propose PHOTOS --engine attention --backbone resnet50 --weights FILE

    A killed command goes on where it stopped when it is repeated; new images in the folder are added. In a cluster's
    job array, each job does its share: headstart propose PHOTOS --out FILE --shard $SLURM_ARRAY_TASK_ID/100
    """
    from headstart.proposals import ProposalSettings
    from headstart.settings import merge, parse_assignments, validate
    from headstart.verbs.propose import propose as run

    given = {
        "preset": preset,
        "engine": engine,
        "features_backbone": backbone,
        "features_weights": weights,
        "seed": seed,
    }
    explicit = {k: v for k, v in given.items() if v is not None}
    values = merge(explicit, parse_assignments(ProposalSettings, settings or []))
    summary = run(images, out, settings=validate(ProposalSettings, values, "propose"), workers=workers, shard=shard)
    results.print(summary.table())
    if (preview or preview_out is not None) and summary.path.exists():  # a job with --shard may have to leave it
        from headstart.verbs.preview import preview as draw

        results.print(f"preview: {draw(summary.path, images, preview_out)}", markup=False, soft_wrap=True)
