"""One image -> its proposals: shrink or squash, search, scale back, clip, filter, NMS, top k.

The file of proposals and the boxes found while training come from here, so that they are the same boxes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from headstart import boxes as box_ops
from headstart.proposals import ProposalEngine, ProposalSettings, make_engine
from headstart.proposals.filters import Fallback, select


@dataclass(frozen=True)
class Found:
    """What was found in one image."""

    boxes: np.ndarray  # (n, 4) float32 xyxy in px of the upright original, n >= 1
    n_raw: int  # boxes before the filter
    fallback: Fallback  # "" where boxes passed the filter


@dataclass
class Finder:
    """Finds boxes by ``settings``. The engine is made when first used; a pickled Finder is its settings alone."""

    settings: ProposalSettings
    _engine: ProposalEngine | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def engine(self) -> ProposalEngine:
        """Raises: SettingsError when the engine can't work on this machine."""
        if self._engine is None:
            self._engine = make_engine(self.settings)
        return self._engine

    def search_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in px at which an image of ``width`` x ``height`` is searched."""
        if self.settings.squash_px is not None:
            return self.settings.squash_px, self.settings.squash_px
        scale = self.settings.long_side_px / max(width, height)
        if scale >= 1:
            return width, height
        return max(1, round(width * scale)), max(1, round(height * scale))

    def decode_px(self, width: int, height: int) -> int | None:
        """The ``short_side_px`` for :func:`headstart.datasets.images.decode`: nothing larger is needed here.

        Boxes repeat only for the same pixels, so that everyone who calls this Finder decodes by this rule.
        """
        size = self.search_size(width, height)
        # Where one side is enlarged (squash_px), all there is is needed.
        return min(size) if size[0] <= width and size[1] <= height and size != (width, height) else None

    def __call__(self, image: np.ndarray, width: int, height: int, name: str) -> Found:
        """Proposals of an image. They depend on its pixels, its name and the settings alone.

        Args:
            image: (H, W, 3) uint8 RGB, decoded at ``decode_px(width, height)``.
            width, height: of the upright original, px: the boxes come back in these.
            name: path relative to its folder; with the settings' seed it starts the image's random stream.
        """
        size = self.search_size(width, height)
        if (image.shape[1], image.shape[0]) != size:
            shrinks = size[0] <= image.shape[1] and size[1] <= image.shape[0]
            # Area is for shrinking; DETReg squashes linearly, which leaves out most pixels of a large photo.
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        rng = np.random.default_rng([self.settings.seed, zlib.crc32(name.encode())])
        boxes = self.engine(image, rng)
        boxes = box_ops.resize(boxes, width / image.shape[1], height / image.shape[0])
        boxes = box_ops.clip(boxes, width, height)
        kept, fallback = select(boxes, width, height, self.settings)
        return Found(kept, len(boxes), fallback)

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "_engine": None}
