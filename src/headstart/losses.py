"""Contrast between objects by the thousand, never all against all at once.

LocSCE of ProSeCo (Bouniot et al., 2023, https://arxiv.org/abs/2310.16835) and what it contains:

    Eq. 6-10    loc_sce                            SCE (Denize et al., 2023)    loc_sce, delta = 1
    Eq. 12      loc_sce, lambda_sce = 1 (LocNCE)   Eq. 11, InfoNCE              loc_sce, lambda_sce = 1, delta = 1

M objects make M x M similarities, 1.5 GB for the paper's 64 images of 300, and autograd keeps several such matrices.
Here rows are worked on a block at a time, loss and gradient together: since the loss is a mean over rows, the
gradient of each block can be added up at once, and of the matrices nothing is kept.

Where the printed equations are not followed:

* Eq. 6 masks every object of the same image and every one of the same index. SCE, which it extends, masks the object
  itself, and so does this.
* Eq. 9 with delta = 1 would make positives of boxes that happen to be equal, and none of an empty box. Here an object
  is always its own positive, and with delta = 1 nothing else is, so that SCE comes out to the last bit.

What is kept as printed: the wanted similarities of Eq. 9 do not sum to 1. An object with P positives weighs about P
times as much, and the loss rises as boxes begin to overlap; it is no measure of progress across that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headstart import boxes as geometry
from headstart import distributed

# Entries of a block: on CPU what its caches hold, elsewhere enough to keep a GPU busy (32 MiB a matrix in float32).
CPU_BLOCK, GPU_BLOCK = 2**20, 2**23


def loc_sce(
    students: Tensor,
    teachers: Tensor,
    matching: Tensor,
    boxes: Tensor,
    *,
    tau: float,
    tau_t: float,
    lambda_sce: float,
    delta: float,
    block: int | None = None,
) -> Tensor:
    """Cross-entropy of the students' similarities to each teacher object, over all images of all processes.

    The wanted similarities of teacher object j are ``lambda_sce`` for each object of its image whose box overlaps
    its own by an IoU of ``delta`` or more, itself included, and ``1 - lambda_sce`` shared out as the teacher's own
    objects resemble it. Column m of an image is the student's object that its teacher's object m is matched to.

    Args:
        students: (B, N, D) of length 1; the gradient goes here alone.
        teachers: (B, N, D) of length 1.
        matching: (B, N) int64, which of an image's students each of its teacher objects is matched to.
        boxes: (B, N, 4) the teacher's, xyxy in any unit.
        block: rows at a time; unset: as suits the device.

    Returns:
        The mean over teacher objects; as a mean over processes it is that of all of them.
    """
    width = teachers.shape[-1]
    matched = students.gather(1, matching[..., None].expand(-1, -1, width)).flatten(0, 1)
    rows = teachers.detach().flatten(0, 1)
    counts = distributed.gather_rows(torch.tensor([len(rows)], device=rows.device))  # one a process
    first = int(counts[: distributed.rank()].sum())
    columns, others = distributed.gather_rows(matched), distributed.gather_rows(rows)
    if block is None:
        block = max(1, (CPU_BLOCK if rows.device.type == "cpu" else GPU_BLOCK) // max(1, len(others)))
    with torch.autocast(rows.device.type, enabled=False):
        total = _Rows.apply(columns, rows, others, boxes.detach(), first, tau, tau_t, lambda_sce, delta, block)
    return total / counts.to(total.dtype).mean().clamp(min=1)


class _Rows(torch.autograd.Function):
    """Sum over rows of Eq. 10; row i is teacher object ``first + i`` of ``others``, whose columns these are."""

    @staticmethod
    def forward(
        ctx: Any,
        columns: Tensor,
        rows: Tensor,
        others: Tensor,
        boxes: Tensor,
        first: int,
        tau: float,
        tau_t: float,
        lambda_sce: float,
        delta: float,
        block: int,
    ) -> Tensor:
        dtype = torch.float64 if columns.dtype == torch.float64 else torch.float32
        students, rows, others = columns.to(dtype), rows.to(dtype), others.to(dtype)
        boxes = boxes.to(dtype)
        objects = boxes.shape[1]
        gradient = torch.zeros_like(students) if ctx.needs_input_grad[0] else None
        total = students.new_zeros(())
        for start in range(0, len(rows), block):
            z = rows[start : start + block]
            number = torch.arange(start, start + len(z), device=z.device)
            image, place = number // objects, number % objects
            own = first + image[:, None] * objects + torch.arange(objects, device=z.device)  # columns of its image
            positive = _positives(boxes, image, place, delta).to(dtype)

            relations: Tensor | None = None
            if lambda_sce < 1 and len(others) > 1:  # a single object resembles nothing
                relations = (z / tau_t) @ others.T
                relations.scatter_(1, first + number[:, None], -torch.inf)
                relations = relations.softmax(dim=1).mul_(1 - lambda_sce)
            wanted = lambda_sce * positive.sum(dim=1) + (0 if relations is None else 1 - lambda_sce)

            # One pass each, fused, and no product of two matrices by a batched matmul: on a GPU passes are what counts.
            log_shares = ((z / tau) @ students.T).log_softmax(dim=1)
            attracted = lambda_sce * (positive * log_shares.gather(1, own)).sum(dim=1)
            if relations is not None:
                attracted += (relations * log_shares).sum(dim=1)
            total -= attracted.sum()
            if gradient is not None:
                # Of a logit: its share of the row, times all that is wanted there, less what is wanted of it.
                wrong = log_shares.exp_().mul_(wanted[:, None])
                if relations is not None:
                    wrong -= relations
                wrong.scatter_add_(1, own, -lambda_sce * positive)
                gradient.addmm_(wrong.T, z, alpha=1 / tau)
        ctx.dtype = columns.dtype
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return ((gradient * upstream[0]).to(ctx.dtype), *[None] * 9)


def _positives(boxes: Tensor, image: Tensor, place: Tensor, delta: float) -> Tensor:
    """(R, N) bool: which objects of its ``image`` (R,) are positives of the one at ``place`` (R,)."""
    itself = place[:, None] == torch.arange(boxes.shape[1], device=boxes.device)
    if delta >= 1:
        return itself
    overlaps = geometry.iou(boxes[image, place][:, None], boxes[image])[:, 0]
    return itself | (overlaps >= delta)
