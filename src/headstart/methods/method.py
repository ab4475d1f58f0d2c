"""What a pretraining method is, and the batches it sees.

A method says how views are made (in data workers), what the teacher answers (no gradient), and what the student
loses. It owns the heads it adds. Everything else, detectors, optimisers, the loop, processes, is not its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from headstart.detectors.detector import Detector
from headstart.optim import OptimSettings
from headstart.settings import Settings
from headstart.views import View


@dataclass
class ViewBatch:
    """One view of B images, K boxes each.

    Attributes:
        images: (B, 3, H, W) uint8.
        boxes: (B, K, 4) float32, xyxy in pixels of this view.
        ids: (B, K) int64; equal id in two views of an image means the same object.
    """

    images: Tensor
    boxes: Tensor
    ids: Tensor

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.images.shape[-2:]
        return height, width

    def to(self, device: torch.device) -> ViewBatch:
        return ViewBatch(*(t.to(device, non_blocking=True) for t in (self.images, self.boxes, self.ids)))

    def pin_memory(self) -> ViewBatch:
        return ViewBatch(*(t.pin_memory() for t in (self.images, self.boxes, self.ids)))


def collate_views(samples: Sequence[Sequence[View]]) -> list[ViewBatch]:
    """B samples of V views -> V batches. Every sample has the same K; NHWC memory becomes (B, 3, H, W) uncopied."""
    batches = []
    for views in zip(*samples, strict=True):
        images = torch.from_numpy(np.stack([view.image for view in views])).permute(0, 3, 1, 2)
        boxes = torch.from_numpy(np.stack([view.boxes for view in views]))
        ids = torch.from_numpy(np.stack([view.ids for view in views]))
        batches.append(ViewBatch(images, boxes, ids))
    return batches


class Net(nn.Module):
    """A detector and the heads a method puts on it: the student, or the teacher."""

    def __init__(self, detector: Detector, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.detector = detector
        self.heads = heads


M = TypeVar("M", bound=Settings)


class Method(ABC, Generic[M]):
    """One paper. Subclasses read in the paper's order and cite its equations."""

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]]
    paper: ClassVar[str]

    def __init__(self, settings: M) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def decode_px(self) -> int:
        """Images may be decoded at a reduced scale as long as their short side stays at least this, px."""

    @abstractmethod
    def views(self, image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> list[View]:
        """Views of ``image`` (H, W, 3) uint8 with proposals ``boxes`` (N, 4) xyxy px; runs in a data worker."""

    @abstractmethod
    def settle(self, detector: Detector, total_steps: int) -> list[str]:
        """Fill unset settings from the detector and the length of the run; returns what was chosen, and why.

        Raises:
            SettingsError: this method makes no sense for this detector; the message says why.
        """

    @abstractmethod
    def optimizer(self, batch_size: int) -> OptimSettings:
        """The optimiser that suits this method at a batch of ``batch_size`` images."""

    @property
    @abstractmethod
    def needs_proposals(self) -> bool:
        """Whether :meth:`views` uses the boxes it is given."""

    @abstractmethod
    def trained_parts(self, detector: Detector) -> Sequence[str]:
        """Names of the detector's parts that this method trains, and that are exported."""

    @abstractmethod
    def heads(self, detector: Detector) -> nn.ModuleDict:
        """What pretraining adds to the student and export drops."""

    @property
    def teacher_heads(self) -> Sequence[str]:
        """Which of ``heads`` the teacher has too."""
        return ()

    def momentum(self, step: int, total_steps: int) -> float | None:
        """EMA momentum of the teacher after ``step`` (0-based); None: no teacher."""
        return None

    @abstractmethod
    def targets(self, teacher: Net | None, views: Sequence[ViewBatch]) -> Any:
        """What the teacher says of the views; called without gradient."""

    @abstractmethod
    def loss(self, student: Net, views: Sequence[ViewBatch], targets: Any) -> dict[str, Tensor]:
        """Named terms whose sum is minimised."""

    def watch(self, views: Sequence[ViewBatch], targets: Any) -> dict[str, Any]:
        """Health of the run, logged every now and then: floats, or lists of floats."""
        return {}

    def warnings(self, watched: Mapping[str, Any]) -> str | None:
        """What to tell the user when ``watched`` looks like a collapse: what it means and what to try."""
        return None
