"""Pretraining: images nobody has labelled -> a detector with trained parts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field, create_model
from torch import Tensor, nn

from headstart import detectors, distributed, methods, recipes, views
from headstart.console import notes
from headstart.datasets.image_set import ImageSet
from headstart.detectors.detector import Detector, lent
from headstart.detectors.norm_statistics import recompute_statistics
from headstart.detectors.weights import LoadReport, save_detector, write_plain_code
from headstart.ema import EMA
from headstart.engine import Job, Summary, TrainSettings, fit, pick_device
from headstart.errors import DataError, ImageError, SettingsError
from headstart.methods.method import Method, Net, ViewBatch, collate_views
from headstart.optim import OptimSettings, settle_optim
from headstart.proposals import ProposalSettings, make_engine
from headstart.proposals.finder import Finder
from headstart.proposals.store import ProposalStore
from headstart.runs import DETECTOR_FILE, Run, fingerprint
from headstart.settings import flatten, merge, parse_assignments, validate
from headstart.verbs.propose import propose
from headstart.verbs.pseudo_classes import PseudoClasses
from headstart.verbs.refresh import Refresh
from headstart.verbs.start import SCRATCH, detector_of, for_family, load_start, start_record

CPU_MEMORY_GIB = 8  # where there is no GPU: a share of what such machines have
ON_THE_FLY = "on-the-fly"  # instead of a file of proposals
NORM_PX, NORM_BOXES = 2_000_000, 8  # pixels at a time, and boxes an image, that batch norm's statistics are taken over
CACHE = "cache"  # in the run folder: proposals as workers and processes share them
MIN_STEPS = 2000  # of a small set of images, the paper's epochs would be over before anything is learnt


def config_type(method: str, detector: str = "faster_rcnn") -> type[BaseModel]:
    """The settings of a pretraining run, nested: detector, method, optim, train, proposals."""
    return create_model(
        "PretrainSettings",
        detector=(
            detectors.settings_type(detector),
            Field(default_factory=detectors.settings_type(detector)),
        ),
        method=(
            methods.method_type(method).settings_type,
            Field(default_factory=methods.method_type(method).settings_type),
        ),
        optim=(OptimSettings, Field(default_factory=OptimSettings)),
        train=(TrainSettings, Field(default_factory=TrainSettings)),
        proposals=(ProposalSettings, Field(default_factory=ProposalSettings)),
        __config__={"extra": "forbid", "validate_assignment": True},
    )


@dataclass
class Pretrained:
    """What :func:`pretrain` returns. ``detector.module`` is the torchvision detector with its trained parts."""

    path: Path
    detector: Detector
    summary: Summary

    @property
    def weights(self) -> Path:
        return self.path / DETECTOR_FILE


class Pretraining(nn.Module):
    """Student, teacher and the method's loss: ``forward(views) -> {term: loss}``."""

    def __init__(self, method: Method, detector: Detector) -> None:
        super().__init__()
        self.method = method
        parts, trained = detector.parts, method.trained_parts(detector)
        learning = {id(p) for name in trained for p in parts[name].parameters()}
        for part in parts.values():
            for parameter in part.parameters():
                if id(parameter) not in learning:
                    parameter.requires_grad_(False)
        self.student = Net(detector, method.heads(detector))
        self.teacher: Net | None = None
        self._ema: EMA | None = None
        if method.momentum(0, 1) is not None:
            heads = nn.ModuleDict({name: self.student.heads[name] for name in method.teacher_heads})
            # What stays as it is, is there once.
            shared = {id(part): part for part in self._frozen(detector)}
            self.teacher = copy.deepcopy(Net(detector, heads), shared).requires_grad_(False)
        self._seen: tuple[Sequence[ViewBatch], Any] | None = None

    @staticmethod
    def _frozen(detector: Detector) -> list[nn.Module | nn.Parameter]:
        """What is under each prefix of ``detector``'s parts, if nothing of it is trained."""
        every = [piece for part in detector.prefixes for piece in detector.pieces(part)]
        inside = [[piece] if isinstance(piece, nn.Parameter) else piece.parameters() for piece in every]
        return [piece for piece, own in zip(every, inside, strict=True) if not any(p.requires_grad for p in own)]

    def train(self, mode: bool = True) -> Pretraining:
        """Batch norm of frozen parts keeps its statistics."""
        super().train(mode)
        for detector in [self.student.detector, *([self.teacher.detector] if self.teacher is not None else [])]:
            parts, trained = detector.parts, self.method.trained_parts(detector)
            for name in sorted(parts, key=lambda name: name in trained):  # frozen ones first: parts may share a block
                parts[name].train(mode and name in trained)
        return self

    def forward(self, views: _Views) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = self.method.targets(self.teacher, views.views)
        self._seen = (views.views, targets)
        return self.method.loss(self.student, views.views, targets)

    def after_step(self, step: int, total_steps: int) -> None:
        momentum = self.method.momentum(step, total_steps)
        if self.teacher is None or momentum is None:
            return
        if self._ema is None:  # only now are the parameters where they stay
            self._ema = EMA(self.teacher, self.student)
        self._ema.update(momentum)

    @torch.no_grad()
    def hand_over(self) -> None:
        """The teacher's weights into the student's detector, where it is the teacher's that are kept."""
        if self.teacher is None:
            return
        detector = self.student.detector
        kept = self.teacher.detector.part_state(self.method.exported_from_teacher(detector))
        detector.module.load_state_dict(kept, strict=False)

    def watch(self) -> dict[str, Any]:
        return self.method.watch(*self._seen) if self._seen is not None else {}


class _Views:
    """A batch as the engine moves it."""

    def __init__(self, samples: Sequence[Any], multiple_px: int) -> None:
        self.views = collate_views(samples, multiple_px)

    def to(self, device: torch.device) -> _Views:
        self.views = [view.to(device) for view in self.views]
        return self

    def pin_memory(self) -> _Views:
        self.views = [view.pin_memory() for view in self.views]
        return self


@dataclass
class _FromFile:
    """Index -> the boxes of an image, and the width of the image whose px they are in."""

    store: ProposalStore

    def __call__(self, index: int) -> tuple[np.ndarray, int]:
        return self.store.boxes(index), self.store.size(index)[0]


@dataclass
class _FromDetector:
    """The same, where the file has a row for each image of the run, readable or not."""

    store: ProposalStore

    def __call__(self, index: int) -> tuple[np.ndarray, int]:
        usable = self.store.usable(index)
        if usable is None:
            return np.zeros((0, 4), np.float32), 1
        return self.store.boxes(usable), self.store.size(usable)[0]


@dataclass
class _OnTheFly:
    """The same boxes as :class:`_FromFile`, found when asked for (DETReg). They are not kept: an image is searched
    again in each epoch, and gets the same boxes again."""

    images: ImageSet
    find: Finder

    def __call__(self, index: int) -> tuple[np.ndarray, int]:
        name = self.images.names[index]
        width, height = self.images.size_of(name)
        # Decoded for the search alone: a view's reduced scale would give other boxes than the file has.
        image = self.images.decode(name, self.find.decode_px(width, height))
        try:
            return self.find(image, width, height, name).boxes, width
        except Exception as error:  # as in the file: one image that a library fails on does not end the run
            engine = self.find.settings.engine
            raise ImageError(
                f"{self.images.source(name)}: {engine} failed ({type(error).__name__}: {error})"
            ) from error


@dataclass
class _Loader:
    """Index -> views, in a data worker."""

    images: ImageSet
    usable: ProposalStore | None  # index counts its images, where there is one
    method: Method
    boxes_of: Callable[[int], tuple[np.ndarray, int]] | None
    classes: PseudoClasses | None = None

    def use(self, store: ProposalStore) -> None:
        """Boxes of all images, from now on."""
        self.boxes_of = _FromDetector(store)

    def name_of(self, index: int) -> str:
        return (self.images.names if self.usable is None else self.usable.images)[index]

    @property
    def count(self) -> int:
        return len(self.images.names if self.usable is None else self.usable.images)

    def plain(self, index: int, short_side_px: int) -> tuple[np.ndarray, np.ndarray]:
        """The image (H, W, 3) uint8, its short side at least so long where it is, and its boxes (N, 4) xyxy px."""
        image = self.images.decode(self.name_of(index), short_side_px=short_side_px)
        boxes = np.zeros((0, 4), np.float32)
        if self.boxes_of is not None:
            boxes, width = self.boxes_of(index)
            boxes = boxes * np.float32(image.shape[1] / width)  # it may have been decoded at a reduced scale
        return image, boxes

    def __call__(self, index: int, rng: np.random.Generator) -> Any:
        image, boxes = self.plain(index, self.method.decode_px)
        made = self.method.views(image, boxes, rng)
        if self.classes is None:
            return made
        labels = self.classes.of(index)
        if len(labels) != len(boxes):  # it could not be read when they were made, and now it can
            raise ImageError(f"{self.name_of(index)}: {len(boxes)} proposals, but {len(labels)} pseudo classes")
        return [dataclasses.replace(view, labels=labels[view.ids]) for view in made]


def pretrain(
    detector: nn.Module | str | None = None,
    images: Path | str = ".",
    method: str | None = None,
    *,
    out: Path | str | None = None,
    backbone: str | None = None,
    start: Path | str | None = None,
    proposals: Path | str | None = None,
    recipe: Path | str | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    resume: bool = False,
    show: bool = True,
) -> Pretrained:
    """Pretrain ``detector`` on a folder of images, without labels.

    Args:
        detector: a family's name ("mask_rcnn"), or a torchvision detector object, which is trained in place; None:
            the recipe's, or what ``start`` was where the method can train such a one, or the method's own.
        images: folder, read with all its subfolders and the .tar shards in it; or one .tar file.
        method: name of the pretraining method; None: the recipe's, or "soco".
        out: run folder; unset: ``runs/METHOD-DETECTOR``.
        backbone: backbone name, where ``detector`` is a name.
        start: weights to start from: a run folder, a weights file, "imagenet" (the library's own supervised weights
            of the backbone), or "scratch", random weights on purpose.
        proposals: Parquet file of boxes; made there when absent, or in the run folder when unset. "on-the-fly": no
            file; the data workers find the boxes of each image they read, the same ones in every epoch.
        recipe: name or file of a recipe whose numbers are the defaults.
        epochs, max_steps: length, in passes over the images or in steps of the optimiser.
        batch_size: images a step.
        seed: of everything random.
        device: "auto", "cpu", "cuda", "cuda:1".
        settings: any other setting, ``{"method.K": 8, "optim.lr": 0.1}`` or ``["K=8", "optim.lr=0.1"]``.
        resume: continue the run in ``out`` from its last checkpoint.
        show: progress bar and notes.

    Returns:
        Pretrained: its ``detector``, and in its ``path`` the weights of the trained parts, under torchvision's
        own key names.

    Raises:
        DataError, SettingsError, RunError, TrainingError: each says what is wrong, where, and what was expected.
    """
    given = detector if isinstance(detector, nn.Module) else None
    section = recipes.read(recipe, "pretrain")
    named = section.get("method", {}).pop("name", None)
    if None not in (named, method) and named != method:
        raise SettingsError(f"--recipe {recipe}: is for method {named}, not {method}")
    method = method or named or "soco"
    base = {} if given is not None or start is None else detector_of(start)
    before = base.get("name")
    kept = before if before is not None and methods.goes_with(method, before) else methods.method_type(method).detector
    family = section.get("detector", {}).get("name") or kept
    name = detector if isinstance(detector, str) else family
    kind = config_type(method, name)
    explicit = {
        "detector.name": name if given is None else None,
        "detector.backbone": backbone,
        "train.epochs": epochs,
        "train.max_steps": max_steps,
        "train.batch_size": batch_size,
        "train.seed": seed,
        "train.device": device,
    }
    # What the start was built as, then the recipe, then what was asked for.
    values = merge({"proposals": dict(methods.method_type(method).proposals)}, {})
    values = merge(values, {f"detector.{k}": v for k, v in for_family(name, base).items()})
    values = merge(values, flatten(section, model=kind))
    values = merge(values, {k: v for k, v in explicit.items() if v is not None})
    assignments = settings if isinstance(settings, Mapping) else parse_assignments(kind, settings)
    config: Any = validate(kind, merge(values, assignments), f"pretrain {method}")
    if epochs is not None and max_steps is None:
        config.train.max_steps = None

    found = ImageSet(images, progress=show and distributed.is_main())
    out = Path(out) if out is not None else Path("runs") / f"{method}-{name if given is None else 'detector'}"
    compute = pick_device(config.train.device)
    with distributed.processes(compute):
        torch.manual_seed(config.train.seed)  # equal on all processes: they build the same network
        wrapped = detectors.build(config.detector) if given is None else detectors.wrap(given)
        pretraining_method = methods.method_type(method)(config.method)
        pretraining_method.check(wrapped)
        reason = pretraining_method.needs_start(wrapped)
        if reason and start is None and given is None:
            raise SettingsError(
                f"{method} {reason}. Name the weights with --start: a run folder, a weights file, or imagenet "
                "(--start scratch: random weights on purpose)"
            )
        report = None if start is None or str(start) == SCRATCH else load_start(wrapped, start)
        if reason and report is not None:
            check_frozen(wrapped, pretraining_method, report)
        chosen = settle(config, pretraining_method, wrapped, len(found), compute)
        own = pretraining_method.refresh_every(len(found) / config.train.batch_size)
        given_boxes = pretraining_method.needs_proposals and own is None
        if proposals is not None and not given_boxes:
            chosen.append(f"proposals {proposals}: not used, {method} makes boxes of its own")
        if show and distributed.is_main():
            found.print_notes()
            if report is not None:
                notes.print(report.table())
            for note in chosen:
                notes.print(f"  {note}", soft_wrap=True)
        file = Path(proposals) if proposals is not None else out / "proposals.parquet"
        on_the_fly = given_boxes and str(file).replace("_", "-") == ON_THE_FLY
        source: dict[str, Any] = {"proposals": str(file) if given_boxes else None}
        if on_the_fly:
            # Made here first: what is wrong with the engine is said once, not by every worker.
            engine = make_engine(config.proposals)
            # A resumed run must get the boxes it began with; a file says this of itself.
            source = {"proposals": ON_THE_FLY, "proposal_engine": f"{engine.name} {engine.version}"}
        record = {
            "kind": "pretrain",
            "method": method,
            "seed": config.train.seed,
            "config": {
                **config.model_dump(mode="json"),
                **({"detector": {"object": type(given).__name__}} if given is not None else {}),
            },
            "data": {
                "images": str(found.path),
                "n_images": len(found),
                "fingerprint": fingerprint(found.names, found.sizes().tolist()),
                **source,
            },
            "start": None if start is None else start_record(start),
            "load_report": None if report is None else report.as_dict(),
            "notes": chosen,
        }
        run = Run.start(out, record, resume)
        _share(found, run.path / CACHE)
        store: ProposalStore | None = None
        boxes_of: Callable[[int], tuple[np.ndarray, int]] | None = None
        if on_the_fly:
            boxes_of = _OnTheFly(found, Finder(config.proposals))
        elif given_boxes:
            store = _proposals(found, file, config.proposals, run.path / CACHE, show)
            boxes_of = _FromFile(store)
        load = _Loader(found, store, pretraining_method, boxes_of)
        with lent(wrapped):
            model = Pretraining(pretraining_method, wrapped)
            job = Job(
                name=method,
                model=model,
                images=len(found if store is None else store),
                load=load,
                collate=functools.partial(_Views, multiple_px=pretraining_method.multiple_px),
                name_of=load.name_of,
                after_step=model.after_step,
                watch=model.watch,
                warn=pretraining_method.warnings,
            )
            if pretraining_method.pseudo_classes is not None:
                count, crop_px = pretraining_method.pseudo_classes
                wrapped.to(compute)
                load.classes = PseudoClasses.at(run.path, wrapped, load, job.images, count, crop_px, config.train, show)
            if own is not None:
                job.renew_every = own
                job.renew = Refresh(
                    pretraining_method,
                    model.student,
                    found,
                    job.renew_every,
                    run.path,
                    run.path / CACHE,
                    config.train,
                    load.use,
                    show,
                )
            summary = fit(job, config.train, config.optim, run, resume, show)
            model.hand_over()
            if summary.finished:
                plain = _plain_batches(load, min(pretraining_method.norm_images, job.images), wrapped.input_px)
                recompute_statistics(wrapped, pretraining_method.trained_parts(wrapped), plain)
        if distributed.is_main():
            _finish(run, wrapped, pretraining_method, config, summary, show)
    return Pretrained(out, wrapped, summary)


def _plain_batches(load: _Loader, count: int, input_px: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``count`` images, evenly out of all, as the detector itself is shown them, and some boxes of each."""
    rng = np.random.default_rng(0)
    chosen = np.linspace(0, load.count - 1, count).astype(int)
    together = max(2, min(16, NORM_PX // (input_px[0] * input_px[1])))
    for start in range(0, count, together):
        samples = []
        for index in chosen[start : start + together].tolist():
            try:
                image, boxes = load.plain(index, input_px[0])
            except ImageError:
                continue
            height, width = image.shape[:2]
            if not len(boxes):
                boxes = np.array([[0, 0, width, height]], np.float32)
            boxes = boxes[rng.integers(len(boxes), size=NORM_BOXES)]
            samples.append([views.resize_short(views.View(image, boxes, np.arange(NORM_BOXES)), *input_px)])
        if len(samples) > 1:
            (batch,) = collate_views(samples, 32)
            yield batch.images, batch.boxes, batch.sizes


def settle(config: Any, method: Method, detector: Detector, n_images: int, device: torch.device) -> list[str]:
    """Fill in what the user left open, for the images and the machine at hand; returns what was chosen and why."""
    train, notes_ = config.train, []
    if train.batch_size is None:
        memory = CPU_MEMORY_GIB
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        train.batch_size = method.batch_size(detector, memory) * distributed.world()
        notes_.append(f"batch size {train.batch_size}: for this {device.type} (--batch-size)")
    per_epoch = n_images / train.batch_size
    if train.max_steps is None:
        epochs = train.epochs or max(method.length(detector), MIN_STEPS / per_epoch)
        train.max_steps = max(1, round(epochs * per_epoch))
        if train.epochs is None:
            notes_.append(f"{train.max_steps} steps: {epochs:.0f} epochs of {n_images} images (--epochs, --max-steps)")
    advised = method.optimizer(detector, train.batch_size)
    notes_ += settle_optim(config.optim, advised, train.batch_size, train.max_steps, per_epoch)
    notes_ += method.settle(detector, train.max_steps)
    return notes_


def check_frozen(detector: Detector, method: Method, report: LoadReport) -> None:
    """
    Raises:
        SettingsError: a part that is not trained, but kept, would keep random weights.
    """
    frozen = [part for part in method.exported_parts(detector) if part not in method.trained_parts(detector)]
    without = [*report.missing, *(key for key, _, _ in report.reshaped)]
    random = {part: [k for k in without if k.startswith(detector.prefixes[part])] for part in frozen}
    random = {part: keys for part, of in random.items() if (keys := [k for k in of if not detector.is_neutral(k)])}
    if random:
        counted = ", ".join(f"{len(keys)} keys of {part}" for part, keys in random.items())
        raise SettingsError(
            f"{report.source}: no weights that fit for {counted}, and {method.title} would leave them random. Is it of "
            "another --backbone or --detector?"
        )


def _share(images: ImageSet, cache: Path) -> None:
    """One list of the images for all processes and their workers, as the main process sees it."""
    file = cache / "images.arrow"
    if distributed.is_main():
        images.share(file)
    distributed.barrier()
    images.adopt(file)


def _proposals(images: ImageSet, file: Path, settings: ProposalSettings, cache: Path, show: bool) -> ProposalStore:
    """Boxes of ``images`` from ``file``, which the main process makes first where it is absent."""
    if distributed.is_main():
        if not file.is_file():
            propose(images, file, settings=settings, progress=show)
        ProposalStore.open(file, cache=cache).check_images(images)
    distributed.barrier()
    store = ProposalStore.open(file, cache=cache)
    if not len(store):
        raise DataError(f"{file}: holds no usable image")
    return store


def _finish(run: Run, detector: Detector, method: Method, config: Any, summary: Summary, show: bool) -> None:
    shutil.rmtree(run.path / CACHE, ignore_errors=True)
    run.write(status="finished" if summary.finished else "stopped", summary=summary.as_dict())
    if not summary.finished:
        notes.print(f"stopped at step {summary.steps}; continue with the same command and --resume")
        return
    parts = list(method.exported_parts(detector))
    metadata = {"kind": "pretrain", "method": method.name, "parts": parts, "steps": summary.steps}
    metadata["notes"] = method.export_notes()
    before = (run.record.get("start") or {}).get("method", SCRATCH)
    metadata["made_by"] = method.title if before == SCRATCH else f"{method.title} on {before}"
    save_detector(run.path / DETECTOR_FILE, detector.part_state(parts), metadata)
    write_plain_code(run.path, detector, _LOADING.format(parts=", ".join(parts), file=DETECTOR_FILE))
    trained = method.trained_parts(detector)
    came = [part for part in parts if part not in trained]
    if show:
        notes.print(
            f"\n[bold]{method.name}[/bold]: {summary.steps} steps, loss {summary.loss:.4f}. "
            f"Pretrained: {', '.join(p for p in parts if p in trained)}. "
            + (f"Kept as they came: {', '.join(came)}. " if came else "")
            + f"Not kept: {', '.join(p for p in detector.parts if p not in parts)}."
        )
        for name, reason in list(summary.unreadable.items())[:10]:
            notes.print(f"  skipped {name}: {reason}", markup=False)
        notes.print(f"Weights: {run.path / DETECTOR_FILE}")
        notes.print(f"Next: headstart finetune {run.path} --train train.json --val val.json", markup=False)


_LOADING = """\
# Here are: {parts}. Everything else keeps its random start, so it shows as missing here.
from pathlib import Path

from safetensors.torch import load_file

weights = Path(__file__).with_name("{file}")
print(detector.load_state_dict(load_file(weights), strict=False))
"""
