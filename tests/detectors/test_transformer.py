"""What DETR and Deformable DETR share: padding, who looks at whom, losses, and a module that lives without us."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from headstart import detectors, matching
from headstart.datasets.detection import load_detection_data
from headstart.detectors import builders
from headstart.detectors.builders.backbones import timm_body
from headstart.detectors.builders.deformable_detr import deformable_detr
from headstart.detectors.builders.detr import detr
from headstart.detectors.builders.transformer import covered, valid_cells
from headstart.detectors.rcnn import RCNNSettings
from headstart.detectors.set_loss import Objects
from headstart.errors import DataError, SettingsError
from headstart.settings import validate
from headstart.verbs.pretrain import Pretraining
from headstart.verbs.start import for_family

SMALL = {
    "backbone": "test_resnet",
    "num_classes": 3,
    "num_queries": 8,
    "width": 32,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "feedforward": 24,
    "short_side_px": 64,
    "long_side_px": 96,
}
KINDS = {
    "detr": {"name": "detr"},
    "detr, norms before": {"name": "detr", "pre_norm": True},
    "deformable": {"name": "deformable_detr"},
    "deformable, one map": {"name": "deformable_detr", "levels": 1},
    "deformable, refined": {"name": "deformable_detr", "refine": True},
    "deformable, two stages": {"name": "deformable_detr", "refine": True, "two_stage": True},
}
every = pytest.mark.parametrize("kind", list(KINDS))
one_stage = pytest.mark.parametrize("kind", [kind for kind in KINDS if "two" not in kind])
both = pytest.mark.parametrize("kind", ["detr", "deformable, two stages"])


def build(kind: str, **changes):
    torch.manual_seed(0)
    detector = detectors.build(detectors.parse_settings({**SMALL, **KINDS[kind], **changes}))
    with torch.no_grad():  # away from the start, at which all places look the same
        for name, parameter in detector.module.named_parameters():
            if "backbone" not in name:
                parameter += 0.05 * torch.randn_like(parameter)
    return detector


def example():
    """Two images of other sizes on one canvas, with numbers in the padding that must not matter; and their boxes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 96, generator=generator)
    sizes = torch.tensor([[64, 96], [50, 70]])
    boxes = [[[4.0, 3, 40, 50], [30, 10, 90, 60], [8, 8, 20, 24]], [[2.0, 2, 30, 45]]]
    targets = [{"boxes": torch.tensor(b), "labels": torch.arange(len(b)) + 1} for b in boxes]
    return images, sizes, targets


def empty():
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-4)


# ---- what it is built of -----------------------------------------------------------------------------------------


@every
def test_every_parameter_belongs_to_one_part(kind):
    detector = build(kind)
    prefixes = [p for group in detector.prefixes.values() for p in group]
    for name in detector.module.state_dict():
        assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name
    held = [id(p) for part in detector.parts.values() for p in part.parameters()]
    assert sorted(held) == sorted(id(p) for p in detector.module.parameters())
    proposer = ["proposer"] if "two" in kind else []
    assert list(detector.parts) == ["backbone", "neck", "encoder", *proposer, "decoder", "classifier", "regressor"]
    assert len(detector.part_state(["encoder"])) == len(
        [n for n in detector.module.state_dict() if "encoder." in n]
    ) + ("deformable" in kind)


@every
def test_plain_code_builds_the_same_detector(kind):
    """The text in ``load_in_torchvision.py`` knows nothing of us, and gives the same detections."""
    ours = build(kind)
    code = ours.plain_code()
    assert "headstart" not in code
    scope: dict = {}
    exec(code, scope)
    theirs = scope["detector"]
    theirs.load_state_dict(ours.module.state_dict())
    images = [torch.rand(3, 50, 70), torch.rand(3, 80, 60)]
    with torch.no_grad():
        for a, b in zip(ours.eval().detect(images), theirs.eval()(images), strict=True):
            assert a.keys() == b.keys() == {"boxes", "labels", "scores"}
            for key in a:
                assert torch.equal(a[key], b[key])
            assert (a["scores"][:-1] >= a["scores"][1:]).all()
        outputs = theirs.train()(images)
    assert outputs["logits"].shape[:3] == outputs["boxes"].shape[:3] == (2, 2, 8)
    assert ("first" in outputs) == ("two" in kind)


def test_names_in_the_builders_are_unique():
    """Their texts stand side by side in one file: the last of two definitions would win."""
    names: list[str] = []
    for file in sorted(Path(builders.__file__).parent.glob("*.py")):
        nodes = ast.parse(file.read_text(encoding="utf-8")).body
        names += [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names)) > 20


def test_own_objects_are_taken():
    transform = {"min_size": 64, "max_size": 96, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}
    small = {"num_classes": 3, "num_queries": 5, "width": 16, "heads": 2, "feedforward": 8, "dropout": 0.0}
    small |= {"encoder_layers": 1, "decoder_layers": 1, "detections": 9, **transform}

    def body(maps):
        return timm_body("resnet18", maps, {"channels": (8, 8, 16, 16), "stem_width": 8})

    stages = {"levels": 4, "points": 2, "refine": False, "two_stage": False}
    for module, family in (
        (detr(body((4,)), pre_norm=False, **small), "detr"),
        (deformable_detr(body((2, 3, 4)), **stages, **small), "deformable_detr"),
    ):
        wrapped = detectors.wrap(module)
        assert wrapped.module is module
        assert wrapped.family == family
        assert wrapped.plain_code() is None
        assert (wrapped.query_count, wrapped.query_width, wrapped.input_px) == (5, 16, (64, 96))
        images, _, targets = example()
        assert set(wrapped.loss(list(images), targets)) == {"class", "l1", "giou"}


def test_a_run_of_another_family_hands_over_what_both_have():
    theirs = RCNNSettings(backbone="resnet18", short_side_px=123).model_dump()
    assert for_family("detr", theirs)["short_side_px"] == 123
    assert "fpn_channels" not in for_family("deformable_detr", theirs)
    shared = for_family("faster_rcnn", build("deformable").settings.model_dump())
    assert shared["backbone"] == SMALL["backbone"]
    assert "width" not in shared


@pytest.mark.parametrize("name", ["detr", "deformable_detr"])
def test_wrong_settings_say_what_was_expected(name):
    for values in ({"width": 30, "heads": 5}, {"width": 32, "heads": 3}):
        with pytest.raises(SettingsError, match="expected a multiple of both heads and 4"):
            validate(detectors.settings_type(name), values)
    with pytest.raises(SettingsError, match=r"expected .*Settings"):
        detectors.family(name).build(RCNNSettings())
    with pytest.raises(SettingsError, match="strides"):
        build("deformable" if name == "deformable_detr" else "detr", backbone="vit_tiny_patch16_224")


# ---- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [(64, 96), (97, 130), (33, 31)])
def test_cells_of_the_padding_are_those_of_a_resized_mask(full):
    """A mask of the pixels, resized to the map by nearest neighbours, as the original does it."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.stack([torch.randint(1, side + 1, (20,), generator=generator) for side in full], dim=1)
    for sides in ((13, 17), (7, 9), (2, 3), (1, 1)):
        pixels = torch.zeros(20, 1, *full)
        for of_image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
            of_image[:, :height, :width] = 1
        wanted = nn.functional.interpolate(pixels, size=sides)[:, 0].bool()
        assert torch.equal(valid_cells(covered(sizes, full, sides), torch.zeros(20, 1, *sides)), wanted)
    assert valid_cells(None, torch.zeros(2, 5, 3, 4)).all()


@every
def test_what_is_in_the_padding_and_in_other_images_does_not_matter(kind):
    detector = build(kind).eval()
    images, sizes, _ = example()
    with torch.no_grad():
        together = detector.queries(images, sizes)
        for i in range(2):
            alone = images[i : i + 1].clone()
            alone[:, :, int(sizes[i, 0]) :] = 7
            alone[:, :, :, int(sizes[i, 1]) :] = 7
            single = detector.queries(alone, sizes[i : i + 1])
            same(single.hidden[:, 0], together.hidden[:, i])
            same(single.boxes_cxcywh[:, 0], together.boxes_cxcywh[:, i])
            for a, b, valid in zip(single.memory, together.memory, together.valid, strict=True):
                same(a[0][:, valid[i]], b[i][:, valid[i]])


@every
def test_without_padding_no_mask_is_needed(kind):
    detector = build(kind).eval()
    images, _, _ = example()
    whole = torch.tensor([[64, 96]] * 2)
    with torch.no_grad():
        plain, sized = detector.queries(images), detector.queries(images, whole)
        assert torch.equal(plain.hidden, sized.hidden)
        masked = detector.module.answer(detector.normalise(images), whole)  # with masks that hide nothing
    same(plain.hidden, masked.hidden)
    same(plain.boxes_cxcywh, masked.boxes)


@every
def test_images_of_a_pixel_and_less(kind):
    detector = build(kind)
    images, _, _ = example()
    answers = detector.queries(images, torch.tensor([[1, 1], [0, 0]]))
    assert torch.isfinite(answers.hidden).all()
    assert torch.isfinite(answers.boxes_cxcywh).all()
    (answers.hidden.sum() + answers.boxes_cxcywh.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


@every
def test_answers_have_the_promised_shapes(kind):
    detector = build(kind)
    images, sizes, _ = example()
    answers = detector.queries(images, sizes)
    assert answers.hidden.shape == (2, 2, detector.query_count, detector.query_width) == (2, 2, 8, 32)
    assert answers.boxes_cxcywh.shape == (2, 2, 8, 4)
    maps = {"deformable, one map": 1, "detr": 1, "detr, norms before": 1}.get(kind, 4)
    sides = [(8, 12), (4, 6), (2, 3), (1, 2)] if maps == 4 else [(2, 3)]
    assert [tuple(m.shape) for m in answers.memory] == [(2, 32, *side) for side in sides]
    assert [tuple(m.shape) for m in answers.valid] == [(2, *side) for side in sides]
    assert all(valid[0].all() for valid in answers.valid)
    assert maps == 1 or not answers.valid[0][1].all()  # 2 x 3 cells are too few to tell
    assert [tuple(m.shape) for m in detector.features(images, sizes=sizes).values()] == [(2, 32, *s) for s in sides]
    assert [tuple(m.shape) for m in detector.features(images, neck=False).values()] == [(2, 96, 2, 3)]
    if "two" in kind:
        cells = sum(height * width for height, width in sides)
        assert [tuple(x.shape) for x in answers.first] == [(2, cells, 1), (2, cells, 4)]
    else:
        assert answers.first is None


# ---- what is asked of queries --------------------------------------------------------------------------------------


@one_stage
def test_groups_that_do_not_look_at_each_other_are_independent(kind):
    detector = build(kind).eval()
    images, sizes, _ = example()
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    extra = torch.randn(2, 8, 32)
    attend = group[:, None] == group[None]
    with torch.no_grad():
        apart = detector.queries(images, sizes, extra, attend)
        extra[:, group == 1] += 1
        changed = detector.queries(images, sizes, extra, attend)
        mixed = detector.queries(images, sizes, extra)
    same(apart.hidden[:, :, group != 1], changed.hidden[:, :, group != 1])
    assert (apart.hidden - changed.hidden)[:, :, group == 1].abs().amax(dim=-1).min() > 1e-3
    assert (mixed.hidden - changed.hidden)[:, :, group != 1].abs().max() > 1e-4


# ---- losses ---------------------------------------------------------------------------------------------------------


@every
def test_the_loss_is_the_sum_over_layers(kind):
    """Of the set loss on each layer alone; and, of two stages, of the cells as proposals of one class."""
    detector = build(kind, dropout=0.0)
    images, _, targets = example()
    listed = [images[0], images[1][:, :64, :64]]
    targets[1]["boxes"].clamp_(max=60)
    found = detector.loss(listed, targets)
    batch, scaled = detector.module.transform(listed, targets)
    sizes = torch.tensor(batch.image_sizes)
    answers = detector.module.answer(batch.tensors, sizes)
    objects, rule = Objects.of(scaled, sizes), detector.set_loss
    layers = [
        rule(x[None], b[None], objects)
        for x, b in zip(detector.module.logits(answers.hidden), answers.boxes, strict=True)
    ]
    for name in ("class", "l1", "giou"):
        same(found[name], layers[0][name] + layers[1][name])
    first = {name for name in found if name.startswith("first_")}
    assert first == ({"first_class", "first_l1", "first_giou"} if "two" in kind else set())
    assert all(found[name] > 0 for name in found)
    if first:
        nameless = Objects(objects.boxes_cxcywh, [torch.ones_like(n) for n in objects.labels])
        wanted = rule(answers.first[0][None], answers.first[1][None], nameless)
        same(found["first_class"], wanted["class"])


@every
@pytest.mark.parametrize("filled", [0, 1, 2])
def test_gradients_reach_every_parameter(kind, filled):
    """Also where there is nothing to find."""
    detector = build(kind)
    images, _, targets = example()
    losses = detector.loss(list(images), [t if i < filled else empty() for i, t in enumerate(targets)])
    sum(losses.values()).backward()
    for name, parameter in detector.module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        from_zeros = "norms before" in kind and "decoder.layers.0.norm1" in name  # queries begin as nothing
        if filled and "backbone" not in name and not from_zeros:
            assert (parameter.grad != 0).any(), name
    if not filled:
        assert losses["l1"] == losses["giou"] == 0
        assert losses["class"] > 0


def test_boxes_without_area_are_refused():
    images, _, targets = example()
    targets[1]["boxes"][0, 2] = 2
    with pytest.raises(DataError, match=r"image 1 of the batch: box \[2.0.* has no area"):
        build("detr").loss(list(images), targets)


@both
@pytest.mark.parametrize("label", [0, 4])
def test_labels_beyond_the_classes_are_refused(kind, label):
    """DETR would take label C + 1 for "no object", Deformable DETR label 0 for the last class, without a word."""
    images, _, targets = example()
    detector = build(kind, num_classes=3)
    for target in targets:
        target["labels"] = torch.ones_like(target["labels"])
    detector.loss(list(images), targets)
    targets[1]["labels"][-1] = label
    with pytest.raises(DataError, match=rf"image 1 of the batch: label {label}; expected 1 to 3"):
        detector.loss(list(images), targets)


@both
def test_probabilities_are_the_scores_of_detections(kind):
    detector = build(kind)
    logits = torch.randn(2, 7, 4)
    scores, query, labels = detector.module.ranked(logits)
    found = detector.set_loss.probabilities(logits)
    torch.testing.assert_close(scores, found[torch.arange(2)[:, None], query, labels - 1])
    assert detector.set_loss.class_count(logits) == found.shape[-1]


@both
def test_autocast_keeps_boxes_and_losses_in_float32(kind):
    detector = build(kind, dropout=0.0).eval()
    images, sizes, targets = example()
    with torch.no_grad():
        exact, losses = detector.queries(images, sizes), detector.loss(list(images), targets)
        with torch.autocast("cpu", torch.bfloat16):
            rough, some = detector.queries(images, sizes), detector.loss(list(images), targets)
    assert rough.boxes_cxcywh.dtype == torch.float32
    if "two" not in kind:  # whose order of proposals may change
        torch.testing.assert_close(rough.boxes_cxcywh, exact.boxes_cxcywh, atol=0.03, rtol=0)
    for name, loss in losses.items():
        assert some[name].dtype == torch.float32
        torch.testing.assert_close(some[name], loss, rtol=0.1, atol=0.05)


# ---- matched predictions --------------------------------------------------------------------------------------------


@every
def test_one_query_answers_for_each_box(kind):
    """The pairs of least cost by boxes alone; embeddings of the last layer; losses of all layers' boxes."""
    detector = build(kind, dropout=0.0).eval()
    images, sizes, targets = example()
    torch.manual_seed(1)
    projector = detector.projector(7, 5)
    with torch.no_grad():
        matched = detector.match(images, sizes, targets, projector, most=100)
        answers = detector.queries(images, sizes)
    assert matched.image.tolist() == [0, 0, 0, 1]
    assert sorted(matched.box[:3].tolist()) == [0, 1, 2]
    objects = Objects.of(targets, sizes)
    l1 = giou = 0.0
    for boxes in answers.boxes_cxcywh:
        for i, wanted in enumerate(objects.boxes_cxcywh):
            distance = torch.cdist(boxes[i], wanted, p=1)
            overlap = matching.giou(matching.xyxy(boxes[i])[:, None], matching.xyxy(wanted)[None])
            cost = 5 * distance + 2 * (1 - overlap)
            _, query, object_ = matching.hungarian(cost[None], [len(wanted)])
            l1 += 5 * float(distance[query, object_].sum()) / 4
            giou += 2 * float((1 - overlap[query, object_]).sum()) / 4
            if boxes is answers.boxes_cxcywh[-1]:
                of_image = matched.image == i
                assert matched.box[of_image].tolist() == object_.tolist()
                same(matched.embeddings[of_image], projector(answers.hidden[-1][i, query]))
    assert matched.losses["l1"].item() == pytest.approx(l1, rel=1e-4)
    assert matched.losses["giou"].item() == pytest.approx(giou, rel=1e-4)
    assert ("first_class" in matched.losses) == ("two" in kind)


@both
@pytest.mark.parametrize("filled", [True, False])
def test_matching_images_without_boxes(kind, filled):
    detector = build(kind)
    images, sizes, targets = example()
    projector = detector.projector(6, 4)
    matched = detector.match(images, sizes, [targets[0] if filled else empty(), empty()], projector, 10)
    assert set(matched.image.tolist()) == ({0} if filled else set())
    assert matched.embeddings.shape == (len(matched.box), 4)
    (matched.embeddings.sum() + sum(matched.losses.values())).backward()
    parts = [part for name, part in detector.parts.items() if name != "classifier"]
    assert all(p.grad is not None for owner in [projector, *parts] for p in owner.parameters())
    assert detector.match(images, sizes, targets, projector, 2, losses=False).losses == {}
    assert len(detector.match(images, sizes, targets, projector, 2).box) == 2


# ---- in training ----------------------------------------------------------------------------------------------------


def test_frozen_parts_are_there_once():
    """The bare parameter among them included: a teacher shares what nobody trains."""
    detector = build("deformable")
    for part in ("backbone", "encoder"):
        detector.parts[part].requires_grad_(False)
    frozen = {id(piece) for piece in Pretraining._frozen(detector)}
    module = detector.module
    assert frozen == {id(module.backbone.body), id(module.transformer.encoder), id(module.transformer.level_embed)}


@both
def test_it_trains_and_detects(scenes, kind):
    data = load_detection_data(scenes / "train.json")
    images = [torch.from_numpy(np.array(Image.open(r.path).convert("RGB"))).permute(2, 0, 1) for r in data.images[:2]]
    targets = [{"boxes": torch.from_numpy(a.boxes), "labels": torch.from_numpy(a.labels)} for a in data.annotations[:2]]
    detector = build(kind, num_classes=len(data.categories), dropout=0.0, detections=7).train()
    optimiser = torch.optim.AdamW(detector.parameters(), lr=5e-4)
    losses = []
    for _ in range(6):
        loss = sum(detector.loss(images, targets).values())
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.95 * losses[0]
    with torch.no_grad():
        for found in detector.eval().detect(images):
            assert found["boxes"].shape == (7, 4)
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"] <= 64).all()
            assert (found["labels"] >= 1).all()
            assert (found["labels"] <= len(data.categories)).all()
