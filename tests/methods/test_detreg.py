"""DETReg against plain, slow references written from the paper's text."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from on_a_photo import BOXES, TRANSFORMER, Views, assert_finite_and_all_learn, two_sizes

from headstart import detectors
from headstart.detectors.set_loss import Objects
from headstart.errors import SettingsError
from headstart.methods import crops
from headstart.methods.detreg import DETReg, DETRegSettings
from headstart.methods.query_method import Answered, detr_crop
from headstart.verbs.pretrain import Pretraining
from headstart.views import View

COMMON = {**TRANSFORMER, "long_side_px": 80, "feedforward": 32, "num_queries": 7}
FAMILIES = {
    "detr": {"name": "detr"},
    "deformable_detr": {"name": "deformable_detr"},
    "refined": {"name": "deformable_detr", "refine": True},
    "two_stage": {"name": "deformable_detr", "refine": True, "two_stage": True},
}


def detector(family: str = "deformable_detr", **settings):
    torch.manual_seed(0)
    return detectors.build(detectors.parse_settings({**COMMON, **FAMILIES[family], **settings}))


def detreg(wrapped, **settings) -> DETReg:
    method = DETReg(DETRegSettings(**{"crop_px": 32, "colour": 0.0, "crop_prob": 0.0, **settings}))
    method.settle(wrapped, total_steps=100)
    return method


# ---- the losses, term by term ---------------------------------------------------------------------------------------


def corners(box):
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def plain_giou(a, b):
    a, b = corners(a), corners(b)
    area = lambda box: max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
    common = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - common
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    return common / union - (hull - union) / hull


def plain_focal(logit, wanted):
    p = 1 / (1 + np.exp(-logit))
    return -0.25 * (1 - p) ** 2 * np.log(p) if wanted else -0.75 * p**2 * np.log(1 - p)


def plain_matching(scores, found, wanted, kind):
    """The cheapest of all ways to give each object a query of its own; class cost 2 (focal) or 1, L1 5, GIoU 2."""

    def cost(query, object_):
        l1 = sum(abs(a - b) for a, b in zip(found[query], wanted[object_], strict=True))
        if kind == "focal":
            of_class = 2 * (plain_focal(scores[query][0], True) - plain_focal(scores[query][0], False))
        else:
            of_class = -np.exp(scores[query][0]) / np.exp(scores[query]).sum()
        return of_class + 5 * l1 + 2 * (1 - plain_giou(found[query], wanted[object_]))

    ways = itertools.permutations(range(len(found)), len(wanted))
    return min(ways, key=lambda way: sum(cost(query, object_) for object_, query in enumerate(way)))


def plain_loss(logits, boxes, objects, kind):
    """(L, B, N, C), (L, B, N, 4) and per image [(cx, cy, w, h)] -> terms, and each layer's matching, by loops."""
    terms, total = {"class": 0.0, "l1": 0.0, "giou": 0.0}, sum(len(of_image) for of_image in objects)
    layers = []
    for layer_logits, layer_boxes in zip(logits, boxes, strict=True):
        entropies, weights, ways = 0.0, 0.0, []
        for scores, found, wanted in zip(layer_logits, layer_boxes, objects, strict=True):
            way = plain_matching(scores, found, wanted, kind)
            ways.append(way)
            for query in range(len(found)):
                if kind == "focal":
                    terms["class"] += 2 * plain_focal(scores[query][0], query in way) / total
                else:
                    weight, index = (1.0, 0) if query in way else (0.1, 1)
                    entropies -= weight * np.log(np.exp(scores[query][index]) / np.exp(scores[query]).sum())
                    weights += weight
            for object_, query in enumerate(way):
                terms["l1"] += 5 * np.abs(found[query] - wanted[object_]).sum() / total
                terms["giou"] += 2 * (1 - plain_giou(found[query], wanted[object_])) / total
        terms["class"] += entropies / weights if weights else 0.0
        layers.append(ways)
    return terms, layers


def shares(view):
    """Per image (k, 4), centre and size over the image's own sides."""
    found = []
    for boxes, ids, (height, width) in zip(view.boxes, view.ids, view.sizes.tolist(), strict=True):
        b = boxes[ids >= 0].numpy()
        x, y, w, h = (b[:, 0] + b[:, 2]) / 2, (b[:, 1] + b[:, 3]) / 2, b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]
        found.append(np.stack([x / width, y / height, w / width, h / height], axis=1))
    return found


@pytest.mark.parametrize("family", ["detr", "deformable_detr", "refined"])
def test_every_term_is_the_papers(family, photo):
    wrapped = detector(family)
    method = detreg(wrapped)
    model = Pretraining(method, wrapped).eval()
    torch.nn.init.normal_(model.student.heads["f_cls"].weight, std=3.0)  # each layer has matches of its own
    views = two_sizes(method, photo)
    (view,) = views
    assert len({tuple(size) for size in view.sizes.tolist()}) == 2
    with torch.no_grad():
        terms = {k: float(v) for k, v in model(Views(views)).items()}
        answers = wrapped.queries(view.images, view.sizes)
        heads = model.student.heads
        logits = heads["f_cls"](answers.hidden).double().numpy()
        kind = wrapped.set_loss.kind
        expected, layers = plain_loss(logits, answers.boxes_cxcywh.double().numpy(), shares(view), kind)
        assert layers[0] != layers[-1]
        # The embedding: mean absolute difference, on the last layer's matched queries alone.
        differences = []
        for i, way in enumerate(layers[-1]):
            for box, query in enumerate(way):
                z = crops.describe(wrapped, view.images[i : i + 1], [view.boxes[i, box : box + 1]], stage=3, px=32)[0]
                differences.append((heads["f_emb"](answers.hidden[-1, i, query]) - z).abs().mean().item())
    expected["embed"] = np.mean(differences)
    assert terms == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert z.shape == (128,)  # a ResNet-18's layer2; 512 of a ResNet-50


def test_the_first_stage_learns_to_find_objects_too(photo):
    wrapped = detector("two_stage")
    method = detreg(wrapped)
    model = Pretraining(method, wrapped).train()
    views = two_sizes(method, photo)
    terms = model(Views(views))
    assert {"first_class", "first_l1", "first_giou"} < terms.keys()
    sum(terms[name] for name in terms if name.startswith("first_")).backward()
    proposer = [p.grad for p in wrapped.parts["proposer"].parameters() if p.grad is not None]
    assert any(grad.abs().sum() > 0 for grad in proposer)


def test_the_embedding_takes_no_part_in_the_matching(photo):
    """Another embedding head, other embeddings: the class and box terms stay."""
    wrapped = detector()
    method = detreg(wrapped)
    model = Pretraining(method, wrapped).eval()
    views = two_sizes(method, photo)
    with torch.no_grad():
        before = model(Views(views))
        for parameter in model.student.heads["f_emb"].parameters():
            parameter.normal_()
        after = model(Views(views))
    assert after.pop("embed") != before.pop("embed")
    assert after == before


def test_weights(photo):
    wrapped = detector()
    views = two_sizes(detreg(wrapped), photo)

    def terms(**settings):
        torch.manual_seed(1)
        with torch.no_grad():
            return Pretraining(detreg(wrapped, **settings), wrapped).eval()(Views(views))

    plain, weighted = terms(), terms(lambda_cls=1.0, lambda_l1=10.0, lambda_giou=0.0, lambda_e=3.0)
    factors = {"class": 0.5, "l1": 2.0, "giou": 0.0, "embed": 3.0}
    for name, factor in factors.items():
        torch.testing.assert_close(weighted[name], factor * plain[name])


def test_without_settings_of_its_own_the_detector_is_asked(photo):
    wrapped = detector(class_weight=4.0)
    assert detreg(wrapped).set_loss(wrapped) == wrapped.set_loss
    assert detreg(wrapped).set_loss(wrapped).class_weight == 4.0


# ---- what learns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_moves_all_but_the_backbone_and_the_class_layer(family, photo):
    wrapped = detector(family)
    method = detreg(wrapped, colour=1.0)
    before = copy.deepcopy(wrapped.module.state_dict())
    model = Pretraining(method, wrapped).train()
    sum(model(Views(two_sizes(method, photo))).values()).backward()
    assert set(method.trained_parts(wrapped)) == set(wrapped.parts) - {"backbone", "classifier"}
    for name, part in wrapped.parts.items():
        for key, parameter in part.named_parameters():
            if name in ("backbone", "classifier"):
                assert not parameter.requires_grad
                assert parameter.grad is None, f"{name} {key}"
            else:
                assert parameter.grad is not None, f"{name} {key}"
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name in wrapped.parts:
        moved = [k for k, v in wrapped.part_state([name]).items() if not torch.equal(before[k], v)]
        assert bool(moved) == (name not in ("backbone", "classifier")), f"{name}: {moved}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (5, 0)])
def test_images_without_proposals(family, counts, photo):
    """In one image, or in all: finite losses, and a gradient for every parameter that learns."""
    wrapped = detector(family)
    method = detreg(wrapped)
    model = Pretraining(method, wrapped).train()
    assert_finite_and_all_learn(model, two_sizes(method, photo, counts=counts))
    watched = model.watch()
    assert watched["objects"] == sum(counts) / 2
    assert (method.warnings(watched) is not None) == (sum(counts) == 0)


def test_more_proposals_than_queries(photo):
    wrapped = detector(num_queries=2)
    model = Pretraining(detreg(wrapped), wrapped).train()
    terms = model(Views(two_sizes(model.method, photo, counts=(5, 1))))
    assert all(torch.isfinite(term) for term in terms.values()), terms


def test_batched_is_single(photo):
    """Two images of different sizes, padded together: each one's embeddings are those it gets alone."""
    wrapped = detector("detr")
    method = detreg(wrapped)
    net = Pretraining(method, wrapped).eval().student
    (view,) = two_sizes(method, photo)
    together = method.describe(net, view, view.targets())
    first = method.describe(net, *alone(view, 0))
    second = method.describe(net, *alone(view, 1))
    torch.testing.assert_close(together, torch.cat([first, second]), atol=1e-5, rtol=1e-5)


def alone(view, index):
    one = copy.copy(view)
    for name, value in vars(view).items():
        setattr(one, name, value[index : index + 1])
    return one, one.targets()


# ---- views ----------------------------------------------------------------------------------------------------------


def test_views_are_sized_as_released_and_smaller_for_small_detectors(photo):
    large = detector(short_side_px=800, long_side_px=1333)
    method = DETReg(DETRegSettings())
    said = method.settle(large, 100)
    assert (method.settings.short_side_px, method.settings.long_side_px) == ((320, 480), 600)
    assert method.decode_px == 600
    assert "320 to 480" in said[0]
    small = detreg(detector())
    assert (small.settings.short_side_px, small.settings.long_side_px) == ((43, 64), 80)
    assert detreg(detector(), short_side_px=(20, 30)).settings.long_side_px == 38
    for seed in range(20):
        (view,) = small.views(photo, BOXES, np.random.default_rng(seed))
        assert 43 <= min(view.size) <= 64
        assert max(view.size) <= 80
        assert view.ids.tolist() == [0, 1, 2, 3, 4]


def test_boxes_stay_on_what_they_were_on():
    """A bright square is found again where its box says, after crop, resize and flip; or its box is gone."""
    image = np.zeros((120, 160, 3), np.uint8)
    image[30:50, 100:130] = 255
    boxes = np.array([[100, 30, 130, 50]], np.float32)
    method = detreg(detector(), crop_prob=1.0)
    sizes, gone = set(), 0
    for seed in range(60):
        (view,) = method.views(image, boxes, np.random.default_rng(seed))
        sizes.add(view.size)
        bright = view.image[..., 0] > 127
        if not len(view.boxes):
            gone += 1
            assert bright.sum() < 80
            continue
        rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        if len(rows) < 4 or len(columns) < 4:
            continue
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(view.boxes[0] - seen).max() <= 1.5
    assert len(sizes) > 20
    assert gone < 30


def test_crop_is_detrs():
    """Sides 384 to 600 px of an image resized to a short side of 400, 500 or 600, in the image's own px."""
    view = View(np.zeros((500, 900, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    heights, widths = zip(*(detr_crop(view, np.random.default_rng(i)).size for i in range(300)), strict=True)
    assert min(heights) >= 384 * 500 / 600 - 1
    assert max(heights) == 500
    assert min(widths) >= 384 * 500 / 600 - 1
    assert max(widths) <= 600 * 500 / 400 + 1
    assert max(widths) > 600 * 500 / 500, "an image of 400 px, where 600 are 750 of its own"
    assert min(widths) < 384 * 500 / 500, "an image of 600 px, where 384 are 320 of its own"


# ---- what is logged -------------------------------------------------------------------------------------------------


def test_watch_against_loops(photo):
    wrapped = detector(num_queries=6)
    method = detreg(wrapped)
    model = Pretraining(method, wrapped).eval()
    views = two_sizes(method, photo)
    with torch.no_grad():
        model(Views(views))
    watched = model.watch()
    answered = method._answered
    image, query, object_ = (x.tolist() for x in answered.matches)
    ious, right = [], 0
    for i, q, o in zip(image, query, object_, strict=True):
        a = corners(answered.boxes_cxcywh[i, q].tolist())
        b = corners(answered.objects.boxes_cxcywh[i][o].tolist())
        area = lambda box: max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
        common = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
        ious.append(common / (area(a) + area(b) - common))
        k = len(answered.objects.boxes_cxcywh[i])
        right += q in sorted(range(6), key=lambda n: -answered.scores[i, n].item())[:k]
    assert watched["objects"] == 2.5
    assert watched["matched_iou"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert watched["foreground"] == pytest.approx(right / len(image), abs=1e-3)
    assert watched["spread"] > 0


def test_watch_by_hand():
    """Two objects, found by the surest and the third surest query: one of the two surest is right."""
    method = DETReg(DETRegSettings())
    wanted = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])  # the left half, the right half
    found = torch.stack([wanted[0], torch.zeros(4), torch.tensor([0.75, 0.25, 0.5, 0.5]), torch.zeros(4)])[None]
    matches = torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([0, 1])
    objects = Objects([wanted], [torch.ones(2, dtype=torch.int64)])
    scores, described = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0], [1.0, 4.0]])
    method._answered = Answered(scores, found, matches, objects, described)
    expected = {"objects": 2.0, "matched_iou": 0.75, "foreground": 0.5, "spread": round(2**0.5 / 2 / 2, 4)}
    assert method.watch([], None) == expected


def test_crops_that_look_alike_are_warned_of():
    method = DETReg(DETRegSettings())
    assert method.warnings({}) is None
    assert "--start" in method.warnings({"objects": 3.0, "spread": 0.001})
    assert "proposals" in method.warnings({"objects": 0.0})
    assert method.warnings({"objects": 3.0, "spread": 0.4}) is None


# ---- settings -------------------------------------------------------------------------------------------------------


def test_numbers_of_the_paper():
    wrapped = detector()
    method = DETReg(DETRegSettings())
    assert (method.detector, method.epochs, method.settings.stage) == ("deformable_detr", 50, 3)
    loss = method.set_loss(wrapped)
    assert (loss.kind, loss.class_weight, loss.l1_weight, loss.giou_weight) == ("focal", 2, 5, 2)
    advised = method.optimizer(wrapped, 24)
    assert (advised.optimizer, advised.base_lr, advised.base_batch) == ("adamw", 2e-4, 24)
    assert (advised.weight_decay, advised.clip, advised.schedule, advised.drops) == (1e-4, 0.1, "steps", [0.8])
    assert advised.lr_scale == {"sampling_offsets": 0.1, "reference_points": 0.1}
    from headstart.proposals import ProposalSettings

    found = ProposalSettings(**method.proposals)
    assert (found.engine, found.squash_px, found.top_k) == ("opencv", 128, 30)


def test_exported_is_all_but_the_class_layer():
    method = DETReg(DETRegSettings())
    assert list(method.exported_parts(detector("detr"))) == ["backbone", "neck", "encoder", "decoder", "regressor"]
    assert "proposer" in method.exported_parts(detector("two_stage"))


def test_a_random_backbone_and_a_detector_without_queries_are_refused(tmp_path, scenes):
    import headstart

    with pytest.raises(SettingsError, match=r"detreg freezes the backbone.*--start"):
        headstart.pretrain("detr", scenes / "unlabelled", "detreg", backbone="resnet18", out=tmp_path / "x", show=False)
    with pytest.raises(SettingsError, match=r"detreg trains queries .*, which a fcos does not have"):
        DETReg.check(detectors.build(detectors.parse_settings({"name": "fcos", "backbone": "resnet18"})))


def test_a_map_the_backbone_does_not_have_is_refused():
    with pytest.raises(SettingsError, match=r"method.stage=6: .*stride 64"):
        detreg(detector(), stage=6)
