"""One-to-one matching of predictions and objects (Hungarian), a batch at a time.

Costs are computed where the predictions are, and copied to the host once a batch; scipy solves each image's assignment
there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Matches = tuple[Tensor, Tensor, Tensor]
"""(image, prediction, object), each (M,) int64: M pairs, those of an image together and in the order of predictions."""


def hungarian(cost: Tensor, counts: Sequence[int]) -> Matches:
    """The pairs of least total cost in each image; every object of an image has one, as long as predictions last.

    Args:
        cost: (B, N, K) of prediction n for object k; columns from ``counts[b]`` on are padding and never matched.
            Values that are not finite count as very dear.
        counts: objects of each image, each from 0 to K.
    """
    if cost.ndim != 3 or len(counts) != len(cost) or max(counts, default=0) > cost.shape[2]:
        raise ValueError(f"cost {tuple(cost.shape)} and {len(counts)} counts up to {max(counts, default=0)} do not fit")
    # One copy to the host; a solver sees an image at a time.
    values = np.nan_to_num(cost.detach().float().cpu().numpy(), nan=1e9, posinf=1e9, neginf=-1e9)
    images, predictions, objects = [], [], []
    for number, (of_image, count) in enumerate(zip(values, counts, strict=True)):
        rows, columns = linear_sum_assignment(of_image[:, :count])
        images.append(np.full(len(rows), number))
        predictions.append(rows)
        objects.append(columns)
    found = np.stack([np.concatenate(part or [np.zeros(0)]) for part in (images, predictions, objects)]).astype(
        np.int64
    )
    image, prediction, object_ = torch.from_numpy(found).to(cost.device).unbind(0)
    return image, prediction, object_


def padded(rows: Sequence[Tensor]) -> Tensor:
    """(k_b, ...) of each image -> (B, K, ...), zeros beyond an image's own; K is the most, and may be 0."""
    most = max((len(r) for r in rows), default=0)
    out = rows[0].new_zeros((len(rows), most, *rows[0].shape[1:]))
    for place, r in zip(out, rows, strict=True):
        place[: len(r)] = r
    return out


def l1_cost(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, D), (B, K, D) -> (B, N, K): sum of absolute differences."""
    return torch.cdist(a.float(), b.float(), p=1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes xyxy, element by element; shapes broadcast: (..., 4), (..., 4) -> (...).

    Rezatofighi et al. 2019 (https://arxiv.org/abs/1902.09630). Two boxes without area at one place: 0.
    """
    a, b = a.float(), b.float()
    top_left, bottom_right = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    common = (bottom_right - top_left).clamp(min=0).prod(-1)
    area_a, area_b = (a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    union = area_a + area_b - common
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    tiny = torch.finfo(torch.float32).tiny
    return common / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def giou_cost(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, 4), (B, K, 4) xyxy -> (B, N, K): 1 - GIoU."""
    return 1 - giou(a[:, :, None], b[:, None])


def similarity_cost(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, D), (B, K, D) -> (B, N, K): minus the cosine."""
    return -torch.nn.functional.normalize(a.float(), dim=-1) @ torch.nn.functional.normalize(b.float(), dim=-1).mT


def xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre and size -> corners, in the same unit."""
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> centre and size, in the same unit."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)


def in_shares(boxes: Tensor, size: Tensor) -> Tensor:
    """(..., 4) xyxy px -> cxcywh in shares of an image of ``size`` (2,): height, width."""
    height, width = size.to(boxes.dtype).unbind(-1)
    return cxcywh(boxes) / torch.stack([width, height, width, height], dim=-1)
