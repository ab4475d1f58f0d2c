"""Which network a backbone name means, and its weights under that network's names.

* torchvision's ResNets and its ``mobilenet_v2``;
* ``swin_t``, ``swin_s``, ``swin_b``, ``swin_l``: timm's Swin with patches of 4 and windows of 7 px, pretrained at 224;
* any timm name whose ``features_only`` network has the maps that are asked for and takes images of any size.

torchvision's networks come first where both have the name (``resnet50``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from headstart.detectors.builders.backbones import Composite, mobilenet_v2_body, resnet_body, timm_body
from headstart.detectors.plain_code import Call
from headstart.errors import SettingsError, WeightsError

SWIN = {f"swin_{size[0]}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")}
# Trained on ImageNet-1k alone, as torchvision's ResNets are; timm's default for some saw ImageNet-22k before. There is
# no such Swin-L.
SUPERVISED = {name: f"{SWIN[name]}.ms_in1k" for name in ("swin_t", "swin_s", "swin_b")}
STAGES = (2, 3, 4, 5)  # C2 (stride 4) to C5 (stride 32)


def resnets() -> list[str]:
    return torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])


def body(name: str, stages: Sequence[int], composite: int = 1) -> Call:
    """The network that gives maps C2 (stride 4) .. C5 (stride 32), those in ``stages``.

    A ``composite`` of several is linked over all stages the backbone has, whichever are asked for, so that detectors
    on different maps can take over each other's weights.

    Raises:
        SettingsError: no such backbone, or one that can't give such maps.
    """
    if composite == 1:
        return _checked(name, _single(name, stages))
    if _is_timm(name):
        facts = _timm_facts(SWIN.get(name, name))
        if not facts.in_a_row:
            raise SettingsError(
                f"--backbone {name}: detector.composite={composite} needs a backbone whose stages are run one after "
                "another as they are listed, as in a ResNet, ConvNeXt or Swin"
            )
        linked = [stage for stage in STAGES if 2**stage in facts.strides or stage in stages]
    else:
        linked = list(STAGES)
    kept = tuple(linked.index(stage) for stage in stages)
    made = _single(name, linked)
    for copy in range(2, composite + 1):
        out = kept if copy == composite else tuple(range(len(linked)))
        made = Call(Composite, {"assistant": made, "lead": _single(name, linked), "kept": out})
    return _checked(name, made)


def _single(name: str, stages: Sequence[int]) -> Call:
    if name in resnets():
        return Call(resnet_body, {"name": name, "stages": tuple(stages)})
    if name == "mobilenet_v2":
        return Call(mobilenet_v2_body, {"stages": tuple(stages)})
    model = SWIN.get(name, name)
    if not _is_timm(name):
        raise SettingsError(f"--backbone {name}: not known; {_near(name)}")
    facts = _timm_facts(model)
    missing = [2**stage for stage in stages if 2**stage not in facts.strides]
    if missing:
        raise SettingsError(
            f"--backbone {name}: has maps at strides {_listed(sorted(set(facts.strides)))}, "
            f"but this detector needs {_listed([2**stage for stage in stages])}"
        )
    last = {stride: number for number, stride in enumerate(facts.strides)}
    maps = tuple(last[2**stage] for stage in stages)
    return Call(timm_body, {"name": model, "maps": maps, "options": dict(facts.options)})


def _is_timm(name: str) -> bool:
    if name in resnets() or name == "mobilenet_v2":
        return False
    import timm  # takes half a second, which others need not wait for

    return bool(timm.is_model(SWIN.get(name, name)))


def _near(name: str) -> str:
    import timm

    ours = [*resnets(), "mobilenet_v2", *SWIN]
    near = dict.fromkeys(difflib.get_close_matches(name, [*ours, *timm.list_models()], n=4))
    found = f"did you mean {_listed(list(near), 'or')}? It takes" if near else "expected"
    return f"{found} a torchvision ResNet, mobilenet_v2, {_listed(list(SWIN), 'or')}, or one of timm.list_models()"


def _listed(values: Sequence[Any], last: str = "and") -> str:
    *first, end = map(str, values)
    return f"{', '.join(first)} {last} {end}" if first else end


# ---- what timm's networks can do ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TimmFacts:
    options: dict[str, Any]  # beyond create_model's usual ones
    strides: tuple[int, ...]  # of each map it offers
    in_a_row: bool  # its children follow one another, each on the output of the one before


@lru_cache(maxsize=64)
def _timm_facts(model: str) -> _TimmFacts:
    """From the network itself, on the meta device: no memory, no time, no random numbers."""
    import timm
    from timm.models import FeatureDictNet

    reasons = []
    any_size: dict[str, Any] = {"strict_img_size": False}  # Swin's word; most networks need and know none
    for options in (any_size, {}):
        try:
            with torch.device("meta"):
                net = timm.create_model(model, pretrained=False, features_only=True, **options)
        except Exception as error:  # whatever this one of a thousand constructors may raise
            reasons.append(str(error))
            continue
        strides = tuple(info["reduction"] for info in net.feature_info.info)
        return _TimmFacts(options, strides, isinstance(net, FeatureDictNet))
    raise SettingsError(f"--backbone {model}: timm offers no feature maps of it ({reasons[-1]})")


def _checked(name: str, call: Call) -> Call:
    """``call``, after a run of it on the meta device on images of a size no network was made for.

    Raises:
        SettingsError: it does not take them, or gives other maps than it says.
    """
    if not _is_timm(name):
        return call
    height, width = 9 * 32, 11 * 32
    try:
        with torch.device("meta"), torch.no_grad():
            net = call().eval()
            maps = net(torch.zeros(1, 3, height, width)).values()
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise SettingsError(
            f"--backbone {name}: a detector's images are of any size, but this one fails on {height} x {width} px "
            f"({reason})"
        ) from error
    widths = [map_.shape[1] for map_ in maps]
    if widths != net.channels:
        raise SettingsError(f"--backbone {name}: its maps have {widths} channels, timm says {net.channels}")
    return call


# ---- weights ------------------------------------------------------------------------------------------------------


def pretrained(name: str) -> dict[str, Tensor]:
    """The library's own supervised weights, under the names of its whole model; :func:`place` puts them in a body.

    torchvision's are its newest (``weights="DEFAULT"``), timm's those of its default tag; ``name.tag`` chooses.

    Raises:
        SettingsError: no such backbone.
        WeightsError: there are none, or they can't be downloaded.
    """
    if not _is_timm(name):
        _single(name, STAGES)  # is it known?
    try:
        with torch.random.fork_rng(devices=[]):  # both draw weights only to overwrite them
            if _is_timm(name):
                import timm

                return timm.create_model(SUPERVISED.get(name) or SWIN.get(name, name), pretrained=True).state_dict()
            return torchvision.models.get_model(name, weights="DEFAULT").state_dict()
    except Exception as error:  # of the network, the disk, the hub's client, ...
        reason = f"{type(error).__name__}: {error}"
        raise WeightsError(f"{name}: the library's pretrained weights can't be had ({reason})") from error


def place(body: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of one plain backbone under the names of ``body``, and in words what was renamed.

    Args:
        body: of a detector's backbone, a :class:`Composite` included: each of its copies gets them.
        state: under the names of torchvision's or timm's whole model, of timm's ``features_only`` network, or those
            of ``body`` already.

    Returns:
        What has no place in ``body``, such as a classifier's ``fc.weight``, keeps its name, so that the load report
        lists it.
    """
    prefixes = list(_copies(body))
    one = set(body.get_submodule(prefixes[0].rstrip(".")).state_dict())
    whole = set(body.state_dict())
    placed: dict[str, Tensor] = {}
    moved: dict[str, int] = {}
    for key, value in state.items():
        if key in whole:
            placed[key] = value
            continue
        name, rule = next(((name, rule) for name, rule in _names(key) if name in one), (None, ""))
        if name is None:
            placed[key] = value
            continue
        if rule:
            moved[rule] = moved.get(rule, 0) + 1
        placed.update({prefix + name: value for prefix in prefixes})
    words = [f"{rule}: {count} keys" for rule, count in moved.items()]
    if len(prefixes) > 1 and not placed.keys() <= state.keys():
        words.append(f"copied to all {len(prefixes)} backbones of the composite one")
    return placed, words


def own_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Key of a detector's weights -> the name that the backbone itself has for it, for what belongs to its backbone.

    That of a C4 detector ends with its head, the backbone's last stage.
    """
    body, c4, block = (
        "backbone.body.",
        "backbone.",
        re.compile(r"roi_heads\.box_head\.0\.(\d+\.(?:conv|bn|downsample).*)"),
    )
    found = {key: key.removeprefix(body) for key in state if key.startswith(body)}
    if found:
        return found
    found = {key: key.removeprefix(c4) for key in state if key.startswith(c4)}
    return found | {key: f"layer4.{match[1]}" for key in state if (match := block.fullmatch(key))}


def one_of(body: nn.Module) -> nn.Module:
    """The first plain backbone in ``body``."""
    return body.get_submodule(next(_copies(body)).rstrip("."))


def stages(body: nn.Module) -> list[list[nn.Module]]:
    """The layers of ``body`` in the order data flows through them: stem first, then one list a stage.

    A stage begins at ``layer1``, ``layers_0``, ``stages_0``, ..., as libraries number them. Where layers are not named
    so (MobileNets), a stage ends with each map, and the stem belongs to the first one. A composite backbone's stages
    are those of all its copies together.
    """
    if isinstance(body, Composite):
        both = (stages(part) for part in (body.assistant, body.lead))
        return [a + b for a, b in zip(*both, strict=True)]
    found: list[list[nn.Module]] = [[]]
    for name, layer in body.named_children():
        if re.fullmatch(r"(layers?|stages?)[_.]?\d+", name):
            found.append([])
        found[-1].append(layer)
    if len(found) > 1:
        return found
    found = [[], []]
    for name, layer in body.named_children():
        found[-1].append(layer)
        if name in getattr(body, "return_layers", ()):
            found.append([])
    return found if found[-1] else found[:-1]


def _copies(body: nn.Module) -> Iterator[str]:
    """Prefixes of the plain backbones in ``body``."""
    if isinstance(body, Composite):
        yield from (f"assistant.{prefix}" for prefix in _copies(body.assistant))
        yield from (f"lead.{prefix}" for prefix in _copies(body.lead))
    else:
        yield ""


def _names(key: str) -> Iterator[tuple[str, str]]:
    """What ``key`` of a whole model may be called in a body, and the rule in words, empty where nothing changes."""
    yield key, ""
    first, _, rest = key.partition(".")
    if rest.partition(".")[0].isdigit():
        yield f"{first}_{rest}", f"{first}.N is {first}_N in timm's features_only"
    if first == "features":
        yield rest, "without the leading features."
    for wrapper in ("model", "body"):  # timm's, around networks it can't take apart
        yield f"{wrapper}.{key}", f"with timm's leading {wrapper}."
