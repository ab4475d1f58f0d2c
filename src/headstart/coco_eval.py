"""The COCO suite of average precision and recall, for boxes and masks, by faster-coco-eval.

Definitions: https://cocodataset.org/#detection-eval. Two habits of the field are kept, and said here:

- Detected masks are sized by the area of the *mask*. The reference code takes the area of the box when a
  result holds both, which moves masks between APs, APm and APl; Detectron2 and MMDetection drop the box
  first, and so do we.
- At most 100 detections an image count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from rich.table import Table

from headstart.errors import DataError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
IOU_TYPES = ("bbox", "segm")
TITLES = {"bbox": "Boxes", "segm": "Masks"}

Value = float | None


@dataclass(frozen=True)
class Scores:
    """Average precision and recall in 0..1; None where undefined (for example APs without small objects).

    Attributes:
        images: images in the ground truth, with or without objects.
        metrics: by IoU type ("bbox", "segm"), then by the names in ``METRICS``.
        per_class: by IoU type, class name, then "AP" and "AP50"; in the order of the category ids.
    """

    images: int
    metrics: dict[str, dict[str, Value]]
    per_class: dict[str, dict[str, dict[str, Value]]]

    def to_json(self) -> dict[str, Any]:
        return {"images": self.images, "metrics": self.metrics, "per_class": self.per_class}

    def tables(self) -> list[Table]:
        """One table over all classes, one by class; values in percent."""
        overall = Table(title=f"COCO metrics on {self.images} images, in %", title_justify="left")
        overall.add_column("")
        for name in METRICS:
            overall.add_column(name, justify="right")
        for iou_type, values in self.metrics.items():
            overall.add_row(TITLES[iou_type], *(_percent(values[name]) for name in METRICS))

        by_class = Table(title="By class, in %", title_justify="left")
        by_class.add_column("class", overflow="fold")
        for iou_type in self.per_class:
            for name in ("AP", "AP50"):
                by_class.add_column(f"{TITLES[iou_type]} {name}", justify="right")
        for name in next(iter(self.per_class.values()), {}):
            row = [self.per_class[t][name][metric] for t in self.per_class for metric in ("AP", "AP50")]
            # A class may be called "[red]": that is a name, not a colour.
            by_class.add_row(name.replace("[", r"\["), *(_percent(value) for value in row))
        return [overall, by_class]


def score(
    ground_truth: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    iou_types: Sequence[str] = IOU_TYPES,
) -> Scores:
    """Compare detections with the ground truth. Neither argument is changed, and nothing is printed.

    Args:
        ground_truth: a COCO data set: "images", "annotations" (boxes [x, y, width, height] in pixels),
            "categories".
        detections: COCO results: "image_id", "category_id", "bbox" [x, y, width, height] in pixels, "score",
            and for "segm" a "segmentation" (compressed RLE).
        iou_types: "bbox", "segm", or both.

    A crowd without a mask is taken as the region of its box.

    Raises:
        DataError: a detection of an unknown image or category, or with a score that is not finite; masks
            asked for where an annotation or a detection has none.
    """
    unknown = [t for t in iou_types if t not in IOU_TYPES]
    if unknown:
        raise DataError(f"IoU type {unknown[0]!r}: expected one of {', '.join(IOU_TYPES)}")
    _check(ground_truth, detections, iou_types)
    metrics, per_class = {}, {}
    for iou_type in iou_types:
        metrics[iou_type], per_class[iou_type] = _score_one(ground_truth, detections, iou_type)
    return Scores(len(ground_truth["images"]), metrics, per_class)


def _score_one(
    ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]], iou_type: str
) -> tuple[dict[str, Value], dict[str, dict[str, Value]]]:
    names = _class_names(ground_truth["categories"])
    if not ground_truth["images"] or not names:
        # Without ids to restrict it to, the evaluator would take everything instead of nothing.
        nothing: dict[str, Value] = {"AP": None, "AP50": None}
        return dict.fromkeys(METRICS), {name: dict(nothing) for name in names.values()}

    truth = COCO(
        {
            "images": [dict(image) for image in ground_truth["images"]],
            "annotations": [_annotation(a, i, iou_type) for i, a in enumerate(ground_truth["annotations"])],
            "categories": [dict(category) for category in ground_truth["categories"]],
        }
    )
    found = truth.loadRes([_detection(d, iou_type) for d in detections])
    evaluation = COCOeval_faster(truth, found, iouType=iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics = {name: _value(v) for name, v in zip(METRICS, evaluation.all_stats, strict=False)}

    # (IoU thresholds .5:.95, recall, class, area, detections an image): all areas, 100 detections.
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    per_class = {
        names[category_id]: {"AP": _mean(precision[:, :, k]), "AP50": _mean(precision[0, :, k])}
        for k, category_id in enumerate(sorted(names))
    }
    return metrics, per_class


def _annotation(annotation: dict[str, Any], index: int, iou_type: str) -> dict[str, Any]:
    box = [float(v) for v in annotation["bbox"]]
    mine: dict[str, Any] = {
        # Our own numbers from 1 on: to the evaluator an id of 0 means "matched with nothing".
        "id": index + 1,
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": box,
        "area": float(annotation.get("area", box[2] * box[3])),
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }
    if iou_type == "segm":
        # A crowd is a region in which nothing counts; without a mask that region is its box.
        x, y, w, h = box
        mine["segmentation"] = annotation.get("segmentation") or [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return mine


def _detection(detection: dict[str, Any], iou_type: str) -> dict[str, Any]:
    mine: dict[str, Any] = {key: detection[key] for key in ("image_id", "category_id")}
    mine["score"] = float(detection["score"])
    if iou_type == "segm":
        mine["segmentation"] = detection["segmentation"]
    else:
        mine["bbox"] = [float(v) for v in detection["bbox"]]
    return mine


def _check(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]], iou_types: Sequence[str]) -> None:
    for key in ("images", "annotations", "categories"):
        if key not in ground_truth:
            raise DataError(f'ground truth: no "{key}"; expected a COCO data set')
    images = {image["id"] for image in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    for i, detection in enumerate(detections):
        for key, known in (("image_id", images), ("category_id", categories)):
            if detection[key] not in known:
                raise DataError(
                    f"detection {i}: {key} {detection[key]!r} is not in the ground truth. "
                    "Were these detections made for another data set?"
                )
        if not math.isfinite(detection["score"]):
            raise DataError(f"detection {i} (image {detection['image_id']}): score is {detection['score']}")
    if "segm" not in iou_types:
        return
    hint = 'so masks can\'t be scored. Score boxes only: iou_types=("bbox",).'
    for i, annotation in enumerate(ground_truth["annotations"]):
        if not annotation.get("segmentation") and not annotation.get("iscrowd"):
            raise DataError(f'annotation {i} (image {annotation["image_id"]}) has no "segmentation", {hint}')
    for i, detection in enumerate(detections):
        mask = detection.get("segmentation")
        if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str | bytes):
            raise DataError(
                f'detection {i} (image {detection["image_id"]}) has no "segmentation" in compressed RLE, {hint}'
            )


def _class_names(categories: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Names by category id; a name that occurs twice gets its id, so that no class hides another."""
    count = Counter(str(category["name"]) for category in categories)
    return {
        category["id"]: str(category["name"])
        if count[str(category["name"])] == 1
        else f"{category['name']} (id {category['id']})"
        for category in sorted(categories, key=lambda category: category["id"])
    }


def _value(number: float) -> Value:
    """The evaluator writes -1 for "undefined"."""
    return None if number < 0 else float(number)


def _mean(precision: np.ndarray) -> Value:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def _percent(value: Value) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
