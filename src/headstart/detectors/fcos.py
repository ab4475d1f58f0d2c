"""FCOS (Tian et al. 2020, https://arxiv.org/abs/2006.09214), as torchvision builds it.

With the default settings and ``backbone="resnet50"`` the module is torchvision's own ``fcos_resnet50_fpn``: same
parameter names, same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.ops import generalized_box_iou_loss

from headstart.detectors.builders.dense import fcos
from headstart.detectors.dense import DenseDetector, DenseSettings
from headstart.detectors.detector import Target
from headstart.detectors.plain_code import Call


class FCOSSettings(DenseSettings):
    name: Literal["fcos"] = Field("fcos", description="detector family")
    p6_from: Literal["c5", "p5"] = Field("p5", description="what the levels above P5 are made from")
    anchor_px: list[int] = Field(
        [8, 16, 32, 64, 128],
        description="unit of P3..P7, px, as their strides: a level answers for points 4 to 8 from their farthest side",
    )
    min_score: float = Field(0.2, ge=0, le=1, description="detections below this score are dropped")
    nms_iou: float = Field(0.6, ge=0, le=1, description="IoU above which the lower of two detections is dropped")

    def call(self) -> Call:
        return Call(fcos, {**self.dense_arguments(), "p6_from": self.p6_from})


class FCOS(DenseDetector):
    family = "fcos"
    settings_type = FCOSSettings
    projector_kernel = 3
    module: TorchvisionFCOS

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, TorchvisionFCOS)

    @property
    def prefixes(self) -> Mapping[str, tuple[str, ...]]:
        prefixes = super().prefixes
        return {**prefixes, "regressor": (*prefixes["regressor"], "head.regression_head.bbox_ctrness.")}

    def assign(self, anchors: Tensor, boxes: Tensor, counts: Sequence[int]) -> Tensor:
        """FCOS's rule: an anchor's centre answers for the smallest box that it lies in, near its centre, and whose
        farthest side is in the range of its level.

        Near: both coordinates within ``center_sampling_radius`` (1.5) times the anchor's side. Range: 4 to 8 sides,
        from 0 on the first level, without end on the last. Of boxes as small, the first. As in torchvision, areas are
        told apart in float32 as ``1e8 - area``: to 8 px, so below that the first counts too.
        """
        x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2)[:, :, None].unbind(1)  # (N, 1)
        side = (anchors[:, 2] - anchors[:, 0])[:, None]
        x1, y1, x2, y2 = boxes.unbind(1)
        reach = self.module.center_sampling_radius * side
        nearest = torch.minimum(torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y))  # (N, k)
        farthest = torch.maximum(torch.maximum(x - x1, x2 - x), torch.maximum(y - y1, y2 - y))
        shortest, longest = 4 * side, 8 * side
        shortest[: counts[0]] = 0
        longest[-counts[-1] :] = torch.inf
        answers = (nearest > 0) & (farthest > shortest) & (farthest < longest)
        answers &= ((x - (x1 + x2) / 2).abs() < reach) & ((y - (y1 + y2) / 2).abs() < reach)
        rank = torch.where(answers, 1e8 - (x2 - x1) * (y2 - y1), 0.0)
        highest, box = rank.max(dim=1)
        return box.masked_fill(highest <= 0, -1)

    def location_losses(
        self, maps: list[Tensor], anchors: Tensor, assigned: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """GIoU, and cross-entropy of the centreness, both means over the anchors that answer for a box."""
        deltas, centreness = self.module.head.regression_head(maps)
        image, place = (assigned >= 0).nonzero().unbind(1)
        first = torch.tensor([0, *[len(t["boxes"]) for t in targets[:-1]]], device=image.device).cumsum(0)
        goals = torch.cat([t["boxes"].float() for t in targets])[first[image] + assigned[image, place]]
        coder, count = self.module.head.box_coder, max(1, len(image))
        with torch.autocast(anchors.device.type, enabled=False):
            boxes = coder.decode(deltas[image, place].float(), anchors[place])
            # left, top, right, bottom: how far the sides of the box are from the anchor's centre
            left, top, right, bottom = coder.encode(anchors[place], goals).unbind(1)
            across = torch.minimum(left, right) / torch.maximum(left, right)
            along = torch.minimum(top, bottom) / torch.maximum(top, bottom)
            logits = centreness[image, place, 0].float()
            return {
                "boxes": generalized_box_iou_loss(boxes, goals, reduction="sum") / count,
                "centreness": F.binary_cross_entropy_with_logits(logits, (across * along).sqrt(), reduction="sum")
                / count,
            }

    def compute_loss(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], counts: list[int]
    ) -> dict[str, Tensor]:
        return self.module.compute_loss(targets, outputs, anchors, counts)
