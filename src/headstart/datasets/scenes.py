"""Scenes: a generated detection data set for the demo and the tests, so that both run without a download.

Six kinds of objects are told apart by their shape, and by a texture and a family of colours that most objects of
a class share, though neighbouring families overlap; size, angle and proportions say nothing about the class. They
lie on grounds of one muted family, as under a camera in a workshop, each with another texture, among clutter that has
no label; they overlap, and leave the image at its edges. Every object differs in colour from what is under it, so it
is a segment that Selective Search can find; naming it takes more.

Image ``i`` of a split depends on (seed, split, i) and the size alone: asking for more images leaves the first
ones as they were.
"""

from __future__ import annotations

import colorsys
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.table import Column, Table

from headstart.console import progress as progress_bar
from headstart.errors import RunError, SettingsError
from headstart.files import clear_leftovers, replacing, write_json
from headstart.masks import encode

CLASSES = ("disc", "square", "triangle", "star", "ring", "cross")
SPLITS = ("unlabelled", "train", "val")  # the place in this tuple seeds the split: append only
MIN_SIZE_PX = 48
MIN_VISIBLE = 0.4
OBJECT_SCALE = (0.22, 0.5)  # of the image's side
TYPICAL_TEXTURE = 0.9  # share of the objects that wear their class's texture; the others wear any
TYPICAL_COLOUR = 0.9  # share of the objects whose colour is of their class's family; the others have any
HUE_SPREAD = 0.04  # standard deviation of a family's hue, of a full turn; families are 1/6 apart
MARKER = "scenes.json"

_OVERSAMPLING = 3
_MIN_COLOUR_DISTANCE = 75.0  # Euclidean in RGB 0..255, between an object and the mean of what it covers


@dataclass(frozen=True)
class Scene:
    """One image and what is on it; an object hides those before it in the list."""

    image: np.ndarray  # (S, S, 3) uint8 RGB
    labels: np.ndarray  # (n,) int64, 1..len(CLASSES)
    masks: np.ndarray  # (n, S, S) uint8, what is visible of each object
    jpeg_quality: int


@dataclass(frozen=True)
class ScenesSummary:
    path: Path
    images: dict[str, int]  # split -> number of images
    objects: dict[str, dict[str, int]]  # labelled split -> class -> number of objects
    seconds: float

    def table(self) -> Table:
        table = Table(Column("split", no_wrap=True), "images", "objects", *CLASSES, title=f"Scenes in {self.path}")
        for split, count in self.images.items():
            by_class = self.objects.get(split)
            cells = [str(by_class[name]) for name in CLASSES] if by_class else ["-"] * len(CLASSES)
            table.add_row(split, str(count), str(sum(by_class.values())) if by_class else "-", *cells)
        return table


def make_scenes(
    out: Path | str,
    *,
    unlabelled: int = 1000,
    train: int = 64,
    val: int = 200,
    size_px: int = 96,
    seed: int = 0,
    progress: bool = True,
) -> ScenesSummary:
    """Generate a data set of square images.

    Writes ``out/unlabelled/*.jpg``; ``out/train/images`` and ``out/val/images`` with ``out/train.json`` and
    ``out/val.json`` in COCO's format (boxes, and masks as RLE, of the visible part). A split of zero images
    is not written. Each split appears as a whole or not at all; scenes of an earlier call are replaced.

    Args:
        unlabelled, train, val: number of images of each split.
        size_px: side of the images.
        seed: other seeds give other images.
        progress: show a progress bar.

    Raises:
        SettingsError: a number of images is negative, or ``size_px`` is below ``MIN_SIZE_PX``.
        RunError: ``out`` holds files of these names that this function did not write, or can't be written.
    """
    out = Path(out)
    counts = {"unlabelled": unlabelled, "train": train, "val": val}
    for split, count in counts.items():
        if count < 0:
            raise SettingsError(f"{split}={count}: expected a number of images, 0 or more")
    if size_px < MIN_SIZE_PX:
        raise SettingsError(f"size_px={size_px}: expected at least {MIN_SIZE_PX} pixels")
    if seed < 0:
        raise SettingsError(f"seed={seed}: expected 0 or more")
    _claim(out)

    start = time.monotonic()
    settings = {"seed": seed, "size_px": size_px, "images": counts}
    write_json(out / MARKER, {**settings, "finished": False})
    objects: dict[str, dict[str, int]] = {}
    with progress_bar("scenes", sum(counts.values()), show=progress) as bar:
        for split, count in counts.items():
            if count == 0:
                shutil.rmtree(out / split, ignore_errors=True)
                (out / f"{split}.json").unlink(missing_ok=True)
                continue
            labelled = split != "unlabelled"
            records: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            with replacing(out / split) as folder:
                (images := folder / "images" if labelled else folder).mkdir(parents=True)
                for i in range(count):
                    scene = draw_scene(split, i, size_px=size_px, seed=seed)
                    name = f"{split}_{i:06d}.jpg"
                    (images / name).write_bytes(_jpeg(scene))
                    records.append({"id": i + 1, "file_name": name, "width": size_px, "height": size_px})
                    if labelled:
                        annotations += _annotations(scene, i + 1, len(annotations) + 1)
                    bar.advance()
            if labelled:
                write_json(out / f"{split}.json", _coco(split, seed, records, annotations))
                labels = [a["category_id"] for a in annotations]
                objects[split] = {name: labels.count(k + 1) for k, name in enumerate(CLASSES)}
    write_json(out / MARKER, {**settings, "finished": True})
    return ScenesSummary(out, counts, objects, time.monotonic() - start)


def draw_scene(split: str, index: int, *, size_px: int = 96, seed: int = 0) -> Scene:
    """Image ``index`` of ``split``, before JPEG compression."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    canvas = _background(rng, size_px)
    for _ in range(rng.integers(0, 5)):
        _paint(canvas, _clutter(rng, size_px), rng)

    labels: list[int] = []
    visible: list[np.ndarray] = []  # (S, S) float32 each, 0..1
    areas: list[float] = []  # of the whole shape, hidden parts and parts outside the image included
    for _ in range(rng.integers(1, 6)):
        least = MIN_VISIBLE if rng.uniform() < 0.5 else 0.75  # half of them keep to themselves
        for _attempt in range(8):
            label = int(rng.integers(len(CLASSES)))
            shape = _object(rng, size_px, label)
            cover = _full(shape, size_px)
            after = [v * (1 - cover) for v in visible] + [cover]
            whole = areas + [float(shape.alpha.sum())]
            if all(v.sum() >= least * a for v, a in zip(after, whole, strict=True)):
                typical = rng.uniform() < TYPICAL_TEXTURE
                pattern = _TEXTURES[CLASSES[label]] if typical else None
                own_colour = rng.uniform() < TYPICAL_COLOUR
                hue = label / len(CLASSES) if own_colour else None
                _paint(canvas, shape, rng, pattern, _MIN_COLOUR_DISTANCE, hue)
                labels, visible, areas = labels + [label + 1], after, whole
                break
    for _ in range(rng.integers(0, 2)):  # and some clutter in front
        shape = _clutter(rng, size_px, largest=0.1)
        after = [v * (1 - _full(shape, size_px)) for v in visible]
        if all(v.sum() >= MIN_VISIBLE * a for v, a in zip(after, areas, strict=True)):
            _paint(canvas, shape, rng)
            visible = after

    masks = np.array([v >= 0.5 for v in visible], np.uint8).reshape(-1, size_px, size_px)
    return Scene(_camera(canvas, rng), np.array(labels, np.int64), masks, int(rng.integers(72, 95)))


# ---- shapes ----------------------------------------------------------------------------------------------
# A shape is a list of contours inside the unit circle; where two contours overlap there is a hole.

Contours = list[np.ndarray]


def _polar(angles: np.ndarray, radii: np.ndarray | float) -> np.ndarray:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _circle(radius: float = 1.0) -> np.ndarray:
    return _polar(np.linspace(0, 2 * np.pi, 48, endpoint=False), radius)


def _regular(corners: int) -> np.ndarray:
    return _polar(np.arange(corners) * 2 * np.pi / corners, 1.0)


def _star(rng: np.random.Generator) -> Contours:
    radii = np.tile([1.0, rng.uniform(0.38, 0.5)], 5)
    return [_polar(np.arange(10) * np.pi / 5, radii)]


def _cross(rng: np.random.Generator) -> Contours:
    arm = rng.uniform(0.26, 0.38)
    corner = np.array([[1, -arm], [1, arm], [arm, arm]])
    turns = [np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in np.arange(4) * np.pi / 2]
    return [np.concatenate([corner @ turn.T for turn in turns]) / np.hypot(1, arm)]


_SHAPES: dict[str, Callable[[np.random.Generator], Contours]] = {
    "disc": lambda rng: [_circle()],
    "square": lambda rng: [_regular(4)],
    "triangle": lambda rng: [_regular(3)],
    "star": _star,
    "ring": lambda rng: [_circle(), _circle(rng.uniform(0.45, 0.62))],
    "cross": _cross,
}


def _blob(rng: np.random.Generator) -> Contours:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radii = 1 + sum(rng.uniform(0, 0.3) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4))
    return [_polar(angles, radii / np.max(radii))]


def _bar(rng: np.random.Generator) -> Contours:
    half = rng.uniform(0.06, 0.2)
    return [np.array([[-1, -half], [1, -half], [1, half], [-1, half]]) * 0.98]


def _crescent(rng: np.random.Generator) -> Contours:
    angles = np.linspace(0.3 * np.pi, 1.7 * np.pi, 24)
    inner = _polar(angles[::-1], rng.uniform(0.5, 0.75)) + [0.25, 0]
    return [np.concatenate([_polar(angles, 1.0), inner])]


def _squiggle(rng: np.random.Generator) -> Contours:
    x = np.linspace(-1, 1, 24)
    y = rng.uniform(0.15, 0.35) * np.sin(x * rng.uniform(3, 7) + rng.uniform(0, 2 * np.pi))
    half = rng.uniform(0.05, 0.1)
    line = np.concatenate([np.stack([x, y - half], 1), np.stack([x, y + half], 1)[::-1]])
    return [line / np.hypot(*line.T).max()]


_CLUTTER = (_blob, _bar, _crescent, _squiggle)


@dataclass(frozen=True)
class _Shape:
    left: int
    top: int
    alpha: np.ndarray  # (h, w) float32 coverage 0..1; the patch may reach over the image's edge
    radius_px: float


def _object(rng: np.random.Generator, size_px: int, label: int) -> _Shape:
    # Uniform in area: most objects are large enough to be proposals of the papers' filter, some are not.
    low, high = OBJECT_SCALE
    radius_px = np.sqrt(rng.uniform(low**2, high**2)) * size_px / 2
    return _rasterise(_SHAPES[CLASSES[label]](rng), radius_px, rng, size_px, inside=0.12)


def _clutter(rng: np.random.Generator, size_px: int, largest: float = 0.16) -> _Shape:
    radius_px = rng.uniform(0.04, largest) * size_px / 2 + 1
    return _rasterise(_CLUTTER[rng.integers(len(_CLUTTER))](rng), radius_px, rng, size_px, inside=-0.05)


def _rasterise(contours: Contours, radius_px: float, rng: np.random.Generator, size_px: int, inside: float) -> _Shape:
    """Stretch, turn and place; coverage by drawing at three times the size."""
    stretch = np.exp(rng.uniform(-0.2, 0.2) * np.array([1, -1]) / 2)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    centre = rng.uniform(inside, 1 - inside, 2) * size_px
    margin = int(1.15 * radius_px) + 4
    left, top = np.floor(centre).astype(int) - margin
    side = 2 * margin + 1
    large = np.zeros((side * _OVERSAMPLING, side * _OVERSAMPLING), np.uint8)
    offset = centre - [left, top]
    points = [
        np.round(((c * stretch) @ rotation.T * radius_px + offset) * _OVERSAMPLING * 16).astype(np.int32)
        for c in contours
    ]
    cv2.fillPoly(large, points, 255, lineType=cv2.LINE_8, shift=4)
    alpha = cv2.resize(large, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return _Shape(int(left), int(top), alpha, radius_px)


def _windows(shape: _Shape, size_px: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the patch lies on the image, and which part of the patch that is."""
    bottom, right = shape.top + shape.alpha.shape[0], shape.left + shape.alpha.shape[1]
    y0, x0, y1, x1 = max(shape.top, 0), max(shape.left, 0), min(bottom, size_px), min(right, size_px)
    on_image = slice(y0, max(y0, y1)), slice(x0, max(x0, x1))
    rows, columns = on_image
    on_patch = (
        slice(rows.start - shape.top, rows.stop - shape.top),
        slice(columns.start - shape.left, columns.stop - shape.left),
    )
    return on_image, on_patch


def _full(shape: _Shape, size_px: int) -> np.ndarray:
    on_image, on_patch = _windows(shape, size_px)
    full = np.zeros((size_px, size_px), np.float32)
    full[on_image] = shape.alpha[on_patch]
    return full


# ---- paint -----------------------------------------------------------------------------------------------


# (side of the patch in pixels, period in pixels, rng) -> (side, side) mixture 0..1 of two colours
_Pattern = Callable[[int, float, np.random.Generator], np.ndarray]


def _paint(
    canvas: np.ndarray,
    shape: _Shape,
    rng: np.random.Generator,
    pattern: _Pattern | None = None,
    min_distance: float = 30.0,
    hue: float | None = None,
) -> None:
    """Draw a textured shape and its soft shadow onto ``canvas`` (S, S, 3) float32 RGB 0..255, in place."""
    on_image, on_patch = _windows(shape, canvas.shape[0])
    alpha = shape.alpha[on_patch][:, :, None]
    covered = alpha.sum()
    if covered < 1:
        return
    under = (canvas[on_image] * alpha).sum((0, 1)) / covered
    colours = _two_colours(under, min_distance, hue, rng)
    period_px = rng.uniform(0.3, 0.8) * shape.radius_px + 2.5
    if pattern is None:
        pattern = list(_TEXTURES.values())[rng.integers(len(_TEXTURES))]
    mix = pattern(shape.alpha.shape[0], period_px, rng)[on_patch][:, :, None]
    fill = colours[0] * (1 - mix) + colours[1] * mix
    fill *= 1 + rng.uniform(0, 0.25) * _ramp(shape.alpha.shape[0], rng)[on_patch][:, :, None]

    drop = max(1, round(0.08 * shape.radius_px))
    shadow = cv2.GaussianBlur(np.roll(shape.alpha, (drop, drop), (0, 1)), (0, 0), 0.5 + 0.05 * shape.radius_px)
    canvas[on_image] *= 1 - 0.45 * shadow[on_patch][:, :, None]
    canvas[on_image] += alpha * (fill - canvas[on_image])


def _colour(
    rng: np.random.Generator,
    saturation: tuple[float, float],
    value: tuple[float, float],
    family: float | None = None,
) -> np.ndarray:
    """A colour of any hue, or of a ``family``: hues, in turns, around that one."""
    hue = rng.uniform() if family is None else rng.normal(family, HUE_SPREAD) % 1
    hsv = hue, rng.uniform(*saturation), rng.uniform(*value)
    return np.array(colorsys.hsv_to_rgb(*hsv), np.float32) * 255


def _two_colours(
    under: np.ndarray, min_distance: float, hue: float | None, rng: np.random.Generator
) -> list[np.ndarray]:
    """A colour that stands out from ``under`` and a relative of it for the texture."""
    candidates = [_colour(rng, (0.35, 0.95), (0.3, 1.0), hue) for _ in range(8)]
    distances = [float(np.linalg.norm(c - under)) for c in candidates]
    far = [c for c, d in zip(candidates, distances, strict=True) if d >= min_distance]
    first = far[0] if far else candidates[int(np.argmax(distances))]
    # For the texture the darker or the lighter relative, whichever stands out more from what is under it: a
    # texture must not dissolve the object's outline.
    amount = np.float32(rng.uniform(0.4, 0.75))
    relatives = [first * (1 - amount), first + (255 - first) * amount]
    second = max(relatives, key=lambda c: float(np.linalg.norm(c - under)))
    return [first, np.clip(second + rng.uniform(-40, 40, 3), 0, 255).astype(np.float32)]


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(size, dtype=np.float32)
    return axis[None, :], axis[:, None]


def _waves(size: int, period_px: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two sinusoids at right angles to each other, -1..1."""
    x, y = _grid(size)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    k = 2 * np.pi / period_px
    c, s = np.float32(np.cos(angle) * k), np.float32(np.sin(angle) * k)
    return np.sin(c * x + s * y + np.float32(phase[0])), np.sin(c * y - s * x + np.float32(phase[1]))


def _soft_step(wave: np.ndarray, hardness: float = 2.5) -> np.ndarray:
    return np.clip(0.5 + hardness * wave / 2, 0, 1)


def _stripes(size: int, period_px: float, rng: np.random.Generator) -> np.ndarray:
    return _soft_step(_waves(size, period_px, rng)[0])


def _checks(size: int, period_px: float, rng: np.random.Generator) -> np.ndarray:
    u, v = _waves(size, 1.4 * period_px, rng)
    return _soft_step(u * v, 4)


def _dots(size: int, period_px: float, rng: np.random.Generator) -> np.ndarray:
    u, v = _waves(size, period_px, rng)
    return _soft_step(u + v - 0.7)


def _blotches(size: int, period_px: float, rng: np.random.Generator) -> np.ndarray:
    return _soft_step(_smooth_noise(size, max(3, int(size / period_px * 1.5)), rng) - 0.5, 6)


def _ramp(size: int, rng: np.random.Generator) -> np.ndarray:
    """-1..1 across the patch in a random direction."""
    x, y = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    half = np.float32(size / 2)
    return np.float32(np.cos(angle)) * (x / half - 1) + np.float32(np.sin(angle)) * (y / half - 1)


def _plain(size: int, period_px: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(0.5 + 0.5 * _ramp(size, rng), 0, 1)


def _chevrons(size: int, period_px: float, rng: np.random.Generator) -> np.ndarray:
    x, y = _grid(size)
    if rng.uniform() < 0.5:
        x, y = y, x
    zigzag = np.abs((y / np.float32(1.5 * period_px) + np.float32(rng.uniform())) % 1 - 0.5) * 4
    return _soft_step(np.sin(2 * np.pi * x / np.float32(period_px) + np.float32(np.pi / 2) * zigzag))


_TEXTURES: dict[str, _Pattern] = {
    "disc": _dots,
    "square": _checks,
    "triangle": _stripes,
    "star": _plain,
    "ring": _blotches,
    "cross": _chevrons,
}


def _smooth_noise(size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """0..1, varying over size/cells pixels."""
    coarse = rng.random((cells + 1, cells + 1), dtype=np.float32)
    return np.clip(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)


# ---- background and camera -------------------------------------------------------------------------------


def _background(rng: np.random.Generator, size_px: int) -> np.ndarray:
    """(S, S, 3) float32: noise, a gradient, stripes or patches in muted colours, with some grain."""
    a, b = (_colour(rng, (0.05, 0.2), (0.35, 0.7)) for _ in range(2))
    b = a + (b - a) * np.float32(rng.uniform(0.3, 0.7))
    kind = rng.integers(4)
    if kind == 0:
        octaves = [_smooth_noise(size_px, cells, rng) for cells in (3, 6, 12, 24)]
        mix = np.average(octaves, axis=0, weights=[1, 0.6, 0.36, 0.22])
    elif kind == 1:
        mix = _plain(size_px, 0, rng) + 0.3 * (_smooth_noise(size_px, 8, rng) - 0.5)
    elif kind == 2:
        mix = 0.7 * _stripes(size_px, rng.uniform(0.08, 0.35) * size_px, rng)
    else:
        seeds = rng.uniform(0, size_px, (rng.integers(4, 9), 2)).astype(np.float32)
        x, y = _grid(size_px)
        distances = [(x - sx) ** 2 + (y - sy) ** 2 for sx, sy in seeds]
        shades = rng.random(len(seeds), dtype=np.float32)
        mix = cv2.GaussianBlur(shades[np.argmin(distances, axis=0)], (0, 0), 0.7)
    mix = mix + 0.15 * (_smooth_noise(size_px, size_px // 3, rng) - 0.5)
    return a + (b - a) * mix[:, :, None].astype(np.float32)


def _camera(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven light, slight blur, sensor noise."""
    canvas = canvas * (1 + rng.uniform(0, 0.15) * _ramp(canvas.shape[0], rng)[:, :, None])
    if rng.uniform() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.8))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(np.round(canvas + rng.uniform(1, 5) * noise), 0, 255).astype(np.uint8)


# ---- files -----------------------------------------------------------------------------------------------


def _claim(out: Path) -> None:
    """Never replace what somebody else put there."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; expected a folder to write scenes into")
    ours = [name for split in SPLITS for name in (split, f"{split}.json") if (out / name).exists()]
    if ours and not (out / MARKER).exists():
        raise RunError(f"{out}: already holds {', '.join(ours)}, not written by scenes; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out)


def _jpeg(scene: Scene) -> bytes:
    bgr = np.ascontiguousarray(scene.image[:, :, ::-1])
    done, buffer = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, scene.jpeg_quality])
    assert done
    return buffer.tobytes()


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    annotations = []
    for k, (label, mask) in enumerate(zip(scene.labels, scene.masks, strict=True)):
        x, y, width, height = (int(v) for v in cv2.boundingRect(mask))
        annotations.append(
            {
                "id": first_id + k,
                "image_id": image_id,
                "category_id": int(label),
                "bbox": [x, y, width, height],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": encode(mask),
            }
        )
    return annotations


def _coco(split: str, seed: int, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    categories = [{"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(CLASSES)]
    info = {"description": f"Headstart scenes, {split}, seed {seed}"}
    return {"info": info, "categories": categories, "images": images, "annotations": annotations}
