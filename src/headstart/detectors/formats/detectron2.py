"""detectron2: its ResNets, FPN, R-CNN, Cascade R-CNN, RetinaNet and FCOS.

What differs besides the names:

* the softmax has the background last, and nothing is predicted for it; sigmoid heads have no class 0;
* the anchors of one place are ordered by size, then aspect ratio; torchvision's the other way round;
* FCOS's places are in the middles of cells (:func:`~headstart.detectors.formats.renaming.point_offset`);
* convolutions before a norm in a RetinaNet's towers have a bias: zeros are written;
* batch norms there are mostly frozen ones, which have no ``num_batches_tracked``: it is left out. (It counts for
  batch norms without a momentum alone, and torch itself starts it at zero where it is not in a file.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    anchor_octave,
    anchor_rows,
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
    translate,
    translate_back,
    trimmed,
    without_background,
)
from headstart.errors import SettingsError, WeightsError

NAME = "detectron2"
COUNTER = "num_batches_tracked"
_REGRESSION = "head.regression_head.bbox_reg.weight"


def from_torchvision(state: Mapping[str, Tensor], backbone: str) -> Translated:
    """A detector's weights for detectron2's model of the same family.

    Args:
        state: under torchvision's names; may be some of its parts only.
        backbone: its name.

    Raises:
        SettingsError: detectron2 has no such backbone or part.
        WeightsError: the weights are not those of a detector of a known family.
    """
    refuse_composite(state, NAME)
    refuse_transformer(state, NAME)
    if not is_resnet(backbone):
        raise SettingsError(
            f"--to {NAME}: its own backbones are built differently from timm's {backbone}, so these weights fit none "
            "of them; use --to torchvision, mmdetection or timm"
        )
    kept, copies = split_shared_stage(state)
    counters = [key for key in kept if key.endswith(COUNTER)]
    kept = {key: value for key, value in kept.items() if not key.endswith(COUNTER)}
    form = Form.of(kept)
    if any(re.match(r"head\..*\.running_mean", key) for key in kept):
        raise SettingsError(f"--to {NAME}: a dense head with batch norm has one for each level there, here one for all")
    if form.tower_norm and groups_of(form.tower_width(kept) or 32) != 32:
        raise SettingsError(
            f"--to {NAME}: its group norms have 32 groups, those of a head {form.tower_width(kept)} channels wide "
            f"{groups_of(form.tower_width(kept))} (detector.fpn_channels)"
        )
    made = translate(kept, _rules(form), _layouts(form, kept.get(_REGRESSION), kept), NAME)
    if form.tower_norm and not form.point_towers:
        made |= {_bias_of(name): made[name].new_zeros(len(made[name])) for name in made if _TOWER.fullmatch(name)}
    dropped = {
        "the mask head's copy of the block it shares with the box head": copies,
        "counters of batch norms, which are not used": counters,
    }
    return Translated(made, {reason: keys for reason, keys in dropped.items() if keys}, trimmed(kept))


def to_torchvision(state: Mapping[str, Tensor], backbone: str = "resnet50") -> dict[str, Tensor]:
    """The inverse of :func:`from_torchvision`: for ``load_state_dict`` of torchvision's model of the same family.

    Raises:
        WeightsError: there are keys that detectron2's models of these families do not have, or values that
            torchvision's have no place for.
    """
    kept = {
        name: value
        for name, value in state.items()
        if name not in ("pixel_mean", "pixel_std") and "anchor_generator.cell_anchors" not in name
    }
    points = "head.ctrness.weight" in kept
    norm = any(re.match(r"head\.(cls|bbox)_subnet\.1\.", name) for name in kept)
    form = Form(
        body=any(name.startswith("backbone.bottom_up.") for name in kept),
        levels=6 - min((int(n[len(_LATERAL) :].split(".")[0]) for n in kept if n.startswith(_LATERAL)), default=6),
        rpn_convs=max(1, count(kept, r"proposal_generator\.rpn_head\.conv\.conv(\d+)\.")),
        box_convs=max(0, count(kept, r"roi_heads\.box_head(?:\.\d+)?\.conv(\d+)\.") - 1),
        point_towers=points,
        tower_norm=norm,
    )
    if form.tower_norm and not points:
        for name in [_bias_of(name) for name in kept if _TOWER.fullmatch(name)]:
            if kept.get(name, torch.zeros(1)).any():
                raise WeightsError(f"{name}: is not zero, and torchvision's convolution before a norm has no bias")
            kept.pop(name, None)
    per_class = kept.get("roi_heads.box_predictor.bbox_pred.weight")
    scores = kept.get("roi_heads.box_predictor.cls_score.weight")
    if per_class is not None and scores is not None and len(per_class) != 4 * (len(scores) - 1):
        raise WeightsError(
            f"roi_heads.box_predictor.bbox_pred.weight: {len(per_class)} rows for {len(scores) - 1} classes; "
            "expected 4 for each (torchvision's box regression is not class-agnostic)"
        )
    made = translate_back(kept, _rules(form), _layouts(form, kept.get("head.bbox_pred.weight"), kept), NAME)
    return made | _shared_with_masks(made)


_LATERAL = "backbone.fpn_lateral"
_TOWER = re.compile(r"head\.(cls|bbox)_subnet\.(0|3|6|9|12|15|18|21)\.weight")


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _shared_with_masks(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A C4 detector's 5th block once more, under the mask head's name, where there is a mask predictor."""
    if "roi_heads.mask_predictor.conv5_mask.weight" not in made:
        return {}
    shared = re.compile(r"roi_heads\.box_head\.0\.\d+\.(conv|bn|downsample).*")
    return {key.replace("box_head", "mask_head", 1): value for key, value in made.items() if shared.fullmatch(key)}


def _blocks(ours: str, theirs: str) -> list[Rule]:
    """The blocks of one ResNet stage."""
    return [
        Rule(f"{ours}.<b>.conv<c>.<p>", f"{theirs}.<b>.conv<c>.<p>"),
        Rule(f"{ours}.<b>.bn<c>.<n>", f"{theirs}.<b>.conv<c>.norm.<n>"),
        Rule(f"{ours}.<b>.downsample.0.<p>", f"{theirs}.<b>.shortcut.<p>"),
        Rule(f"{ours}.<b>.downsample.1.<n>", f"{theirs}.<b>.shortcut.norm.<n>"),
    ]


def _box_head(ours: str, theirs: str, convs: int) -> list[Rule]:
    if not convs:
        return [Rule(f"{ours}.fc6.<p>", f"{theirs}.fc1.<p>"), Rule(f"{ours}.fc7.<p>", f"{theirs}.fc2.<p>")]
    return [
        Rule(f"{ours}.<k>.0.<p>", f"{theirs}.conv<k+1>.<p>"),
        Rule(f"{ours}.<k>.1.<n>", f"{theirs}.conv<k+1>.norm.<n>"),
        Rule(f"{ours}.{convs + 1}.<p>", f"{theirs}.fc1.<p>"),  # a Flatten stands between
    ]


def _rules(form: Form) -> list[Rule]:
    body, bottom = ("backbone.body", "backbone.bottom_up") if form.body else ("backbone", "backbone")
    level = form.first_level
    rpn, rpn_there = "rpn.head", "proposal_generator.rpn_head"
    rules = [
        Rule(f"{body}.conv1.<p>", f"{bottom}.stem.conv1.<p>"),
        Rule(f"{body}.bn1.<n>", f"{bottom}.stem.conv1.norm.<n>"),
        *_blocks(f"{body}.layer<s>", f"{bottom}.res<s+1>"),
        Rule("backbone.fpn.inner_blocks.<k>.0.<p>", f"backbone.fpn_lateral<k+{level}>.<p>"),
        Rule("backbone.fpn.inner_blocks.<k>.1.<n>", f"backbone.fpn_lateral<k+{level}>.norm.<n>"),
        Rule("backbone.fpn.layer_blocks.<k>.0.<p>", f"backbone.fpn_output<k+{level}>.<p>"),
        Rule("backbone.fpn.layer_blocks.<k>.1.<n>", f"backbone.fpn_output<k+{level}>.norm.<n>"),
        Rule("backbone.fpn.extra_blocks.p<k>.<p>", "backbone.top_block.p<k>.<p>"),
        Rule(f"{rpn}.conv.<k>.0.<p>", f"{rpn_there}.conv.conv<k>.<p>")
        if form.rpn_convs > 1
        else Rule(f"{rpn}.conv.0.0.<p>", f"{rpn_there}.conv.<p>"),
        Rule(f"{rpn}.cls_logits.<p>", f"{rpn_there}.objectness_logits.<p>"),
        Rule(f"{rpn}.bbox_pred.<p>", f"{rpn_there}.anchor_deltas.<p>"),
        *_blocks("roi_heads.box_head.0", "roi_heads.res5"),
        *_box_head("roi_heads.box_head", "roi_heads.box_head", form.box_convs),
        *_box_head("roi_heads.box_heads.<s>", "roi_heads.box_head.<s>", form.box_convs),
        Rule("roi_heads.box_predictor.cls_score.<p>", "roi_heads.box_predictor.cls_score.<p>"),
        Rule("roi_heads.box_predictor.bbox_pred.<p>", "roi_heads.box_predictor.bbox_pred.<p>"),
        Rule("roi_heads.box_predictors.<s>.cls_score.<p>", "roi_heads.box_predictor.<s>.cls_score.<p>"),
        Rule("roi_heads.box_predictors.<s>.bbox_pred.<p>", "roi_heads.box_predictor.<s>.bbox_pred.<p>"),
        Rule("roi_heads.mask_head.<k>.0.<p>", "roi_heads.mask_head.mask_fcn<k+1>.<p>"),
        Rule("roi_heads.mask_head.<k>.1.<n>", "roi_heads.mask_head.mask_fcn<k+1>.norm.<n>"),
        Rule("roi_heads.mask_predictor.conv5_mask.<p>", "roi_heads.mask_head.deconv.<p>"),
        Rule("roi_heads.mask_predictor.mask_fcn_logits.<p>", "roi_heads.mask_head.predictor.<p>"),
        Rule("head.classification_head.cls_logits.<p>", "head.cls_score.<p>"),
        Rule("head.regression_head.bbox_reg.<p>", "head.bbox_pred.<p>"),
        Rule("head.regression_head.bbox_ctrness.<p>", "head.ctrness.<p>"),
    ]
    for ours, theirs in (("classification", "cls"), ("regression", "bbox")):
        tower, subnet = f"head.{ours}_head.conv", f"head.{theirs}_subnet"
        conv, norm = ("<k*3>", "<k*3+1>") if form.point_towers else ("<k>.0", "<k>.1")
        rules.append(Rule(f"{tower}.{conv}.<p>", f"{subnet}.<k*{3 if form.tower_norm else 2}>.<p>"))
        rules.append(Rule(f"{tower}.{norm}.<p>", f"{subnet}.<k*3+1>.<p>"))
    return rules


def _layouts(form: Form, regression: Tensor | None, keys: Mapping[str, Tensor]) -> list[Layout]:
    layouts = [
        background_last(),
        without_background(BOX_DELTAS, 4),
        without_background(MASK_LOGITS, 1),
        anchor_rows(r"rpn\.head\.cls_logits\.(weight|bias)", 1),
        anchor_rows(r"rpn\.head\.bbox_pred\.(weight|bias)", 4),
        anchor_rows(r"head\.regression_head\.bbox_reg\.(weight|bias)", 4),
    ]
    classes = next((key for key in keys if re.match(r"head\.(classification_head\.cls_logits|cls_score)\.", key)), None)
    if classes is not None:
        layouts.append(dense_classes(anchors_of(regression, classes), size_major=True))
    if form.point_towers:
        layouts.append(point_offset())
    return layouts


def model_settings(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What detectron2's configuration has to say for its model to be this detector, as far as the weights tell.

    Args:
        state: the detector's weights, under torchvision's names.
        settings: what it was built from.

    Raises:
        SettingsError: no configuration there can say it.
    """
    form = Form.of(state)
    check_units(form, settings, NAME)
    backbone = str(settings["backbone"])
    depth = resnet_depth(backbone)
    groups = re.search(r"_(\d+)x(\d+)d", backbone)
    wanted: dict[str, Any] = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [round(255 * value, 4) for value in settings["image_mean"]],
        "MODEL.PIXEL_STD": [round(255 * value, 4) for value in settings["image_std"]],
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NORM": "BN",
    }
    if depth < 50:
        wanted["MODEL.RESNETS.RES2_OUT_CHANNELS"] = 64
    if groups:
        wanted |= {"MODEL.RESNETS.NUM_GROUPS": int(groups[1]), "MODEL.RESNETS.WIDTH_PER_GROUP": int(groups[2])}
    if backbone.startswith("wide_"):
        wanted["MODEL.RESNETS.WIDTH_PER_GROUP"] = 128
    lateral = state.get("backbone.fpn.inner_blocks.0.0.weight")
    if lateral is not None:
        wanted["MODEL.FPN.OUT_CHANNELS"] = len(lateral)
        wanted["MODEL.FPN.NORM"] = "BN" if "backbone.fpn.inner_blocks.0.1.weight" in state else ""
    if "anchor_px" in settings and not form.point_towers:
        sides = list(settings["anchor_px"])
        levels = [[side] for side in sides] if form.rpn_convs else [anchor_octave(side) for side in sides]
        wanted["MODEL.ANCHOR_GENERATOR.SIZES"] = levels if form.body else [sides]
    if any(key.startswith("roi_heads.box_heads.") for key in state):
        wanted |= {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
    if settings.get("num_classes"):
        wanted[f"MODEL.{'ROI_HEADS' if form.rpn_convs else 'RETINANET'}.NUM_CLASSES"] = settings["num_classes"]
    if form.rpn_convs > 1:
        wanted["MODEL.RPN.CONV_DIMS"] = [-1] * form.rpn_convs
    if any(key.startswith("roi_heads.") for key in state):
        masks = "roi_heads.mask_predictor.conv5_mask.weight" in state
        for head in ["ROI_BOX_HEAD", "ROI_MASK_HEAD"] if masks else ["ROI_BOX_HEAD"]:
            wanted |= {f"MODEL.{head}.POOLER_TYPE": "ROIAlign", f"MODEL.{head}.POOLER_SAMPLING_RATIO": 2}
        if any(re.fullmatch(r"roi_heads\.mask_head\.\d+\.1\.running_mean", key) for key in state):
            wanted["MODEL.ROI_MASK_HEAD.NORM"] = "BN"
    linear = next(
        (v for k, v in state.items() if re.fullmatch(r"roi_heads\.box_heads?\.(0\.)?(fc6|5)\.weight", k)), None
    )
    if linear is not None:
        wanted |= {"MODEL.ROI_BOX_HEAD.NUM_CONV": form.box_convs, "MODEL.ROI_BOX_HEAD.FC_DIM": len(linear)}
        wanted["MODEL.ROI_BOX_HEAD.NUM_FC"] = 1 if form.box_convs else 2
        if form.box_convs:
            wanted |= {"MODEL.ROI_BOX_HEAD.NORM": "BN", "MODEL.ROI_BOX_HEAD.CONV_DIM": settings["fpn_channels"]}
    if form.tower_norm and not form.point_towers:
        wanted["MODEL.RETINANET.NORM"] = "GN"
    p6 = state.get("backbone.fpn.extra_blocks.p6.weight")
    if p6 is not None and (settings.get("p6_from") or ("p5" if p6.shape[0] == p6.shape[1] else "c5")) == "p5":
        wanted["model.backbone.top_block.in_feature"] = "p5"  # of a lazy configuration; YAML's is always res5
    return wanted


def torch_file(state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What ``DetectionCheckpointer`` reads. Without heuristics it takes names literally."""
    return {"model": dict(state), "__author__": "Headstart", "matching_heuristics": False}


def loading(file: str) -> str:
    if file.endswith(".pth"):
        return f'detectron2.checkpoint.DetectionCheckpointer(model).load("{file}")'
    return f'model.load_state_dict(safetensors.torch.load_file("{file}"), strict=False)'
