"""Checkpoints of DETR's and Deformable DETR's public repositories, and of those built on them: DETReg, UP-DETR.

https://github.com/facebookresearch/detr, https://github.com/fundamentalvision/Deformable-DETR,
https://github.com/amirbar/DETReg, https://github.com/dddzg/up-detr

The detectors here have the same names but for these:

* ``backbone.0.body.`` there is ``backbone.body.`` here, without ``num_batches_tracked``: its norms are frozen;
* a Deformable DETR has a class and a box head for every decoder layer there, all the same tensor unless boxes are
  refined; here a shared one is there once, as layer 0's;
* those heads lie under ``transformer.decoder.`` once more: the boxes' with refinement, the classes' with two stages;
* two stages: the heads after the last layer's are the encoder's own, here ``enc_class_embed`` and ``enc_bbox_embed``.
  Of its class layer only the first output is ever read; here it has no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from headstart.detectors.formats.renaming import UNUSED_LOGIT, count
from headstart.errors import WeightsError

HEADS = ("class_embed", "bbox_embed")
_HEAD = re.compile(r"(class_embed|bbox_embed)\.(\d+)\.(.+)")
_BODY = "backbone.0.body."
_COPY = "transformer.decoder."  # of heads, beside their own name
_UNUSED = {
    "feature_embed.": "DETReg's head of object embeddings",
    "patch2query.": "UP-DETR's projection of patches",
    "feature_align.": "UP-DETR's head that reconstructs patches",
}


def adapt(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint's weights under this library's names, and in words what was moved.

    What has these names already stays as it is, so that any run's weights may pass.

    Args:
        state: of the repositories above, of transformers, or of this library.

    Raises:
        WeightsError: the names are those of one of them, but not what is under them.
    """
    from headstart.detectors.formats import transformers  # which builds on the names here

    moved = []
    made = {key.removeprefix("module."): value for key, value in state.items()}
    if transformers.is_transformers(made):
        moved.append(f"names of transformers: {len(made)} keys")
        return transformers.to_torchvision(made), moved
    body = [key for key in made if key.startswith(_BODY)]
    if not body:
        return dict(state), []
    made = {key.replace(_BODY, "backbone.body.", 1): value for key, value in made.items()}
    moved.append(f"{_BODY} is backbone.body.: {len(body)} keys")
    for prefix, meaning in _UNUSED.items():
        if any(key.startswith(prefix) for key in made):
            moved.append(f"not used, {meaning}: {prefix}*")
    if "transformer.level_embed" in made:
        before = made
        made = own_heads(made, refine=None)
        gone = len(before) - len(made)
        if gone:
            moved.append(f"heads that are there more than once, taken once: {gone} keys less")
        if "enc_class_embed.weight" in made:
            moved.append(
                "heads after the last layer's are the encoder's own: enc_class_embed (1 output), enc_bbox_embed"
            )
    return made, moved


def own_heads(state: Mapping[str, Tensor], refine: bool | None = None) -> dict[str, Tensor]:
    """The heads of a whole Deformable DETR as this library has them.

    Args:
        state: under the names of Deformable DETR's repository, but ``backbone.body.``.
        refine: whether every layer has heads of its own; None: as far as the names tell.

    Raises:
        WeightsError: the heads are not those of such a detector.
    """
    two_stage = "transformer.enc_output.weight" in state
    if refine is None:
        refine = two_stage or any(key.startswith(_COPY + "bbox_embed.") for key in state)
    made = without_copies(state)
    if two_stage:
        made = _with_encoder_heads(made)
    layers = count(state, r"transformer\.decoder\.layers\.(\d+)\.")
    for head in HEADS:
        if refine:
            made = shared_out(made, head, layers)
        elif not _is_shared(made, head):
            raise WeightsError(
                f"{head}: differs from layer to layer, but without box refinement there is one for all here"
            )
        else:
            made = {key: value for key, value in made.items() if not key.startswith(f"{head}.") or _layer(key) == 0}
    return made


def all_heads(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The inverse of :func:`own_heads`, and the keys that have no place without a class layer.

    The encoder's class layer gets as many outputs as there are classes; those that nobody reads say no.
    """
    made = {key: value for key, value in state.items() if not key.startswith("enc_")}
    layers = count(state, r"transformer\.decoder\.layers\.(\d+)\.")
    refine = count(state, r"bbox_embed\.(\d+)\.") > 1 or count(state, r"class_embed\.(\d+)\.") > 1
    two_stage = "transformer.enc_output.weight" in state
    for head in HEADS:
        made = shared_out(made, head, layers)
    homeless = []
    for key in (key for key in state if key.startswith("enc_")):
        head, _, leaf = key.removeprefix("enc_").partition(".")
        value = state[key]
        if head == "class_embed":
            like = made.get(f"class_embed.0.{leaf}")
            if like is None:
                homeless.append(key)
                continue
            filling = value.new_full(like.shape, UNUSED_LOGIT if leaf == "bias" else 0.0)
            value = torch.cat([value, filling[1:]])
        made[f"{head}.{layers}.{leaf}"] = value
    copied = [head for head, there in (("class_embed", two_stage), ("bbox_embed", refine or two_stage)) if there]
    made |= {_COPY + key: value for key, value in made.items() if key.startswith(tuple(f"{head}." for head in copied))}
    return made, homeless


def without_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each head once, under its own name, whichever of its names it has.

    Raises:
        WeightsError: the two differ: the boxes that are refined are not those that are given.
    """
    made = dict(state)
    for key in [key for key in state if key.startswith(tuple(_COPY + head for head in HEADS))]:
        own = key.removeprefix(_COPY)
        value = made.pop(key)
        if not torch.equal(made.setdefault(own, value), value):
            raise WeightsError(f"{key}: differs from {own}, but the two are one head here")
    return made


def shared_out(state: Mapping[str, Tensor], head: str, layers: int) -> dict[str, Tensor]:
    """Layers without a ``head`` of their own get the first there is."""
    made = dict(state)
    of_layer = sorted((int(m[2]), m[3], key) for key in state if (m := _HEAD.fullmatch(key)) and m[1] == head)
    for _, leaf, key in reversed(of_layer):  # the lowest comes last and so wins
        made |= {
            f"{head}.{layer}.{leaf}": state[key] for layer in range(layers) if f"{head}.{layer}.{leaf}" not in state
        }
    return made


def _with_encoder_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers = count(state, r"transformer\.decoder\.layers\.(\d+)\.")
    made = {}
    for key, value in state.items():
        match = _HEAD.fullmatch(key)
        if match and int(match[2]) == layers:
            made[f"enc_{match[1]}.{match[3]}"] = value[:1] if match[1] == "class_embed" else value
        else:
            made[key] = value
    return made


def _is_shared(state: Mapping[str, Tensor], head: str) -> bool:
    """Whether all layers have the same ``head``."""
    first: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _HEAD.fullmatch(key)
        if match and match[1] == head and not torch.equal(first.setdefault(match[3], value), value):
            return False
    return True


def _layer(key: str) -> int:
    return int(key.split(".")[1])
