"""Backbones out of the checkpoints that self-supervised projects publish, under plain names.

A checkpoint holds one or more networks (a query and a key encoder, a student and a teacher), their projectors, queues
and decoders. A ``Layout`` says which network of such a file its authors use downstream; what that network is made of
(a ``Kind``) says how its keys become plain ones:

* ResNet: torchvision's names, ``conv1.weight``, ``bn1.*``, ``layer1.0.*``.
* Swin: the names of timm's whole model, ``patch_embed.proj.weight``, ``layers.0.blocks.0.*``, ``norm.*``.

Everything else in the file is listed with the reason why it is not used. ``docs/checkpoints.md`` says where each layout
comes from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from headstart.detectors.weights import read_state
from headstart.errors import WeightsError

Dropped = dict[str, list[str]]
Reasons = tuple[tuple[str, str], ...]  # (pattern, reason); the first that a key has counts


@dataclass
class BackboneState:
    """A backbone's weights, and what became of the rest of the file.

    Attributes:
        layout: name of the layout, for example "moco_v2".
        network: what the keys of the backbone started with in the file, for example "module.encoder_q.".
        state: the weights, under torchvision's (ResNet) or timm's (Swin) names.
        dropped: reason -> keys of the file that were not used.
        resized: (key, shape in the file, shape now) of position tables made for another window size.
    """

    layout: str
    network: str
    state: dict[str, Tensor]
    dropped: Dropped = field(default_factory=dict)
    resized: list[tuple[str, list[int], list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """A network's own key names.

    Attributes:
        anchor: pattern of one key that every such network has; what precedes it is the network's prefix.
        convert: (state, prefix, reasons for keys outside that network, source) -> plain state, and all other keys.
    """

    anchor: str
    convert: Callable[[Mapping[str, Tensor], str, Reasons, str], tuple[dict[str, Tensor], Dropped]]


@dataclass(frozen=True)
class Network:
    """A network found in a file."""

    kind: Kind
    prefix: str


@dataclass(frozen=True)
class Layout:
    """How a project names what it saves.

    Attributes:
        about: whose files, for messages.
        prefix: pattern of the prefix of the network that is used downstream.
        needs: pattern that some key of the file has, where the prefix alone does not tell layouts apart.
        without: pattern that no key of the file has.
        others: (pattern, reason) for the keys outside that network, before ``OTHERS``.
    """

    name: str
    about: str
    prefix: str
    needs: str = ""
    without: str = r"(?!)"
    others: Reasons = ()

    def takes(self, network: Network, state: Mapping[str, Tensor]) -> bool:
        return (
            re.fullmatch(self.prefix, network.prefix) is not None
            and any(re.search(self.needs, key) for key in state)
            and not any(re.search(self.without, key) for key in state)
        )


# --- kinds of networks ---------------------------------------------------------------------------------------------


def _resnet(
    state: Mapping[str, Tensor], prefix: str, others: Reasons, source: str
) -> tuple[dict[str, Tensor], Dropped]:
    return _renamed(state, prefix, others, lambda key: key if re.match(r"(conv1|bn1|layer[1-4])\.", key) else None)


# torchvision's ResNet taken apart and put into nn.Sequential: conv1, bn1, relu, maxpool, layer1, .., layer4, avgpool.
SEQUENCE = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def _sequential_resnet(
    state: Mapping[str, Tensor], prefix: str, others: Reasons, source: str
) -> tuple[dict[str, Tensor], Dropped]:
    def plain(key: str) -> str | None:
        index, _, rest = key.partition(".")
        return f"{SEQUENCE[index]}.{rest}" if index in SEQUENCE else None

    return _renamed(state, prefix, others, plain)


def _swin(state: Mapping[str, Tensor], prefix: str, others: Reasons, source: str) -> tuple[dict[str, Tensor], Dropped]:
    # Swin's authors merge patches at the end of a stage, timm (since 0.9) at the start of the next one, so that only
    # theirs has something at the end of stage 0, and only timm's at the start of the last one.
    shift = any(key.startswith(f"{prefix}layers.0.downsample.") for key in state)

    def plain(key: str) -> str | None:
        if re.search(r"(relative_position_index|relative_coords_table|attn_mask)$", key):
            return None
        key = _whole(key)
        if shift:
            key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", key)
        return key if re.match(r"(patch_embed|layers|norm)\.|absolute_pos_embed$", key) else None

    return _renamed(state, prefix, others, plain)


def _whole(key: str) -> str:
    """timm's features_only models have ``layers_0`` where the whole model has ``layers.0``."""
    return re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", key)


WITHIN = (
    (r"(relative_position_index|relative_coords_table|attn_mask)$", "computed by the network itself"),
    (r"^mask_token$", "mask token"),
    (r"^(fc\d*|head)\.", "head"),
)


def _renamed(
    state: Mapping[str, Tensor], prefix: str, others: Reasons, plain: Callable[[str], str | None]
) -> tuple[dict[str, Tensor], Dropped]:
    """``plain`` gives a key's plain name, or None where it is no part of the backbone."""
    kept: dict[str, Tensor] = {}
    dropped: Dropped = {}
    for key, value in state.items():
        inside = key.startswith(prefix)
        name = plain(key[len(prefix) :]) if inside else None
        if name is not None:
            kept[name] = value
        else:
            reason = _reason(key[len(prefix) :], WITHIN + others) if inside else _reason(key, others)
            dropped.setdefault(reason, []).append(key)
    return kept, dropped


# A key of a haiku ResNet as haiku names modules (`a/~/b`: b is made in the constructor of a), then the parameter.
HAIKU = re.compile(
    r"(?:initial_(?P<initial>conv|batchnorm)(?:_1)?"
    r"|block_group_(?P<group>\d+)/(?:~/)?block_(?P<block>\d+)/(?:~/)?"
    r"(?:(?P<main>conv|batchnorm)_(?P<index>\d+)|shortcut_(?P<shortcut>conv|batchnorm)))"
    r"(?:/(?:~/)?(?P<average>mean|var)_ema)?/(?P<leaf>\w+)$"
)
HAIKU_LEAVES = {
    ("conv", None, "w"): "weight",
    ("batchnorm", None, "scale"): "weight",
    ("batchnorm", None, "offset"): "bias",
    ("batchnorm", "mean", "average"): "running_mean",
    ("batchnorm", "var", "average"): "running_var",
    ("batchnorm", "mean", "counter"): "num_batches_tracked",
}


def _haiku_resnet(
    state: Mapping[str, Tensor], prefix: str, others: Reasons, source: str
) -> tuple[dict[str, Tensor], Dropped]:
    """haiku's ResNet v1, whose stride is in the 3x3 convolution as in torchvision's.

    Convolutions are (height, width, in, out), batch norm's vectors (1, 1, 1, C).

    Parameters and batch norm statistics may lie in different trees of the file, so the prefix is not asked for.
    """
    kept: dict[str, Tensor] = {}
    dropped: Dropped = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        found = HAIKU.search(key)
        if "final_batchnorm" in key:
            raise WeightsError(f"{source}: {key} is of a pre-activation (v2) ResNet; only v1 has torchvision's form")
        if found is None or re.search(r"(^|/)target", key):
            dropped.setdefault(_reason(key, others), []).append(key)
            continue
        part = found["initial"] or found["main"] or found["shortcut"]
        leaf = HAIKU_LEAVES.get((part, found["average"], found["leaf"]))
        if leaf is None:
            dropped.setdefault("running sums, of which the averages are used", []).append(key)
            continue
        if found["initial"]:
            layer = "conv1" if part == "conv" else "bn1"
        else:
            layer = f"layer{int(found['group']) + 1}.{found['block']}."
            if found["shortcut"]:
                layer += "downsample.0" if part == "conv" else "downsample.1"
            else:
                layer += f"{'conv' if part == 'conv' else 'bn'}{int(found['index']) + 1}"
        name = f"{layer}.{leaf}"
        if name in origin:
            raise WeightsError(f"{source}: both {origin[name]} and {key} would be {name}; keep one network in the file")
        origin[name] = key
        if part == "conv":
            kept[name] = value.permute(3, 2, 0, 1).contiguous()
        else:
            kept[name] = value.reshape(()) if leaf == "num_batches_tracked" else value.flatten()
    return kept, dropped


START = r"(?<![^.])"  # at the start of the key or after a dot
HAIKU_STEM = r"(?<![^/])initial_conv(_1)?/w$"
KINDS = (
    Kind(START + r"layer1\.0\.conv1\.weight$", _resnet),
    Kind(START + r"4\.0\.conv1\.weight$", _sequential_resnet),
    Kind(START + r"layers[._]0\.blocks\.0\.norm1\.weight$", _swin),
    Kind(HAIKU_STEM, _haiku_resnet),
)


# --- layouts -------------------------------------------------------------------------------------------------------

MODULE = r"(?:module\.)?"  # DistributedDataParallel's
SWAV = r"^(?:module\.)?(projection_head|prototypes)\."
# With the instance loss PixPro has a predictor as SoCo does, but then always beside an instance projector.
PIXPRO = r"^(?:module\.)?(value_transform|projector_instance)\."
SOCO = r"^(?:module\.)?predictor\."
SIMMIM = r"^(?:module\.)?encoder\.mask_token$"
MOMENTUM = r"(^|\.)(\w+_k|\w*momentum\w*|target\w*)\."
DETECTOR = r"^(backbone\.(body|fpn)|rpn|roi_heads|head\.(classification|regression)_head)\."

LAYOUTS = (
    Layout("plain", "torchvision's ResNet, timm's Swin, Swin's own releases", MODULE, without=f"{SWAV}|{HAIKU_STEM}"),
    Layout("moco_v2", "MoCo v1 and v2: the query encoder", MODULE + r"encoder_q\.(?:0\.)?"),
    Layout("moco_v3", "MoCo v3: the base encoder", MODULE + r"base_encoder\."),
    Layout("swav", "SwAV, DeepCluster v2, SeLa v2", MODULE, needs=SWAV),
    Layout("pixpro", "PixPro: the online encoder", MODULE + r"encoder\.", needs=PIXPRO),
    Layout(
        "soco",
        "SoCo, before its conversion for a detection library: the online encoder",
        MODULE + r"encoder\.",
        needs=SOCO,
        without=PIXPRO,
        others=((r"^(module\.)?neck\.", "neck"), (r"^(module\.)?head\.", "detection head")),
    ),
    Layout("simmim", "SimMIM", MODULE + r"encoder\.", needs=SIMMIM),
    Layout(
        "encoder",
        "one encoder and at most projectors beside it",
        MODULE + r"encoder\.",
        without=f"{PIXPRO}|{SOCO}|{SIMMIM}|{MOMENTUM}",
    ),
    Layout(
        "byol",
        "SCRL, and BYOL in PyTorch: the online network",
        r"(?:learner\.|model\.)?(?:module\.)?(?:online_encoder\.(?:net\.|encoder\.|backbone\.)?"
        r"|online_network\.(?:module\.)?(?:encoder\.|backbone\.)?|online_net\.(?:backbone\.|0\.)?"
        r"|online_backbone\.(?:module\.)?)",
    ),
    Layout("dino", "DINO, whole checkpoint: the teacher", r"teacher\.(?:module\.)?backbone\."),
    Layout("backbone", "mmselfsup, solo-learn, lightly", r"(?:module\.|model\.)?backbone\.", without=DETECTOR),
    Layout(
        "detector",
        "a detector of torchvision, or of this library",
        r"backbone\.(?:body\.)?",
        needs=DETECTOR,
        others=((r"", "other parts of the detector"),),
    ),
    Layout(
        "deepmind",
        "DeepMind's BYOL and DetCon, converted to .npz or .safetensors: the online network",
        r"(?!(?:.*/)?target)(?:.*/)?",
        needs=HAIKU_STEM,
    ),
)

# Reasons why the keys outside the backbone are not used; the first that fits. With the dots of PyTorch's key names and
# with the slashes of haiku's.
OTHERS = (
    (r"(^|[./])queue", "queue"),
    (r"(^|[./])(momentum_\w+|\w+_momentum|\w+_k|target\w*)[./]", "momentum network"),
    (r"^student\.", "student"),
    (r"(^|[./])(online_)?predictor\w*[./]", "predictor"),
    (r"(^|[./])prototypes", "prototypes"),
    (r"(^|[./])(projector\w*|projection_head|projetion|neck|value_transform)[./]", "projector"),
    (r"(^|[./])decoder[./]", "decoder"),
    (r"(^|[./])(classifier|fc)[./]", "classifier"),
    (r"(^|[./])head[./]", "head"),
    (r"", "other parts"),
)


def _reason(key: str, reasons: Reasons) -> str:
    return next(reason for pattern, reason in reasons if re.search(pattern, key))


# --- what callers use ----------------------------------------------------------------------------------------------


def recognise(state: Mapping[str, Tensor], source: str = "the state dict") -> Layout:
    """Which layout a file's keys have.

    Args:
        source: the file, for messages.

    Raises:
        WeightsError: none is known, or several would do.
    """
    return _choose(state, source)[0]


def to_backbone(
    state: Mapping[str, Tensor], source: str = "the state dict", like: Mapping[str, Tensor] | None = None
) -> BackboneState:
    """A backbone's weights under plain names, and what became of the rest.

    Args:
        source: the file, for messages.
        like: the state of the one backbone that the weights are for, under timm's or torchvision's names, those of
            features_only models (``layers_0``) included. Swin's tables of relative positions are resized to its shapes.
            Networks that are neither ResNet nor Swin are recognised by it alone: at least half of its keys are in the
            file, perhaps with a leading ``module.`` or ``features.``.

    Raises:
        WeightsError: the layout is not known, or several would do.
    """
    if like is not None and not _networks(state):
        as_it_is = _as_it_is(state, like)
        if as_it_is is not None:
            return as_it_is
    layout, network = _choose(state, source)
    kept, dropped = network.kind.convert(state, network.prefix, layout.others + OTHERS, source)
    result = BackboneState(layout.name, network.prefix, kept, dropped)
    if like is not None:
        _fit_tables(result, like)
    return result


def read_backbone(path: Path | str, like: Mapping[str, Tensor] | None = None) -> BackboneState:
    """:func:`to_backbone` of a file.

    Raises:
        WeightsError: as of :func:`to_backbone` and :func:`headstart.detectors.weights.read_state`.
    """
    return to_backbone(read_state(path), str(path), like)


def prefixed(backbone: BackboneState, prefix: str) -> dict[str, Tensor]:
    """The weights as part of a larger module, for example under ``backbone.body.``."""
    return {prefix + key: value for key, value in backbone.state.items()}


def _networks(state: Mapping[str, Tensor]) -> list[Network]:
    found = ((kind, key, re.search(kind.anchor, key)) for key in state for kind in KINDS)
    return [Network(kind, key[: match.start()]) for kind, key, match in found if match is not None]


def _choose(state: Mapping[str, Tensor], source: str) -> tuple[Layout, Network]:
    networks = _networks(state)
    fitting = [(layout, network) for network in networks for layout in LAYOUTS if layout.takes(network, state)]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(layout.name for layout in LAYOUTS)
    keys = ", ".join(list(state)[:4])
    if fitting:
        found = " or ".join(f"{layout.name} under {network.prefix!r} ({layout.about})" for layout, network in fitting)
        raise WeightsError(f"{source}: could be {found}; keep one network in the file. Its first keys: {keys}, ...")
    found = ", ".join(repr(network.prefix) for network in networks)
    raise WeightsError(
        f"{source}: no known layout of a ResNet or Swin checkpoint"
        + (f", although there is one under {found}" if networks else "")
        + f". Its first keys: {keys}, ...; known: {known} (docs/checkpoints.md)"
    )


def _as_it_is(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> BackboneState | None:
    wanted = {_whole(key) for key in like}
    for prefix in ("", "module.", "features.", "module.features."):
        own = {key: key[len(prefix) :] for key in state if key.startswith(prefix)}
        own = {key: name for key, name in own.items() if _whole(name) in wanted}
        if own and 2 * len(own) >= len(wanted):
            dropped: Dropped = {}
            for key in (key for key in state if key not in own):
                dropped.setdefault(_reason(key, OTHERS), []).append(key)
            return BackboneState("plain", prefix, {name: state[key] for key, name in own.items()}, dropped)
    return None


def _fit_tables(backbone: BackboneState, like: Mapping[str, Tensor]) -> None:
    """Resize tables of relative positions, ((2 window - 1)^2, heads), to the windows of ``like``.

    Tables of other numbers of heads, or of windows that are not square, stay; loading reports that they do not fit.
    """
    wanted = {_whole(key): value.shape for key, value in like.items()}
    for key, table in backbone.state.items():
        shape = wanted.get(key, table.shape)
        if not key.endswith("relative_position_bias_table") or shape == table.shape or shape[1:] != table.shape[1:]:
            continue
        window = (math.isqrt(shape[0]) + 1) // 2
        if (2 * window - 1) ** 2 == shape[0] and math.isqrt(table.shape[0]) ** 2 == table.shape[0]:
            from timm.layers import resize_rel_pos_bias_table  # half a second, which others need not wait for

            backbone.state[key] = resize_rel_pos_bias_table(table, (window, window), tuple(shape))
            backbone.resized.append((key, list(table.shape), list(shape)))
