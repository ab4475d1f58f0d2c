"""AlignDet against plain, slow references written from the paper's text."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from on_a_photo import BOXES, Views, assert_finite_and_all_learn, batch

from headstart import detectors
from headstart.errors import SettingsError
from headstart.methods.aligndet import AlignDet, AlignDetSettings, info_nce, numbers
from headstart.methods.method import collate_views
from headstart.verbs.pretrain import Pretraining
from headstart.views import View

COMMON = {"backbone": "resnet18", "fpn_channels": 8, "short_side_px": 64, "long_side_px": 96}
FAMILIES = {
    "faster_rcnn": {"head_width": 16, "anchor_px": [8, 16, 32, 64, 96], "proposals_train": 32},
    "cascade_rcnn": {"head_width": 16, "anchor_px": [8, 16, 32, 64, 96], "proposals_train": 32},
    "retinanet": {},
    "fcos": {},
}


def detector(family: str = "faster_rcnn"):
    torch.manual_seed(0)
    return detectors.build(detectors.parse_settings({"name": family, **COMMON, **FAMILIES[family]}))


def queries(family: str, **changes):
    small = {
        **{"backbone": "test_resnet", "num_queries": 8, "width": 32, "heads": 4, "encoder_layers": 1},
        **{"decoder_layers": 2, "feedforward": 24, "short_side_px": 64, "long_side_px": 96, "dropout": 0.0},
    }
    torch.manual_seed(0)
    return detectors.build(detectors.parse_settings({"name": family, **small, **changes}))


def aligndet(wrapped, **settings) -> AlignDet:
    method = AlignDet(AlignDetSettings(**{"hidden": 16, "dim": 12, "tau": 0.996, **settings}))
    method.settle(wrapped, total_steps=100)
    return method


# ---- loss_con -------------------------------------------------------------------------------------------------------


def plain_info_nce(z1, z2, p1, p2, T):
    """-log of a pair's share among itself and all predictions of both views that answer for other proposals."""
    z1, z2, p1, p2 = z1.tolist(), z2.tolist(), p1.tolist(), p2.tolist()
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))
    by_proposal: dict[int, list[float]] = {}
    for i, a in enumerate(z1):
        negatives = sum(math.exp(dot(a, z1[k]) / T) for k in range(len(z1)) if p1[k] != p1[i])
        negatives += sum(math.exp(dot(a, z2[k]) / T) for k in range(len(z2)) if p2[k] != p1[i])
        for j, b in enumerate(z2):
            if p2[j] == p1[i]:
                pair = math.exp(dot(a, b) / T)
                by_proposal.setdefault(p1[i], []).append(-math.log(pair / (pair + negatives)))
    means = [sum(pairs) / len(pairs) for pairs in by_proposal.values()]
    return sum(means) / len(means) if means else 0.0


def drawn(m1, m2, proposals, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = [torch.nn.functional.normalize(torch.randn(m, 6, generator=g, dtype=torch.float64), dim=1) for m in (m1, m2)]
    p = [torch.randint(0, proposals, (m,), generator=g) for m in (m1, m2)]
    return (*z, *p)


@pytest.mark.parametrize(("m1", "m2", "proposals"), [(7, 9, 4), (20, 5, 3), (6, 6, 50), (1, 1, 1), (12, 12, 1)])
@pytest.mark.parametrize("T", [0.5, 0.07])
def test_contrast_is_info_nce_over_the_pairs_of_each_proposal(m1, m2, proposals, T):
    z1, z2, p1, p2 = drawn(m1, m2, proposals)
    assert info_nce(z1, z2, p1, p2, T).item() == pytest.approx(plain_info_nce(z1, z2, p1, p2, T), abs=1e-9)


def test_more_than_256_proposals_in_a_batch():
    """The released code's labels are limited by the width of the embedding."""
    z1, z2, _, _ = drawn(400, 400, 2)
    p = torch.arange(400)
    assert info_nce(z1, z2, p, p, 0.5).item() == pytest.approx(plain_info_nce(z1, z2, p, p, 0.5), abs=1e-9)


def test_no_predictions_no_loss_but_a_graph():
    z = torch.zeros(0, 6, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = info_nce(z, torch.zeros(0, 6), none, none, 0.5)
    loss.backward()
    assert loss.item() == 0
    z1, z2, p1, _ = drawn(3, 4, 2)
    z1.requires_grad_()
    loss = info_nce(z1, z2, p1, torch.full((4,), 99), 0.5)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(z1.grad).all()


def test_order_of_predictions_does_not_matter():
    z1, z2, p1, p2 = drawn(10, 12, 4)
    a, b = torch.randperm(10), torch.randperm(12)
    torch.testing.assert_close(info_nce(z1, z2, p1, p2, 0.5), info_nce(z1[a], z2[b], p1[a], p2[b], 0.5))


# ---- the whole step, on every family that can match -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_contrast_and_the_detectors_own(family, photo):
    wrapped = detector(family)
    method = aligndet(wrapped)
    model = Pretraining(method, wrapped).train()
    views = batch(method, photo)
    terms = model(Views(views))
    assert "contrast" in terms
    assert len(terms) > 1
    _, targets = model._seen
    torch.manual_seed(0)
    with torch.no_grad():
        online = method.predict(model.student, views[0], losses=True)
    z = [torch.nn.functional.normalize(m.embeddings, dim=1) for m in (online, targets)]
    p = numbers(online, views[0]), numbers(targets, views[1])
    assert len(online.box) > 0
    assert terms["contrast"].item() == pytest.approx(plain_info_nce(*z, *p, 0.5), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_is_frozen_and_everything_behind_it_learns(family, photo):
    wrapped = detector(family)
    method = aligndet(wrapped)
    before = {k: v.clone() for k, v in wrapped.module.state_dict().items()}
    model = Pretraining(method, wrapped).train()
    sum(model(Views(batch(method, photo))).values()).backward()
    trained = set(method.trained_parts(wrapped))
    assert "backbone" not in trained
    assert "classifier" not in trained
    for name, part in wrapped.parts.items():
        for key, parameter in part.named_parameters():
            if name in trained:
                assert parameter.grad is not None, f"{name} {key}"
            else:
                assert not parameter.requires_grad
                assert parameter.grad is None, f"{name} {key}"
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.after_step(0, 10)
    backbone = wrapped.part_state(["backbone"])
    assert all(torch.equal(before[k], v) for k, v in backbone.items()), "weights, or batch norm statistics, moved"
    assert any(not torch.equal(before[k], v) for k, v in wrapped.part_state(["neck"]).items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (1, 0)])
def test_images_without_proposals(family, counts, photo):
    """In one image, or in all: finite losses, and a gradient for every parameter that learns."""
    wrapped = detector(family)
    method = aligndet(wrapped)
    model = Pretraining(method, wrapped).train()
    samples = [method.views(photo, BOXES[:n], np.random.default_rng(i)) for i, n in enumerate(counts)]
    assert_finite_and_all_learn(model, collate_views(samples, 32))
    assert math.isfinite(model.watch()["matched"])


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_single(family, photo):
    """Two images of different sizes, padded together: each one's predictions are those it gets alone."""
    wrapped = detector(family).eval()
    method = aligndet(wrapped, most=100_000)
    net = Pretraining(method, wrapped).eval().student
    a = View(photo[:48, :64], BOXES[:1], np.array([0]))
    b = View(photo[:60, :80], BOXES[1:4], np.array([1, 2, 3]))

    def pad(view):  # to multiples of 32, as a batch is
        image = np.zeros((64, 96, 3), np.uint8)
        image[: view.size[0], : view.size[1]] = view.image
        return image

    together = collate_views([[a], [b]], 32)[0]
    with torch.no_grad():
        both = method.predict(net, together, losses=False)
        for index, view in enumerate((a, b)):
            alone_view = collate_views([[view], [view]])[0]
            alone_view.images = torch.from_numpy(np.stack([pad(view)] * 2)).permute(0, 3, 1, 2)
            assert together.images.shape == alone_view.images.shape
            alone = method.predict(net, alone_view, losses=False)
            mine, first = both.image == index, alone.image == 0
            assert mine.any()
            assert torch.equal(both.box[mine], alone.box[first])
            torch.testing.assert_close(both.embeddings[mine], alone.embeddings[first], atol=1e-4, rtol=1e-4)


QUERY_KINDS = [("detr", {}), ("deformable_detr", {}), ("deformable_detr", {"refine": True, "two_stage": True})]


@pytest.mark.parametrize(("family", "changes"), QUERY_KINDS)
@pytest.mark.parametrize("clusters", [0, 4])
@pytest.mark.parametrize("counts", [(5, 3), (0, 2), (0, 0)])
def test_two_steps_with_queries(family, changes, clusters, counts, photo):
    """Contrast, the boxes' losses and, with pseudo classes, theirs; a gradient for all that learns, and for no more."""
    wrapped = queries(family, **changes)
    method = aligndet(wrapped, clusters=clusters)
    model = Pretraining(method, wrapped).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    backbone = {k: v.clone() for k, v in wrapped.part_state(["backbone"]).items()}
    for step in range(2):
        samples = [method.views(photo, BOXES[:n], np.random.default_rng(i)) for i, n in enumerate(counts)]
        for views in samples:
            for view in views:
                view.labels = view.ids % 4 + 1
        terms = model(Views(collate_views(samples, 32)))
        assert ("class" in terms) == bool(clusters)
        assert {"contrast", "l1", "giou"} <= set(terms)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
        optimizer.step()
        model.after_step(step, 2)
    assert all(torch.equal(backbone[k], v) for k, v in wrapped.part_state(["backbone"]).items())


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_assignment_with_labels_is_the_cheapest_of_all(family):
    """Class, L1 and GIoU costs written out, and every assignment tried; and the class loss written out."""
    wrapped = queries(family, num_queries=6).eval()
    torch.manual_seed(3)
    projector = wrapped.projector(8, 4, classes=5)
    with torch.no_grad():
        for parameter in projector.classes.parameters():
            parameter.normal_()
    images, sizes = torch.rand(1, 3, 64, 96), torch.tensor([[60, 90]])
    boxes = torch.tensor([[4.0, 3, 40, 50], [30, 10, 90, 60], [8, 8, 20, 24]])
    targets = [{"boxes": boxes, "labels": torch.tensor([5, 1, 5])}]
    with torch.no_grad():
        matched = wrapped.match(images, sizes, targets, projector, most=100)
        answers = wrapped.queries(images, sizes)
        logits = projector.classes(answers.hidden)[:, 0].double()
    shares = boxes / torch.tensor([90.0, 60, 90, 60])
    weight = 1.0 if family == "detr" else 2.0  # of the class, in cost and loss
    expected_class = 0.0
    for layer in range(len(logits)):
        cxcywh = answers.boxes_cxcywh[layer, 0]
        p = logits[layer].softmax(-1) if family == "detr" else logits[layer].sigmoid()

        def cost(query, k, cxcywh=cxcywh, p=p):
            cx, cy, w, h = cxcywh[query].tolist()
            a, b = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], shares[k].tolist()
            l1 = sum(abs(x - y) for x, y in zip(
                [cx, cy, w, h], [(b[0] + b[2]) / 2, (b[1] + b[3]) / 2, b[2] - b[0], b[3] - b[1]], strict=True
            ))  # fmt: skip
            common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            union = w * h + (b[2] - b[0]) * (b[3] - b[1]) - common
            hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
            overlap = common / union - (hull - union) / hull
            named = float(p[query, targets[0]["labels"][k] - 1])
            if family == "detr":
                naming = -named
            else:
                naming = -0.25 * (1 - named) ** 2 * math.log(named) + 0.75 * named**2 * math.log(1 - named)
            return weight * naming + 5 * l1 + 2 * (1 - overlap)

        costs = [[cost(q, k) for k in range(3)] for q in range(6)]
        best = min(itertools.permutations(range(6), 3), key=lambda qs: sum(costs[q][k] for k, q in enumerate(qs)))
        wanted = {q: int(targets[0]["labels"][k]) - 1 for k, q in enumerate(best)}
        if family == "detr":  # weighted mean of cross entropies; "no object" counts a tenth
            each = [(1.0 if q in wanted else 0.1, -math.log(p[q, wanted.get(q, 5)])) for q in range(6)]
            expected_class += sum(w * e for w, e in each) / sum(w for w, _ in each)
        else:
            for q in range(6):
                for c in range(5):
                    x = float(p[q, c])
                    hit = wanted.get(q) == c
                    focal = -0.25 * (1 - x) ** 2 * math.log(x) if hit else -0.75 * x**2 * math.log(1 - x)
                    expected_class += weight * focal / 3
    assert {int(b): q for b, q in zip(matched.box, sorted(best), strict=True)} == dict(enumerate(best))
    torch.testing.assert_close(matched.embeddings, projector(answers.hidden[-1, 0, sorted(best)]))
    assert matched.losses["class"].item() == pytest.approx(expected_class, rel=1e-4)
    by_boxes = wrapped.match(images, sizes, targets, wrapped.projector(8, 4), most=100)
    assert "class" not in by_boxes.losses


def test_labels_follow_ids_through_flips_and_sampling(photo):
    """K of the proposals, mirrored or not, the small ones left out: ids are their numbers, labels those of the ids."""
    method = aligndet(queries("detr"), K=3, clusters=4)
    boxes = np.concatenate([[[5, 5, 5, 9]], BOXES]).astype(np.float32)  # the first can't be seen
    labels = np.array([9, 1, 2, 3, 4, 5])
    drawn_ids = set()
    for seed in range(8):
        views = method.views(photo, boxes, np.random.default_rng(seed))
        for view in views:
            height, width = view.size
            plain = boxes[view.ids] * np.tile([width / 80, height / 60], 2)
            mirrored = np.stack([width - plain[:, 2], plain[:, 1], width - plain[:, 0], plain[:, 3]], axis=1)
            assert np.allclose(view.boxes, plain, atol=1e-3) or np.allclose(view.boxes, mirrored, atol=1e-3)
            view.labels = labels[view.ids]
            drawn_ids |= set(view.ids.tolist())
        first, _ = collate_views([views], 32)
        assert first.targets()[0]["labels"].tolist() == labels[views[0].ids].tolist()
    assert drawn_ids == {1, 2, 3, 4, 5}


def test_without_labels_all_are_of_one_class(photo):
    views = batch(aligndet(detector("fcos"), K=2), photo, count=1)
    assert views[0].labels.tolist() == [[1, 1]]
    assert views[0].targets()[0]["labels"].tolist() == [1, 1]


def test_both_views_are_regressed_where_asked(photo):
    wrapped = detector("fcos")
    model = Pretraining(aligndet(wrapped, regress="both"), wrapped).eval()
    views = batch(model.method, photo)
    with torch.no_grad():
        terms = model(Views(views))
        each = [model.method.predict(model.student, view, losses=True).losses for view in views]
    for name, first in each[0].items():
        torch.testing.assert_close(terms[name], (first + each[1][name]) / 2)


def test_teacher_moves_by_ema_only(photo):
    wrapped = detector("retinanet")
    method = aligndet(wrapped)
    model = Pretraining(method, wrapped).train()
    key = "module.backbone.fpn.inner_blocks.0.0.weight"
    student, teacher = (dict(net.detector.named_parameters())[key] for net in (model.student, model.teacher))
    before = teacher.clone()
    sum(model(Views(batch(method, photo))).values()).backward()
    assert teacher.grad is None
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.after_step(0, 100)
    torch.testing.assert_close(teacher.data, 0.996 * before + 0.004 * student.data)


# ---- views ----------------------------------------------------------------------------------------------------------


def test_views_keep_all_boxes_their_ids_and_the_aspect_ratio(photo):
    method = aligndet(detector(), colour=0.0)
    assert method.settings.short_side_px == (51, 64)
    sizes = set()
    for seed in range(10):
        first, second = method.views(photo, BOXES, np.random.default_rng(seed))
        for view in (first, second):
            height, width = view.size
            assert 51 <= min(height, width) <= 64
            assert abs(width / height - 80 / 60) < 0.03
            assert view.ids.tolist() == [0, 1, 2, 3, 4]
            plain = BOXES * np.tile([width / 80, height / 60], 2)
            mirrored = np.stack([width - plain[:, 2], plain[:, 1], width - plain[:, 0], plain[:, 3]], axis=1)
            assert np.allclose(view.boxes, plain, atol=1e-3) or np.allclose(view.boxes, mirrored, atol=1e-3)
            sizes.add(view.size)
    assert len(sizes) > 5


def test_the_long_side_wins(photo):
    method = aligndet(detector(), short_side_px=(64, 64), long_side_px=70)
    for view in method.views(photo, BOXES, np.random.default_rng(0)):
        assert max(view.size) == 70


def test_k_proposals_the_same_in_both_views(photo):
    first, second = aligndet(detector(), K=3).views(photo, BOXES, np.random.default_rng(0))
    assert len(first.ids) == 3
    assert first.ids.tolist() == second.ids.tolist()


# ---- settings -------------------------------------------------------------------------------------------------------


def test_numbers_of_the_paper():
    region, dense = detector("faster_rcnn"), detector("retinanet")
    assert aligndet(region).settings.most == 4096
    assert aligndet(dense).settings.most == 2048
    method = AlignDet(AlignDetSettings())
    assert method.settings.T == 0.5
    assert method.momentum(0, 10) == pytest.approx(0.996)
    assert method.momentum(10, 10) == pytest.approx(1.0)
    assert method.epochs == 12
    for wrapped, lr in ((region, 0.02), (dense, 0.01)):
        advised = method.optimizer(wrapped, 16)
        assert (advised.optimizer, advised.base_lr, advised.base_batch) == ("sgd", lr, 16)
        assert (advised.schedule, advised.warmup_steps, advised.weight_decay) == ("steps", 500, 1e-4)
        assert advised.drops == pytest.approx([8 / 12, 11 / 12])


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_numbers_for_detectors_with_queries(family):
    wrapped = queries(family)
    method = AlignDet(AlignDetSettings())
    method.settle(wrapped, total_steps=100)
    s, advised = method.settings, method.optimizer(wrapped, 64)
    assert (method.length(wrapped), s.K, s.clusters, s.most) == (50, 50, 256, 4096)
    assert (advised.optimizer, advised.base_lr, advised.base_batch, advised.clip) == ("adamw", 2e-4, 64, 0.1)
    assert method.optimizer(wrapped, 4).base_batch == 4, "the rate is the same at any batch"
    slow = {"sampling_offsets": 0.1, "reference_points": 0.1} if family == "deformable_detr" else {}
    assert advised.lr_scale == slow
    assert method.batch_size(wrapped, 1e6) == 64
    assert method.pseudo_classes == (256, 128)
    parts = [name for name in wrapped.parts if name not in ("backbone", "classifier")]
    assert method.trained_parts(wrapped) == parts
    assert method.exported_parts(wrapped) == ["backbone", *parts]


def test_pseudo_classes_are_for_those_that_match_by_class():
    for settings in ({}, {"clusters": 0}):
        assert aligndet(detector("fcos"), **settings).pseudo_classes is None
    with pytest.raises(SettingsError, match=r"method\.clusters=9: a fcos matches by where boxes are alone"):
        aligndet(detector("fcos"), clusters=9)
    assert aligndet(queries("detr"), clusters=0).pseudo_classes is None


def test_exported_are_neck_and_heads_without_the_last_layers():
    method = AlignDet(AlignDetSettings())
    assert list(method.exported_parts(detector("faster_rcnn"))) == ["backbone", "neck", "rpn", "head"]
    assert list(method.exported_parts(detector("retinanet"))) == ["backbone", "neck", "head"]
    assert list(method.exported_parts(detector("cascade_rcnn"))) == ["backbone", "neck", "rpn", "head", "later_heads"]


def test_a_random_backbone_is_refused(tmp_path, scenes):
    import headstart

    with pytest.raises(SettingsError, match=r"aligndet freezes the backbone.*--start"):
        headstart.pretrain(
            "fcos", scenes / "unlabelled", "aligndet", backbone="resnet18", out=tmp_path / "x", show=False
        )


def test_a_detector_that_can_not_match_is_refused():
    class Odd:
        family = "odd"
        abilities = frozenset()

    with pytest.raises(SettingsError, match="aligndet trains on the predictions that answer for a box"):
        AlignDet.check(Odd())
