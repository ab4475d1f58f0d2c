"""RetinaNet and FCOS: predictions at every place of a pyramid P3..P7."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


def add_p6_p7(backbone: nn.Module, source: str) -> None:
    """Two levels above P5, made by convolutions of stride 2 on ``source``, c5 or p5."""
    channels = backbone.out_channels
    levels = LastLevelP6P7(backbone.body.channels[-1] if source == "c5" else channels, channels)
    levels.use_P5 = source == "p5"  # torchvision guesses it from the widths, wrongly where C5 and P5 are as wide
    backbone.fpn.extra_blocks = levels


def group_norm(channels: int) -> Callable[[int], nn.Module]:
    """32 groups as in torchvision, or the largest number below that divides the channels into groups of two or more.

    One channel on the one cell that P7 may have would always be normalised to 0, which torch refuses.
    """
    return partial(nn.GroupNorm, max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or n < channels)))


def retinanet(
    backbone: nn.Module,
    num_classes: int,
    p6_from: str,
    anchor_px: Sequence[int],
    head_norm: str,
    box_loss: str,
    **options: Any,
) -> RetinaNet:
    """Labels are below ``num_classes``. Anchors of three sizes and three shapes a cell."""
    add_p6_p7(backbone, p6_from)
    sides = tuple((side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))) for side in anchor_px)
    anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides))
    channels = backbone.out_channels
    norm = group_norm(channels) if head_norm == "gn" else None
    head = RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm)
    head.regression_head._loss_type = box_loss
    return RetinaNet(backbone, num_classes, anchor_generator=anchors, head=head, **options)


def fcos(
    backbone: nn.Module, num_classes: int, p6_from: str, anchor_px: Sequence[int], head_norm: str, **options: Any
) -> FCOS:
    """Labels are below ``num_classes``. One point a cell; an anchor is the square whose side is that level's unit."""
    add_p6_p7(backbone, p6_from)
    anchors = AnchorGenerator(tuple((side,) for side in anchor_px), ((1.0,),) * len(anchor_px))
    channels = backbone.out_channels
    norm = group_norm(channels) if head_norm == "gn" else nn.Identity
    head = FCOSHead(channels, 1, num_classes, num_convs=0)  # takes no norm, so its towers are replaced
    head.classification_head = FCOSClassificationHead(channels, 1, num_classes, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(channels, 1, norm_layer=norm)
    # Sides begin in the middle of their level's range. From torchvision's 0 a box has no area, so that the GIoU loss is
    # 1 and hardly has a slope; hundreds of steps go by before boxes begin to grow.
    nn.init.constant_(head.regression_head.bbox_reg.bias, 4.0)
    return FCOS(backbone, num_classes, anchor_generator=anchors, head=head, **options)
