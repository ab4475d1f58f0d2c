"""The COCO suite of average precision and recall, for boxes and masks, and its kin, by hotcoco.

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

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from hotcoco import COCO, COCOeval
from hotcoco.mask import area as mask_areas
from rich.box import SIMPLE_HEAD
from rich.table import Table

from headstart.datasets.lvis import FEDERATED, FREQUENCIES, LVIS_DETECTIONS
from headstart.errors import DataError
from headstart.masks import outline

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
    found = check(ground_truth, detections, iou_types)
    metrics, per_class = {}, {}
    for iou_type in iou_types:
        curves = _curves(ground_truth, found, iou_type, (1, 10, 100), by_size=100)
        values = curves.precisions() | curves.recalls()
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
    check_federated(ground_truth)
    found = check(ground_truth, detections, iou_types)
    frequency = [c["frequency"] for c in sorted(ground_truth["categories"], key=lambda c: c["id"])]
    metrics, per_class = {}, {}
    for iou_type in iou_types:
        counts = (LVIS_DETECTIONS,)
        curves = _curves(ground_truth, found, iou_type, counts, by_size=LVIS_DETECTIONS, federated=True)
        values = curves.precisions() | curves.recalls()
        for group in FREQUENCIES:
            mine = np.array([f == group for f in frequency], bool)
            values[f"AP{group}"] = _mean(curves.by_class["AP"][mine, 0])
        metrics[iou_type] = {name: values[name] for name in LVIS_METRICS}
        per_class[iou_type] = curves.per_class(class_names(ground_truth["categories"]))
    return Scores(len(ground_truth["images"]), metrics, per_class, "lvis")


def check_federated(ground_truth: dict[str, Any]) -> None:
    """Raises: DataError, where LVIS's metrics lack what they need, as :func:`score_lvis` says."""
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


def score_proposals(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> Scores:
    """Boxes whatever their class and that of the objects. APs and ARs/m/l are of the first 100 of each image.

    Raises:
        DataError: as :func:`score`; detections need no "category_id".
    """
    found = check(ground_truth, detections, ("bbox",), classless=True)
    curves = _curves(ground_truth, found, "bbox", (1, 10, 100, 1000), by_size=100)
    values = curves.precisions() | curves.recalls()
    metrics = {"bbox": {name: values[name] for name in PROPOSAL_METRICS}}
    return Scores(len(ground_truth["images"]), metrics, {}, "proposals")


@dataclass(frozen=True)
class _Curves:
    """-1 where undefined. T: IoU .5:.95; K: classes by id; A: all, small, medium, large."""

    precision: np.ndarray  # (T, 101 recalls, K, A), of the first ``by_size`` detections of an image and class
    recall_by_size: np.ndarray  # (T, K, A), of as many
    recall: dict[int, np.ndarray]  # (T, K) by the number of detections of an image and class

    @cached_property
    def by_class(self) -> dict[str, np.ndarray]:
        """AP, AP50 and AP75, (K, A) each: a class has them at all IoUs and recalls, or at none."""
        at_iou = self.precision.mean(axis=1)
        return {"AP": at_iou.mean(axis=0), "AP50": at_iou[0], "AP75": at_iou[5]}

    def precisions(self) -> dict[str, Value]:
        of_all = {name: _mean(values[:, 0]) for name, values in self.by_class.items()}
        return of_all | {f"AP{size}": _mean(self.by_class["AP"][:, a]) for a, size in enumerate("sml", 1)}

    def recalls(self) -> dict[str, Value]:
        of_all = {f"AR{count}": _mean(values) for count, values in self.recall.items()}
        return of_all | {f"AR{size}": _mean(self.recall_by_size[:, :, a]) for a, size in enumerate("sml", 1)}

    def per_class(self, names: dict[int, str]) -> dict[str, dict[str, Value]]:
        return {
            name: {metric: _mean(self.by_class[metric][k, 0]) for metric in ("AP", "AP50")}
            for k, name in enumerate(names.values())
        }


@dataclass(frozen=True)
class _Found:
    """Detections as columns. Images and classes are numbered from 1 on in the order of their ids."""

    entries: Sequence[dict[str, Any]]
    images: np.ndarray  # (n,) float64, as the evaluator's table has them
    labels: np.ndarray | None  # (n,) float64; None: classes are not looked at
    scores: np.ndarray  # (n,) float64


def _curves(
    ground_truth: dict[str, Any],
    found: _Found,
    iou_type: str,
    counts: Sequence[int],
    by_size: int,
    federated: bool = False,
) -> _Curves:
    """``counts``: detections of an image and class, of which to tell the recall, ``by_size`` among them."""
    classes = len(ground_truth["categories"]) if found.labels is not None else 1
    if not ground_truth["images"] or not classes:
        # Without ids to restrict it to, the evaluator would take everything instead of nothing.
        none = -np.ones((10, 101, classes, 4))
        return _Curves(none, none[:, 0], dict.fromkeys(counts, none[:, 0, :, 0]))
    truth = _ground_truth(ground_truth, iou_type, federated, classless=found.labels is None)
    detected = _detections(truth, found, iou_type)
    if federated:
        detected = detected.cap_detections_per_image(LVIS_DETECTIONS)
    evaluation = COCOeval(truth, detected, iou_type, lvis_style=federated)
    evaluation.params.max_dets = [max(counts)]
    evaluation.evaluate()
    # Matches are made once. Curves of all sizes and counts are made together by default, most of which nobody reads.
    evaluation.params.max_dets = [by_size]
    evaluation.accumulate()
    made: Any = evaluation.eval  # a copy, at each look
    precision, recall_by_size = made["precision"][..., 0], made["recall"][..., 0]
    recall = {by_size: recall_by_size[:, :, 0]}
    others = [count for count in counts if count != by_size]
    if others:
        evaluation.params.max_dets, evaluation.params.rec_thrs = others, [0.0]
        evaluation.params.area_rng = evaluation.params.area_rng[:1]
        evaluation.params.area_rng_lbl = evaluation.params.area_rng_lbl[:1]
        evaluation.accumulate()
        made = evaluation.eval
        recall |= {count: made["recall"][:, :, 0, m] for m, count in enumerate(others)}
    return _Curves(precision, recall_by_size, recall)


def _numbers(entries: Sequence[dict[str, Any]]) -> dict[Any, float]:
    """By id, 1.0, 2.0 and so on in the order of the ids, which decides between detections of equal scores."""
    return {number: float(i) for i, number in enumerate(sorted({entry["id"] for entry in entries}), 1)}


def _ground_truth(ground_truth: dict[str, Any], iou_type: str, federated: bool, classless: bool) -> COCO:
    place, label = _numbers(ground_truth["images"]), _numbers(ground_truth["categories"])
    images = {}
    for image in ground_truth["images"]:
        mine: dict[str, Any] = {
            "id": int(place[image["id"]]),
            "width": image.get("width", 0),
            "height": image.get("height", 0),
        }
        if federated:
            mine |= {key: [int(label[c]) for c in image[key]] for key in FEDERATED}
        images[image["id"]] = mine
    categories: list[dict[str, Any]] = [{"id": 1, "name": "object"}]
    if not classless:
        categories = [
            {"id": int(label[c["id"]]), "name": str(c["name"])} | ({"frequency": c["frequency"]} if federated else {})
            for c in ground_truth["categories"]
        ]
    annotations = ground_truth["annotations"]
    boxes = _boxes(annotations)
    areas = [a.get("area", w * h) for a, (w, h) in zip(annotations, boxes[:, 2:].tolist(), strict=True)]
    masks = None
    if iou_type == "segm":
        masks = [a.get("segmentation") or outline(a["bbox"]) for a in annotations]
    return COCO.from_arrays(
        list(images.values()),
        categories,
        [place[a["image_id"]] for a in annotations],
        [1 if classless else label[a["category_id"]] for a in annotations],
        boxes,
        area=np.array(areas, np.float64),
        iscrowd=[bool(a.get("iscrowd", 0)) for a in annotations],
        segmentation=masks,
    )


def _detections(truth: COCO, found: _Found, iou_type: str) -> COCO:
    rows = np.zeros((len(found.entries), 7))  # image, x, y, width, height, score, class
    rows[:, 0], rows[:, 5] = found.images, found.scores
    rows[:, 6] = 1 if found.labels is None else found.labels
    if iou_type == "bbox":
        rows[:, 1:5] = _boxes(found.entries)
        return truth.load_res(rows)
    masks = [detection["segmentation"] for detection in found.entries]
    detected = truth.load_res(rows, segmentation=masks)
    if masks:
        detected.update_anns(ids=np.arange(1, len(masks) + 1), area=mask_areas(masks))
    return detected


def _boxes(entries: Sequence[dict[str, Any]]) -> np.ndarray:
    """(n, 4) float64."""
    flat: list[float] = []
    for entry in entries:
        flat += entry["bbox"]
    return _floats(flat).reshape(-1, 4)


def _floats(values: list[float]) -> np.ndarray:
    """(n,) float64, which Arrow makes of a list in half of NumPy's time."""
    return pa.array(values, pa.float64()).to_numpy()


def check(
    ground_truth: dict[str, Any],
    detections: Sequence[dict[str, Any]],
    iou_types: Sequence[str],
    classless: bool = False,
) -> _Found:
    """What there is to say of detections; ``classless``: their classes are not looked at.

    Raises:
        DataError: as :func:`score` says.
    """
    unknown = [t for t in iou_types if t not in IOU_TYPES]
    if unknown:
        raise DataError(f"IoU type {unknown[0]!r}: expected one of {', '.join(IOU_TYPES)}")
    for key in ("images", "annotations", "categories"):
        if key not in ground_truth:
            raise DataError(f'ground truth: no "{key}"; expected a COCO data set')
    images = _column(detections, "image_id", ground_truth["images"])
    labels = None if classless else _column(detections, "category_id", ground_truth["categories"])
    scores = _floats([detection["score"] for detection in detections])
    finite = np.isfinite(scores)
    if not finite.all():
        i = int(finite.argmin())
        raise DataError(f"detection {i} (image {detections[i]['image_id']}): score is {detections[i]['score']}")
    if "segm" in iou_types:
        _check_masks(ground_truth["annotations"], detections)
    return _Found(detections, images, labels, scores)


def _column(detections: Sequence[dict[str, Any]], key: str, entries: Sequence[dict[str, Any]]) -> np.ndarray:
    """(n,) float64 numbers of the images or categories that detections name."""
    ids, number = [detection[key] for detection in detections], _numbers(entries)
    try:
        return _floats(list(map(number.__getitem__, ids)))
    except KeyError:
        i = next(i for i, unknown in enumerate(ids) if unknown not in number)
        raise DataError(
            f"detection {i}: {key} {ids[i]!r} is not in the ground truth. "
            "Were these detections made for another data set?"
        ) from None


def _check_masks(annotations: Sequence[dict[str, Any]], detections: Sequence[dict[str, Any]]) -> None:
    hint = 'so masks can\'t be scored. Score boxes only: iou_types=("bbox",).'
    for i, annotation in enumerate(annotations):
        if not annotation.get("segmentation") and not annotation.get("iscrowd"):
            raise DataError(f'annotation {i} (image {annotation["image_id"]}) has no "segmentation", {hint}')
    masks = [detection.get("segmentation") for detection in detections]
    compressed = [isinstance(mask, dict) and isinstance(mask.get("counts"), (str, bytes)) for mask in masks]
    if not all(compressed):
        i = compressed.index(False)
        raise DataError(
            f'detection {i} (image {detections[i]["image_id"]}) has no "segmentation" in compressed RLE, {hint}'
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
