"""UP-DETR against plain, slow references written from the paper's text."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from on_a_photo import BOXES, TRANSFORMER, Views, assert_finite_and_all_learn, two_sizes

from headstart import detectors
from headstart.errors import SettingsError
from headstart.methods import crops
from headstart.methods.updetr import UPDETR, UPDETRSettings
from headstart.verbs.pretrain import Pretraining

COMMON = {**TRANSFORMER, "long_side_px": 80, "feedforward": 32, "num_queries": 7}


def detector(family: str = "detr", **settings):
    torch.manual_seed(0)
    return detectors.build(detectors.parse_settings({"name": family, **COMMON, **settings}))


def updetr(wrapped, **settings) -> UPDETR:
    method = UPDETR(UPDETRSettings(**{"M": 3, "crop_px": 32, "colour": 0.0, "patches": "proposals", **settings}))
    method.settle(wrapped, total_steps=100)
    return method


# ---- groups of queries, and who looks at whom -----------------------------------------------------------------------


@pytest.mark.parametrize("patches", [5, 10, 20])
def test_the_mask_is_open_inside_a_patchs_queries_alone(patches):
    """100 queries: blocks of 20, 10 and 5, block by block."""
    mask = UPDETR(UPDETRSettings(M=patches)).attention(100)
    each = 100 // patches
    for i in range(100):
        for j in range(100):
            assert mask[i, j] == (i // each == j // each)


@pytest.mark.parametrize(("patches", "queries"), [(3, 7), (10, 101), (7, 100), (4, 4), (1, 9), (6, 11)])
def test_any_number_of_queries_and_patches(patches, queries):
    """Every patch has queries, in a row, and no patch more than one above another."""
    method = UPDETR(UPDETRSettings(M=patches))
    group = method.groups(queries).tolist()
    sizes = [group.count(patch) for patch in range(patches)]
    assert group == sorted(group)
    assert sum(sizes) == queries
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 1
    mask = method.attention(queries)
    assert mask.sum().item() == sum(size**2 for size in sizes)
    assert mask.diagonal().all()


def test_queries_of_a_patch_answer_as_if_others_were_not_there(photo):
    """Other patches elsewhere change nothing of what the queries of the first patch answer."""
    wrapped = detector()
    method = updetr(wrapped)
    net = Pretraining(method, wrapped).eval().student
    p = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    other = torch.cat([p[:1], torch.randn(2, 512, generator=torch.Generator().manual_seed(1))])
    (view,) = two_sizes(method, photo, counts=(3,))
    attend, group = method.attention(7), method.groups(7)
    with torch.no_grad():
        a, b = (
            wrapped.queries(view.images, view.sizes, extra=method.asked(net, x, [3]), attend=attend) for x in (p, other)
        )
    torch.testing.assert_close(a.hidden[:, :, group == 0], b.hidden[:, :, group == 0])
    assert not torch.allclose(a.hidden[:, :, group == 1], b.hidden[:, :, group == 1])


# ---- what queries are told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(3, 3), (3, 1), (2, 0), (0, 0)])
def test_each_query_is_told_its_groups_patch(counts):
    """Images with fewer patches give them to the groups in turn; without any, nothing is told."""
    wrapped = detector()
    method = updetr(wrapped)
    net = Pretraining(method, wrapped).eval().student
    p = torch.randn(sum(counts), 512, generator=torch.Generator().manual_seed(0))
    told = method.asked(net, p, counts)
    assert told.shape == (2, 7, 16)
    first = 0
    for image, count in enumerate(counts):
        for query, group in enumerate([0, 0, 0, 1, 1, 2, 2]):
            expected = torch.zeros(16)
            if count:
                expected = net.heads["patch"](p[first + group % count])
            torch.testing.assert_close(told[image, query], expected)
        first += count


def test_a_tenth_of_the_queries_is_not_told_in_training():
    wrapped = detector(num_queries=1000)
    method = updetr(wrapped)
    net = Pretraining(method, wrapped).train().student
    torch.manual_seed(0)
    p = torch.randn(6, 512)
    told = method.asked(net, p, [3, 3])
    dropped = (told == 0).all(dim=-1)
    assert 0.07 < dropped.float().mean() < 0.13
    assert not torch.equal(dropped[0], dropped[1])
    assert 0 < dropped[0, :334].float().mean() < 1, "single queries, not whole patches"
    whole = method.asked(net.eval(), p, [3, 3])
    assert not (whole == 0).all(dim=-1).any()
    torch.testing.assert_close(told[~dropped], whole[~dropped])


# ---- the losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_losses_against_loops(family, photo):
    """Class and boxes are the set loss over all patches and all queries; L_rec is over each layer's own matches."""
    wrapped = detector(family)
    method = updetr(wrapped)
    model = Pretraining(method, wrapped).eval()
    views = two_sizes(method, photo)
    (view,) = views
    with torch.no_grad():
        terms = model(Views(views))
        heads = model.student.heads
        p = [
            crops.describe(wrapped, view.images[i : i + 1], [view.boxes[i][view.ids[i] >= 0]], px=32) for i in range(2)
        ]
        extra = method.asked(model.student, torch.cat(p), [3, 2])
        group = torch.tensor([0, 0, 0, 1, 1, 2, 2])
        answers = wrapped.queries(view.images, view.sizes, extra=extra, attend=group[:, None] == group)
        from headstart.detectors.set_loss import Objects

        objects = Objects.of(view.targets(), view.sizes)
        expected, matches = wrapped.set_loss.with_matches(heads["f_cls"](answers.hidden), answers.boxes_cxcywh, objects)
        rebuild = 0.0
        for layer, (image, query, object_) in enumerate(matches):
            assert len(image) == 5
            for i, q, o in zip(image.tolist(), query.tolist(), object_.tolist(), strict=True):
                a = heads["f_rec"](answers.hidden[layer, i, q])
                b = p[i][o]
                rebuild += ((a / a.norm() - b / b.norm()) ** 2).sum().item() / 5
    assert set(terms) == {"class", "l1", "giou", "rebuild"}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)
    assert terms["rebuild"].item() == pytest.approx(rebuild, rel=1e-4)


def test_weights(photo):
    wrapped = detector()
    views = two_sizes(updetr(wrapped), photo)

    def terms(**settings):
        torch.manual_seed(1)
        with torch.no_grad():
            return Pretraining(updetr(wrapped, **settings), wrapped).eval()(Views(views))

    plain, weighted = terms(), terms(lambda_cls=2.0, lambda_l1=10.0, lambda_giou=0.0, lambda_rec=3.0)
    for name, factor in {"class": 2.0, "l1": 2.0, "giou": 0.0, "rebuild": 3.0}.items():
        torch.testing.assert_close(weighted[name], factor * plain[name])


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_one_step_moves_all_but_the_backbone_and_the_class_layer(family, photo):
    wrapped = detector(family)
    method = updetr(wrapped, colour=1.0)
    before = copy.deepcopy(wrapped.module.state_dict())
    model = Pretraining(method, wrapped).train()
    heads = copy.deepcopy(model.student.heads.state_dict())
    sum(model(Views(two_sizes(method, photo))).values()).backward()
    for name, part in wrapped.parts.items():
        for key, parameter in part.named_parameters():
            assert (parameter.grad is None) == (name in ("backbone", "classifier")), f"{name} {key}"
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name in wrapped.parts:
        moved = [k for k, v in wrapped.part_state([name]).items() if not torch.equal(before[k], v)]
        assert bool(moved) == (name not in ("backbone", "classifier")), f"{name}: {moved}"
    assert all(not torch.equal(heads[k], v) for k, v in model.student.heads.state_dict().items())


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (2, 0)])
def test_images_without_patches(family, counts, photo):
    """In one image, or in all: finite losses, and a gradient for every parameter that learns."""
    wrapped = detector(family)
    method = updetr(wrapped)
    model = Pretraining(method, wrapped).train()
    assert_finite_and_all_learn(model, two_sizes(method, photo, counts=counts))
    assert model.watch()["objects"] == sum(counts) / 2


# ---- views ----------------------------------------------------------------------------------------------------------


def test_patches_are_drawn_anew_and_number_m(photo):
    method = updetr(detector(), patches="random")
    assert not method.needs_proposals
    seen = set()
    for seed in range(5):
        (view,) = method.views(photo, np.zeros((0, 4), np.float32), np.random.default_rng(seed))
        assert view.ids.tolist() == [0, 1, 2]
        assert (view.boxes[:, 2:] > view.boxes[:, :2]).all()
        assert (view.boxes <= np.array([view.size[1], view.size[0]] * 2)).all()
        seen.add(view.boxes.tobytes())
    assert len(seen) == 5
    again = method.views(photo, np.zeros((0, 4), np.float32), np.random.default_rng(4))[0]
    assert again.boxes.tobytes() in seen


def test_of_more_proposals_m_are_drawn(photo):
    method = updetr(detector())
    assert method.needs_proposals
    drawn = {tuple(method.views(photo, BOXES, np.random.default_rng(i))[0].ids.tolist()) for i in range(30)}
    assert all(len(ids) == 3 for ids in drawn)
    assert len(drawn) > 3


# ---- settings -------------------------------------------------------------------------------------------------------


def test_numbers_of_the_paper():
    wrapped = detector()
    method = UPDETR(UPDETRSettings())
    s = method.settings
    assert (method.detector, method.epochs, s.M, s.mask_patches, s.stage) == ("detr", 60, 10, 0.1, None)
    assert (s.flip_prob, s.crop_prob, s.crop_px) == (0, 0, 128)
    loss = method.set_loss(wrapped)
    assert (loss.kind, loss.class_weight, loss.l1_weight, loss.giou_weight) == ("softmax", 1, 5, 2)
    advised = method.optimizer(wrapped, 8)
    assert (advised.optimizer, advised.base_lr, advised.base_batch) == ("adamw", 1e-4, 8)
    assert (advised.weight_decay, advised.clip, advised.drops) == (1e-4, 0.1, [40 / 60])


def test_what_can_not_be_asked_is_refused():
    with pytest.raises(SettingsError, match=r"method.M=8: each patch needs a query, and this detr has 7"):
        updetr(detector(), M=8)
    with pytest.raises(SettingsError, match=r"two-stage deformable_detr .*detector.two_stage=false"):
        updetr(detector("deformable_detr", refine=True, two_stage=True))
