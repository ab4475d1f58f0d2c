"""Weights for other libraries: names written out by hand, forward passes written out plainly, and the way back.

The plain networks below restate, from the documentation of detectron2 and MMDetection, what their models compute from
the weights under their names. They are compared with torchvision's own modules.
"""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from headstart.detectors.formats import FOLDERS, FORMATS, detectron2, format_module, mmdetection
from headstart.detectors.formats import timm as timm_format
from headstart.errors import SettingsError, WeightsError

CLASSES = 3  # of objects
WIDTH = 32  # of the pyramid; group norms there have 32 groups
RATIOS = ((0.5, 1.0, 2.0),)


def randomised(module: nn.Module) -> nn.Module:
    """Every weight and statistic random, so that no two can be confused."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                noise = torch.randn(value.shape, generator=generator)
                scale = math.prod(value.shape[1:]) ** -0.5 if value.ndim > 1 else 0.2
                value.copy_(1 + 0.2 * noise.abs() if name.endswith("running_var") else scale * noise)
            else:
                value.fill_(int(torch.randint(1000, (), generator=generator)))
    return module.eval()


def pyramid(levels: int, norm: bool = False, p6: str | None = None) -> BackboneWithFPN:
    names = {f"layer{stage}": str(i) for i, stage in enumerate(range(5 - levels, 5))}
    widths = [64, 128, 256, 512][-levels:]
    extra = {None: None, "p5": LastLevelP6P7(WIDTH, WIDTH), "c5": LastLevelP6P7(512, WIDTH)}[p6]
    return BackboneWithFPN(resnet18(), names, widths, WIDTH, extra, nn.BatchNorm2d if norm else None)


def rcnn(v2: bool, masks: bool) -> nn.Module:
    """As torchvision's ``..._fpn``, or ``..._fpn_v2``."""
    norm = nn.BatchNorm2d if v2 else None
    parts = {
        "rpn_anchor_generator": AnchorGenerator(((8,), (16,), (32,), (64,), (96,)), RATIOS * 5),
        "rpn_head": RPNHead(WIDTH, 3, conv_depth=2 if v2 else 1),
        "box_head": FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 4, [24], norm_layer=norm)
        if v2
        else TwoMLPHead(WIDTH * 49, 24),
        "box_predictor": FastRCNNPredictor(24, CLASSES + 1),
    }
    if not masks:
        return FasterRCNN(pyramid(4, v2), **parts)
    parts["mask_head"] = MaskRCNNHeads(WIDTH, [WIDTH] * 4, 1, norm_layer=norm)
    parts["mask_predictor"] = MaskRCNNPredictor(WIDTH, WIDTH, CLASSES + 1)
    return MaskRCNN(pyramid(4, v2), **parts)


def c4(masks: bool) -> nn.Module:
    network = resnet18()
    layer4 = network.layer4
    backbone = IntermediateLayerGetter(network, {"layer3": "0"})
    backbone.out_channels = 256
    parts = {
        "rpn_anchor_generator": AnchorGenerator(((16, 32, 64, 128),), RATIOS),
        "rpn_head": RPNHead(256, 12),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 14, 2),
        "box_head": nn.Sequential(layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(512, CLASSES + 1),
    }
    if not masks:
        return FasterRCNN(backbone, **parts)
    parts["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 14, 2)
    parts["mask_head"] = nn.Sequential(layer4)
    parts["mask_predictor"] = MaskRCNNPredictor(512, 16, CLASSES + 1)
    return MaskRCNN(backbone, **parts)


def retinanet(v2: bool) -> RetinaNet:
    anchors = AnchorGenerator(
        tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512)), RATIOS * 5
    )
    norm = (lambda width: nn.GroupNorm(32, width)) if v2 else None
    head = RetinaNetHead(WIDTH, 9, CLASSES + 1, norm_layer=norm)
    return RetinaNet(pyramid(3, p6="c5" if v2 else "p5"), CLASSES + 1, anchor_generator=anchors, head=head)


def fcos(norm: bool = True) -> FCOS:
    module = FCOS(pyramid(3, p6="p5"), CLASSES + 1)
    if not norm:
        module.head.classification_head = FCOSClassificationHead(WIDTH, 1, CLASSES + 1, norm_layer=nn.Identity)
        module.head.regression_head = FCOSRegressionHead(WIDTH, 1, norm_layer=nn.Identity)
    return module


def cascade(v2: bool) -> dict[str, Tensor]:
    """Three stages, each with a box head and a predictor whose boxes are the same for all classes."""
    found = {k: v for k, v in randomised(rcnn(v2, False)).state_dict().items() if not k.startswith("roi_heads.")}
    for stage in range(3):
        torch.manual_seed(stage)
        head = (
            FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 4, [24], norm_layer=nn.BatchNorm2d)
            if v2
            else TwoMLPHead(WIDTH * 49, 24)
        )
        found |= {f"roi_heads.box_heads.{stage}.{k}": v for k, v in head.state_dict().items()}
        for name, rows in (("cls_score", CLASSES + 1), ("bbox_pred", 4)):
            found |= {
                f"roi_heads.box_predictors.{stage}.{name}.{k}": v for k, v in nn.Linear(24, rows).state_dict().items()
            }
    return found


MODULES = {
    "faster_rcnn": lambda: rcnn(False, False),
    "faster_rcnn_v2": lambda: rcnn(True, False),
    "faster_rcnn_c4": lambda: c4(False),
    "mask_rcnn": lambda: rcnn(False, True),
    "mask_rcnn_v2": lambda: rcnn(True, True),
    "mask_rcnn_c4": lambda: c4(True),
    "retinanet": lambda: retinanet(False),
    "retinanet_v2": lambda: retinanet(True),
    "fcos": fcos,
    "fcos_plain": lambda: fcos(False),
}


def weights_of(family: str) -> dict[str, Tensor]:
    return dict(_weights_of(family))


@functools.cache
def _weights_of(family: str) -> dict[str, Tensor]:
    if family.startswith("cascade_rcnn"):
        return cascade(family.endswith("v2"))
    return randomised(MODULES[family]()).state_dict()


FAMILIES = [*MODULES, "cascade_rcnn", "cascade_rcnn_v2"]


# ---- there and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("library", [detectron2, mmdetection], ids=lambda module: module.NAME)
def test_there_and_back(family, library):
    state = weights_of(family)
    there = library.from_torchvision(state, "resnet18")
    assert not {
        key for keys in there.dropped.values() for key in keys if "num_batches" not in key and "mask_head" not in key
    }
    back = library.to_torchvision(there.state)
    expected = {k: v for k, v in state.items() if library is mmdetection or not k.endswith("num_batches_tracked")}
    assert back.keys() == expected.keys()
    for key, value in expected.items():
        if key == "head.regression_head.bbox_reg.bias" and family.startswith("fcos"):
            torch.testing.assert_close(back[key], value, rtol=0, atol=1e-7)  # half a stride more, and less again
        elif re.search(r"box_predictor\.bbox_pred", key):
            assert torch.equal(back[key][4:], value[4:])
            assert not back[key][:4].any()
        elif "mask_fcn_logits" in key:
            assert torch.equal(back[key][1:], value[1:])
            assert not back[key][:1].any()
        elif re.match(r"head\..*cls_logits", key):
            mine, original = (v.unflatten(0, (-1, CLASSES + 1)) for v in (back[key], value))
            assert torch.equal(mine[:, 1:], original[:, 1:])
            assert (mine[:, 0] == (-20 if key.endswith("bias") else 0)).all()
        else:
            assert torch.equal(back[key], value), key


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("library", [detectron2, mmdetection], ids=lambda module: module.NAME)
def test_what_comes_back_loads_strictly(family, library):
    module = MODULES[family]()
    back = library.to_torchvision(library.from_torchvision(module.state_dict(), "resnet18").state)
    module.load_state_dict(back)  # counters of batch norms need not be there: torch knows


@pytest.mark.parametrize("library", [detectron2, mmdetection], ids=lambda module: module.NAME)
def test_some_parts_alone(library):
    """A pretrained run has the parts it trained."""
    whole = weights_of("faster_rcnn_v2")
    some = {k: v for k, v in whole.items() if k.startswith(("backbone.", "roi_heads.box_head."))}
    made = library.from_torchvision(some, "resnet18").state
    everything = library.from_torchvision(whole, "resnet18").state
    assert made.keys() < everything.keys()
    assert all(torch.equal(value, everything[name]) for name, value in made.items())
    back = library.to_torchvision(made)
    assert back.keys() == {k for k in some if library is mmdetection or not k.endswith("num_batches_tracked")}


def test_torchvision_is_as_it_is():
    state = weights_of("faster_rcnn")
    assert format_module("torchvision").from_torchvision(state, "").state == state


# ---- names, written out -----------------------------------------------------------------------------------------

WB = ("weight", "bias")
STATISTICS = (*WB, "running_mean", "running_var")


def detectron2_resnet18(prefix: str, stages=(2, 3, 4, 5)) -> set[str]:
    convs = ["stem.conv1"] if stages[0] == 2 else []
    for stage in stages:
        convs += [f"res{stage}.{block}.conv{k}" for block in (0, 1) for k in (1, 2)]
        convs += [f"res{stage}.0.shortcut"] if stage > 2 else []
    return {f"{prefix}{conv}.weight" for conv in convs} | {f"{prefix}{c}.norm.{s}" for c in convs for s in STATISTICS}


def names(*layers: str, of=WB) -> set[str]:
    return {f"{layer}.{name}" for layer in layers for name in of}


def test_names_in_detectron2():
    made = detectron2.from_torchvision(weights_of("mask_rcnn_v2"), "resnet18").state
    fpn = [f"backbone.fpn_{kind}{level}" for kind in ("lateral", "output") for level in (2, 3, 4, 5)]
    box = [f"roi_heads.box_head.conv{k}" for k in (1, 2, 3, 4)]
    mask = [f"roi_heads.mask_head.mask_fcn{k}" for k in (1, 2, 3, 4)]
    assert made.keys() == (
        detectron2_resnet18("backbone.bottom_up.")
        | names(*fpn, *box, *mask, of=["weight"])
        | {f"{layer}.norm.{s}" for layer in [*fpn, *box, *mask] for s in STATISTICS}
        | names("proposal_generator.rpn_head.conv.conv0", "proposal_generator.rpn_head.conv.conv1")
        | names("proposal_generator.rpn_head.objectness_logits", "proposal_generator.rpn_head.anchor_deltas")
        | names("roi_heads.box_head.fc1", "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")
        | names("roi_heads.mask_head.deconv", "roi_heads.mask_head.predictor")
    )
    assert made["roi_heads.box_predictor.cls_score.weight"].shape == (CLASSES + 1, 24)
    assert made["roi_heads.box_predictor.bbox_pred.weight"].shape == (4 * CLASSES, 24)
    assert made["roi_heads.mask_head.predictor.weight"].shape == (CLASSES, WIDTH, 1, 1)


def test_names_of_other_families_in_detectron2():
    plain = detectron2.from_torchvision(weights_of("faster_rcnn"), "resnet18").state
    assert names("proposal_generator.rpn_head.conv", "roi_heads.box_head.fc1", "roi_heads.box_head.fc2") < plain.keys()
    shared = detectron2.from_torchvision(weights_of("mask_rcnn_c4"), "resnet18").state
    assert detectron2_resnet18("backbone.", (2, 3, 4)) < shared.keys()
    assert detectron2_resnet18("roi_heads.", (5,)) < shared.keys()
    stages = detectron2.from_torchvision(weights_of("cascade_rcnn_v2"), "resnet18").state
    for stage in range(3):
        head, predictor = f"roi_heads.box_head.{stage}.", f"roi_heads.box_predictor.{stage}."
        assert {f"{head}conv4.norm.running_var", f"{head}fc1.bias", f"{predictor}cls_score.weight"} < stages.keys()
        assert stages[f"{predictor}bbox_pred.weight"].shape == (4, 24)
    dense = detectron2.from_torchvision(weights_of("retinanet"), "resnet18").state
    towers = [f"head.{kind}_subnet.{k}" for kind in ("cls", "bbox") for k in (0, 2, 4, 6)]
    pyramid_names = [f"backbone.fpn_{kind}{level}" for kind in ("lateral", "output") for level in (3, 4, 5)]
    assert dense.keys() == detectron2_resnet18("backbone.bottom_up.") | names(
        *towers, *pyramid_names, "backbone.top_block.p6", "backbone.top_block.p7", "head.cls_score", "head.bbox_pred"
    )
    towers = [f"head.{kind}_subnet.{k}" for kind in ("cls", "bbox") for k in (0, 1, 3, 4, 6, 7, 9, 10)]
    for family, last in (("retinanet_v2", ["cls_score", "bbox_pred"]), ("fcos", ["cls_score", "bbox_pred", "ctrness"])):
        dense = detectron2.from_torchvision(weights_of(family), "resnet18").state
        assert {name for name in dense if name.startswith("head.")} == names(*towers, *(f"head.{k}" for k in last))
    normed = detectron2.from_torchvision(weights_of("retinanet_v2"), "resnet18").state
    assert not normed["head.cls_subnet.3.bias"].any()


def test_names_in_mmdetection():
    state = weights_of("mask_rcnn_v2")
    made = mmdetection.from_torchvision(state, "resnet18").state
    tracked = (*STATISTICS, "num_batches_tracked")
    resnet = {f"backbone.{k.removeprefix('backbone.body.')}" for k in state if k.startswith("backbone.body.")}
    assert {"backbone.conv1.weight", "backbone.bn1.running_var", "backbone.layer2.0.downsample.1.weight"} < resnet
    modules = [f"neck.{kind}_convs.{k}" for kind in ("lateral", "fpn") for k in range(4)]
    modules += [f"roi_head.bbox_head.shared_convs.{k}" for k in range(4)]
    modules += [f"roi_head.mask_head.convs.{k}" for k in range(4)]
    assert made.keys() == (
        resnet
        | {f"{module}.conv.weight" for module in modules}
        | {f"{module}.bn.{s}" for module in modules for s in tracked}
        | names("rpn_head.rpn_conv.0.conv", "rpn_head.rpn_conv.1.conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg")
        | names(*(f"roi_head.bbox_head.{k}" for k in ("shared_fcs.0", "fc_cls", "fc_reg")))
        | names("roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits")
    )


def test_names_of_other_families_in_mmdetection():
    plain = mmdetection.from_torchvision(weights_of("faster_rcnn"), "resnet18").state
    fcs = [f"roi_head.bbox_head.shared_fcs.{k}" for k in (0, 1)]
    assert names("rpn_head.rpn_conv", "neck.fpn_convs.3.conv", *fcs) < plain.keys()
    shared = mmdetection.from_torchvision(weights_of("faster_rcnn_c4"), "resnet18").state
    block = "roi_head.shared_head.layer4.0"
    assert {f"{block}.conv1.weight", f"{block}.downsample.1.bias", "backbone.layer3.1.conv2.weight"} < shared.keys()
    stages = mmdetection.from_torchvision(weights_of("cascade_rcnn"), "resnet18").state
    for stage in range(3):
        head = f"roi_head.bbox_head.{stage}"
        assert names(f"{head}.shared_fcs.0", f"{head}.shared_fcs.1", f"{head}.fc_cls", f"{head}.fc_reg") < stages.keys()
    necks = [f"neck.{kind}_convs.{k}.conv" for kind, n in (("lateral", 3), ("fpn", 5)) for k in range(n)]
    towers = [f"bbox_head.{kind}_convs.{k}" for kind in ("cls", "reg") for k in range(4)]
    for family, last in (
        ("retinanet", names(*(f"{t}.conv" for t in towers), "bbox_head.retina_cls", "bbox_head.retina_reg")),
        (
            "retinanet_v2",
            names(*(f"{t}.gn" for t in towers), "bbox_head.retina_cls", "bbox_head.retina_reg")
            | names(*(f"{t}.conv" for t in towers), of=["weight"]),
        ),
        (
            "fcos",
            names(*(f"{t}.{k}" for t in towers for k in ("conv", "gn")))
            | names("bbox_head.conv_cls", "bbox_head.conv_reg", "bbox_head.conv_centerness")
            | {f"bbox_head.scales.{k}.scale" for k in range(5)},
        ),
    ):
        made = mmdetection.from_torchvision(weights_of(family), "resnet18").state
        assert {name for name in made if not name.startswith("backbone.")} == names(*necks) | last


# ---- plain networks ---------------------------------------------------------------------------------------------


class Plain:
    """Layers as functions of weights by name."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        if f"{name}.running_mean" in self.state:
            mean, var, weight, bias = (
                self.state[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
            )
            return (x - mean) / (var + 1e-5).sqrt() * weight + bias
        if f"{name}.weight" in self.state:
            return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"])
        return x


class PlainDetectron2(Plain):
    def resnet(self, x: Tensor, prefix: str) -> dict[str, Tensor]:
        """Basic blocks; ``norm`` of a convolution is inside of it, a shortcut where there is one."""
        x = self.normed(x, f"{prefix}stem.conv1", 2).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        maps = {}
        for stage in range(2, 6):
            for block in range(2):
                name, stride = f"{prefix}res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
                y = self.normed(self.normed(x, f"{name}.conv1", stride).relu(), f"{name}.conv2")
                short = self.normed(x, f"{name}.shortcut", stride) if f"{name}.shortcut.weight" in self.state else x
                x = (y + short).relu()
            maps[f"res{stage}"] = x
        return maps

    def normed(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        return self.norm(self.conv(x, name, stride), f"{name}.norm")

    def fpn(self, image: Tensor, top_input: str | None = None) -> list[Tensor]:
        maps = self.resnet(image, "backbone.bottom_up.")
        first = 3 if top_input else 2
        outputs, above = [], None
        for level in range(5, first - 1, -1):
            x = self.normed(maps[f"res{level}"], f"backbone.fpn_lateral{level}")
            above = x if above is None else x + F.interpolate(above, scale_factor=2.0, mode="nearest")
            outputs.insert(0, self.normed(above, f"backbone.fpn_output{level}"))
        if top_input is None:
            return [*outputs, F.max_pool2d(outputs[-1], 1, 2)]
        p6 = self.conv(outputs[-1] if top_input == "p5" else maps["res5"], "backbone.top_block.p6", 2)
        return [*outputs, p6, self.conv(p6.relu(), "backbone.top_block.p7", 2)]

    def tower(self, x: Tensor, name: str, step: int) -> Tensor:
        for k in range(4):
            x = self.norm(self.conv(x, f"{name}.{step * k}"), f"{name}.{step * k + 1}" if step == 3 else "none").relu()
        return x

    def dense(self, x: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits (H W A, K), box values (H W A, 4) of one map, and the boxes' tower."""
        boxes = self.tower(x, "head.bbox_subnet", step)
        classes = self.conv(self.tower(x, "head.cls_subnet", step), "head.cls_score")
        return hwa_k(classes, CLASSES), hwa_k(self.conv(boxes, "head.bbox_pred"), 4), boxes


class PlainMMDetection(Plain):
    def module(self, x: Tensor, name: str, norm: str | None = None, stride: int = 1) -> Tensor:
        x = self.conv(x, f"{name}.conv", stride)
        return self.norm(x, f"{name}.{norm}") if norm else x

    def neck(self, maps: list[Tensor], extra_input: str | None = None, norm: str | None = None) -> list[Tensor]:
        laterals = [self.module(x, f"neck.lateral_convs.{k}", norm) for k, x in enumerate(maps)]
        for k in range(len(maps) - 1, 0, -1):
            laterals[k - 1] = laterals[k - 1] + F.interpolate(laterals[k], size=laterals[k - 1].shape[2:])
        outputs = [self.module(x, f"neck.fpn_convs.{k}", norm) for k, x in enumerate(laterals)]
        if extra_input is None:
            return [*outputs, F.max_pool2d(outputs[-1], 1, stride=2)]
        n = len(maps)
        source = outputs[-1] if extra_input == "on_output" else maps[-1]
        outputs.append(self.module(source, f"neck.fpn_convs.{n}", stride=2))
        return [*outputs, self.module(outputs[-1].relu(), f"neck.fpn_convs.{n + 1}", stride=2)]

    def dense(self, x: Tensor, kind: str, norm: str | None) -> tuple[Tensor, Tensor, Tensor]:
        classes = boxes = x
        for k in range(4):
            classes = self.module(classes, f"bbox_head.cls_convs.{k}", norm).relu()
            boxes = self.module(boxes, f"bbox_head.reg_convs.{k}", norm).relu()
        classes, values = self.conv(classes, f"bbox_head.{kind}_cls"), self.conv(boxes, f"bbox_head.{kind}_reg")
        return hwa_k(classes, CLASSES), hwa_k(values, 4), boxes


def hwa_k(x: Tensor, k: int) -> Tensor:
    """(1, A K, H, W) -> (H W A, K)."""
    _, channels, height, width = x.shape
    return x.view(channels // k, k, height, width).permute(2, 3, 0, 1).reshape(-1, k)


def image(size: int = 64) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "top"), [("faster_rcnn", None), ("faster_rcnn_v2", None), ("retinanet", "p5"), ("retinanet_v2", "c5")]
)
def test_pyramids_agree(family, top):
    module = randomised(MODULES[family]())
    expected = list(module.backbone(image()).values())
    state = module.state_dict()
    for found in (
        PlainDetectron2(detectron2.from_torchvision(state, "resnet18").state).fpn(image(), top),
        PlainMMDetection(mmdetection.from_torchvision(state, "resnet18").state).neck(
            list(module.backbone.body(image()).values()),
            {None: None, "p5": "on_output", "c5": "on_input"}[top],
            "bn" if family == "faster_rcnn_v2" else None,
        ),
    ):
        assert len(found) == 5
        for a, b in zip(found, expected, strict=True):
            close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("family", ["faster_rcnn", "faster_rcnn_v2"])
def test_box_heads_and_predictors_agree(family):
    module = randomised(MODULES[family]())
    pooled = torch.randn(5, WIDTH, 7, 7, generator=torch.Generator().manual_seed(2))
    embedded = module.roi_heads.box_head(pooled)
    logits, deltas = module.roi_heads.box_predictor(embedded)
    scores = logits.softmax(dim=1)[:, 1:]  # torchvision: the background is class 0
    deltas = deltas.view(5, -1, 4)[:, 1:]

    d2 = PlainDetectron2(detectron2.from_torchvision(module.state_dict(), "resnet18").state)
    mm = PlainMMDetection(mmdetection.from_torchvision(module.state_dict(), "resnet18").state)
    x, y = pooled, pooled
    if family == "faster_rcnn_v2":
        for k in range(4):
            x = d2.normed(x, f"roi_heads.box_head.conv{k + 1}").relu()
            y = mm.module(y, f"roi_head.bbox_head.shared_convs.{k}", "bn").relu()
    x, y = x.flatten(1), y.flatten(1)
    for k in range(1 if family == "faster_rcnn_v2" else 2):
        x = d2.linear(x, f"roi_heads.box_head.fc{k + 1}").relu()
        y = mm.linear(y, f"roi_head.bbox_head.shared_fcs.{k}").relu()
    close(x, embedded)
    close(y, embedded)
    for plain, features, names_ in (
        (d2, x, ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")),
        (mm, y, ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg")),
    ):
        close(plain.linear(features, names_[0]).softmax(dim=1)[:, :-1], scores)  # the background is the last class
        close(plain.linear(features, names_[1]).view(5, CLASSES, 4), deltas)


@torch.no_grad()
def test_masks_agree():
    module = randomised(rcnn(True, True))
    pooled = torch.randn(2, WIDTH, 14, 14, generator=torch.Generator().manual_seed(2))
    expected = module.roi_heads.mask_predictor(module.roi_heads.mask_head(pooled))[:, 1:]
    d2 = PlainDetectron2(detectron2.from_torchvision(module.state_dict(), "resnet18").state)
    mm = PlainMMDetection(mmdetection.from_torchvision(module.state_dict(), "resnet18").state)
    x = y = pooled
    for k in range(4):
        x = d2.normed(x, f"roi_heads.mask_head.mask_fcn{k + 1}").relu()
        y = mm.module(y, f"roi_head.mask_head.convs.{k}", "bn").relu()
    for plain, x_, up, last in ((d2, x, "deconv", "predictor"), (mm, y, "upsample", "conv_logits")):
        head = "roi_heads.mask_head" if plain is d2 else "roi_head.mask_head"
        x_ = F.conv_transpose2d(x_, plain.state[f"{head}.{up}.weight"], plain.state[f"{head}.{up}.bias"], 2).relu()
        close(plain.conv(x_, f"{head}.{last}"), expected)


def anchor_shapes(sizes: list[float], size_major: bool) -> np.ndarray:
    """(A, 2) width and height of the anchors of one place; an aspect ratio is height / width.

    detectron2: for each size, all ratios. MMDetection (``scale_major``, its default): for each ratio, all sizes.
    """
    pairs = [(s, r) for s in sizes for r in RATIOS[0]] if size_major else [(s, r) for r in RATIOS[0] for s in sizes]
    return np.array([(s / math.sqrt(r), s * math.sqrt(r)) for s, r in pairs])


def torchvision_shapes(generator: AnchorGenerator, level: int) -> np.ndarray:
    base = generator.generate_anchors(generator.sizes[level], generator.aspect_ratios[level]).numpy()
    return base[:, 2:] - base[:, :2]


def order_of(theirs: np.ndarray, ours: np.ndarray) -> list[int]:
    """For each of their anchors the index of ours of that shape; torchvision rounds to whole pixels a side."""
    distance = np.abs(theirs[:, None] - ours[None]).max(axis=2)
    order = distance.argmin(axis=1)
    assert sorted(order) == list(range(len(ours)))
    assert distance.min(axis=1).max() <= 1
    return list(order)


@torch.no_grad()
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("library", [detectron2, mmdetection], ids=lambda module: module.NAME)
def test_retinanet_channels_belong_to_the_same_anchors(library, v2):
    module = randomised(retinanet(v2))
    x = torch.randn(1, WIDTH, 3, 4, generator=torch.Generator().manual_seed(3))
    out = module.head([x])
    scores = out["cls_logits"][0].view(12, 9, CLASSES + 1)[..., 1:].sigmoid()
    values = out["bbox_regression"][0].view(12, 9, 4)
    state = library.from_torchvision(module.state_dict(), "resnet18").state
    if library is detectron2:
        classes, boxes, _ = PlainDetectron2(state).dense(x, 3 if v2 else 2)
    else:
        classes, boxes, _ = PlainMMDetection(state).dense(x, "retina", "gn" if v2 else None)
    sides = [32, int(32 * 2 ** (1 / 3)), int(32 * 2 ** (2 / 3))]
    order = order_of(anchor_shapes(sides, library is detectron2), torchvision_shapes(module.anchor_generator, 0))
    assert (order == list(range(9))) == (library is mmdetection)
    close(classes.sigmoid().view(12, 9, CLASSES), scores[:, order])
    close(boxes.view(12, 9, 4), values[:, order])


@torch.no_grad()
@pytest.mark.parametrize("library", [detectron2, mmdetection], ids=lambda module: module.NAME)
def test_rpn_channels_of_several_sizes_belong_to_the_same_anchors(library):
    module = randomised(c4(False))
    x = torch.randn(1, 256, 2, 3, generator=torch.Generator().manual_seed(3))
    logits, deltas = (out[0] for out in module.rpn.head([x]))
    plain = Plain(library.from_torchvision(module.state_dict(), "resnet18").state)
    head = "proposal_generator.rpn_head" if library is detectron2 else "rpn_head"
    hidden = plain.conv(x, f"{head}.{'conv' if library is detectron2 else 'rpn_conv'}").relu()
    objectness, boxes = ("objectness_logits", "anchor_deltas") if library is detectron2 else ("rpn_cls", "rpn_reg")
    shapes = torchvision_shapes(module.rpn.anchor_generator, 0)
    order = order_of(anchor_shapes([16, 32, 64, 128], library is detectron2), shapes)
    close(hwa_k(plain.conv(hidden, f"{head}.{objectness}"), 1).view(6, 12), hwa_k(logits, 1).view(6, 12)[:, order])
    close(hwa_k(plain.conv(hidden, f"{head}.{boxes}"), 4).view(6, 12, 4), hwa_k(deltas, 4).view(6, 12, 4)[:, order])


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("library", [detectron2, mmdetection], ids=lambda module: module.NAME)
def test_fcos_boxes_agree_from_other_places(library, norm):
    module = randomised(fcos(norm))
    module.head.regression_head.bbox_reg.bias.fill_(3.0)  # boxes larger than a stride: nothing is cut off at zero
    stride, height, width = 8, 3, 4
    x = torch.randn(1, WIDTH, height, width, generator=torch.Generator().manual_seed(3))
    out = module.head([x])
    base = module.anchor_generator.generate_anchors((8,), (1.0,))
    y0, x0 = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    anchors = torch.stack([x0, y0, x0, y0], dim=2).reshape(-1, 4) + base
    expected = module.box_coder.decode(out["bbox_regression"][0], anchors)

    state = library.from_torchvision(module.state_dict(), "resnet18").state
    if library is detectron2:
        plain = PlainDetectron2(state)
        classes, values, tower = plain.dense(x, 3 if norm else 2)
        centreness = plain.conv(tower, "head.ctrness")
    else:
        plain = PlainMMDetection(state)
        classes, values, tower = plain.dense(x, "conv", "gn" if norm else None)
        centreness = plain.conv(tower, "bbox_head.conv_centerness")  # centerness_on_reg
        values = values * state["bbox_head.scales.0.scale"]
    sides = values.relu() * stride  # left, top, right, bottom, from the middle of a cell
    middle = torch.stack([x0, y0], dim=2).reshape(-1, 2) + stride / 2
    close(torch.cat([middle - sides[:, :2], middle + sides[:, 2:]], dim=1), expected)
    close(classes, out["cls_logits"][0][:, 1:])
    close(centreness.flatten(), out["bbox_ctrness"][0].flatten())


# ---- timm -------------------------------------------------------------------------------------------------------


def detector_keys(body: nn.Module) -> dict[str, Tensor]:
    """A detector around ``body``, and a part besides."""
    return {f"backbone.body.{k}": v for k, v in body.state_dict().items()} | {"rpn.head.conv.0.0.weight": torch.ones(1)}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "after"),
    [
        ("resnet18", 64, set()),
        ("mobilenetv2_100", 64, {"conv_head", "bn2"}),
        ("swin_tiny_patch4_window7_224", 224, {"norm"}),
        ("convnext_atto", 64, {"head"}),
    ],
)
def test_timm_backbones(name, size, after):
    torch.manual_seed(0)
    features = timm.create_model(name, pretrained=False, features_only=True).eval()
    state = detector_keys(features)
    made = timm_format.from_torchvision(state, name)
    assert made.dropped == {"other parts than the backbone": ["rpn.head.conv.0.0.weight"]}
    whole = timm.create_model(name, pretrained=False, num_classes=0).eval()
    report = whole.load_state_dict(made.state, strict=False)
    assert not report.unexpected_keys
    assert sorted(report.missing_keys) == sorted(made.missing)
    assert {key.split(".")[0] for key in made.missing} == after
    x = image(size)
    expected = features(x)[-1]
    last = {"mobilenetv2_100": "blocks", "swin_tiny_patch4_window7_224": "layers", "convnext_atto": "stages"}.get(name)
    if last is None:
        found = whole.forward_features(x)
    else:  # before what a detector does not have
        caught = []
        whole.get_submodule(last).register_forward_hook(lambda module, args, output: caught.append(output))
        whole.forward_features(x)
        found = caught[0]
    assert torch.equal(found, expected)
    if name.startswith("swin"):  # called swin_t for short
        assert timm_format.from_torchvision(state, "swin_t").state.keys() == made.state.keys()
    back = timm_format.to_torchvision(made.state, name)
    assert back.keys() == {key for key in state if key.startswith("backbone.")}
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_timm_from_torchvision_resnets():
    state = weights_of("faster_rcnn")
    made = timm_format.from_torchvision(state, "resnet18")
    assert not timm.create_model("resnet18", num_classes=0, pretrained=False).load_state_dict(made.state).missing_keys
    assert torch.equal(made.state["layer4.1.conv2.weight"], state["backbone.body.layer4.1.conv2.weight"])
    block = timm_format.from_torchvision(weights_of("mask_rcnn_c4"), "resnet18")  # its 5th block is the head
    assert block.state.keys() == made.state.keys()
    assert not block.missing


def test_timm_network_in_mmdetection():
    body = timm.create_model("convnext_atto", pretrained=False, features_only=True)
    state = {f"backbone.body.{k}": v for k, v in body.state_dict().items()}
    made = mmdetection.from_torchvision(state, "convnext_atto").state
    assert made.keys() == {f"backbone.timm_model.{k}" for k in body.state_dict()}
    assert mmdetection.to_torchvision(made).keys() == state.keys()


# ---- what can't be ----------------------------------------------------------------------------------------------


def test_what_a_library_lacks_is_refused_with_the_reason():
    composite = {
        "backbone.body.assistant.conv1.weight": torch.ones(1),
        "backbone.body.lead.conv1.weight": torch.ones(1),
    }
    for name in ("detectron2", "mmdetection", "timm"):
        with pytest.raises(SettingsError, match=f"--to {name}: has no composite backbone"):
            format_module(name).from_torchvision(composite, "resnet18")
    with pytest.raises(SettingsError, match=r"built differently from timm's convnext_atto.*use --to"):
        detectron2.from_torchvision({"backbone.body.stem_0.weight": torch.ones(1)}, "convnext_atto")
    with pytest.raises(SettingsError, match="no wide ResNet"):
        mmdetection.from_torchvision({}, "wide_resnet50_2")
    for library in (detectron2, mmdetection):
        with pytest.raises(SettingsError, match=r"no place for 1 of 2 weights \(transformer\.w\)"):
            library.from_torchvision(
                {"backbone.body.conv1.weight": torch.ones(1), "transformer.w": torch.ones(1)}, "resnet18"
            )
    with pytest.raises(SettingsError, match="--to onnx: not known; choose one of torchvision, detectron2"):
        format_module("onnx")
    normed = {
        "backbone.fpn.extra_blocks.p6.weight": torch.ones(1),
        "backbone.fpn.inner_blocks.0.1.weight": torch.ones(1),
    }
    with pytest.raises(SettingsError, match="norms has them on P6 and P7 too"):
        mmdetection.from_torchvision(normed, "resnet18")
    towers = {f"head.regression_head.conv.0.{k}": torch.ones(24, 24, 3, 3) for k in ("0.weight", "1.weight")}
    with pytest.raises(SettingsError, match="its group norms have 32 groups, those of a head 24 channels wide 24 "):
        detectron2.from_torchvision(towers, "resnet18")
    towers = {"head.classification_head.conv.0.1.running_mean": torch.ones(1)}
    with pytest.raises(SettingsError, match="one for each level there"):
        detectron2.from_torchvision(towers, "resnet18")
    for library in (timm_format, mmdetection):
        with pytest.raises(SettingsError, match="timm has no network called mobilenet_v2"):  # that is torchvision's
            library.from_torchvision({}, "mobilenet_v2")
    other_units = {"backbone": "resnet18", "anchor_px": [4, 8, 16, 32, 64], **STATISTICS_OF_IMAGES}
    for library in (detectron2, mmdetection):
        with pytest.raises(SettingsError, match=r"strides \[8, 16, 32, 64, 128\].*this one in \[4, 8, 16, 32, 64\] px"):
            library.model_settings(weights_of("fcos"), other_units)
    with pytest.raises(SettingsError, match="timm's resnet18 has no layer9"):
        timm_format.from_torchvision({"backbone.body.layer9.weight": torch.ones(1)}, "resnet18")


def test_weights_that_do_not_fit_are_refused():
    state = weights_of("mask_rcnn_c4")
    state["roi_heads.mask_head.0.0.conv1.weight"] = state["roi_heads.mask_head.0.0.conv1.weight"] + 1
    with pytest.raises(WeightsError, match="boxes and masks of a C4 detector share it"):
        detectron2.from_torchvision(state, "resnet18")
    logits = {"head.classification_head.cls_logits.weight": torch.ones(36, 8, 3, 3)}
    with pytest.raises(WeightsError, match="can't be told without the box regression"):
        detectron2.from_torchvision(logits, "resnet18")
    for library in (detectron2, mmdetection):
        with pytest.raises(WeightsError, match=r"1 of 1 keys are not those of a detector known here \(sem_seg\.w\)"):
            library.to_torchvision({"sem_seg.w": torch.ones(1)})
    agnostic = {"cls": torch.ones(CLASSES + 1, 2), "box": torch.ones(4, 2)}
    with pytest.raises(WeightsError, match="not class-agnostic"):
        mmdetection.to_torchvision(
            {f"roi_head.bbox_head.fc_{n}.weight": agnostic[k] for n, k in (("cls", "cls"), ("reg", "box"))}
        )
    prefix = "roi_heads.box_predictor"
    with pytest.raises(WeightsError, match="not class-agnostic"):
        detectron2.to_torchvision(
            {f"{prefix}.cls_score.weight": agnostic["cls"], f"{prefix}.bbox_pred.weight": agnostic["box"]}
        )
    with pytest.raises(WeightsError, match=r"scales\.0\.scale: is not 1"):
        mmdetection.to_torchvision({"bbox_head.scales.0.scale": torch.tensor(1.5)})
    normed = detectron2.from_torchvision(weights_of("retinanet_v2"), "resnet18").state
    with pytest.raises(WeightsError, match=r"head\.cls_subnet\.0\.bias: is not zero"):
        detectron2.to_torchvision(normed | {"head.cls_subnet.0.bias": torch.ones(WIDTH)})
    with pytest.raises(WeightsError, match="resnet18 has no extra"):
        timm_format.to_torchvision({"extra": torch.ones(1)}, "resnet18")


def test_buffers_of_the_other_libraries_are_left_out():
    made = detectron2.from_torchvision(weights_of("faster_rcnn"), "resnet18").state
    buffers = {"pixel_mean": torch.ones(3), "pixel_std": torch.ones(3)}
    buffers["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(3, 4)
    assert detectron2.to_torchvision(made | buffers).keys() == detectron2.to_torchvision(made).keys()
    made = mmdetection.from_torchvision(weights_of("faster_rcnn"), "resnet18").state
    assert (
        mmdetection.to_torchvision(made | {"data_preprocessor.mean": torch.ones(3)}).keys()
        == mmdetection.to_torchvision(made).keys()
    )
    whole = {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000), "conv1.weight": torch.ones(64, 3, 7, 7)}
    assert timm_format.to_torchvision(whole, "resnet18").keys() == {"backbone.body.conv1.weight"}


# ---- what goes with the weights ---------------------------------------------------------------------------------

STATISTICS_OF_IMAGES = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def test_settings_of_the_model_there():
    described = {
        "backbone": "resnet18",
        "fpn_channels": WIDTH,
        "anchor_px": [8, 16, 32, 64, 96],
        **STATISTICS_OF_IMAGES,
    }
    wanted = detectron2.model_settings(weights_of("faster_rcnn_v2"), described)
    assert wanted["INPUT.FORMAT"] == "RGB"
    assert wanted["MODEL.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert wanted["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    assert wanted["MODEL.RESNETS.RES2_OUT_CHANNELS"] == 64
    assert wanted["MODEL.ANCHOR_GENERATOR.SIZES"] == [[8], [16], [32], [64], [96]]
    assert wanted["MODEL.RPN.CONV_DIMS"] == [-1, -1]
    assert wanted["MODEL.ROI_BOX_HEAD.NUM_CONV"] == 4
    assert wanted["MODEL.ROI_BOX_HEAD.POOLER_TYPE"] == "ROIAlign"
    assert wanted["MODEL.FPN.NORM"] == "BN"
    wide = detectron2.model_settings({}, {"backbone": "resnext50_32x4d", **STATISTICS_OF_IMAGES})
    assert (wide["MODEL.RESNETS.NUM_GROUPS"], wide["MODEL.RESNETS.WIDTH_PER_GROUP"]) == (32, 4)
    assert detectron2.model_settings(weights_of("retinanet"), described)["model.backbone.top_block.in_feature"] == "p5"
    assert detectron2.model_settings(weights_of("retinanet_v2"), described)["MODEL.RETINANET.NORM"] == "GN"
    assert "model.backbone.top_block.in_feature" not in detectron2.model_settings(weights_of("retinanet_v2"), described)

    wanted = mmdetection.model_settings(weights_of("faster_rcnn_v2"), described)
    assert wanted["model.data_preprocessor.bgr_to_rgb"] is True
    assert wanted["model.backbone.style"] == "pytorch"
    assert wanted["model.data_preprocessor.std"] == [58.395, 57.12, 57.375]
    assert wanted["model.rpn_head.num_convs"] == 2
    assert wanted["model.neck.norm_cfg.type"] == "BN"
    assert wanted["model.roi_head.bbox_roi_extractor.roi_layer.aligned"] is False
    dense = mmdetection.model_settings(weights_of("retinanet"), described)
    assert dense["model.neck.add_extra_convs"] == "on_output"
    assert dense["model.neck.relu_before_extra_convs"] is True
    assert mmdetection.model_settings(weights_of("retinanet_v2"), described)["model.neck.add_extra_convs"] == "on_input"
    from_c5 = mmdetection.model_settings(weights_of("retinanet"), described | {"p6_from": "c5"})
    assert from_c5["model.neck.add_extra_convs"] == "on_input"
    described["anchor_px"] = [8, 16, 32, 64, 128]
    points = mmdetection.model_settings(weights_of("fcos"), described)
    assert points["model.bbox_head.norm_on_bbox"] is True
    assert points["model.bbox_head.conv_bias"] is True
    assert points["model.bbox_head.norm_cfg.num_groups"] == 32
    assert mmdetection.model_settings(weights_of("fcos_plain"), described)["model.bbox_head.norm_cfg"] is None
    stages = mmdetection.model_settings(weights_of("cascade_rcnn_v2"), described | {"num_classes": CLASSES})
    assert all(stages[f"model.roi_head.bbox_head.{k}.num_classes"] == CLASSES for k in range(3))
    assert stages["model.roi_head.bbox_head.1.type"] == "Shared4Conv1FCBBoxHead"
    stages = detectron2.model_settings(weights_of("cascade_rcnn"), described | {"num_classes": CLASSES})
    assert stages["MODEL.ROI_HEADS.NAME"] == "CascadeROIHeads"
    assert stages["MODEL.ROI_HEADS.NUM_CLASSES"] == CLASSES
    described["anchor_px"] = [16, 32, 64, 128, 256]
    assert mmdetection.model_settings(weights_of("faster_rcnn"), described)[
        "model.rpn_head.anchor_generator.scales"
    ] == [1]
    dense = mmdetection.model_settings(weights_of("retinanet"), described)
    assert dense["model.bbox_head.anchor_generator.base_sizes"] == described["anchor_px"]
    dense = detectron2.model_settings(weights_of("retinanet"), described)
    assert dense["MODEL.ANCHOR_GENERATOR.SIZES"][0] == [16, 20, 25]
    wrapped = mmdetection.model_settings({}, {"backbone": "convnext_atto", **STATISTICS_OF_IMAGES})
    assert wrapped["model.backbone.model_name"] == "convnext_atto"


def test_every_format_offers_the_same():
    for name in FORMATS:
        module = format_module(name)
        if name in FOLDERS:
            assert '"there"' in module.loading("there")
            continue
        file = module.torch_file({"w": torch.ones(1)}, {"classes": ["a"]})
        inner = file.get("model", file.get("state_dict", file))
        assert torch.equal(inner["w"], torch.ones(1))
        for suffix in (".pth", ".safetensors"):
            assert f"x{suffix}" in module.loading(f"x{suffix}")
    assert detectron2.torch_file({}, {})["matching_heuristics"] is False
    assert mmdetection.torch_file({}, {"classes": ["a", "b"]})["meta"]["dataset_meta"]["classes"] == ("a", "b")
