"""DETR (Carion et al. 2020, https://arxiv.org/abs/2005.12872), an own module under the original's names.

Defaults are the paper's R50 model. Unlike the original, weights of the backbone keep their library's names, its batch
norm is not frozen (``tune.backbone_norm`` does that), and detections come sorted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import nn

from headstart.detectors import backbones
from headstart.detectors.builders.detr import DETR as DETRModule
from headstart.detectors.builders.detr import detr
from headstart.detectors.plain_code import Call
from headstart.detectors.transformer import TransformerDetector, TransformerSettings
from headstart.optim import OptimSettings


class DETRSettings(TransformerSettings):
    name: Literal["detr"] = Field("detr", description="detector family")
    pre_norm: bool = Field(False, description="norms before attention and feed-forward instead of after them")
    no_object: float = Field(0.1, ge=0, description='loss: weight of "no object" in the class term')

    def call(self) -> Call:
        body = backbones.body(self.backbone, (5,), self.composite)
        return Call(detr, {"body": body, **self.transformer_arguments(), "pre_norm": self.pre_norm})


class DETR(TransformerDetector):
    family = "detr"
    settings_type = DETRSettings
    loss_kind = "softmax"
    module: DETRModule

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, DETRModule)

    def class_layer(self, num_classes: int) -> nn.Module:
        """``num_classes`` + 1 logits, the last of them "no object"."""
        return nn.Linear(self.query_width, num_classes + 1)

    def further_weights(self, settings: TransformerSettings) -> Mapping[str, float]:
        assert isinstance(settings, DETRSettings)
        return {"no_object": settings.no_object}

    def tuning(self) -> OptimSettings:
        """The paper's: AdamW, the backbone at a tenth of the rate."""
        return OptimSettings(
            optimizer="adamw", base_lr=1e-4, base_batch=16, weight_decay=1e-4, clip=0.1, lr_scale={"backbone": 0.1}
        )
