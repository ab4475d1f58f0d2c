"""Faster R-CNN and Mask R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign


def box_head(kind: str, channels: int, width: int) -> nn.Module:
    """4conv1fc, with batch norm, or 2fc; on 7 x 7 maps."""
    if kind == "4conv1fc":
        return FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [width], norm_layer=nn.BatchNorm2d)
    return TwoMLPHead(channels * 7**2, width)


def rpn(anchor_px: Sequence[int], channels: int, convs: int) -> dict[str, Any]:
    """One anchor side a level."""
    anchors = AnchorGenerator(tuple((side,) for side in anchor_px), ((0.5, 1.0, 2.0),) * len(anchor_px))
    head = RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=convs)
    return {"rpn_anchor_generator": anchors, "rpn_head": head}


def rcnn(
    backbone: nn.Module,
    num_classes: int,
    head: str,
    head_width: int,
    anchor_px: Sequence[int],
    masks: bool,
    **options: Any,
) -> FasterRCNN:
    """On a pyramid. ``num_classes`` counts the background."""
    channels, v2 = backbone.out_channels, head == "4conv1fc"
    parts = rpn(anchor_px, channels, convs=2 if v2 else 1)
    parts["box_head"] = box_head(head, channels, head_width)
    parts["box_predictor"] = FastRCNNPredictor(head_width, num_classes)
    if not masks:
        return FasterRCNN(backbone, **parts, **options)
    mask_head = MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=nn.BatchNorm2d if v2 else None)
    mask_predictor = MaskRCNNPredictor(channels, channels, num_classes)
    return MaskRCNN(backbone, mask_head=mask_head, mask_predictor=mask_predictor, **parts, **options)


def rcnn_c4(name: str, num_classes: int, anchor_px: Sequence[int], masks: bool, **options: Any) -> FasterRCNN:
    """On one map of a torchvision ResNet, whose 5th block is the head."""
    resnet = torchvision.models.get_model(name, weights=None)
    layer4, width = resnet.layer4, resnet.inplanes
    backbone = IntermediateLayerGetter(resnet, {"layer3": "0"})
    backbone.out_channels = width // 2
    anchors = AnchorGenerator((tuple(anchor_px),), ((0.5, 1.0, 2.0),))
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(width // 2, anchors.num_anchors_per_location()[0]),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 14, 2),
        "box_head": nn.Sequential(layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(width, num_classes),
    }
    if not masks:
        return FasterRCNN(backbone, **parts, **options)
    parts["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 14, 2)
    parts["mask_head"] = nn.Sequential(layer4)  # boxes and masks share the 5th block, as in detectron2's C4 models
    parts["mask_predictor"] = MaskRCNNPredictor(width, 256, num_classes)
    return MaskRCNN(backbone, **parts, **options)
