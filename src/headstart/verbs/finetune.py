"""Fine-tuning: a pretrained run, a weights file or nothing, and some labels -> a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, create_model, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from typing_extensions import Self

from headstart import detectors, distributed, recipes
from headstart.console import notes
from headstart.datasets.detection import DetectionData, load_detection_data
from headstart.datasets.splits import choose_labelled, write_split
from headstart.datasets.torch_dataset import DetectionDataset
from headstart.detectors.detector import Detector, Target, lent
from headstart.detectors.weights import LoadReport, read_state, save_detector, write_plain_code
from headstart.engine import Job, Summary, TrainSettings, fit, pick_device
from headstart.errors import DataError, RunError, SettingsError
from headstart.optim import OptimSettings, settle_optim
from headstart.runs import DETECTOR_FILE, Run, fingerprint
from headstart.settings import Settings, flatten, merge, parse_assignments, validate
from headstart.verbs.evaluate import Evaluation, in_order_of, run_detector, write_evaluation
from headstart.verbs.start import SCRATCH, detector_of, for_family, load_start, start_record

EPOCHS = 12  # COCO's 1x schedule
MIN_STEPS = 1000
GREY = 114  # of padding; what the field's detectors pad with


class AugmentSettings(Settings):
    flip_prob: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    scale_jitter: tuple[float, float] | None = Field(
        None,
        description="range of the scale an image is put on a canvas of canvas_px at, cut or padded; (0.1, 2) is "
        "large-scale jitter. Unset: none",
    )
    canvas_px: int = Field(1024, ge=1, description="side of that canvas, px")


class TuneSettings(Settings):
    frozen_stages: int = Field(
        0, ge=0, description="0: none; 1: the backbone's stem and first stage stay as they are; 2: the second too; ..."
    )
    backbone_norm: Literal["train", "fixed"] = Field(
        "train", description="fixed: batch norm in the backbone keeps its statistics (its scale and shift still learn)"
    )
    only: list[str] | None = Field(
        None, description="parts of the detector that are trained, for example [classifier, regressor]; unset: all"
    )
    validate_epochs: float | None = Field(
        None,
        gt=0,
        description="passes over the labelled images between evaluations on the validation data, the best of which "
        "decides what is kept; unset: one at the end",
    )
    patience: int | None = Field(
        None, ge=1, description="evaluations in a row without a better AP that end the run; unset: it runs to its end"
    )

    @model_validator(mode="after")
    def _patient_with_something(self) -> Self:
        if self.patience is not None and self.validate_epochs is None:
            raise ValueError("patience: needs tune.validate_epochs, how often to look")
        return self


def config_type(detector: str = "faster_rcnn") -> type[BaseModel]:
    """The settings of a fine-tuning run, nested: detector, tune, augment, optim, train."""
    return create_model(
        "FinetuneSettings",
        detector=(
            detectors.settings_type(detector),
            Field(default_factory=detectors.settings_type(detector)),
        ),
        tune=(TuneSettings, Field(default_factory=TuneSettings)),
        augment=(AugmentSettings, Field(default_factory=AugmentSettings)),
        optim=(OptimSettings, Field(default_factory=lambda: OptimSettings(schedule="steps"))),
        train=(TrainSettings, Field(default_factory=TrainSettings)),
        __config__={"extra": "forbid", "validate_assignment": True},
    )


@dataclass
class Finetuned:
    """What :func:`finetune` returns. ``evaluation`` is None without validation data.

    ``best_step``: after which the weights were best, where that was asked for.
    """

    path: Path
    detector: Detector
    summary: Summary
    load_report: LoadReport | None
    evaluation: Evaluation | None
    best_step: int | None = None


class Supervised(nn.Module):
    """``forward(batch) -> {term: loss}``: the detector's own.

    Raises:
        SettingsError: ``tune`` names parts or stages that the detector does not have.
    """

    def __init__(self, detector: Detector, tune: TuneSettings) -> None:
        super().__init__()
        self.detector = detector
        parts = detector.parts
        only = tune.only if tune.only is not None else list(parts)
        unknown = [name for name in only if name not in parts]
        if unknown:
            raise SettingsError(f"tune.only: no part {', '.join(unknown)}; this detector has {', '.join(parts)}")
        # Parts may share layers: what one trained part has is trained.
        learning = {id(p) for name in only for p in parts[name].parameters()}
        self._fixed: list[nn.Module] = [parts[name] for name in parts if name not in only]
        if tune.frozen_stages:
            stages = detector.stages()
            if tune.frozen_stages >= len(stages):
                raise SettingsError(f"tune.frozen_stages={tune.frozen_stages}: the backbone has {len(stages) - 1}")
            frozen = [layer for stage in stages[: tune.frozen_stages + 1] for layer in stage]
            learning -= {id(p) for layer in frozen for p in layer.parameters()}
            self._fixed += frozen
        for parameter in detector.parameters():
            if id(parameter) not in learning:
                parameter.requires_grad_(False)
        if tune.backbone_norm == "fixed":
            self._fixed += [m for m in parts["backbone"].modules() if isinstance(m, _BatchNorm)]

    def train(self, mode: bool = True) -> Supervised:
        super().train(mode)
        for layers in self._fixed:
            layers.eval()
        return self

    def forward(self, batch: _Labelled) -> dict[str, Tensor]:
        return self.detector.loss(batch.images, batch.targets)


class _Labelled:
    """A batch of images of different sizes and their targets."""

    def __init__(self, samples: Sequence[tuple[Tensor, Target]]) -> None:
        self.images = [image for image, _ in samples]
        self.targets = [
            {k: v for k, v in target.items() if isinstance(v, Tensor)} for _, target in samples
        ]  # without the image's id

    def to(self, device: torch.device) -> _Labelled:
        self.images = [image.to(device, non_blocking=True) for image in self.images]
        self.targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in self.targets]
        return self

    def pin_memory(self) -> _Labelled:
        self.images = [image.pin_memory() for image in self.images]
        return self


class _Validation:
    """Evaluates while training goes on, keeps the best weights, and says when to stop (ProSeCo's protocol)."""

    def __init__(self, detector: Detector, data: DetectionData, patience: int | None, run: Path, show: bool) -> None:
        self.detector, self.data, self.patience, self.run, self.show = detector, data, patience, run, show
        self.best: float | None = None
        self.best_step = 0
        self.since = 0  # evaluations after the best one

    def file(self, step: int) -> Path:
        return self.run / f"best_{step:06d}.safetensors"

    def __call__(self, done: int) -> tuple[dict[str, Any], bool]:
        metrics = None
        if distributed.is_main():
            device = next(self.detector.parameters()).device
            metrics = run_detector(self.detector, self.data, 8, device, self.show).metrics["bbox"]
        metrics = distributed.gather(metrics)[0]
        ap = metrics["AP"] if metrics["AP"] is not None else 0.0
        if self.best is None or ap > self.best:
            self._keep(done)
            self.best, self.best_step, self.since = ap, done, 0
        else:
            self.since += 1
        return {"validation": {**metrics, "best": self.best}}, self.patience is not None and self.since >= self.patience

    def _keep(self, step: int) -> None:
        """The last checkpoint still names the best weights until now: they stay, and those before them go."""
        if not distributed.is_main():
            return
        save_detector(self.file(step), self.detector.module.state_dict(), {"kind": "best", "steps": step})
        for old in self.run.glob("best_*.safetensors"):
            if old not in (self.file(step), self.file(self.best_step)):
                old.unlink()

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "since": self.since}

    def restore(self, state: dict[str, Any]) -> None:
        """
        Raises:
            RunError: the best weights until then are gone.
        """
        if not state or state["best"] is None:
            return
        file = self.file(state["best_step"])
        if not file.is_file():
            raise RunError(f"{file}: is gone, the best weights so far, so the run can't go on; start it anew")
        self.best, self.best_step, self.since = state["best"], state["best_step"], state["since"]

    def take_best(self) -> None:
        self.detector.module.load_state_dict(read_state(self.file(self.best_step)))


@dataclass
class _Loader:
    dataset: DetectionDataset
    augment: AugmentSettings

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Target]:
        image, target = self.dataset[index]
        if self.augment.scale_jitter is not None:
            image, target = jitter_scale(image, target, rng, self.augment.scale_jitter, self.augment.canvas_px)
        return flip(image, target) if rng.random() < self.augment.flip_prob else (image, target)


def jitter_scale(
    image: Tensor, target: Target, rng: np.random.Generator, scales: tuple[float, float], canvas_px: int
) -> tuple[Tensor, Target]:
    """Large-scale jitter (Ghiasi et al., 2021): the image, sized to fit a canvas times a random scale, on that canvas.

    Larger than the canvas it is cut at a random place, smaller it is padded at the right and the bottom with grey.

    Returns:
        (3, canvas_px, canvas_px), and the objects of which at least a pixel is left.
    """
    height, width = image.shape[-2:]
    factor = canvas_px * float(rng.uniform(*scales)) / max(height, width)
    new = [max(1, round(height * factor)), max(1, round(width * factor))]
    image = resize(image, new, antialias=True)
    top, left = (int(rng.integers(max(0, side - canvas_px) + 1)) for side in new)
    image = image[:, top : top + canvas_px, left : left + canvas_px]
    canvas = image.new_full((image.shape[0], canvas_px, canvas_px), GREY)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    scale = torch.tensor([new[1] / width, new[0] / height] * 2)
    offset = torch.tensor([left, top, left, top])
    limits = torch.tensor([image.shape[2], image.shape[1]] * 2)
    boxes = (target["boxes"] * scale - offset).clamp(min=0).minimum(limits)
    left_over = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
    kept = {k: v[left_over] if isinstance(v, Tensor) else v for k, v in target.items()} | {"boxes": boxes[left_over]}
    kept.pop("area", None)  # of the object as it was
    if "masks" in target:
        masks = resize(target["masks"], new, interpolation=InterpolationMode.NEAREST)[left_over]
        masks = masks[:, top : top + canvas_px, left : left + canvas_px]
        kept["masks"] = masks.new_zeros((len(masks), canvas_px, canvas_px))
        kept["masks"][:, : masks.shape[1], : masks.shape[2]] = masks
    return canvas, kept


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirror an image (3, H, W), its boxes and masks."""
    width = image.shape[-1]
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    flipped = {**target, "boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(-1)
    return image.flip(-1), flipped


def finetune(
    start: Path | str | nn.Module,
    train: Path | str,
    val: Path | str | None = None,
    *,
    labels: str | int = "all",
    out: Path | str | None = None,
    detector: str | None = None,
    backbone: str | None = None,
    train_images: Path | str | None = None,
    val_images: Path | str | None = None,
    recipe: Path | str | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    resume: bool = False,
    show: bool = True,
) -> Finetuned:
    """Train a detector on labelled images, all of them or a budget, and evaluate it.

    Args:
        start: a run folder (pretrained or fine-tuned), a weights file (.safetensors, or .pth with tensors only),
            "scratch", or a torchvision detector, which is trained in place.
        train: COCO JSON, Pascal VOC folder, a list in ``ImageSets/Main``, or a split of ``headstart protocol split``.
        val: the same, for the evaluation at the end.
        labels: label budget: "10%", a number of images, "5shot" (boxes of each class), "all", a split file, or the
            ``labels.json`` of another run. The exact images are written to ``labels.json`` in the run folder.
        out: run folder; unset: ``runs/finetune-START-LABELS-seedN``.
        detector, backbone: what to build; unset: what ``start`` was.
        train_images, val_images: folders of the images, where they are not beside the annotations.
        recipe: name or file of a recipe whose numbers are the defaults.
        epochs, max_steps: length, in passes over the labelled images or in steps.
        batch_size: images a step.
        seed: of the label budget, of new weights, and of training.
        device: "auto", "cpu", "cuda", "cuda:1".
        settings: any other setting, ``{"optim.lr": 0.01}`` or ``["optim.lr=0.01"]``.
        resume: continue the run in ``out`` from its last checkpoint.
        show: progress bar, load report and notes.

    Raises:
        DataError, SettingsError, RunError, WeightsError, TrainingError: each says what is wrong, where, and what
            was expected.
    """
    given = start if isinstance(start, nn.Module) else None
    base = detector_of(start) if given is None else {}
    section = recipes.read(recipe, "finetune")
    name = detector or section.get("detector", {}).get("name") or base.get("name") or "faster_rcnn"
    base = for_family(name, base)
    kind = config_type(name)
    explicit = {
        "detector.name": name,
        "detector.backbone": backbone,
        "train.epochs": epochs,
        "train.max_steps": max_steps,
        "train.batch_size": batch_size,
        "train.seed": seed,
        "train.device": device,
    }
    # What the start was built as, then the recipe, then what was asked for.
    values = merge({"optim": {"schedule": "steps"}}, {f"detector.{k}": v for k, v in base.items()})
    values = merge(values, flatten(section, model=kind))
    values = merge(values, {k: v for k, v in explicit.items() if v is not None})
    assignments = settings if isinstance(settings, Mapping) else parse_assignments(kind, settings)
    config: Any = validate(kind, merge(values, assignments), "finetune")
    if epochs is not None and max_steps is None:
        config.train.max_steps = None

    data = load_detection_data(train, _path(train_images))
    held_out = None
    if val is not None:
        held_out = in_order_of(load_detection_data(val, _path(val_images)), [c.name for c in data.categories])
    elif config.tune.validate_epochs is not None:
        raise SettingsError("tune.validate_epochs: needs labels to evaluate on (--val)")
    split = choose_labelled(data, labels, config.train.seed)
    chosen = split.of(data)
    config.detector.num_classes = len(data.categories)
    compute = pick_device(config.train.device)
    out = Path(out) if out is not None else default_folder(start, labels, config.train.seed)
    with distributed.processes(compute):
        torch.manual_seed(config.train.seed)
        wrapped = detectors.build(config.detector) if given is None else detectors.wrap(given)
        said = settle(config, wrapped, len(chosen.images), compute)
        masks = "mask_head" in wrapped.parts
        check_classes(wrapped, data)
        check_masks(wrapped, chosen)
        report = load_start(wrapped, start) if given is None and start != SCRATCH else None
        if show and distributed.is_main():
            for note in [*data.notes, *said]:
                notes.print(f"  {note}", soft_wrap=True, markup=False)
            if report is not None:
                notes.print(report.table())
        record = {
            "kind": "finetune",
            "seed": config.train.seed,
            "config": {
                **config.model_dump(mode="json"),
                **({"detector": {"object": type(given).__name__}} if given is not None else {}),
            },
            "data": {
                "train": str(train),
                "val": None if val is None else str(val),
                "train_images": None if train_images is None else str(train_images),
                "val_images": None if val_images is None else str(val_images),
                "n_images": len(chosen.images),
                "fingerprint": fingerprint(
                    [r.file_name for r in chosen.images], [r.width * r.height for r in chosen.images]
                ),
            },
            "start": start_record(start),
            "labels": {"budget": str(labels), "images": len(chosen.images), "ids_file": "labels.json"},
            "load_report": None if report is None else report.as_dict(),
            "notes": said,
        }
        dataset = DetectionDataset(chosen, masks=masks)
        with lent(wrapped):
            job = Job(
                name="finetune",
                model=Supervised(wrapped, config.tune),
                images=len(chosen.images),
                load=_Loader(dataset, config.augment),
                collate=_Labelled,
                name_of=[record.file_name for record in chosen.images].__getitem__,
            )
            run = Run.start(out, record, resume)
            validation = None
            if held_out is not None and config.tune.validate_epochs is not None:
                validation = _Validation(wrapped, held_out, config.tune.patience, run.path, show)
                job.examine_every = max(1, round(config.tune.validate_epochs * job.images / config.train.batch_size))
                job.examine, job.state, job.restore = validation, validation.state, validation.restore
            if distributed.is_main():
                write_split(run.path / "labels.json", split, data, labels, config.train.seed)
            summary = fit(job, config.train, config.optim, run, resume, show)
            if validation is not None and summary.finished:
                validation.take_best()
        evaluation = None
        best_step = None if validation is None else validation.best_step
        if distributed.is_main():
            said_of_best = {} if validation is None else {"best": {"step": best_step, "AP": validation.best}}
            run.write(
                status="finished" if summary.finished else "stopped", summary={**summary.as_dict(), **said_of_best}
            )
            if not summary.finished:
                notes.print(f"stopped at step {summary.steps}; continue with the same command and --resume")
            else:
                classes = [category.name for category in data.categories]
                metadata = {"kind": "finetune", "classes": classes, "steps": best_step or summary.steps}
                save_detector(run.path / DETECTOR_FILE, wrapped.module.state_dict(), metadata)
                write_plain_code(run.path, wrapped, _LOADING.format(file=DETECTOR_FILE, classes=classes))
                if held_out is not None:
                    with lent(wrapped):
                        evaluation = run_detector(wrapped, held_out, 8, compute, show)
                    write_evaluation(evaluation, run.path / "eval.json")
                if show:
                    if validation is not None and validation.best is not None:
                        early = f"; stopped at {summary.steps}" if summary.steps < config.train.max_steps else ""
                        notes.print(f"Best on validation: AP {100 * validation.best:.1f} after step {best_step}{early}")
                    notes.print(f"Weights: {run.path / DETECTOR_FILE}")
    return Finetuned(out, wrapped, summary, report, evaluation, best_step)


def check_classes(detector: Detector, data: DetectionData) -> None:
    """Raises: DataError where ``data`` have more classes than ``detector`` has outputs, as a user's own may."""
    if len(data.categories) > detector.num_classes:
        raise DataError(
            f"{data.source}: has {len(data.categories)} classes, the detector {detector.num_classes}; "
            "expected one with at least as many (torchvision's num_classes counts the "
            "background besides)"
        )


def check_masks(detector: Detector, data: DetectionData) -> None:
    """Raises: DataError where ``detector`` is trained with masks, and the data have none."""
    if "mask_head" in detector.parts and not data.has_masks:
        raise DataError(
            f"{data.source}: has no masks, which this detector is trained with. Use --detector faster_rcnn: its "
            "backbone, FPN and box head take the same pretrained weights"
        )


def settle(config: Any, detector: Detector, n_images: int, device: torch.device) -> list[str]:
    """Fill in what the user left open; returns what was chosen and why."""
    train, said = config.train, []
    if train.batch_size is None:
        train.batch_size = 16 if device.type == "cuda" else 8
        said.append(f"batch size {train.batch_size}: for this {device.type} (--batch-size)")
    per_epoch = n_images / train.batch_size
    if train.max_steps is None:
        epochs = train.epochs or max(EPOCHS, MIN_STEPS / per_epoch)
        train.max_steps = max(1, round(epochs * per_epoch))
        if train.epochs is None:
            said.append(
                f"{train.max_steps} steps: {epochs:.0f} epochs of {n_images} labelled images (--epochs, --max-steps)"
            )
    advised = detector.tuning()
    other = config.optim.optimizer == "adamw" != advised.optimizer
    if other and config.optim.lr is None and config.optim.base_lr is None:
        config.optim.lr = 1e-4
    said += settle_optim(config.optim, advised, train.batch_size, train.max_steps, per_epoch)
    config.optim.warmup_steps = min(config.optim.warmup_steps, 1000)
    return said


def default_folder(start: Any, labels: str | int, seed: int) -> Path:
    origin = "detector" if isinstance(start, nn.Module) else Path(str(start)).stem
    budget = str(labels).replace("%", "pct")
    return Path("runs") / f"finetune-{origin}-{Path(budget).stem}-seed{seed}"


def _path(value: Path | str | None) -> Path | None:
    return None if value is None else Path(value)


_LOADING = """\
# Classes 1.. in order: {classes}
from pathlib import Path

from safetensors.torch import load_file

detector.load_state_dict(load_file(Path(__file__).with_name("{file}")))
"""
