"""Faster R-CNN and Mask R-CNN, with FPN or on C4, as torchvision builds them.

With the default settings and ``backbone="resnet50"`` the module is torchvision's own
``fasterrcnn_resnet50_fpn_v2`` / ``maskrcnn_resnet50_fpn_v2`` (FPN with batch norm, 4 convolutions and 1 fully
connected layer in the box head), with ``head="2fc"`` it is ``..._fpn`` (no norm in the FPN, two fully connected
layers): same parameter names, same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import roi_align
from typing_extensions import Self

from headstart import distributed
from headstart.detectors import backbones
from headstart.detectors.builders.rcnn import rcnn, rcnn_c4
from headstart.detectors.detector import Features, MatchAdvice, Matched, Target
from headstart.detectors.plain_code import Call
from headstart.detectors.pyramid import (
    PyramidSettings,
    TorchvisionDetector,
    at_most,
    float32_anchors,
    image_list,
    shapes_in_float32,
    stepwise_sgd,
)
from headstart.errors import SettingsError


class RegionSettings(PyramidSettings):
    """What all detectors share that look again at the boxes of an RPN, on a pyramid."""

    head: Literal["4conv1fc", "2fc"] = Field(
        "4conv1fc",
        description="box head: 4conv1fc (torchvision's v2 models, SoCo) or 2fc (torchvision's first models)",
    )
    fpn_norm: Literal["bn", "none"] | None = Field(
        None, description="batch norm after the FPN's convolutions; unset: bn with 4conv1fc, none with 2fc"
    )
    head_width: int = Field(1024, ge=1, description="width of the box head's fully connected layers")
    anchor_px: list[int] = Field(
        [32, 64, 128, 256, 512],
        description="anchor sides, px; one a pyramid level, the last on the pooled level",
    )
    rois_train: int = Field(512, ge=1, description="boxes an image the box head is trained on")
    proposals_train: int = Field(2000, ge=1, description="boxes an image the RPN hands on in training")
    proposals_test: int = Field(1000, ge=1, description="boxes an image the RPN hands on in evaluation")

    @model_validator(mode="after")
    def _one_anchor_size_a_level(self) -> Self:
        if self.on_pyramid and len(self.anchor_px) != 5:
            raise ValueError("anchor_px: an FPN has 5 levels (P2..P5 and one pooled), so it takes 5 sides")
        return self

    @property
    def on_pyramid(self) -> bool:
        return True

    @property
    def has_fpn_norm(self) -> bool:
        return self.head == "4conv1fc" if self.fpn_norm is None else self.fpn_norm == "bn"

    def arguments(self) -> dict[str, Any]:
        """Those that all builders take."""
        return {
            "num_classes": (self.num_classes or 90) + 1,  # torchvision counts the background
            "anchor_px": self.anchor_px,
            **self.transform_arguments(),
            "box_batch_size_per_image": self.rois_train,
            "rpn_post_nms_top_n_train": self.proposals_train,
            "rpn_post_nms_top_n_test": self.proposals_test,
        }

    def pyramid_arguments(self) -> dict[str, Any]:
        """Those of builders on a pyramid."""
        return {"backbone": self.backbone_call(), "head": self.head, "head_width": self.head_width}


class RCNNSettings(RegionSettings):
    name: Literal["faster_rcnn", "mask_rcnn"] = Field("faster_rcnn", description="detector family")
    neck: Literal["fpn", "c4"] = Field(
        "fpn", description="fpn: pyramid P2..P5; c4: one map, the backbone's 5th block is the head"
    )

    @property
    def on_pyramid(self) -> bool:
        return self.neck == "fpn"

    def call(self) -> Call:
        """
        Raises:
            SettingsError: C4 with a backbone that is not a torchvision ResNet, or with several.
        """
        arguments = {**self.arguments(), "masks": self.name == "mask_rcnn"}
        if self.on_pyramid:
            return Call(rcnn, {**self.pyramid_arguments(), **arguments})
        if self.backbone not in backbones.resnets():
            raise SettingsError(
                f"--backbone {self.backbone}: detector.neck=c4 needs one of {', '.join(backbones.resnets())}"
            )
        if self.composite > 1:
            raise SettingsError(f"detector.composite={self.composite}: needs a pyramid, detector.neck=fpn")
        return Call(rcnn_c4, {"name": self.backbone, **arguments})


class RCNN(TorchvisionDetector):
    family = "rcnn"
    abilities = frozenset({"pool", "propose", "match"})
    settings_type: ClassVar[type[RegionSettings]] = RCNNSettings
    module: FasterRCNN

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, FasterRCNN)  # MaskRCNN is a subclass

    @property
    def prefixes(self) -> Mapping[str, tuple[str, ...]]:
        predictor = "roi_heads.box_predictor."
        prefixes = {
            **super().prefixes,
            "rpn": ("rpn.",),
            "head": ("roi_heads.box_head.",),
            "classifier": (f"{predictor}cls_score.",),
            "regressor": (f"{predictor}bbox_pred.",),
        }
        if isinstance(self.module, MaskRCNN):
            prefixes |= {"mask_head": ("roi_heads.mask_head.",), "mask_predictor": ("roi_heads.mask_predictor.",)}
        return prefixes

    @property
    def box_head(self) -> nn.Module:
        return self.module.roi_heads.box_head

    @property
    def box_predictor(self) -> nn.Module:
        return self.module.roi_heads.box_predictor

    @property
    def num_classes(self) -> int:
        return self.box_predictor.cls_score.out_features - 1

    def features(self, images: Tensor, neck: bool = True, sizes: Tensor | None = None) -> Features:
        """P2..P5 (stride 4 to 32); C4 detectors: one map. ``neck=False``: the backbone's last map alone."""
        maps = super().features(images, neck, sizes)
        return maps if not neck else {name: maps[name] for name in self._pooled_levels(maps)}

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
            used = [level for level, n in enumerate(there) if n or not self.has_fpn or not any(there)]
            pieces = rois[order].split([int(n) for n in here])
            pooled = torch.cat([roi_align(maps[i], pieces[i], pooled_px, scales[i], ratio, aligned=True) for i in used])
            pooled = pooled[order.argsort()]
            if torch.is_grad_enabled() and len(used) < len(maps):
                pooled = pooled + self._nothing_from_levels_but(used)
        return self.box_head(pooled) if head else pooled.mean(dim=(2, 3))

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

    def from_backbone(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """On C4 the backbone's 5th block is the head."""
        placed, moved = super().from_backbone(state)
        block, head = "layer4.", "roi_heads.box_head.0."
        if self.has_fpn or not any(key.startswith(block) for key in placed):
            return placed, moved
        placed = {head + k.removeprefix(block) if k.startswith(block) else k: v for k, v in placed.items()}
        return placed, [*moved, f"{block}* is the head: {head}*"]

    def loss(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        with float32_anchors(self.module.rpn.anchor_generator):
            return super().loss(images, targets)

    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        with float32_anchors(self.module.rpn.anchor_generator):
            return super().detect(images)

    # ---- RPN ------------------------------------------------------------------------------------------------------

    @property
    def anchor_px(self) -> tuple[tuple[int, ...], ...]:
        sizes = self.module.rpn.anchor_generator.sizes
        pooled = len(self.module.backbone.fpn.layer_blocks) if self.has_fpn else 1
        return tuple(tuple(level) for level in sizes[:pooled])

    def _rpn(self, anchor_px: Sequence[Sequence[float]], before: int = 0, after: int = 0) -> RegionProposalNetwork:
        """The detector's RPN layers on other anchors, with Faster R-CNN's thresholds."""
        ratios = self.module.rpn.anchor_generator.aspect_ratios[: len(anchor_px)]
        counts = [{"training": n, "testing": n} for n in (before, after)]
        return RegionProposalNetwork(
            AnchorGenerator(tuple(tuple(level) for level in anchor_px), ratios),
            self.module.rpn.head,
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=counts[0],
            post_nms_top_n=counts[1],
            nms_thresh=0.7,
        )

    def rpn_loss(
        self,
        features: Features,
        boxes: Sequence[Tensor],
        size: tuple[int, int],
        anchor_px: Sequence[Sequence[float]],
    ) -> dict[str, Tensor]:
        """ADePT Eq. 1: 256 anchors an image, up to half of them positive; smooth L1 with torchvision's beta of 1/9.

        An anchor is positive where its IoU with a box is the box's highest, or at least .7; negative below .3.
        """
        rpn = self._rpn(anchor_px)
        maps = list(features.values())
        images = ImageList(maps[0].new_empty(0, 3, *size), [size] * len(boxes))
        objectness, deltas = concat_box_prediction_layers(*rpn.head(maps))
        return _rpn_losses(rpn, objectness, deltas, rpn.anchor_generator(images, shapes_in_float32(maps)), boxes)

    @torch.no_grad()
    def rpn_boxes(
        self, features: Features, size: tuple[int, int], anchor_px: Sequence[Sequence[float]], before: int, after: int
    ) -> list[Tensor]:
        rpn = self._rpn(anchor_px, before, after)
        rpn.training = False  # of its own: its layers are the detector's, and stay in their mode
        first = next(iter(features.values()))
        with float32_anchors(rpn.anchor_generator):
            boxes, _ = rpn(ImageList(first.new_empty(0, 3, *size), [size] * len(first)), features)
        return boxes

    # ---- matching -------------------------------------------------------------------------------------------------

    @property
    def match_advice(self) -> MatchAdvice:
        return MatchAdvice(stepwise_sgd(0.02), epochs=12, batch=16, most=4096)

    def projector(self, hidden: int, dim: int, classes: int = 0) -> nn.Module:
        """AlignDet's for regions: linear, ReLU, linear."""
        width = self.box_predictor.cls_score.in_features
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))

    def match(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Sequence[Target],
        projector: nn.Module,
        most: int,
        losses: bool = True,
    ) -> Matched:
        """The RPN's boxes, and the targets themselves, whose IoU with a target is at least .5 (torchvision's rule).

        All boxes count as of one class: the box layer's columns of class 1 are the class-agnostic ones.
        """
        heads = self.module.roi_heads
        maps, rois, found = self.regions(images, sizes, targets, losses)
        rois, matched = positives(heads, rois, targets, most)
        shapes = image_list(images, sizes).image_sizes
        hidden = self.box_head(heads.box_roi_pool(maps, stand_in(rois, sizes), shapes))
        hidden = hidden[: sum(len(r) for r in rois)]
        if losses:
            layer = self.box_predictor.bbox_pred
            rows = slice(4, 8) if layer.out_features > 4 else slice(0, 4)  # a user's may be class-agnostic anyway
            deltas = F.linear(hidden, layer.weight[rows], layer.bias[rows])
            found["boxes"] = box_loss(heads.box_coder, deltas, rois, matched, targets)
        image = torch.cat([torch.full_like(m, i) for i, m in enumerate(matched)])
        return Matched(projector(hidden), image, torch.cat(matched), found)

    def regions(
        self, images: Tensor, sizes: Tensor, targets: Sequence[Target], losses: bool
    ) -> tuple[Features, list[Tensor], dict[str, Tensor]]:
        """The maps, the RPN's own boxes of each image, and the RPN's losses."""
        rpn, listed, maps = self.module.rpn, image_list(images, sizes), self.maps(images, sizes)
        objectness, deltas = rpn.head(list(maps.values()))
        anchors = rpn.anchor_generator(listed, shapes_in_float32(list(maps.values())))
        counts = [map_[0].numel() for map_ in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        boxes = rpn.box_coder.decode(deltas.detach().float(), anchors).view(len(images), -1, 4)
        boxes, _ = rpn.filter_proposals(boxes, objectness.float(), listed.image_sizes, counts)
        found = _rpn_losses(rpn, objectness, deltas, anchors, [t["boxes"] for t in targets]) if losses else {}
        return maps, boxes, found


def _rpn_losses(
    rpn: RegionProposalNetwork, objectness: Tensor, deltas: Tensor, anchors: list[Tensor], boxes: Sequence[Tensor]
) -> dict[str, Tensor]:
    labels, matched = rpn.assign_targets_to_anchors(anchors, [{"boxes": b} for b in boxes])
    with torch.autocast(deltas.device.type, enabled=False):
        regression = rpn.box_coder.encode(matched, anchors)
        losses = rpn.compute_loss(objectness.float(), deltas.float(), labels, regression)
    return dict(zip(("rpn_objectness", "rpn_boxes"), losses, strict=True))


def positives(
    heads: RoIHeads, rois: Sequence[Tensor], targets: Sequence[Target], most: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Of ``rois`` and the targets' own boxes, those that answer for a box by the heads' own rule.

    Returns:
        Per image: rois (n, 4), and the index (n,) of the box each answers for; at most ``most`` over all images.
    """
    boxes = [target["boxes"].float() for target in targets]
    rois = heads.add_gt_proposals(list(rois), boxes)
    matched, labels = heads.assign_targets_to_proposals(rois, boxes, [torch.ones_like(b[:, 0]).long() for b in boxes])
    found = [(label > 0).nonzero().squeeze(1) for label in labels]
    chosen = at_most(sum(len(f) for f in found), most, rois[0].device)
    starts = torch.tensor([0, *[len(f) for f in found]]).cumsum(0).tolist()
    kept = [f[chosen[(chosen >= a) & (chosen < b)] - a] for f, a, b in zip(found, starts, starts[1:], strict=False)]
    return [r[k] for r, k in zip(rois, kept, strict=True)], [m[k] for m, k in zip(matched, kept, strict=True)]


def stand_in(rois: list[Tensor], sizes: Tensor) -> list[Tensor]:
    """``rois``; where all are empty, one whole image.

    So that batch norm has something to see, every layer has a gradient, and processes that meet in a layer all come
    to it. What the layers say of the stand-in is dropped.
    """
    if any(len(r) for r in rois):
        return rois
    height, width = sizes[0].tolist()
    return [rois[0].new_tensor([[0, 0, width, height]]), *rois[1:]]


def box_loss(
    coder: BoxCoder, deltas: Tensor, rois: list[Tensor], matched: list[Tensor], targets: Sequence[Target]
) -> Tensor:
    """Smooth L1 (beta 1/9, as torchvision) of ``deltas`` (M, 4) from rois to the boxes they answer for, mean over M."""
    goals = [target["boxes"][index] for target, index in zip(targets, matched, strict=True)]
    wanted = torch.cat(coder.encode(goals, rois))
    return F.smooth_l1_loss(deltas.float(), wanted, beta=1 / 9, reduction="sum") / max(1, len(deltas))


def fpn_levels(boxes: Tensor) -> Tensor:
    """Level index 0..3 (P2..P5) of ``boxes`` (..., 4): ``floor(4 + log2(sqrt(wh) / 224)) - 2``, FPN's Eq. 1."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1).sqrt()
    return (torch.floor(4 + torch.log2(sides / 224 + 1e-6)) - 2).clamp(0, 3).long()
