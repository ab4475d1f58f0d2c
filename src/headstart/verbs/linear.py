"""Linear evaluation: how good are a backbone's features? A linear classifier of whole images on a fixed backbone.

SoCo, appendix B (arXiv 2106.02637): of the weights only the backbone's are used, and it stays as it is, the statistics
of its batch norms included. Random crops of 224 px and flips to train on, SGD with momentum .9, batch 256, lr 30, no
weight decay, 100 epochs; in testing the central 224 px of 256 px, top-1 and top-5.

Where the paper is silent, or has two readings:

* when the rate drops: by 10 at 60 and 80 epochs; the classifier's start: N(0, .01), bias 0. Both as MoCo has them, the
  first of those whose practice the paper says to follow.
* "resized to 256 x 256": word for word with ``test.square``, as the paper's recipe has it. Else the shorter side
  becomes 256 px, as with those it follows.
* another batch size scales the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import center_crop, resize
from typing_extensions import Self

from headstart import coco_eval, distributed, recipes
from headstart.console import notes, progress
from headstart.datasets.class_folders import ClassData, load_class_data
from headstart.detectors import backbones
from headstart.detectors.detector import as_float
from headstart.detectors.weights import LoadReport, save_detector
from headstart.engine import Job, Summary, TrainSettings, fit, pick_device, worker_count, worker_init
from headstart.errors import ImageError
from headstart.files import write_json
from headstart.optim import OptimSettings, settle_optim
from headstart.runs import LINEAR, Run, fingerprint
from headstart.settings import Settings, flatten, merge, parse_assignments, validate
from headstart.verbs.start import SCRATCH, detector_of, load_backbone, start_record
from headstart.views import random_crop_box

CLASSIFIER_FILE = "classifier.safetensors"
EPOCHS, BATCH = 100, 256
ADVICE = OptimSettings(
    optimizer="sgd", base_lr=30, base_batch=256, weight_decay=0, warmup_steps=0, schedule="steps", drops=[0.6, 0.8]
)
LAST_STAGE = 5  # C5, of stride 32
TESTED_AT_ONCE = 64
FEW_CLASSES = 20  # that are listed one by one
FAR_ABOVE = 3


class BackboneSettings(Settings):
    name: str = Field("resnet50", description="torchvision or timm backbone name, for example resnet18")
    composite: int = Field(1, ge=1, description="identical copies of the backbone, CBNetV2; the last one counts")
    image_mean: list[float] = Field(
        [0.485, 0.456, 0.406], min_length=3, max_length=3, description="RGB mean, in [0, 1]"
    )
    image_std: list[float] = Field(
        [0.229, 0.224, 0.225], min_length=3, max_length=3, description="RGB standard deviation, in [0, 1]"
    )


class AugmentSettings(Settings):
    view_px: int = Field(224, ge=32, description="side of what the backbone sees, in testing too, px")
    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="range of a crop's share of the image's area")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="range of a crop's width / height")
    flip_prob: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name, top in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                expected = "two numbers above 0, the smaller first" + (", up to 1" if top == 1 else "")
                raise ValueError(f"augment.{name}: {low}, {high}; expected {expected}")
        return self


class ScoringSettings(Settings):
    resize_px: int = Field(256, ge=32, description="shorter side before the central crop of view_px, px")
    square: bool = Field(False, description="both sides become resize_px, whatever the image's shape")
    every_epochs: float | None = Field(
        None, gt=0, description="passes over the images between evaluations; unset: one at the end"
    )


class LinearSettings(Settings):
    backbone: BackboneSettings = Field(default_factory=BackboneSettings)
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    test: ScoringSettings = Field(default_factory=ScoringSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)

    @model_validator(mode="after")
    def _no_larger_than_what_it_is_cut_from(self) -> Self:
        if self.test.resize_px < self.augment.view_px:
            raise ValueError(f"test.resize_px: {self.test.resize_px}; expected augment.view_px or more")
        return self


@dataclass
class Accuracy:
    """How often the right class is among the k surest.

    Attributes:
        data: where the images are.
        classes: names.
        labels: (n,) the right class of each image.
        ranks: (n,) how many other classes are at least as sure; of an unreadable image all.
        unreadable: image -> what is wrong with it.
    """

    data: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    ranks: np.ndarray
    unreadable: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    def top(self, k: int, label: int | None = None) -> float | None:
        """In 0..1, over all images or those of one class; None without images, or where there are no more classes."""
        ranks = self.ranks if label is None else self.ranks[self.labels == label]
        return float((ranks < k).mean()) if len(ranks) and k < len(self.classes) else None

    @property
    def commonest(self) -> float:
        """What always saying the commonest class would get."""
        return float(np.bincount(self.labels).max() / len(self.labels))

    def to_json(self) -> dict[str, Any]:
        by_class = {name: {"top1": self.top(1, k), "top5": self.top(5, k)} for k, name in enumerate(self.classes)}
        return {
            "data": str(self.data.resolve()),
            "images": len(self.labels),
            "metric": "accuracy",
            "metrics": {"accuracy": {"top1": self.top(1), "top5": self.top(5), "commonest": self.commonest}},
            "per_class": {"accuracy": by_class},
            "unreadable": self.unreadable,
        }

    def tables(self) -> list[Table]:
        whole = coco_eval.narrow_table("Linear evaluation, accuracy in %")
        for column in ("images", "classes", "top-1", "top-5", "always the commonest class"):
            whole.add_column(column, justify="right")
        scores = (coco_eval.percent(value) for value in (self.top(1), self.top(5), self.commonest))
        whole.add_row(f"{len(self.labels):,}", f"{len(self.classes):,}", *scores)
        if len(self.classes) > FEW_CLASSES:
            return [whole]
        each = coco_eval.narrow_table("By class")
        each.add_column("class", overflow="fold")
        for column in ("images", "top-1", "top-5"):
            each.add_column(column, justify="right")
        for k, name in enumerate(self.classes):
            scores = (coco_eval.percent(self.top(n, k)) for n in (1, 5))
            each.add_row(escape(name), f"{int((self.labels == k).sum()):,}", *scores)
        return [whole, each]


@dataclass
class Linear:
    """What :func:`linear` returns. ``evaluation`` is None for a run that was stopped, and in other processes."""

    path: Path
    model: Classifier
    summary: Summary
    load_report: LoadReport | None
    evaluation: Accuracy | None


class Classifier(nn.Module):
    """``forward(batch) -> {term: loss}``: a linear layer, ``fc``, on the mean over the last map of ``body``, which is
    fixed.

    Args:
        body: (B, 3, H, W) -> maps, finest first.
        width: channels of the last one.
        mean, std: of RGB images in [0, 1].
    """

    def __init__(self, body: nn.Module, width: int, classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)
        self.fc = nn.Linear(width, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.last: dict[str, Tensor] = {}  # of the last batch that was trained on

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        self.body.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, D) of ``images`` (B, 3, H, W), uint8 or float in [0, 1]."""
        *_, last = self.body((as_float(images) - self.mean) / self.std).values()
        return last.float().mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """(B, C), in float32: it costs next to nothing."""
        with torch.autocast(features.device.type, enabled=False):
            return self.fc(features)

    def forward(self, batch: _Batch) -> dict[str, Tensor]:
        features = self.features(batch.images)
        logits = self.logits(features)
        loss = F.cross_entropy(logits, batch.labels)
        right = (logits.argmax(1) == batch.labels).float().mean()
        self.last = {"feature_norm": features.square().sum(1).mean().sqrt(), "top1": right, "loss": loss.detach()}
        return {"class": loss}

    def watch(self) -> dict[str, float]:
        """Root mean square norm of the features, and the share of right answers in training."""
        return {name: float(self.last[name]) for name in ("feature_norm", "top1")}

    def warn(self, watched: Mapping[str, Any]) -> str | None:
        """Papers' rates are for features of their own size; ones that are much larger make the loss leap about.

        Gradient descent with momentum b is stable up to a rate of 2 (1 + b) / L, where L, the largest curvature of the
        loss, is at most half the mean square norm: half of that is advised.
        """
        guessing = math.log(self.fc.out_features)
        if float(self.last["loss"]) < FAR_ABOVE * guessing:
            return None
        return (
            f"the loss is more than {FAR_ABOVE} times {guessing:.2f}, that of guessing: the rate is too high for "
            f"features of norm {watched['feature_norm']:.3g}. Try --set optim.lr={4 / watched['feature_norm'] ** 2:.1g}"
        )


class _Batch:
    def __init__(self, samples: Sequence[tuple[Tensor, int]]) -> None:
        self.images = torch.stack([image for image, _ in samples])
        self.labels = torch.tensor([label for _, label in samples])

    def to(self, device: torch.device) -> _Batch:
        self.images = self.images.to(device, non_blocking=True)
        self.labels = self.labels.to(device, non_blocking=True)
        return self

    def pin_memory(self) -> _Batch:
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        return self


@dataclass
class _Crops:
    """A random crop of an image, perhaps mirrored, and its class."""

    data: ClassData
    augment: AugmentSettings

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        image = _read(self.data, index)
        height, width = image.shape[-2:]
        scale, ratio = self.augment.crop_scale, self.augment.crop_ratio
        x0, y0, x1, y1 = random_crop_box(height, width, rng, scale=scale, ratio=ratio)
        image = resize(image[:, y0:y1, x0:x1], [self.augment.view_px] * 2, antialias=True)
        if rng.random() < self.augment.flip_prob:
            image = image.flip(-1)
        return image, int(self.data.labels[index])


class _Centres(Dataset):
    """(place, central crop or None, what is wrong with the image) of the images at ``places``."""

    def __init__(self, data: ClassData, places: np.ndarray, config: LinearSettings) -> None:
        self.data, self.places, self.config = data, places, config

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        place = int(self.places[index])
        try:
            return place, central_view(_read(self.data, place), self.config), ""
        except ImageError as error:
            return place, None, str(error)


def _read(data: ClassData, index: int) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(data.images.decode(data.images.names[index])).permute(2, 0, 1)


def central_view(image: Tensor, config: LinearSettings) -> Tensor:
    """The central crop of an image (3, H, W) that was resized, bilinearly."""
    side = config.test.resize_px
    image = resize(image, [side, side] if config.test.square else [side], antialias=True)
    return center_crop(image, [config.augment.view_px] * 2)


def linear(
    start: Path | str,
    train: Path | str,
    val: Path | str,
    *,
    out: Path | str | None = None,
    backbone: str | None = None,
    recipe: Path | str | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    resume: bool = False,
    show: bool = True,
) -> Linear:
    """Train a linear classifier of whole images on a fixed backbone, and say how often it is right.

    Args:
        start: whose backbone: a run folder, a weights file, a transformers folder, "imagenet" (the library's own
            supervised weights), or "scratch".
        train: folder with a folder of images for each class, such as ImageNet's ``train``; or tar files of these.
        val: the same, or ImageNet's validation images without folders, with the development kit beside them.
        out: run folder; unset: ``runs/linear-START-seedN``.
        backbone: unset: what ``start`` was, or resnet50.
        recipe: name or file of a recipe whose numbers are the defaults.
        epochs, max_steps: length, in passes over the images or in steps; unset: 100 epochs.
        batch_size: images a step; unset: 256, or all where there are less.
        seed: of the classifier's first weights and of training.
        device: "auto", "cpu", "cuda", "cuda:1".
        settings: any other setting, ``{"optim.lr": 3}`` or ``["optim.lr=3"]``.
        resume: continue the run in ``out`` from its last checkpoint.
        show: progress bar, load report and notes.

    Raises:
        DataError, SettingsError, RunError, WeightsError, TrainingError: each says what is wrong, where, and what
            was expected.
    """
    base = detector_of(start)
    explicit = {
        "backbone.name": backbone,
        "train.epochs": epochs,
        "train.max_steps": max_steps,
        "train.batch_size": batch_size,
        "train.seed": seed,
        "train.device": device,
    }
    # The recipe, then what the start was built as, then what was asked for.
    values = merge({}, flatten(recipes.read(recipe, "linear"), model=LinearSettings))
    same: dict[str, Any] = {name: base[name] for name in ("composite", "image_mean", "image_std") if name in base}
    if "backbone" in base:
        same["name"] = base["backbone"]
    values = merge(values, {f"backbone.{key}": value for key, value in same.items()})
    values = merge(values, {k: v for k, v in explicit.items() if v is not None})
    assignments = settings if isinstance(settings, Mapping) else parse_assignments(LinearSettings, settings)
    config = validate(LinearSettings, merge(values, assignments), LINEAR)
    if epochs is not None and max_steps is None:
        config.train.max_steps = None

    compute = pick_device(config.train.device)
    out = Path(out) if out is not None else Path("runs") / f"linear-{Path(str(start)).stem}-seed{config.train.seed}"
    with distributed.processes(compute):
        talks = show and distributed.is_main()
        data = load_class_data(train, talks)
        held_out = load_class_data(val, talks).in_order_of(data.classes)
        said = settle(config, len(data))
        torch.manual_seed(config.train.seed)
        body = backbones.body(config.backbone.name, (LAST_STAGE,), config.backbone.composite)()
        report = None if str(start) == SCRATCH else load_backbone(body, config.backbone.name, start)
        model = classifier(config, body, len(data.classes))
        if talks:
            data.images.print_notes()
            held_out.images.print_notes()
            for note in said:
                notes.print(f"  {note}", soft_wrap=True, markup=False)
            if report is not None:
                notes.print(report.table())
        record = {
            "kind": LINEAR,
            "seed": config.train.seed,
            "config": config.model_dump(mode="json"),
            "data": {
                "train": str(train),
                "val": str(val),
                "n_images": len(data),
                "n_classes": len(data.classes),
                "fingerprint": fingerprint(data.images.names, data.images.sizes().tolist()),
            },
            "start": start_record(start),
            "load_report": None if report is None else report.as_dict(),
            "notes": said,
        }
        tested = _Tested(model, held_out, config, show)
        job = Job(
            name=LINEAR,
            model=model,
            images=len(data),
            load=_Crops(data, config.augment),
            collate=_Batch,
            name_of=data.images.names.__getitem__,
            watch=model.watch,
            warn=model.warn,
        )
        if config.test.every_epochs is not None:
            assert config.train.batch_size is not None
            job.examine_every = max(1, round(config.test.every_epochs * len(data) / config.train.batch_size))
            job.examine = tested
        run = Run.start(out, record, resume)
        summary = fit(job, config.train, config.optim, run, resume, show)
        evaluation = tested.after(summary.steps) if summary.finished else None
        if not distributed.is_main():
            return Linear(out, model, summary, report, None)
        scores: dict[str, Any] = {} if evaluation is None else evaluation.to_json()["metrics"]
        run.write(status="finished" if summary.finished else "stopped", summary={**summary.as_dict(), **scores})
        if evaluation is None:
            notes.print(f"stopped at step {summary.steps}; continue with the same command and --resume")
            return Linear(out, model, summary, report, None)
        metadata = {
            "kind": LINEAR,
            "classes": list(data.classes),
            "steps": summary.steps,
            "backbone": config.backbone.model_dump(mode="json"),
        }
        state = {f"fc.{name}": value for name, value in model.fc.state_dict().items()}  # as torchvision's ResNets
        save_detector(run.path / CLASSIFIER_FILE, state, metadata)
        evaluation.path = run.path / "eval.json"
        write_json(evaluation.path, evaluation.to_json())
        if show:
            for name, problem in evaluation.unreadable.items():
                notes.print(f"not evaluated, counted as wrong: {name}: {problem}", markup=False)
            notes.print(f"Weights: {run.path / CLASSIFIER_FILE}", markup=False)
    return Linear(out, model, summary, report, evaluation)


def classifier(config: LinearSettings, body: nn.Module, classes: int) -> Classifier:
    """A classifier on ``body``; what is random of it comes from the run's seed alone."""
    width: int = body.channels[-1]  # type: ignore[assignment,index]
    torch.manual_seed(config.train.seed)
    return Classifier(body, width, classes, config.backbone.image_mean, config.backbone.image_std)


def settle(config: LinearSettings, n_images: int) -> list[str]:
    """Fill in what the user left open; returns what was chosen and why."""
    train, said = config.train, []
    if train.batch_size is None:
        train.batch_size = min(BATCH, n_images)
        said.append(f"batch size {train.batch_size} of {n_images} images (--batch-size)")
    per_epoch = n_images / train.batch_size
    if train.max_steps is None:
        epochs = train.epochs or EPOCHS
        train.max_steps = max(1, round(epochs * per_epoch))
        if train.epochs is None:
            said.append(f"{train.max_steps} steps: {epochs} epochs of {n_images} images (--epochs, --max-steps)")
    return said + settle_optim(config.optim, ADVICE, train.batch_size, train.max_steps, per_epoch)


class _Tested:
    """Evaluations, the last of which is not repeated."""

    def __init__(self, model: Classifier, data: ClassData, config: LinearSettings, show: bool) -> None:
        self.model, self.data, self.config, self.show = model, data, config, show
        self.last: tuple[int, Accuracy] | None = None

    def __call__(self, done: int) -> tuple[dict[str, Any], bool]:
        scores = self.after(done)
        return {"validation": {"top1": scores.top(1), "top5": scores.top(5)}}, False

    def after(self, steps: int) -> Accuracy:
        if self.last is None or self.last[0] != steps:
            self.last = (steps, assess(self.model, self.data, self.config, self.show))
        return self.last[1]


@torch.no_grad()
def assess(model: Classifier, data: ClassData, config: LinearSettings, show: bool) -> Accuracy:
    """Accuracies on ``data``, the same in all processes, each of which looks at its share of the images."""
    device = model.fc.weight.device
    places = np.arange(distributed.rank(), len(data), distributed.world())
    loader = DataLoader(
        _Centres(data, places, config),
        TESTED_AT_ONCE,
        num_workers=worker_count(config.train, device),
        collate_fn=list,
        worker_init_fn=worker_init if worker_count(config.train, device) else None,
    )
    was_training = model.training
    model.eval()
    found: dict[int, int] = {}
    unreadable: dict[str, str] = {}
    with progress("evaluate", len(places), "images", show and distributed.is_main()) as bar:
        for samples in loader:
            good = [(place, image) for place, image, _ in samples if image is not None]
            unreadable |= {data.images.names[place]: problem for place, _, problem in samples if problem}
            if good:
                right = torch.from_numpy(data.labels[[place for place, _ in good]])
                logits = model.logits(model.features(torch.stack([image for _, image in good]).to(device)))
                ranks = ranks_of(logits.cpu(), right)
                found |= {place: rank for (place, _), rank in zip(good, ranks.tolist(), strict=True)}
            bar.advance(len(samples))
    model.train(was_training)
    ranks = np.full(len(data), len(data.classes), np.int64)
    problems: dict[str, str] = {}
    for theirs, bad in distributed.gather((found, unreadable)):
        ranks[list(theirs)] = list(theirs.values())
        problems |= bad
    return Accuracy(data.path, data.classes, data.labels, ranks, problems)


def ranks_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) how many other classes are at least as sure as the right one: (B, C) and (B,) int64.

    Ties count against it, or a classifier that says the same of all would always be right; so does what is no number.
    """
    right = logits.gather(1, labels[:, None])
    return (~(logits < right)).sum(1) - 1
