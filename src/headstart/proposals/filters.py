"""Which boxes are worth training on: SoCo section 3.2, what to do when none is, and what other papers add."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from headstart.proposals import ProposalSettings

Fallback = Literal["", "ratio", "any_box", "whole_image"]
FALLBACKS: tuple[Fallback, ...] = get_args(Fallback)[1:]


def select(boxes: np.ndarray, width: int, height: int, settings: ProposalSettings) -> tuple[np.ndarray, Fallback]:
    """What is kept of an engine's boxes: :func:`keep_boxes`, then :func:`suppress`, then the first ``top_k``.

    Args, Returns: as :func:`keep_boxes`; the boxes' order is their rank, best first, and stays.
    """
    kept, fallback = keep_boxes(boxes, width, height, settings)
    if settings.nms_iou is not None:
        kept = suppress(kept, settings.nms_iou)
    return kept[: settings.top_k], fallback


def suppress(boxes: np.ndarray, iou: float) -> np.ndarray:
    """Non-maximum suppression: leave out each box that overlaps an earlier, kept one by more than ``iou``.

    (N, 4) float32 xyxy -> (M, 4), in the order given.
    """
    # Here, because importing torch takes seconds, which processes that look for boxes otherwise save.
    import torch
    from torchvision.ops import nms

    rank = torch.arange(len(boxes), 0, -1, dtype=torch.float64)
    kept = nms(torch.from_numpy(np.array(boxes, np.float64, order="C")), rank, iou)
    return boxes[kept.numpy()]


def keep_boxes(boxes: np.ndarray, width: int, height: int, settings: ProposalSettings) -> tuple[np.ndarray, Fallback]:
    """Keep boxes with ``1/3 <= w/h <= 3`` and ``0.3 <= sqrt(wh)/sqrt(WH) <= 0.8`` (numbers: the settings').

    When none is left, in this order: the ratio rule alone ("ratio"); boxes with both sides at least
    ``fallback_side_px`` ("any_box"); one box, the whole image ("whole_image"). With ``side_min_px``, boxes with a
    shorter side are left out before all of this (SoCo's released code).

    Args:
        boxes: (N, 4) xyxy in pixels of an image of ``width`` x ``height``.

    Returns:
        (M, 4) float32, M >= 1, in the order given; and which fallback was needed, "" for none.
    """
    boxes = boxes.astype(np.float32, copy=False)
    w = boxes[:, 2].astype(np.float64) - boxes[:, 0]
    h = boxes[:, 3].astype(np.float64) - boxes[:, 1]
    # Products, not quotients: a ratio of exactly 3 stays in, an empty box divides nothing by zero.
    ratio = (w > 0) & (h > 0)
    if settings.aspect_max is not None:
        ratio &= (w <= settings.aspect_max * h) & (h <= settings.aspect_max * w)
    size = np.sqrt(w.clip(0) * h.clip(0))
    image_size = np.sqrt(width * height)
    sized = (size >= settings.size_min * image_size) & (size <= settings.size_max * image_size)
    any_box = (w >= settings.fallback_side_px) & (h >= settings.fallback_side_px)
    if settings.side_min_px is not None:
        long_enough = (w >= settings.side_min_px) & (h >= settings.side_min_px)
        ratio, any_box = ratio & long_enough, any_box & long_enough
    rules: tuple[tuple[Fallback, np.ndarray], ...] = (
        ("", ratio & sized),
        ("ratio", ratio),
        ("any_box", any_box),
    )
    for fallback, kept in rules:
        if kept.any():
            return boxes[kept], fallback
    return np.array([[0, 0, width, height]], np.float32), "whole_image"
