"""A rehearsal of the grid: what would end one of its runs after hours of others is found before the first.

Every detector is built once, every start is loaded into it, and what a method would hand over is handed over with the
weights it would begin with; labels and photos are looked into, and the evaluator is shown that nothing was found.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from headstart import detectors, methods
from headstart.console import progress
from headstart.datasets.image_set import ImageSet
from headstart.datasets.torch_dataset import DetectionDataset
from headstart.detectors.detector import Detector
from headstart.detectors.weights import LoadReport, save_detector
from headstart.engine import pick_amp, pick_device
from headstart.errors import DataError, ImageError, RunError, SettingsError, WeightsError
from headstart.optim import build_optimizer
from headstart.proposals import ProposalSettings, make_engine
from headstart.proposals.store import ProposalStore
from headstart.verbs import finetune, pretrain
from headstart.verbs.compare.plan import Plan, Task
from headstart.verbs.compare.pool import finished
from headstart.verbs.evaluate import assess, usual_metric
from headstart.verbs.start import SCRATCH, WORDS, load_start

LOOKED_AT = 8  # images of each set, evenly out of all: one that opens is enough
GIB = 2**30


def rehearse(plan: Plan, out: Path, places: Sequence[str | None], show: bool) -> None:
    """
    Raises:
        DataError, SettingsError, WeightsError, RunError: what would end a run, as the run itself would say it.
    """
    left = [task for task in plan.tasks(len(plan.cells)) if not finished(task)]
    if not left:
        return
    device = _check_devices(plan, places)
    _check_labels(plan)
    preparing = [task for task in left if task.verb != "finetune"]
    photos = _check_photos(preparing, show) if preparing else None
    waiting = {cell.start for row in plan.cells for cell in row if not finished(cell.task)}
    with (
        tempfile.TemporaryDirectory(prefix="headstart-") as folder,
        torch.random.fork_rng(devices=[]),
        progress("look ahead", len(preparing) + len(waiting), "runs", show) as bar,
    ):
        made: dict[str, Path] = {}  # pretraining run -> weights in its place
        needed = 0
        for number, task in enumerate(preparing):
            if task.verb == "propose":
                make_engine(ProposalSettings.model_validate(task.arguments["settings"]))
            else:
                assert photos is not None
                file = Path(folder) / f"{number}.safetensors"
                needed += _pretrained(task, plan.pretraining[task.name], made, photos, device, file)
                made[str(task.out)] = file
            bar.advance()
        size = 0
        for start in plan.starts:
            if start in waiting:
                size = _tuned(plan, start, made, device)
                bar.advance()
    _check_space(out, needed, size, sum(task.verb == "finetune" for task in left), len(places))


def _check_devices(plan: Plan, places: Sequence[str | None]) -> torch.device:
    for place in places:
        device = pick_device(place or plan.tuning.train.device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise SettingsError(f"--device {place}: this machine has {torch.cuda.device_count()} CUDA devices")
    for config in (plan.tuning, *plan.pretraining.values()):
        pick_amp(config.train.amp, device)
    return device


def _check_labels(plan: Plan) -> None:
    for data in (plan.data, plan.held_out):
        if not any((~objects.iscrowd).any() for objects in data.annotations):
            raise DataError(f"{data.source}: has no object, crowds aside; expected some to learn and to be found")
        _check_readable(data.source, len(data), DetectionDataset(data, masks=False).__getitem__)
    metric = usual_metric(plan.held_out)
    try:
        found = assess(plan.held_out, [], metric)
    except DataError as error:
        raise DataError(f"{plan.held_out.source}: can't be evaluated on: {error}") from None
    if found.metrics["bbox"]["AP"] is None:
        raise DataError(f"{plan.held_out.source}: AP is undefined on it; expected objects that can be found")


def _check_readable(source: Any, count: int, read: Callable[[int], Any]) -> None:
    """Raises: DataError where none of some images can be read; single ones are left to the runs, which skip them."""
    problem: ImageError | None = None
    for index in range(0, count, max(1, count // LOOKED_AT)):
        try:
            read(index)
            return
        except ImageError as error:
            problem = error
    raise DataError(f"{source}: none of its images that were looked at can be read; the last: {problem}")


def _check_photos(preparing: Sequence[Task], show: bool) -> ImageSet:
    photos = ImageSet(preparing[0].arguments["images"], progress=show)
    _check_readable(photos.path, len(photos), lambda index: photos.decode(photos.names[index]))
    own = {str(task.out) for task in preparing}
    given = {str(task.arguments["proposals"]) for task in preparing if task.arguments.get("proposals") is not None}
    for boxes in given - own:
        if boxes.replace("_", "-") == pretrain.ON_THE_FLY:
            continue
        if not Path(boxes).is_file():
            raise DataError(
                f"{boxes}: no such file; expected boxes of {photos.path} (headstart propose); without --proposals "
                "they are found here, once"
            )
        ProposalStore.open(boxes).check_images(photos)
    return photos


def _pretrained(
    task: Task, settings: Any, made: dict[str, Path], photos: ImageSet, device: torch.device, file: Path
) -> int:
    """Build what ``task`` trains, and write what it would hand over to ``file``; returns bytes it leaves on disk."""
    config = settings.model_copy(deep=True)
    method = methods.method_type(task.arguments["method"])(config.method)
    detector = detectors.build(config.detector)
    method.check(detector)
    start = task.arguments["start"]
    if start is not None and str(start) != SCRATCH:
        report = _loaded(detector, start, made, task.name)
        if method.needs_start(detector):
            pretrain.check_frozen(detector, method, report)
    pretrain.settle(config, method, detector, len(photos), device)
    _check_batch(task.name, config.train)
    if str(task.arguments["proposals"]).replace("_", "-") == pretrain.ON_THE_FLY:
        make_engine(config.proposals)
    model = pretrain.Pretraining(method, detector)
    build_optimizer([model], config.optim)
    metadata = {"kind": "pretrain", "method": method.name, "notes": method.export_notes()}
    save_detector(file, detector.part_state(method.exported_parts(detector)), metadata)
    return _bytes(model)


def _tuned(plan: Plan, start: str, made: dict[str, Path], device: torch.device) -> int:
    """Build what the runs of ``start`` fine-tune; returns the bytes of its weights."""
    config = plan.tuning.model_copy(deep=True)
    config.detector.num_classes = len(plan.data.categories)
    detector = detectors.build(config.detector)
    finetune.check_masks(detector, plan.data)
    if plan.sources[start] != SCRATCH:
        _loaded(detector, plan.sources[start], made, start)
    model = finetune.Supervised(detector, config.tune)
    for images in plan.budgets.values():
        settled = config.model_copy(deep=True)
        finetune.settle(settled, detector, images, device)
        _check_batch("fine-tuning", settled.train)
    build_optimizer([model], settled.optim)
    return _bytes(detector)


def _loaded(detector: Detector, start: str, made: dict[str, Path], name: str) -> LoadReport:
    """
    Raises:
        RunError, SettingsError, WeightsError: as loading says it; or they are of another backbone.
    """
    report = load_start(detector, made.get(str(start), start))
    backbone = {key for key in detector.part_state(["backbone"]) if not detector.is_neutral(key)}
    fitting = len(backbone & set(report.matched))
    if 2 * fitting < len(backbone) or backbone & {key for key, _, _ in report.reshaped}:
        said = start if str(start) in WORDS or str(start) not in made else name
        raise WeightsError(
            f"--starts {name}: only {fitting} of the {len(backbone)} weights of this backbone are in {said} and fit. "
            "Is it of another --backbone or --detector?"
        )
    return report


def _check_batch(name: str, train: Any) -> None:
    if train.batch_size % train.accumulate:
        raise SettingsError(
            f"{name}: batch size {train.batch_size} can't be divided into {train.accumulate} parts (train.accumulate)"
        )


def _bytes(module: torch.nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _check_space(out: Path, pretraining: int, weights: int, runs: int, places: int) -> None:
    """Of the weights alone: what stays of each run, and two checkpoints with momentum of those at work."""
    needed = 2 * pretraining + weights * (runs + 4 * places)
    there = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise RunError(
            f"{out}: the weights of these runs take {needed / GIB:.1f} GiB at least, and {free / GIB:.1f} GiB are "
            "free; make some space, or choose another --out"
        )
