"""``evaluate``, ``compare``, ``report`` and ``export``: what came of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from headstart.cli.options import (
    STOPPED,
    Backbone,
    BatchSize,
    Device,
    Epochs,
    MaxSteps,
    Recipe,
    Set,
    WithSettings,
    detector_given,
)
from headstart.console import notes, results
from headstart.detectors import FAMILIES


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            help="Fine-tuned run folder or transformers folder; or boxes without classes: the .parquet file of "
            "propose, or one in a run's priors/.",
            metavar="RUN",
        ),
    ],
    data: Annotated[
        Path, typer.Argument(help="COCO JSON, VOC folder or ImageSets/Main list, or split file.", metavar="LABELS")
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="coco, lvis, voc (area under the curve), voc07 (11 points), or proposals (whatever the class).  "
            "\\[default: that of the data]",
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Folder of the images.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="JSON file.  \\[default: RUN/eval_LABELS.json of a run]")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time.")] = 8,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """AP and AR of a fine-tuned run or of boxes, over all and per class, and what AP is lost to: tables and JSON."""
    from headstart.verbs.evaluate import evaluate as score

    evaluation = score(run, data, metric=metric, images=images, out=out, batch_size=batch_size, device=device)
    for table in evaluation.tables():
        results.print(table)
    if evaluation.path is not None:
        notes.print(f"Written: {evaluation.path}")


class Compare(WithSettings):
    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        from headstart.verbs.finetune import config_type

        detector = detector_given(arguments, "finetune", "faster_rcnn")
        return config_type(detector), f"the detector and of fine-tuning, with {detector} (--detector)"


def compare(
    train: Annotated[Path, typer.Option("--train", help="Labels: COCO JSON, VOC folder, or ImageSets/Main list.")],
    val: Annotated[Path, typer.Option("--val", help="Labels to evaluate on.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs and the answer; the same goes on with it.")],
    starts: Annotated[
        str,
        typer.Option(
            "--starts",
            help="Ways of starting, with commas: scratch, imagenet, run folders, weights files, methods (soco), and "
            "methods on another start (aligndet@soco). The baseline is scratch, or else the first.",
        ),
    ],
    labels: Annotated[
        str, typer.Option("--labels", help="Label budgets, with commas: 10%, a number of images, all.")
    ] = "1%,5%,10%,100%",
    seeds: Annotated[
        int, typer.Option("--seeds", help="Runs for each start and budget; 3 at least for a verdict.")
    ] = 3,
    unlabelled: Annotated[
        Path | None, typer.Option("--unlabelled", help="Photos to pretrain on, once for each method.", metavar="PHOTOS")
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector",
            help=f"{', '.join(FAMILIES)}.  \\[default: the recipe's, or as the first start that is a run]",
            metavar="NAME",
        ),
    ] = None,
    backbone: Backbone = None,
    train_images: Annotated[Path | None, typer.Option("--train-images", help="Folder of --train's images.")] = None,
    val_images: Annotated[Path | None, typer.Option("--val-images", help="Folder of --val's images.")] = None,
    proposals: Annotated[
        Path | None, typer.Option("--proposals", help="Boxes of --unlabelled.  \\[default: found here, once]")
    ] = None,
    recipe: Recipe = None,
    pretrain_recipe: Annotated[
        list[str] | None,
        typer.Option("--pretrain-recipe", help="Recipe of another method; may be repeated.", show_default=False),
    ] = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    pretrain_epochs: Annotated[
        float | None, typer.Option("--pretrain-epochs", help="Length of every pretraining, in passes over the photos.")
    ] = None,
    pretrain_max_steps: Annotated[
        int | None, typer.Option("--pretrain-max-steps", help="Length of every pretraining, in steps.")
    ] = None,
    settings: Set = None,
    pretrain_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--pretrain-set",
            help="A setting of every pretraining, or of one method's; may be repeated.",
            metavar="[METHOD:]KEY=VALUE",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="Runs at once.  \\[default: one a CUDA device, one on the CPU]")
    ] = None,
    stop_early: Annotated[
        bool, typer.Option("--stop-early", help="Add seeds one by one, and stop when the verdict is clear.")
    ] = False,
) -> None:
    """Does pretraining pay on these data? Every start with every label budget and seed, by one schedule.

    Pretrains what has to be, once; fine-tunes the grid; prints the verdict, and writes compare.json, pictures and a
    report. A killed command goes on where it stopped when it is repeated. --epochs, --max-steps, --set are of
    fine-tuning, the same for all.

    headstart compare --detector faster_rcnn --train train.json --val val.json --unlabelled PHOTOS
    --starts scratch,soco,aligndet@soco --labels 5%,10%,25%,100% --seeds 3 --out runs/compare
    """
    from headstart.verbs.compare import compare as run

    done = run(
        train,
        val,
        out=out,
        starts=starts.split(","),
        labels=labels.split(","),
        seeds=seeds,
        unlabelled=unlabelled,
        detector=detector,
        backbone=backbone,
        train_images=train_images,
        val_images=val_images,
        proposals=proposals,
        recipe=recipe,
        pretrain_recipes=pretrain_recipe or [],
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        pretrain_epochs=pretrain_epochs,
        pretrain_max_steps=pretrain_max_steps,
        settings=settings or [],
        pretrain_settings=pretrain_settings or [],
        device=device,
        jobs=jobs,
        stop_early=stop_early,
    )
    for table in done.tables():
        results.print(table)
    for sentence in done.sentences:
        results.print(f"\n{sentence}", markup=False)
    if done.command:
        results.print(f"  {done.command}", markup=False, soft_wrap=True)
    notes.print(f"Written: {done.path}", markup=False)
    if not done.finished:
        raise typer.Exit(STOPPED)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or what compare made.", metavar="RUN...")],
    out: Annotated[Path, typer.Option("--out", help="HTML file.")] = Path("report.html"),
    images: Annotated[int, typer.Option("--images", help="Photos shown with detections.")] = 24,
    threshold: Annotated[
        float, typer.Option("--threshold", help="Detections with at least this score are drawn.")
    ] = 0.5,
) -> None:
    """One self-contained HTML page about runs: APs with spread, curves, detections beside ground truth."""
    from headstart.verbs.report import report as write

    path = write(runs, out, images=images, threshold=threshold)
    notes.print(f"Written: {path}")


def export(
    run: Annotated[Path, typer.Argument(help="Run folder, pretrained or fine-tuned.", metavar="RUN")],
    to: Annotated[
        str,
        typer.Option("--to", help="torchvision, detectron2, mmdetection, timm (the backbone alone), or transformers."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File or folder to write.  \\[default: TO.safetensors or TO in the run folder]"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="safetensors, or pth for that library's own loaders.  \\[default: as --out]"),
    ] = None,
) -> None:
    """Write a run's weights under the names and in the layouts of another library, and say how to load them there."""
    from headstart.verbs.export import export as write

    done = write(run, to, out, format=format)
    results.print(done.table())
    if done.settings:
        results.print("\nThe model there has to be as wide and as deep, and set to:")
        for key, value in done.settings.items():
            results.print(f"  {key} = {value!r}", markup=False, soft_wrap=True)
    results.print(f"\nLoad it:\n  {done.loading}", markup=False, soft_wrap=True)
