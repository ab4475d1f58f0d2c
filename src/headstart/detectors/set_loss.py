"""The loss of DETR and its kin: predictions and objects matched one to one, then class, L1 and generalised IoU.

Carion et al. 2020 (https://arxiv.org/abs/2005.12872), section 3.1. Eq. 1: :meth:`SetLoss.match`. Eq. 2: the class term;
the box terms are section 3.1's "bounding box loss". Deformable DETR (https://arxiv.org/abs/2010.04159) replaces cross
entropy by the sigmoid focal loss, appendix A.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from headstart import distributed
from headstart.matching import Matches, giou, giou_cost, hungarian, in_shares, l1_cost, padded, xyxy

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss


@dataclass(frozen=True)
class Objects:
    """What is to be found in a batch.

    Attributes:
        boxes_cxcywh: per image (k, 4), shares of the image.
        labels: per image (k,) int64, from 1.
    """

    boxes_cxcywh: list[Tensor]
    labels: list[Tensor]

    @classmethod
    def of(cls, targets: Sequence[dict[str, Tensor]], sizes: Tensor) -> Objects:
        """From targets in xyxy px of images of ``sizes`` (B, 2), height and width."""
        boxes = [in_shares(t["boxes"].float(), size) for t, size in zip(targets, sizes, strict=True)]
        return cls(boxes, [t["labels"] for t in targets])

    def repeated(self, times: int) -> Objects:
        """The same batch ``times`` over, as the predictions of that many decoder layers see it."""
        return Objects(self.boxes_cxcywh * times, self.labels * times)

    @property
    def counts(self) -> list[int]:
        return [len(boxes) for boxes in self.boxes_cxcywh]


@dataclass(frozen=True)
class SetLoss:
    """Weights and costs; the defaults are DETR's and Deformable DETR's for boxes.

    Attributes:
        kind: softmax: C + 1 logits a query, the last of them "no object" (DETR); focal: C logits, a sigmoid each.
        class_cost, l1_cost, giou_cost: of a pair, in the matching.
        class_weight, l1_weight, giou_weight: of the terms of the loss.
        no_object: weight of "no object" in the cross entropy.
    """

    kind: Literal["softmax", "focal"]
    class_cost: float = 1.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    no_object: float = 0.1

    @torch.no_grad()
    def match(self, logits: Tensor | None, boxes_cxcywh: Tensor, objects: Objects) -> Matches:
        """Eq. 1: the pairs of prediction and object of least cost.

        Args:
            logits: (B, N, C) or (B, N, C + 1); None: by their boxes alone.
            boxes_cxcywh: (B, N, 4), shares.
        """
        wanted = padded(objects.boxes_cxcywh)
        cost = self.l1_cost * l1_cost(boxes_cxcywh, wanted)
        cost += self.giou_cost * giou_cost(xyxy(boxes_cxcywh), xyxy(wanted))
        if logits is not None and wanted.shape[1]:
            index = (padded(objects.labels) - 1).clamp(min=0)[:, None].expand(*cost.shape)
            cost += self.class_cost * self._class_cost(logits.float()).gather(2, index)
        return hungarian(cost, objects.counts)

    def _class_cost(self, logits: Tensor) -> Tensor:
        """(B, N, C): of naming each class."""
        p = self.probabilities(logits)
        if self.kind == "softmax":
            return -p
        positive = ALPHA * (1 - p) ** GAMMA * -F.logsigmoid(logits)
        negative = (1 - ALPHA) * p**GAMMA * -F.logsigmoid(-logits)
        return positive - negative

    def __call__(self, logits: Tensor, boxes_cxcywh: Tensor, objects: Objects) -> dict[str, Tensor]:
        """Terms ``class``, ``l1``, ``giou``, weighted, each summed over the decoder's layers; a matching a layer.

        Args:
            logits: (L, B, N, C) or (L, B, N, C + 1).
            boxes_cxcywh: (L, B, N, 4), shares.
        """
        return self.with_matches(logits, boxes_cxcywh, objects)[0]

    def with_matches(
        self, logits: Tensor, boxes_cxcywh: Tensor, objects: Objects
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """The terms, and the matching of each layer that they come from."""
        with torch.autocast(logits.device.type, enabled=False):
            logits, boxes_cxcywh = logits.float(), boxes_cxcywh.float()
            every = objects.repeated(len(logits))
            # All layers at once: one copy to the host instead of one a layer.
            matches = self.match(logits.flatten(0, 1), boxes_cxcywh.flatten(0, 1), every)
            count = objects_in_all(objects, logits)
            terms = {
                "class": self._class_loss(logits, matches, every, count),
                **self.box_losses(boxes_cxcywh.flatten(0, 1), matches, every, count),
            }
        return terms, per_layer(matches, len(logits), logits.shape[1])

    def _class_loss(self, logits: Tensor, matches: Matches, objects: Objects, count: Tensor) -> Tensor:
        """Softmax: weighted mean over a layer's queries (as torch's), the sum of weights being all processes' mean.
        Focal: sum over queries and classes / count.
        """
        image, query, object_ = matches
        labels = padded(objects.labels)[image, object_] - 1
        each = logits.flatten(0, 1)
        if self.kind == "softmax":
            nothing = logits.shape[-1] - 1
            wanted = logits.new_full(each.shape[:2], nothing, dtype=torch.int64)
            wanted[image, query] = labels
            weight = logits.new_ones(nothing + 1)
            weight[nothing] = self.no_object
            sums = F.cross_entropy(each.mT, wanted, weight, reduction="none").unflatten(0, logits.shape[:2])
            weights = distributed.mean(weight[wanted].unflatten(0, logits.shape[:2]).sum(dim=(1, 2)))
            tiny = torch.finfo(weights.dtype).tiny  # without weight where there is nothing, and nothing there
            return self.class_weight * (sums.sum(dim=(1, 2)) / weights.clamp(min=tiny)).sum()
        wanted = torch.zeros_like(each)
        wanted[image, query, labels] = 1
        return self.class_weight * sigmoid_focal_loss(each, wanted, ALPHA, GAMMA, reduction="sum") / count

    def first_losses(self, first: tuple[Tensor, Tensor] | None, objects: Objects) -> dict[str, Tensor]:
        """Two-stage detectors: terms of the encoder's own proposals, to which all objects are of one class.

        Args:
            first: logits (B, S, 1) and boxes (B, S, 4); None: there is no such stage, and no term.
        """
        if first is None:
            return {}
        logits, boxes = first
        nameless = Objects(objects.boxes_cxcywh, [torch.ones_like(labels) for labels in objects.labels])
        terms = replace(self, kind="focal")(logits[None], boxes[None], nameless)
        return {f"first_{name}": term for name, term in terms.items()}

    def class_count(self, logits: Tensor) -> int:
        """C of (..., C) or (..., C + 1)."""
        return logits.shape[-1] - (self.kind == "softmax")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., C) or (..., C + 1) -> (..., C) in [0, 1]: of each class, as the detector itself scores it."""
        return logits.softmax(dim=-1)[..., :-1] if self.kind == "softmax" else logits.sigmoid()

    def box_losses(self, boxes_cxcywh: Tensor, matches: Matches, objects: Objects, count: Tensor) -> dict[str, Tensor]:
        """Terms ``l1`` and ``giou``: weighted sums over the matched pairs, divided by ``count``.

        Args:
            boxes_cxcywh: (B, N, 4), shares.
            count: of objects, as :func:`objects_in_all` has it.
        """
        image, query, object_ = matches
        found, wanted = boxes_cxcywh[image, query], padded(objects.boxes_cxcywh)[image, object_]
        return {
            "l1": self.l1_weight * (found - wanted).abs().sum() / count,
            "giou": self.giou_weight * (1 - giou(xyxy(found), xyxy(wanted))).sum() / count,
        }


def objects_in_all(objects: Objects, like: Tensor) -> Tensor:
    """Objects of a batch, at least 1; over several processes their mean, so that N processes do the step of one."""
    count = torch.tensor(float(sum(objects.counts)), device=like.device)
    return distributed.mean(count).clamp(min=1)


def per_layer(matches: Matches, layers: int, batch: int) -> list[Matches]:
    """Matches of (layers x batch) images, layer by layer: each layer has as many, those of an image together."""
    pairs = len(matches[0]) // layers
    parts = zip(*(part.split(pairs) if pairs else (part,) * layers for part in matches), strict=True)
    return [(image - layer * batch, query, object_) for layer, (image, query, object_) in enumerate(parts)]
