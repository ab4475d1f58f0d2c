"""Faster R-CNN and Mask R-CNN, with FPN or on C4, as torchvision builds them.

With the default settings and ``backbone="resnet50"`` the module is torchvision's own
``fasterrcnn_resnet50_fpn_v2`` / ``maskrcnn_resnet50_fpn_v2`` (FPN with batch norm, 4 convolutions and 1 fully
connected layer in the box head), with ``head="2fc"`` it is ``..._fpn`` (no norm in the FPN, two fully connected
layers): same parameter names, same shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torchvision
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign, roi_align
from typing_extensions import Self

from headstart import distributed
from headstart.detectors.detector import Detector, DetectorSettings, Features, Target, as_float
from headstart.errors import SettingsError


class RCNNSettings(DetectorSettings):
    name: Literal["faster_rcnn", "mask_rcnn"] = Field("faster_rcnn", description="detector family")
    neck: Literal["fpn", "c4"] = Field(
        "fpn", description="fpn: pyramid P2..P5; c4: one map, the backbone's 5th block is the head"
    )
    fpn_channels: int = Field(256, ge=1, description="channels of every pyramid level and head convolution")
    head: Literal["4conv1fc", "2fc"] = Field(
        "4conv1fc",
        description="box head: 4conv1fc (torchvision's v2 models, SoCo) or 2fc (torchvision's first models)",
    )
    fpn_norm: Literal["bn", "none"] | None = Field(
        None, description="batch norm after the FPN's convolutions; unset: bn with 4conv1fc, none with 2fc"
    )
    head_width: int = Field(1024, ge=1, description="width of the box head's fully connected layers")
    short_side_px: int | list[int] = Field(
        800, description="images are resized to this short side, px; several: drawn at random in training"
    )
    long_side_px: int = Field(1333, description="and to at most this long side, px")
    anchor_px: list[int] = Field(
        [32, 64, 128, 256, 512],
        description="anchor sides, px; one a pyramid level, the last on the pooled level",
    )
    rois_train: int = Field(512, ge=1, description="boxes an image the box head is trained on")
    proposals_train: int = Field(2000, ge=1, description="boxes an image the RPN hands on in training")
    proposals_test: int = Field(1000, ge=1, description="boxes an image the RPN hands on in evaluation")
    image_mean: list[float] = Field([0.485, 0.456, 0.406], description="RGB mean, in [0, 1]")
    image_std: list[float] = Field([0.229, 0.224, 0.225], description="RGB standard deviation, in [0, 1]")

    @model_validator(mode="after")
    def _one_anchor_size_a_level(self) -> Self:
        if self.neck == "fpn" and len(self.anchor_px) != 5:
            raise ValueError("anchor_px: an FPN has 5 levels (P2..P5 and one pooled), so it takes 5 sides")
        return self


class RCNN(Detector):
    family = "rcnn"
    settings_type = RCNNSettings
    module: FasterRCNN

    @classmethod
    def build(cls, settings: DetectorSettings) -> RCNN:
        """
        Raises:
            SettingsError: the backbone is not a torchvision ResNet.
        """
        if not isinstance(settings, RCNNSettings):
            raise SettingsError(f"{settings.name}: expected RCNNSettings")
        module = _c4(settings) if settings.neck == "c4" else _fpn(settings)
        return cls(module, settings)

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, FasterRCNN)  # MaskRCNN is a subclass

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        return {name: self.module.get_submodule(prefix.rstrip(".")) for name, prefix in self.prefixes.items()}

    @property
    def prefixes(self) -> Mapping[str, str]:
        if isinstance(self.module.backbone, BackboneWithFPN):
            prefixes = {"backbone": "backbone.body.", "neck": "backbone.fpn."}
        else:
            prefixes = {"backbone": "backbone."}
        prefixes |= {"rpn": "rpn.", "head": "roi_heads.box_head.", "predictor": "roi_heads.box_predictor."}
        if isinstance(self.module, MaskRCNN):
            prefixes |= {"mask_head": "roi_heads.mask_head.", "mask_predictor": "roi_heads.mask_predictor."}
        return prefixes

    def normalise(self, images: Tensor) -> Tensor:
        """``(images - mean) / std`` of images in [0, 1], as the detector's own transform; uint8 counts to 255."""
        transform = self.module.transform
        top = 255.0 if images.dtype == torch.uint8 else 1.0
        mean, scale = _pixel_statistics(tuple(transform.image_mean), tuple(transform.image_std), top, images.device)
        # One copy, then in place: a quarter of the time of as many new tensors.
        copy = images.to(torch.float32) if images.dtype == torch.uint8 else images.clone()
        return copy.sub_(mean).mul_(scale)

    def features(self, images: Tensor, neck: bool = True) -> Features:
        """P2..P5 (stride 4 to 32); C4 detectors: one map. ``neck=False``: the backbone's last map alone."""
        images = self.normalise(images)
        backbone = self.module.backbone
        if isinstance(backbone, BackboneWithFPN) and not neck:
            name, last = list(backbone.body(images).items())[-1]
            return {name: last}
        features = backbone(images)
        features = {"0": features} if isinstance(features, Tensor) else features
        return {name: features[name] for name in self._pooled_levels(features)}

    def _pooled_levels(self, features: Features) -> list[str]:
        """The levels boxes are pooled from: not the extra one (P6, "pool") that only the RPN sees."""
        return [name for name in self.module.roi_heads.box_roi_pool.featmap_names if name in features]

    def embed(
        self,
        features: Features,
        boxes: Tensor,
        size: tuple[int, int],
        levels: Tensor | None = None,
        head: bool = True,
    ) -> Tensor:
        """SoCo Eq. 1 without ``f^I``: ``f^H(RoIAlign(features, boxes))``.

        Args:
            features: from :meth:`features`, finest first.
            boxes: (B, K, 4) xyxy in pixels of the images the features came from.
            size: (H, W) of those images, px; gives each level's stride.
            levels: (B, K) index of the level each box is pooled from; None: FPN's own rule (Lin et al., Eq. 1),
                which the detector uses too. Indices past the last level mean the last.
            head: False: the pooled features are averaged instead (SoCo Table 4, without head).

        Returns:
            (B * K, D). RoIAlign is the aligned one (half-pixel shift), as in the papers; torchvision's
            detectors themselves use the older rule.
        """
        maps = list(features.values())
        scales = [2.0 ** round(math.log2(map_.shape[-1] / size[1])) for map_ in maps]
        pooled_px = self.module.roi_heads.box_roi_pool.output_size
        ratio = max(0, int(self.module.roi_heads.box_roi_pool.sampling_ratio))
        batch, count = boxes.shape[:2]
        index = torch.arange(batch, device=boxes.device).repeat_interleave(count)
        rois = torch.cat([index[:, None].to(boxes.dtype), boxes.reshape(-1, 4)], dim=1)
        if len(maps) == 1:
            pooled = roi_align(maps[0], rois, pooled_px, scales[0], ratio, aligned=True)
        else:
            if levels is None:
                levels = fpn_levels(boxes)
            levels = levels.reshape(-1).clamp(max=len(maps) - 1)
            order = levels.argsort(stable=True)
            counts = (levels[:, None] == torch.arange(len(maps), device=levels.device)).sum(dim=0).float()
            # A level without boxes is left out: the way back through it costs as much as through any other.
            # Batch norms over all processes meet on that way too, so all have to leave out the same levels.
            anywhere = distributed.mean(counts) if torch.is_grad_enabled() else counts
            here, there = torch.stack([counts, anywhere]).tolist()  # the only wait for the device
            used = [level for level, n in enumerate(there) if n or not self._has_fpn or not any(there)]
            pieces = rois[order].split([int(n) for n in here])
            pooled = torch.cat([roi_align(maps[i], pieces[i], pooled_px, scales[i], ratio, aligned=True) for i in used])
            pooled = pooled[order.argsort()]
            if torch.is_grad_enabled() and len(used) < len(maps):
                pooled = pooled + self._nothing_from_levels_but(used)
        return self.module.roi_heads.box_head(pooled) if head else pooled.mean(dim=(2, 3))

    @property
    def _has_fpn(self) -> bool:
        return isinstance(self.module.backbone, BackboneWithFPN)

    def _nothing_from_levels_but(self, used: Sequence[int]) -> Tensor:
        """Zero, with the layers that only lead to other levels in its graph.

        Their gradient is then zero instead of absent, which DistributedDataParallel would not forgive, and
        with which optimisers would not move the parameter at all.
        """
        fpn = self.module.backbone.fpn
        idle = [block for level, block in enumerate(fpn.layer_blocks) if level not in used]
        idle += fpn.inner_blocks[: min(used)]  # finer ones feed no level that is used
        one_each = [p[(0,) * p.ndim] for block in idle for p in block.parameters()]
        return 0 * torch.stack(one_each).sum()

    def embed_width(self, neck: bool = True, head: bool = True) -> int:
        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                device = next(self.module.parameters()).device
                features = self.features(torch.zeros(1, 3, 64, 64, device=device), neck=neck)
                boxes = torch.tensor([[[0.0, 0.0, 64.0, 64.0]]], device=device)
                return self.embed(features, boxes, (64, 64), head=head).shape[1]
        finally:
            self.module.train(training)

    def loss(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        return self.module([as_float(image) for image in images], list(targets))

    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return self.module([as_float(image) for image in images])

    def plain_code(self) -> str | None:
        return _plain_code(self.settings) if isinstance(self.settings, RCNNSettings) else None


@functools.lru_cache(maxsize=16)
def _pixel_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], top: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(mean, 1 / std), each (3, 1, 1), of pixels in [0, ``top``]. Kept, since each copy to a device waits for it."""
    with torch.inference_mode(False):
        values = torch.tensor([[m * top for m in mean], [1 / (s * top) for s in std]], device=device)
    return values[0, :, None, None], values[1, :, None, None]


def fpn_levels(boxes: Tensor) -> Tensor:
    """Level index 0..3 (P2..P5) of ``boxes`` (..., 4): ``floor(4 + log2(sqrt(wh) / 224)) - 2``, FPN's Eq. 1."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1).sqrt()
    return (torch.floor(4 + torch.log2(sides / 224 + 1e-6)) - 2).clamp(0, 3).long()


def _resnet(settings: RCNNSettings) -> ResNet:
    names = torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])
    if settings.backbone not in names:
        raise SettingsError(f"--backbone {settings.backbone}: not known; choose one of {', '.join(names)}")
    return torchvision.models.get_model(settings.backbone, weights=None)


def _fpn_has_norm(settings: RCNNSettings) -> bool:
    if settings.fpn_norm is None:
        return settings.head == "4conv1fc"
    return settings.fpn_norm == "bn"


def _common(settings: RCNNSettings) -> dict:
    return {
        "min_size": settings.short_side_px,
        "max_size": settings.long_side_px,
        "image_mean": settings.image_mean,
        "image_std": settings.image_std,
        "box_batch_size_per_image": settings.rois_train,
        "rpn_post_nms_top_n_train": settings.proposals_train,
        "rpn_post_nms_top_n_test": settings.proposals_test,
    }


def _fpn(settings: RCNNSettings) -> FasterRCNN:
    v2 = settings.head == "4conv1fc"
    norm = nn.BatchNorm2d if v2 else None
    fpn_norm = nn.BatchNorm2d if _fpn_has_norm(settings) else None
    resnet = _resnet(settings)
    widths = [resnet.inplanes // 8 * 2**stage for stage in range(4)]
    layers = {f"layer{stage + 1}": str(stage) for stage in range(4)}
    channels = settings.fpn_channels
    backbone = BackboneWithFPN(resnet, layers, widths, channels, norm_layer=fpn_norm)
    anchors = AnchorGenerator(
        tuple((side,) for side in settings.anchor_px), ((0.5, 1.0, 2.0),) * len(settings.anchor_px)
    )
    rpn_head = RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2 if v2 else 1)
    box_head: nn.Module
    if v2:
        box_head = FastRCNNConvFCHead(
            (channels, 7, 7), [channels] * 4, [settings.head_width], norm_layer=nn.BatchNorm2d
        )
    else:
        box_head = TwoMLPHead(channels * 7**2, settings.head_width)
    classes = (settings.num_classes or 90) + 1  # torchvision counts the background
    predictor = FastRCNNPredictor(settings.head_width, classes)
    parts = {"rpn_anchor_generator": anchors, "rpn_head": rpn_head, "box_head": box_head}
    parts["box_predictor"] = predictor
    if settings.name == "mask_rcnn":
        mask_head = MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm)
        mask_predictor = MaskRCNNPredictor(channels, channels, classes)
        return MaskRCNN(backbone, mask_head=mask_head, mask_predictor=mask_predictor, **parts, **_common(settings))
    return FasterRCNN(backbone, **parts, **_common(settings))


def _c4(settings: RCNNSettings) -> FasterRCNN:
    resnet = _resnet(settings)
    layer4, width = resnet.layer4, resnet.inplanes
    backbone = IntermediateLayerGetter(resnet, {"layer3": "0"})
    backbone.out_channels = width // 2
    anchors = AnchorGenerator((tuple(settings.anchor_px),), ((0.5, 1.0, 2.0),))
    classes = (settings.num_classes or 90) + 1
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(width // 2, anchors.num_anchors_per_location()[0]),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 14, 2),
        "box_head": nn.Sequential(layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(width, classes),
    }
    if settings.name == "mask_rcnn":  # boxes and masks share the 5th block, as in detectron2's C4 models
        return MaskRCNN(
            backbone,
            mask_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),
            mask_head=nn.Sequential(layer4),
            mask_predictor=MaskRCNNPredictor(width, 256, classes),
            **parts,
            **_common(settings),
        )
    return FasterRCNN(backbone, **parts, **_common(settings))


def _plain_code(s: RCNNSettings) -> str:
    """The same module from torchvision alone. ``tests/detectors`` runs this text and compares the two."""
    mask = s.name == "mask_rcnn"
    cls = "MaskRCNN" if mask else "FasterRCNN"
    classes = (s.num_classes or 90) + 1
    sizes = f"min_size={s.short_side_px}, max_size={s.long_side_px}"
    stats = f"image_mean={s.image_mean}, image_std={s.image_std}"
    counts = (
        f"box_batch_size_per_image={s.rois_train}, rpn_post_nms_top_n_train={s.proposals_train}, "
        f"rpn_post_nms_top_n_test={s.proposals_test}"
    )
    lines = [
        "from torch import nn",
        "from torchvision.models import get_model",
        f"from torchvision.models.detection import {cls}",
        "from torchvision.models.detection.anchor_utils import AnchorGenerator",
        "from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead",
        "from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor",
        "from torchvision.models.detection.rpn import RPNHead",
        "",
        f"num_classes = {classes}  # background included",
        f'resnet = get_model("{s.backbone}", weights=None)',
        "width = resnet.inplanes",
    ]
    if s.neck == "c4":
        lines += [
            "from torchvision.models._utils import IntermediateLayerGetter",
            "from torchvision.ops import MultiScaleRoIAlign",
            "layer4 = resnet.layer4",
            'backbone = IntermediateLayerGetter(resnet, {"layer3": "0"})',
            "backbone.out_channels = width // 2",
            f"anchors = AnchorGenerator(({tuple(s.anchor_px)},), ((0.5, 1.0, 2.0),))",
            "parts = dict(",
            "    rpn_anchor_generator=anchors,",
            "    rpn_head=RPNHead(width // 2, anchors.num_anchors_per_location()[0]),",
            '    box_roi_pool=MultiScaleRoIAlign(["0"], 14, 2),',
            "    box_head=nn.Sequential(layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten()),",
            "    box_predictor=FastRCNNPredictor(width, num_classes),",
            ")",
        ]
        if mask:
            lines += [
                'parts["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 14, 2)',
                'parts["mask_head"] = nn.Sequential(layer4)',
                'parts["mask_predictor"] = MaskRCNNPredictor(width, 256, num_classes)',
            ]
    else:
        v2 = s.head == "4conv1fc"
        norm = "nn.BatchNorm2d" if v2 else "None"
        fpn_norm = "nn.BatchNorm2d" if _fpn_has_norm(s) else "None"
        c, w = s.fpn_channels, s.head_width
        anchors = tuple((side,) for side in s.anchor_px)
        box_head = (
            f"FastRCNNConvFCHead(({c}, 7, 7), [{c}] * 4, [{w}], norm_layer=nn.BatchNorm2d)"
            if v2
            else f"TwoMLPHead({c} * 7 * 7, {w})"
        )
        lines += [
            "from torchvision.models.detection.backbone_utils import BackboneWithFPN",
            'layers = {f"layer{i + 1}": str(i) for i in range(4)}',
            "widths = [width // 8 * 2**i for i in range(4)]",
            f"backbone = BackboneWithFPN(resnet, layers, widths, {c}, norm_layer={fpn_norm})",
            f"anchors = AnchorGenerator({anchors}, ((0.5, 1.0, 2.0),) * {len(anchors)})",
            "parts = dict(",
            "    rpn_anchor_generator=anchors,",
            f"    rpn_head=RPNHead({c}, anchors.num_anchors_per_location()[0], conv_depth={2 if v2 else 1}),",
            f"    box_head={box_head},",
            f"    box_predictor=FastRCNNPredictor({w}, num_classes),",
            ")",
        ]
        if mask:
            lines += [
                f'parts["mask_head"] = MaskRCNNHeads({c}, [{c}] * 4, 1, norm_layer={norm})',
                f'parts["mask_predictor"] = MaskRCNNPredictor({c}, {c}, num_classes)',
            ]
    lines += [
        f"detector = {cls}(",
        f"    backbone, {sizes},",
        f"    {stats},",
        f"    {counts},",
        "    **parts,",
        ")",
    ]
    return "\n".join(lines) + "\n"
