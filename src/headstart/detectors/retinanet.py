"""RetinaNet (Lin et al. 2017, https://arxiv.org/abs/1708.02002), as torchvision builds it.

With the default settings and ``backbone="resnet50"`` the module is torchvision's own ``retinanet_resnet50_fpn_v2``
(group norm in the head, P6 and P7 from C5, GIoU loss), with ``head_norm="none"`` it is ``retinanet_resnet50_fpn`` (P6
and P7 from P5, L1 loss): same parameter names, same shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.ops import box_iou

from headstart.detectors.builders.dense import retinanet
from headstart.detectors.dense import DenseDetector, DenseSettings
from headstart.detectors.detector import Target
from headstart.detectors.plain_code import Call


class RetinaNetSettings(DenseSettings):
    name: Literal["retinanet"] = Field("retinanet", description="detector family")
    p6_from: Literal["c5", "p5"] | None = Field(
        None, description="what the levels above P5 are made from; unset: c5 with head_norm gn, p5 with none"
    )
    box_loss: Literal["giou", "l1", "smooth_l1"] | None = Field(
        None, description="loss of box regression; unset: giou with head_norm gn, l1 with none"
    )
    anchor_px: list[int] = Field(
        [32, 64, 128, 256, 512], description="anchor sides on P3..P7, px; each also times 2^(1/3) and 2^(2/3)"
    )
    detections: int = Field(300, ge=1, description="detections an image, at most")

    def call(self) -> Call:
        v2 = self.head_norm == "gn"
        own = {"p6_from": self.p6_from or ("c5" if v2 else "p5"), "box_loss": self.box_loss or ("giou" if v2 else "l1")}
        return Call(retinanet, {**self.dense_arguments(), **own})


class RetinaNet(DenseDetector):
    family = "retinanet"
    settings_type = RetinaNetSettings
    projector_kernel = 1
    module: TorchvisionRetinaNet

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, TorchvisionRetinaNet)

    def assign(self, anchors: Tensor, boxes: Tensor, counts: Sequence[int]) -> Tensor:
        """IoU of at least .5, or the highest that a box has with any anchor; -2 from .4 on, where neither holds."""
        return self.module.proposal_matcher(box_iou(boxes, anchors))

    def location_losses(
        self, maps: list[Tensor], anchors: Tensor, assigned: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        head = self.module.head.regression_head
        outputs = {"bbox_regression": head(maps).float()}
        boxes = [{"boxes": target["boxes"].float()} for target in targets]
        with torch.autocast(anchors.device.type, enabled=False):
            return {"boxes": head.compute_loss(boxes, outputs, [anchors] * len(boxes), list(assigned))}

    def compute_loss(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], counts: list[int]
    ) -> dict[str, Tensor]:
        return self.module.compute_loss(targets, outputs, anchors)
