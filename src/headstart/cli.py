"""The verbs of :mod:`headstart` for the shell. Nothing here that the Python API lacks.

Heavy libraries are imported inside the commands, so that ``headstart --help`` answers at once.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from headstart import __version__
from headstart.console import notes, results
from headstart.detectors import FAMILIES
from headstart.errors import HeadstartError
from headstart.methods import METHODS, SUMMARIES

CONTEXT = {"help_option_names": ["-h", "--help"]}
STOPPED = 130  # what a shell expects of a command that Ctrl-C ended

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

# Options that mean the same everywhere are written once, here.
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


def _given(arguments: Sequence[str], option: str) -> str | None:
    """The value of ``option`` on a command line that has not been parsed yet."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


class _WithSettings(TyperCommand):
    """``--help`` shows, under the options, every setting that ``--set`` takes, with default and unit."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_WithSettings] = list(args)  # --help is answered before the other options are read
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        kind, what = self.settings_type(ctx.meta[_WithSettings])
        results.print(settings_table(kind, f"Settings of {what}, and their defaults"))
        results.print(
            "Set them with [bold]--set KEY=VALUE[/bold]; the last part of a key is enough where it is the only one."
        )

    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        """The settings that a command line with these ``arguments`` takes, and whose they are."""
        raise NotImplementedError


class _Propose(_WithSettings):
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


class _Pretrain(_WithSettings):
    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        from headstart.methods import method_type
        from headstart.verbs.pretrain import config_type

        detector = _detector_given(arguments, "pretrain", method_type(str(self.name)).detector)
        return config_type(str(self.name), detector), f"{self.name} with {detector} (--detector)"


class _Finetune(_WithSettings):
    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        from headstart.verbs.finetune import config_type

        detector = _detector_given(arguments, "finetune", "faster_rcnn")
        return config_type(detector), f"{self.name} with {detector} (--detector)"


class _Linear(_WithSettings):
    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        from headstart.verbs.linear import LinearSettings

        return LinearSettings, str(self.name)


class _Compare(_WithSettings):
    def settings_type(self, arguments: Sequence[str]) -> tuple[Any, str]:
        from headstart.verbs.finetune import config_type

        detector = _detector_given(arguments, "finetune", "faster_rcnn")
        return config_type(detector), f"the detector and of fine-tuning, with {detector} (--detector)"


def _detector_given(arguments: Sequence[str], verb: str, otherwise: str) -> str:
    from headstart.recipes import read

    recipes_own = read(_given(arguments, "--recipe"), verb).get("detector", {}).get("name")
    return _given(arguments, "--detector") or recipes_own or otherwise


@app.callback(invoke_without_command=True)
def _headstart(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        results.print(__version__)
        raise typer.Exit


@app.command()
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


@app.command(cls=_Propose)
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


class _Methods(TyperGroup):
    """One subcommand a method, made from the registry when it is asked for. A recipe names its method itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        recipe = _given(args, "--recipe")
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
        one.command(cmd_name, cls=_Pretrain, help=SUMMARIES[cmd_name], context_settings=CONTEXT)(
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
app.add_typer(pretrain, name="pretrain")


@pretrain.callback()
def _pretrain() -> None:
    """Keeps Typer from folding the group into its only command."""


@app.command(cls=_Finetune)
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


@app.command(cls=_Linear)
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


@app.command()
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


@app.command(cls=_Compare)
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


@app.command()
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


@app.command()
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


@app.command()
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


protocol = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings=CONTEXT,
    help="The data sets and splits that papers measure on: COCO, Mini-COCO, VOC, Mini-VOC, few-shot VOC, LVIS, FSOD, "
    "SODA10M; and ImageNet's linear evaluation.",
)
app.add_typer(protocol, name="protocol")

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


@app.command()
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


def main() -> None:
    """Entry point: what a user can mend is one message, not a traceback."""
    try:
        app()
    except HeadstartError as error:
        notes.print("[bold red]error:[/bold red] ", end="")
        notes.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)
