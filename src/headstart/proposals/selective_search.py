"""Selective Search: Uijlings et al., IJCV 2013, from segments of Felzenszwalb and Huttenlocher, IJCV 2004.

The boxes that SoCo (appendix A), ADePT (4.1.1) and most of this field start from were made with the Python
package ``selectivesearch`` (0.4), whose parameters they quote. Here its algorithm is compiled; see
``benchmarks/selective_search.py`` for what that brings. The steps, and where each one is:

=====================================================  ==========================================================
Gaussian blur, edges to 8 neighbours, joins            :func:`headstart.proposals.kernels.segment`
histograms of colour (25 bins) and texture (10 bins)   :func:`headstart.proposals.kernels.describe`
which segments are neighbours                          :func:`~headstart.proposals.kernels.overlapping`, ``adjacent``
merging by colour + texture + size + fill              :func:`headstart.proposals.kernels.group`
=====================================================  ==========================================================

Modes:

``exact``
    What ``selectivesearch`` 0.4 with scikit-image 0.26 gives, box by box, in its order, duplicates included; for
    papers' proposals. One thing is settled here that is open there: scikit-image sorts edges with an unstable
    sort, so that edges of exactly equal cost (drawings, screenshots; hardly ever photographs) come in an order
    that depends on the processor. Here they keep the order of ``numpy.argsort(costs, kind="stable")``.
``fixed``
    The default. The same algorithm without the package's mistakes:

    - Hue and saturation (0..1) are binned over 0..1, not over 0..255, where each fell into one bin.
    - Local binary patterns (0..255) are binned over 0..255, not over 0..1, where only the patterns 0 and 1
      counted. Flat areas have one pattern; in scikit-image it depends on how a pixel's coordinates round.
    - Segments are neighbours if their pixels touch (corners included), not if a corner of one's box lies inside
      the other's box: on photographs that misses about one in nine of those, and two in five of its pairs do not
      touch.
    - Boxes include their last row and column, so that none is empty and one covers the whole image.
    - No box comes twice; the largest groups, merged last, come first.
``diverse``
    Several scales, colour spaces and measures of similarity, each as in ``fixed``: many more boxes, for recall.
    The groupings take turns in order, largest groups first.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np

from headstart.proposals import SEARCH_DEFAULTS, Mode, kernels
from headstart.proposals.compiled import is_kept

MODES: tuple[Mode, ...] = get_args(Mode)
VERSION = "1"  # of the boxes: raise it with any change to them

EQUAL = (1.0, 1.0, 1.0, 1.0)  # weights of colour, texture, size, fill
MAX_SIGMA = 1000
MAX_PIXELS = 2**28  # places of pixels are kept in 30 bits, four edges a pixel counted in 32


def selective_search(
    image: np.ndarray,
    scale: float | None = None,
    sigma: float | None = None,
    min_size: int | None = None,
    mode: Mode = "fixed",
) -> np.ndarray:
    """Class-less boxes of things in an image.

    The first call of the first process compiles for about ten seconds; see :func:`prepare`. Threads may call it
    at the same time: they run side by side, each with up to 144 bytes a pixel of memory that is kept for the next.

    Args:
        image: (H, W, 3) uint8 RGB.
        scale: Felzenszwalb's k, for pixel values 0..255: larger gives larger segments. ``diverse`` takes 0.3, 0.2
            and 0.1 times as much.
        sigma: Gaussian blur before the segmentation, standard deviation in px; 0 for none, at most 1000.
        min_size: segments of fewer px are joined to a neighbour; ``diverse`` takes 5 times as many.
        mode: ``fixed``, ``exact`` or ``diverse``: see the top of this file. Parameters left out are its own
            (:data:`headstart.proposals.SEARCH_DEFAULTS`): the papers' 500, 0.9, 10, or 100, 0.8, 50 for ``fixed``.

    Returns:
        (N, 4) float32 xyxy in px, N >= 1. In ``exact`` row k is x, y, x + w, y + h of the reference's k-th region
        (its w and h are one px short, and may be 0).

    Raises:
        TypeError: the image is not a uint8 array.
        ValueError: its shape, or a parameter, is not as above.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}; expected one of {', '.join(MODES)}")
    defaults = SEARCH_DEFAULTS[mode]
    scale = defaults["scale"] if scale is None else scale
    sigma = defaults["sigma"] if sigma is None else sigma
    min_size = int(defaults["min_size"]) if min_size is None else min_size
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        what = f"{image.dtype} array" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"expected an image as a uint8 NumPy array, got {what}")
    if image.ndim != 3 or image.shape[2] != 3 or not 0 < image.shape[0] * image.shape[1] <= MAX_PIXELS:
        raise ValueError(f"expected an RGB image (H, W, 3) of 1 to {MAX_PIXELS:,} px, got shape {image.shape}")
    if not (0 < scale < np.inf and 0 <= sigma <= MAX_SIGMA and min_size >= 0):
        raise ValueError(
            f"expected scale > 0, 0 <= sigma <= {MAX_SIGMA}, min_size >= 0, got {scale}, {sigma}, {min_size}"
        )
    # Of one type, or the kernels would be compiled again.
    scale, sigma, min_size = float(scale), float(sigma), int(min_size)
    image = np.require(image, requirements=["C", "W"])  # the kernels are compiled for one kind of array
    memory = _Memory.of_this_thread(*image.shape[:2])
    if mode == "exact":
        return _exact(image, scale, sigma, min_size, memory)
    hierarchies = []
    for strategy in FIXED if mode == "fixed" else DIVERSE:
        hierarchies += _hierarchies(image, strategy, scale, sigma, min_size, memory)
    return _in_turns(hierarchies)


@dataclass(frozen=True)
class Strategy:
    """One segmentation and its groupings. ``scale`` and ``min_size`` multiply the caller's."""

    colour: Literal["rgb", "hsv", "lab"] = "rgb"
    scale: float = 1.0
    min_size: int = 1
    weights: tuple[tuple[float, float, float, float], ...] = (EQUAL,)


FIXED = (Strategy(),)
# A small search over colour spaces, scales and measures on photographs and microscope images: these nine
# groupings find more than OpenCV's twelve ("fast"). Without texture, without colour, and small regions first
# complement each other; smaller scales find parts as well, larger smallest segments leave out their crumbs.
_THREE = ((1.0, 0.0, 1.0, 1.0), (0.0, 1.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.0))
DIVERSE = (Strategy("rgb", 0.3, 5, _THREE), Strategy("hsv", 0.2, 5, _THREE), Strategy("lab", 0.1, 5, _THREE))


def _exact(image: np.ndarray, scale: float, sigma: float, min_size: int, memory: _Memory) -> np.ndarray:
    n = memory.segment(image, scale, sigma, min_size)
    # Of the histograms only V and two of 30 patterns differ between regions: H and S share all, 1 + 1.
    regions = memory.describe(n, kernels.COLOUR_BINS + 6, exact=True)
    pairs = kernels.overlapping(regions.boxes, n)
    count = regions.group(pairs, kernels.COLOUR_BINS, 2.0, memory.pixels, EQUAL)
    return regions.boxes[:count].astype(np.float32)


def _hierarchies(
    image: np.ndarray, strategy: Strategy, scale: float, sigma: float, min_size: int, memory: _Memory
) -> list[np.ndarray]:
    """Boxes (N, 4) int32 of every grouping, the group merged last first."""
    if strategy.colour != "rgb":
        import cv2  # a start without it is quicker

        image = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL if strategy.colour == "hsv" else cv2.COLOR_RGB2LAB)
    n = memory.segment(image, scale * strategy.scale, sigma, min_size * strategy.min_size)
    if strategy.colour == "rgb":
        kernels.hsv_bins(memory.padded, _value_bins(), memory.bins)
    else:
        kernels.even_bins(memory.padded, memory.bins)
    regions = memory.describe(n, 3 * (kernels.COLOUR_BINS + kernels.TEXTURE_BINS), exact=False)
    regions.boxes[:n, 2:] += 1
    pairs = kernels.adjacent(memory.labels, n)
    found = []
    for weights in strategy.weights:
        count = regions.group(pairs, 3 * kernels.COLOUR_BINS, 0.0, memory.pixels, weights)
        found.append(regions.boxes[:count][::-1].copy())
    return found


def _in_turns(hierarchies: list[np.ndarray]) -> np.ndarray:
    """All boxes once: the first of every hierarchy, then the second of every one, and so on."""
    boxes = np.concatenate(hierarchies)
    rank = np.concatenate([np.arange(len(one)) for one in hierarchies])
    boxes = boxes[np.argsort(rank, kind="stable")]
    key = boxes.astype(np.int64) @ (1 << np.arange(48, -1, -16, dtype=np.int64)) if boxes.max() < 1 << 15 else None
    _, first = np.unique(boxes if key is None else key, axis=0, return_index=True)
    return boxes[np.sort(first)].astype(np.float32)


@dataclass
class _Regions:
    """Segments, and the regions grouped of them."""

    n: int
    histograms: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray

    def group(
        self, pairs: np.ndarray, n_colour: int, sure: float, pixels: int, weights: tuple[float, float, float, float]
    ) -> int:
        return kernels.group(
            pairs, self.n, self.histograms, n_colour, sure, self.sizes, self.boxes, pixels, np.array(weights)
        )


class _Memory:
    """What the kernels work in: one block that only grows, as fresh pages from the system cost more than the work."""

    _thread = threading.local()

    def __init__(self, height: int, width: int, block: np.ndarray) -> None:
        self._block = block
        self._used = 0
        self.pixels = height * width
        self.keys = self._take(np.uint32, 4, self.pixels)
        self.records = self._take(np.uint64, 4 * self.pixels + 1)
        self.spare = self._take(np.uint64, 4 * self.pixels + 1)
        self.counts = self._take(np.uint32, kernels.COUNTS)
        self.blurred = self._take(np.float64, 3, height, width)
        self.parent = self._take(np.uint32, self.pixels)
        self.nodes = self._take(np.uint32, 2 * self.pixels)
        self.last_edge = self._take(np.uint32, self.pixels)
        self.labels = self._take(np.int32, height, width)
        self.padded = self._take(np.uint8, 3, height + 2, width + 2)
        self.bins = self._take(np.uint8, 3, height, width)
        self.codes = self._take(np.uint8, 3, height, width)

    @classmethod
    def of_this_thread(cls, height: int, width: int) -> _Memory:
        needed = 144 * height * width + 8 * (height + width) + 4 * kernels.COUNTS + 4096
        block = getattr(cls._thread, "block", None)
        if block is None or len(block) < needed:
            cls._thread.block = None  # the old one goes first
            cls._thread.block = block = np.empty(needed, np.uint8)
        return cls(height, width, block)

    def _take(self, dtype: type, *shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        start, self._used = self._used, self._used + (size + 63) // 64 * 64
        return self._block[start : start + size].view(dtype).reshape(shape)

    def segment(self, image: np.ndarray, scale: float, sigma: float, min_size: int) -> int:
        return kernels.segment(
            image,
            scale / 255.0,
            min(min_size, self.pixels),
            _gaussian(sigma),
            self.padded,
            self.blurred,
            self.keys,
            self.records,
            self.spare,
            self.counts,
            self.parent,
            self.nodes,
            self.last_edge,
            self.labels,
        )

    def describe(self, n: int, n_bins: int, exact: bool) -> _Regions:
        regions = _Regions(n, np.empty((2 * n, n_bins)), np.empty(2 * n, np.int32), np.empty((2 * n, 4), np.int32))
        kernels.describe(
            self.padded,
            self.labels,
            n,
            exact,
            _value_bins(),
            self.bins,
            self.codes,
            regions.histograms,
            regions.sizes,
            regions.boxes,
        )
        return regions


@lru_cache(maxsize=64)
def _gaussian(sigma: float) -> np.ndarray:
    """Weights from the centre out to 4 sigma, computed as scipy.ndimage does, for its very bits."""
    if sigma <= 1e-15:
        return np.ones(1)
    radius = int(4.0 * float(sigma) + 0.5)
    x = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 / (sigma * sigma) * x**2)
    return (weights / weights.sum())[radius:].copy()


@lru_cache(maxsize=1)
def _value_bins() -> np.ndarray:
    """The bin of every value 0..255 among 25 over (0, 255), edges as NumPy rounds them: (256,) uint8."""
    return np.array([np.histogram(v, kernels.COLOUR_BINS, (0.0, 255.0))[0].argmax() for v in range(256)], np.uint8)


def prepare(show: bool = True) -> None:
    """Compile now, once for this user, what the first searches would compile; later starts load it."""
    if show and not is_kept(kernels.group):
        from headstart.console import notes

        notes.print("Compiling Selective Search: about 10 s, once for this installation", soft_wrap=True)
    for mode in MODES:
        selective_search(np.zeros((8, 8, 3), np.uint8), mode=mode)


class SelectiveSearch:
    """:func:`selective_search` as a proposal engine."""

    name = "selective_search"

    def __init__(
        self,
        scale: float | None = None,
        sigma: float | None = None,
        min_size: int | None = None,
        mode: Mode = "fixed",
        show: bool = True,
    ) -> None:
        prepare(show)
        self.version = VERSION
        self.scale, self.sigma, self.min_size, self.mode = scale, sigma, min_size, mode

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 RGB -> (N, 4) float32 xyxy. ``rng`` is not used."""
        return selective_search(image, self.scale, self.sigma, self.min_size, self.mode)
