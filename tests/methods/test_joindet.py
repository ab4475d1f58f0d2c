"""JoinDet against plain, slow references written from the method's description, and cases made by hand."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from on_a_photo import TRANSFORMER
from safetensors.torch import load_file

import headstart
from headstart import detectors, methods
from headstart.detectors.set_loss import Objects
from headstart.errors import SettingsError
from headstart.methods import crops
from headstart.methods.joindet import EigenAttention, JoinDet, JoinDetSettings, Narrow, box_smooth, mirrored, stride_of
from headstart.methods.method import Net, Priors, collate_views
from headstart.proposals import ncut
from headstart.settings import validate

BOXES = np.array([[4, 4, 40, 36], [20, 10, 70, 55], [10, 20, 30, 50]], np.float32)
TINY = {**TRANSFORMER, "num_queries": 6}
SINGLE = {"levels": 1}


def detector(family: str = "deformable_detr", **settings):
    torch.manual_seed(0)
    own = SINGLE if family == "deformable_detr" else {}
    return detectors.build(detectors.parse_settings({"name": family, **TINY, **own, **settings}))


def joindet(wrapped, **settings) -> tuple[JoinDet, Net]:
    method = JoinDet(JoinDetSettings(**settings))
    method.settle(wrapped, total_steps=100)
    torch.manual_seed(1)
    net = Net(wrapped, method.heads(wrapped))
    return method, net.eval().requires_grad_(False)


def priors(boxes, scores) -> Priors:
    return Priors(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(scores, dtype=torch.float32))


def same(a: Priors, b: Priors) -> bool:
    return torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores)


def batch_of(photo, count: int = 2):
    """Images of two sizes in one batch, (B, 3, 64, 96) uint8, and their sizes."""
    sizes = torch.tensor([[64, 96], [50, 70]])[:count]
    images = torch.zeros(count, 3, 64, 96, dtype=torch.uint8)
    for image, (h, w) in zip(images, sizes.tolist(), strict=True):
        image[:, :h, :w] = torch.from_numpy(np.resize(photo, (h, w, 3))).permute(2, 0, 1)
    return images, sizes


# ---- Box Smooth -----------------------------------------------------------------------------------------------------


def plain_iou(a, b) -> float:
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])
    return w * h / (area(a) + area(b) - w * h)


def plain_smooth(old, new, m_s, iou):
    """Lists of (box, score) -> clusters' boxes and scores, best first; one member at a time."""
    waiting = [(b, s, m_s * s) for b, s in old] + [(b, s, (1 - m_s) * s) for b, s in new]
    waiting.sort(key=lambda member: -member[1])
    out = []
    while waiting:
        first = waiting[0][0]
        cluster = [m for m in waiting if m[0] == first or plain_iou(m[0], first) >= iou]
        waiting = [m for m in waiting if m not in cluster]
        total = sum(weight for _, _, weight in cluster)
        box = [sum(b[i] * weight for b, _, weight in cluster) / total for i in range(4)]
        out.append((box, sum(s for _, s, _ in cluster) / len(cluster)))
    return sorted(out, key=lambda found: -found[1])


def random_priors(rng, count):
    low = rng.uniform(0, 60, (count, 2))
    boxes = np.hstack([low, low + rng.uniform(5, 40, (count, 2))])
    return list(zip(boxes.tolist(), rng.random(count).tolist(), strict=True))


@pytest.mark.parametrize("m_s", [0.05, 0.2, 0.45, 0.7])
@pytest.mark.parametrize("iou", [0.1, 0.35, 0.48, 0.65])
def test_box_smooth_is_the_plain_one(m_s, iou):
    rng = np.random.default_rng(0)
    for counts in ((8, 30), (30, 8), (0, 12), (12, 0), (1, 1)):
        old, new = (random_priors(rng, count) for count in counts)
        given = (priors([b for b, _ in each], [s for _, s in each]) for each in (old, new))
        found, expected = box_smooth(*given, m_s, iou), plain_smooth(old, new, m_s, iou)
        np.testing.assert_allclose(found.boxes, np.array([b for b, _ in expected]), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(found.scores, [s for _, s in expected], rtol=1e-6)


def test_box_smooth_by_hand():
    """Old [0, 0, 10, 10] of score .8 and new [0, 0, 12, 10] of score .4: weights .45 * .8 and .55 * .4."""
    old, new = priors([[0, 0, 10, 10]], [0.8]), priors([[0, 0, 12, 10], [50, 50, 60, 60]], [0.4, 0.3])
    found = box_smooth(old, new, 0.45, 0.48)
    right = (0.36 * 10 + 0.22 * 12) / (0.36 + 0.22)
    torch.testing.assert_close(found.boxes, torch.tensor([[0, 0, right, 10], [50, 50, 60, 60]]))
    torch.testing.assert_close(found.scores, torch.tensor([0.6, 0.3]))


def test_a_cluster_overlaps_its_first_box_and_not_its_last():
    """Each overlaps the next by .6, the first and the third by a third."""
    chain = priors([[0, 0, 10, 10], [0, 2.5, 10, 12.5], [0, 5, 10, 15]], [0.9, 0.8, 0.7])
    found = box_smooth(priors([], []), chain, 0.45, 0.5)
    assert len(found.boxes) == 2
    torch.testing.assert_close(found.boxes[1], torch.tensor([0.0, 5, 10, 15]))


def test_m_s_of_1_freezes_and_of_0_replaces():
    old = priors([[0, 0, 10, 10], [0, 0, 11, 10]], [0.8, 0.1])  # which overlap
    new = priors([[0, 0, 12, 10]], [0.9])
    assert same(box_smooth(old, new, 1.0, 0.48), old)
    assert same(box_smooth(old, new, 0.0, 0.48), new)


def test_box_smooth_of_nothing_of_no_score_and_of_no_area():
    nothing, one = priors([], []), priors([[0, 0, 4, 4]], [0.0])
    assert box_smooth(nothing, nothing, 0.45, 0.48).boxes.shape == (0, 4)
    torch.testing.assert_close(box_smooth(nothing, one, 0.45, 0.48).boxes, one.boxes)
    assert len(box_smooth(one, priors([[9, 9, 9, 9]], [0.5]), 0.45, 0.48).boxes) == 2


def test_merging_by_nms_and_by_replacing():
    wrapped = detector()
    old, new = priors([[0, 0, 10, 10]], [0.8]), priors([[0, 0, 12, 10], [50, 50, 60, 60]], [0.9, 0.3])
    by_nms = joindet(wrapped, merge="nms")[0].merged(old, new)
    torch.testing.assert_close(by_nms.boxes, new.boxes)  # the old one overlaps a better one
    assert same(joindet(wrapped, merge="replace")[0].merged(old, new), new)
    assert not same(joindet(wrapped)[0].merged(old, new), new)


# ---- priors of a map ------------------------------------------------------------------------------------------------


def planted() -> EigenAttention:
    M = np.zeros((3, 4))
    M[0:2, 1:3] = 1.0
    return EigenAttention(M, 32, (80, 120))  # the last row and column of cells reach beyond the image


def plain_share(attention: EigenAttention, box) -> float:
    """Of a box of whole px, px by px."""
    map_ = attention.M
    above = map_ > map_.mean()
    x1, y1, x2, y2 = box
    inside = [above[y // attention.stride, x // attention.stride] for y in range(y1, y2) for x in range(x1, x2)]
    return sum(inside) / len(inside)


def test_region_priors_are_px_of_the_image():
    found = planted().region_priors()
    torch.testing.assert_close(found.boxes, torch.tensor([[32.0, 0, 96, 64]]))
    torch.testing.assert_close(found.scores, torch.tensor([1.0]))
    whole = EigenAttention(np.array([[0.0, 0], [0, 1]]), 32, (50, 60)).region_priors()
    torch.testing.assert_close(whole.boxes, torch.tensor([[32.0, 32, 60, 50]]))


def test_the_share_of_foreground_is_counted_by_px():
    rng = np.random.default_rng(0)
    attention = EigenAttention(rng.random((3, 4)), 32, (80, 120))
    corners = np.sort(rng.integers(0, [120, 80], (40, 2, 2)), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] + 1], axis=1).clip(0, [120, 80, 120, 80])
    np.testing.assert_allclose(attention.share(boxes), [plain_share(attention, box) for box in boxes.tolist()])


def test_instance_priors_are_sure_and_on_the_foreground():
    found = priors(
        [[32, 0, 96, 64], [0, 0, 64, 64], [0, 0, 63, 64], [32, 0, 96, 64], [-40, 0, 96, 64], [130, 0, 150, 9]],
        [0.9, 0.8, 0.7, 0.5, 0.6, 0.9],
    )  # all of it; half of it; less than half; not above .5; half of what is inside; outside
    kept = planted().instance_priors(found, 0.5, 0.5)
    torch.testing.assert_close(kept.boxes, torch.tensor([[32.0, 0, 96, 64], [0, 0, 64, 64], [0, 0, 96, 64]]))
    torch.testing.assert_close(kept.scores, torch.tensor([0.9, 0.8, 0.6]))
    assert planted().instance_priors(priors([], []), 0.5, 0.5).boxes.shape == (0, 4)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 96), (100, 41), (33, 600)])
def test_the_stride_of_a_map(size, stride):
    map_ = torch.zeros(1, 1, *(math.ceil(px / stride) for px in size))
    assert stride_of(map_, size) == stride


# ---- refresh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "stage"), [(8, 3), (16, 4), (32, 5), (64, 5)])
def test_the_first_priors_are_of_the_frozen_backbone_alone(photo, stride, stage):
    wrapped = detector()
    method, net = joindet(wrapped, stride_px=stride)
    stride = 2**stage
    images, sizes = batch_of(photo)
    found = method.refresh(net, images, sizes, None)
    for image, (h, w), each in zip(images, sizes.tolist(), found, strict=True):
        around = [(0, 0), (64, 64 + 64 - h), (64, 64 + 96 - w)]
        framed = torch.from_numpy(np.pad(image[:, :h, :w].numpy(), around, mode="reflect"))
        map_ = wrapped.normalise(framed[None])
        for name, layer in wrapped.body.items():
            map_ = layer(map_)
            if name == f"layer{stage - 1}":
                break
        features = map_[0].permute(1, 2, 0).numpy()[64 // stride :, 64 // stride :]
        features = features[: math.ceil(h / stride), : math.ceil(w / stride)]
        expected = EigenAttention(ncut.attention_map(ncut.centred(features)), stride, (h, w)).region_priors()
        torch.testing.assert_close(each.boxes, expected.boxes)
        torch.testing.assert_close(each.scores, expected.scores)
        assert (each.boxes <= torch.tensor([w, h, w, h])).all()
    assert any(len(each.boxes) for each in found)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (40, 96), (64, 70)])
def test_images_are_framed_by_their_mirror_images(size):
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    h, w = size
    around = [(0, 0), (64, 64 + 64 - h), (64, 64 + 96 - w)]
    expected = np.pad(image[:, :h, :w].numpy(), around, mode="reflect")
    np.testing.assert_array_equal(mirrored(image, size), expected)


@pytest.mark.parametrize("family", ["deformable_detr", "detr"])
def test_later_priors_are_regions_and_instances(family, photo):
    wrapped = detector(family)
    images, sizes = batch_of(photo)
    none = [priors([], []) for _ in images]
    new = {}
    for kind in ("region", "instance", "both"):
        method, net = joindet(wrapped, priors=kind, merge="replace", t=0.0, foreground=0.0)
        new[kind] = method.refresh(net, images, sizes, none)
    for region, instance, both, (h, w) in zip(*new.values(), sizes.tolist(), strict=True):
        assert len(instance.boxes) == TINY["num_queries"]
        torch.testing.assert_close(both.boxes, torch.cat([region.boxes, instance.boxes]))
        torch.testing.assert_close(both.scores, torch.cat([region.scores, instance.scores]))
        assert (both.boxes <= torch.tensor([w, h, w, h])).all()
    answers = wrapped.queries(images, sizes)
    logits = net.heads["f_cls"](answers.hidden[-1])
    scores = logits.softmax(-1)[..., 0] if family == "detr" else logits.sigmoid()[..., 0]
    torch.testing.assert_close(torch.stack([each.scores for each in new["instance"]]), scores)
    x, y, w, h = answers.boxes_cxcywh[-1, 1, 0].tolist()
    expected = torch.tensor([(x - w / 2) * 70, (y - h / 2) * 50, (x + w / 2) * 70, (y + h / 2) * 50])
    torch.testing.assert_close(new["instance"][1].boxes[0], expected.clamp(min=0))


def test_what_was_before_is_smoothed_in(photo):
    method, net = joindet(detector(), priors="region")
    images, sizes = batch_of(photo, 1)
    new = method.refresh(net, images, sizes, [priors([], [])])
    before = [priors([[3, 3, 9, 9]], [0.9])]
    both = method.refresh(net, images, sizes, before)
    expected = box_smooth(before[0], new[0], 0.45, 0.48)
    assert [3, 3, 9, 9] in both[0].boxes.tolist()
    torch.testing.assert_close(both[0].boxes.sort(0).values, expected.boxes.sort(0).values)
    assert len(method.refresh(net, images, sizes, [priors([], [])])) == 1


def test_of_several_maps_the_one_of_the_stride_is_cut(photo, monkeypatch):
    wrapped = detector(levels=4)
    images, sizes = batch_of(photo)
    seen = []
    monkeypatch.setattr(JoinDet, "attend", lambda self, map_, *others: seen.append(map_) or [])
    for stride in (8, 16, 32, 64):
        method, net = joindet(wrapped, stride_px=stride)
        with pytest.raises(ValueError, match="zip"):
            method.refresh(net, images, sizes, [priors([], [])] * 2)
        assert seen[-1].shape[-2:] == (max(1, 64 // stride), math.ceil(96 / stride))


def test_refreshing_draws_nothing_and_repeats(photo):
    method, net = joindet(detector())
    images, sizes = batch_of(photo)
    before = method.refresh(net, images, sizes, None)
    state = torch.random.get_rng_state()
    first, again = (method.refresh(net, images, sizes, before) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_the_supervision_is_updated_every_so_many_passes_or_five_times_a_run():
    assert joindet(detector())[0].refresh_every(3) == 20  # of 100 steps, however many passes they are
    assert joindet(detector(), update_epochs=10)[0].refresh_every(3) == 30
    assert joindet(detector(), update_epochs=0.1)[0].refresh_every(3) == 1


# ---- loss -----------------------------------------------------------------------------------------------------------


def views_of(method, photo, boxes=BOXES):
    return collate_views([method.views(photo, boxes, np.random.default_rng(i)) for i in range(2)], 32)


@pytest.mark.parametrize("family", ["deformable_detr", "detr"])
def test_the_loss_is_detregs_with_the_narrowed_target(family, photo):
    wrapped = detector(family)
    method, net = joindet(wrapped, dim=8, colour=0.0, jitter=(0.8, 1.0), crop_prob=0.0)
    (view,) = views = views_of(method, photo)
    terms = method.loss(net, views, None)
    assert {"class", "l1", "giou", "embed"} == set(terms)
    # The embedding's L1, box by box: C3's mean of each 128 px crop, projected.
    answers = wrapped.queries(view.images, view.sizes)
    logits = net.heads["f_cls"](answers.hidden)
    objects = Objects.of(view.targets(), view.sizes)
    _, matches = wrapped.set_loss.with_matches(logits, answers.boxes_cxcywh, objects)
    total, count = 0.0, 0
    for image, query, box in zip(*(part.tolist() for part in matches[-1]), strict=True):
        crop = crops.cut(view.images[image : image + 1], [view.boxes[image, box : box + 1]], 128)
        target = wrapped.stage_map(crop, 3).mean(dim=(2, 3))[0] @ net.heads["narrow"].matrix
        embedded = net.heads["f_emb"](answers.hidden[-1, image, query])
        total += sum(abs(a - b) for a, b in zip(embedded.tolist(), target.tolist(), strict=True)) / 8
        count += 1
    assert float(terms["embed"]) == pytest.approx(total / count, rel=1e-4)
    assert count == len(torch.cat([t["boxes"] for t in view.targets()])) > 0


@pytest.mark.parametrize("family", ["deformable_detr", "detr"])
def test_an_image_without_priors_teaches_that_there_is_nothing(family, photo):
    method, net = joindet(detector(family))
    net.train().requires_grad_(True)
    terms = method.loss(net, views_of(method, photo, np.zeros((0, 4), np.float32)), None)
    assert all(torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    assert net.heads["f_cls"].weight.grad.abs().sum() > 0
    watched = method.watch((), None)
    assert watched["objects"] == 0
    assert "stands out" in method.warnings(watched)


def test_the_embedding_head_has_two_hidden_layers_of_256():
    _, net = joindet(detector())
    widths = [layer.weight.shape for layer in net.heads["f_emb"] if hasattr(layer, "weight")]
    assert widths == [(256, 16), (256, 256), (128, 256)]  # resnet18's C3 has 128
    assert torch.equal(net.heads["narrow"].matrix, torch.eye(128))


def test_the_projection_is_fixed_and_keeps_lengths():
    narrow = Narrow(512, 256)
    assert torch.equal(narrow.matrix, Narrow(512, 256).matrix)
    assert not list(narrow.parameters())
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(2))
    lengths = narrow(x).norm(dim=1) / x.norm(dim=1)
    assert 0.95 < float(lengths.mean()) < 1.05


# ---- views and choices ----------------------------------------------------------------------------------------------


def test_views_are_jittered_in_scale(photo):
    method, _ = joindet(detector(), crop_prob=0.0)
    assert method.settings.long_side_px == 80
    assert method.decode_px == 160
    sides = []
    for seed in range(60):
        (view,) = method.views(photo, BOXES, np.random.default_rng(seed))
        sides.append(max(view.size))
        assert (view.boxes >= 0).all()
        assert (view.boxes[:, 2:] <= view.size[::-1]).all()
    assert min(sides) < 20
    assert max(sides) == 80  # what is larger is cut
    plain, _ = joindet(detector(), crop_prob=0.0, jitter=None)
    assert max(max(plain.views(photo, BOXES, np.random.default_rng(seed))[0].size) for seed in range(20)) <= 80
    assert plain.decode_px < method.decode_px


def test_it_needs_queries_and_a_trained_backbone():
    with pytest.raises(SettingsError, match="joindet trains queries"):
        JoinDet.check(detectors.family("faster_rcnn"))
    assert "trained" in joindet(detector())[0].needs_start(detector())
    assert methods.method_type("joindet") is JoinDet
    assert JoinDet.detector == "deformable_detr"


@pytest.mark.parametrize("bad", [{"m_s": 1.2}, {"iou": 0}, {"jitter": [2.0, 1.0]}, {"merge": "mean"}])
def test_settings_out_of_range(bad):
    with pytest.raises(SettingsError):
        validate(JoinDetSettings, bad)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def go(scenes, tmp_path):
    """Pretrain for five steps of four of twelve images, with new boxes every epoch."""

    def call(name, **more):
        settings = {f"detector.{k}": v for k, v in {**TINY, **SINGLE}.items() if k != "backbone"}
        settings |= {"method.update_epochs": 1, "method.foreground": 0.2, "method.t": 0.2, "train.workers": 0}
        return headstart.pretrain(
            "deformable_detr", scenes / "unlabelled", "joindet", out=tmp_path / name, backbone="resnet18",
            start="scratch", max_steps=5, batch_size=4, settings={**settings, "train.checkpoint_every": 1},
            show=False, **more,
        )  # fmt: skip

    return call


def boxes_of(run) -> dict[str, list]:
    return {file.name: pq.read_table(file)["boxes"].to_pylist() for file in sorted((run / "priors").glob("*.parquet"))}


def test_a_run_makes_its_own_boxes_and_resumes_to_the_same(go, monkeypatch):
    whole = go("whole")
    boxes = boxes_of(whole.path)
    assert list(boxes) == ["000000.parquet", "000003.parquet"]
    assert boxes["000000.parquet"] != boxes["000003.parquet"]
    weights = load_file(whole.weights)
    assert {key.split(".")[0] for key in weights} >= {"backbone", "transformer", "bbox_embed", "query_embed"}
    assert not any(key.startswith("class_embed") for key in weights)
    count, loss = 0, JoinDet.loss

    def interrupted(self, *arguments):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    monkeypatch.setattr(JoinDet, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go("cut")
    monkeypatch.undo()
    resumed = go("cut", resume=True)
    assert boxes_of(resumed.path) == boxes
    again = load_file(resumed.weights)
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
