"""Evaluation: a detector, or boxes, on labelled images -> metrics, per class, and error types, as table and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from headstart import coco_eval, detectors, tide, voc_eval
from headstart.console import notes, progress
from headstart.datasets import voc
from headstart.datasets.detection import Category, DetectionData, load_detection_data, named
from headstart.datasets.lvis import FREQUENCIES
from headstart.datasets.torch_dataset import DetectionDataset
from headstart.detectors.detector import Detector
from headstart.detectors.formats import transformers_folders
from headstart.detectors.weights import load_state, read_metadata, read_state
from headstart.engine import pick_device, worker_init
from headstart.errors import DataError, ImageError, RunError, SettingsError, WeightsError
from headstart.files import write_json
from headstart.masks import encode
from headstart.proposals.store import metadata_of, readable
from headstart.runs import DETECTOR_FILE, read_detector_record
from headstart.verbs.start import detector_of, is_foreign, load_start

Metric = Literal["coco", "lvis", "voc", "voc07", "proposals"]
PROPOSALS_SUFFIX = ".parquet"


@dataclass
class Evaluation:
    """What :func:`evaluate` returns: ``metrics["bbox"]["AP"]`` is in 0..1, or None where undefined.

    ``errors``: by IoU type what the AP is lost to; empty where classes don't count.
    """

    data: Path
    images: int
    scores: coco_eval.Scores
    detections: list[dict[str, Any]]
    errors: dict[str, tide.Errors] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        return self.scores.to_json()["metrics"]

    def tables(self) -> list[Table]:
        return [*self.scores.tables(), *([_error_table(self.errors)] if self.errors else [])]


def _error_table(errors: dict[str, tide.Errors]) -> Table:
    table = coco_eval.narrow_table("AP50 that each type of error costs (TIDE), in points")
    table.add_column("")
    for name in (*tide.MAIN, *tide.SPECIAL):
        table.add_column(name, justify="right")
    for iou_type, found in errors.items():
        table.add_row(coco_eval.TITLES[iou_type], *(coco_eval.percent(gain) for gain in found.gains.values()))
        table.add_row("how many", *(f"{count:,}" for count in found.counts.values()))
    return table


def evaluate(
    detector: Path | str | nn.Module,
    data: Path | str | DetectionData,
    *,
    metric: str | None = None,
    images: Path | str | None = None,
    out: Path | str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    show: bool = True,
) -> Evaluation:
    """Metrics of ``detector`` on labelled images, boxes and, where both sides have them, masks.

    Args:
        detector: a fine-tuned run folder, a folder of transformers, or a torchvision detector; or the Parquet file of
            ``propose``, or one in the folder ``priors`` of a run, whose boxes are evaluated whatever their class.
        data: COCO JSON, Pascal VOC folder or list, or loaded data. A run's classes are matched by name; for a
            detector object, label k is the k-th category in the order of their ids.
        metric: "coco", "lvis", "voc" (area under the curve), "voc07" (11 points), or "proposals" (AP and AR@k whatever
            the class); unset: what the data are usually evaluated with, see :func:`usual_metric`, or "proposals" for
            a Parquet file.
        images: folder of the images, where they are not beside ``data``.
        out: JSON file to write; unset: ``eval_NAME.json`` in the run folder (``eval_NAME_METRIC.json`` for a metric
            that is not the usual one), nothing for what is no run.
        batch_size: images at a time.
        device: "auto", "cpu", "cuda", "cuda:1".
        show: progress bar.

    Raises:
        RunError: the run is not fine-tuned or not finished.
        DataError: the data are not readable, have objects of a class the detector does not know, or lack what the
            metric needs.
        SettingsError: there is no such metric, or boxes without classes are to be evaluated by class.
    """
    if metric is not None and metric not in get_args(Metric):
        raise SettingsError(f"metric {metric!r}: expected one of {', '.join(get_args(Metric))}")
    run = Path(detector) if isinstance(detector, (str, Path)) else None
    loaded = data if isinstance(data, DetectionData) else load_detection_data(data, _path(images))
    if run is not None and run.suffix == PROPOSALS_SUFFIX:
        if metric not in (None, "proposals"):
            raise SettingsError(f"{run}: its boxes have no classes, which metric {metric!r} needs; expected proposals")
        evaluation = evaluate_proposals(run, loaded)
        if out is not None:
            write_evaluation(evaluation, Path(out))
        return evaluation
    usual = usual_metric(loaded)
    metric = metric or usual
    if run is not None:
        wrapped, classes = load_finetuned(run)
        loaded = in_order_of(loaded, classes)
    else:
        wrapped = detectors.wrap(detector)  # type: ignore[arg-type]
    if metric == "lvis":
        coco_eval.check_federated(loaded.to_coco())  # before an hour of detecting
    evaluation = run_detector(wrapped, loaded, batch_size, pick_device(device), show, metric)
    if out is None and run is not None and not is_foreign(run):
        other = "" if metric == usual else f"_{metric}"
        out = run / f"eval_{loaded.source.stem}{other}.json"
    if out is not None:
        write_evaluation(evaluation, Path(out))
    return evaluation


def usual_metric(data: DetectionData) -> str:
    """LVIS's for federated data; the challenge's own for Pascal VOC as published, which in 2007 took 11 points; COCO's.

    Pascal VOC as published: XML files of its 20 classes; of 2007, where the images lie in a folder ``VOC2007``. Data in
    VOC's format with classes of their own have COCO's metrics, as have COCO files of VOC.
    """
    if data.is_federated:
        return "lvis"
    of_xml = bool(data.images) and all(isinstance(image.id, str) for image in data.images)
    if not of_xml or {category.name for category in data.categories} != set(voc.CLASSES):
        return "coco"
    return "voc07" if all("VOC2007" in image.path.parts for image in data.images) else "voc"


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
    record = read_detector_record(run)
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
    # What federated data lack was looked for in none of their images: how frequent it is makes no difference.
    other = FREQUENCIES[0] if data.is_federated else None
    return data.with_categories([Category(ids[n], n) if n in ids else Category(next(free), n, other) for n in names])


def run_detector(
    detector: Detector,
    data: DetectionData,
    batch_size: int,
    device: torch.device,
    show: bool,
    metric: str | None = None,
) -> Evaluation:
    """Detect on all images of ``data`` and score the result, by the usual metric where none is given."""
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
    return assess(data, found, metric or usual_metric(data), kinds, unreadable)


def assess(
    data: DetectionData,
    found: list[dict[str, Any]],
    metric: str,
    kinds: Sequence[str] = ("bbox",),
    unreadable: dict[str, str] | None = None,
) -> Evaluation:
    """Score COCO results ``found`` on ``data``; Pascal VOC's metrics are of boxes alone."""
    truth = data.to_coco()
    if metric == "proposals":
        scores = coco_eval.score_proposals(truth, found)
        return Evaluation(data.source, len(data.images), scores, found, {}, unreadable or {})
    if metric == "lvis":
        scores = coco_eval.score_lvis(truth, found, kinds)
    elif metric in ("voc", "voc07"):
        scores = voc_eval.score(truth, found, metric == "voc07")
    else:
        scores = coco_eval.score(truth, found, kinds)
    errors = {iou_type: tide.analyse(truth, found, iou_type) for iou_type in scores.metrics}
    return Evaluation(data.source, len(data.images), scores, found, errors, unreadable or {})


def evaluate_proposals(file: Path, data: DetectionData) -> Evaluation:
    """AP and AR@k of the boxes in a Parquet file of proposals, surest first: by their scores, or in their order.

    Images are matched by name, or by the last part of it where no whole name fits. What the file lacks has no boxes.

    Raises:
        DataError: not a file of proposals, none of its images is in ``data``, or one is of another size.
    """
    with readable(file), pq.ParquetFile(file) as handle:
        schema = handle.schema_arrow
        metadata_of(file, schema)
        scored = [name for name in ("scores",) if name in schema.names]
        table = handle.read(columns=["image", "width", "height", "boxes", *scored])
    whole = {image.file_name: index for index, image in enumerate(data.images)}
    place = whole.get if any(name in whole for name in table["image"].to_pylist()) else _by_last_part(data)
    found: list[dict[str, Any]] = []
    seen = set()
    for batch in table.to_batches(1024):
        for row in batch.to_pylist():
            index = place(row["image"])
            if index is None or not row["width"]:
                continue
            image = data.images[index]
            seen.add(index)
            if (row["width"], row["height"]) != (image.width, image.height):
                raise DataError(
                    f"{file}: {row['image']} is {row['width']} x {row['height']} px, and {image.width} x "
                    f"{image.height} in {data.source}; expected the same image"
                )
            boxes = row["boxes"] or []
            scores = row["scores"] if scored else [1 / (1 + rank) for rank in range(len(boxes))]
            for (x0, y0, x1, y1), score in zip(boxes, scores, strict=True):
                box = [x0, y0, x1 - x0, y1 - y0]
                found.append({"image_id": data.coco_image_id(index), "bbox": box, "score": score})
    if not seen:
        raise DataError(
            f"{file}: holds none of the images of {data.source} (its first: {named(table['image'][:3].to_pylist())}; "
            f"those of the labels: {named((image.file_name for image in data.images), 3)}); expected boxes of these"
        )
    without = [image.file_name for index, image in enumerate(data.images) if index not in seen]
    if without:
        notes.print(
            f"{file}: no boxes of {len(without)} labelled images, which count as missed: {named(without)}", markup=False
        )
    return assess(data, found, "proposals")


def _by_last_part(data: DetectionData) -> Callable[[str], int | None]:
    """Place of the labelled image whose file is called like this; none where two are."""
    names = [Path(image.file_name).name for image in data.images]
    often = Counter(names)
    places = {name: index for index, name in enumerate(names) if often[name] == 1}
    return lambda image: places.get(Path(image).name)


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
            result["segmentation"] = encode(binary)
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
            "errors": {iou_type: errors.to_json() for iou_type, errors in evaluation.errors.items()},
            "detections": detections.name,
            "unreadable": evaluation.unreadable,
        },
    )
    evaluation.path = path


def _path(value: Path | str | None) -> Path | None:
    return None if value is None else Path(value)


__all__: Sequence[str] = ("Evaluation", "evaluate", "load_finetuned")
