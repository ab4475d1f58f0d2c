"""Geometry of boxes: (..., 4) arrays, xyxy in pixels. Every function takes NumPy arrays or torch tensors.

What comes back is new and of the same kind, dtype and device as what went in; nothing is changed in place.
A box (x1, y1, x2, y2) covers [x1, x2) x [y1, y2): its width is x2 - x1, without a + 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:  # proposal workers need these functions, but not the seconds that importing torch takes
    import torch

Boxes = TypeVar("Boxes", np.ndarray, "torch.Tensor")


def area(boxes: Boxes) -> Boxes:
    """(..., 4) -> (...) in square pixels. Boxes turned inside out count as empty."""
    width = (boxes[..., 2] - boxes[..., 0]).clip(0, None)
    height = (boxes[..., 3] - boxes[..., 1]).clip(0, None)
    return width * height


def size(boxes: Boxes) -> Boxes:
    """``sqrt(w * h)``, (..., 4) -> (...) in pixels: what SoCo calls the size of a box."""
    return area(boxes) ** 0.5


def clip(boxes: Boxes, width: float, height: float) -> Boxes:
    """What lies inside an image of ``width`` x ``height`` px; a box outside becomes empty, on the edge."""
    clipped = _copy(boxes)
    clipped[..., 0::2] = boxes[..., 0::2].clip(0, width)
    clipped[..., 1::2] = boxes[..., 1::2].clip(0, height)
    return clipped


def crop(boxes: Boxes, left: Any, top: Any) -> Boxes:
    """The boxes as seen from a crop whose corner is (``left``, ``top``): moved, and not yet clipped to it.

    ``left`` and ``top`` are numbers, or arrays that broadcast to the boxes' leading shape.
    """
    moved = _copy(boxes)
    for corner in (0, 2):
        moved[..., corner] = boxes[..., corner] - left
        moved[..., corner + 1] = boxes[..., corner + 1] - top
    return moved


def resize(boxes: Boxes, scale_x: Any, scale_y: Any) -> Boxes:
    """The boxes after their image was stretched ``scale_x``, ``scale_y`` times (numbers or arrays)."""
    scaled = _copy(boxes)
    for corner in (0, 2):
        scaled[..., corner] = boxes[..., corner] * scale_x
        scaled[..., corner + 1] = boxes[..., corner + 1] * scale_y
    return scaled


def flip(boxes: Boxes, width: Any) -> Boxes:
    """The boxes after their image, ``width`` pixels wide, was mirrored left to right."""
    flipped = _copy(boxes)
    flipped[..., 0] = width - boxes[..., 2]
    flipped[..., 2] = width - boxes[..., 0]
    return flipped


def iou(a: Boxes, b: Boxes) -> Boxes:
    """Intersection over union of every pair: (..., N, 4), (..., M, 4) -> (..., N, M). Two empty boxes: 0."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    width = _smaller(a[..., 2], b[..., 2]) - _larger(a[..., 0], b[..., 0])
    height = _smaller(a[..., 3], b[..., 3]) - _larger(a[..., 1], b[..., 1])
    common = width.clip(0, None) * height.clip(0, None)
    union = area(a) + area(b) - common
    return common / (union + (union == 0))


def _copy(boxes: Any) -> Any:
    return boxes.copy() if isinstance(boxes, np.ndarray) else boxes.clone()


def _larger(a: Any, b: Any) -> Any:
    return np.maximum(a, b) if isinstance(a, np.ndarray) else a.maximum(b)


def _smaller(a: Any, b: Any) -> Any:
    return np.minimum(a, b) if isinstance(a, np.ndarray) else a.minimum(b)
