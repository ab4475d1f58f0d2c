"""LARS against the paper's update in plain numpy, schedules against closed forms, EMA against a loop."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from headstart.ema import EMA, cosine_momentum
from headstart.errors import SettingsError
from headstart.optim import OptimSettings, build_optimizer, learning_rate, set_learning_rate, settle_optim


def test_lars_is_the_update_of_its_paper():
    """Five steps: trust ratio and decay on matrices, neither on vectors; momentum .9."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = build_optimizer(
        [layer], OptimSettings(optimizer="lars", lr=0.5, weight_decay=0.1, momentum=0.9, trust=0.001)
    )
    w, b = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    mw, mb = np.zeros_like(w), np.zeros_like(b)
    rng = np.random.default_rng(0)
    for _ in range(5):
        gw, gb = rng.normal(size=w.shape).astype("f"), rng.normal(size=b.shape).astype("f")
        layer.weight.grad, layer.bias.grad = torch.from_numpy(gw.copy()), torch.from_numpy(gb.copy())
        optimizer.step()
        norm_w, norm_g = np.linalg.norm(w), np.linalg.norm(gw)
        trust = 0.001 * norm_w / (norm_g + 0.1 * norm_w + 1e-8)
        mw = 0.9 * mw + trust * (gw + 0.1 * w)
        mb = 0.9 * mb + gb
        w, b = w - 0.5 * mw, b - 0.5 * mb
    np.testing.assert_allclose(layer.weight.detach().numpy(), w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.bias.detach().numpy(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_vectors_have_no_decay_and_frozen_parameters_no_place(name):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[2].requires_grad_(False)
    groups = build_optimizer([net], OptimSettings(optimizer=name, lr=0.1, weight_decay=0.01)).param_groups
    by_decay = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in groups}
    assert by_decay == {0.01: [2], 0.0: [1, 1, 1]}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"body": nn.Linear(3, 3)})
        self.sampling_offsets = nn.Linear(3, 2)
        self.backbone_like = nn.Linear(3, 2)
        self.backbone["sampling_offsets"] = nn.Linear(2, 2)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_some_parameters_move_at_a_share_of_the_rate(name):
    """Each parameter moves as under an optimiser of its own at lr x factor; factors multiply; names match whole."""
    torch.manual_seed(0)
    net = Named()
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    factors = {"backbone": 0.1, "sampling_offsets": 0.5}
    settings = OptimSettings(optimizer=name, lr=0.3, weight_decay=0.1, lr_scale=factors)
    gradients = {k: torch.randn_like(p) for k, p in before.items()}
    optimizer = build_optimizer([net], settings)
    set_learning_rate(optimizer, 0.2)
    for k, p in net.named_parameters():
        p.grad = gradients[k].clone()
    optimizer.step()
    for k, p in net.named_parameters():
        factor = math.prod(factors[part] for part in k.split(".") if part in factors)
        alone = nn.Module()
        alone.only = nn.Parameter(before[k].clone())
        reference = build_optimizer([alone], settings.model_copy(update={"lr_scale": None}))
        set_learning_rate(reference, 0.2 * factor)
        alone.only.grad = gradients[k].clone()
        reference.step()
        torch.testing.assert_close(p.detach(), alone.only.detach(), msg=k)
        assert factor == {"backbone": 0.1, "sampling_offsets": 0.5}.get(k.split(".")[0], 1.0) * (
            0.5 if k.startswith("backbone.sampling") else 1.0
        )


def test_a_factor_that_nothing_answers_to_is_refused_with_near_names():
    with pytest.raises(SettingsError, match=r"optim\.lr_scale: no parameter has 'back_bone'.*near are backbone"):
        build_optimizer([Named()], OptimSettings(optimizer="sgd", lr=1, weight_decay=0, lr_scale={"back_bone": 0.1}))


def test_a_frozen_part_may_have_a_factor():
    net = Named()
    net.backbone.requires_grad_(False)
    groups = build_optimizer([net], OptimSettings(optimizer="sgd", lr=1, weight_decay=0, lr_scale={"backbone": 0.1}))
    assert {group["lr_scale"] for group in groups.param_groups} == {1.0}


def test_what_is_advised_is_unset_or_off():
    """Clipping and factors: as advised where nobody says anything, and off where somebody says so."""
    paper = OptimSettings(optimizer="adamw", base_lr=1e-4, base_batch=16, weight_decay=0, clip=0.1, lr_scale={"a": 0.1})
    chosen = OptimSettings()
    said = settle_optim(chosen, paper, 16, 100, 10)
    assert (chosen.clip, chosen.lr_scale, chosen.lr) == (0.1, {"a": 0.1}, 1e-4)
    assert any("optim.clip" in line for line in said)
    assert any("lr x 0.1 in a (--set optim.lr_scale)" in line for line in said)
    off = OptimSettings(clip=0, lr_scale={})
    settle_optim(off, paper, 16, 100, 10)
    assert (off.clip, off.lr_scale) == (0, {})


@pytest.mark.parametrize(("name", "plain"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_updates_are_the_plain_ones_in_either_memory_layout(name, plain, layout):
    """Fused kernels walk through memory: a gradient laid out otherwise than its parameter would go astray."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 2))
    ours = ours.to(memory_format=layout)
    theirs = copy.deepcopy(ours)
    settings = OptimSettings(optimizer=name, lr=0.01, weight_decay=0.1, decay_1d=True)
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    reference = plain(theirs.parameters(), lr=0.01, weight_decay=0.1, foreach=False, **momentum)
    optimizer = build_optimizer([ours], settings)
    for _ in range(4):
        images = torch.randn(2, 3, 8, 8)
        for net, used in ((ours, optimizer), (theirs, reference)):
            used.zero_grad()
            for batch in (images.to(memory_format=layout), images):  # parts of a step, in both layouts
                net(batch).square().mean().backward()
            used.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_warmup_then_cosine():
    s = OptimSettings(optimizer="sgd", lr=2.0, warmup_steps=10, warmup_from=0.0, schedule="cosine")
    rates = [learning_rate(k, 110, s) for k in range(110)]
    assert rates[:11] == pytest.approx([0.2 * k for k in range(11)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * k / 100) for k in range(100)])


def test_steps_drop_where_the_paper_says():
    s = OptimSettings(optimizer="sgd", lr=0.02, warmup_steps=0, schedule="steps")
    rates = [learning_rate(k, 90, s) for k in range(90)]
    assert rates == pytest.approx([0.02] * 60 + [0.002] * 20 + [0.0002] * 10)


def test_rate_scales_with_the_batch_and_warm_up_with_the_run():
    paper = OptimSettings(optimizer="lars", base_lr=1.0, weight_decay=1e-5, warmup_epochs=10)
    chosen = OptimSettings(base_lr=1.0, warmup_epochs=10)
    settle_optim(chosen, paper, 2048, 62_500, 625)
    assert (chosen.optimizer, chosen.lr, chosen.warmup_steps) == ("lars", 8.0, 6250)
    short = OptimSettings()
    settle_optim(short, paper, 64, 500, 100)
    assert (short.lr, short.warmup_steps) == (0.25, 50)
    with pytest.raises(SettingsError, match=r"optim\.base_lr"):
        settle_optim(OptimSettings(optimizer="sgd"), paper, 64, 500, 100)


def test_ema_is_a_weighted_mean_of_parameters_only():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for p in student.parameters():
            p.normal_()
        student[1].running_mean.fill_(5)
    expected = {k: 0.9 * v + 0.1 * dict(student.named_parameters())[k] for k, v in teacher.named_parameters()}
    EMA(teacher, student).update(0.9)
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, expected[name])
    assert teacher[1].running_mean.tolist() == [0, 0, 0]


def test_momentum_one_freezes_and_zero_copies():
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    before = teacher.weight.detach().clone()
    ema = EMA(teacher, student)
    ema.update(1.0)
    assert torch.equal(teacher.weight, before)
    ema.update(0.0)
    torch.testing.assert_close(teacher.weight, student.weight)
    assert cosine_momentum(0, 10, 0.99) == pytest.approx(0.99)
    assert cosine_momentum(5, 10, 0.99) == pytest.approx(0.995)
