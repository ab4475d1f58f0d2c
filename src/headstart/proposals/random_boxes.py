"""Random boxes: the control of SoCo Table 5c, and the patches that UP-DETR looks for.

SoCo does not say how it draws them. Here each box has a size uniform in the filter's range, an aspect
ratio log-uniform in its range, and any place where it fits inside the image, so that all pass the filter.

UP-DETR's released code draws width and height apart and uniformly, so that its patches have any shape.
"""

from __future__ import annotations

import numpy as np

DRAWS_PER_BOX = 64  # for those that do not fit into the image and are drawn again
PATCH_MARGIN_PX = 8  # UP-DETR's released code: the shortest side, and what the longest leaves of the image


class RandomBoxes:
    name = "random"
    version = "1"

    def __init__(self, count: int = 4, aspect_max: float = 3.0, size_min: float = 0.3, size_max: float = 0.8) -> None:
        """
        Args:
            count: boxes an image.
            aspect_max: w/h lies in [1/aspect_max, aspect_max].
            size_min, size_max: range of sqrt(w*h) / sqrt(W*H).
        """
        self.count, self.aspect_max, self.size_min, self.size_max = count, aspect_max, size_min, size_max

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) -> (count, 4) float32 xyxy; fewer when the image is too long and thin for such boxes."""
        height, width = image.shape[:2]
        draws = self.count * DRAWS_PER_BOX
        size = rng.uniform(self.size_min, self.size_max, draws) * np.sqrt(width * height)
        root = np.exp(rng.uniform(-0.5, 0.5, draws) * np.log(self.aspect_max))  # sqrt(w/h)
        place = rng.uniform(size=(draws, 2))
        wh = np.stack([size * root, size / root], axis=1)
        fits = np.flatnonzero((wh <= (width, height)).all(axis=1))[: self.count]
        corner = place[fits] * ((width, height) - wh[fits])
        return np.concatenate([corner, corner + wh[fits]], axis=1).astype(np.float32)


class RandomPatches:
    name = "random_patches"
    version = "1"

    def __init__(self, count: int = 10) -> None:
        """
        Args:
            count: patches an image.
        """
        self.count = count

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) -> (count, 4) float32 xyxy, whole pixels: sides uniform in [8, side of the image - 8] (of
        images below 16 px: 8 or the whole side), places uniform where they fit."""
        sides = np.array([image.shape[1], image.shape[0]])
        shortest = np.minimum(PATCH_MARGIN_PX, sides)
        longest = np.maximum(sides - PATCH_MARGIN_PX, shortest)
        wh = rng.integers(shortest, longest, (self.count, 2), endpoint=True)
        corner = rng.integers(0, sides - wh, endpoint=True)
        return np.concatenate([corner, corner + wh], axis=1).astype(np.float32)
