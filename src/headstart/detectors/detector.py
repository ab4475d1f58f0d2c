"""What every detector family offers to methods and to the engine. Methods ask for abilities, not classes."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from headstart.detectors.set_loss import SetLoss
from headstart.optim import OptimSettings
from headstart.settings import Settings

Target = dict[str, Tensor]  # torchvision's: boxes (n, 4) xyxy pixels, labels (n,) in 1..C, masks (n, H, W)
Features = dict[str, Tensor]  # level name -> (B, C, H, W), finest level first


class DetectorSettings(Settings):
    """What a detector is built from; a family adds its own. Stored in run.json, so that runs can be rebuilt."""

    name: str = Field("faster_rcnn", description="detector family")
    backbone: str = Field("resnet50", description="torchvision or timm backbone name, for example resnet18")
    num_classes: int | None = Field(
        None, description="object classes without background; None: taken from the labels when fine-tuning"
    )

    def shared(self) -> dict[str, Any]:
        """What a detector of another family is built with to take over this one's weights."""
        return {"backbone": self.backbone}


Ability = Literal["pool", "propose", "match", "query"]
"""What a detector can do for a method beyond features and the supervised loss:

* pool: :meth:`Detector.embed`, embeddings of given boxes.
* propose: :meth:`Detector.rpn_loss` and :meth:`Detector.rpn_boxes`.
* match: :meth:`Detector.match`, predictions that answer for given boxes.
* query: :meth:`Detector.queries`, a fixed number of queries that each answer with a box, and the set loss on them.
"""


@dataclass
class Matched:
    """The predictions that answer for given boxes, M of them over all images of a batch.

    Attributes:
        embeddings: (M, D) what stands in the class layer's place gives for each.
        image: (M,) int64, index of the image.
        box: (M,) int64, index of the box among those of its image.
        losses: the detector's own losses of where things are; of what they are only if asked for pseudo classes.
    """

    embeddings: Tensor
    image: Tensor
    box: Tensor
    losses: dict[str, Tensor]


@dataclass(frozen=True)
class MatchAdvice:
    """Ability ``match``: the numbers a detector is trained with where :meth:`Detector.match` is all there is to learn.

    AlignDet's (supplement A, B.2 to B.5), where it has some.

    Attributes:
        optim: optimiser and schedule.
        epochs: passes over COCO.
        batch: images a step, at most.
        most: predictions that take part, of a process's batch.
        boxes: an image's, at most; None: all.
        classes: kinds of boxes that its rule tells apart, of pseudo labels; 0: it goes by where boxes are alone.
    """

    optim: OptimSettings
    epochs: int
    batch: int
    most: int
    boxes: int | None = None
    classes: int = 0


@dataclass
class Queries:
    """What the N queries of a detector answer for B images, after each of its L decoder layers.

    Attributes:
        hidden: (L, B, N, D), what a class layer would see.
        boxes_cxcywh: (L, B, N, 4) in shares of each image without its padding.
        memory: the encoder's output, finest map first, (B, D, h, w) each.
        valid: (B, h, w) bool a map: the cell lies on the image and not on its padding.
        first: of two-stage detectors, what the encoder itself proposes at each of its S cells: logits (B, S, 1) of
            there being an object, and boxes (B, S, 4) as above.
    """

    hidden: Tensor
    boxes_cxcywh: Tensor
    memory: list[Tensor]
    valid: list[Tensor]
    first: tuple[Tensor, Tensor] | None = None


class Detector(nn.Module, ABC):
    """Wraps a library's own detector, ``module``, whose parameters and names are never changed.

    ``parts`` names its stages in the order data flows through them: backbone, neck, rpn, head, classifier, regressor,
    and what a family has besides. Methods ask for ``abilities``, never for a class.
    """

    family: ClassVar[str]
    abilities: ClassVar[frozenset[Ability]] = frozenset()

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
    def prefixes(self) -> Mapping[str, tuple[str, ...]]:
        """Part name -> prefixes of its keys in ``module.state_dict()``."""

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Part name -> submodule of ``module``; a list of them where a part is in several places."""
        found = {}
        for name in self.prefixes:
            modules = [
                piece if isinstance(piece, nn.Module) else nn.ParameterList([piece]) for piece in self.pieces(name)
            ]
            found[name] = modules[0] if len(modules) == 1 else nn.ModuleList(modules)
        return found

    def pieces(self, part: str) -> list[nn.Module | nn.Parameter]:
        """What is under each prefix of ``part``: a submodule of ``module``, or one parameter."""
        found: list[nn.Module | nn.Parameter] = []
        for prefix in self.prefixes[part]:
            owner, _, name = prefix.rstrip(".").rpartition(".")
            found.append(getattr(self.module.get_submodule(owner), name))
        return found

    @property
    def class_parts(self) -> Sequence[str]:
        """Names of the parts whose meaning depends on the classes, so that they end with them."""
        return [name for name in self.parts if name in ("classifier", "regressor", "mask_head", "mask_predictor")]

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Classes it tells apart, without background: labels are 1 to this."""

    @abstractmethod
    def features(self, images: Tensor, neck: bool = True, sizes: Tensor | None = None) -> Features:
        """Pyramid of ``images`` (B, 3, H, W), uint8 or float in [0, 1].

        ``neck=False``: the backbone's last map alone. ``sizes`` (B, 2): height and width of each image without padding.
        """

    @abstractmethod
    def loss(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """The supervised loss, as named terms. Images (3, H, W) uint8 or float in [0, 1], sizes may differ."""

    @abstractmethod
    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Per image: boxes (n, 4) xyxy in its own pixels, labels (n,), scores (n,) and, if any, masks (n, 1, H, W)."""

    @property
    @abstractmethod
    def input_px(self) -> tuple[int, int]:
        """Largest short side, and longest side, that images are resized to before the backbone sees them, px."""

    def tuning(self) -> OptimSettings:
        """The optimiser that suits fine-tuning, and pretraining of nearly all of the detector on its own loss."""
        # SGD at .02 for 16 images, as in the papers' fine-tuning (SoCo section 4.2) and the field's libraries.
        return OptimSettings(optimizer="sgd", base_lr=0.02, base_batch=16, weight_decay=1e-4)

    # ---- abilities ------------------------------------------------------------------------------------------------

    def embed(
        self,
        features: Features,
        boxes: Tensor,
        size: tuple[int, int],
        levels: Tensor | None = None,
        head: bool = True,
    ) -> Tensor:
        """Ability ``pool``: (B * K, D) of ``boxes`` (B, K, 4), xyxy in pixels of images of ``size`` (H, W)."""
        raise NotImplementedError

    def embed_width(self, neck: bool = True, head: bool = True) -> int:
        """D of :meth:`embed`."""
        raise NotImplementedError

    @property
    def anchor_px(self) -> tuple[tuple[int, ...], ...]:
        """Ability ``propose``: sides of the RPN's anchors on each map of :meth:`features`, px of its own input."""
        raise NotImplementedError

    def rpn_loss(
        self,
        features: Features,
        boxes: Sequence[Tensor],
        size: tuple[int, int],
        anchor_px: Sequence[Sequence[float]],
    ) -> dict[str, Tensor]:
        """Ability ``propose``: the RPN's loss where ``boxes`` are all there is to find; named terms.

        Args:
            features: from :meth:`features`.
            boxes: (k, 4) xyxy px, one an image; k may be 0.
            size: (H, W) of the images, px.
            anchor_px: anchor sides on each map, as many as in :attr:`anchor_px`.
        """
        raise NotImplementedError

    def rpn_boxes(
        self, features: Features, size: tuple[int, int], anchor_px: Sequence[Sequence[float]], before: int, after: int
    ) -> list[Tensor]:
        """Ability ``propose``: at most ``after`` boxes (k, 4) xyxy px an image, from ``before`` a map before NMS."""
        raise NotImplementedError

    @property
    def match_advice(self) -> MatchAdvice:
        """Ability ``match``: how a detector of this kind is trained on it."""
        raise NotImplementedError

    def projector(self, hidden: int, dim: int, classes: int = 0) -> nn.Module:
        """Ability ``match``: what stands in the class layer's place, giving ``dim`` values a prediction.

        ``classes``: that ``labels`` of targets tell apart, where the detector's rule goes by classes too
        (:attr:`MatchAdvice.classes`); 0: labels mean nothing.
        """
        raise NotImplementedError

    def match(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Sequence[Target],
        projector: nn.Module,
        most: int,
        losses: bool = True,
    ) -> Matched:
        """Ability ``match``: the predictions that, by the detector's own rule, answer for the boxes in ``targets``.

        Args:
            images: (B, 3, H, W) uint8 or float in [0, 1], padded at the right and the bottom.
            sizes: (B, 2) int64, height and width of each image without its padding, px.
            targets: one an image: ``boxes`` (k, 4) xyxy px, k may be 0, and ``labels`` (k,).
            projector: of :meth:`projector`; made for classes, ``labels`` take part in the rule, and there is a loss
                of them, ``class``.
            most: predictions kept over the whole batch, drawn at random where there are more.
            losses: off: ``Matched.losses`` stays empty.
        """
        raise NotImplementedError

    @property
    def query_count(self) -> int:
        """Ability ``query``: N."""
        raise NotImplementedError

    @property
    def query_width(self) -> int:
        """Ability ``query``: D."""
        raise NotImplementedError

    def queries(
        self, images: Tensor, sizes: Tensor | None = None, extra: Tensor | None = None, attend: Tensor | None = None
    ) -> Queries:
        """Ability ``query``: backbone, encoder and decoder.

        Args:
            images: (B, 3, H, W) uint8 or float in [0, 1], padded at the right and the bottom.
            sizes: (B, 2) int64, height and width of each image without its padding, px; None: there is none.
            extra: (B, N, D) added to what each query asks for (UP-DETR's patches).
            attend: (N, N) bool, which query may look at which in the decoder's self-attention; None: all.
        """
        raise NotImplementedError

    def class_layer(self, num_classes: int) -> nn.Module:
        """Ability ``query``: a layer (..., D) -> logits as the detector's own class layer, freshly initialised.

        Its outputs are what :attr:`set_loss` expects of ``num_classes`` classes.
        """
        raise NotImplementedError

    @property
    def set_loss(self) -> SetLoss:
        """Ability ``query``: the detector's own loss of a set of predictions, matched to objects one to one."""
        raise NotImplementedError

    def stages(self) -> list[list[nn.Module]]:
        """The backbone's layers in the order data flows through them: stem first, then one list a stage."""
        raise NotImplementedError

    def stage_map(self, images: Tensor, stage: int | None = None) -> Tensor:
        """(B, C, h, w) of ``images`` as :meth:`features` takes them: the backbone's last map of stride ``2 ** stage``.

        None: its last map. Whether the detector itself works on that map does not matter.

        Raises:
            SettingsError: the backbone has no such map.
        """
        raise NotImplementedError

    def stage_width(self, stage: int | None = None) -> int:
        """C of :meth:`stage_map`."""
        raise NotImplementedError

    # ---- weights --------------------------------------------------------------------------------------------------

    def plain_code(self) -> str | None:
        """Python code that builds ``module`` with the library alone, or None where Headstart did not build it."""
        return None

    def part_state(self, parts: Sequence[str]) -> dict[str, Tensor]:
        """The state of some ``parts``, under the key names of ``module.state_dict()``."""
        prefixes = tuple(prefix for part in parts for prefix in self.prefixes[part])
        return {k: v for k, v in self.module.state_dict().items() if k.startswith(prefixes)}

    def from_backbone(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The weights of a backbone alone, under its library's names, as this detector's; and what was moved where."""
        raise NotImplementedError

    @property
    def plain_backbone(self) -> Mapping[str, Tensor]:
        """The state of one backbone of this kind, under its library's names."""
        raise NotImplementedError

    def is_neutral(self, key: str) -> bool:
        """Whether the weight of this name, in ``module.state_dict()``, changes nothing as long as it is untrained."""
        return key.endswith("num_batches_tracked")

    def adapt(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The weights of a related detector under this one's key names, and in words what was moved where."""
        return dict(state), []


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
