"""Networks that turn an image into feature maps, and the pyramid on top of them.

A body gives maps, finest first, under the names "0", "1", ..., (B, C, H, W), and says their widths in ``channels``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool


def resnet_body(name: str, stages: Sequence[int]) -> nn.Module:
    """Maps C2 (stride 4) to C5 (stride 32) of a torchvision ResNet, those in ``stages``."""
    resnet = torchvision.models.get_model(name, weights=None)
    widths = [resnet.inplanes // 8 * 2**i for i in range(4)]
    body = IntermediateLayerGetter(resnet, {f"layer{stage - 1}": str(i) for i, stage in enumerate(stages)})
    body.channels = [widths[stage - 2] for stage in stages]
    return body


def mobilenet_v2_body(stages: Sequence[int]) -> nn.Module:
    """Maps C2 to C5 of torchvision's MobileNetV2, those in ``stages``: the last block of each stride."""
    blocks = torchvision.models.mobilenet_v2(weights=None).features
    last = [(3, 6, 13, 17)[stage - 2] for stage in stages]
    body = IntermediateLayerGetter(blocks, {str(block): str(i) for i, block in enumerate(last)})
    body.channels = [blocks[block].out_channels for block in last]
    return body


def timm_body(name: str, maps: Sequence[int], options: Mapping[str, Any]) -> nn.Module:
    """Those ``maps``, by their number, that timm's ``features_only`` offers. Names of the weights are timm's."""
    import timm  # takes half a second, which detectors on torchvision's networks need not wait for

    body = timm.create_model(name, pretrained=False, features_only=True, out_indices=tuple(maps), **options)
    body.channels = body.feature_info.channels()
    patches = getattr(body, "patch_embed", None)
    if patches is not None and hasattr(patches, "dynamic_img_pad"):
        patches.dynamic_img_pad = True  # images that are no multiple of the patch size
    body.register_forward_hook(named_maps)
    return body


def named_maps(body: nn.Module, inputs: Any, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
    """A hook, since a module around timm's would change the names of the weights."""
    return OrderedDict((str(i), channels_first(body, map_)) for i, map_ in enumerate(maps))


def channels_first(body: nn.Module, map_: Tensor) -> Tensor:
    """Some of timm's networks, Swin among them, compute in (B, H, W, C)."""
    return map_.permute(0, 3, 1, 2) if getattr(body, "output_fmt", "NCHW") == "NHWC" else map_


class Composite(nn.Module):
    """A backbone that is helped by a second one of its kind: CBNetV2's Dense Higher-Level Composition.

    Liang et al., "CBNet: A Composite Backbone Network Architecture for Object Detection", 2022 (arXiv 2107.00420).
    Stage ``l`` of the lead gets, besides the lead's own map ``l - 1``, the assistant's maps from ``l`` up::

        lead[l] = stage_l(lead[l - 1] + sum over i >= l of upsample(BN(conv1x1(assistant[i]))))

    in the width of ``lead[l - 1]``, upsampled to its size by nearest neighbours. More than two: the assistant is
    itself a ``Composite``, so that each feeds the next.

    Differs from the paper: the first stage gets nothing, since what enters it is no map, and the lead has its own stem
    and first stage, which the authors' ResNets share with the assistant. The assistant supervision (further losses on
    the assistant's maps in training) is left out. As in the authors' code the links start at zero, so that the whole
    starts as the lead alone.

    Args:
        assistant: all its maps are used.
        lead: one of its kind, with the same maps, whose children follow one another.
        kept: numbers of the maps that come out; the links are the same whatever is kept.
    """

    def __init__(self, assistant: nn.Module, lead: nn.Module, kept: Sequence[int]) -> None:
        super().__init__()
        self.assistant, self.lead, self.kept = assistant, lead, tuple(kept)
        widths = lead.channels
        self.links = nn.ModuleList(  # [l - 1][i - l]
            nn.ModuleList(link(width, widths[stage]) for width in widths[stage + 1 :])
            for stage in range(len(widths) - 1)
        )
        self.channels = [widths[i] for i in self.kept]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        helping = list(self.assistant(images).values())
        maps: list[Tensor] = []
        x = images
        for name, module in self.lead.items():
            x = module(x)
            if name not in self.lead.return_layers:
                continue
            own = channels_first(self.lead, x)
            maps.append(own)
            if len(maps) < len(helping):
                helped = own
                for layer, map_ in zip(self.links[len(maps) - 1], helping[len(maps) :], strict=True):
                    helped = helped + F.interpolate(layer(map_), size=own.shape[-2:], mode="nearest")
                x = helped if own is x else helped.permute(0, 2, 3, 1)
        return OrderedDict((str(i), maps[number]) for i, number in enumerate(self.kept))


def link(width: int, wanted: int) -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(width, wanted, 1, bias=False), nn.BatchNorm2d(wanted))
    nn.init.zeros_(layers[1].weight)
    return layers


class Pyramid(BackboneWithFPN):
    """``body`` (image -> maps, finest first, with their widths in ``body.channels``) and a feature pyramid."""

    def __init__(self, body: nn.Module, channels: int, norm: bool = False) -> None:
        nn.Module.__init__(self)
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.channels, channels, LastLevelMaxPool(), nn.BatchNorm2d if norm else None)
        self.out_channels = channels
