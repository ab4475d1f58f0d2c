"""What the formats share: key names by rule, both ways, and the tensor layouts that differ between libraries.

A rule is a pair of templates, torchvision's name and the other library's. In a template

* ``<k>`` is an index; ``<k+2>``, ``<k*3+1>`` are the same index, counted differently;
* ``<p>`` is weight or bias; ``<n>`` also a running statistic; ``<rest>`` is anything.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headstart.detectors.backbones import SWIN, resnets
from headstart.errors import SettingsError, WeightsError

ASPECT_RATIOS = 3  # of the anchors of every family here: 0.5, 1, 2
STRIDES = [8, 16, 32, 64, 128]  # of P3 to P7
UNUSED_LOGIT = -20.0  # bias of a sigmoid class that is not there: a score of 2e-9
_WORDS = {"p": "weight|bias", "n": "weight|bias|running_mean|running_var|num_batches_tracked", "rest": ".+"}


@dataclass
class Translated:
    """Weights under another library's names.

    Attributes:
        dropped: reason -> keys that have no place there.
        trimmed: reason -> keys of which some rows have no place there.
        missing: keys of the model there that have no counterpart here, where that is known.
    """

    state: dict[str, Tensor]
    dropped: dict[str, list[str]] = field(default_factory=dict)
    trimmed: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rule:
    ours: str
    theirs: str

    def forward(self, key: str) -> str | None:
        return _rewrite(key, self.ours, self.theirs)

    def backward(self, key: str) -> str | None:
        return _rewrite(key, self.theirs, self.ours)


@functools.cache
def _pieces(template: str) -> tuple[tuple[str, str, int, int], ...]:
    """(literal before, name, factor, offset) of every placeholder; the text after the last has an empty name."""
    found = []
    position = 0
    for match in re.finditer(r"<([a-z]+)(?:\*(\d+))?(?:\+(\d+))?>", template):
        name, factor, offset = match.groups()
        found.append((template[position : match.start()], name, int(factor or 1), int(offset or 0)))
        position = match.end()
    found.append((template[position:], "", 1, 0))
    return tuple(found)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = [
        re.escape(text) + (f"({_WORDS.get(name, '[0-9]+')})" if name else "") for text, name, *_ in _pieces(template)
    ]
    return re.compile("".join(parts))


def _rewrite(key: str, source: str, target: str) -> str | None:
    """``key`` of the form ``source`` in the form ``target``; None where it has another form."""
    match = _pattern(source).fullmatch(key)
    if match is None:
        return None
    values: dict[str, str] = {}
    for text, (_, name, factor, offset) in zip(match.groups(), _pieces(source), strict=False):
        if name not in _WORDS:
            index, remainder = divmod(int(text) - offset, factor)
            if remainder or index < 0:
                return None
            text = str(index)
        values[name] = text
    made = []
    for text, name, factor, offset in _pieces(target):
        value = values.get(name, "")
        made.append(text + (str(int(value) * factor + offset) if name and name not in _WORDS else value))
    return "".join(made)


@dataclass(frozen=True)
class Layout:
    """How the values under torchvision's names ``ours`` are stored there, and back."""

    ours: re.Pattern[str]
    there: Callable[[str, Tensor], Tensor]
    back: Callable[[str, Tensor], Tensor]


def translate(
    state: Mapping[str, Tensor], rules: Sequence[Rule], layouts: Sequence[Layout], library: str
) -> dict[str, Tensor]:
    """Raises: SettingsError naming the keys that ``library`` has no place for."""
    made: dict[str, Tensor] = {}
    homeless = []
    for key, value in state.items():
        name = next((name for rule in rules if (name := rule.forward(key)) is not None), None)
        if name is None or name in made:
            homeless.append(key)
            continue
        for layout in layouts:
            if layout.ours.fullmatch(key):
                value = layout.there(key, value)
        made[name] = value.contiguous()
    if homeless:
        raise SettingsError(
            f"--to {library}: has no place for {len(homeless)} of {len(state)} weights ({_first(homeless)})"
        )
    return made


def translate_back(
    state: Mapping[str, Tensor], rules: Sequence[Rule], layouts: Sequence[Layout], library: str
) -> dict[str, Tensor]:
    """Raises: WeightsError naming the keys that are not those of ``library``'s model of a family known here."""
    made: dict[str, Tensor] = {}
    strange = []
    for name, value in state.items():
        key = next((key for rule in rules if (key := rule.backward(name)) is not None), None)
        if key is None or key in made:
            strange.append(name)
            continue
        for layout in layouts:
            if layout.ours.fullmatch(key):
                value = layout.back(key, value)
        made[key] = value.contiguous()
    if strange:
        raise WeightsError(
            f"{library} weights: {len(strange)} of {len(state)} keys are not those of a detector known here "
            f"({_first(strange)})"
        )
    return made


def _first(keys: Sequence[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


# ---- facts that key names alone tell ----------------------------------------------------------------------------


def count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest index that the first group of ``pattern`` catches; 0 where none matches."""
    compiled = re.compile(pattern)
    return max((int(match[1]) + 1 for key in keys if (match := compiled.match(key))), default=0)


@dataclass(frozen=True)
class Form:
    """What the rules depend on, read from the key names.

    Attributes:
        body: the backbone is below a pyramid (``backbone.body.``), not a C4 detector's own.
        levels: lateral layers of the pyramid.
        rpn_convs, box_convs: convolutions of the RPN, and of the box head before its first linear layer.
        point_towers: the dense head is FCOS's, whose towers are one flat sequence of convolution, norm (or nothing),
            ReLU.
        tower_norm: the dense head's towers have norms.
    """

    body: bool
    levels: int
    rpn_convs: int
    box_convs: int
    point_towers: bool
    tower_norm: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Form:
        """Of weights under torchvision's names."""
        tower = r"head\.(?:classification|regression)_head\.conv\."
        flat = any(re.fullmatch(tower + r"\d+\.weight", key) for key in state)
        return cls(
            body=any(key.startswith("backbone.body.") for key in state),
            levels=count(state, r"backbone\.fpn\.inner_blocks\.(\d+)\."),
            rpn_convs=count(state, r"rpn\.head\.conv\.(\d+)\."),
            box_convs=count(state, r"roi_heads\.box_heads?(?:\.\d+)?\.(\d+)\.0\.weight$"),
            point_towers=flat,
            tower_norm=any(re.match(tower + (r"1\." if flat else r"\d+\.1\."), key) for key in state),
        )

    @staticmethod
    def tower_width(state: Mapping[str, Tensor]) -> int:
        """Channels of the dense head's towers; 0 where there are none."""
        towers = (value for key, value in state.items() if re.match(r"head\.\w+_head\.conv\.0\.(0\.)?weight", key))
        return next((len(value) for value in towers), 0)

    @property
    def first_level(self) -> int:
        """Stage of the finest lateral layer: the coarsest is always C5."""
        return 6 - self.levels


def resnet_depth(backbone: str) -> int:
    """Layers of a torchvision ResNet, which its name says: ``resnext101_32x8d`` has 101."""
    return int("".join(re.findall(r"^\D*(\d+)", backbone)))


def groups_of(width: int) -> int:
    """Groups of a dense head's group norms: 32, or the largest number below that divides ``width``."""
    return max(groups for groups in range(1, 33) if width % groups == 0)


def is_resnet(backbone: str) -> bool:
    """Whether ``backbone`` is a torchvision ResNet, ResNeXt or wide ResNet."""
    return backbone in resnets()


def timm_name(backbone: str, library: str) -> str:
    """What timm calls ``backbone``.

    Raises:
        SettingsError: nothing.
    """
    import timm  # takes half a second, which others need not wait for

    name = SWIN.get(backbone, backbone)
    if not timm.is_model(name):
        raise SettingsError(f"--to {library}: timm has no network called {backbone}, which could hold these weights")
    return name


def anchor_octave(side: int) -> list[int]:
    """The three anchor sides a level of a RetinaNet, px, cut to whole ones as torchvision does."""
    return [side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3))]


def check_units(form: Form, settings: Mapping[str, Any], library: str) -> None:
    """
    Raises:
        SettingsError: an FCOS whose boxes are measured in something else than its levels' strides.
    """
    units = list(settings.get("anchor_px", STRIDES))
    if form.point_towers and units != STRIDES:
        raise SettingsError(
            f"--to {library}: FCOS measures boxes in the strides {STRIDES} of its levels there, this one in "
            f"{units} px (detector.anchor_px)"
        )


def refuse_composite(state: Mapping[str, Tensor], library: str) -> None:
    """Raises: SettingsError for a backbone made of two."""
    if any(key.startswith("backbone.body.assistant.") for key in state):
        raise SettingsError(
            f"--to {library}: has no composite backbone (two networks, one feeding the other), so the detector would "
            "be another there; use --to torchvision"
        )


def refuse_transformer(state: Mapping[str, Tensor], library: str) -> None:
    """Raises: SettingsError for a DETR of any kind."""
    if any(key.startswith("transformer.decoder.") for key in state):
        raise SettingsError(
            f"--to {library}: transformer detectors are not translated for it; use --to transformers, or --to "
            "torchvision, which keeps the names they have, those of DETR's own repositories"
        )


def split_shared_stage(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` without the mask head's copy of a C4 detector's 5th block, which boxes and masks share; its keys.

    Raises:
        WeightsError: the two are not the same block.
    """
    copies = [key for key in state if re.match(r"roi_heads\.mask_head\.0\.\d+\.(conv|bn|downsample)", key)]
    for key in copies:
        original = state.get(key.replace("mask_head", "box_head", 1))
        if original is None or not torch.equal(original, state[key]):
            raise WeightsError(f"{key}: differs from the box head's, but boxes and masks of a C4 detector share it")
    return {key: value for key, value in state.items() if key not in set(copies)}, copies


# ---- tensor layouts ---------------------------------------------------------------------------------------------


def background_last() -> Layout:
    """torchvision's softmax has the background first, the others last."""
    return Layout(
        re.compile(r"roi_heads\.box_predictors?(\.\d+)?\.cls_score\.(weight|bias)"),
        lambda key, value: value.roll(-1, 0),
        lambda key, value: value.roll(1, 0),
    )


def without_background(pattern: str, rows: int) -> Layout:
    """torchvision predicts for the background too, ``rows`` values that nothing reads; they come back as zeros."""

    def back(key: str, value: Tensor) -> Tensor:
        return torch.cat([value.new_zeros(rows, *value.shape[1:]), value])

    return Layout(re.compile(pattern), lambda key, value: value[rows:], back)


UNUSED_ROWS = "rows of the background class, which nothing reads"
BOX_DELTAS = r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)"  # a cascade's are for all classes alike
MASK_LOGITS = r"roi_heads\.mask_predictor\.mask_fcn_logits\.(weight|bias)"
CLASS_LOGITS = r"head\.classification_head\.cls_logits\.(weight|bias)"


def trimmed(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What :func:`without_background` and :func:`dense_classes` take rows from."""
    keys = [key for key in state if re.fullmatch(f"{BOX_DELTAS}|{MASK_LOGITS}|{CLASS_LOGITS}", key)]
    return {UNUSED_ROWS: keys} if keys else {}


def anchors_of(reg_rows: Tensor | None, key: str) -> int:
    """Anchors a place, from the weights that give four values for each.

    Raises:
        WeightsError: they are not there.
    """
    if reg_rows is None:
        raise WeightsError(f"{key}: how many anchors it is for can't be told without the box regression's weights")
    return reg_rows.shape[0] // 4


def dense_classes(anchors: int, size_major: bool) -> Layout:
    """Class scores (anchors * classes rows) of a dense head.

    torchvision counts labels from 1, so that its class 0 is never there: it is left out, and comes back with a
    bias that says so.
    """

    def there(key: str, value: Tensor) -> Tensor:
        used = value.reshape(anchors, -1, *value.shape[1:])[:, 1:]
        return (_to_size_major(used) if size_major else used).reshape(-1, *value.shape[1:])

    def back(key: str, value: Tensor) -> Tensor:
        used = value.reshape(anchors, -1, *value.shape[1:])
        used = _to_ratio_major(used) if size_major else used
        filling = UNUSED_LOGIT if key.endswith("bias") else 0.0
        unused = used.new_full((anchors, 1, *used.shape[2:]), filling)
        return torch.cat([unused, used], dim=1).reshape(-1, *value.shape[1:])

    return Layout(re.compile(CLASS_LOGITS), there, back)


def anchor_rows(pattern: str, values: int) -> Layout:
    """``values`` rows an anchor: from torchvision's order of anchors to the one with sizes outermost, and back."""

    def there(key: str, value: Tensor) -> Tensor:
        return _to_size_major(value.reshape(-1, values, *value.shape[1:])).reshape(value.shape)

    def back(key: str, value: Tensor) -> Tensor:
        return _to_ratio_major(value.reshape(-1, values, *value.shape[1:])).reshape(value.shape)

    return Layout(re.compile(pattern), there, back)


def _to_size_major(rows: Tensor) -> Tensor:
    """(ratios * sizes, ...) -> (sizes * ratios, ...). One size, or one anchor, has one order."""
    return rows if rows.shape[0] == 1 else _swap(rows, ASPECT_RATIOS)


def _to_ratio_major(rows: Tensor) -> Tensor:
    return rows if rows.shape[0] == 1 else _swap(rows, rows.shape[0] // ASPECT_RATIOS)


def _swap(rows: Tensor, outer: int) -> Tensor:
    if rows.shape[0] % ASPECT_RATIOS:
        raise WeightsError(f"{rows.shape[0]} anchors a place: expected sizes times {ASPECT_RATIOS} aspect ratios")
    return rows.reshape(outer, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def point_offset() -> Layout:
    """FCOS's places: torchvision's lie on the corners of the feature map's cells, the others' in their middles.

    Half a stride further right and down, a box's left and top sides are half a stride further away, its right and
    bottom sides half a stride nearer: an offset of the regression's bias, in strides.
    """
    offset = torch.tensor([0.5, 0.5, -0.5, -0.5])
    return Layout(
        re.compile(r"head\.regression_head\.bbox_reg\.bias"),
        lambda key, value: value + offset.to(value),
        lambda key, value: value - offset.to(value),
    )
