"""MMDetection 3: ResNet, ResNeXt and timm backbones, FPN, R-CNN, Cascade R-CNN, RetinaNet and FCOS.

What differs besides the names:

* the softmax has the background last, and nothing is predicted for it; sigmoid heads have no class 0;
* FCOS's places are in the middles of cells (:func:`~headstart.detectors.formats.renaming.point_offset`), and each
  level has a factor: ones are written.

The anchors of one place are in torchvision's order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from headstart.detectors.formats.renaming import (
    BOX_DELTAS,
    MASK_LOGITS,
    Form,
    Layout,
    Rule,
    Translated,
    anchors_of,
    background_last,
    check_units,
    count,
    dense_classes,
    groups_of,
    is_resnet,
    point_offset,
    refuse_composite,
    refuse_transformer,
    resnet_depth,
    split_shared_stage,
    timm_name,
    translate,
    translate_back,
    trimmed,
    without_background,
)
from headstart.errors import SettingsError, WeightsError

NAME = "mmdetection"
ANCHOR_PX = [32, 64, 128, 256, 512]  # of its configurations
_SCALE = re.compile(r"bbox_head\.scales\.\d+\.scale")
_POINT_REGRESSION, _ANCHOR_REGRESSION = "bbox_head.conv_reg.weight", "bbox_head.retina_reg.weight"


def from_torchvision(state: Mapping[str, Tensor], backbone: str) -> Translated:
    """A detector's weights for MMDetection's model of the same family.

    Args:
        state: under torchvision's names; may be some of its parts only.
        backbone: its name.

    Raises:
        SettingsError: MMDetection has no such backbone or part.
        WeightsError: the weights are not those of a detector of a known family.
    """
    refuse_composite(state, NAME)
    refuse_transformer(state, NAME)
    if not is_resnet(backbone):
        timm_name(backbone, NAME)
    if backbone.startswith("wide_resnet"):
        raise SettingsError(f"--to {NAME}: has no wide ResNet, so {backbone} fits no backbone there")
    kept, copies = split_shared_stage(state)
    form = Form.of(kept)
    if "backbone.fpn.extra_blocks.p6.weight" in kept and "backbone.fpn.inner_blocks.0.1.weight" in kept:
        raise SettingsError(f"--to {NAME}: an FPN with norms has them on P6 and P7 too; here there are none on these")
    norms = {part: _norm(kept, part + ".") for part in ("backbone.fpn", "roi_heads", "head")}
    regression = kept.get("head.regression_head.bbox_reg.weight")
    made = translate(kept, _rules(form, norms, timm=not is_resnet(backbone)), _layouts(form, regression, kept), NAME)
    if _POINT_REGRESSION in made:
        levels = form.levels + 2 if form.levels else 5
        made |= {f"bbox_head.scales.{level}.scale": torch.tensor(1.0) for level in range(levels)}
    dropped = {"the mask head's copy of the block it shares with the box head": copies} if copies else {}
    return Translated(made, dropped, trimmed(kept))


def to_torchvision(state: Mapping[str, Tensor], backbone: str = "resnet50") -> dict[str, Tensor]:
    """The inverse of :func:`from_torchvision`: for ``load_state_dict`` of torchvision's model of the same family.

    Raises:
        WeightsError: there are keys that MMDetection's models of these families do not have, or values that
            torchvision's have no place for.
    """
    kept = {name: value for name, value in state.items() if not name.startswith("data_preprocessor.")}
    for name in [name for name in kept if _SCALE.fullmatch(name)]:
        if kept.pop(name) != 1:
            raise WeightsError(f"{name}: is not 1, and torchvision's FCOS has no factor for each level")
    points = any(re.match(r"bbox_head\.conv_(cls|reg|centerness)\.", name) for name in kept)
    c4 = any(name.startswith("roi_head.shared_head.") for name in kept)
    form = Form(
        body=not c4,
        levels=count(kept, r"neck\.lateral_convs\.(\d+)\."),
        rpn_convs=max(1, count(kept, r"rpn_head\.rpn_conv\.(\d+)\.")),
        box_convs=count(kept, r"roi_head\.bbox_head(?:\.\d+)?\.shared_convs\.(\d+)\."),
        point_towers=points,
        tower_norm=any(re.match(r"bbox_head\.(cls|reg)_convs\.0\.(gn|bn)\.", name) for name in kept),
    )
    agnostic = kept.get("roi_head.bbox_head.fc_reg.weight")
    scores = kept.get("roi_head.bbox_head.fc_cls.weight")
    if agnostic is not None and scores is not None and len(agnostic) != 4 * (len(scores) - 1):
        raise WeightsError(
            f"roi_head.bbox_head.fc_reg.weight: {len(agnostic)} rows for {len(scores) - 1} classes; expected 4 for "
            "each (torchvision's box regression is not class-agnostic)"
        )
    there = {"backbone.fpn": "neck.", "roi_heads": "roi_head.", "head": "bbox_head."}
    norms = {part: _norm_there(kept, prefix) for part, prefix in there.items()}
    regression = kept.get(_POINT_REGRESSION if points else _ANCHOR_REGRESSION)
    timm = any(name.startswith("backbone.timm_model.") for name in kept)
    made = translate_back(kept, _rules(form, norms, timm), _layouts(form, regression, kept), NAME)
    if c4 and "roi_heads.mask_predictor.conv5_mask.weight" in made:
        block = {key: value for key, value in made.items() if key.startswith("roi_heads.box_head.0.")}
        made |= {key.replace("box_head", "mask_head", 1): value for key, value in block.items()}
    return made


def _norm(state: Iterable[str], prefix: str) -> str:
    """What MMCV calls the norms below ``prefix``: only batch norms keep running statistics."""
    return "bn" if any(key.startswith(prefix) and key.endswith("running_mean") for key in state) else "gn"


def _norm_there(state: Iterable[str], prefix: str) -> str:
    return "bn" if any(name.startswith(prefix) and ".bn." in name for name in state) else "gn"


def _box_head(ours: str, theirs: str, convs: int, norm: str) -> list[Rule]:
    if not convs:
        return [Rule(f"{ours}.fc{6 + k}.<p>", f"{theirs}.shared_fcs.{k}.<p>") for k in range(2)]
    return [
        Rule(f"{ours}.<k>.0.<p>", f"{theirs}.shared_convs.<k>.conv.<p>"),
        Rule(f"{ours}.<k>.1.<n>", f"{theirs}.shared_convs.<k>.{norm}.<n>"),
        Rule(f"{ours}.{convs + 1}.<p>", f"{theirs}.shared_fcs.0.<p>"),  # a Flatten stands between
    ]


def _backbone(form: Form, timm: bool) -> list[Rule]:
    """A ResNet's names are torchvision's; a timm network is wrapped."""
    body = "backbone.body" if form.body else "backbone"
    if timm:
        return [Rule(f"{body}.<rest>", "backbone.timm_model.<rest>")]
    blocks = ["conv<c>.<p>", "bn<c>.<n>", "downsample.0.<p>", "downsample.1.<n>"]
    names = ["conv1.<p>", "bn1.<n>", *(f"layer<s>.<b>.{name}" for name in blocks)]
    shared = [Rule(f"roi_heads.box_head.0.<b>.{n}", f"roi_head.shared_head.layer4.<b>.{n}") for n in blocks]
    return [*(Rule(f"{body}.{name}", f"backbone.{name}") for name in names), *shared]


def _rules(form: Form, norms: Mapping[str, str], timm: bool) -> list[Rule]:
    fpn, roi, dense = norms["backbone.fpn"], norms["roi_heads"], norms["head"]
    rules = [
        Rule("backbone.fpn.inner_blocks.<k>.0.<p>", "neck.lateral_convs.<k>.conv.<p>"),
        Rule("backbone.fpn.inner_blocks.<k>.1.<n>", f"neck.lateral_convs.<k>.{fpn}.<n>"),
        *(
            Rule(f"backbone.fpn.extra_blocks.p{6 + extra}.<p>", f"neck.fpn_convs.{form.levels + extra}.conv.<p>")
            for extra in range(2)
            if form.levels
        ),
        Rule("backbone.fpn.layer_blocks.<k>.0.<p>", "neck.fpn_convs.<k>.conv.<p>"),
        Rule("backbone.fpn.layer_blocks.<k>.1.<n>", f"neck.fpn_convs.<k>.{fpn}.<n>"),
        *_backbone(form, timm),
        Rule("rpn.head.conv.<k>.0.<p>", "rpn_head.rpn_conv.<k>.conv.<p>")
        if form.rpn_convs > 1
        else Rule("rpn.head.conv.0.0.<p>", "rpn_head.rpn_conv.<p>"),
        Rule("rpn.head.cls_logits.<p>", "rpn_head.rpn_cls.<p>"),
        Rule("rpn.head.bbox_pred.<p>", "rpn_head.rpn_reg.<p>"),
        *_box_head("roi_heads.box_head", "roi_head.bbox_head", form.box_convs, roi),
        *_box_head("roi_heads.box_heads.<s>", "roi_head.bbox_head.<s>", form.box_convs, roi),
        Rule("roi_heads.box_predictor.cls_score.<p>", "roi_head.bbox_head.fc_cls.<p>"),
        Rule("roi_heads.box_predictor.bbox_pred.<p>", "roi_head.bbox_head.fc_reg.<p>"),
        Rule("roi_heads.box_predictors.<s>.cls_score.<p>", "roi_head.bbox_head.<s>.fc_cls.<p>"),
        Rule("roi_heads.box_predictors.<s>.bbox_pred.<p>", "roi_head.bbox_head.<s>.fc_reg.<p>"),
        Rule("roi_heads.mask_head.<k>.0.<p>", "roi_head.mask_head.convs.<k>.conv.<p>"),
        Rule("roi_heads.mask_head.<k>.1.<n>", f"roi_head.mask_head.convs.<k>.{roi}.<n>"),
        Rule("roi_heads.mask_predictor.conv5_mask.<p>", "roi_head.mask_head.upsample.<p>"),
        Rule("roi_heads.mask_predictor.mask_fcn_logits.<p>", "roi_head.mask_head.conv_logits.<p>"),
    ]
    layer = "conv" if form.point_towers else "retina"
    rules += [
        Rule("head.classification_head.cls_logits.<p>", f"bbox_head.{layer}_cls.<p>"),
        Rule("head.regression_head.bbox_reg.<p>", f"bbox_head.{layer}_reg.<p>"),
        Rule("head.regression_head.bbox_ctrness.<p>", "bbox_head.conv_centerness.<p>"),
    ]
    for ours, theirs in (("classification", "cls"), ("regression", "reg")):
        tower, convs = f"head.{ours}_head.conv", f"bbox_head.{theirs}_convs.<k>"
        conv, norm = (
            (f"{tower}.<k*3>", f"{tower}.<k*3+1>") if form.point_towers else (f"{tower}.<k>.0", f"{tower}.<k>.1")
        )
        rules += [Rule(f"{conv}.<p>", f"{convs}.conv.<p>"), Rule(f"{norm}.<n>", f"{convs}.{dense}.<n>")]
    return rules


def _layouts(form: Form, regression: Tensor | None, keys: Mapping[str, Tensor]) -> list[Layout]:
    layouts = [background_last(), without_background(BOX_DELTAS, 4), without_background(MASK_LOGITS, 1)]
    scores = re.compile(r"(head\.classification_head\.cls_logits|bbox_head\.(conv|retina)_cls)\.")
    classes = next((key for key in keys if scores.match(key)), None)
    if classes is not None:
        layouts.append(dense_classes(anchors_of(regression, classes), size_major=False))
    if form.point_towers:
        layouts.append(point_offset())
    return layouts


def model_settings(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What MMDetection's configuration has to say for its model to be this detector, as far as the weights tell.

    Args:
        state: the detector's weights, under torchvision's names.
        settings: what it was built from.

    Raises:
        SettingsError: no configuration there can say it.
    """
    form = Form.of(state)
    check_units(form, settings, NAME)
    backbone = str(settings["backbone"])
    wanted: dict[str, Any] = {
        "model.data_preprocessor.mean": [round(255 * value, 4) for value in settings["image_mean"]],
        "model.data_preprocessor.std": [round(255 * value, 4) for value in settings["image_std"]],
        "model.data_preprocessor.bgr_to_rgb": True,
    }
    groups = re.search(r"_(\d+)x(\d+)d", backbone)
    if is_resnet(backbone):
        wanted |= {"model.backbone.depth": resnet_depth(backbone), "model.backbone.style": "pytorch"}
    else:
        wanted |= {
            "model.backbone.type": "mmpretrain.TIMMBackbone",
            "model.backbone.model_name": timm_name(backbone, NAME),
        }
        wanted["model.backbone.features_only"] = True
    if groups:
        wanted |= {"model.backbone.type": "ResNeXt", "model.backbone.groups": int(groups[1])}
        wanted["model.backbone.base_width"] = int(groups[2])
    if "backbone.fpn.inner_blocks.0.1.weight" in state:
        wanted["model.neck.norm_cfg.type"] = _norm(state, "backbone.fpn.").upper()
    p6 = state.get("backbone.fpn.extra_blocks.p6.weight")
    if p6 is not None:
        source = settings.get("p6_from") or ("p5" if p6.shape[0] == p6.shape[1] else "c5")
        wanted["model.neck.add_extra_convs"] = {"p5": "on_output", "c5": "on_input"}[source]
        wanted["model.neck.relu_before_extra_convs"] = True
    if form.rpn_convs > 1:
        wanted["model.rpn_head.num_convs"] = form.rpn_convs
    if any(key.startswith("roi_heads.") for key in state):
        masks = "roi_heads.mask_predictor.conv5_mask.weight" in state
        for kind in ("bbox", "mask") if masks else ("bbox",):
            layer = f"model.roi_head.{kind}_roi_extractor.roi_layer"
            wanted |= {f"{layer}.sampling_ratio": 2, f"{layer}.aligned": False}
        if any(re.fullmatch(r"roi_heads\.mask_head\.\d+\.1\.\w+", key) for key in state):
            wanted["model.roi_head.mask_head.norm_cfg.type"] = _norm(state, "roi_heads.").upper()
    heads = _heads(state, form)
    if form.box_convs:
        typed = {"type": "Shared4Conv1FCBBoxHead", "norm_cfg.type": _norm(state, "roi_heads.").upper()}
        wanted |= {f"{head}.{name}": value for head in heads for name, value in typed.items()}
    if settings.get("num_classes"):
        masked = ["model.roi_head.mask_head"] if "roi_heads.mask_predictor.conv5_mask.weight" in state else []
        wanted |= {f"{head}.num_classes": settings["num_classes"] for head in [*heads, *masked]}
    if len(heads) > 1:  # its own default is rounded to three digits
        wanted[f"{heads[-1]}.bbox_coder.target_stds"] = [1 / 30, 1 / 30, 1 / 15, 1 / 15]
    sides = list(settings.get("anchor_px", ANCHOR_PX))
    if sides != ANCHOR_PX and not form.point_towers:
        anchors = f"model.{'rpn_head' if form.rpn_convs else 'bbox_head'}.anchor_generator"
        if not form.body:
            wanted[f"{anchors}.scales"] = [side / 16 for side in sides]
        else:
            wanted |= {f"{anchors}.base_sizes": sides}
            wanted |= {f"{anchors}.scales": [1]} if form.rpn_convs else {f"{anchors}.octave_base_scale": 1}
    if form.point_towers:
        flags = ("conv_bias", "norm_on_bbox", "centerness_on_reg", "center_sampling")
        wanted |= {f"model.bbox_head.{flag}": True for flag in flags}
    towers = form.tower_width(state)
    if form.tower_norm and towers:
        wanted["model.bbox_head.norm_cfg.type"] = norm = _norm(state, "head.").upper()
        if norm == "GN":
            wanted["model.bbox_head.norm_cfg.num_groups"] = groups_of(towers)
    elif form.point_towers:
        wanted["model.bbox_head.norm_cfg"] = None
    return wanted


def _heads(state: Mapping[str, Tensor], form: Form) -> list[str]:
    """Where in a configuration the box heads are."""
    if not form.rpn_convs:
        return ["model.bbox_head"]
    stages = count(state, r"roi_heads\.box_heads\.(\d+)\.")
    return [f"model.roi_head.bbox_head.{stage}" for stage in range(stages)] or ["model.roi_head.bbox_head"]


def torch_file(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What ``load_from`` and ``init_detector`` read; the class names go with it."""
    classes = metadata.get("classes")
    return {"state_dict": dict(state), "meta": {"dataset_meta": {"classes": tuple(classes)}} if classes else {}}


def loading(file: str) -> str:
    if file.endswith(".pth"):
        return f'load_from = "{file}"  # in the configuration, or --cfg-options load_from={file}'
    return f'model.load_state_dict(safetensors.torch.load_file("{file}"), strict=False)'
