"""Processes under ``torchrun``: who am I, and batch norm over all of them.

N processes with a batch of B / N each compute the loss and the step of one process with a batch of B.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headstart.errors import TrainingError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the processes that ``torchrun`` started; without it, nothing happens."""
    if not launched() or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Long, because the first process may make proposals for hours while the others wait.
    dist.init_process_group(backend, timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """``value`` of every process, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """True on all when true on one, so that they all stop at the same step."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor([float(flag)], device=device)
    dist.all_reduce(votes)
    return bool(votes.item())


def mean(values: Tensor) -> Tensor:
    """Mean over processes."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= world()
    return values


class _SumOverProcesses(torch.autograd.Function):
    """all_reduce whose gradient is an all_reduce."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class _Rows(torch.autograd.Function):
    """Rows of all processes, in rank order; the gradient of a row comes from all of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(world())]
        dist.all_gather(counts, count)
        ctx.counts = [int(c) for c in counts]
        # Processes may hold different numbers of rows; collectives want the same.
        padded = rows.new_zeros(max(ctx.counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(world())]
        dist.all_gather(gathered, padded)
        return torch.cat([g[:n] for g, n in zip(gathered, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = sum(ctx.counts[: rank()])
        return gradient[start : start + ctx.counts[rank()]]


def gather_rows(rows: Tensor) -> Tensor:
    """``rows`` (n, ...) of all processes, one after the other; n may differ between them. Differentiable."""
    return _Rows.apply(rows) if dist.is_initialized() else rows


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all processes where torch's own SyncBatchNorm refuses: on CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        values = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        others = [d for d in range(values.dim()) if d != 1]
        # Sums in double, as torch's own batch norm on CPU has them, and two passes: the squares are taken about the
        # global mean, which loses no digits to a large mean.
        count = torch.full((1,), values.numel() / values.shape[1], dtype=torch.float64, device=values.device)
        total = _SumOverProcesses.apply(torch.cat([values.sum(others, dtype=torch.float64), count]))
        count = total[-1:].detach()
        mean = total[:-1] / count
        shape = [1, -1] + [1] * (values.dim() - 2)
        centred = values - mean.to(values.dtype).view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(others, dtype=torch.float64)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                unbiased = variance.detach() * count / (count - 1)
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        out = centred * torch.rsqrt(variance + self.eps).to(values.dtype).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


class _WithActivation:
    """timm's batch norms end with a drop and an activation of their own."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))  # type: ignore[misc,attr-defined]


class _CPUSyncBatchNormAct(_WithActivation, CPUSyncBatchNorm):
    pass


class _SyncBatchNormAct(_WithActivation, nn.SyncBatchNorm):
    pass


def _synchronised(layer: nn.Module, cuda: bool) -> type[nn.Module]:
    """
    Raises:
        TrainingError: a batch norm that does something else besides, which nobody here knows of.
    """
    if type(layer).forward is nn.modules.batchnorm._BatchNorm.forward:
        return nn.SyncBatchNorm if cuda else CPUSyncBatchNorm
    if hasattr(layer, "act") and hasattr(layer, "drop"):
        return _SyncBatchNormAct if cuda else _CPUSyncBatchNormAct
    raise TrainingError(f"{type(layer).__name__}: can't be taken over several processes; use one, or another backbone")


@contextlib.contextmanager
def synchronised_batch_norm(module: nn.Module, device: torch.device) -> Iterator[None]:
    """All batch norms in ``module`` see the whole batch while this lasts.

    The class of each layer is changed and changed back, so that a user's own module keeps its parameters and,
    afterwards, its layers.
    """
    if world() == 1:
        yield
        return
    changed = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)
    ]
    classes = [type(layer) for layer in changed]
    replacements = [_synchronised(layer, device.type == "cuda") for layer in changed]
    for layer, replacement in zip(changed, replacements, strict=True):
        layer.process_group = None  # type: ignore[assignment]
        layer.__class__ = replacement  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, cls in zip(changed, classes, strict=True):
            layer.__class__ = cls
