"""ADePT against plain, slow references written from the paper's text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from on_a_photo import BOXES, Views, batch
from torchvision.models.detection.image_list import ImageList

from headstart import detectors
from headstart.detectors.rcnn import RCNNSettings
from headstart.errors import SettingsError
from headstart.methods.adept import ADePT, ADePTSettings, carry
from headstart.methods.method import collate_views
from headstart.methods.soco import SoCo, SoCoSettings
from headstart.verbs.pretrain import Pretraining

RPN = ("rpn_objectness", "rpn_boxes")


def detector(**settings):
    torch.manual_seed(0)
    return detectors.build(RCNNSettings(**{"backbone": "resnet18", "fpn_channels": 8, "head_width": 16, **settings}))


def adept(wrapped=None, **settings) -> ADePT:
    method = ADePT(ADePTSettings(**{"view_px": 64, "hidden": 32, "dim": 16, "tau": 0.9, **settings}))
    method.settle(wrapped or detector(), total_steps=100)
    return method


def step(method, photo, wrapped=None):
    model = Pretraining(method, wrapped or detector()).train()
    return model, model(Views(batch(method, photo)))


# ---- Eq. 1: which anchor is what, and what it costs -----------------------------------------------------------------


def plain_anchors(maps, size, sides):
    """Section 4.1.3: three shapes of one area at every place of every map, centred where torchvision centres them."""
    anchors = []
    for map_, (side,) in zip(maps, sides, strict=True):
        rows, columns = map_.shape[-2:]
        stride_y, stride_x = size[0] // rows, size[1] // columns
        for y in range(rows):
            for x in range(columns):
                for ratio in (0.5, 1.0, 2.0):  # height over width
                    h, w = side * math.sqrt(ratio), side / math.sqrt(ratio)
                    half_w, half_h = round(w / 2), round(h / 2)
                    at_x, at_y = x * stride_x, y * stride_y
                    anchors.append([at_x - half_w, at_y - half_h, at_x + half_w, at_y + half_h])
    return anchors


def iou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = w * h
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return inter / (area(a) + area(b) - inter)


def plain_labels(anchors, boxes):
    """1: IoU above .7 with some box, or no anchor is nearer to a box; 0: below .3 with all; None: ignored."""
    table = [[iou(a, b) for b in boxes] for a in anchors]
    best = [max((row[k] for row in table), default=0) for k in range(len(boxes))]
    labels, matched = [], []
    for row in table:
        nearest = max(range(len(boxes)), key=row.__getitem__) if boxes else None
        if any(row[k] == best[k] and best[k] > 0 for k in range(len(boxes))) or (boxes and max(row) >= 0.7):
            labels.append(1)
        else:
            labels.append(0 if not boxes or max(row) < 0.3 else None)
        matched.append(nearest)
    return labels, matched


def deltas(anchor, box):
    aw, ah, bw, bh = anchor[2] - anchor[0], anchor[3] - anchor[1], box[2] - box[0], box[3] - box[1]
    ax, ay, bx, by = anchor[0] + aw / 2, anchor[1] + ah / 2, box[0] + bw / 2, box[1] + bh / 2
    return [(bx - ax) / aw, (by - ay) / ah, math.log(bw / aw), math.log(bh / ah)]


@pytest.mark.parametrize("boxes", [[[4.0, 4, 40, 36], [20.0, 10, 62, 55], [30.0, 30, 36, 38]], []])
def test_rpn_loss_is_equation_1(boxes, monkeypatch):
    """Every anchor in the sample, so that nothing is drawn: then Eq. 1 in loops gives the same two numbers."""
    wrapped = detector()
    maps = {str(i): torch.randn(1, 8, n, n) for i, n in enumerate((16, 8, 4, 2))}
    sides = [[8.0], [16.0], [32.0], [48.0]]
    rpn = wrapped._rpn(sides)
    monkeypatch.setattr(
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler.__call__",
        lambda self, labels: ([label >= 1 for label in labels], [label == 0 for label in labels]),
    )
    target = torch.tensor(boxes).reshape(-1, 4)
    losses = wrapped.rpn_loss(maps, [target], (64, 64), sides)

    anchors = plain_anchors(list(maps.values()), (64, 64), sides)
    theirs = rpn.anchor_generator(ImageList(torch.zeros(1, 3, 64, 64), [(64, 64)]), list(maps.values()))[0]
    assert torch.allclose(torch.tensor(anchors, dtype=torch.float32), theirs)
    labels, matched = plain_labels(anchors, boxes)
    objectness, regression = rpn.head(list(maps.values()))
    p = torch.cat([o[0].permute(1, 2, 0).reshape(-1) for o in objectness]).sigmoid().tolist()
    t = torch.cat([r[0].view(3, 4, *r.shape[-2:]).permute(2, 3, 0, 1).reshape(-1, 4) for r in regression]).tolist()
    counted = [i for i, label in enumerate(labels) if label is not None]
    log_loss = sum(-math.log(p[i] if labels[i] else 1 - p[i]) for i in counted) / len(counted)
    smooth = 0.0
    for i in counted:
        if labels[i]:
            for got, wanted in zip(t[i], deltas(anchors[i], boxes[matched[i]]), strict=True):
                e = abs(got - wanted)
                smooth += 0.5 * e * e * 9 if e < 1 / 9 else e - 0.5 / 9
    assert losses["rpn_objectness"].item() == pytest.approx(log_loss, rel=1e-5)
    assert losses["rpn_boxes"].item() == pytest.approx(smooth / len(counted), rel=1e-4, abs=1e-7)
    assert labels.count(1) >= len(boxes)


def test_anchors_are_the_papers_at_its_size_and_in_proportion_elsewhere():
    assert adept(view_px=224).settings.anchor_px == [[24.0], [48.0], [96.0], [192.0]]
    assert adept(view_px=448).settings.anchor_px == [[48.0], [96.0], [192.0], [384.0]]


def test_c4_keeps_as_many_anchors_a_cell_as_its_rpn_has_layers_for():
    wrapped = detector(neck="c4", short_side_px=128)
    method = adept(wrapped, view_px=64)
    assert method.settings.anchor_px == [[16.0, 32.0, 64.0, 128.0, 256.0]]
    with pytest.raises(SettingsError, match=r"anchor_px: \[1, 1\] sides"):
        adept(wrapped, anchor_px=[[1.0], [2.0]])


# ---- Eq. 8 and Table 4: who learns from what ------------------------------------------------------------------------


def gradient_of(model, terms, names):
    model.zero_grad()
    sum(terms[name] for name in names).backward(retain_graph=True)
    parts = model.student.detector.parts
    return {
        part: any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parts[part].parameters())
        for part in ("backbone", "neck", "rpn", "head")
    }


def test_the_rpns_loss_trains_the_rpn_and_nothing_else(photo):
    model, terms = step(adept(), photo)
    assert gradient_of(model, terms, RPN) == {"backbone": False, "neck": False, "rpn": True, "head": False}
    assert gradient_of(model, terms, ["align"]) == {"backbone": True, "neck": True, "rpn": False, "head": True}


def test_table_4_the_rpns_loss_into_the_backbone(photo):
    model, terms = step(adept(rpn_into_backbone=True), photo)
    assert gradient_of(model, terms, RPN) == {"backbone": True, "neck": True, "rpn": True, "head": False}


def test_det_loss_is_socos(photo):
    """Eq. 2-7: with the same weights and views, the same number."""
    method = adept()
    soco = SoCo(SoCoSettings(view_px=64, hidden=32, dim=16, tau=0.9))
    soco.settle(detector(), 100)
    torch.manual_seed(1)
    ours = Pretraining(method, detector()).train()
    torch.manual_seed(1)
    theirs = Pretraining(soco, detector()).train()
    views = batch(method, photo)
    heads = [method.for_head(view) for view in views]
    torch.testing.assert_close(ours(Views(views))["align"], theirs(Views(heads))["align"])


def test_the_rpn_learns_from_boxes_as_they_were_found(photo):
    """SoCo's jitter is the head's: behind the K jittered boxes are the same K without it."""
    method = adept(jitter_prob=1.0)
    first, second, _ = method.views(photo, BOXES, np.random.default_rng(0))
    for view, jittered in ((first, True), (second, False)):
        assert view.ids[:4].tolist() == view.ids[4:].tolist()
        assert np.array_equal(view.boxes[:4], view.boxes[4:]) != jittered
    plain = adept(jitter="none").views(photo, BOXES, np.random.default_rng(0))[0]
    height, width = plain.size
    scaled = BOXES[first.ids[4:]] * np.tile([width / 80, height / 60], 2)
    mirrored = np.stack([width - scaled[:, 2], scaled[:, 1], width - scaled[:, 0], scaled[:, 3]], axis=1)
    assert np.allclose(first.boxes[4:], scaled, atol=1e-3) or np.allclose(first.boxes[4:], mirrored, atol=1e-3)


def test_slivers_that_a_crop_leaves_are_no_objects(photo):
    method = adept()  # anchors of 6.9 px and more
    (view, *_) = batch(method, photo)
    view.boxes[0, 4] = torch.tensor([0.0, 0, 1.5, 40])
    boxes = method.for_rpn(view)
    assert [len(b) for b in boxes] == [3, 4]


def test_rpn_loss_is_the_mean_over_the_first_two_views(photo):
    method = adept()
    model = Pretraining(method, detector()).train()
    views = batch(method, photo)
    maps = [model.student.detector.features(view.images) for view in views]
    torch.manual_seed(0)
    got = method.rpn_loss(model.student, views, maps)
    torch.manual_seed(0)
    each = [
        model.student.detector.rpn_loss(m, method.for_rpn(v), v.size, method.settings.anchor_px)
        for m, v in zip(maps[:2], views[:2], strict=True)
    ]
    for name in RPN:
        torch.testing.assert_close(got[name], (each[0][name] + each[1][name]) / 2)


# ---- Table 4: the RPN's boxes as well -------------------------------------------------------------------------------


def test_boxes_are_carried_to_where_the_crop_shows_them(photo):
    """Views' own boxes, which crops and flips moved, are the reference."""
    method = adept(jitter="none")
    for seed in range(20):
        views = collate_views([method.views(photo, BOXES, np.random.default_rng(seed))])
        for view in views[1:]:
            moved = carry(views[0].boxes, views[0], view)
            torch.testing.assert_close(moved, view.boxes, atol=1e-3, rtol=1e-4)


def test_table_4_boxes_of_the_rpn_stand_beside_selective_searchs(photo):
    method = adept(boxes="ss_rpn")
    model, terms = step(method, photo)
    views, targets = model._seen
    assert torch.isfinite(terms["align"])
    for both, wider in zip(views, targets.views, strict=True):
        view = method.for_head(both)
        K = view.boxes.shape[1]
        assert torch.equal(wider.boxes[:, :K], view.boxes)
        assert wider.boxes.shape[1] == 2 * K
        height, width = view.size
        limits = torch.tensor([width, height, width, height])
        assert (wider.boxes >= 0).all()
        assert (wider.boxes <= limits).all()
        assert (wider.boxes[..., 2:] - wider.boxes[..., :2] > 0).all()
    assert gradient_of(model, terms, ["align"])["rpn"] is False


def test_a_view_that_does_not_show_the_rpns_box_gets_selective_searchs_again(photo):
    method = adept(boxes="ss_rpn")
    model = Pretraining(method, detector()).train()
    views = [method.for_head(view) for view in batch(method, photo)]
    nowhere = [torch.zeros(0, 4), torch.zeros(0, 4)]
    model.teacher.detector.rpn_boxes = lambda *arguments: nowhere
    maps = model.teacher.detector.features(views[0].images)
    for view, wider in zip(views, method.with_rpn_boxes(model.teacher, views, maps), strict=True):
        assert torch.equal(wider.boxes, torch.cat([view.boxes, view.boxes], dim=1))


# ---- separate -------------------------------------------------------------------------------------------------------


def test_separate_training_moves_the_rpn_alone(photo):
    method = adept(training="separate")
    wrapped = detector()
    before = {name: value.clone() for name, value in wrapped.module.state_dict().items()}
    model, terms = step(method, photo, wrapped)
    assert model.teacher is None
    assert set(terms) == set(RPN)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(terms.values()).backward()
    optimizer.step()
    changed = {name for name, value in wrapped.module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("rpn.") for name in changed), "batch norm statistics of frozen parts count too"
    assert len(batch(method, photo)) == 2


def test_separate_training_wants_weights(tmp_path, scenes):
    import headstart

    with pytest.raises(SettingsError, match=r"adept with training=separate trains the RPN on frozen features.*--start"):
        headstart.pretrain(
            "faster_rcnn",
            scenes / "unlabelled",
            "adept",
            backbone="resnet18",
            out=tmp_path / "run",
            settings={"method.training": "separate"},
            show=False,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": "separate", "boxes": "ss_rpn"}, "freezes everything but the RPN"),
        ({"training": "separate", "rpn_into_backbone": True}, "freezes everything but the RPN"),
        ({"instances": "random"}, "learns from proposals"),
        ({"view_px": 112}, "need a multiple of 32"),
        ({"head": False}, "belong to soco"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(SettingsError, match=message):
        adept(**settings)


# ---- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["target", "online"])
def test_the_branch_that_is_kept(photo, branch):
    method = adept(export=branch)
    model, terms = step(method, photo)
    sum(terms.values()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    model.after_step(0, 10)
    online = {k: v.clone() for k, v in model.student.detector.module.state_dict().items()}
    target = {k: v.clone() for k, v in model.teacher.detector.module.state_dict().items()}
    model.hand_over()
    kept = model.student.detector.module.state_dict()
    assert not torch.equal(online["backbone.body.conv1.weight"], target["backbone.body.conv1.weight"])
    source = target if branch == "target" else online
    for name, value in kept.items():
        own = online if name.startswith("rpn.") else source
        if name.startswith(("backbone.", "rpn.", "roi_heads.box_head.")):
            assert torch.equal(value, own[name]), name
    assert list(method.exported_parts(model.student.detector)) == ["backbone", "neck", "rpn", "head"]


def test_optimiser_is_the_papers_for_large_batches():
    advised = ADePT(ADePTSettings()).optimizer(detector(), 2048)
    assert (advised.optimizer, advised.base_lr, advised.base_batch, advised.weight_decay) == ("lars", 0.1, 2048, 1e-5)
    assert advised.warmup_epochs == 0
    alone = ADePT(ADePTSettings(training="separate")).optimizer(detector(), 16)
    assert (alone.optimizer, alone.base_lr * 16 / alone.base_batch) == ("adamw", 2e-3)
