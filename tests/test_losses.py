"""LocSCE and what it contains, against the paper's equations, written out object by object."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headstart import losses
from test_distributed import torchrun

PAPER = {"tau": 0.1, "tau_t": 0.07, "lambda_sce": 0.5, "delta": 0.5}


def drawn(images=3, objects=5, width=4, seed=0, dtype=torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = [F.normalize(torch.randn(images, objects, width, generator=g, dtype=dtype), dim=-1) for _ in range(2)]
    corner = 0.3 * torch.rand(images, objects, 2, generator=g, dtype=dtype)
    side = 0.3 + 0.5 * torch.rand(images, objects, 2, generator=g, dtype=dtype)
    orders = [torch.randperm(objects, generator=g) for _ in range(images)]
    return {
        "students": z[0],
        "teachers": z[1],
        "matching": torch.stack(orders),
        "boxes": torch.cat([corner, corner + side], dim=-1),
    }


def plain_iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])
    return width * height / (area(a) + area(b) - width * height)


def plain_loc_sce(students, teachers, matching, boxes, tau, tau_t, lambda_sce, delta) -> float:
    """Eq. 6 (self masked), 7, 9 and 10."""
    z, z_hat, sigma, b = (t.tolist() for t in (teachers, students, matching, boxes))
    dot = lambda a, c: sum(x * y for x, y in zip(a, c, strict=True))
    every = [(i, j) for i in range(len(z)) for j in range(len(z[0]))]
    total = 0.0
    for i, j in every:
        relation = {(n, m): 0.0 if (n, m) == (i, j) else math.exp(dot(z[i][j], z[n][m]) / tau_t) for n, m in every}
        everything = sum(relation.values())
        likeness = {(n, m): math.exp(dot(z[i][j], z_hat[n][m]) / tau) for n, m in every}
        normaliser = sum(likeness.values())
        for n, m in every:
            positive = n == i and (m == j or (delta < 1 and plain_iou(b[i][j], b[i][m]) >= delta))
            w = lambda_sce * positive + (1 - lambda_sce) * (relation[n, m] / everything if everything else 0.0)
            total -= w * math.log(likeness[n, sigma[n][m]] / normaliser)
    return total / len(every)


def dense(students, teachers, matching, boxes, tau, tau_t, lambda_sce, delta) -> Tensor:
    """The same with whole matrices, for gradients; boxes overlap as in :func:`plain_iou`."""
    count, objects = teachers.shape[:2]
    z = teachers.flatten(0, 1)
    z_hat = torch.cat([students[i, matching[i]] for i in range(count)])
    relation = (z @ z.T / tau_t).fill_diagonal_(-torch.inf).softmax(dim=1).nan_to_num(0)
    w = (1 - lambda_sce) * relation
    for i in range(count):
        for j in range(objects):
            for m in range(objects):
                if m == j or (delta < 1 and plain_iou(boxes[i, j].tolist(), boxes[i, m].tolist()) >= delta):
                    w[i * objects + j, i * objects + m] += lambda_sce
    return -(w * (z @ z_hat.T / tau).log_softmax(dim=1)).sum() / len(z)


@pytest.mark.parametrize("block", [None, 1, 4, 7, 100])
@pytest.mark.parametrize(
    ("lambda_sce", "delta"), [(0.5, 0.5), (0.5, 0.2), (0.5, 0.7), (0.5, 1.0), (1.0, 1.0), (1.0, 0.5), (0.0, 0.5)]
)
def test_every_loss_of_the_tables_is_its_equation(lambda_sce, delta, block):
    """LocSCE, SCE, InfoNCE, LocNCE; blocks that end within an image, and within the last rows."""
    settings = {"tau": 0.1, "tau_t": 0.05, "lambda_sce": lambda_sce, "delta": delta}
    values = drawn()
    expected = plain_loc_sce(**values, **settings)
    assert losses.loc_sce(**values, **settings, block=block).item() == pytest.approx(expected, rel=1e-12)
    assert dense(**values, **settings).item() == pytest.approx(expected, rel=1e-12)


def test_some_boxes_of_the_tests_overlap_and_some_do_not():
    boxes = drawn()["boxes"].tolist()
    overlaps = [plain_iou(a, b) for image in boxes for a in image for b in image if a is not b]
    for delta in (0.2, 0.5, 0.7):
        assert 0 < sum(overlap >= delta for overlap in overlaps) < len(overlaps)


def test_delta_1_is_sce_even_where_boxes_are_equal_or_empty():
    values = drawn()
    expected = losses.loc_sce(**values, **PAPER | {"delta": 1.0})
    boxes = values["boxes"].clone()
    boxes[0, 1] = boxes[0, 0]
    boxes[1, 2] = 0
    assert torch.equal(losses.loc_sce(**values | {"boxes": boxes}, **PAPER | {"delta": 1.0}), expected)
    assert losses.loc_sce(**values | {"boxes": boxes}, **PAPER).item() == pytest.approx(
        plain_loc_sce(**values | {"boxes": boxes}, **PAPER)
    )


def test_info_nce_is_the_cross_entropy_of_the_matched_pair():
    values = drawn()
    z_hat = values["students"].gather(1, values["matching"][..., None].expand(-1, -1, 4)).flatten(0, 1)
    logits = values["teachers"].flatten(0, 1) @ z_hat.T / 0.1
    expected = F.cross_entropy(logits, torch.arange(len(logits)))
    settings = {"tau": 0.1, "tau_t": 0.07, "lambda_sce": 1.0, "delta": 1.0}
    torch.testing.assert_close(losses.loc_sce(**values, **settings), expected)


@pytest.mark.parametrize("block", [1, 4, 100])
@pytest.mark.parametrize(("lambda_sce", "delta"), [(0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (0.0, 0.5)])
def test_gradient(lambda_sce, delta, block):
    settings = {"tau": 0.1, "tau_t": 0.07, "lambda_sce": lambda_sce, "delta": delta}
    values = drawn()
    values["students"].requires_grad_()
    values["teachers"].requires_grad_()
    (3 * losses.loc_sce(**values, **settings, block=block)).backward()
    assert values["teachers"].grad is None
    (expected,) = torch.autograd.grad(3 * dense(**values, **settings), values["students"])
    torch.testing.assert_close(values["students"].grad, expected, atol=1e-12, rtol=1e-10)
    assert torch.autograd.gradcheck(
        lambda s: losses.loc_sce(**values | {"students": s}, **settings, block=block), values["students"]
    )


def test_float32_agrees_with_a_dense_float64():
    """Loss and gradient; embeddings in half precision are compared in float32 too, under autocast or not."""
    values = drawn(images=6, objects=20, width=32)
    exact = values["students"].float().double().requires_grad_()
    teachers = values["teachers"].float().double()
    expected = dense(**values | {"students": exact, "teachers": teachers}, **PAPER)
    expected.backward()
    single = {k: v.float() if v.is_floating_point() else v for k, v in values.items()}
    for autocast in (False, True):
        students = single["students"].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = losses.loc_sce(**single | {"students": students}, **PAPER, block=32)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (students.grad.double() - exact.grad).norm() < 1e-5 * exact.grad.norm()
    half = single["students"].bfloat16().requires_grad_()
    losses.loc_sce(**single | {"students": half}, **PAPER).backward()
    assert half.grad.dtype == torch.bfloat16


def test_the_students_order_does_not_matter_where_the_matching_follows():
    values = drawn()
    order = torch.tensor([3, 0, 4, 1, 2])
    there = values | {"students": values["students"][:, order], "matching": order.argsort()[values["matching"]]}
    torch.testing.assert_close(losses.loc_sce(**there, **PAPER), losses.loc_sce(**values, **PAPER))
    other = losses.loc_sce(**values | {"matching": values["matching"].roll(1, dims=1)}, **PAPER)
    assert abs(other - losses.loc_sce(**values, **PAPER)) > 1e-3


def test_neither_images_nor_the_teachers_objects_have_an_order():
    values = drawn()
    images, objects = torch.tensor([2, 0, 1]), torch.tensor([3, 0, 4, 1, 2])
    mixed = {k: v[images] for k, v in values.items()}
    mixed |= {k: mixed[k][:, objects] for k in ("teachers", "matching", "boxes")}
    torch.testing.assert_close(losses.loc_sce(**mixed, **PAPER), losses.loc_sce(**values, **PAPER))


@pytest.mark.parametrize(("images", "objects"), [(1, 1), (4, 1), (1, 3)])
@pytest.mark.parametrize("lambda_sce", [0.5, 1.0])
def test_one_object_or_one_image(images, objects, lambda_sce):
    values = drawn(images=images, objects=objects)
    values["students"].requires_grad_()
    settings = PAPER | {"lambda_sce": lambda_sce}
    loss = losses.loc_sce(**values, **settings)
    loss.backward()
    assert loss.item() == pytest.approx(plain_loc_sce(**values, **settings), abs=1e-12)
    assert torch.isfinite(values["students"].grad).all()


def test_no_images_no_loss_but_a_graph():
    values = {k: v[:0] for k, v in drawn().items()}
    values["students"].requires_grad_()
    loss = losses.loc_sce(**values, **PAPER)
    loss.backward()
    assert loss.item() == 0


def test_nothing_of_the_matrices_is_kept():
    """Between forward and backward: the gradient of the columns, no more."""
    values = drawn(images=8, objects=16, dtype=torch.float32)
    values["students"].requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        losses.loc_sce(**values, **PAPER, block=16)
    assert max(kept) <= 8 * 16 * 4


def test_two_processes_are_one(tmp_path):
    """Loss and gradient, each process with its own images; theirs may be more than ours."""
    torchrun(
        tmp_path,
        """
import sys
from unittest.mock import patch
import torch, torch.distributed as dist
from headstart import losses
sys.path.insert(0, FOLDER)
from test_losses import PAPER, drawn
dist.init_process_group("gloo")
rank = dist.get_rank()
for cut in (2, 1):
    values = drawn(images=4)
    mine = slice(0, cut) if rank == 0 else slice(cut, 4)
    half = {k: v[mine] for k, v in values.items()}
    half["students"] = half["students"].clone().requires_grad_()
    loss = losses.loc_sce(**half, **PAPER, block=3)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    with patch.object(dist, "is_initialized", lambda: False):
        alone = {**values, "students": values["students"].clone().requires_grad_()}
        expected = losses.loc_sce(**alone, **PAPER)
        expected.backward()
    torch.testing.assert_close(total / 2, expected.detach())
    torch.testing.assert_close(half["students"].grad / 2, alone["students"].grad[mine])
dist.destroy_process_group()
""".replace("FOLDER", repr(str(Path(__file__).parent))),
    )
