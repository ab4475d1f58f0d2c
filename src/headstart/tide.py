"""What the AP is lost to: error types of detections, and the AP that would be gained without each.

TIDE: A General Toolbox for Identifying Object Detection Errors (Bolya et al., 2020), https://arxiv.org/abs/2008.08115.
Section 2.2 (types) -> ``_judge``; 2.3 and 2.4 (fixing them, and the special errors) -> ``analyse``;
``verdicts`` names each. Where the paper
leaves something open, its code (``tidecv`` 1.0.1) decides, with which the tests compare:

- A crowd, and in federated data a class that was not looked for, saves a false detection from counting, but fixing it
  may still make it a correct one.
- A class without objects has an AP of 0 here as soon as something is found of it; COCO leaves it out.
- Of detections that tie, those whose AP is looked at with an error fixed come after the false ones.
- Each gain of a main error is at least 0: what is below comes from the 101 steps of recall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.datasets.lvis import LVIS_DETECTIONS
from headstart.eval_arrays import Objects

MAIN = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
SPECIAL = ("FalsePos", "FalseNeg")
MEANING = {
    "Cls": "right place, wrong class",
    "Loc": "right class, box too far off",
    "Both": "wrong class and too far off",
    "Dupe": "an object found once more",
    "Bkg": "nothing is there",
    "Miss": "an object that nothing comes near",
    "FalsePos": "all false detections together",
    "FalseNeg": "all objects not found together",
}
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU from which an object counts as found, up to which a detection hit nothing
DETECTIONS = 100  # an image; of federated data, LVIS's number
RECALLS = np.arange(101) / 100
CLS, LOC, BOTH, DUPE, BKG = range(5)  # places in MAIN
CORRECT = -1


@dataclass(frozen=True)
class Errors:
    """AP at an IoU of 0.5 in 0..1, what it would gain without each type of error, and how often each occurs.

    ``gains`` and ``counts`` have the names of ``MAIN``, then ``SPECIAL``. An object counts as missed where no
    detection is a wrong one for its sake. None: there is nothing to find and nothing was found.
    """

    ap: float | None
    gains: dict[str, float | None]
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"IoU": [BACKGROUND, FOREGROUND], "AP": self.ap, "dAP": self.gains, "counts": self.counts}


def analyse(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]], iou_type: str = "bbox") -> Errors:
    """Error types of ``detections``, both arguments as for :func:`headstart.coco_eval.score`, and checked there."""
    truth = Objects.read(ground_truth, ground_truth["annotations"], iou_type)
    found = Objects.read(ground_truth, detections, iou_type)
    judged = _judge_all(ground_truth, truth, found)
    n_classes = len(ground_truth["categories"])
    objects = np.bincount(truth.labels[~truth.crowd], minlength=n_classes)
    missed, unused = (np.bincount(truth.labels[which], minlength=n_classes) for which in (judged.missed, judged.unused))

    labels, scores, kind = judged.labels, judged.scores, judged.kind
    correct = kind == CORRECT
    counted = ~judged.ignored
    places = np.arange(len(labels))
    later = np.where(correct, places + len(labels), places)  # correct ones after false ones
    ap = _mean_ap(labels[counted], scores[counted], correct[counted], objects)
    fixed: dict[str, float | None] = {}
    for code, name in enumerate(MAIN[:5]):
        mine = kind == code
        kept = (counted & ~mine) | (mine & judged.fixable)
        order = np.flatnonzero(kept)[np.argsort(later[kept])]
        now = np.where(mine, judged.fixed_labels, labels)[order]
        fixed[name] = _mean_ap(now, scores[order], (correct | mine)[order], objects)
    order = np.flatnonzero(counted)[np.argsort(later[counted])]
    as_found = labels[order], scores[order], correct[order]
    fixed["Miss"] = _mean_ap(*as_found, objects - missed)
    fixed["FalsePos"] = _mean_ap(labels[order], correct[order].astype(np.float64), correct[order], objects)
    fixed["FalseNeg"] = _mean_ap(*as_found, objects - unused)

    gains = {name: _gain(value, ap, name in MAIN) for name, value in fixed.items()}
    counts = {name: int((kind == code).sum()) for code, name in enumerate(MAIN[:5])}
    counts |= {
        "Miss": int(missed.sum()),
        "FalsePos": int((counted & ~correct).sum()),
        "FalseNeg": int(unused.sum()),
    }
    return Errors(ap, gains, counts)


@dataclass(frozen=True)
class Verdicts:
    """What each detection and each object is, in the order they were given in.

    Attributes:
        detections: "correct" or a name of ``MAIN``; None past those of an image that count.
        ignored: false detections that a crowd, or a class that was not looked for, saves from counting.
        objects: "found"; "wrong": not found, and a detection is a wrong one for its sake; "Miss"; "crowd".
    """

    detections: list[str | None]
    ignored: list[bool]
    objects: list[str]


def verdicts(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]], iou_type: str = "bbox") -> Verdicts:
    """The judgement that :func:`analyse` counts, one by one; the same arguments."""
    place = {image["id"]: i for i, image in enumerate(ground_truth["images"])}
    by_image = lambda entries: sorted(range(len(entries)), key=lambda k: place[entries[k]["image_id"]])
    annotations = ground_truth["annotations"]
    objects_order, found_order = by_image(annotations), by_image(detections)
    truth = Objects.read(ground_truth, [annotations[k] for k in objects_order], iou_type)
    found = Objects.read(ground_truth, [detections[k] for k in found_order], iou_type)
    judged = _judge_all(ground_truth, truth, found)

    told = Verdicts([None] * len(detections), [False] * len(detections), ["found"] * len(annotations))
    for number, kind, ignored in zip(judged.numbers, judged.kind, judged.ignored, strict=True):
        told.detections[found_order[number]] = "correct" if kind == CORRECT else MAIN[kind]
        told.ignored[found_order[number]] = bool(ignored)
    for numbers, name in ((judged.unused, "wrong"), (judged.missed, "Miss"), (np.flatnonzero(truth.crowd), "crowd")):
        for number in numbers:
            told.objects[objects_order[number]] = name
    return told


def _gain(value: float | None, ap: float | None, main: bool) -> float | None:
    if ap is None:
        return None
    # Nothing is left to find or to judge once a single kind of error is gone: the mean over no class.
    gain = (value or 0.0) - ap
    return max(gain, 0.0) if main else gain


@dataclass(frozen=True)
class _Judged:
    """Detections that count, image by image and in each from the highest score down; objects as they are in the file.

    ``kind`` is a place in ``MAIN`` or ``CORRECT``. Fixing an error makes the detection correct, with label
    ``fixed_labels``, if it is ``fixable``; else it goes.
    """

    numbers: np.ndarray  # of detections
    labels: np.ndarray
    scores: np.ndarray
    kind: np.ndarray
    ignored: np.ndarray
    fixable: np.ndarray
    fixed_labels: np.ndarray
    missed: np.ndarray  # numbers of objects
    unused: np.ndarray


def _judge_all(ground_truth: dict[str, Any], truth: Objects, found: Objects) -> _Judged:
    federated = any("neg_category_ids" in image for image in ground_truth["images"])
    most = LVIS_DETECTIONS if federated else DETECTIONS
    parts: list[tuple[np.ndarray, ...]] = []
    missed, unused = [], []
    ids = np.array(sorted(category["id"] for category in ground_truth["categories"]), np.int64)
    for i, image in enumerate(ground_truth["images"]):
        mine = np.arange(found.starts[i], found.starts[i + 1])
        mine = mine[np.argsort(-found.scores[mine], kind="stable")][:most]
        here = np.arange(truth.starts[i], truth.starts[i + 1])
        objects, crowds = here[~truth.crowd[here]], here[truth.crowd[here]]
        if not len(mine):
            missed.append(objects)
            unused.append(objects)
            continue
        same_crowd = found.labels[mine, None] == truth.labels[None, crowds]
        excused = (same_crowd & (found.iou(mine, truth, crowds, crowd=True) > FOREGROUND)).any(axis=1)
        if federated:
            looked_for = np.isin(ids, image.get("neg_category_ids", []))
            looked_for[truth.labels[objects]] = True
            looked_for &= ~np.isin(ids, image.get("not_exhaustive_category_ids", []))
            excused |= ~looked_for[found.labels[mine]]
        kind, fixable, of, used = _judge(found.labels[mine], truth.labels[objects], found.iou(mine, truth, objects))
        wanted = truth.labels[objects][of] if len(objects) else found.labels[mine]
        usable = np.zeros(len(objects), bool)
        usable[of[fixable]] = True
        unused.append(objects[~used])
        missed.append(objects[~used & ~usable])
        ignored = excused & (kind != CORRECT)
        parts.append((mine, found.labels[mine], found.scores[mine], kind, ignored, fixable, wanted))
    whole, flags = np.zeros(0, np.int64), np.zeros(0, bool)
    columns = zip((whole, whole, np.zeros(0), whole, flags, flags, whole), *parts, strict=True)
    numbers, labels, scores, kinds, ignored, fixable, fixed = (np.concatenate(column) for column in columns)
    return _Judged(
        numbers=numbers,
        labels=labels,
        scores=scores,
        kind=kinds,
        ignored=ignored,
        fixable=fixable,
        fixed_labels=fixed,
        missed=np.concatenate([whole, *missed]),
        unused=np.concatenate([whole, *unused]),
    )


def _judge(
    labels: np.ndarray, wanted: np.ndarray, iou: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One image: what each detection is, from the highest score down.

    Args:
        labels: (d,) of the detections; wanted: (g,) of the objects; iou: (d, g).

    Returns:
        kind (d,); fixable (d,): wrong in one way, and the first to be so about its object, which nothing found;
        of (d,): that object's place; used (g,): found.
    """
    kind = np.full(len(labels), BKG)
    fixable, of = np.zeros(len(labels), bool), np.zeros(len(labels), np.int64)
    used = np.zeros(len(wanted), bool)
    if not len(wanted):
        return kind, fixable, of, used
    same = labels[:, None] == wanted[None, :]
    iou_same, iou_other = iou * same, iou * ~same
    free = iou_same.copy()
    for d in np.flatnonzero(iou_same.max(axis=1) >= FOREGROUND):
        g = int(free[d].argmax())
        if free[d, g] >= FOREGROUND:
            kind[d], used[g], free[:, g] = CORRECT, True, 0.0

    rows = np.arange(len(labels))
    nearest_same, nearest_other = iou_same.argmax(axis=1), iou_other.argmax(axis=1)
    best_same, best_other = iou_same[rows, nearest_same], iou_other[rows, nearest_other]
    localisation = (best_same >= BACKGROUND) & (best_same <= FOREGROUND)
    classification = best_other >= FOREGROUND
    duplicate = (iou_same * used).max(axis=1) >= FOREGROUND
    nothing = iou.max(axis=1) <= BACKGROUND
    wrong = np.select([localisation, classification, duplicate, nothing], [LOC, CLS, DUPE, BKG], BOTH)
    kind = np.where(kind == CORRECT, CORRECT, wrong)

    of = np.where(kind == LOC, nearest_same, nearest_other)
    candidates = np.flatnonzero(((kind == LOC) | (kind == CLS)) & ~used[of])
    fixable[candidates[np.unique(of[candidates], return_index=True)[1]]] = True
    return kind, fixable, of, used


def _mean_ap(labels: np.ndarray, scores: np.ndarray, correct: np.ndarray, objects: np.ndarray) -> float | None:
    """Mean over classes that have objects or detections of the AP in 101 steps; of equal scores the first come first.

    Args:
        objects: (classes,) how many of each there are to find.
    """
    order = np.lexsort((-scores, labels))
    correct = correct[order]
    starts = np.searchsorted(labels[order], np.arange(len(objects) + 1))
    values = []
    for k in np.flatnonzero((np.diff(starts) > 0) | (objects > 0)):
        hits = np.cumsum(correct[starts[k] : starts[k + 1]])
        if objects[k] == 0 or not len(hits):
            values.append(0.0)
            continue
        precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
        steps = np.searchsorted(hits / objects[k], RECALLS)
        values.append(float(precision[steps[steps < len(hits)]].sum() / len(RECALLS)))
    return float(np.mean(values)) if values else None
