"""The detections that runs kept, and what they are measured against, read once for every section that shows them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headstart.datasets.detection import DetectionData, load_detection_data
from headstart.errors import DataError
from headstart.files import read_json
from headstart.verbs.report import words
from headstart.verbs.report.parts import Looks, Note
from headstart.verbs.report.runs import Run
from headstart.verbs.report.statistics import Group


@dataclass(frozen=True)
class Found:
    """What the first seed of a group found, image by image and in each from the surest down.

    Attributes:
        starts: (images + 1,) those of image i are ``starts[i]:starts[i + 1]``.
        labels: (n,) 1..C; boxes: (n, 4) float64 xyxy px; scores: (n,).
    """

    group: Group
    label: str
    starts: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def of(self, i: int) -> slice:
        return slice(self.starts[i], self.starts[i + 1])


@dataclass
class Kept:
    """``data`` is None where the ground truth can't be read."""

    data: DetectionData | None = None
    found: list[Found] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def by_budget(self) -> list[tuple[str, list[Found]]]:
        """(title, those of one label budget), in the order of the groups."""
        budgets = dict.fromkeys(found.group.key.budget for found in self.found)
        blocks = [[found for found in self.found if found.group.key.budget == budget] for budget in budgets]
        return [(words.budget_title(b[0].group.key, b[0].group.labelled_images), b) for b in blocks]


def read_kept(groups: Sequence[Group], looks: Looks) -> Kept:
    """``groups``: all evaluated on one data set."""
    kept = Kept()
    try:
        kept.data = _load_ground_truth(groups[0].evaluations[0].data, groups[0].runs[0])
    except DataError as error:
        kept.notes.append(Note(f"No pictures of detections, since the ground truth can't be read: {error}"))
        return kept
    for group in groups:
        run, evaluation, label = group.runs[0], group.evaluations[0], looks.labels[group.key.start]
        redo = f"headstart evaluate {shlex.quote(str(run.path))} {shlex.quote(evaluation.data or 'val.json')}"
        if evaluation.detections is None or not evaluation.detections.is_file():
            kept.notes.append(Note(f"{label}: {run.name} kept no detections to show.", redo))
            continue
        try:
            listed = read_json(evaluation.detections, "a list of COCO results")
            kept.found.append(_arrays(group, label, listed, kept.data))
        except (DataError, KeyError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, DataError) else f"{evaluation.detections}: no COCO results"
            kept.notes.append(Note(f"{label}: {reason}", redo))
    return kept


def _arrays(group: Group, label: str, listed: Sequence[dict[str, Any]], data: DetectionData) -> Found:
    """Detections of images and classes that ``data`` lacks are left out."""
    place = {data.coco_image_id(i): i for i in range(len(data.images))}
    label_of = {category.id: k + 1 for k, category in enumerate(data.categories)}
    mine = [d for d in listed if d["image_id"] in place and d["category_id"] in label_of]
    images = np.array([place[d["image_id"]] for d in mine], np.int64)
    scores = np.array([d["score"] for d in mine], np.float64)
    boxes = np.array([d["bbox"] for d in mine], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    order = np.lexsort((-scores, images))
    return Found(
        group=group,
        label=label,
        starts=np.searchsorted(images[order], np.arange(len(place) + 1)),
        labels=np.array([label_of[d["category_id"]] for d in mine], np.int64)[order],
        boxes=boxes[order],
        scores=scores[order],
    )


def _load_ground_truth(source: str, run: Run) -> DetectionData:
    """The data set by the path that was evaluated; its photos may lie where the run says."""
    try:
        return load_detection_data(source)
    except DataError as error:
        folder = run.data.get("val_images") or run.data.get("images")
        if not isinstance(folder, str) or not Path(folder).is_dir():
            raise
        try:
            return load_detection_data(source, images=Path(folder))
        except DataError:
            raise error from None


def photos_to_show(data: DetectionData) -> list[int]:
    """Images with objects, or all where there are none."""
    return [i for i, a in enumerate(data.annotations) if len(a.boxes)] or list(range(len(data.images)))
