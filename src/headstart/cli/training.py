"""``pretrain``, ``finetune`` and ``linear``: what trains."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headstart.cli.options import (
    CONTEXT,
    STOPPED,
    Backbone,
    BatchSize,
    Device,
    Epochs,
    Images,
    MaxSteps,
    Out,
    Recipe,
    Resume,
    Seed,
    Set,
    WithSettings,
    detector_given,
    given,
)
from headstart.console import results
from headstart.detectors import FAMILIES
from headstart.methods import METHODS, SUMMARIES


class Pretrain(WithSettings):
    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        from headstart.methods import method_type
        from headstart.verbs.pretrain import config_type

        detector = detector_given(arguments, "pretrain", method_type(str(self.name)).detector)
        return config_type(str(self.name), detector), f"{self.name} with {detector} (--detector)"


class Finetune(WithSettings):
    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        from headstart.verbs.finetune import config_type

        detector = detector_given(arguments, "finetune", "faster_rcnn")
        return config_type(detector), f"{self.name} with {detector} (--detector)"


class Linear(WithSettings):
    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        from headstart.verbs.linear import LinearSettings

        return LinearSettings, str(self.name)


class _Methods(TyperGroup):
    """One subcommand a method, made from the registry when it is asked for. A recipe names its method itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        recipe = given(args, "--recipe")
        if recipe is not None and args[0] not in METHODS and not ctx.resilient_parsing:
            from headstart.recipes import method_of

            args = [method_of(recipe), *args]
        if args and not args[0].startswith("-") and args[0] not in METHODS:
            near = difflib.get_close_matches(args[0], METHODS, n=1)
            hint = f"did you mean {near[0]}?" if near else "name one before the photos, or --recipe."
            ctx.fail(f"'{args[0]}' is no method; {hint} There are {', '.join(METHODS)}")
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(METHODS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in METHODS:
            return None
        one = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
        one.command(cmd_name, cls=Pretrain, help=SUMMARIES[cmd_name], context_settings=CONTEXT)(
            _pretrain_with(cmd_name)
        )
        return typer.main.get_command(one)


def _pretrain_with(method: str) -> Any:
    def command(
        images: Images,
        detector: Annotated[
            str | None,
            typer.Option(
                "--detector",
                help=f"{', '.join(FAMILIES)}.  \\[default: the recipe's, or the method's own, named below]",
                metavar="NAME",
            ),
        ] = None,
        backbone: Backbone = None,
        start: Annotated[
            str | None,
            typer.Option(
                "--start",
                help="What to start from: a run folder, a weights file, a transformers folder, imagenet (the library's "
                "own supervised weights of the backbone), or scratch.  \\[default: scratch, where the method allows]",
            ),
        ] = None,
        out: Out = None,
        proposals: Annotated[
            str | None,
            typer.Option(
                "--proposals",
                help="Parquet file of boxes, made there when absent; or on-the-fly: no file, the data workers find the "
                "boxes of each image they read.  \\[default: in the run folder]",
                metavar="FILE",
            ),
        ] = None,
        recipe: Recipe = None,
        epochs: Epochs = None,
        max_steps: MaxSteps = None,
        batch_size: BatchSize = None,
        seed: Seed = None,
        device: Device = None,
        settings: Set = None,
        resume: Resume = False,
    ) -> None:
        from headstart.verbs.pretrain import pretrain as run

        done = run(
            detector,
            images,
            method,
            out=out,
            backbone=backbone,
            start=start,
            proposals=proposals,
            recipe=recipe,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            seed=seed,
            device=device,
            settings=settings or [],
            resume=resume,
        )
        if not done.summary.finished:
            raise typer.Exit(STOPPED)

    return command


pretrain = typer.Typer(
    cls=_Methods,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings=CONTEXT,
    subcommand_metavar="[METHOD] PHOTOS [OPTIONS]...",
    help="Pretrain a detector, heads included, on a folder of images without labels.\n\n"
    "Proposals are made on the way when there are none. [bold]headstart pretrain METHOD --help[/bold] shows the "
    "method's own settings; [bold]headstart pretrain --recipe NAME PHOTOS[/bold] takes the recipe's method. Several "
    "GPUs: [bold]torchrun --nproc-per-node N -m headstart pretrain ...[/bold]",
)


@pretrain.callback()
def _pretrain() -> None:
    """Keeps Typer from folding the group into its only command."""


def finetune(
    start: Annotated[
        str,
        typer.Argument(
            help="What to start from: a run folder, a weights file (.safetensors, .pth), a transformers folder, "
            "'imagenet' (the library's own supervised weights of the backbone), or 'scratch'.",
            metavar="START",
        ),
    ],
    train: Annotated[
        Path, typer.Option("--train", help="Labels: COCO JSON, VOC folder or ImageSets/Main list, or split file.")
    ],
    val: Annotated[Path | None, typer.Option("--val", help="Labels to evaluate on.")] = None,
    labels: Annotated[
        str,
        typer.Option(
            "--labels",
            help="Label budget: 10%, a number of images, 5shot (boxes of each class), all, a split file, or the "
            "labels.json of another run.",
        ),
    ] = "all",
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector", help=f"{', '.join(FAMILIES)}.  \\[default: the recipe's, or as START]", metavar="NAME"
        ),
    ] = None,
    backbone: Backbone = None,
    out: Out = None,
    train_images: Annotated[Path | None, typer.Option("--train-images", help="Folder of --train's images.")] = None,
    val_images: Annotated[Path | None, typer.Option("--val-images", help="Folder of --val's images.")] = None,
    recipe: Recipe = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    device: Device = None,
    settings: Set = None,
    resume: Resume = False,
) -> None:
    """Train a detector with few labels, or all, and evaluate it.

    The exact images of the budget are written to labels.json in the run folder.
    """
    from headstart.verbs.finetune import finetune as run

    done = run(
        start,
        train,
        val,
        labels=labels,
        out=out,
        detector=detector,
        backbone=backbone,
        train_images=train_images,
        val_images=val_images,
        recipe=recipe,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        seed=seed,
        device=device,
        settings=settings or [],
        resume=resume,
    )
    if not done.summary.finished:
        raise typer.Exit(STOPPED)
    if done.evaluation is not None:
        for table in done.evaluation.tables():
            results.print(table)


def linear(
    start: Annotated[
        str,
        typer.Argument(
            help="Whose backbone: a run folder, a weights file (.safetensors, .pth), a transformers folder, 'imagenet' "
            "(the library's own supervised weights), or 'scratch'.",
            metavar="START",
        ),
    ],
    train: Annotated[
        Path,
        typer.Option(
            "--train", help="Folder with a folder of images for each class, such as ImageNet's train.", metavar="DIR"
        ),
    ],
    val: Annotated[
        Path,
        typer.Option("--val", help="The same to evaluate on, or ImageNet's val as it is published.", metavar="DIR"),
    ],
    out: Out = None,
    backbone: Backbone = None,
    recipe: Recipe = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    device: Device = None,
    settings: Set = None,
    resume: Resume = False,
) -> None:
    """How good are a backbone's features? Train a linear classifier of whole images on it, and say how often it is
    right.

    The backbone stays as it is. As in SoCo's appendix B: --recipe soco_table11_linear
    """
    from headstart.verbs.linear import linear as run

    done = run(
        start,
        train,
        val,
        out=out,
        backbone=backbone,
        recipe=recipe,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        seed=seed,
        device=device,
        settings=settings or [],
        resume=resume,
    )
    if not done.summary.finished:
        raise typer.Exit(STOPPED)
    if done.evaluation is not None:
        for table in done.evaluation.tables():
            results.print(table)
