"""Boxes that a run made itself (JoinDet's priors), from refresh to refresh: on photos, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from headstart.datasets.image_set import find
from headstart.errors import DataError
from headstart.proposals.store import ProposalStore, readable
from headstart.verbs.report import figures, pictures, words
from headstart.verbs.report.figures import Curve, Look
from headstart.verbs.report.parts import Note, Pictures, Shown
from headstart.verbs.report.runs import Run
from headstart.verbs.report.samples import IMAGES_COUNTED, relative_size

FOLDER = "priors"  # in the run folder, as headstart.verbs.refresh writes it
COLUMNS = 6  # refreshes shown, at most: the first, the last, and evenly what is between
PHOTOS = 4
BOXES = 10  # drawn on a photo, the surest
COUNTED = IMAGES_COUNTED // 10  # of each refresh


@dataclass
class Priors:
    run: Run
    title: str
    rows: list[tuple[str, list[pictures.Picture]]] = field(default_factory=list)
    figures: list[Shown] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def files_of(run: Run) -> list[Path]:
    return sorted((run.path / FOLDER).glob("[0-9]*.parquet"))


def priors(runs: Sequence[Run], photos: Pictures, images: int) -> list[Priors]:
    """An entry for each run that made boxes of its own; at most ``images`` photos each."""
    return [_priors(run, photos, images, f"priors{i}") for i, run in enumerate(r for r in runs if files_of(r))]


def _priors(run: Run, photos: Pictures, images: int, name: str) -> Priors:
    stores: dict[int, ProposalStore] = {}
    section = Priors(run, run.name)
    for file in files_of(run):
        try:
            stores[int(file.stem)] = ProposalStore.open(file)
        except DataError as error:
            section.notes.append(Note(str(error)))
    if not stores:
        return section
    section.title = f"{run.name}: boxes made {words.plural(len(stores), 'time')}"
    section.figures = _curves(stores, name)
    steps = list(stores)
    shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, COLUMNS).round().astype(int))]
    _draw(section, {step: stores[step] for step in shown}, photos, min(images, PHOTOS))
    return section


def _curves(stores: dict[int, ProposalStore], name: str) -> list[Shown]:
    """Boxes an image and their size, by the step at which they were made."""
    counts, sizes = [], []
    for store in stores.values():
        counted = pictures.evenly_spaced(len(store), COUNTED)
        counts.append(sum(len(store.boxes(i)) for i in counted) / len(counted))
        measured = np.concatenate([relative_size(store.boxes(i), *store.size(i)) for i in counted])
        sizes.append(float(np.median(measured)) if len(measured) else np.nan)
    steps = np.array(list(stores), np.float64)
    shown = []
    for key, values, title, caption in (
        ("counts", counts, "Boxes an image", "Mean over images, at the step from which these boxes were used."),
        ("sizes", sizes, "Size of boxes", "Median of √(box area) / √(image area)."),
    ):
        line = Curve(title, Look(1), steps, np.array([values], np.float64))
        described = ", ".join(f"{value:.3g} from step {step:g}" for step, value in zip(steps, values, strict=True))
        svg = figures.curves(
            [line], f"{name}-{key}", f"{title} by refresh: {described}.", title=title, ylabel=title.lower(), zero=True
        )
        shown.append(Shown(svg, caption))
    return shown


def _draw(section: Priors, stores: dict[int, ProposalStore], photos: Pictures, images: int) -> None:
    """Rows of pictures: a photo, from refresh to refresh."""
    folder = Path(str(section.run.data.get("images") or "PHOTOS/"))
    first = next(iter(stores.values()))
    for i in pictures.evenly_spaced(len(first), images):
        file_name, (width, _) = first.images[i], first.size(i)
        try:
            thumb = photos.get(find(folder, file_name), width)
        except DataError as error:
            if not folder.exists():
                section.notes.append(Note(f"No sample images: the folder {folder} is not there."))
                return
            section.notes.append(Note(f"Left out of the samples: {error}"))
            continue
        row = []
        for step, store in stores.items():
            boxes, scores, total = _surest(store.path, file_name)
            style = [(pictures.CLASS_COLORS[k % len(pictures.CLASS_COLORS)], "") for k in range(len(boxes))]
            caption = f"from step {step}: {len(boxes)} of {words.plural(total, 'box')}"
            drawn = pictures.marks(thumb, boxes, style, [f"{score:.2f}" for score in scores])
            row.append(pictures.Picture(thumb, drawn, caption, f"{file_name}, {caption}", crowded=True))
        section.rows.append((file_name, row))


def _surest(file: Path, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Boxes (k, 4) xyxy px of a photo and their scores, best first; and how many there are."""
    with readable(file):
        rows = pq.read_table(file, columns=["boxes", "scores"], filters=[("image", "=", name)]).to_pylist()
    boxes = np.array([b for row in rows for b in row["boxes"] or []], np.float64).reshape(-1, 4)
    scores = np.array([s for row in rows for s in row["scores"] or []], np.float64)
    order = np.argsort(-scores, kind="stable")[:BOXES]
    return boxes[order], scores[order], len(boxes)
