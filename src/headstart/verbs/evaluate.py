"""Evaluation: a detector on labelled images -> the COCO metrics, per class, as table and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from headstart import coco_eval, detectors
from headstart.console import notes, progress
from headstart.datasets.detection import Category, DetectionData, load_detection_data
from headstart.datasets.torch_dataset import DetectionDataset
from headstart.detectors.detector import Detector
from headstart.detectors.formats import transformers_folders
from headstart.detectors.weights import load_state, read_metadata, read_state
from headstart.engine import pick_device, worker_init
from headstart.errors import ImageError, RunError, WeightsError
from headstart.files import write_json
from headstart.runs import DETECTOR_FILE, read_record
from headstart.verbs.start import detector_of, is_foreign, load_start


@dataclass
class Evaluation:
    """What :func:`evaluate` returns: ``metrics["bbox"]["AP"]`` is in 0..1, or None where undefined."""

    data: Path
    images: int
    scores: coco_eval.Scores
    detections: list[dict[str, Any]]
    unreadable: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        return self.scores.to_json()["metrics"]

    def tables(self) -> list[Table]:
        return self.scores.tables()


def evaluate(
    detector: Path | str | nn.Module,
    data: Path | str | DetectionData,
    *,
    images: Path | str | None = None,
    out: Path | str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    show: bool = True,
) -> Evaluation:
    """COCO metrics of ``detector`` on labelled images, boxes and, where both sides have them, masks.

    Args:
        detector: a fine-tuned run folder, a folder of transformers, or a torchvision detector.
        data: COCO JSON, Pascal VOC folder or list, or loaded data. A run's classes are matched by name; for a
            detector object, label k is the k-th category in the order of their ids.
        images: folder of the images, where they are not beside ``data``.
        out: JSON file to write; unset: ``eval_NAME.json`` in the run folder, nothing for what is no run.
        batch_size: images at a time.
        device: "auto", "cpu", "cuda", "cuda:1".
        show: progress bar.

    Raises:
        RunError: the run is not fine-tuned or not finished.
        DataError: the data are not readable, or have objects of a class the detector does not know.
    """
    run = Path(detector) if isinstance(detector, (str, Path)) else None
    loaded = data if isinstance(data, DetectionData) else load_detection_data(data, _path(images))
    if run is not None:
        wrapped, classes = load_finetuned(run)
        loaded = in_order_of(loaded, classes)
    else:
        wrapped = detectors.wrap(detector)  # type: ignore[arg-type]
    evaluation = run_detector(wrapped, loaded, batch_size, pick_device(device), show)
    if out is None and run is not None and not is_foreign(run):
        out = run / f"eval_{loaded.source.stem}.json"
    if out is not None:
        write_evaluation(evaluation, Path(out))
    return evaluation


def load_finetuned(run: Path) -> tuple[Detector, list[str]]:
    """The detector of a fine-tuned run, or of a folder of transformers, and its class names in the order of its labels.

    Raises:
        RunError: not a run, a pretraining run, or one that has not finished.
    """
    if is_foreign(run):
        detector = detectors.build(detectors.parse_settings(detector_of(run)))
        report = load_start(detector, run)
        if any(not detector.is_neutral(key) for key in report.missing) or report.unexpected or report.reshaped:
            raise WeightsError(f"{run}: its weights are not all of the detector that its config.json describes")
        return detector, transformers_folders.read_classes(run)
    record = read_record(run)
    if record["kind"] != "finetune":
        raise RunError(f"{run}: is a {record['kind']} run and knows no classes yet; run headstart finetune {run}")
    file = run / DETECTOR_FILE
    if not file.is_file():
        raise RunError(f"{run}: has no {DETECTOR_FILE}, so it did not finish; continue it with --resume")
    detector = detectors.build(detectors.parse_settings(record["config"]["detector"]))
    report = load_state(detector.module, read_state(file), str(file))
    if report.missing or report.unexpected or report.reshaped:
        raise WeightsError(f"{file}: does not fit the detector of {run / 'run.json'}")
    return detector, list(read_metadata(file)["classes"])


def in_order_of(data: DetectionData, names: Sequence[str]) -> DetectionData:
    """``data`` with label k meaning ``names[k - 1]``, whatever order its own file has; its category ids stay.

    Raises:
        DataError: it has objects of a class that is not among ``names``.
    """
    ids = {category.name: category.id for category in data.categories}
    free = iter(range(max(ids.values(), default=0) + 1, max(ids.values(), default=0) + 1 + len(names)))
    return data.with_categories([Category(ids[n] if n in ids else next(free), n) for n in names])


def run_detector(
    detector: Detector, data: DetectionData, batch_size: int, device: torch.device, show: bool
) -> Evaluation:
    """Detect on all images of ``data`` and score the result."""
    masks = data.has_masks and "mask_head" in detector.parts
    dataset = _Images(DetectionDataset(data, masks=False), data)
    loader = DataLoader(dataset, batch_size, num_workers=1, collate_fn=list, worker_init_fn=worker_init)
    was_training = detector.training
    detector.to(device).eval()
    found: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    # Not inference mode: what a detector remembers from it could not be trained with, and training may go on.
    with torch.no_grad(), progress("evaluate", len(dataset), "images", show) as bar:
        for samples in loader:
            good = [(index, image) for index, image, problem in samples if image is not None]
            unreadable |= {data.images[i].file_name: problem for i, _, problem in samples if problem}
            if good:
                outputs = detector.detect([image.to(device) for _, image in good])
                for (index, _), output in zip(good, outputs, strict=True):
                    found += _results(output, data, index, masks)
            bar.advance(len(samples))
    detector.train(was_training)
    for name, problem in unreadable.items():
        notes.print(f"not evaluated, counted as missed: {name}: {problem}", markup=False)
    kinds = ("bbox", "segm") if masks else ("bbox",)
    scores = coco_eval.score(data.to_coco(), found, kinds)
    return Evaluation(data.source, len(data.images), scores, found, unreadable)


class _Images(torch.utils.data.Dataset):
    """(index, image or None, what is wrong with it)."""

    def __init__(self, dataset: DetectionDataset, data: DetectionData) -> None:
        self.dataset = dataset
        self.count = len(data.images)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            return index, self.dataset[index][0], ""
        except ImageError as error:
            return index, None, str(error)


def _results(output: dict[str, Tensor], data: DetectionData, index: int, masks: bool) -> list[dict[str, Any]]:
    """One image's detections as COCO results; labels without a category (a detector of more classes) are left out."""
    from faster_coco_eval.core import mask as rle_mask

    boxes = output["boxes"].cpu().numpy().astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    scores, labels = output["scores"].cpu().numpy(), output["labels"].cpu().numpy()
    image_id = data.coco_image_id(index)
    results: list[dict[str, Any]] = []
    for k in range(len(boxes)):
        if not 1 <= labels[k] <= len(data.categories):
            continue
        result = {
            "image_id": image_id,
            "category_id": data.categories[labels[k] - 1].id,
            "bbox": [round(float(v), 2) for v in boxes[k]],
            "score": round(float(scores[k]), 5),
        }
        if masks:
            binary = (output["masks"][k, 0] > 0.5).cpu().numpy().astype(np.uint8)
            rle = rle_mask.encode(np.asfortranarray(binary))
            counts = rle["counts"]
            result["segmentation"] = {
                "size": [int(v) for v in rle["size"]],
                "counts": counts.decode() if isinstance(counts, bytes) else counts,
            }
        results.append(result)
    return results


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """``path`` gets the metrics; the detections go beside it."""
    detections = (
        path.with_name(path.name.replace("eval", "detections", 1))
        if "eval" in path.name
        else (path.with_name(f"{path.stem}_detections.json"))
    )
    write_json(detections, evaluation.detections)
    write_json(
        path,
        {
            "data": str(Path(evaluation.data).resolve()),
            "images": evaluation.images,
            **evaluation.scores.to_json(),
            "detections": detections.name,
            "unreadable": evaluation.unreadable,
        },
    )
    evaluation.path = path


def _path(value: Path | str | None) -> Path | None:
    return None if value is None else Path(value)


__all__: Sequence[str] = ("Evaluation", "evaluate", "load_finetuned")
