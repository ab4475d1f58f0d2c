"""Where the centres of predicted boxes lie, for each way of starting (after AlignDet, arXiv 2307.11077, Figure 3).

Two pictures: points on photos, as in the paper, and the density over all images in coordinates relative to each. And
two numbers of it: how many centres lie inside an object, and how many would if they were spread evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from headstart.datasets.detection import DetectionData
from headstart.errors import ImageError
from headstart.tide import DETECTIONS
from headstart.verbs.report import pictures, words
from headstart.verbs.report.detections import Found, Kept, photos_to_show
from headstart.verbs.report.figures import Look
from headstart.verbs.report.parts import Looks, Pictures

CELLS = 16  # of the density, along each side
SHADES = 6
SAMPLES = 32  # points along each side of an image, to measure the share that objects cover
PHOTOS = 4
OUTLINE = "#ffffff"  # of objects, on photos


@dataclass(frozen=True)
class Panel:
    """A density: squares of ``CELLS`` by ``CELLS``; ``shades`` has (opacity, path) pairs. None: the ground truth's."""

    label: str
    look: Look | None
    shades: list[tuple[float, str]]
    alt: str


@dataclass(frozen=True)
class Row:
    label: str
    look: Look | None
    an_image: str  # boxes
    inside: str  # %, of all of them
    inside_surest: str  # %, of the n surest of an image with n objects
    middle: str  # %, in the middle ninth of the image


@dataclass
class Centres:
    """Of one label budget."""

    title: str
    panels: list[Panel]
    rows: list[Row]
    photos: list[tuple[str, list[pictures.Picture]]]


@dataclass
class Section:
    blocks: list[Centres] = field(default_factory=list)
    covered: str = ""  # %, of the images, by objects
    aspect: float = 1.0  # width by height, in the middle of the images


def centres(kept: Kept, looks: Looks, photos: Pictures, images: int) -> Section:
    """At most ``images`` photos with points; the densities are of all images."""
    section = Section()
    data = kept.data
    if data is None or not kept.found:
        return section
    sizes = np.array([(image.width, image.height) for image in data.images], np.float64)
    truth = _relative_truth(data, sizes)
    section.aspect = round(float(np.median(sizes[:, 0] / sizes[:, 1])), 3)
    section.covered = words.percent(covered_share(truth))
    candidates = photos_to_show(data)
    chosen = [candidates[i] for i in pictures.evenly_spaced(len(candidates), min(images, PHOTOS))]
    objects = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in truth])
    for title, here in kept.by_budget():
        panels = [_panel("ground truth", None, objects)]
        rows = [Row("ground truth", None, f"{len(objects) / len(truth):.1f}", "–", "–", _middle(objects))]
        for found in here:
            look = looks.looks[found.group.key.start]
            points, row = _measure(found, look, sizes, truth)
            panels.append(_panel(found.label, look, points))
            rows.append(row)
        section.blocks.append(Centres(title, panels, rows, _on_photos(data, chosen, here, photos)))
    return section


def _relative_truth(data: DetectionData, sizes: np.ndarray) -> list[np.ndarray]:
    """(objects, 4) xyxy of each image, in 0..1 of its size."""
    pairs = zip(data.annotations, sizes, strict=True)
    return [np.asarray(a.boxes, np.float64).reshape(-1, 4) / np.tile(size, 2) for a, size in pairs]


def _measure(found: Found, look: Look, sizes: np.ndarray, truth: Sequence[np.ndarray]) -> tuple[np.ndarray, Row]:
    """Centres (n, 2) in 0..1 of the image, of up to 100 boxes an image; and what they add up to."""
    parts, inside, surest = [np.zeros((0, 2))], [np.zeros(0, bool)], [np.zeros(0, bool)]
    for i, objects in enumerate(truth):
        boxes = found.boxes[found.of(i)][:DETECTIONS]
        points = (boxes[:, :2] + boxes[:, 2:]) / 2 / sizes[i]
        parts.append(points)
        inside.append(within(points, objects))
        surest.append(np.arange(len(points)) < len(objects))
    points, hits, first = np.concatenate(parts), np.concatenate(inside), np.concatenate(surest)
    share = lambda flags: words.percent(float(flags.mean())) if len(flags) else "–"
    row = Row(
        label=found.label,
        look=look,
        an_image=f"{len(points) / len(truth):.1f}",
        inside=share(hits),
        inside_surest=share(hits[first]),
        middle=_middle(points),
    )
    return points, row


def within(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n,) bool: which points (n, 2) lie in one of the boxes (m, 4) xyxy."""
    low, high = boxes[None, :, :2], boxes[None, :, 2:]
    inside = (points[:, None] >= low) & (points[:, None] <= high)  # (n, m, 2)
    return np.logical_or.reduce(np.logical_and.reduce(inside, axis=2), axis=1)


def covered_share(truth: Sequence[np.ndarray]) -> float:
    """Mean share of an image that its objects cover, ``truth`` relative to it; at ``SAMPLES`` squared points."""
    at = (np.arange(SAMPLES) + 0.5) / SAMPLES
    grid = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)
    return float(np.mean([within(grid, boxes).mean() for boxes in truth]))


def _middle(points: np.ndarray) -> str:
    return words.percent(float((np.abs(points - 0.5) <= 1 / 6).all(axis=1).mean())) if len(points) else "–"


def _panel(label: str, look: Look | None, points: np.ndarray) -> Panel:
    described = f"{label}: centres of {words.plural(len(points), 'box')}"
    if len(points):
        (x, y), (dx, dy) = 100 * points.mean(axis=0), 100 * points.std(axis=0)
        described += (
            f", on average at {x:.0f} % of the width and {y:.0f} % of the height, with a standard deviation of "
            f"{dx:.0f} % and {dy:.0f} %; {_middle(points)} % in the middle ninth of the image"
        )
    return Panel(label, look, shades(points), described)


def shades(points: np.ndarray) -> list[tuple[float, str]]:
    """Cells as paths, by how full they are beside the fullest: a path a shade, the lightest first."""
    places = np.clip((points * CELLS).astype(int), 0, CELLS - 1)
    counts = np.zeros((CELLS, CELLS), int)
    np.add.at(counts, (places[:, 1], places[:, 0]), 1)
    level = np.ceil(SHADES * counts / max(1, counts.max())).astype(int)
    paths = []
    for shade in range(1, SHADES + 1):
        cells = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(level == shade))
        if cells:
            paths.append((round(shade / SHADES, 2), cells))
    return paths


def _on_photos(
    data: DetectionData, chosen: Sequence[int], here: Sequence[Found], photos: Pictures
) -> list[tuple[str, list[pictures.Picture]]]:
    """The outlines of the objects, and points for the centres of the boxes."""
    rows = []
    for i in chosen:
        record = data.images[i]
        try:
            thumb = photos.get(record.path, record.width)
        except ImageError:  # which the gallery, of the same photos, has named
            continue
        objects = np.asarray(data.annotations[i].boxes, np.float64).reshape(-1, 4)
        outlines = pictures.marks(thumb, objects, [(OUTLINE, "")] * len(objects), [""] * len(objects))
        row = []
        for found in here:
            boxes = found.boxes[found.of(i)][:DETECTIONS]
            points = (boxes[:, :2] + boxes[:, 2:]) / 2
            inside = int(within(points, objects).sum())
            remark = f"{inside} of {len(points)} centres inside an object"
            row.append(
                pictures.Picture(
                    thumb,
                    outlines,
                    f"{found.label} · {remark}",
                    f"{record.file_name}: {found.label}, {remark}",
                    crowded=False,
                    dots=pictures.dots(thumb, points),
                )
            )
        rows.append((record.file_name, row))
    return rows
