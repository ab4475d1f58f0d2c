"""SoCo against plain, slow references written from the paper's text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from on_a_photo import BOXES, Views, batch
from torchvision.ops import roi_align

from headstart import detectors
from headstart.detectors.rcnn import RCNNSettings, fpn_levels
from headstart.errors import SettingsError
from headstart.methods.method import Net, collate_views
from headstart.methods.soco import SoCo, SoCoSettings, contrast
from headstart.verbs.pretrain import Pretraining


def soco(**settings) -> SoCo:
    method = SoCo(SoCoSettings(**{"view_px": 64, "hidden": 32, "dim": 16, "tau": 0.9, **settings}))
    method.settle(detector(), total_steps=100)
    return method


def detector(**settings):
    torch.manual_seed(0)
    base = {"backbone": "resnet18", "fpn_channels": 8, "head_width": 16}
    return detectors.build(RCNNSettings(**{**base, **settings}))


# ---- Eq. 5 and 6 ------------------------------------------------------------------------------------------------


def loss_by_the_book(v: list[torch.Tensor], t: list[torch.Tensor], images: int, K: int) -> float:
    """Eq. 5-6 with loops: online view 1 against targets of the others, and the mirror image."""
    total = 0.0
    for b in range(images):
        for i in range(K):
            row = b * K + i
            for j in range(1, len(v)):
                for online, target in ((v[0], t[j]), (v[j], t[0])):
                    x, y = online[row].tolist(), target[row].tolist()
                    dot = sum(p * q for p, q in zip(x, y, strict=True))
                    norm = math.sqrt(sum(p * p for p in x)) * math.sqrt(sum(q * q for q in y))
                    total += -2 * dot / norm / K
    return total / images


@pytest.mark.parametrize("options", [{}, {"star": True}, {"v3": "none"}, {"K": 1}, {"K": 8}])
def test_loss_equals_the_equations(photo, options):
    method = soco(**options)
    views = batch(method, photo)
    model = Pretraining(method, detector())
    targets = method.targets(model.teacher, views)
    with torch.no_grad():
        model.student.train()
        v = [model.student.heads["q"](method.describe(model.student, view)) for view in views]
        loss = sum(contrast(v[0], targets[j]) + contrast(v[j], targets[0]) for j in range(1, len(views)))
        terms = method.loss(model.student, views, targets)
    expected = loss_by_the_book(v, targets, images=2, K=method.settings.K)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert float(terms["align"]) == pytest.approx(expected, abs=1e-4)
    assert len(views) == {"star": 4, "v3": 2}.get(next(iter(options), ""), 3)


def test_loss_does_not_change_when_images_swap_places(photo):
    """The mean over boxes knows no order; batch norm sees the same set."""
    method = soco()
    first, second = (method.views(photo, BOXES, np.random.default_rng(i)) for i in (1, 2))
    model = Pretraining(method, detector())
    losses = []
    for order in ([first, second], [second, first]):
        views = collate_views(order)
        targets = method.targets(model.teacher, views)
        losses.append(float(method.loss(model.student, views, targets)["align"].detach()))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_loss_is_symmetric_in_the_two_views(photo):
    """With two views and equal networks, feeding (V1, V2) or (V2, V1) is the same loss."""
    method = soco(v3="none")
    views = batch(method, photo)
    model = Pretraining(method, detector())
    there = method.loss(model.student, views, method.targets(model.teacher, views))["align"]
    back = views[::-1]
    again = method.loss(model.student, back, method.targets(model.teacher, back))["align"]
    assert there.item() == pytest.approx(again.item(), abs=1e-5)


def test_perfect_agreement_is_minus_two_a_term():
    v = torch.randn(6, 16)
    assert float(contrast(v, 3 * v)) == pytest.approx(-2, abs=1e-6)
    assert float(contrast(v, -v)) == pytest.approx(2, abs=1e-6)


# ---- Eq. 1: pooling and levels ------------------------------------------------------------------------------------


def level_by_the_book(side: float) -> int:
    if side <= 48:
        return 0
    if side <= 96:
        return 1
    return 2 if side <= 192 else 3


def test_scale_aware_assignment():
    sides = torch.tensor([1.0, 47.9, 48.0, 48.1, 96.0, 96.1, 192.0, 192.1, 224.0])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], dim=1)
    paper = SoCo(SoCoSettings())
    paper.settle(detector(), 100)
    expected = [level_by_the_book(float(s)) for s in sides]
    assert paper.levels(boxes).tolist() == expected
    small = SoCo(SoCoSettings(view_px=112))
    small.settle(detector(), 100)
    assert small.levels(boxes / 2).tolist() == expected


def test_without_scale_aware_assignment_fpn_decides():
    assert SoCo(SoCoSettings(scale_aware=False)).levels(torch.zeros(1, 4)) is None
    boxes = torch.tensor([[0, 0, 60, 60], [0, 0, 112, 112], [0, 0, 224, 224], [0, 0, 448, 448], [0, 0, 1, 1]])
    assert fpn_levels(boxes.float()).tolist() == [0, 1, 2, 3, 0]


def test_boxes_are_pooled_from_their_own_level(photo):
    """``embed`` against RoIAlign of one box at a time."""
    wrapped = detector().eval()
    method = soco(level_px=(20, 30, 40), jitter="none")
    view = batch(method, photo)[0]
    with torch.no_grad():
        features = wrapped.features(view.images)
        levels = method.levels(view.boxes)
        together = wrapped.embed(features, view.boxes, view.size, levels)
        maps, row = list(features.values()), 0
        for b in range(view.boxes.shape[0]):
            for k in range(view.boxes.shape[1]):
                level = int(levels[b, k])
                pooled = roi_align(
                    maps[level][b : b + 1], [view.boxes[b, k][None]], 7, 1 / (4 * 2**level), 2, aligned=True
                )
                alone = wrapped.module.roi_heads.box_head(pooled)
                torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)
                row += 1
    assert len(set(levels.reshape(-1).tolist())) > 1  # more than one level was at work


def test_one_box_alone_equals_its_row_in_a_batch(photo):
    wrapped = detector().eval()
    view = batch(soco(), photo)[0]
    with torch.no_grad():
        features = wrapped.features(view.images)
        together = wrapped.embed(features, view.boxes, view.size)
        single = {name: map_[1:] for name, map_ in features.items()}
        alone = wrapped.embed(single, view.boxes[1:, 2:3], view.size)
    torch.testing.assert_close(together[4 + 2], alone[0], atol=1e-5, rtol=1e-4)


def test_no_boxes_at_all():
    wrapped = detector().eval()
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert wrapped.embed(wrapped.features(images), torch.zeros(2, 0, 4), (64, 64)).shape == (0, 16)


# ---- section 3.2: views -------------------------------------------------------------------------------------------


def test_views_have_the_sizes_of_the_paper(photo):
    method = SoCo(SoCoSettings(star=True))
    method.settle(detector(), 1000)
    views = method.views(photo, BOXES, np.random.default_rng(0))
    assert [view.image.shape[0] for view in views] == [224, 224, 112, 192]
    assert all(view.boxes.shape == (4, 4) for view in views)


def test_equal_row_is_the_same_object(photo):
    for seed in range(20):
        views = soco(star=True, K=3).views(photo, BOXES, np.random.default_rng(seed))
        for view in views:
            assert view.ids.tolist() == views[0].ids.tolist()
            height, width = view.size
            assert (view.boxes[:, :2] >= 0).all()
            assert (view.boxes[:, 2] <= width).all()
            assert (view.boxes[:, 3] <= height).all()


def test_v3_is_v2_downsampled(photo):
    """Boxes of V3 are V2's, scaled, up to the flips: compare their sides and distance to the nearer edge."""
    for seed in range(10):
        _, v2, v3 = soco().views(photo, BOXES, np.random.default_rng(seed))
        np.testing.assert_allclose(v3.boxes[:, [1, 3]] * 2, v2.boxes[:, [1, 3]], atol=1e-3)
        mirrored = 64 - 2 * v3.boxes[:, [2, 0]]
        same = np.allclose(v3.boxes[:, [0, 2]] * 2, v2.boxes[:, [0, 2]], atol=1e-3)
        assert same or np.allclose(mirrored, v2.boxes[:, [0, 2]], atol=1e-3)


def test_fewer_boxes_than_K_are_repeated(photo):
    views = soco(K=4).views(photo, BOXES[:2], np.random.default_rng(0))
    assert set(views[0].ids.tolist()) <= {0, 1}
    assert len(views[0].ids) == 4


def test_no_box_at_all_means_the_whole_view(photo):
    views = soco(jitter="none").views(photo, np.zeros((0, 4), np.float32), np.random.default_rng(0))
    for view in views:
        height, width = view.size
        assert view.boxes.tolist() == [[0, 0, width, height]] * 4


def test_a_box_no_crop_ever_shows_falls_back_to_the_whole_view(photo):
    """A sliver at the edge is outside of every crop that is smaller than the view."""
    corner = np.array([[0, 0, 0.6, 0.6]], np.float32)  # below one pixel in every view
    views = soco(jitter="none").views(photo, corner, np.random.default_rng(0))
    assert views[1].boxes[0].tolist() == [0, 0, 64, 64]


def test_only_v1_is_jittered_by_default(photo):
    plain = soco(jitter="none")
    jittered = soco(jitter_prob=1.0)
    whole = np.array([[8, 6, 72, 54]], np.float32)
    differs = []
    for seed in range(30):
        a = plain.views(photo, whole, np.random.default_rng(seed))
        b = jittered.views(photo, whole, np.random.default_rng(seed))
        sides = [np.ptp(x[0].boxes[0][[0, 2]]) for x in (a, b)]
        differs.append(abs(sides[0] - sides[1]) > 0.1)
    assert np.mean(differs) > 0.8
    every = soco(jitter="all", jitter_prob=1.0)
    v2 = [every.views(photo, whole, np.random.default_rng(s))[1].boxes for s in range(5)]
    assert not np.allclose(v2[0], v2[1])


def test_same_seed_same_views(photo):
    a, b = (soco().views(photo, BOXES, np.random.default_rng([7, 3])) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.image, y.image)
        np.testing.assert_array_equal(x.boxes, y.boxes)


# ---- Tables 4 and 5: switches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "width", "parts"),
    [
        ({"instances": "whole_image", "fpn": False, "head": False}, 512, ["backbone"]),
        ({"fpn": False, "head": False}, 512, ["backbone"]),
        ({"head": False}, 8, ["backbone", "neck"]),
        ({"scale_aware": False}, 16, ["backbone", "neck", "head"]),
        ({"instances": "random"}, 16, ["backbone", "neck", "head"]),
        ({"v3": "independent_crop"}, 16, ["backbone", "neck", "head"]),
    ],
)
def test_ablation_rows_train_what_they_say(photo, options, width, parts):
    method = soco(**options)
    wrapped = detector()
    model = Pretraining(method, wrapped)
    assert method.trained_parts(wrapped) == parts
    assert model.student.heads["g"][0].in_features == width
    views = batch(method, photo)
    assert views[0].boxes.shape[1] == (1 if options.get("instances") == "whole_image" else 4)
    sum(model(Views(views)).values()).backward()
    for name, part in wrapped.parts.items():
        grads = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in part.parameters()]
        assert any(grads) == (name in parts), name


def test_c4_has_no_third_view_and_pools_from_c4(photo):
    wrapped = detector(neck="c4")
    method = SoCo(SoCoSettings(view_px=64, hidden=32, dim=16))
    notes = method.settle(wrapped, 100)
    assert method.settings.v3 == "none"
    assert any("v3" in note for note in notes)
    model = Pretraining(method, wrapped)
    assert method.trained_parts(wrapped) == ["backbone", "head"]
    assert model.student.heads["g"][0].in_features == 512
    terms = model(Views(batch(method, photo)))
    assert torch.isfinite(terms["align"])


def test_an_fpn_without_batch_norm_is_pointed_out():
    for head, said in (("2fc", True), ("4conv1fc", False)):
        notes = SoCo(SoCoSettings()).settle(detector(head=head), 100)
        assert any("fpn_norm=bn" in note for note in notes) == said


def test_a_detector_without_a_box_head_is_refused():
    class Odd:
        family = "odd"
        abilities = frozenset({"match"})

    with pytest.raises(SettingsError, match="soco trains a box head on pooled boxes, which a odd does not have"):
        SoCo.check(Odd())


# ---- student and teacher --------------------------------------------------------------------------------------------


def test_one_step_moves_the_student_by_gradient_and_the_teacher_by_ema_only(photo):
    method = soco()
    model = Pretraining(method, detector())
    before = {k: v.clone() for k, v in model.teacher.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(model(Views(batch(method, photo))).values()).backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    optimizer.step()
    student = dict(model.student.named_parameters())
    for name, value in model.teacher.named_parameters():
        torch.testing.assert_close(value, before[name])
    model.after_step(0, 100)
    tau = method.momentum(0, 100)
    assert tau == pytest.approx(0.9)
    moved = 0
    for name, value in model.teacher.named_parameters():
        if student[name].requires_grad:
            torch.testing.assert_close(value, tau * before[name] + (1 - tau) * student[name], atol=1e-6, rtol=1e-5)
            moved += int(not torch.equal(value, before[name]))
        else:
            torch.testing.assert_close(value, before[name])
    assert moved > 10
    assert "q" not in model.teacher.heads


def test_momentum_ends_at_one():
    method = SoCo(SoCoSettings(tau=0.99))
    values = [method.momentum(step, 50) for step in range(51)]
    expected = [1 - 0.01 * (math.cos(math.pi * k / 50) + 1) / 2 for k in range(51)]
    assert values == pytest.approx(expected)
    assert values[0] == pytest.approx(0.99)
    assert values[-1] == pytest.approx(1)


def test_collapse_is_noticed(photo):
    method = soco()
    views = batch(method, photo)
    even = method.watch(views, [torch.randn(256, 64)])
    gone = method.watch(views, [torch.ones(256, 64) + 1e-4 * torch.randn(256, 64)])
    assert even["embedding_std"] == pytest.approx(1, abs=0.1)
    assert gone["embedding_std"] < 0.01
    assert method.warnings(even) is None
    assert "tau" in method.warnings(gone)
    assert sum(even["level_share"]) == pytest.approx(1, abs=0.01)


def test_heads_are_two_layer_mlps_of_the_paper():
    method = SoCo(SoCoSettings())
    heads = method.heads(detector(fpn_channels=8, head_width=32))
    shapes = {k: [tuple(p.shape) for p in m.parameters() if p.ndim == 2] for k, m in heads.items()}
    assert shapes == {"g": [(4096, 32), (256, 4096)], "q": [(4096, 256), (256, 4096)]}
    assert isinstance(Net(detector(), heads).heads["g"][1], torch.nn.BatchNorm1d)
