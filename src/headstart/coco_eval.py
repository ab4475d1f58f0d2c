"""The COCO suite of average precision and recall, for boxes and masks, and its kin, by faster-coco-eval.

``score``: COCO's own, https://cocodataset.org/#detection-eval. Two habits of the field are kept, and said here:

- Detected masks are sized by the area of the *mask*. The reference code takes the area of the box when a
  result holds both, which moves masks between APs, APm and APl; Detectron2 and MMDetection drop the box
  first, and so do we.
- At most 100 detections an image count.

``score_lvis``: LVIS v1, https://www.lvisdataset.org/challenge_2021: at most 300 detections an image; a class counts in
those images alone in which it was looked for, and false ones of it only where all its objects are boxed.

``score_proposals``: boxes whatever their class, AP and the recall of the first k of each image (AR@k).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_mask
from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.datasets.lvis import FREQUENCIES, LVIS_DETECTIONS
from headstart.errors import DataError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
LVIS_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300")
PROPOSAL_METRICS = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR1000", "ARs", "ARm", "ARl")
IOU_TYPES = ("bbox", "segm")
TITLES = {"bbox": "Boxes", "segm": "Masks"}
SUITES = {
    "coco": "COCO metrics",
    "lvis": "LVIS metrics",
    "voc": "Pascal VOC's AP as the area under the curve",
    "voc07": "Pascal VOC's AP at 11 points, as in 2007",
    "proposals": "COCO metrics whatever the class",
}
PAIRS = 2_000_000  # of image and class that are evaluated at a time: the evaluator keeps a few hundred bytes for each

Value = float | None


@dataclass(frozen=True)
class Scores:
    """Average precision and recall in 0..1; None where undefined (for example APs without small objects).

    Attributes:
        images: images in the ground truth, with or without objects.
        metrics: by IoU type ("bbox", "segm"), then by name, the same for each IoU type; "AP", "AP50" and "AP75" are
            always among them.
        per_class: by IoU type, class name, then "AP" and "AP50"; in the order of the category ids.
        suite: a key of ``SUITES``.
    """

    images: int
    metrics: dict[str, dict[str, Value]]
    per_class: dict[str, dict[str, dict[str, Value]]]
    suite: str = "coco"

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "metric": self.suite,
            "metrics": self.metrics,
            "per_class": self.per_class,
        }

    def tables(self) -> list[Table]:
        """One table over all classes, one by class; values in percent."""
        overall = narrow_table(f"{SUITES[self.suite]} on {self.images} images, in %")
        overall.add_column("")
        for name in next(iter(self.metrics.values()), {}):
            overall.add_column(name, justify="right")
        for iou_type, values in self.metrics.items():
            overall.add_row(TITLES[iou_type], *(percent(value) for value in values.values()))
        if not any(self.per_class.values()):
            return [overall]

        by_class = Table(title="By class, in %", title_justify="left")
        by_class.add_column("class", overflow="fold")
        for iou_type in self.per_class:
            for name in ("AP", "AP50"):
                by_class.add_column(f"{TITLES[iou_type]} {name}", justify="right")
        for name in next(iter(self.per_class.values())):
            row = [self.per_class[t][name][metric] for t in self.per_class for metric in ("AP", "AP50")]
            # A class may be called "[red]": that is a name, not a colour.
            by_class.add_row(name.replace("[", r"\["), *(percent(value) for value in row))
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
    check(ground_truth, detections, iou_types)
    metrics, per_class = {}, {}
    for iou_type in iou_types:
        curves = _curves(ground_truth, detections, iou_type, (1, 10, 100))
        values = curves.precisions(2) | {f"AR{k}": _mean(curves.recall[:, :, 0, m]) for m, k in enumerate((1, 10, 100))}
        metrics[iou_type] = {name: values[name] for name in METRICS}
        per_class[iou_type] = curves.per_class(class_names(ground_truth["categories"]))
    return Scores(len(ground_truth["images"]), metrics, per_class)


def score_lvis(
    ground_truth: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    iou_types: Sequence[str] = IOU_TYPES,
) -> Scores:
    """The same for federated data: images have "neg_category_ids" and "not_exhaustive_category_ids", categories a
    "frequency" (r, c or f), by which APr, APc and APf are told apart.

    Raises:
        DataError: as :func:`score`; or the ground truth lacks one of these.
    """
    check(ground_truth, detections, iou_types)
    for place, entries, keys in (
        ("image", ground_truth["images"], ("neg_category_ids", "not_exhaustive_category_ids")),
        ("category", ground_truth["categories"], ("frequency",)),
    ):
        for entry in entries:
            for key in keys:
                if key not in entry or (key == "frequency" and entry[key] not in FREQUENCIES):
                    expected = "r, c or f" if key == "frequency" else "a list of category ids"
                    raise DataError(
                        f'ground truth: {place} {entry["id"]} has "{key}" {entry.get(key)!r}; expected {expected}, as '
                        "LVIS v1 has them. What is no LVIS data has COCO's metrics (coco)"
                    )
    surest = _surest(detections, LVIS_DETECTIONS)
    frequency = [c["frequency"] for c in sorted(ground_truth["categories"], key=lambda c: c["id"])]
    metrics, per_class = {}, {}
    for iou_type in iou_types:
        curves = _curves(ground_truth, surest, iou_type, (LVIS_DETECTIONS,), federated=True)
        values = curves.precisions(0) | {"AR300": _mean(curves.recall[:, :, 0, 0])}
        for group in FREQUENCIES:
            mine = np.array([f == group for f in frequency], bool)
            values[f"AP{group}"] = _mean(curves.precision[:, :, mine, 0, 0])
        metrics[iou_type] = {name: values[name] for name in LVIS_METRICS}
        per_class[iou_type] = curves.per_class(class_names(ground_truth["categories"]))
    return Scores(len(ground_truth["images"]), metrics, per_class, "lvis")


def score_proposals(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> Scores:
    """Boxes whatever their class and that of the objects. APs and ARs/m/l are of the first 100 of each image.

    Raises:
        DataError: as :func:`score`; detections need no "category_id".
    """
    nameless = {
        **ground_truth,
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [{**a, "category_id": 1} for a in ground_truth["annotations"]],
    }
    found = [{**d, "category_id": 1} for d in detections]
    check(nameless, found, ("bbox",))
    counts = (1, 10, 100, 1000)
    curves = _curves(nameless, found, "bbox", counts)
    values = curves.precisions(2) | {f"AR{k}": _mean(curves.recall[:, :, 0, m]) for m, k in enumerate(counts)}
    values |= {f"AR{size}": _mean(curves.recall[:, :, a, 2]) for a, size in enumerate("sml", 1)}
    metrics = {"bbox": {name: values[name] for name in PROPOSAL_METRICS}}
    return Scores(len(ground_truth["images"]), metrics, {}, "proposals")


@dataclass(frozen=True)
class _Curves:
    """-1 where undefined. T: IoU .5:.95; K: classes by id; A: all, small, medium, large; M: detections an image."""

    precision: np.ndarray  # (T, 101 recalls, K, A, M)
    recall: np.ndarray  # (T, K, A, M)

    def precisions(self, m: int) -> dict[str, Value]:
        here = self.precision[..., m]
        return {
            "AP": _mean(here[:, :, :, 0]),
            "AP50": _mean(here[0, :, :, 0]),
            "AP75": _mean(here[5, :, :, 0]),
            **{f"AP{size}": _mean(here[:, :, :, a]) for a, size in enumerate("sml", 1)},
        }

    def per_class(self, names: dict[int, str]) -> dict[str, dict[str, Value]]:
        here = self.precision[:, :, :, 0, -1]
        return {
            name: {"AP": _mean(here[:, :, k]), "AP50": _mean(here[0, :, k])} for k, name in enumerate(names.values())
        }


def _curves(
    ground_truth: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    iou_type: str,
    counts: Sequence[int],
    federated: bool = False,
) -> _Curves:
    categories = sorted(category["id"] for category in ground_truth["categories"])
    if not ground_truth["images"] or not categories:
        # Without ids to restrict it to, the evaluator would take everything instead of nothing.
        shape = len(categories), 4, len(counts)
        return _Curves(-np.ones((10, 101, *shape)), -np.ones((10, *shape)))
    shared = {
        "images": [dict(image) for image in ground_truth["images"]],
        "categories": [dict(category) for category in ground_truth["categories"]],
    }
    truth = COCO(
        {**shared, "annotations": [_annotation(a, i, iou_type) for i, a in enumerate(ground_truth["annotations"])]}
    )
    # What the evaluator's own way of reading results adds besides, outlines of boxes, costs time and is not looked at.
    found = COCO({**shared, "annotations": [_detection(d, i, iou_type) for i, d in enumerate(detections)]})
    at_a_time = max(1, PAIRS // len(ground_truth["images"]))
    precisions, recalls = [], []
    for first in range(0, len(categories), at_a_time):
        evaluation = COCOeval_faster(truth, found, iouType=iou_type, lvis_style=federated)
        evaluation.params.catIds = categories[first : first + at_a_time]
        evaluation.params.maxDets = list(counts)
        evaluation.evaluate()
        evaluation.accumulate()
        precisions.append(np.asarray(evaluation.eval["precision"]))
        recalls.append(np.asarray(evaluation.eval["recall"]))
    return _Curves(np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1))


def _surest(detections: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most ``most`` an image, whatever their class; of equal scores the first ones."""
    by_image: dict[Any, list[int]] = {}
    for place, detection in enumerate(detections):
        by_image.setdefault(detection["image_id"], []).append(place)
    kept = [sorted(places, key=lambda place: -detections[place]["score"])[:most] for places in by_image.values()]
    return [detections[place] for place in sorted(place for places in kept for place in places)]


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


def _detection(detection: dict[str, Any], index: int, iou_type: str) -> dict[str, Any]:
    mine: dict[str, Any] = {
        "id": index + 1,
        "image_id": detection["image_id"],
        "category_id": detection["category_id"],
        "score": float(detection["score"]),
        "iscrowd": 0,
    }
    if iou_type == "segm":
        mine["segmentation"] = detection["segmentation"]
        mine["area"] = float(coco_mask.area(detection["segmentation"]))
    else:
        mine["bbox"] = [float(v) for v in detection["bbox"]]
        mine["area"] = mine["bbox"][2] * mine["bbox"][3]
    return mine


def check(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]], iou_types: Sequence[str]) -> None:
    """Raises: DataError, as :func:`score` says."""
    unknown = [t for t in iou_types if t not in IOU_TYPES]
    if unknown:
        raise DataError(f"IoU type {unknown[0]!r}: expected one of {', '.join(IOU_TYPES)}")
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


def class_names(categories: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Names by category id; a name that occurs twice gets its id, so that no class hides another."""
    count = Counter(str(category["name"]) for category in categories)
    return {
        category["id"]: str(category["name"])
        if count[str(category["name"])] == 1
        else f"{category['name']} (id {category['id']})"
        for category in sorted(categories, key=lambda category: category["id"])
    }


def _mean(values: np.ndarray) -> Value:
    """Of what is defined: the evaluator writes -1 for what is not."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def narrow_table(title: str) -> Table:
    """Ten columns of numbers fit into a terminal of 80."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def percent(value: Value) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
