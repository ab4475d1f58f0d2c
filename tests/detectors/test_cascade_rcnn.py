"""Cascade R-CNN against one-image, one-box loops, and against torchvision's own heads where they mean the same."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign

from headstart import detectors
from headstart.datasets.detection import load_detection_data
from headstart.datasets.torch_dataset import DetectionDataset
from headstart.detectors.builders.cascade import STAGES, CascadePredictor, CascadeRoIHeads, without_empty
from headstart.detectors.cascade_rcnn import CascadeRCNN, CascadeRCNNSettings
from headstart.detectors.rcnn import RCNN, RCNNSettings
from headstart.detectors.weights import load_state

IOUS = [0.5, 0.6, 0.7]
WEIGHTS = [1.0, 0.5, 0.25]
CODERS = [(10.0, 5.0), (20.0, 10.0), (30.0, 15.0)]  # of the centre, of the sides
SHAPES = [(48, 64), (64, 56)]


# ---- plain references ------------------------------------------------------------------------------------------------


def plain_iou(a: Tensor, b: Tensor) -> float:
    width = max(0.0, float(min(a[2], b[2]) - max(a[0], b[0])))
    height = max(0.0, float(min(a[3], b[3]) - max(a[1], b[1])))
    areas = sum(float((x[2] - x[0]) * (x[3] - x[1])) for x in (a, b))
    return width * height / (areas - width * height)


def plain_decode(deltas: Tensor, box: Tensor, stage: int, shape: tuple[int, int]) -> Tensor:
    """The box moved by its deltas, inside the image."""
    (dx, dy, dw, dh), (x1, y1, x2, y2) = deltas.tolist(), box.tolist()
    centre, side = CODERS[stage]
    w, h = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + dx / centre * w, (y1 + y2) / 2 + dy / centre * h
    w, h = w * math.exp(dw / side), h * math.exp(dh / side)
    height, width = shape
    corners = [(x - w / 2, width), (y - h / 2, height), (x + w / 2, width), (y + h / 2, height)]
    return torch.tensor([min(max(value, 0.0), most) for value, most in corners])


def plain_encode(goal: Tensor, box: Tensor, stage: int) -> Tensor:
    centre, side = CODERS[stage]
    (gx1, gy1, gx2, gy2), (x1, y1, x2, y2) = goal.tolist(), box.tolist()
    w, h, gw, gh = x2 - x1, y2 - y1, gx2 - gx1, gy2 - gy1
    dx, dy = (gx1 + gx2 - x1 - x2) / 2 / w, (gy1 + gy2 - y1 - y2) / 2 / h
    return torch.tensor([dx * centre, dy * centre, math.log(gw / w) * side, math.log(gh / h) * side])


def plain_answer(box: Tensor, target: dict[str, Tensor], stage: int) -> int | None:
    """Index of the object that ``box`` is positive for."""
    overlaps = [plain_iou(box, other) for other in target["boxes"]]
    best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
    return best if best is not None and overlaps[best] >= IOUS[stage] else None


def look(heads: CascadeRoIHeads, stage: int, features: dict[str, Tensor], image: int, box: Tensor) -> Tensor:
    """What one box of one image is to a stage's box head, (width,)."""
    alone = {name: map_[image : image + 1] for name, map_ in features.items()}
    return heads.box_heads[stage](heads.box_roi_pool(alone, [box[None]], SHAPES[image : image + 1]))[0]


# ---- pieces ----------------------------------------------------------------------------------------------------------


def make_heads(seed: int = 0, **options) -> CascadeRoIHeads:
    """Without batch norm, through which boxes would see each other."""
    torch.manual_seed(seed)
    stages = options.get("stages", STAGES)
    return CascadeRoIHeads(
        MultiScaleRoIAlign(["0", "1"], 7, 2),
        [TwoMLPHead(4 * 49, 16) for _ in stages],
        [CascadePredictor(16, 4) for _ in stages],
        **options,
    )


def make_features() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"0": torch.randn(2, 4, 16, 16), "1": torch.randn(2, 4, 8, 8)}


def make_targets() -> list[dict[str, Tensor]]:
    boxes = [[[4.0, 4, 30, 34], [28, 10, 60, 40]], [[10.0, 20, 40, 60]]]
    return [
        {"boxes": torch.tensor(boxes[0]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.tensor(boxes[1]), "labels": torch.tensor([2])},
    ]


def make_proposals() -> list[Tensor]:
    """Around the objects, at all IoUs, and some elsewhere."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for target, (height, width) in zip(make_targets(), SHAPES, strict=True):
        near = target["boxes"].repeat(6, 1) + torch.empty(6 * len(target["boxes"]), 4).uniform_(
            -7, 7, generator=generator
        )
        far = torch.tensor([[0.0, 0, 9, 12], [40, 40, 50, 46], [44, 2, 52, 9], [2, 40, 8, 47]]).repeat(2, 1)
        boxes = torch.cat([near, far])
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        found.append(boxes)
    return found


# ---- the heads -------------------------------------------------------------------------------------------------------


def test_training_agrees_with_a_loop_over_images_and_boxes():
    heads, features, targets = make_heads(), make_features(), make_targets()
    result, losses = heads.train()(features, make_proposals(), SHAPES, targets)
    assert result == []

    boxes, positive_counts = make_proposals(), []
    for stage in range(3):
        logits, labels, distances, refined = [], [], [], [[], []]
        for image, target in enumerate(targets):
            for box in [*boxes[image], *target["boxes"]]:
                hidden = look(heads, stage, features, image, box)
                predictor = heads.box_predictors[stage]
                deltas = predictor.bbox_pred(hidden)
                answer = plain_answer(box, target, stage)
                logits.append(predictor.cls_score(hidden))
                labels.append(0 if answer is None else int(target["labels"][answer]))
                if answer is not None:
                    off = (deltas - plain_encode(target["boxes"][answer], box, stage)).abs()
                    distances.append(torch.where(off < 1 / 9, 4.5 * off**2, off - 1 / 18).sum())
                refined[image].append(plain_decode(deltas, box, stage, SHAPES[image]))
        classes = F.cross_entropy(torch.stack(logits), torch.tensor(labels))
        torch.testing.assert_close(losses[f"loss_classifier_{stage + 1}"], WEIGHTS[stage] * classes)
        wanted = WEIGHTS[stage] * torch.stack(distances).sum() / len(labels)
        torch.testing.assert_close(losses[f"loss_box_reg_{stage + 1}"], wanted)
        boxes = [torch.stack(of_image) for of_image in refined]
        positive_counts.append(sum(label > 0 for label in labels))
    assert len(losses) == 6
    # The case says something only if the stages differ in whom they take.
    assert positive_counts[0] > positive_counts[2] > 3


def test_each_stage_samples_anew_a_quarter_of_them_positive():
    heads, seen = make_heads(batch_size_per_image=8).train(), []
    heads.box_roi_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    heads(make_features(), make_proposals(), SHAPES, make_targets())
    assert len(seen) == 3
    for stage, boxes in enumerate(seen):
        for of_image, target in zip(boxes, make_targets(), strict=True):
            assert len(of_image) <= 8
            positive = sum(plain_answer(box, target, stage) is not None for box in of_image)
            assert 1 <= positive <= 2  # at least the object itself, which every stage is given
    assert all(len(of_image) == 8 for of_image in seen[0])


def test_detections_agree_with_a_loop_over_images_and_boxes():
    """Probabilities are averaged over the stages, each on its own boxes; boxes are the last stage's."""
    heads = make_heads(score_thresh=0.0, nms_thresh=1.0, detections_per_img=10_000).eval()
    features, proposals = make_features(), make_proposals()
    with torch.no_grad():
        found, losses = heads(features, proposals, SHAPES)
        assert losses == {}
        for image, detections in enumerate(found):
            expected = []
            for box in proposals[image]:
                scores = []
                for stage in range(3):
                    hidden = look(heads, stage, features, image, box)
                    scores.append(heads.box_predictors[stage].cls_score(hidden).softmax(0))
                    box = plain_decode(heads.box_predictors[stage].bbox_pred(hidden), box, stage, SHAPES[image])
                mean = sum(scores) / 3
                expected += [(float(mean[label]), label, box) for label in (1, 2, 3)]
            expected.sort(key=lambda one: -one[0])
            assert list(detections) == ["boxes", "labels", "scores"]
            torch.testing.assert_close(detections["scores"], torch.tensor([score for score, _, _ in expected]))
            assert detections["labels"].tolist() == [label for _, label, _ in expected]
            torch.testing.assert_close(detections["boxes"], torch.stack([box for *_, box in expected]))


def torchvisions_heads(heads: CascadeRoIHeads) -> RoIHeads:
    """The first stage as torchvision has it: the same box layer again for every class."""
    ours = heads.box_predictors[0]
    predictor = FastRCNNPredictor(16, 4)
    predictor.cls_score.load_state_dict(ours.cls_score.state_dict())
    agnostic = ours.bbox_pred.state_dict()
    predictor.bbox_pred.load_state_dict({"weight": agnostic["weight"].repeat(4, 1), "bias": agnostic["bias"].repeat(4)})
    box_head = copy.deepcopy(heads.box_heads[0])
    return RoIHeads(heads.box_roi_pool, box_head, predictor, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100)


def test_one_stage_is_torchvisions_own_head():
    heads = make_heads(stages=STAGES[:1])
    theirs = torchvisions_heads(heads)
    inputs = make_features(), make_proposals(), SHAPES, make_targets()
    _, a = heads.train()(*inputs)
    _, b = theirs.train()(*inputs)
    torch.testing.assert_close(a["loss_classifier_1"], b["loss_classifier"])
    torch.testing.assert_close(a["loss_box_reg_1"], b["loss_box_reg"])
    with torch.no_grad():
        ours, reference = heads.eval()(*inputs[:3])[0], theirs.eval()(*inputs[:3])[0]
    for c, d in zip(ours, reference, strict=True):
        assert len(c["boxes"]) > 0
        assert c.keys() == d.keys()
        for key in c:
            torch.testing.assert_close(c[key], d[key])


def test_three_equal_stages_that_move_nothing_are_one():
    heads = make_heads(stages=[(0.5, (10.0, 10.0, 5.0, 5.0), 1.0)] * 3)
    nn.init.zeros_(heads.box_predictors[0].bbox_pred.weight)
    nn.init.zeros_(heads.box_predictors[0].bbox_pred.bias)
    for stage in (1, 2):
        heads.box_heads[stage].load_state_dict(heads.box_heads[0].state_dict())
        heads.box_predictors[stage].load_state_dict(heads.box_predictors[0].state_dict())
    theirs = torchvisions_heads(heads)
    # An image without objects, so that no stage appends any.
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    inputs = make_features(), make_proposals(), SHAPES
    _, losses = heads.train()(*inputs, nothing)
    _, reference = theirs.train()(*inputs, nothing)
    for stage in (1, 2, 3):
        torch.testing.assert_close(losses[f"loss_classifier_{stage}"], reference["loss_classifier"])
        assert losses[f"loss_box_reg_{stage}"] == 0
    with torch.no_grad():
        for a, b in zip(heads.eval()(*inputs)[0], theirs.eval()(*inputs)[0], strict=True):
            for key in a:
                torch.testing.assert_close(a[key], b[key])


def test_refined_boxes_have_no_gradient_and_the_first_stage_none_from_the_second():
    heads = make_heads().train()
    _, losses = heads(make_features(), make_proposals(), SHAPES, make_targets())
    (losses["loss_classifier_2"] + losses["loss_box_reg_2"]).backward()
    assert all(p.grad is not None for p in heads.box_heads[1].parameters())
    assert all(p.grad is None for p in [*heads.box_heads[0].parameters(), *heads.box_predictors[0].parameters()])


def test_empty_boxes_leave_unless_none_would_be_left():
    kept, flat = torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([[3.0, 3, 3, 9]])
    given = [torch.cat([kept, kept]), kept]
    a, b = without_empty([torch.cat([flat, kept]), flat], given)
    assert torch.equal(a, kept)
    assert b.shape == (0, 4)
    assert without_empty([flat, flat], given) is given


def test_as_many_heads_as_stages():
    with pytest.raises(ValueError, match="2 stages, 3 box heads, 3 box predictors"):
        CascadeRoIHeads(MultiScaleRoIAlign(["0"], 7, 2), [nn.Identity()] * 3, [nn.Identity()] * 3, STAGES[:2])


# ---- the detector ----------------------------------------------------------------------------------------------------


def build(tiny: dict, seed: int = 0, **settings) -> CascadeRCNN:
    torch.manual_seed(seed)
    return detectors.build(CascadeRCNNSettings(num_classes=3, **{**tiny, **settings}))


@pytest.mark.parametrize("head", ["4conv1fc", "2fc"])
def test_plain_code_builds_the_same_detector(tiny, head):
    ours = build(tiny, head=head).eval()
    code = ours.plain_code()
    assert "headstart" not in code.lower()
    scope: dict = {}
    exec(code, scope)
    theirs = scope["detector"].eval()
    theirs.load_state_dict(ours.module.state_dict())
    images = [torch.rand(3, 50, 70), torch.rand(3, 80, 60)]
    with torch.no_grad():
        for a, b in zip(ours.detect(images), theirs(images), strict=True):
            assert len(a["boxes"]) > 0
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key])
    assert type(detectors.wrap(theirs)) is type(detectors.wrap(ours.module)) is CascadeRCNN


def test_other_detectors_are_other_families(tiny):
    faster = detectors.build(RCNNSettings(num_classes=3, **tiny)).module
    assert type(detectors.wrap(faster)) is RCNN
    assert not CascadeRCNN.accepts(faster)
    assert not CascadeRCNN.accepts(nn.Linear(1, 1))


def test_settings_are_those_of_rcnn_on_a_pyramid():
    parsed = detectors.parse_settings({"name": "cascade_rcnn", "rois_train": 7})
    assert isinstance(parsed, CascadeRCNNSettings)
    assert set(RCNNSettings.model_fields) - set(CascadeRCNNSettings.model_fields) == {"neck"}
    with pytest.raises(ValidationError, match="it takes 5 sides"):
        CascadeRCNNSettings(anchor_px=[8])
    for sampler in build({"rois_train": 7, "backbone": "resnet18"}).module.roi_heads.rules:
        assert sampler.fg_bg_sampler.batch_size_per_image == 7


def test_every_parameter_belongs_to_one_part(tiny):
    detector = build(tiny)
    prefixes = [p for group in detector.prefixes.values() for p in group]
    for name, _ in detector.module.named_parameters():
        assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name
    assert sum(len(detector.part_state([part])) for part in detector.parts) == len(detector.module.state_dict())
    assert detector.parts["head"] is detector.module.roi_heads.box_heads[0]
    assert [len(detector.parts[name]) for name in ("later_heads", "classifier", "regressor")] == [2, 3, 3]
    assert all(layer.out_features == 4 for layer in detector.parts["regressor"])


def test_batched_is_single(tiny):
    detector = build(tiny).eval()
    images = [torch.rand(3, 64, 80) for _ in range(3)]
    with torch.no_grad():
        together = detector.detect(images)
        alone = [detector.detect([image])[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        assert len(a["boxes"]) > 0
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=1e-4)


def test_an_image_without_proposals_has_no_detections(tiny):
    detector = build(tiny).eval()
    detector.module.rpn.score_thresh = 2.0
    with torch.no_grad():
        for found in detector.detect([torch.rand(3, 64, 64), torch.rand(3, 64, 80)]):
            assert found["boxes"].shape == (0, 4)
            assert found["labels"].shape == found["scores"].shape == (0,)


def test_it_learns_and_every_parameter_has_a_gradient(tiny, scenes):
    samples = DetectionDataset(load_detection_data(scenes / "train.json"))
    images, targets = zip(*(samples[i] for i in range(4)), strict=True)
    torch.manual_seed(0)
    classes = max(int(target["labels"].max()) for target in targets)
    detector = detectors.build(CascadeRCNNSettings(num_classes=classes, **tiny)).train()
    optimiser = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    totals = []
    for _ in range(14):
        losses = detector.loss(images, targets)
        total = torch.stack(list(losses.values())).sum()
        optimiser.zero_grad()
        total.backward()
        if not totals:
            for name, parameter in detector.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
                assert "roi_heads" not in name or parameter.grad.any(), name
        optimiser.step()
        totals.append(float(total.detach()))
    assert {f"loss_{kind}_{stage}" for kind in ("classifier", "box_reg") for stage in (1, 2, 3)} <= set(losses)
    assert sum(totals[-2:]) < 0.7 * sum(totals[:2]), totals


# ---- abilities -------------------------------------------------------------------------------------------------------


def test_embedding_and_rpn_are_a_faster_rcnns(tiny):
    """Whose weights are taken over, its box head by all three stages."""
    torch.manual_seed(3)
    faster = detectors.build(RCNNSettings(num_classes=3, **tiny)).eval()
    cascade = build(tiny).eval()
    state, notes = cascade.adapt(faster.module.state_dict())
    assert notes == ["the one box head in the file copied to stages 1, 2, 3"]
    report = load_state(cascade.module, state, "faster")
    assert {key.split(".")[1] for key in report.missing} == {"box_predictors"}
    assert {key.split(".")[1] for key in report.unexpected} == {"box_predictor"}
    for stage in range(3):
        for key, value in cascade.module.roi_heads.box_heads[stage].state_dict().items():
            assert torch.equal(value, faster.module.roi_heads.box_head.state_dict()[key])

    images = torch.rand(2, 3, 64, 64)
    boxes = torch.tensor([[[0.0, 0, 30, 30], [5, 5, 60, 60]]] * 2)
    assert cascade.anchor_px == faster.anchor_px
    assert cascade.embed_width() == faster.embed_width()
    results = []
    for detector in (faster, cascade):
        torch.manual_seed(4)
        features = detector.features(images)
        losses = detector.rpn_loss(features, list(boxes), (64, 64), detector.anchor_px)
        found = detector.rpn_boxes(features, (64, 64), detector.anchor_px, 50, 20)
        results.append([detector.embed(features, boxes, (64, 64)), *losses.values(), *found])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_pretrained_first_head_becomes_all_three(tiny):
    """What a method that trains ``head`` alone leaves behind; a whole cascade stays as it is."""
    source, detector = build(tiny, seed=1), build(tiny, seed=2)
    state, notes = detector.adapt(source.part_state(["backbone", "neck", "rpn", "head"]))
    assert notes == ["stage 1's box head in the file copied to stages 2, 3"]
    report = load_state(detector.module, state, "file")
    assert not report.unexpected
    assert {key.split(".")[1] for key in report.missing} == {"box_predictors"}
    for head in detector.module.roi_heads.box_heads:
        for key, value in head.state_dict().items():
            assert torch.equal(value, source.module.roi_heads.box_heads[0].state_dict()[key])

    whole = source.module.state_dict()
    # A single box head beside a row of them is not used, so the report has to be able to say so.
    both = {**whole, "roi_heads.box_head.fc6.weight": torch.ones(1)}
    for untouched in (whole, both, source.part_state(["backbone"])):
        state, notes = detector.adapt(untouched)
        assert notes == []
        assert state.keys() == untouched.keys()
        assert all(state[key] is untouched[key] for key in state)
    # Levels of the pyramid are moved besides.
    finer = {key.replace("blocks.0.", "blocks.4."): value for key, value in whole.items()}
    assert len(detector.adapt(finer)[1]) == 1


def made_for_match(tiny: dict, **settings) -> tuple[CascadeRCNN, Tensor, Tensor, list[dict[str, Tensor]], nn.Module]:
    detector = build(tiny, head="2fc", fpn_norm="none", **settings).eval()
    torch.manual_seed(5)
    images = torch.rand(2, 3, 64, 64)
    for image, (height, width) in zip(images, SHAPES, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return detector, images, torch.tensor(SHAPES), make_targets(), detector.projector(12, 6)


def test_matching_agrees_with_a_loop_over_images_and_boxes(tiny):
    detector, images, sizes, targets, projector = made_for_match(tiny)
    heads = detector.module.roi_heads
    with torch.no_grad():
        # The RPN of a fresh detector finds nothing; boxes near the objects stand in for its own.
        maps, _, rpn = detector.regions(images, sizes, targets, losses=True)
        detector.regions = lambda *_: (maps, make_proposals(), dict(rpn))
        matched = detector.match(images, sizes, targets, projector, most=1000)

        boxes, embeddings, answers, total = make_proposals(), [], [], 0.0
        counts = []
        for stage in range(3):
            refined, distances = [[], []], []
            for image, target in enumerate(targets):
                for box in [*boxes[image], *target["boxes"]]:
                    answer = plain_answer(box, target, stage)
                    if answer is None:
                        continue
                    hidden = look(heads, stage, maps, image, box)
                    deltas = heads.box_predictors[stage].bbox_pred(hidden)
                    embeddings.append(projector(hidden))
                    answers.append((image, answer))
                    off = (deltas - plain_encode(target["boxes"][answer], box, stage)).abs()
                    distances.append(float(torch.where(off < 1 / 9, 4.5 * off**2, off - 1 / 18).sum()))
                    refined[image].append(plain_decode(deltas, box, stage, SHAPES[image]))
            total += WEIGHTS[stage] * sum(distances) / len(distances)
            counts.append(len(distances))
            boxes = [torch.stack(of_image) for of_image in refined]
    assert counts[0] > counts[2] > 3
    torch.testing.assert_close(matched.embeddings, torch.stack(embeddings))
    assert list(zip(matched.image.tolist(), matched.box.tolist(), strict=True)) == answers
    assert set(matched.losses) == {"rpn_objectness", "rpn_boxes", "boxes"}
    torch.testing.assert_close(matched.losses["boxes"], torch.tensor(total))


def test_matching_shares_what_may_be_kept_between_the_stages(tiny):
    detector, images, sizes, targets, projector = made_for_match(tiny)
    seen: list[int] = []
    for head in detector.module.roi_heads.box_heads:
        head.register_forward_hook(lambda *arguments: seen.append(len(arguments[-1])))
    maps = detector.maps(images)
    detector.regions = lambda *_: (maps, make_proposals(), {})
    for most, shares in [(9, [3, 3, 3]), (10, [4, 3, 3]), (2, [1, 1, 1])]:
        seen.clear()
        matched = detector.match(images, sizes, targets, projector, most=most, losses=False)
        assert seen == shares  # the last 1 is a stand-in that nothing is kept of
        assert len(matched.embeddings) == len(matched.image) == len(matched.box) == most
        assert matched.losses == {}


def test_matching_does_not_see_the_padding(tiny):
    detector, images, sizes, targets, projector = made_for_match(tiny)
    noisy = images.clone()
    noisy[0, :, SHAPES[0][0] :] = 1
    with torch.no_grad():
        results = []
        for batch in (images, noisy):
            torch.manual_seed(6)
            results.append(detector.match(batch, sizes, targets, projector, most=1000))
    torch.testing.assert_close(results[0].embeddings, results[1].embeddings)
    torch.testing.assert_close(results[0].losses, results[1].losses)


@pytest.mark.parametrize("objects", [True, False])
def test_matching_gives_every_layer_but_the_classifiers_a_gradient(tiny, objects):
    detector = build(tiny).train()
    projector = detector.projector(12, 6)
    targets = make_targets()
    if not objects:
        targets = [{"boxes": t["boxes"][:0], "labels": t["labels"][:0]} for t in targets]
    matched = detector.match(torch.rand(2, 3, 64, 64), torch.tensor(SHAPES), targets, projector, most=64)
    assert (len(matched.embeddings) > 0) is objects
    assert matched.embeddings.shape[1] == 6
    total = matched.embeddings.square().sum() + sum(matched.losses.values())
    assert total.isfinite()
    total.backward()
    classifier = detector.prefixes["classifier"]
    for name, parameter in [*detector.module.named_parameters(), *projector.named_parameters("projector.")]:
        assert (parameter.grad is None) == name.startswith(classifier), name
        if objects and "roi_heads" in name and parameter.grad is not None:
            assert parameter.grad.any(), name
