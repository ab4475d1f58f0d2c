"""What RetinaNet and FCOS share: a head of two towers, at every place of a pyramid P3..P7.

AlignDet (Li et al. 2023, https://arxiv.org/abs/2307.11077) puts a projection in the class layer's place and trains it
where the detector's own rule assigns a prediction to a box. Only there is it computed here: thousands of places, where
the dense layer would give 256 values a prediction at some hundred thousand.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from headstart.detectors.detector import MatchAdvice, Matched, Target, as_float
from headstart.detectors.pyramid import (
    PyramidSettings,
    TorchvisionDetector,
    at_most,
    image_list,
    shapes_in_float32,
    stepwise_sgd,
    with_area,
)


class DenseSettings(PyramidSettings):
    head_norm: Literal["gn", "none"] = Field(
        "gn",
        description="norm after the head's convolutions; gn: group norm of 32 groups, or of as many below as "
        "divide fpn_channels into groups of two or more",
    )
    anchor_px: list[int] = Field([32, 64, 128, 256, 512], description="anchor sides on P3..P7, px")
    min_score: float = Field(0.05, ge=0, le=1, description="detections below this score are dropped")
    nms_iou: float = Field(0.5, ge=0, le=1, description="IoU above which the lower of two detections is dropped")
    candidates: int = Field(1000, ge=1, description="detections a level before that, at most")
    detections: int = Field(100, ge=1, description="detections an image, at most")

    @model_validator(mode="after")
    def _one_anchor_side_a_level(self) -> Self:
        if len(self.anchor_px) != 5:
            raise ValueError("anchor_px: the pyramid has 5 levels (P3..P7), so it takes 5 sides")
        return self

    def dense_arguments(self) -> dict[str, Any]:
        """What the builders of both families take."""
        return {
            "backbone": self.backbone_call(stages=(3, 4, 5)),
            "num_classes": (self.num_classes or 90) + 1,  # labels start at 1; torchvision's output 0 stays unused
            "anchor_px": self.anchor_px,
            "head_norm": self.head_norm,
            **self.transform_arguments(),
            "score_thresh": self.min_score,
            "nms_thresh": self.nms_iou,
            "topk_candidates": self.candidates,
            "detections_per_img": self.detections,
        }


class DenseDetector(TorchvisionDetector):
    """``module`` has ``anchor_generator``, and in its ``head`` a classification and a regression tower."""

    abilities = frozenset({"match"})
    projector_kernel: int  # of the projector's first convolution, cells

    @property
    def prefixes(self) -> Mapping[str, tuple[str, ...]]:
        towers = ("head.classification_head.", "head.regression_head.")
        return {
            **super().prefixes,
            "head": (f"{towers[0]}conv.", f"{towers[1]}conv."),
            "classifier": (f"{towers[0]}cls_logits.",),
            "regressor": (f"{towers[1]}bbox_reg.",),
        }

    @property
    def num_classes(self) -> int:
        return self.module.head.classification_head.num_classes - 1  # output 0 stays unused

    @abstractmethod
    def assign(self, anchors: Tensor, boxes: Tensor, counts: Sequence[int]) -> Tensor:
        """The detector's own rule: (N,) int64 of the box each of ``anchors`` answers for, negative where none.

        Args:
            anchors: (N, 4) xyxy px, level by level, finest first.
            boxes: (k, 4) xyxy px, k > 0.
            counts: anchors on each level.
        """

    @abstractmethod
    def location_losses(
        self, maps: list[Tensor], anchors: Tensor, assigned: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """The detector's own losses of where things are; ``anchors`` (N, 4), ``assigned`` (B, N)."""

    @abstractmethod
    def compute_loss(
        self, targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], counts: list[int]
    ) -> dict[str, Tensor]:
        """``module``'s own loss."""

    def loss(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """As ``module`` itself computes it, but in float32 from the head's outputs on.

        Under autocast torchvision would round its anchors to the maps' type: in bfloat16 by up to 4 px beyond 1024.
        """
        with_area(targets)
        listed, scaled = self.module.transform([as_float(image) for image in images], list(targets))
        maps = self.module.backbone(listed.tensors)
        maps = [maps] if isinstance(maps, Tensor) else list(maps.values())
        outputs = {name: output.float() for name, output in self.module.head(maps).items()}
        anchors, counts = self.anchors(listed.tensors, maps)
        with torch.autocast(listed.tensors.device.type, enabled=False):
            return self.compute_loss(scaled, outputs, [anchors] * len(images), counts)

    def anchors(self, images: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """``module``'s anchors (N, 4) xyxy px on ``images``, float32, padding included; how many on each level."""
        generator = self.module.anchor_generator
        anchors = generator(image_list(images[:1], None), shapes_in_float32(maps))[0]
        a_cell = generator.num_anchors_per_location()
        return anchors, [map_[0, 0].numel() * n for map_, n in zip(maps, a_cell, strict=True)]

    @property
    def match_advice(self) -> MatchAdvice:
        return MatchAdvice(stepwise_sgd(0.01), epochs=12, batch=16, most=2048)

    def projector(self, hidden: int, dim: int, classes: int = 0) -> nn.Module:
        """Convolution, ReLU, 1 x 1 convolution: ``dim`` values of each anchor of a cell."""
        width = self.parts["classifier"].in_channels
        anchors_a_cell = self.module.anchor_generator.num_anchors_per_location()[0]
        return CellProjector(width, hidden, dim, anchors_a_cell, self.projector_kernel)

    def match(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Sequence[Target],
        projector: nn.Module,
        most: int,
        losses: bool = True,
    ) -> Matched:
        """:meth:`assign` on all anchors, those in the padding included, as in the detector's own training."""
        maps = list(self.maps(images, sizes).values())
        anchors, counts = self.anchors(images, maps)
        boxes = [target["boxes"].float() for target in targets]
        nothing = anchors.new_full((len(anchors),), -1, dtype=torch.int64)
        assigned = torch.stack([self.assign(anchors, b, counts) if len(b) else nothing for b in boxes])
        found = self.location_losses(maps, anchors, assigned, targets) if losses else {}
        image, place = (assigned >= 0).nonzero().unbind(1)
        kept = at_most(len(image), most, image.device)
        image, place = image[kept], place[kept]
        tower = self.module.head.classification_head.conv
        embeddings = projector([tower(map_) for map_ in maps], image, place)
        return Matched(embeddings, image, assigned[image, place], found)


class CellProjector(nn.Module):
    """``second(relu(first(map)))`` of every map, computed where it is asked for alone.

    Args:
        channels: of the maps.
        hidden: channels between the two convolutions.
        dim: values of a prediction.
        anchors: predictions a cell, each with ``dim`` outputs of its own.
        kernel: side of the first convolution, odd; the second is 1 x 1.
    """

    def __init__(self, channels: int, hidden: int, dim: int, anchors: int, kernel: int) -> None:
        super().__init__()
        self.anchors = anchors
        self.first = nn.Conv2d(channels, hidden, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(hidden, anchors * dim, 1)

    def forward(self, maps: Sequence[Tensor], image: Tensor, place: Tensor) -> Tensor:
        """(M, dim) of predictions ``place`` (M,) of images ``image`` (M,).

        Predictions count level by level, row by row, cell by cell, the anchors of a cell in turn.
        """
        cell, anchor = place // self.anchors, place % self.anchors
        patches = self._patches(maps, image, cell)
        weights = self.first.weight.permute(0, 2, 3, 1).flatten(1)
        hidden = nn.functional.relu(nn.functional.linear(patches, weights, self.first.bias))
        # All anchors of the cell, then the one that is meant: the layer is small, and so each weight has a gradient.
        outputs = nn.functional.linear(hidden, self.second.weight.flatten(1), self.second.bias)
        outputs = outputs.unflatten(1, (self.anchors, outputs.shape[1] // self.anchors))
        return outputs[torch.arange(len(place), device=place.device), anchor]

    def _patches(self, maps: Sequence[Tensor], image: Tensor, cell: Tensor) -> Tensor:
        """(M, k * k * C): what the first convolution sees at each cell, zeros beyond the edges."""
        sides = torch.tensor([map_.shape[-2:] for map_ in maps], device=cell.device)
        ends = sides.prod(dim=1).cumsum(0)
        level = torch.bucketize(cell, ends, right=True)
        height, width = sides[level].unbind(1)
        within = cell - (ends[level] - height * width)
        reach = self.first.kernel_size[0] // 2
        steps = torch.arange(-reach, reach + 1, device=cell.device)
        down, right = torch.meshgrid(steps, steps, indexing="ij")
        y = (within // width)[:, None] + down.flatten()
        x = (within % width)[:, None] + right.flatten()
        inside = (y >= 0) & (y < height[:, None]) & (x >= 0) & (x < width[:, None])
        neighbours = cell[:, None] + down.flatten() * width[:, None] + right.flatten()
        cells = torch.cat([map_.flatten(2) for map_ in maps], dim=2)
        patches = cells[image[:, None], :, torch.where(inside, neighbours, cell[:, None])]
        return (patches * inside[..., None].to(patches.dtype)).flatten(1)
