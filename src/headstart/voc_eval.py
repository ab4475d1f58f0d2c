"""Pascal VOC's average precision, for boxes (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf, 3.4).

As the development kit defines it: a detection belongs to the object it overlaps most, is correct from an IoU of 0.5 on
if it is the first to find it, and does not count where that object is difficult (here: a crowd). There is no limit to
the detections of an image. AP is the area under the curve of the best precision at this recall or more (since 2010),
or the mean of 11 points of it (until 2009: the figures papers give for VOC 2007).

"AP50" is the challenge's mAP. "AP75" and "AP", over IoUs of .5 to .95, are what Detectron2 made of it for papers.
Its boxes reach from the middle of a pixel to the middle of another and so are a pixel longer than the difference of
their corners; ours reach from edge to edge, which makes the same IoU without adding one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headstart.coco_eval import Scores, Value, check, class_names
from headstart.eval_arrays import Objects

IOUS = np.arange(50, 100, 5) / 100
POINTS = np.arange(11) * 0.1


def score(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]], eleven_points: bool = False) -> Scores:
    """mAP and AP by class; a class without an object that is not difficult has none.

    Args:
        ground_truth, detections: as for :func:`headstart.coco_eval.score`; "iscrowd" means difficult.
        eleven_points: AP as until 2009.

    Raises:
        DataError: a detection of an unknown image or category, or with a score that is not finite.
    """
    check(ground_truth, detections, ("bbox",))
    truth = Objects.read(ground_truth, ground_truth["annotations"])
    found = Objects.read(ground_truth, detections)
    nearest, overlap = _nearest(truth, found)
    aps = np.full((len(ground_truth["categories"]), len(IOUS)), np.nan)
    for k in range(len(aps)):
        objects = int(((truth.labels == k) & ~truth.crowd).sum())
        mine = np.flatnonzero(found.labels == k)
        mine = mine[np.argsort(-found.scores[mine], kind="stable")]
        for t, iou in enumerate(IOUS if objects else []):
            hit = overlap[mine] >= iou
            counts = ~(hit & truth.crowd[nearest[mine]]) if len(truth.crowd) else np.ones(len(mine), bool)
            first = np.zeros(len(mine), bool)
            places = np.flatnonzero(hit & counts)
            first[places[np.unique(nearest[mine][places], return_index=True)[1]]] = True
            aps[k, t] = _average_precision(first[counts], objects, eleven_points)

    value = lambda values: None if np.isnan(values).all() else float(np.nanmean(values))
    overall: dict[str, Value] = {"AP": value(aps), "AP50": value(aps[:, 0]), "AP75": value(aps[:, 5])}
    per_class: dict[str, dict[str, Value]] = {
        name: {"AP": value(aps[k]), "AP50": value(aps[k, 0])}
        for k, name in enumerate(class_names(ground_truth["categories"]).values())
    }
    suite = "voc07" if eleven_points else "voc"
    return Scores(len(ground_truth["images"]), {"bbox": overall}, {"bbox": per_class}, suite)


def _nearest(truth: Objects, found: Objects) -> tuple[np.ndarray, np.ndarray]:
    """The object of its class that each detection overlaps most, and their IoU; object 0 and -1 where there is none."""
    nearest, overlap = np.zeros(len(found.labels), np.int64), np.full(len(found.labels), -1.0)
    for i in range(len(truth.starts) - 1):
        mine, objects = (np.arange(o.starts[i], o.starts[i + 1]) for o in (found, truth))
        if not len(mine) or not len(objects):
            continue
        same = found.labels[mine, None] == truth.labels[None, objects]
        iou = np.where(same, found.iou(mine, truth, objects), -1.0)
        best = iou.argmax(axis=1)
        nearest[mine], overlap[mine] = objects[best], iou[np.arange(len(mine)), best]
    return nearest, overlap


def _average_precision(correct: np.ndarray, objects: int, eleven_points: bool) -> float:
    """Of detections from the highest score down, (n,) bool."""
    if not len(correct):
        return 0.0
    hits = np.cumsum(correct)
    recall = hits / objects
    best = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    if eleven_points:
        places = np.searchsorted(recall, POINTS)
        return float(best[places[places < len(best)]].sum() / len(POINTS))
    return float((np.diff(recall, prepend=0.0) * best).sum())
