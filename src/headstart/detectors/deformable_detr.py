"""Deformable DETR (Zhu et al. 2021, https://arxiv.org/abs/2010.04159), an own module under the original's names.

Defaults are the paper's R50 model without iterative refinement. Unlike the original, weights of the backbone keep
their library's names, its batch norm is not frozen (``tune.backbone_norm`` does that), class and box layers that the
decoder's layers share are kept once (``class_embed.0``), and so are those of the two-stage variant's proposals
(``enc_class_embed``, ``enc_bbox_embed``), of whose class outputs the original only ever uses the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from headstart.detectors import backbones
from headstart.detectors.builders.deformable_detr import DeformableDETR as DeformableDETRModule
from headstart.detectors.builders.deformable_detr import class_head, deformable_detr
from headstart.detectors.detector import Queries
from headstart.detectors.plain_code import Call
from headstart.detectors.transformer import TransformerDetector, TransformerSettings
from headstart.errors import SettingsError
from headstart.optim import OptimSettings


class DeformableDETRSettings(TransformerSettings):
    name: Literal["deformable_detr"] = Field("deformable_detr", description="detector family")
    num_queries: int = Field(300, ge=1, description="queries, each of which answers with one box")
    feedforward: int = Field(1024, ge=1, description="hidden width of the layers' feed-forward part")
    levels: Literal[1, 4] = Field(4, description="maps: 4, C3 to C5 and one of half C5's size; or 1, C5 alone")
    points: int = Field(4, ge=1, description="places on each map that a head looks at")
    refine: bool = Field(False, description="each decoder layer moves the boxes of the one before")
    two_stage: bool = Field(False, description="queries begin as proposals of the encoder; needs refine")
    class_cost: float = Field(2.0, ge=0, description="matching: cost of the class")
    class_weight: float = Field(2.0, ge=0, description="loss: weight of the class term")

    @model_validator(mode="after")
    def _two_stage_refines(self) -> Self:
        if self.two_stage and not self.refine:
            raise ValueError("two_stage: proposals are refined, as in the original; expected refine: true with it")
        return self

    def call(self) -> Call:
        body = backbones.body(self.backbone, (5,) if self.levels == 1 else (3, 4, 5), self.composite)
        own = {name: getattr(self, name) for name in ("levels", "points", "refine", "two_stage")}
        return Call(deformable_detr, {"body": body, **self.transformer_arguments(), **own})


class DeformableDETR(TransformerDetector):
    family = "deformable_detr"
    settings_type = DeformableDETRSettings
    loss_kind = "focal"
    module: DeformableDETRModule

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, DeformableDETRModule)

    @property
    def prefixes(self) -> Mapping[str, tuple[str, ...]]:
        shared = dict(super().prefixes)
        shared["encoder"] = ("transformer.encoder.", "transformer.level_embed")
        if not self.module.two_stage:
            return {**shared, "decoder": (*shared["decoder"], "transformer.reference_points.")}
        inside = ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
        proposer = (*(f"transformer.{name}." for name in inside), "enc_class_embed.", "enc_bbox_embed.")
        order = ("backbone", "neck", "encoder", "proposer", "decoder", "classifier", "regressor")
        own = {**shared, "proposer": proposer, "decoder": ("transformer.decoder.",)}
        return {name: own[name] for name in order}

    def queries(
        self, images: Tensor, sizes: Tensor | None = None, extra: Tensor | None = None, attend: Tensor | None = None
    ) -> Queries:
        """
        Raises:
            SettingsError: two-stage, and queries are to be told apart, which begin as the best proposals of each image.
        """
        if self.module.two_stage and not (extra is None and attend is None):
            raise SettingsError(
                "deformable_detr: with two_stage, query n is the n-th best proposal of an image, so nothing can be "
                "asked of certain queries; expected detector.two_stage=false"
            )
        return super().queries(images, sizes, extra, attend)

    def class_layer(self, num_classes: int) -> nn.Module:
        return class_head(self.query_width, num_classes)

    def tuning(self) -> OptimSettings:
        """The paper's: AdamW, a tenth of the rate for the backbone and for where queries look."""
        slow = ["backbone", "sampling_offsets"] + ["reference_points"] * (not self.module.two_stage)
        return OptimSettings(
            optimizer="adamw",
            base_lr=2e-4,
            base_batch=32,
            weight_decay=1e-4,
            clip=0.1,
            lr_scale=dict.fromkeys(slow, 0.1),
        )

    def adapt(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Between one map and four, and between layers that share class and box layers and those that do not."""
        adapted, said = super().adapt(state)
        for wanted, change in ((len(self.module.input_proj), _levels), (len(self.module.class_embed), _heads)):
            adapted, words = change(adapted, wanted)
            said += words
        return adapted, said


def _levels(state: dict[str, Tensor], wanted: int) -> tuple[dict[str, Tensor], list[str]]:
    """C5's projection is the only one of one map, and the third of four."""
    found = _numbers(state, r"input_proj\.(\d+)\.")
    if {found, wanted} != {1, 4}:
        return state, []
    old, new = ("input_proj.0.", "input_proj.2.") if wanted == 4 else ("input_proj.2.", "input_proj.0.")
    moved = {}
    for key, value in state.items():
        if key.startswith(old):
            moved[new + key.removeprefix(old)] = value
        else:
            moved[f"{key} (of a map that is not used here)" if key.startswith("input_proj.") else key] = value
    return moved, [f"C5's projection: {old}* is {new}* here, {found} maps in the file, {wanted} here"]


def _heads(state: dict[str, Tensor], wanted: int) -> tuple[dict[str, Tensor], list[str]]:
    """Shared layers become every decoder layer's; of several, the last one's are shared."""
    found = _numbers(state, r"(?:class|bbox)_embed\.(\d+)\.")
    if found == wanted or 1 not in (found, wanted) or not found:
        return state, []
    head = re.compile(r"(class|bbox)_embed\.(\d+)\.(.*)")
    placed = {}
    for key, value in state.items():
        m = head.fullmatch(key)
        if m is None:
            placed[key] = value
        elif found == 1:
            placed.update({f"{m[1]}_embed.{i}.{m[3]}": value for i in range(wanted)})
        elif int(m[2]) == found - 1:
            placed[f"{m[1]}_embed.0.{m[3]}"] = value
        else:
            placed[f"{key} (of a decoder layer but the last)"] = value
    what = f"copied to all {wanted} decoder layers" if found == 1 else f"taken from the last of {found} decoder layers"
    return placed, [f"class and box layers {what}"]


def _numbers(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many, counting from 0 to the highest that ``pattern`` finds at the start of a key."""
    return max((int(m[1]) + 1 for key in state if (m := re.match(pattern, key))), default=0)
