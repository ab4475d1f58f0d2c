"""Networks that turn an image into feature maps, and the pyramid on top of them."""

from __future__ import annotations

from collections.abc import Sequence

import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool


def resnet_body(name: str, stages: Sequence[int]) -> nn.Module:
    """Maps C2 (stride 4) to C5 (stride 32) of a torchvision ResNet, those in ``stages``."""
    resnet = torchvision.models.get_model(name, weights=None)
    widths = [resnet.inplanes // 8 * 2**i for i in range(4)]
    body = IntermediateLayerGetter(resnet, {f"layer{stage - 1}": str(i) for i, stage in enumerate(stages)})
    body.channels = [widths[stage - 2] for stage in stages]
    return body


class Pyramid(BackboneWithFPN):
    """``body`` (image -> maps, finest first, with their widths in ``body.channels``) and a feature pyramid."""

    def __init__(
        self, body: nn.Module, channels: int, norm: bool = False, extra_blocks: ExtraFPNBlock | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            body.channels, channels, extra_blocks or LastLevelMaxPool(), nn.BatchNorm2d if norm else None
        )
        self.out_channels = channels
