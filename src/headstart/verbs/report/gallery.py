"""Detections beside ground truth, on the same photos for every way of starting."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headstart.datasets.detection import DetectionData, load_detection_data
from headstart.errors import DataError, ImageError
from headstart.files import read_json
from headstart.verbs.report import pictures, words
from headstart.verbs.report.parts import Looks, Note, Pictures
from headstart.verbs.report.runs import Run
from headstart.verbs.report.statistics import Group


@dataclass
class Gallery:
    """``blocks``: by label budget, its title and a row of pictures a photo; the ground truth comes first."""

    blocks: list[tuple[str, list[tuple[str, list[pictures.Picture]]]]]
    classes: list[tuple[str, str, str]]  # name, colour, dashes
    threshold: float
    notes: list[Note] = field(default_factory=list)


def gallery(groups: Sequence[Group], looks: Looks, photos: Pictures, images: int, threshold: float) -> Gallery:
    """The first seed of each group; ``images`` photos, spread evenly over those with objects."""
    page = Gallery([], [], threshold)
    if not images:
        return page
    try:
        data = _load_ground_truth(groups[0].evaluations[0].data, groups[0].runs[0])
    except DataError as error:
        page.notes.append(Note(f"No pictures of detections, since the ground truth can't be read: {error}"))
        return page

    with_objects = [i for i in range(len(data.images)) if len(data.annotations[i].boxes)]
    candidates = with_objects or list(range(len(data.images)))
    chosen: list[tuple[int, pictures.Thumbnail]] = []
    for place in pictures.evenly_spaced(len(candidates), images):
        record = data.images[candidates[place]]
        try:
            chosen.append((candidates[place], photos.get(record.path, record.width)))
        except ImageError as error:
            page.notes.append(Note(f"Left out of the pictures: {error}"))

    found = _detections_of_groups(groups, {data.coco_image_id(i) for i, _ in chosen}, looks, page.notes)
    shown_labels: set[int] = set()
    for budget in dict.fromkeys(group.key.budget for group, _ in found):
        here = [(group, by_image) for group, by_image in found if group.key.budget == budget]
        rows = []
        for index, thumb in chosen:
            row = [_truth(data, index, thumb, shown_labels)]
            for group, by_image in here:
                detections = by_image.get(data.coco_image_id(index), [])
                label = looks.labels[group.key.start]
                row.append(_found(data, index, thumb, detections, label, threshold, shown_labels))
            rows.append((data.images[index].file_name, row))
        page.blocks.append((words.budget_title(here[0][0].key, here[0][0].labelled_images), rows))
    page.classes = [
        (category.name, *pictures.class_style(k + 1))
        for k, category in enumerate(data.categories)
        if k + 1 in shown_labels
    ]
    return page


def _truth(data: DetectionData, index: int, thumb: pictures.Thumbnail, shown: set[int]) -> pictures.Picture:
    truth = data.annotations[index]
    labels = [int(label) for label in truth.labels]
    shown.update(labels)
    names = [data.categories[label - 1].name for label in labels]
    alt = f"{data.images[index].file_name}: ground truth, {words.plural(len(labels), 'object')}"
    return _picture(thumb, np.asarray(truth.boxes, np.float64).reshape(-1, 4), labels, names, "ground truth", alt)


def _found(
    data: DetectionData,
    index: int,
    thumb: pictures.Thumbnail,
    detections: Sequence[dict[str, Any]],
    label: str,
    threshold: float,
    shown: set[int],
) -> pictures.Picture:
    """Detections that are sure enough; if there is none, the best one, and the caption says so."""
    label_of = {category.id: k + 1 for k, category in enumerate(data.categories)}
    ordered = sorted((d for d in detections if d["category_id"] in label_of), key=lambda d: -d["score"])
    kept = [d for d in ordered if d["score"] >= threshold]
    caption, remark = label, words.plural(len(kept), "detection")
    if not kept:
        kept = ordered[:1]
        remark = f"best of {len(ordered)}, score {ordered[0]['score']:.2f}" if ordered else "no detection"
        caption = f"{label} · {remark}"
    boxes = np.array([d["bbox"] for d in kept], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [label_of[d["category_id"]] for d in kept]
    shown.update(labels)
    names = [f"{data.categories[k - 1].name} {d['score']:.2f}" for k, d in zip(labels, kept, strict=True)]
    return _picture(thumb, boxes, labels, names, caption, f"{data.images[index].file_name}: {label}, {remark}")


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


def _detections_of_groups(
    groups: Sequence[Group], image_ids: set[int], looks: Looks, notes: list[Note]
) -> list[tuple[Group, dict[int, list[dict[str, Any]]]]]:
    """The first seed's detections of each group, by image."""
    found = []
    for group in groups:
        run, evaluation = group.runs[0], group.evaluations[0]
        redo = f"headstart evaluate {shlex.quote(str(run.path))} {shlex.quote(evaluation.data or 'val.json')}"
        label = looks.labels[group.key.start]
        if evaluation.detections is None or not evaluation.detections.is_file():
            notes.append(Note(f"{label}: {run.name} kept no detections to show.", redo))
            continue
        by_image: dict[int, list[dict[str, Any]]] = {}
        try:
            for detection in read_json(evaluation.detections, "a list of COCO results"):
                if detection["image_id"] in image_ids:
                    kept = {key: detection[key] for key in ("category_id", "bbox", "score")}
                    by_image.setdefault(detection["image_id"], []).append(kept)
        except (DataError, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, DataError) else f"{evaluation.detections}: no COCO results"
            notes.append(Note(f"{label}: {reason}", redo))
            continue
        found.append((group, by_image))
    return found


def _picture(
    thumb: pictures.Thumbnail,
    boxes: np.ndarray,
    classes: Sequence[int],
    labels: Sequence[str],
    caption: str,
    alt: str,
) -> pictures.Picture:
    styles = [pictures.class_style(label) for label in classes]
    drawn = pictures.marks(thumb, boxes, styles, labels)
    return pictures.Picture(thumb, drawn, caption, alt, len(drawn) > pictures.LABELS_UP_TO)
