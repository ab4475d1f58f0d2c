"""Selective Search step by step, plain and slow, for the tests to compare with: each step does what its rule says.

Felzenszwalb and Huttenlocher's segmentation follows scikit-image's, down to the last bit, with a stable sort.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "grace_hopper.jpg")


def library_photo(name: str, long_side: int) -> np.ndarray:
    """A photograph that comes with scikit-image or Matplotlib, made smaller: (H, W, 3) uint8."""
    if name == "grace_hopper.jpg":
        import matplotlib.cbook

        path = Path(matplotlib.cbook.get_sample_data(name, asfileobj=False))
    else:
        path = Path(pytest.importorskip("skimage").__file__).parent / "data" / name
    image = Image.open(path).convert("RGB")
    image.thumbnail((long_side, long_side), Image.BICUBIC)
    return np.asarray(image)


def drawing(height: int, width: int, seed: int, colours: int = 5, shapes: int = 12) -> np.ndarray:
    """Flat rectangles of a few colours, which make many edges exactly equal: (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (colours, 3), dtype=np.uint8)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = palette[0]
    for _ in range(shapes):
        (y1, y2), (x1, x2) = sorted(rng.integers(0, height + 1, 2)), sorted(rng.integers(0, width + 1, 2))
        image[y1:y2, x1:x2] = palette[rng.integers(colours)]
    return image


# Segmentation


def gaussian(sigma: float) -> np.ndarray:
    """Weights from the centre to 4 sigma, rounded."""
    if sigma == 0:
        return np.ones(1)
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
    return weights[radius:] / weights.sum()


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W, 3) uint8 -> float64 of 0..1: down the columns, then along the rows, the image mirrored at its sides."""
    weights = gaussian(sigma)
    radius = len(weights) - 1
    image = image * (1 / 255)
    for axis in (0, 1):
        size = image.shape[axis]
        wide = np.moveaxis(
            np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in range(3)], "symmetric"), axis, 0
        )
        out = wide[radius : radius + size] * weights[0]
        for k in range(radius, 0, -1):
            out = out + (wide[radius - k :][:size] + wide[radius + k :][:size]) * weights[k]
        image = np.moveaxis(out, 0, axis)
    return image


def edges(blurred: np.ndarray) -> list[tuple[float, int, int]]:
    """(cost, pixel, pixel) of all neighbours: right, down, down-right, down-left; pixels counted row by row."""
    height, width, _ = blurred.shape
    place = np.arange(height * width).reshape(height, width)
    found = []
    for here, there in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:-1, :-1], np.s_[1:, 1:]),
        (np.s_[:-1, 1:], np.s_[1:, :-1]),
    ):
        r, g, b = np.moveaxis(blurred[there] - blurred[here], -1, 0)
        costs = np.sqrt(r * r + g * g + b * b)
        found += zip(costs.ravel().tolist(), place[here].ravel().tolist(), place[there].ravel().tolist(), strict=True)
    return found


def segment(image: np.ndarray, scale: float, sigma: float, min_size: int) -> np.ndarray:
    """(H, W) segments, numbered in the order of their first pixels."""
    height, width, _ = image.shape
    scale = scale / 255
    queue = sorted(edges(blur(image, sigma)), key=lambda edge: edge[0])  # stable
    parent = list(range(height * width))
    size = [1] * (height * width)
    inner = [0.0] * (height * width)

    def root(p: int) -> int:
        while parent[p] != p:
            parent[p] = p = parent[parent[p]]
        return p

    def threshold(p: int) -> float:
        with np.errstate(over="ignore"):
            return float(np.float32(inner[p] + scale / size[p]))

    for small_ones in (False, True):
        for cost, u, v in queue:
            a, b = root(u), root(v)
            if a == b:
                continue
            if small_ones and size[a] >= min_size and size[b] >= min_size:
                continue
            if not small_ones and cost >= min(threshold(a), threshold(b)):
                continue
            a, b = min(a, b), max(a, b)
            parent[b] = a  # the root is the first pixel
            size[a] += size[b]
            inner[a] = cost
    roots = np.array([root(p) for p in range(height * width)])
    return np.unique(roots, return_inverse=True)[1].reshape(height, width)


# What segments look like


def hsv_bins(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> 25 bins of hue (0 <= h < 1), saturation (0 <= s <= 1) and value (0..255), in integers."""
    r, g, b = np.moveaxis(rgb.astype(np.int64), -1, 0)
    top = np.maximum(np.maximum(r, g), b)
    span = top - np.minimum(np.minimum(r, g), b)
    turn = np.where(top == r, g - b, np.where(top == g, b - r + 2 * span, r - g + 4 * span))
    hue = 25 * (turn % np.maximum(6 * span, 1)) // np.maximum(6 * span, 1)
    saturation = np.minimum(25 * span // np.maximum(top, 1), 24)
    return np.stack([hue, saturation, np.minimum(25 * top // 255, 24)], -1)


def patterns(plane: np.ndarray, ambiguous: bool = False) -> np.ndarray:
    """Local binary patterns (H, W) of one channel, 8 neighbours on a circle of radius 1; outside is 0.

    The circle's corners lie at 0.70711, where four pixels mix; times 10**10 all numbers are integers.

    Args:
        ambiguous: return instead where a corner equals the centre exactly.
    """
    plane = np.pad(plane.astype(np.int64), 1)
    height, width = plane.shape[0] - 2, plane.shape[1] - 2

    def at(dy: int, dx: int) -> np.ndarray:
        return plane[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    far, near = 70711, 100000 - 70711
    codes, equal = np.zeros((height, width), np.int64), np.zeros((height, width), bool)
    around = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)]  # from the right, counter-clockwise
    for bit, (dy, dx) in enumerate(around):
        if dy and dx:
            value = near * near * at(0, 0) + near * far * (at(dy, 0) + at(0, dx)) + far * far * at(dy, dx)
            equal |= value == 10**10 * at(0, 0)
        else:
            value = 10**10 * at(dy, dx)
        codes |= (value >= 10**10 * at(0, 0)).astype(np.int64) << bit
    return equal if ambiguous else codes


def histograms(labels: np.ndarray, planes: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """(n, B): for each segment the shares of its pixels in the bins of every plane, given with its number of bins."""
    rows = []
    for label in range(labels.max() + 1):
        inside = labels == label
        counts = [np.bincount(plane[inside], minlength=n_bins) for plane, n_bins in planes]
        rows.append(np.concatenate(counts) / inside.sum())
    return np.array(rows)


def sizes_and_boxes(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) px and (n, 4) first and last column and row: x1, y1, x2, y2."""
    sizes, boxes = [], []
    for label in range(labels.max() + 1):
        y, x = np.nonzero(labels == label)
        sizes.append(len(y))
        boxes.append((x.min(), y.min(), x.max(), y.max()))
    return np.array(sizes), np.array(boxes)


# Neighbours


def overlapping(boxes: np.ndarray) -> list[tuple[int, int]]:
    """Pairs a < b where one of the four corners of b's box lies strictly inside a's."""
    pairs = []
    for a, (left, top, right, bottom) in enumerate(boxes.tolist()):
        for b in range(a + 1, len(boxes)):
            x1, y1, x2, y2 = boxes[b].tolist()
            if any(left < x < right and top < y < bottom for x in (x1, x2) for y in (y1, y2)):
                pairs.append((a, b))
    return pairs


def adjacent(labels: np.ndarray) -> list[tuple[int, int]]:
    """Pairs a < b of segments with pixels that touch, corners included; in rising order."""
    height, width = labels.shape
    pairs = set()
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1)):
                if y + dy < height and 0 <= x + dx < width and labels[y, x] != labels[y + dy, x + dx]:
                    pairs.add(tuple(sorted((int(labels[y, x]), int(labels[y + dy, x + dx])))))
    return sorted(pairs)


# Grouping


def group(
    pairs: list[tuple[int, int]],
    histograms: np.ndarray,
    n_colour: int,
    sure: float,
    sizes: np.ndarray,
    boxes: np.ndarray,
    pixels: int,
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
) -> tuple[list[np.ndarray], list[int], list[list[int]]]:
    """Histograms, sizes and boxes of all regions: the segments, then what is merged, first to last.

    The pair with the highest similarity is merged, of equal ones the youngest; a new region gets the neighbours of
    the two it is made of, in the order in which their pairs came to be.
    """
    looks, areas, places = list(histograms), sizes.tolist(), boxes.tolist()

    def similarity(a: int, b: int) -> float:
        common = np.minimum(looks[a], looks[b]).tolist()
        colour, texture = sure, 0.0
        for share in common[:n_colour]:
            colour += share
        for share in common[n_colour:]:
            texture += share
        width = max(places[a][2], places[b][2]) - min(places[a][0], places[b][0])
        height = max(places[a][3], places[b][3]) - min(places[a][1], places[b][1])
        size = 1 - (areas[a] + areas[b]) / pixels
        fill = 1 - (width * height - areas[a] - areas[b]) / pixels
        return weights[0] * colour + weights[1] * texture + weights[2] * size + weights[3] * fill

    similar = {(a, b): similarity(a, b) for a, b in pairs}  # keeps the order of its keys
    while similar:
        highest = max(similar.values())
        a, b = [pair for pair, value in similar.items() if value == highest][-1]
        new = len(looks)
        looks.append((looks[a] * areas[a] + looks[b] * areas[b]) / (areas[a] + areas[b]))
        areas.append(areas[a] + areas[b])
        first, last = np.minimum(places[a], places[b]), np.maximum(places[a], places[b])
        places.append([*first[:2].tolist(), *last[2:].tolist()])
        old = [pair for pair in similar if a in pair or b in pair]
        for pair in old:
            del similar[pair]
        for one, other in old:
            if {one, other} != {a, b}:
                neighbour = other if one in (a, b) else one
                if (new, neighbour) not in similar:
                    similar[new, neighbour] = similarity(new, neighbour)
    return looks, areas, places


# All together


def grouped_boxes(
    image: np.ndarray, labels: np.ndarray, bins: np.ndarray, weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
) -> list[tuple[int, ...]]:
    """Boxes x1, y1, x2, y2 of one grouping, the region merged last first; ``bins``: (H, W, 3), 25 of each channel.

    Args:
        image: (H, W, 3) uint8 whose texture counts.
    """
    planes = [(bins[..., channel], 25) for channel in range(3)]
    planes += [(patterns(image[..., channel]) * 10 // 256, 10) for channel in range(3)]
    sizes, boxes = sizes_and_boxes(labels)
    boxes = boxes + (0, 0, 1, 1)
    pixels = labels.size
    found = group(adjacent(labels), histograms(labels, planes), 75, 0.0, sizes, boxes, pixels, weights)[2]
    return [tuple(box) for box in reversed(found)]


def once(boxes: Iterable[tuple[int, ...]]) -> np.ndarray:
    """The first of equal boxes: (N, 4)."""
    return np.array(list(dict.fromkeys(boxes)))


def fixed(image: np.ndarray, scale: float, sigma: float, min_size: int) -> np.ndarray:
    """Boxes (N, 4) of mode ``fixed``."""
    return once(grouped_boxes(image, segment(image, scale, sigma, min_size), hsv_bins(image)))


def in_turns(hierarchies: list[list[tuple[int, ...]]]) -> np.ndarray:
    """Boxes (N, 4) of several groupings: the first of each, then the second of each, and so on; none twice."""
    longest = max(map(len, hierarchies))
    return once(boxes[k] for k in range(longest) for boxes in hierarchies if k < len(boxes))
