"""Labelled images as PyTorch samples, in the form of torchvision's detection reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from headstart.datasets.detection import DetectionData, masks_of
from headstart.datasets.images import decode
from headstart.errors import DataError, ImageError


class DetectionDataset(Dataset[tuple[torch.Tensor, dict[str, Any]]]):
    """Samples ``(image, target)``; the image is (3, H, W) uint8 RGB, not resized.

    The target holds ``boxes`` (n, 4) float32 xyxy pixels, ``labels`` (n,) int64 from 1, ``image_id`` the
    integer of :meth:`DetectionData.coco_image_id`, ``area`` (n,) float32, ``iscrowd`` (n,) int64, all zero
    because crowds are no target, and with ``masks`` also ``masks`` (n, H, W) uint8.

    Args:
        data: the labelled images.
        indices: positions in ``data.images`` to use, in that order; all by default.
        masks: give masks too.

    Raises:
        DataError: ``masks`` is asked for and an object has none.
        ImageError: (on access) the image can't be read, or has another size than its annotations say.
    """

    def __init__(self, data: DetectionData, indices: Sequence[int] | None = None, masks: bool = False) -> None:
        if masks and not data.has_masks:
            raise DataError(f"{data.source}: has objects without a mask; use a detector without masks")
        self.data = data
        self.indices = list(range(len(data.images)) if indices is None else indices)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        position = self.indices[index]
        record = self.data.images[position]
        pixels = decode(record.path)
        height, width = pixels.shape[:2]
        if (width, height) != (record.width, record.height):
            raise ImageError(
                f"{record.path}: is {width} x {height} (upright), but {self.data.source.name} says "
                f"{record.width} x {record.height}; its boxes would be misplaced"
            )
        annotations = self.data.annotations[position]
        objects = annotations.keep(~annotations.iscrowd)
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(objects.boxes),
            "labels": torch.from_numpy(objects.labels),
            "image_id": self.data.coco_image_id(position),
            "area": torch.from_numpy(objects.areas),
            "iscrowd": torch.zeros(len(objects), dtype=torch.int64),
        }
        if self.masks:
            try:
                target["masks"] = torch.from_numpy(masks_of(objects, height, width))
            except DataError as error:
                raise DataError(f"{self.data.source}: image {record.file_name}: {error}") from None
        return torch.from_numpy(pixels).permute(2, 0, 1), target
