"""Proposals on sample photos, and histograms of them: the two of SoCo's Figure 3, and of their form."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headstart.datasets.image_set import find
from headstart.errors import DataError
from headstart.proposals.store import ProposalStore
from headstart.verbs.report import figures, pictures, words
from headstart.verbs.report.parts import Note, Pictures, Shown
from headstart.verbs.report.runs import Run

MAX_BOXES_DRAWN = 12  # an image
IMAGES_COUNTED = 20_000  # for the histograms
RATIO_END = 4  # of the histogram of forms


@dataclass
class Proposals:
    source: str
    facts: str
    gallery: list[pictures.Picture]
    figures: list[Shown]
    notes: list[Note]
    runs: list[str] = field(default_factory=list)  # names of those that used them


def proposals(runs: Sequence[Run], photos: Pictures, images: int) -> tuple[list[Proposals], list[Note]]:
    """Every proposals file the pretraining runs used, once."""
    sections: dict[Path, Proposals] = {}
    notes = []
    for run in runs:
        if run.kind != "pretrain" or not uses_proposals(run):
            continue
        file = _proposals_file(run)
        folder = str(run.data.get("images") or "PHOTOS/")
        if file is None:
            made = run.data.get("proposals") == "on-the-fly"
            lacking = "its boxes were made while training and not kept" if made else "its proposals file is not there"
            out = shlex.quote(str(run.path / "proposals.parquet"))
            notes.append(
                Note(
                    f"{run.name}: {lacking}.",
                    f"headstart propose {shlex.quote(folder)} --out {out}",
                )
            )
        elif file.resolve() not in sections:
            try:
                name = f"boxes{len(sections)}"
                sections[file.resolve()] = _proposals(file, Path(folder), photos, images, name)
            except DataError as error:
                notes.append(Note(f"{run.name}: {error}"))
        if file is not None and file.resolve() in sections:
            sections[file.resolve()].runs.append(run.name)
    return list(sections.values()), notes


def uses_proposals(run: Run) -> bool:
    """Not where the method makes boxes of its own, or needs none; runs that did not record it may have."""
    return run.data.get("proposals", "") is not None


def _proposals_file(run: Run) -> Path | None:
    named = run.config.get("data.proposals") or run.config.get("proposals") or run.data.get("proposals")
    candidates = [run.path / "proposals.parquet"]
    if isinstance(named, str):
        candidates += [Path(named), run.path / named]
        # Where compare leaves it, in a folder that may have been moved with all its runs.
        candidates += [above / Path(named).name for above in run.path.resolve().parents[:2]]
    return next((file for file in candidates if file.is_file()), None)


def _proposals(file: Path, folder: Path, photos: Pictures, images: int, name: str) -> Proposals:
    store = ProposalStore.open(file)
    counted = pictures.evenly_spaced(len(store), IMAGES_COUNTED)
    counts = np.array([len(store.boxes(i)) for i in counted])
    sizes = np.concatenate([relative_size(store.boxes(i), *store.size(i)) for i in counted])
    ratios = np.concatenate([aspect_ratio(store.boxes(i)) for i in counted])
    facts = f"{words.plural(len(store), 'image')}, {counts.mean():.1f} boxes an image on average"
    if store.failures:
        facts += f", {words.plural(len(store.failures), 'image')} left out as unusable"
    section = Proposals(str(file), facts, [], [], [])

    rng = np.random.default_rng(0)
    for i in pictures.evenly_spaced(len(store), images):
        width, _ = store.size(i)
        boxes = np.array(store.boxes(i), np.float64)
        try:
            thumb = photos.get(find(folder, store.images[i]), width)
        except DataError as error:
            if not folder.exists():
                section.notes.append(Note(f"No sample images: the folder {folder} is not there."))
                break
            section.notes.append(Note(f"Left out of the samples: {error}"))
            continue
        drawn = boxes
        caption = words.plural(len(boxes), "box")
        if len(boxes) > MAX_BOXES_DRAWN:
            drawn = boxes[np.sort(rng.choice(len(boxes), MAX_BOXES_DRAWN, replace=False))]
            caption = f"{MAX_BOXES_DRAWN} of {len(boxes)} boxes"
        styles = [(pictures.CLASS_COLORS[k % len(pictures.CLASS_COLORS)], "") for k in range(len(drawn))]
        section.gallery.append(
            pictures.Picture(
                thumb,
                pictures.marks(thumb, drawn, styles, [""] * len(drawn)),
                caption,
                f"{store.images[i]} with {caption}",
                crowded=False,
            )
        )
    note = f" Of {words.plural(len(counted), 'image')}, evenly spaced." if len(counted) < len(store) else ""
    top = max(int(np.quantile(counts, 0.995)), 1)
    width = max(1, -(-(top + 1) // 40))
    section.figures = [
        Shown(
            figures.histogram(
                np.minimum(counts, top), np.arange(0, top + width + 1, width) - 0.5, f"{name}-counts",
                f"Histogram of boxes an image; median {np.median(counts):.3g}.",
                title="Boxes an image", xlabel="boxes", ylabel="images",
            ),
            "The last bar holds everything above it." + note,
        ),
        Shown(
            figures.histogram(
                sizes, np.linspace(0, 1, 41), f"{name}-sizes",
                f"Histogram of relative box size; median {np.median(sizes):.3g}.",
                title="Size of boxes", xlabel="√(box area) / √(image area)", ylabel="boxes",
            ),
            "As in Figure 3 of the SoCo paper." + note,
        ),
        Shown(
            figures.histogram(
                ratios, np.geomspace(1 / RATIO_END, RATIO_END, 33), f"{name}-ratios",
                f"Histogram of width by height; median {np.median(ratios):.3g}.",
                title="Form of boxes", xlabel="width / height", ylabel="boxes", ratios=True,
            ),
            f"Wide boxes are on the right. The outermost bars hold everything beyond {RATIO_END} to 1." + note,
        ),
    ]  # fmt: skip
    return section


def aspect_ratio(boxes: np.ndarray) -> np.ndarray:
    """Width by height, (n,), within what the histogram shows."""
    width, height = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-3).T
    return np.clip(width / height, 1 / RATIO_END, RATIO_END)


def relative_size(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Square root of the area by that of the image, (n,)."""
    sides = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None)
    return np.sqrt(sides.prod(axis=1) / (width * height))
