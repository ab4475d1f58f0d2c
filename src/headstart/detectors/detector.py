"""What every detector family offers to methods and to the engine. Methods ask for abilities, not classes."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from headstart.settings import Settings

Target = dict[str, Tensor]  # torchvision's: boxes (n, 4) xyxy pixels, labels (n,) in 1..C, masks (n, H, W)
Features = dict[str, Tensor]  # level name -> (B, C, H, W), finest level first


class DetectorSettings(Settings):
    """What a detector is built from; a family adds its own. Stored in run.json, so that runs can be rebuilt."""

    name: str = Field("faster_rcnn", description="detector family")
    backbone: str = Field("resnet50", description="torchvision backbone name, for example resnet18")
    num_classes: int | None = Field(
        None, description="object classes without background; None: taken from the labels when fine-tuning"
    )


class Detector(nn.Module, ABC):
    """Wraps a library's own detector, ``module``, whose parameters and names are never changed.

    ``parts`` names its stages (backbone, neck, rpn, head, ...) in the order data flows through them.
    """

    family: ClassVar[str]

    def __init__(self, module: nn.Module, settings: DetectorSettings | None) -> None:
        super().__init__()
        self.module = module
        self.settings = settings

    @classmethod
    @abstractmethod
    def build(cls, settings: DetectorSettings) -> Detector:
        """A detector with random weights."""

    @classmethod
    @abstractmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether a user's own ``module`` belongs to this family."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """Part name -> submodule of ``module``."""

    @property
    @abstractmethod
    def prefixes(self) -> Mapping[str, str]:
        """Part name -> prefix of its keys in ``module.state_dict()``."""

    @abstractmethod
    def features(self, images: Tensor, neck: bool = True) -> Features:
        """Pyramid of ``images`` (B, 3, H, W), uint8 or float in [0, 1].

        ``neck=False``: the backbone's last map alone.
        """

    @abstractmethod
    def embed(
        self,
        features: Features,
        boxes: Tensor,
        size: tuple[int, int],
        levels: Tensor | None = None,
        head: bool = True,
    ) -> Tensor:
        """Object embeddings (B * K, D) of ``boxes`` (B, K, 4), xyxy in pixels of images of ``size`` (H, W)."""

    @abstractmethod
    def embed_width(self, neck: bool = True, head: bool = True) -> int:
        """D of :meth:`embed`."""

    @abstractmethod
    def loss(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """The supervised loss, as named terms. Images (3, H, W) uint8 or float in [0, 1], sizes may differ."""

    @abstractmethod
    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Per image: boxes (n, 4) xyxy in its own pixels, labels (n,), scores (n,) and, if any, masks (n, 1, H, W)."""

    def plain_code(self) -> str | None:
        """Python code that builds ``module`` with the library alone, or None where Headstart did not build it."""
        return None

    def part_state(self, parts: Sequence[str]) -> dict[str, Tensor]:
        """The state of some ``parts``, under the key names of ``module.state_dict()``."""
        prefixes = tuple(self.prefixes[part] for part in parts)
        return {k: v for k, v in self.module.state_dict().items() if k.startswith(prefixes)}


def as_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [0, 1]; floats pass. Batches travel as uint8: a quarter of the bytes."""
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images


@contextlib.contextmanager
def lent(detector: Detector) -> Iterator[None]:
    """Afterwards the detector is as it came but for its weights: device, mode, and what may be trained."""
    grads = [p.requires_grad for p in detector.parameters()]
    training, device = detector.module.training, next(detector.parameters()).device
    try:
        yield
    finally:
        for parameter, grad in zip(detector.parameters(), grads, strict=True):
            parameter.requires_grad_(grad)
            parameter.grad = None
        detector.to(device, memory_format=torch.contiguous_format)
        detector.train(training)
