"""What torchvision's detectors share: an input transform, a backbone, mostly with a feature pyramid."""

from __future__ import annotations

import contextlib
import functools
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from typing_extensions import Self

from headstart.detectors import backbones, stage_maps
from headstart.detectors.builders.backbones import Pyramid
from headstart.detectors.detector import Detector, DetectorSettings, Features, Target, as_float
from headstart.detectors.plain_code import Call, plain_code
from headstart.errors import DataError, SettingsError
from headstart.optim import OptimSettings


class TorchvisionSettings(DetectorSettings):
    composite: int = Field(
        1, ge=1, description="identical copies of the backbone, CBNetV2: each feeds the next, the last one counts"
    )
    short_side_px: int | list[int] = Field(
        800, description="images are resized to this short side, px; several: drawn at random in training"
    )
    long_side_px: int = Field(1333, description="and to at most this long side, px")
    image_mean: list[float] = Field([0.485, 0.456, 0.406], description="RGB mean, in [0, 1]")
    image_std: list[float] = Field([0.229, 0.224, 0.225], description="RGB standard deviation, in [0, 1]")

    def shared(self) -> dict[str, Any]:
        names = ("backbone", "composite", "short_side_px", "long_side_px", "image_mean", "image_std")
        return {name: getattr(self, name) for name in names}

    @abstractmethod
    def call(self) -> Call:
        """
        Raises:
            SettingsError: the backbone is not known, or does not go with the rest.
        """

    def transform_arguments(self) -> dict[str, Any]:
        return {
            "min_size": self.short_side_px,
            "max_size": self.long_side_px,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }


class PyramidSettings(TorchvisionSettings):
    fpn_channels: int = Field(256, ge=1, description="channels of every pyramid level")
    fpn_norm: Literal["bn", "none"] | None = Field(
        None, description="batch norm after the FPN's convolutions; unset: as torchvision's model"
    )

    @property
    def has_fpn_norm(self) -> bool:
        return self.fpn_norm == "bn"

    def shared(self) -> dict[str, Any]:
        own = {"fpn_channels": self.fpn_channels, "fpn_norm": "bn" if self.has_fpn_norm else "none"}
        return {**super().shared(), **own}

    def backbone_call(self, stages: Sequence[int] = (2, 3, 4, 5)) -> Call:
        """The backbone's maps C2 .. C5, those in ``stages``, and the pyramid on them."""
        body = backbones.body(self.backbone, stages, self.composite)
        return Call(Pyramid, {"body": body, "channels": self.fpn_channels, "norm": self.has_fpn_norm})


class TorchvisionDetector(Detector):
    """``module`` has torchvision's ``transform``, ``backbone`` and calling convention.

    Attributes:
        call: how Headstart built ``module``; None for a user's own object.
    """

    settings_type: ClassVar[type[TorchvisionSettings]]

    def __init__(self, module: nn.Module, settings: DetectorSettings | None, call: Call | None = None) -> None:
        super().__init__(module, settings)
        self.call = call
        self._stage_maps: dict[int | None, stage_maps.StageMap] = {}

    @classmethod
    def build(cls, settings: DetectorSettings) -> Self:
        """
        Raises:
            SettingsError: the settings are another family's, or the backbone is not known.
        """
        if not isinstance(settings, cls.settings_type):
            raise SettingsError(f"{settings.name}: expected {cls.settings_type.__name__}")
        call = settings.call()
        return cls(call(), settings, call)

    @property
    def has_fpn(self) -> bool:
        return isinstance(self.module.backbone, BackboneWithFPN)

    @property
    def prefixes(self) -> Mapping[str, tuple[str, ...]]:
        if self.has_fpn:
            return {"backbone": ("backbone.body.",), "neck": ("backbone.fpn.",)}
        return {"backbone": ("backbone.",)}

    @property
    def input_px(self) -> tuple[int, int]:
        return max(self.module.transform.min_size), self.module.transform.max_size

    def normalise(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """``(images - mean) / std`` of images in [0, 1], as the detector's own transform; uint8 counts to 255.

        ``sizes`` (B, 2), height and width: what is beyond them becomes 0, as in the detector's own batches.
        """
        transform = self.module.transform
        top = 255.0 if images.dtype == torch.uint8 else 1.0
        mean, scale = _pixel_statistics(tuple(transform.image_mean), tuple(transform.image_std), top, images.device)
        # One copy, then in place: a quarter of the time of as many new tensors.
        copy = images.to(torch.float32) if images.dtype == torch.uint8 else images.clone()
        copy.sub_(mean).mul_(scale)
        if sizes is not None:
            for image, (height, width) in zip(copy, sizes.tolist(), strict=True):
                image[:, height:] = 0
                image[:, :, width:] = 0
        return copy

    def maps(self, images: Tensor, sizes: Tensor | None = None) -> Features:
        """All maps the detector itself works on."""
        maps = self.module.backbone(self.normalise(images, sizes))
        return {"0": maps} if isinstance(maps, Tensor) else maps

    def features(self, images: Tensor, neck: bool = True, sizes: Tensor | None = None) -> Features:
        if self.has_fpn and not neck:
            name, last = list(self.module.backbone.body(self.normalise(images, sizes)).items())[-1]
            return {name: last}
        return self.maps(images, sizes)

    def loss(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        return self.module([as_float(image) for image in images], list(targets))

    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return self.module([as_float(image) for image in images])

    @property
    def body(self) -> nn.Module:
        return self.module.backbone.body if self.has_fpn else self.module.backbone

    def stages(self) -> list[list[nn.Module]]:
        return backbones.stages(self.body)

    def stage_map(self, images: Tensor, stage: int | None = None) -> Tensor:
        return stage_maps.run(self.body, self.normalise(images), self._found(stage))

    def stage_width(self, stage: int | None = None) -> int:
        return self._found(stage).width

    def _found(self, stage: int | None) -> stage_maps.StageMap:
        if stage not in self._stage_maps:
            self._stage_maps[stage] = stage_maps.find(self.body, stage)
        return self._stage_maps[stage]

    def from_backbone(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        (prefix,) = self.prefixes["backbone"]
        placed, moved = backbones.place(self.body, state)
        own = self.body.state_dict()
        return {prefix + key if key in own else key: value for key, value in placed.items()}, moved

    def is_neutral(self, key: str) -> bool:
        """The links of a composite backbone begin at zero."""
        return super().is_neutral(key) or (key.startswith("backbone.body.") and ".links." in f".{key}")

    @property
    def plain_backbone(self) -> Mapping[str, Tensor]:
        return backbones.one_of(self.body).state_dict()

    def plain_code(self) -> str | None:
        return None if self.call is None else plain_code(self.call)

    def adapt(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Pyramids of another number of levels: both count from C5, the coarsest, which all have."""
        block = re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.)(\d+)(\..*)")
        found = {int(m[2]) for key in state if (m := block.fullmatch(key))}
        if not found or not self.has_fpn:
            return dict(state), []
        theirs, ours = max(found) + 1, len(self.module.backbone.fpn.inner_blocks)
        if theirs == ours:
            return dict(state), []
        adapted = {}
        for key, value in state.items():
            m = block.fullmatch(key)
            level = int(m[2]) + ours - theirs if m else 0
            if m is None:
                adapted[key] = value
            elif level >= 0:
                adapted[f"{m[1]}{level}{m[3]}"] = value
            else:
                adapted[f"{key} (a finer level than any here)"] = value
        return adapted, [f"FPN blocks moved by {ours - theirs}: {theirs} levels up to C5 in the file, {ours} here"]


def shapes_in_float32(maps: Sequence[Tensor]) -> list[Tensor]:
    """Stand-ins without memory of their own, for what asks maps for nothing but shape, device and dtype.

    torchvision's anchors take the dtype of the maps, and in bfloat16 or float16 they are pixels off.
    """
    return [torch.zeros((), device=map_.device).expand(map_.shape) for map_ in maps]


@contextlib.contextmanager
def float32_anchors(generator: nn.Module) -> Iterator[None]:
    """torchvision's ``generator`` makes its anchors in float32, also under autocast."""
    hook = generator.register_forward_pre_hook(lambda module, inputs: (inputs[0], shapes_in_float32(inputs[1])))
    try:
        yield
    finally:
        hook.remove()


def with_area(targets: Sequence[Target]) -> None:
    """
    Raises:
        DataError: a box of ``targets`` has none.
    """
    for number, target in enumerate(targets):
        empty = (target["boxes"][:, 2:] <= target["boxes"][:, :2]).any(dim=1)
        if empty.any():
            box = target["boxes"][empty][0].tolist()
            raise DataError(f"image {number} of the batch: box {box} has no area; expected x0 < x1 and y0 < y1, px")


def with_classes(targets: Sequence[Target], classes: int) -> None:
    """
    Raises:
        DataError: a label of ``targets`` is none of 1 .. ``classes``.
    """
    labels = torch.cat([target["labels"] for target in targets])
    wrong = (labels < 1) | (labels > classes)
    if wrong.any():
        counts = [len(target["labels"]) for target in targets]
        number = next(i for i, own in enumerate(wrong.split(counts)) if own.any())
        raise DataError(
            f"image {number} of the batch: label {int(labels[wrong][0])}; expected 1 to {classes}, its classes"
        )


def image_list(tensors: Tensor, sizes: Tensor | None) -> ImageList:
    shapes = [(tensors.shape[-2], tensors.shape[-1])] * len(tensors) if sizes is None else sizes.tolist()
    return ImageList(tensors, [(int(height), int(width)) for height, width in shapes])


def stepwise_sgd(base_lr: float) -> OptimSettings:
    """SGD at so much for 16 images, with the drops of COCO's 12 epochs (AlignDet's released configurations)."""
    return OptimSettings(
        optimizer="sgd",
        base_lr=base_lr,
        base_batch=16,
        weight_decay=1e-4,
        warmup_steps=500,
        schedule="steps",
        drops=[8 / 12, 11 / 12],
    )


def at_most(count: int, most: int, device: torch.device) -> Tensor:
    """Indices of ``min(count, most)`` out of ``count``, in order, drawn at random where some are left out."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.randperm(count, device=device)[:most].sort().values


@functools.lru_cache(maxsize=16)
def _pixel_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], top: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(mean, 1 / std), each (3, 1, 1), of pixels in [0, ``top``]. Kept, since each copy to a device waits for it."""
    with torch.inference_mode(False):
        values = torch.tensor([[m * top for m in mean], [1 / (s * top) for s in std]], device=device)
    return values[0, :, None, None], values[1, :, None, None]
