"""The teacher as an exponential moving average of the student."""

from __future__ import annotations

import math

import torch
from torch import nn


def cosine_momentum(step: int, total_steps: int, start: float) -> float:
    """``start`` at step 0, 1 at the last, along a cosine (BYOL; SoCo section 4.1)."""
    return 1 - (1 - start) * (math.cos(math.pi * step / max(1, total_steps)) + 1) / 2


class EMA:
    """Moves ``teacher``'s parameters towards ``student``'s of the same names.

    Buffers stay the teacher's own: its batch-norm statistics come from its own forward passes.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        theirs = dict(student.named_parameters(remove_duplicate=False))
        pairs = [
            (p, theirs[name])
            for name, p in teacher.named_parameters(remove_duplicate=False)
            if theirs[name].requires_grad
        ]
        pairs = list({id(p): (p, q) for p, q in pairs}.values())
        self._teacher = [p for p, _ in pairs]
        self._student = [q for _, q in pairs]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        torch._foreach_lerp_(self._teacher, self._student, 1 - momentum)
