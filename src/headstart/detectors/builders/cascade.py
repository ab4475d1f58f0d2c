"""Cascade R-CNN, which torchvision does not have, out of torchvision's pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.boxes import clip_boxes_to_image, remove_small_boxes

from headstart.detectors.builders.rcnn import box_head, rpn

STAGES = (  # IoU with an object from which a box is positive, weights of the box coder, weight of the losses
    (0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    (0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    (0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)


class CascadePredictor(FastRCNNPredictor):
    """Class logits (n, num_classes), and box deltas (n, 4) that are the same for all classes."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4)


class CascadeRoIHeads(nn.Module):
    """Box heads in a row: each looks at the boxes that the one before it has refined, and is stricter.

    In place of torchvision's ``RoIHeads``: the same arguments, results and loss terms, the latter with ``_1``, ``_2``,
    ``_3`` for the stage.

    Attributes:
        rules: of each stage, torchvision's own rules for which boxes are positive and which are sampled, how deltas
            are encoded, and, of the last, which detections are kept. They have no layers.
    """

    def __init__(
        self,
        box_roi_pool: MultiScaleRoIAlign,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[nn.Module],
        stages: Sequence[tuple[float, tuple[float, float, float, float], float]] = STAGES,
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
    ) -> None:
        super().__init__()
        if not len(box_heads) == len(box_predictors) == len(stages):
            raise ValueError(f"{len(stages)} stages, {len(box_heads)} box heads, {len(box_predictors)} box predictors")
        self.box_roi_pool = box_roi_pool
        self.box_heads = nn.ModuleList(box_heads)
        self.box_predictors = nn.ModuleList(box_predictors)
        sampling = batch_size_per_image, positive_fraction
        keeping = score_thresh, nms_thresh, detections_per_img
        self.rules = nn.ModuleList(
            RoIHeads(None, None, None, iou, iou, *sampling, coder, *keeping) for iou, coder, _ in stages
        )
        self.loss_weights = tuple(weight for _, _, weight in stages)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            if targets is None:
                raise ValueError("targets should not be None")
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.detections(features, proposals, image_shapes), {}

    def predict(
        self, stage: int, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Class logits (n, num_classes) and box deltas (n, 4) of the n boxes of all images."""
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        logits, deltas = self.box_predictors[stage](self.box_heads[stage](pooled))
        return logits.float(), deltas.float()

    def refine(
        self, stage: int, deltas: Tensor, boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[Tensor]:
        """``boxes`` of each image moved by their ``deltas`` (n, 4), inside the image, without gradient."""
        moved = self.rules[stage].box_coder.decode_single(deltas.detach().float(), torch.cat(boxes))
        each = moved.split([len(of_image) for of_image in boxes])
        return [clip_boxes_to_image(of_image, shape) for of_image, shape in zip(each, image_shapes, strict=True)]

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Cross entropy and smooth L1 (torchvision's, beta 1/9) of each stage, times the stage's weight."""
        found, boxes = {}, proposals
        for stage, rules in enumerate(self.rules):
            boxes, _, labels, wanted = rules.select_training_samples(boxes, targets)
            logits, deltas = self.predict(stage, features, boxes, image_shapes)
            classes = logits.shape[1]  # torchvision's loss looks the deltas up by class
            terms = fastrcnn_loss(logits, deltas.repeat(1, classes), labels, wanted)
            for name, term in zip(("loss_classifier", "loss_box_reg"), terms, strict=True):
                found[f"{name}_{stage + 1}"] = self.loss_weights[stage] * term
            boxes = without_empty(self.refine(stage, deltas, boxes, image_shapes), boxes)
        return found

    def detections(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Boxes of the last stage; scores are the mean of all stages', each on the boxes it was given."""
        scores, boxes = [], proposals
        for stage in range(len(self.rules)):
            given = boxes
            logits, deltas = self.predict(stage, features, given, image_shapes)
            scores.append(logits.softmax(-1))
            boxes = self.refine(stage, deltas, given, image_shapes)
        mean = torch.stack(scores).mean(dim=0)
        # torchvision's NMS begins with a softmax, which undoes this log, and looks the deltas up by class.
        kept = self.rules[-1].postprocess_detections(mean.log(), deltas.repeat(1, mean.shape[1]), given, image_shapes)
        return [{"boxes": b, "labels": n, "scores": s} for b, s, n in zip(*kept, strict=True)]


def without_empty(boxes: list[Tensor], instead: list[Tensor]) -> list[Tensor]:
    """``boxes`` of each image that have an area; where no image has any, ``instead``, for a loss needs some."""
    kept = [of_image[remove_small_boxes(of_image, 1e-2)] for of_image in boxes]
    return kept if any(len(of_image) for of_image in kept) else instead


def cascade_rcnn(
    backbone: nn.Module,
    num_classes: int,
    head: str,
    head_width: int,
    anchor_px: Sequence[int],
    box_batch_size_per_image: int,
    **options: Any,
) -> GeneralizedRCNN:
    """On a pyramid. ``num_classes`` counts the background; ``options`` are ``FasterRCNN``'s."""
    channels, v2 = backbone.out_channels, head == "4conv1fc"
    parts = rpn(anchor_px, channels, convs=2 if v2 else 1)
    # Only for what stands before the box heads.
    one = FasterRCNN(backbone, box_head=nn.Identity(), box_predictor=nn.Identity(), **parts, **options)
    heads = CascadeRoIHeads(
        one.roi_heads.box_roi_pool,
        [box_head(head, channels, head_width) for _ in STAGES],
        [CascadePredictor(head_width, num_classes) for _ in STAGES],
        batch_size_per_image=box_batch_size_per_image,
    )
    return GeneralizedRCNN(one.backbone, one.rpn, heads, one.transform)
