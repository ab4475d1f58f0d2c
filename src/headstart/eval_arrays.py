"""Ground truth and detections, given as COCO's dictionaries, as arrays that lie image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from headstart.masks import outline, run_lengths


@dataclass(frozen=True)
class Objects:
    """Objects or detections; those of image ``i`` are ``starts[i]:starts[i + 1]``, in the order they were given in.

    Images count in the order of the ground truth's list, labels in the order of the categories' ids, both from 0.
    """

    starts: np.ndarray  # (images + 1,) int64
    labels: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) float64 [x, y, width, height] px
    scores: np.ndarray  # (n,) float64; 0 for ground truth
    crowd: np.ndarray  # (n,) bool
    masks: list[Any] | None  # (n,) compressed run lengths, where masks were asked for

    @classmethod
    def read(cls, ground_truth: dict[str, Any], entries: Sequence[dict[str, Any]], iou_type: str = "bbox") -> Objects:
        """``entries``: annotations or detections of ``ground_truth``, all of images and categories that it has."""
        place = {image["id"]: i for i, image in enumerate(ground_truth["images"])}
        label = {number: k for k, number in enumerate(sorted(c["id"] for c in ground_truth["categories"]))}
        images = np.array([place[entry["image_id"]] for entry in entries], np.int64)
        order = np.argsort(images, kind="stable")
        boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
        masks = None
        if iou_type == "segm":
            sizes = [(image["height"], image["width"]) for image in ground_truth["images"]]
            masks = [_mask(entries[k], *sizes[images[k]]) for k in order.tolist()]
        return cls(
            starts=np.searchsorted(images[order], np.arange(len(place) + 1)),
            labels=np.array([label[entry["category_id"]] for entry in entries], np.int64)[order],
            boxes=boxes[order],
            scores=np.array([entry.get("score", 0.0) for entry in entries], np.float64)[order],
            crowd=np.array([bool(entry.get("iscrowd", 0)) for entry in entries], bool)[order],
            masks=masks,
        )

    def iou(self, mine: np.ndarray, other: Objects, others: np.ndarray, crowd: bool = False) -> np.ndarray:
        """(m, n) IoU of ``mine`` (m,) with ``others`` (n,), both numbers of objects; with crowds: the share of mine."""
        if not len(mine) or not len(others):
            return np.zeros((len(mine), len(others)))
        flags = [int(crowd)] * len(others)
        if self.masks is None or other.masks is None:
            return np.asarray(coco_mask.iou(self.boxes[mine], other.boxes[others], flags))
        first = [self.masks[k] for k in mine.tolist()]
        return np.asarray(coco_mask.iou(first, [other.masks[k] for k in others.tolist()], flags))


def _mask(entry: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """A crowd without a mask is the region of its box."""
    return run_lengths(entry.get("segmentation") or outline(entry["bbox"]), height, width)
