"""ProSeCo against plain, slow references written from the paper's text."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from on_a_photo import BOXES, TRANSFORMER, Views, batch

from headstart import detectors
from headstart.errors import SettingsError
from headstart.methods.method import collate_views
from headstart.methods.proseco import Proposals, ProSeCo, ProSeCoSettings, matched_proposals
from headstart.verbs.pretrain import Pretraining
from headstart.views import View
from test_distributed import torchrun
from test_losses import plain_loc_sce

TINY = {**TRANSFORMER, "num_queries": 5}
FAMILIES = {"deformable_detr": {}, "detr": {}}
TWO_STAGE = {"refine": True, "two_stage": True}


def detector(family: str = "deformable_detr", **settings):
    torch.manual_seed(0)
    return detectors.build(detectors.parse_settings({"name": family, **TINY, **FAMILIES[family], **settings}))


def proseco(wrapped, **settings) -> ProSeCo:
    method = ProSeCo(ProSeCoSettings(**{"hidden": 16, "dim": 8, "keep_rate": 0.9, **settings}))
    method.settle(wrapped, total_steps=100)
    return method


# ---- plain references -----------------------------------------------------------------------------------------------


def corners(b):
    return [b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2]


def plain_l1(a, b) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def plain_giou(a, b) -> float:
    """Of two boxes cxcywh."""
    a, b = corners(a), corners(b)
    area = lambda x: max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1])
    common = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    union = area(a) + area(b) - common
    return common / union - (hull - union) / hull


def plain_cosine(a, b) -> float:
    dot = lambda x, y: sum(p * q for p, q in zip(x, y, strict=True))
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def best(cost: list[list[float]]) -> tuple[int, ...]:
    """Every row its own column, at the least sum; of all ways there are."""
    rows = range(len(cost))
    return min(
        itertools.permutations(range(len(cost[0])), len(cost)), key=lambda way: sum(cost[r][way[r]] for r in rows)
    )


def plain_matching(z, b, z_student, b_student, lambda_sim=2.0, lambda_coord=5.0, lambda_giou=2.0) -> list[int]:
    """Eq. 1 and 2 of one image, the similarity taken off the cost."""
    z, b, z_student, b_student = (t.tolist() for t in (z, b, z_student, b_student))
    cost = [
        [
            -lambda_sim * plain_cosine(z[j], z_student[n])
            + lambda_coord * plain_l1(b[j], b_student[n])
            + lambda_giou * (1 - plain_giou(b[j], b_student[n]))
            for n in range(len(z_student))
        ]
        for j in range(len(z))
    ]
    return list(best(cost))


def plain_box_losses(layers, wanted, lambda_coord=5.0, lambda_giou=2.0) -> tuple[float, float]:
    """Eq. 3, 4 and the sums of Eq. 5: of each of the decoder's layers, over all images, a box."""
    l1 = giou = 0.0
    for layer in layers.tolist():
        for predicted, boxes in zip(layer, wanted, strict=True):
            cost = [
                [lambda_coord * plain_l1(b, p) + lambda_giou * (1 - plain_giou(b, p)) for p in predicted] for b in boxes
            ]
            if boxes:
                sigma = best(cost)
                l1 += sum(lambda_coord * plain_l1(b, predicted[n]) for b, n in zip(boxes, sigma, strict=True))
                giou += sum(lambda_giou * (1 - plain_giou(b, predicted[n])) for b, n in zip(boxes, sigma, strict=True))
    count = max(1, sum(len(boxes) for boxes in wanted))
    return l1 / count, giou / count


def in_shares(view) -> list[list[list[float]]]:
    """Of each image, its boxes cxcywh."""
    found = []
    for boxes, ids, (height, width) in zip(view.boxes.tolist(), view.ids.tolist(), view.sizes.tolist(), strict=True):
        own = [b for b, i in zip(boxes, ids, strict=True) if i >= 0]
        found.append(
            [
                [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
                for x1, y1, x2, y2 in own
            ]
        )
    return found


def proposals(seed: int, layers=1, images=2, objects=5, width=6) -> Proposals:
    g = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.normalize(torch.randn(layers, images, objects, width, generator=g), dim=-1)
    centre, size = (torch.rand(layers, images, objects, 2, generator=g) for _ in range(2))
    return Proposals(z, torch.cat([0.4 + 0.2 * centre, 0.2 + 0.4 * size], dim=-1))


# ---- Eq. 1 and 2 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(2.0, 5.0, 2.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_proposals_are_matched_at_the_least_cost_of_all_permutations(weights, seed):
    teacher, student = proposals(seed), proposals(seed + 1)
    sigma = matched_proposals(teacher.z[0], teacher.boxes_cxcywh[0], student.z[0], student.boxes_cxcywh[0], *weights)
    for i in range(2):
        given = teacher.z[0, i], teacher.boxes_cxcywh[0, i], student.z[0, i], student.boxes_cxcywh[0, i]
        assert sigma[i].tolist() == plain_matching(*given, *weights)


def test_each_image_and_each_proposal_finds_itself_in_another_order():
    teacher = proposals(0)
    order = torch.tensor([[3, 0, 4, 1, 2], [1, 2, 0, 4, 3]])
    moved = [torch.stack([values[0, i, order[i]] for i in range(2)]) for values in (teacher.z, teacher.boxes_cxcywh)]
    sigma = matched_proposals(teacher.z[0], teacher.boxes_cxcywh[0], *moved, 2.0, 5.0, 2.0)
    assert torch.equal(sigma, order.argsort(dim=1))


# ---- Eq. 5 to 12 ----------------------------------------------------------------------------------------------------

LOSSES = {
    "LocSCE": ({"loss": "locsce", "delta": 0.5}, {"lambda_sce": 0.5, "delta": 0.5}),
    "SCE": ({"loss": "locsce", "delta": 1.0}, {"lambda_sce": 0.5, "delta": 1.0}),
    "LocNCE": ({"loss": "locnce", "delta": 0.5}, {"lambda_sce": 1.0, "delta": 0.5}),
    "InfoNCE": ({"loss": "locnce", "delta": 1.0}, {"lambda_sce": 1.0, "delta": 1.0}),
}


def plain_contrast(student: Proposals, teacher: Proposals, lambda_sce, delta) -> float:
    """Eq. 10 or 12 of the last layer."""
    z, b, z_student, b_student = (
        values[-1].double() for values in (teacher.z, teacher.boxes_cxcywh, student.z, student.boxes_cxcywh)
    )
    sigma = torch.tensor([plain_matching(z[i], b[i], z_student[i], b_student[i]) for i in range(len(z))])
    boxes = torch.tensor([[corners(box) for box in image] for image in b.tolist()])
    return plain_loc_sce(z_student, z, sigma, boxes, tau=0.1, tau_t=0.07, lambda_sce=lambda_sce, delta=delta)


@pytest.mark.parametrize("name", LOSSES)
def test_contrast_is_that_of_the_matched_proposals(name):
    settings, plain = LOSSES[name]
    method, student, teacher = ProSeCo(ProSeCoSettings(**settings)), proposals(0), proposals(1)
    expected = plain_contrast(student, teacher, **plain)
    assert method.contrast(student, teacher).item() == pytest.approx(2 * expected, rel=1e-5)


def test_contrast_of_all_layers_is_the_sum_of_each():
    student, teacher = proposals(0, layers=3), proposals(1, layers=3)
    method = ProSeCo(ProSeCoSettings(contrast_layers="all"))
    each = [
        method.contrast(*(Proposals(p.z[i : i + 1], p.boxes_cxcywh[i : i + 1]) for p in (student, teacher)))
        for i in range(3)
    ]
    torch.testing.assert_close(method.contrast(student, teacher), torch.stack(each).sum())


def test_the_order_of_the_students_queries_does_not_matter():
    method, student, teacher = ProSeCo(ProSeCoSettings()), proposals(0), proposals(1)
    order = torch.tensor([3, 0, 4, 1, 2])
    other = Proposals(student.z[:, :, order], student.boxes_cxcywh[:, :, order])
    torch.testing.assert_close(method.contrast(other, teacher), method.contrast(student, teacher))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_a_step(family, photo):
    """Both parts of Eq. 5, from what student and teacher find in their own views."""
    wrapped = detector(family, dropout=0.0)
    method = proseco(wrapped, K=3)
    model = Pretraining(method, wrapped).train()
    model.teacher.heads["projector"][2].weight.data.mul_(-1).add_(0.1)  # else both networks are one
    views = batch(method, photo)
    with torch.no_grad():
        terms = model(Views(views))
        found = [
            net.detector.queries(v.images, v.sizes)
            for net, v in zip((model.teacher, model.student), views, strict=True)
        ]
        teacher, student = (
            method.described(net, f) for net, f in zip((model.teacher, model.student), found, strict=True)
        )
    assert terms.keys() == {"contrast", "l1", "giou"}
    assert terms["contrast"].item() == pytest.approx(2 * plain_contrast(student, teacher, 0.5, 0.5), rel=1e-4)
    l1, giou = plain_box_losses(found[1].boxes_cxcywh, in_shares(views[1]))
    assert terms["l1"].item() == pytest.approx(l1, rel=1e-4)
    assert terms["giou"].item() == pytest.approx(giou, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_of_a_step(family, photo):
    wrapped = detector(family, dropout=0.0)
    model = Pretraining(proseco(wrapped, contrast_layers="all"), wrapped).train()
    assert model(Views(batch(model.method, photo)))["contrast"].item() > 0
    assert model._seen[1].z.shape == (2, 2, 5, 8)


def test_weights_of_the_settings(photo):
    wrapped = detector(dropout=0.0)
    views = batch(proseco(wrapped), photo)
    found = []
    for settings in ({}, {"lambda_contrast": 6.0, "lambda_coord": 10.0, "lambda_giou": 4.0}):
        torch.manual_seed(1)
        method = proseco(wrapped, lambda_sim=0.0, **settings)
        found.append(Pretraining(method, wrapped)(Views(views)))
    # Both costs twice as high: the same matchings.
    for name, factor in (("contrast", 3), ("l1", 2), ("giou", 2)):
        torch.testing.assert_close(found[1][name], factor * found[0][name])


def test_the_order_of_boxes_does_not_matter(photo):
    wrapped = detector(dropout=0.0)
    method = proseco(wrapped)
    model = Pretraining(method, wrapped).train()
    views = batch(method, photo)
    expected = model(Views(views))
    order = torch.tensor([4, 2, 0, 1, 3])
    swapped = [replace(v, boxes=v.boxes[:, order], ids=v.ids[:, order]) for v in views]
    assert (views[1].ids >= 0).all(), "all boxes are in view, or the order would move padding"
    for name, term in model(Views(swapped)).items():
        torch.testing.assert_close(term, expected[name])


# ---- what learns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"), [("deformable_detr", {}), ("deformable_detr", TWO_STAGE), ("detr", {})]
)
def test_the_backbone_is_frozen_and_everything_behind_it_learns(family, settings, photo):
    wrapped = detector(family, **settings)
    method = proseco(wrapped)
    before = {k: v.clone() for k, v in wrapped.module.state_dict().items()}
    model = Pretraining(method, wrapped).train()
    terms = model(Views(batch(method, photo)))
    if settings:
        assert terms.keys() >= {"first_class", "first_l1", "first_giou"}
    sum(terms.values()).backward()
    trained = set(method.trained_parts(wrapped))
    assert not trained & {"backbone", "classifier"}
    assert trained >= {"neck", "encoder", "decoder", "regressor"}
    for name, part in wrapped.parts.items():
        for key, parameter in part.named_parameters():
            if name in trained:
                assert parameter.grad is not None, f"{name} {key}"
                assert torch.isfinite(parameter.grad).all(), f"{name} {key}"
            else:
                assert not parameter.requires_grad
                assert parameter.grad is None, f"{name} {key}"
    assert all(p.grad is not None for p in model.student.heads.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.after_step(0, 10)
    frozen = wrapped.part_state(["backbone", "classifier"])
    assert all(torch.equal(before[k], v) for k, v in frozen.items()), "weights, or batch norm statistics, moved"
    assert any(not torch.equal(before[k], v) for k, v in wrapped.part_state(["neck"]).items())


def test_teacher_moves_by_ema_only(photo):
    wrapped = detector()
    method = proseco(wrapped, keep_rate=0.75)
    model = Pretraining(method, wrapped).train()
    students, teachers = (dict(net.named_parameters()) for net in (model.student, model.teacher))
    keys = [next(k for k in students if part in k and students[k].requires_grad) for part in ("projector", "decoder")]
    before = {k: teachers[k].clone() for k in keys}
    sum(model(Views(batch(method, photo))).values()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(before[k], teachers[k]) for k in keys)
    model.after_step(0, 100)
    for k in keys:
        assert not torch.equal(before[k], teachers[k])
        torch.testing.assert_close(teachers[k].data, 0.75 * before[k] + 0.25 * students[k].data)


def test_the_teacher_has_no_dropout(photo):
    wrapped = detector(dropout=0.5)
    method = proseco(wrapped)
    model = Pretraining(method, wrapped).train()
    views = batch(method, photo)
    with torch.no_grad():
        first, second = (method.targets(model.teacher, views) for _ in range(2))
        noisy = [model.student.detector.queries(views[0].images).hidden for _ in range(2)]
    assert torch.equal(first.z, second.z)
    assert not torch.equal(*noisy)


# ---- none, few, and of several sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"), [("deformable_detr", {}), ("deformable_detr", TWO_STAGE), ("detr", {})]
)
@pytest.mark.parametrize("counts", [(0, 0), (0, 3)])
def test_images_without_proposals(family, settings, counts, photo):
    wrapped = detector(family, dropout=0.0, **settings)
    method = proseco(wrapped)
    model = Pretraining(method, wrapped).train()
    samples = [method.views(photo, BOXES[:n], np.random.default_rng(i)) for i, n in enumerate(counts)]
    views = collate_views(samples)
    terms = model(Views(views))
    assert all(torch.isfinite(term) for term in terms.values()), terms
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    with torch.no_grad():
        found = model.student.detector.queries(views[1].images, views[1].sizes)
    assert terms["l1"].item() == pytest.approx(plain_box_losses(found.boxes_cxcywh, in_shares(views[1]))[0], rel=1e-4)
    assert ("found" in model.watch()) == any(counts)


def test_more_boxes_than_queries(photo):
    wrapped = detector(num_queries=2)
    method = proseco(wrapped)
    terms = Pretraining(method, wrapped)(Views(batch(method, photo)))
    assert all(torch.isfinite(term) for term in terms.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_single(family, photo):
    """Two images of different sizes, padded together: each one's proposals are those it gets alone."""
    wrapped = detector(family)
    method = proseco(wrapped)
    model = Pretraining(method, wrapped).train()
    a = View(photo[:48, :64], BOXES[:1], np.array([0]))
    b = View(photo[:60, :80], BOXES[1:4], np.array([1, 2, 3]))
    with torch.no_grad():
        both = method.targets(model.teacher, collate_views([[a], [b]], 32))
        for index, view in enumerate((a, b)):
            # As much padding as together: what a padded convolution sees at an image's edge is no concern here.
            alone = collate_views([[view], [b]], 32)
            alone = [replace(v, **{k: t[:1] for k, t in vars(v).items()}) for v in alone]
            single = method.targets(model.teacher, alone)
            torch.testing.assert_close(both.z[:, index], single.z[:, 0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(both.boxes_cxcywh[:, index], single.boxes_cxcywh[:, 0], atol=1e-5, rtol=1e-4)


def test_two_processes_are_one(tmp_path):
    """Every gradient, where the processes' images have different numbers of boxes."""
    torchrun(
        tmp_path,
        """
import numpy as np, torch, torch.distributed as dist
from dataclasses import replace
from torch.nn.parallel import DistributedDataParallel
from unittest.mock import patch
from headstart import detectors
from headstart.methods.method import collate_views
from headstart.methods.proseco import ProSeCo, ProSeCoSettings
from headstart.verbs.pretrain import Pretraining

class Batch:
    def __init__(self, views):
        self.views = views

def build():
    torch.manual_seed(0)
    detector = detectors.build(detectors.parse_settings(SETTINGS))
    method = ProSeCo(ProSeCoSettings(hidden=16, dim=8, delta=0.2))
    method.settle(detector, 10)
    return Pretraining(method, detector).train()

dist.init_process_group("gloo")
rank = dist.get_rank()
shared, alone = build(), build()
boxes = np.array([[4, 4, 40, 36], [20, 10, 60, 55], [0, 0, 64, 60], [30, 30, 60, 58]], np.float32)
photos = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(4)]
views = collate_views([alone.method.views(p, boxes[i:], np.random.default_rng(i)) for i, p in enumerate(photos)])
with patch.object(dist, "is_initialized", lambda: False):
    expected_terms = alone(Batch(views))
    sum(expected_terms.values()).backward()
mine = slice(2 * rank, 2 * rank + 2)
wrapped = DistributedDataParallel(shared)
half = Batch([replace(v, **{k: t[mine] for k, t in vars(v).items()}) for v in views])
terms = wrapped(half)
sum(terms.values()).backward()
for name, term in terms.items():
    total = term.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / 2, expected_terms[name].detach(), rtol=1e-4, atol=1e-5)
expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
largest = max(float(grad.norm()) for grad in expected.values())
compared = 0
for name, parameter in shared.named_parameters():
    if name in expected and float(expected[name].norm()) > 1e-4 * largest:
        error = float((parameter.grad - expected[name]).norm() / expected[name].norm())
        assert error < 1e-3, (name, error)
        compared += 1
assert compared > 30, compared
dist.destroy_process_group()
""".replace("SETTINGS", repr({"name": "deformable_detr", **TINY})),
    )


# ---- views: Table 4 -------------------------------------------------------------------------------------------------


def test_both_views_share_their_geometry_and_not_their_colours(photo):
    method = proseco(detector(), short_side_px=64)
    sizes, mirrored, different = set(), 0, 0
    for seed in range(30):
        weak, strong = method.views(photo, BOXES, np.random.default_rng(seed))
        assert weak.size == strong.size
        assert np.array_equal(weak.boxes, strong.boxes)
        assert np.array_equal(weak.ids, strong.ids)
        assert (weak.boxes[:, :2] < weak.boxes[:, 2:]).all()
        assert min(weak.size) <= 64
        sizes.add(weak.size)
        different += not np.array_equal(weak.image, strong.image)
        x = weak.boxes[list(weak.ids).index(0), 0] if 0 in weak.ids else None
        mirrored += x is not None and x > 0.3 * weak.size[1]
    assert len(sizes) > 15
    assert 15 < different <= 30
    assert 3 < mirrored < 27


@pytest.mark.parametrize(("scale", "low", "high", "long"), [("large", 480, 800, 1333), ("mid", 320, 480, 600)])
def test_sizes_are_those_of_table_4(scale, low, high, long):
    """At the paper's own size: one of the range, but where the longest side is reached first."""
    method = proseco(detector(), short_side_px=800, view_scale=scale)
    step = {"large": 32, "mid": 16}[scale]
    photo = np.zeros((240, 320, 3), np.uint8)
    for seed in range(20):
        height, width = method.views(photo, BOXES, np.random.default_rng(seed))[0].size
        assert max(height, width) <= long
        short = min(height, width)
        assert max(height, width) == long or (low <= short <= high and (short - low) % step == 0)
    assert method.decode_px == high


def test_smaller_detectors_get_smaller_views_in_proportion():
    method = proseco(detector())
    assert method.settings.short_side_px == 64
    assert [method.px(length) for length in (480, 800, 384, 1333)] == [38, 64, 31, 107]
    assert method.decode_px == 64


def test_k_boxes_of_those_in_view(photo):
    method = proseco(detector(), K=3)
    chosen = set()
    for seed in range(20):
        weak, _ = method.views(photo, BOXES, np.random.default_rng(seed))
        assert len(weak.ids) <= 3
        chosen |= set(weak.ids.tolist())
    assert chosen == {0, 1, 2, 3, 4}


def test_strong_colours_of_table_4():
    colours = ProSeCo(ProSeCoSettings()).photometric
    assert (colours.brightness, colours.contrast, colours.saturation, colours.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (colours.jitter_prob, colours.grey_prob, colours.blur_prob, colours.solarise_prob) == (0.8, 0.2, 0.5, 0.0)
    assert colours.blur_sigma == (0.1, 2.0)


# ---- health and settings --------------------------------------------------------------------------------------------


def test_a_collapse_is_seen(photo):
    wrapped = detector()
    method = proseco(wrapped)
    views = batch(method, photo)
    spread = proposals(0, images=2, width=64)
    watched = method.watch(views, spread)
    assert 0.7 < watched["embedding_std"] < 1.1
    assert method.warnings(watched) is None
    watched = method.watch(views, Proposals(spread.z[:, :1, :1].expand_as(spread.z), spread.boxes_cxcywh))
    assert watched["embedding_std"] == 0
    assert "collapsed" in method.warnings(watched)


def test_what_is_watched(photo):
    method = proseco(detector())
    views = batch(method, photo)
    wanted = [image[:5] for image in in_shares(views[0])]
    z = proposals(0).z
    assert method.watch(views, Proposals(z, torch.tensor([wanted])))["found"] == 1
    far = torch.full((1, 2, 5, 4), 0.01)
    assert method.watch(views, Proposals(z, far))["found"] == 0
    assert method.watch(views, Proposals(z, far))["positives"] == 4
    assert proseco(detector(), delta=1.0).watch(views, Proposals(z, far))["positives"] == 0


def test_numbers_of_the_paper():
    s = ProSeCoSettings()
    assert (s.lambda_sim, s.lambda_contrast, s.lambda_coord, s.lambda_giou) == (2, 2, 5, 2)
    assert (s.tau, s.tau_t, s.lambda_sce, s.delta, s.K, s.hidden, s.dim) == (0.1, 0.07, 0.5, 0.5, 30, 4096, 256)
    wrapped = detector()
    method = ProSeCo(s)
    method.settle(wrapped, 187_000)
    assert method.momentum(0, 187_000) == method.momentum(186_999, 187_000) == pytest.approx(0.999)
    assert ProSeCo.epochs == 10
    assert ProSeCo.detector == "deformable_detr"
    advised = method.optimizer(wrapped, 64)
    assert (advised.optimizer, advised.base_lr, advised.base_batch) == ("adamw", 2e-4, 64)
    assert advised.lr_scale == {"sampling_offsets": 0.1, "reference_points": 0.1}
    assert method.optimizer(wrapped, 8).base_batch == 8
    assert (advised.weight_decay, advised.clip, advised.schedule) == (1e-4, 0.1, "constant")
    projector = method.heads(wrapped)["projector"]
    assert [tuple(p.shape) for p in projector.parameters()] == [(4096, 16), (4096,), (256, 4096), (256,)]


def test_short_runs_get_a_faster_teacher():
    for steps, expected in ((100, 0.9), (500, 0.98), (20_000, 0.999)):
        method = ProSeCo(ProSeCoSettings())
        (note,) = method.settle(detector(), steps)
        assert method.momentum(0, steps) == pytest.approx(expected)
        assert "keep_rate" in note


def test_exported_is_all_but_the_class_layer():
    method = ProSeCo(ProSeCoSettings())
    for family, settings in (("deformable_detr", {}), ("deformable_detr", TWO_STAGE), ("detr", {})):
        wrapped = detector(family, **settings)
        assert set(method.exported_parts(wrapped)) == set(wrapped.parts) - {"classifier"}


def test_a_random_backbone_is_refused(tmp_path, scenes):
    import headstart

    with pytest.raises(SettingsError, match=r"proseco freezes the backbone.*--start"):
        headstart.pretrain(None, scenes / "unlabelled", "proseco", backbone="resnet18", out=tmp_path / "x", show=False)


def test_a_detector_without_queries_is_refused():
    class Odd:
        family = "odd"
        abilities = frozenset()

    with pytest.raises(SettingsError, match="proseco trains on what a detector's queries answer"):
        ProSeCo.check(Odd())
