"""Which boxes are worth training on: SoCo section 3.2, and what to do when none is."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from headstart.proposals import ProposalSettings

Fallback = Literal["", "ratio", "any_box", "whole_image"]
FALLBACKS: tuple[Fallback, ...] = get_args(Fallback)[1:]


def keep_boxes(boxes: np.ndarray, width: int, height: int, settings: ProposalSettings) -> tuple[np.ndarray, Fallback]:
    """Keep boxes with ``1/3 <= w/h <= 3`` and ``0.3 <= sqrt(wh)/sqrt(WH) <= 0.8`` (numbers: the settings').

    When none is left, in this order: the ratio rule alone ("ratio"); boxes with both sides at least
    ``fallback_side_px`` ("any_box"); one box, the whole image ("whole_image").

    Args:
        boxes: (N, 4) xyxy in pixels of an image of ``width`` x ``height``.

    Returns:
        (M, 4) float32, M >= 1, in the order given; and which fallback was needed, "" for none.
    """
    boxes = boxes.astype(np.float32, copy=False)
    w = boxes[:, 2].astype(np.float64) - boxes[:, 0]
    h = boxes[:, 3].astype(np.float64) - boxes[:, 1]
    # Products, not quotients: a ratio of exactly 3 stays in, an empty box divides nothing by zero.
    ratio = (w <= settings.aspect_max * h) & (h <= settings.aspect_max * w) & (w > 0)
    size = np.sqrt(w.clip(0) * h.clip(0))
    image_size = np.sqrt(width * height)
    sized = (size >= settings.size_min * image_size) & (size <= settings.size_max * image_size)
    any_box = (w >= settings.fallback_side_px) & (h >= settings.fallback_side_px)
    rules: tuple[tuple[Fallback, np.ndarray], ...] = (
        ("", ratio & sized),
        ("ratio", ratio),
        ("any_box", any_box),
    )
    for fallback, kept in rules:
        if kept.any():
            return boxes[kept], fallback
    return np.array([[0, 0, width, height]], np.float32), "whole_image"
