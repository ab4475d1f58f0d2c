"""Hugging Face transformers: the folders of ``DetrForObjectDetection`` and ``DeformableDetrForObjectDetection``.

Names, layouts and settings; :mod:`headstart.detectors.formats.transformers_folders` reads and writes the folders.
Nothing of transformers is imported. What differs besides the names:

* the three projections of an attention layer are one matrix here and three there;
* every decoder layer of a Deformable DETR has its heads there, as in :mod:`headstart.detectors.formats.originals`;
* batch norms there are frozen and have no ``num_batches_tracked``.

transformers 5 renamed weights (``o_proj``, ``mlp.fc1``, ``model.backbone.model``), but writes files with the names of
version 4, and reads both; so does this file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.detectors.backbones import SWIN, resnets
from headstart.detectors.formats import originals
from headstart.detectors.formats.renaming import Rule, Translated, refuse_composite, translate, translate_back
from headstart.errors import SettingsError, WeightsError

NAME = "transformers"
MODELS = {"detr": "DetrForObjectDetection", "deformable_detr": "DeformableDetrForObjectDetection"}
LOSSES = {  # of training alone
    "class_cost": "class_cost",
    "l1_cost": "bbox_cost",
    "giou_cost": "giou_cost",
    "l1_weight": "bbox_loss_coefficient",
    "giou_weight": "giou_loss_coefficient",
    "no_object": "eos_coefficient",
}
COUNTER = "num_batches_tracked"
_BACKBONE = "model.backbone.conv_encoder.model."
_RENAMED = (  # in the order they are applied
    (re.compile(r"^(?!model\.|class_|bbox_)"), "model."),  # a model without its heads
    (re.compile(r"^model\.backbone\.model\."), _BACKBONE),
    (re.compile(rf"^{re.escape(_BACKBONE)}_backbone\."), _BACKBONE),
    (re.compile(r"_attn\.o_proj\."), "_attn.out_proj."),
    (re.compile(r"(layers\.\d+)\.mlp\.fc"), r"\1.fc"),
)


# ---- weights ----------------------------------------------------------------------------------------------------


def from_torchvision(state: Mapping[str, Tensor], backbone: str) -> Translated:
    """The weights of a DETR or Deformable DETR for transformers' model.

    Args:
        state: under the detector's names; may be some of its parts only.
        backbone: its name.

    Raises:
        SettingsError: transformers can't have such a backbone, or these are the weights of another detector.
    """
    refuse_composite(state, NAME)
    if not any(key.startswith("transformer.decoder.") for key in state):
        raise SettingsError(
            f"--to {NAME}: no weights of a DETR or Deformable DETR, the detectors it has in common with us"
        )
    if "transformer.encoder.norm.weight" in state:
        raise SettingsError(
            f"--to {NAME}: its DETR has the norms after each layer, this one before (detector.pre_norm)"
        )
    check_backbone(backbone)
    counters = [key for key in state if key.endswith(COUNTER)]
    kept = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    dropped = {"counters of batch norms, which are frozen there": counters}
    deformable = "transformer.level_embed" in state
    if deformable:
        kept, homeless = originals.all_heads(kept)
        dropped["of classes whose number is not known without the class layer"] = homeless
    made = translate(_split(kept), _rules(deformable), [], NAME)
    return Translated(made, {reason: keys for reason, keys in dropped.items() if keys})


def to_torchvision(state: Mapping[str, Tensor], backbone: str = "", refine: bool | None = None) -> dict[str, Tensor]:
    """The inverse of :func:`from_torchvision`.

    Args:
        refine: of a Deformable DETR, whether it refines boxes layer by layer; None: as far as the names tell.

    Raises:
        WeightsError: there are keys that transformers' models of these kinds do not have, or values that the detectors
            here have no place for.
    """
    named = {old_name(name): value for name, value in state.items() if not name.endswith(COUNTER)}
    deformable = "model.level_embed" in named
    made = translate_back(named, [*_HF_RESNET, *_rules(deformable)], [], NAME)
    made = _joined(made)
    return originals.own_heads(made, refine) if deformable else made


def is_transformers(names: Mapping[str, Any]) -> bool:
    """Whether weights have transformers' names."""
    old = [old_name(name) for name in names]
    return any(name.startswith(_BACKBONE) for name in old) and any(".self_attn_layer_norm." in name for name in old)


def old_name(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name, count=1)
    return name


def _rules(deformable: bool) -> list[Rule]:
    """From the names of the original repositories, the projections of attention already apart."""
    rules = [
        Rule("backbone.body.<rest>", f"{_BACKBONE}<rest>"),
        Rule("query_embed.weight", "model.query_position_embeddings.weight"),
    ]
    for coder in ("encoder", "decoder"):
        ours, theirs = f"transformer.{coder}.layers.<i>", f"model.{coder}.layers.<i>"
        cross = "cross_attn" if deformable else "multihead_attn"
        norms = ["final_layer_norm"]
        if coder == "decoder":
            norms.insert(0, "encoder_attn_layer_norm")
            rules.append(Rule(f"{ours}.{cross}.<rest>", f"{theirs}.encoder_attn.<rest>"))
        norms.insert(1 if deformable and coder == "decoder" else 0, "self_attn_layer_norm")  # numbered as written there
        rules += [Rule(f"{ours}.norm{n}.<p>", f"{theirs}.{norm}.<p>") for n, norm in enumerate(norms, 1)]
        rules.append(Rule(f"{ours}.self_attn.<rest>", f"{theirs}.self_attn.<rest>"))
        rules += [Rule(f"{ours}.linear{n}.<p>", f"{theirs}.fc{n}.<p>") for n in (1, 2)]
    if not deformable:
        return [
            *rules,
            Rule("input_proj.<p>", "model.input_projection.<p>"),
            Rule("transformer.decoder.norm.<p>", "model.decoder.layernorm.<p>"),
            Rule("class_embed.<p>", "class_labels_classifier.<p>"),
            Rule("bbox_embed.layers.<j>.<p>", "bbox_predictor.layers.<j>.<p>"),
        ]
    rules += [
        Rule("input_proj.<k>.<j>.<p>", "model.input_proj.<k>.<j>.<p>"),
        Rule("transformer.level_embed", "model.level_embed"),
        Rule("class_embed.<k>.<p>", "class_embed.<k>.<p>"),
        Rule("bbox_embed.<k>.layers.<j>.<p>", "bbox_embed.<k>.layers.<j>.<p>"),
        Rule("transformer.decoder.class_embed.<rest>", "model.decoder.class_embed.<rest>"),
        Rule("transformer.decoder.bbox_embed.<rest>", "model.decoder.bbox_embed.<rest>"),
    ]
    layers = ("reference_points", "enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
    return rules + [Rule(f"transformer.{layer}.<p>", f"model.{layer}.<p>") for layer in layers]


_STAGE = f"{_BACKBONE}encoder.stages.<s>.layers.<b>"
_HF_RESNET = [  # transformers' own ResNets, in torchvision's names
    Rule("backbone.body.conv1.<p>", f"{_BACKBONE}embedder.embedder.convolution.<p>"),
    Rule("backbone.body.bn1.<n>", f"{_BACKBONE}embedder.embedder.normalization.<n>"),
    Rule("backbone.body.layer<s+1>.<b>.conv<c+1>.<p>", f"{_STAGE}.layer.<c>.convolution.<p>"),
    Rule("backbone.body.layer<s+1>.<b>.bn<c+1>.<n>", f"{_STAGE}.layer.<c>.normalization.<n>"),
    Rule("backbone.body.layer<s+1>.<b>.downsample.0.<p>", f"{_STAGE}.shortcut.convolution.<p>"),
    Rule("backbone.body.layer<s+1>.<b>.downsample.1.<n>", f"{_STAGE}.shortcut.normalization.<n>"),
]


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention's ``in_proj`` (3 D, ...) as three."""
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        before, found, leaf = key.partition(".in_proj_")
        if found:
            made |= {f"{before}.{name}.{leaf}": part for name, part in zip(_PROJECTIONS, value.chunk(3), strict=True)}
        else:
            made[key] = value
    return made


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Raises:
        WeightsError: of an attention layer's three projections some are missing.
    """
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.+)\.[qkv]_proj\.(weight|bias)", key)
        if match is None:
            made[key] = value
            continue
        joined = f"{match[1]}.in_proj_{match[2]}"
        if joined not in made:
            parts = [f"{match[1]}.{name}.{match[2]}" for name in _PROJECTIONS]
            missing = [part for part in parts if part not in state]
            if missing:
                raise WeightsError(f"{NAME} weights: {missing[0]} is missing beside {key}")
            made[joined] = torch.cat([state[part] for part in parts])
    return made


# ---- settings -------------------------------------------------------------------


def model_settings(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``config.json``, but for the classes' names.

    Args:
        state: the detector's weights.
        settings: what it was built from.

    Raises:
        SettingsError: transformers has no such model.
    """
    kind = str(settings["name"])
    if kind not in MODELS:
        raise SettingsError(f"--to {NAME}: has no {kind}; it goes for {' and '.join(MODELS)}")
    config: dict[str, Any] = {
        "architectures": [MODELS[kind]],
        "model_type": kind,
        "is_encoder_decoder": True,
        "num_channels": 3,
        "d_model": settings["width"],
        "encoder_layers": settings["encoder_layers"],
        "decoder_layers": settings["decoder_layers"],
        "encoder_attention_heads": settings["heads"],
        "decoder_attention_heads": settings["heads"],
        "encoder_ffn_dim": settings["feedforward"],
        "decoder_ffn_dim": settings["feedforward"],
        "num_queries": settings["num_queries"],
        "activation_function": "relu",
        "position_embedding_type": "sine",
        "dilation": False,
        "dropout": settings["dropout"],
        "attention_dropout": settings["dropout"],
        "activation_dropout": settings["dropout"],
        # The decoder's norm between its layers, where DETR has none, is what this does to transformers' DETR.
        "auxiliary_loss": kind == "deformable_detr",
        **_losses(settings),
        **_backbone_config(str(settings["backbone"]), settings.get("levels")),
    }
    if kind == "deformable_detr":
        check_width(settings["width"])
        if settings["decoder_layers"] == 1 and not settings["two_stage"]:
            raise SettingsError(
                f"--to {NAME}: its version 5 can't build a Deformable DETR of one decoder layer, since it looks for "
                "further heads to tie; expected detector.decoder_layers of 2 or more, or two_stage"
            )
        config |= {
            "num_feature_levels": settings["levels"],
            "encoder_n_points": settings["points"],
            "decoder_n_points": settings["points"],
            "with_box_refine": settings["refine"],
            "two_stage": settings["two_stage"],
            "two_stage_num_proposals": settings["num_queries"],
        }
    return config


def _losses(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Costs and weights, but those that are whole numbers there and not here."""
    found = {there: settings[here] for here, there in LOSSES.items() if here in settings}
    fitting = {name: value for name, value in found.items() if name == "eos_coefficient" or value == int(value)}
    return {name: value if name == "eos_coefficient" else int(value) for name, value in fitting.items()}


def processor_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``preprocessor_config.json``: images as the detector saw them."""
    short = settings["short_side_px"]
    return {
        "image_processor_type": "DetrImageProcessor" if settings["name"] == "detr" else "DeformableDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {
            "shortest_edge": max(short) if isinstance(short, list) else short,
            "longest_edge": settings["long_side_px"],
        },
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings["image_mean"]),
        "image_std": list(settings["image_std"]),
        "do_pad": True,
        "do_convert_annotations": True,
    }


def class_names(names: list[str]) -> dict[str, Any]:
    """``id2label`` and ``label2id``: output k is label k + 1 here."""
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _backbone_config(backbone: str, levels: int | None) -> dict[str, Any]:
    check_backbone(backbone)
    if backbone in resnets():  # what files of version 4 say
        return {
            "use_timm_backbone": True,
            "backbone": backbone,
            "use_pretrained_backbone": False,
            "backbone_config": None,
        }
    wanted = [32] if levels in (None, 1) else [8, 16, 32]
    strides = facts(backbone).strides
    last = {stride: number for number, stride in enumerate(strides)}
    return {
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": backbone,
            "num_channels": 3,
            "features_only": True,
            "use_pretrained_backbone": False,
            "out_indices": [last[stride] for stride in wanted],
        },
    }


def check_backbone(backbone: str) -> None:
    """
    Raises:
        SettingsError: transformers builds no such network, or another one under this name.
    """
    if backbone not in resnets() and (reason := facts(backbone).reason):
        raise SettingsError(f"{NAME}: {backbone} can't be the backbone of its models: {reason}")


class Facts(NamedTuple):
    strides: tuple[int, ...]  # of all maps
    reason: str  # why transformers' wrapper would compute something else; "" where it would not


@functools.lru_cache(maxsize=16)
def facts(backbone: str) -> Facts:
    """Of a timm network, from one without memory."""
    import timm
    from torch import nn

    backbone = SWIN.get(backbone, backbone)
    if not timm.is_model(backbone):
        return Facts((), "timm has no network of that name")
    try:
        with torch.device("meta"):
            net = timm.create_model(backbone, pretrained=False, features_only=True)
    except Exception as error:  # whatever this one of a thousand constructors may raise
        return Facts((), f"timm offers no feature maps of it ({error})")
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    reason = ""
    if getattr(net, "output_fmt", "NCHW") == "NHWC":
        reason = "its maps have their channels last, and they are taken as they are"
    elif getattr(getattr(getattr(net, "model", net), "patch_embed", None), "img_size", None):
        reason = "it is built for images of one size"
    elif any(type(norm) is not nn.BatchNorm2d for norm in norms):
        reason = "its batch norms have activations, which they leave out when they freeze them"
    elif any(norm.eps != 1e-5 for norm in norms):
        reason = "its batch norms have another epsilon than 1e-5, which they freeze them with"
    return Facts(tuple(info["reduction"] for info in net.feature_info.info), reason)


def check_width(width: int) -> None:
    if width % 32 or width < 64:
        raise SettingsError(
            f"{NAME}: its Deformable DETR has 32 groups in its group norms, which a width of {width} has not here; "
            "expected a multiple of 32 from 64 on (detector.width)"
        )


def loading(file: str) -> str:
    return f'transformers.AutoModelForObjectDetection.from_pretrained("{file}")'
