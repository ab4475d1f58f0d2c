"""Optimisers and schedules. LARS is timm's; what is ours is which parameters get decay and how the rate moves."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from timm.optim.lars import Lars
from torch import nn

from headstart.errors import SettingsError
from headstart.settings import Settings

DROPS = (2 / 3, 8 / 9)  # COCO's schedules


class OptimSettings(Settings):
    optimizer: Literal["lars", "sgd", "adamw"] | None = Field(
        None, description="lars, sgd or adamw; unset: chosen for the batch size, and printed"
    )
    lr: float | None = Field(
        None, gt=0, description="peak learning rate of the whole batch; unset: base_lr x batch / base_batch"
    )
    base_lr: float | None = Field(None, gt=0, description="learning rate at a batch of base_batch images")
    base_batch: int = Field(256, gt=0, description="batch, in images, that base_lr is meant for")
    weight_decay: float | None = Field(None, ge=0, description="weight decay; never on 1-D parameters")
    decay_1d: bool = Field(False, description="weight decay on biases and norms too (torchvision's habit)")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of lars and sgd")
    trust: float = Field(0.001, gt=0, description="trust coefficient of lars")
    warmup_epochs: float | None = Field(None, ge=0, description="linear warm-up, passes over the images")
    warmup_steps: int | None = Field(None, ge=0, description="linear warm-up, steps; wins over warmup_epochs")
    warmup_from: float = Field(0.001, ge=0, le=1, description="share of lr at the first warm-up step")
    schedule: Literal["cosine", "steps", "constant"] | None = Field(
        None, description="what follows warm-up: cosine, steps or constant; unset: as the method's paper"
    )
    final_lr: float = Field(0.0, ge=0, description="share of lr at the end of the cosine")
    drops: list[float] | None = Field(
        None,
        description="schedule=steps: shares of the run after which lr drops by drop_factor; unset: as the paper, or "
        "2/3 and 8/9",
    )
    drop_factor: float = Field(0.1, gt=0, lt=1, description="schedule=steps: factor of each drop")
    clip: float | None = Field(
        None, ge=0, description="largest norm of the gradient; 0: no clipping; unset: as the paper, else none"
    )
    lr_scale: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None,
        description="factor on lr of parameters with this component in their dotted name, for example {backbone: 0.1}; "
        "{}: none; unset: as the paper, else none",
    )


def settle_optim(
    optim: OptimSettings, advised: OptimSettings, batch_size: int, total_steps: int, steps_per_epoch: float
) -> list[str]:
    """Resolve optimiser, rate, decay and warm-up against what a method, or fine-tuning, advises.

    Returns:
        What was chosen, in words.

    Raises:
        SettingsError: an optimiser other than the advised one was asked for, without its rate.
    """
    said = []
    if optim.optimizer is None:
        optim.optimizer = advised.optimizer
        said.append(f"optimiser {optim.optimizer} (--set optim.optimizer=lars|sgd|adamw)")
    if optim.weight_decay is None:
        optim.weight_decay = advised.weight_decay
    if optim.schedule is None:
        optim.schedule = advised.schedule or "cosine"
    if optim.drops is None:
        optim.drops = advised.drops or list(DROPS)
    if optim.clip is None and advised.clip is not None:
        optim.clip = advised.clip
        said.append(f"gradients of a norm of at most {optim.clip:g} (--set optim.clip)")
    if optim.lr_scale is None:
        optim.lr_scale = dict(advised.lr_scale or {})
        said += [f"lr x {factor:g} in {name} (--set optim.lr_scale)" for name, factor in optim.lr_scale.items()]
    if optim.lr is None:
        base, batch = optim.base_lr, optim.base_batch
        if base is None:
            base, batch = advised.base_lr, advised.base_batch
            if optim.optimizer != advised.optimizer:
                raise SettingsError(f"optim.optimizer={optim.optimizer}: needs its learning rate too (optim.base_lr)")
        assert base is not None
        optim.lr = base * batch_size / batch
        said.append(f"lr {optim.lr:.3g}: {base:g} x batch {batch_size} / {batch} (--set optim.lr)")
    if optim.warmup_steps is None and optim.warmup_epochs is None and advised.warmup_steps is not None:
        optim.warmup_steps = min(advised.warmup_steps, total_steps // 10)
        said.append(f"warm-up {optim.warmup_steps} steps (--set optim.warmup_steps)")
    if optim.warmup_steps is None:
        epochs = optim.warmup_epochs if optim.warmup_epochs is not None else advised.warmup_epochs
        # The papers warm up for a tenth of a 100-epoch run; a short run never gets more than that either.
        tenth = total_steps // 10
        optim.warmup_steps = tenth if epochs is None else round(epochs * steps_per_epoch)
        if optim.warmup_epochs is None:
            optim.warmup_steps = min(optim.warmup_steps, tenth)
            said.append(f"warm-up {optim.warmup_steps} steps (--set optim.warmup_steps)")
    return said


def build_optimizer(modules: Iterable[nn.Module], settings: OptimSettings) -> torch.optim.Optimizer:
    """One optimiser over the trainable parameters of ``modules``.

    1-D parameters (biases, norms) get no weight decay, and with LARS no adaptation either: timm's LARS adapts
    only where there is decay (SoCo's released code does the same).
    """
    assert settings.lr is not None
    assert settings.weight_decay is not None
    named = [pair for module in modules for pair in module.named_parameters()]
    scales = _scales((name for name, _ in named), settings.lr_scale or {})
    trained: dict[nn.Parameter, float] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            trained.setdefault(parameter, scales[name])  # C4 detectors share a block between two heads
    groups = []
    for scale in sorted(set(trained.values()), reverse=True):
        alike = [p for p, factor in trained.items() if factor == scale]
        matrices, vectors = ([p for p in alike if (p.ndim > 1) == several] for several in (True, False))
        shared = {"lr": settings.lr * scale, "lr_scale": scale}
        groups += [
            {"params": matrices, "weight_decay": settings.weight_decay, **shared},
            {"params": vectors, "weight_decay": settings.weight_decay if settings.decay_1d else 0.0, **shared},
        ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "lars":
        return Lars(groups, lr=settings.lr, momentum=settings.momentum, trust_coeff=settings.trust)
    # Fused: one pass over the memory instead of ten, half or less of the time on CPU too.
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    raise ValueError(f"optimizer {settings.optimizer!r} was not resolved")


def _scales(names: Iterable[str], factors: Mapping[str, float]) -> dict[str, float]:
    """Name of a parameter -> the product of the ``factors`` whose key is one of its dotted components.

    Raises:
        SettingsError: a key is no component of any name.
    """
    components = {name: set(name.split(".")) for name in names}
    known = set().union(*components.values())
    for key in factors:
        if key not in known:
            words = sorted(word for word in known if not word.isdigit())
            near = difflib.get_close_matches(key, words, n=3) or words
            raise SettingsError(f"optim.lr_scale: no parameter has {key!r} in its name; near are {', '.join(near)}")
    return {name: math.prod(factors[key] for key in factors if key in parts) for name, parts in components.items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """``rate``, times the factor of each group (``optim.lr_scale``)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)  # older checkpoints have none


def learning_rate(step: int, total_steps: int, settings: OptimSettings) -> float:
    """The rate used by 0-based ``step``: linear warm-up, then cosine (also where unset), steps or constant."""
    assert settings.lr is not None
    warmup = settings.warmup_steps or 0
    if step < warmup:
        share = settings.warmup_from + (1 - settings.warmup_from) * step / warmup
        return settings.lr * share
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "steps":
        passed = sum(step >= round(drop * total_steps) for drop in settings.drops or DROPS)
        return settings.lr * settings.drop_factor**passed
    progress = (step - warmup) / max(1, total_steps - warmup)
    low = settings.final_lr
    return settings.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
