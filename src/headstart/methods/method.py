"""What a pretraining method is, and the batches it sees.

A method says how views are made (in data workers), what the teacher answers (no gradient), and what the student
loses. It owns the heads it adds. Everything else, detectors, optimisers, the loop, processes, is not its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from headstart.detectors.detector import Ability, Detector, Target
from headstart.errors import SettingsError
from headstart.optim import OptimSettings
from headstart.settings import Settings
from headstart.views import View


@dataclass
class ViewBatch:
    """One view of B images, up to K boxes each.

    Attributes:
        images: (B, 3, H, W) uint8; smaller ones are padded at the right and the bottom.
        boxes: (B, K, 4) float32, xyxy in pixels of this view; rows beyond an image's own are 0.
        ids: (B, K) int64; equal id in two views of an image means the same object; -1 beyond an image's own.
        labels: (B, K) int64, pseudo class of each box from 1; 1 where nobody made any, 0 beyond an image's own.
        sizes: (B, 2) int64, height and width of each image without padding.
        frames: (B, 4) float32, :attr:`View.frame`; NaN where a view has none.
    """

    images: Tensor
    boxes: Tensor
    ids: Tensor
    labels: Tensor
    sizes: Tensor
    frames: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of ``images``, padding included."""
        height, width = self.images.shape[-2:]
        return height, width

    def targets(self) -> list[Target]:
        """One an image: its boxes (k, 4) and labels (k,), all of one class where there are no pseudo classes."""
        counts = (self.ids >= 0).sum(dim=1).tolist()
        pairs = zip(self.boxes, self.labels, counts, strict=True)
        return [{"boxes": boxes[:k], "labels": labels[:k]} for boxes, labels, k in pairs]

    def to(self, device: torch.device) -> ViewBatch:
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in vars(self).items()})

    def pin_memory(self) -> ViewBatch:
        return replace(self, **{k: v.pin_memory() for k, v in vars(self).items()})


def collate_views(samples: Sequence[Sequence[View]], multiple_px: int = 1) -> list[ViewBatch]:
    """B samples of V views -> V batches, NHWC memory as (B, 3, H, W). Nothing is copied twice unless sizes differ.

    ``multiple_px``: sides are padded to a multiple of it.
    """
    return [_collate(views, multiple_px) for views in zip(*samples, strict=True)]


def _collate(views: Sequence[View], multiple_px: int) -> ViewBatch:
    sizes = np.array([view.size for view in views])
    height, width = -(-sizes.max(axis=0) // multiple_px) * multiple_px
    if (sizes == (height, width)).all():
        images = np.stack([view.image for view in views])
    else:
        images = np.zeros((len(views), height, width, 3), np.uint8)
        for image, view in zip(images, views, strict=True):
            image[: view.size[0], : view.size[1]] = view.image
    most = max(len(view.boxes) for view in views)
    boxes = np.zeros((len(views), most, 4), np.float32)
    ids = np.full((len(views), most), -1, np.int64)
    labels = np.zeros((len(views), most), np.int64)
    for i, view in enumerate(views):
        boxes[i, : len(view.boxes)], ids[i, : len(view.ids)] = view.boxes, view.ids
        labels[i, : len(view.ids)] = 1 if view.labels is None else view.labels
    none = np.full(4, np.nan, np.float32)
    frames = np.stack([none if view.frame is None else view.frame for view in views])
    arrays = (images, boxes, ids, labels, sizes, frames)
    pixels, *others = (torch.from_numpy(array) for array in arrays)
    return ViewBatch(pixels.permute(0, 3, 1, 2), *others)


@dataclass
class Priors:
    """Boxes that a detector itself finds in one image: proposals until the next refresh.

    Attributes:
        boxes: (k, 4) float32, xyxy px of the image that was given; k may be 0.
        scores: (k,) float32, in [0, 1].
    """

    boxes: Tensor
    scores: Tensor


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
    epochs: ClassVar[int] = 100  # the paper's, where nobody says how long
    detector: ClassVar[str] = "faster_rcnn"  # the family, where nobody says which
    needs: ClassVar[Mapping[Ability, str]]  # what a detector has to be able to, and what for

    def __init__(self, settings: M) -> None:
        self.settings = settings

    @classmethod
    def check(cls, detector: type[Detector] | Detector) -> None:
        """
        Raises:
            SettingsError: the detector lacks something that this method needs.
        """
        for ability, reason in cls.needs.items():
            if ability not in detector.abilities:
                raise SettingsError(
                    f"{cls.name} {reason}, which a {detector.family} does not have; headstart methods says what fits"
                )

    def length(self, detector: Detector) -> float:
        """Passes over the images, as the paper has it, where nobody says how long."""
        return self.epochs

    def batch_size(self, detector: Detector, memory_gib: float) -> int:
        """Images a step that fit one device of this memory, where nobody says how many."""
        # Measured nowhere near every detector: about 1 GiB holds two 224 px images with a ResNet-50 FPN.
        return int(min(256, 2 ** np.floor(np.log2(max(8, 2 * memory_gib)))))

    proposals: ClassVar[Mapping[str, Any]] = {}  # settings of proposals, where the user says nothing else
    multiple_px: ClassVar[int] = 1  # that the sides of a batch of views are padded to

    @property
    def norm_images(self) -> int:
        """Plain images that batch norm's statistics are taken over again at the end; 0: the views' will do."""
        return 0

    @property
    def title(self) -> str:
        """Its name, and what tells this way of running it from others, where that matters."""
        return self.name

    def export_notes(self) -> list[str]:
        """What a later load report should say of the weights."""
        return []

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
    def optimizer(self, detector: Detector, batch_size: int) -> OptimSettings:
        """The optimiser that suits this method at a batch of ``batch_size`` images."""

    @property
    @abstractmethod
    def needs_proposals(self) -> bool:
        """Whether :meth:`views` uses the boxes it is given."""

    @property
    def pseudo_classes(self) -> tuple[int, int] | None:
        """Kinds that proposals are told apart in by what the frozen backbone says of them, and the side of the crops it
        is shown, px; known after :meth:`settle`. None: all are of one kind.

        With some, ids of :meth:`views` have to be numbers of the boxes given to it.
        """
        return None

    @abstractmethod
    def trained_parts(self, detector: Detector) -> Sequence[str]:
        """Names of the detector's parts that this method trains. The others are frozen, batch norm included."""

    def exported_parts(self, detector: Detector) -> Sequence[str]:
        """Names of the parts that are worth keeping afterwards."""
        return self.trained_parts(detector)

    def exported_from_teacher(self, detector: Detector) -> Sequence[str]:
        """Those of them that are kept as the teacher has them."""
        return ()

    def needs_start(self, detector: Detector) -> str | None:
        """Why this method makes no sense on random weights, where it does not."""
        return None

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

    def refresh_every(self, steps_a_pass: float) -> int | None:
        """Steps between two calls of :meth:`refresh`, the first of them before the first step, where a pass over the
        images takes ``steps_a_pass``; None: it is never called, and boxes come from a proposal engine."""
        return None

    def refresh(self, student: Net, images: Tensor, sizes: Tensor, before: list[Priors] | None) -> list[Priors]:
        """New boxes of plain images, which :meth:`views` is given until the next refresh.

        Called with ``student`` in evaluation mode and without gradient; draws nothing from torch's random state that
        training would notice.

        Args:
            images: (B, 3, H, W) uint8, sized as the detector's own input, padded at the right and the bottom.
            sizes: (B, 2) int64, height and width of each image without its padding, px.
            before: the boxes in force until now, in px of ``images``, one an image; None: the first time.

        Returns:
            One an image, in px of ``images``.
        """
        raise NotImplementedError

    def watch(self, views: Sequence[ViewBatch], targets: Any) -> dict[str, Any]:
        """Health of the run, logged every now and then: floats, or lists of floats."""
        return {}

    def warnings(self, watched: Mapping[str, Any]) -> str | None:
        """What to tell the user when ``watched`` looks like a collapse: what it means and what to try."""
        return None
