"""Masks as COCO has them: polygons in pixels, run lengths, and run lengths compressed into text.

By faster-coco-eval, which refuses run lengths that do not fill the image; others take them for a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Compressed run lengths of a (height, width) uint8 mask of 0 and 1, ready for JSON."""
    found = coco_mask.encode(np.asfortranarray(mask))
    counts = found["counts"]
    text = counts.decode() if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in found["size"]], "counts": text}


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) uint8, 0 or 1, of a segmentation of any kind.

    Raises:
        ValueError, RuntimeError, TypeError: it is none.
    """
    return coco_mask.decode(run_lengths(segmentation, height, width))


def run_lengths(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """The compressed run lengths of a segmentation of any kind; those that it has, where it has them.

    Raises:
        ValueError, RuntimeError, TypeError: it is none.
    """
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def outline(box: Sequence[float]) -> list[list[float]]:
    """Polygon of a box [x, y, width, height] in pixels: the region of a crowd that has no mask."""
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]
