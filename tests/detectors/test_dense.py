"""What RetinaNet and FCOS share: built as torchvision builds them, and matched predictions that are dense ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import detection

from headstart import detectors
from headstart.datasets.detection import load_detection_data
from headstart.detectors.builders.backbones import Pyramid
from headstart.detectors.builders.dense import add_p6_p7
from headstart.detectors.dense import CellProjector
from headstart.detectors.fcos import FCOSSettings
from headstart.detectors.rcnn import RCNNSettings
from headstart.detectors.retinanet import RetinaNetSettings
from headstart.detectors.weights import load_state
from headstart.errors import SettingsError
from headstart.settings import validate

SETTINGS = {"retinanet": RetinaNetSettings, "fcos": FCOSSettings}
both = pytest.mark.parametrize("name", list(SETTINGS))


def build(tiny: dict, name: str, **changes):
    torch.manual_seed(0)
    shared = {key: tiny[key] for key in ("backbone", "fpn_channels", "short_side_px", "long_side_px")}
    return detectors.build(SETTINGS[name](**{**shared, "num_classes": 3, **changes}))


def shapes(module) -> dict:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def example():
    """Two images of other sizes on one canvas, with boxes, and numbers in the padding that must not matter."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 96, generator=generator)
    sizes = torch.tensor([[64, 96], [64, 70]])
    boxes = [[[4.0, 3, 40, 50], [30, 10, 90, 60], [8, 8, 20, 24]], [[2.0, 2, 30, 60], [40, 5, 69, 33]]]
    targets = [{"boxes": torch.tensor(b), "labels": torch.arange(len(b)) + 1} for b in boxes]
    return images, sizes, targets


def empty():
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (RetinaNetSettings(num_classes=5), "retinanet_resnet50_fpn_v2"),
        (RetinaNetSettings(num_classes=5, head_norm="none"), "retinanet_resnet50_fpn"),
        (FCOSSettings(num_classes=5), "fcos_resnet50_fpn"),
    ],
)
def test_defaults_are_torchvisions_models(settings, reference):
    ours = detectors.build(settings).module
    theirs = getattr(detection, reference)(weights=None, weights_backbone=None, num_classes=6)
    assert shapes(ours) == shapes(theirs)
    theirs.load_state_dict(ours.state_dict())  # strict
    assert ours.anchor_generator.sizes == theirs.anchor_generator.sizes
    assert ours.anchor_generator.aspect_ratios == theirs.anchor_generator.aspect_ratios
    assert ours.backbone.fpn.extra_blocks.use_P5 == theirs.backbone.fpn.extra_blocks.use_P5
    assert vars(ours.transform)["min_size"] == vars(theirs.transform)["min_size"]
    for name in ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for a, b in zip(ours.head.modules(), theirs.head.modules(), strict=True):
        assert type(a) is type(b)
        assert getattr(a, "num_groups", None) == getattr(b, "num_groups", None)
        assert getattr(a, "_loss_type", None) == getattr(b, "_loss_type", None)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("retinanet", {}),
        ("retinanet", {"head_norm": "none", "fpn_norm": "bn", "box_loss": "smooth_l1"}),
        ("fcos", {}),
        ("fcos", {"head_norm": "none", "p6_from": "c5", "fpn_channels": 24}),
    ],
)
def test_plain_code_builds_the_same_detector(tiny, name, changes):
    """The text in ``load_in_torchvision.py`` knows nothing of us and gives the same outputs and losses."""
    ours = build(tiny, name, min_score=0.0, detections=20, **changes)
    code = ours.plain_code()
    assert "headstart" not in code
    scope: dict = {}
    exec(code, scope)
    theirs = scope["detector"]
    theirs.load_state_dict(ours.module.state_dict())
    images = [torch.rand(3, 50, 70), torch.rand(3, 80, 60)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 45]]), "labels": torch.tensor([2])}, empty()]
    with torch.no_grad():
        for a, b in zip(ours.eval().detect(images), theirs.eval()(images), strict=True):
            assert a.keys() == b.keys()
            assert len(a["boxes"]) == 20
            for key in a:
                torch.testing.assert_close(a[key], b[key])
        losses, expected = ours.train().loss(images, targets), theirs.train()(images, targets)
    assert losses.keys() == expected.keys()
    for key in losses:
        torch.testing.assert_close(losses[key], expected[key])


@both
def test_every_parameter_belongs_to_one_part(tiny, name):
    detector = build(tiny, name, fpn_norm="bn")
    prefixes = [p for group in detector.prefixes.values() for p in group]
    for parameter, _ in detector.module.named_parameters():
        assert sum(parameter.startswith(prefix) for prefix in prefixes) == 1, parameter
    assert sum(len(detector.part_state([part])) for part in detector.parts) == len(detector.module.state_dict())
    assert sorted(detector.parts) == ["backbone", "classifier", "head", "neck", "regressor"]


@pytest.mark.parametrize(
    ("name", "make"), [("retinanet", detection.retinanet_resnet50_fpn_v2), ("fcos", detection.fcos_resnet50_fpn)]
)
def test_torchvisions_own_objects_are_taken(name, make):
    module = make(weights=None, weights_backbone=None, num_classes=3)
    wrapped = detectors.wrap(module)
    assert wrapped.module is module
    assert wrapped.family == name
    assert wrapped.plain_code() is None
    images, sizes, targets = example()
    matched = wrapped.match(images[:, :, :, :64], sizes.clamp(max=64), targets, wrapped.projector(8, 5), 30)
    assert matched.embeddings.shape == (len(matched.image), 5)


@both
def test_wrong_settings_say_what_was_expected(name):
    with pytest.raises(SettingsError, match=r"P3\.\.P7.*5 sides"):
        validate(SETTINGS[name], {"anchor_px": [1, 2, 3]})
    with pytest.raises(SettingsError, match=r"expected .*Settings"):
        detectors.family(name).build(RCNNSettings())


@pytest.mark.parametrize(("channels", "groups"), [(8, 4), (24, 12), (36, 18), (48, 24), (64, 32), (37, 1)])
def test_group_norm_divides_the_channels(tiny, channels, groups):
    for name in SETTINGS:
        norms = [m for m in build(tiny, name, fpn_channels=channels).module.head.modules() if type(m) is nn.GroupNorm]
        assert len(norms) == 8
        assert {norm.num_groups for norm in norms} == {groups}


@pytest.mark.parametrize("source", ["c5", "p5"])
@pytest.mark.parametrize("width", [6, 16])
def test_p6_is_made_from_what_was_asked_for(source, width):
    """Also where C5 is as wide as P5, which torchvision takes for P5."""

    class Body(nn.Module):
        channels = (3, 4, width)

        def forward(self, x):
            return {str(i): torch.full((1, c, 16 >> i, 16 >> i), i + 1.0) for i, c in enumerate(self.channels)}

    backbone = Pyramid(Body(), 16)
    add_p6_p7(backbone, source)
    maps = backbone(torch.zeros(1))
    assert list(maps) == ["0", "1", "2", "p6", "p7"]
    c5 = torch.full((1, width, 4, 4), 3.0)
    p6 = backbone.fpn.extra_blocks.p6(c5 if source == "c5" else maps["2"])
    torch.testing.assert_close(maps["p6"], p6)
    torch.testing.assert_close(maps["p7"], backbone.fpn.extra_blocks.p7(F.relu(p6)))


@pytest.mark.parametrize(("anchors", "kernel"), [(9, 1), (1, 3), (2, 5)])
def test_projections_are_those_of_dense_convolutions(anchors, kernel):
    """Values, and the gradients of maps and layers, at the edges too."""
    torch.manual_seed(0)
    projector = CellProjector(4, 6, 3, anchors, kernel).double()
    maps = [torch.randn(2, 4, h, w, dtype=torch.float64) for h, w in [(5, 7), (3, 4), (1, 2), (1, 1)]]
    total = sum(map_[0, 0].numel() for map_ in maps) * anchors
    image, place = torch.arange(2).repeat_interleave(total), torch.arange(total).repeat(2)
    order = torch.randperm(2 * total)
    image, place = image[order], place[order]
    wanted = torch.randn(2 * total, 3, dtype=torch.float64)

    found = []
    for dense in (False, True):
        inputs = [map_.clone().requires_grad_() for map_ in maps]
        if dense:
            rows = []
            for map_ in inputs:
                out = projector.second(F.relu(projector.first(map_)))
                rows.append(out.view(2, anchors, 3, *map_.shape[-2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, 3))
            outputs = torch.cat(rows, dim=1)[image, place]
        else:
            outputs = projector(inputs, image, place)
        parameters = list(projector.parameters())
        found.append([outputs, *torch.autograd.grad((outputs * wanted).sum(), [*inputs, *parameters])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@both
def test_embeddings_are_those_of_a_dense_layer_on_the_classification_tower(tiny, name):
    detector = build(tiny, name).eval()
    images, sizes, targets = example()
    torch.manual_seed(1)
    projector = detector.projector(hidden=7, dim=5)
    kernel, anchors = (1, 9) if name == "retinanet" else (3, 1)
    assert projector.first.kernel_size == (kernel, kernel)
    with torch.no_grad():
        matched = detector.match(images, sizes, targets, projector, most=10**6)
        blank = images.clone()
        blank[1, :, :, 70:] = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # the mean: 0 when normalised
        rows = []
        for map_ in detector.features(blank).values():
            out = projector.second(F.relu(projector.first(detector.module.head.classification_head.conv(map_))))
            rows.append(out.view(2, anchors, 5, *map_.shape[-2:]).permute(0, 3, 4, 1, 2).reshape(2, -1, 5))
        dense = torch.cat(rows, dim=1)
        corners, counts = detector.anchors(images, list(detector.features(images).values()))
        assigned = [detector.assign(corners, target["boxes"], counts) for target in targets]
    expected = torch.cat([dense[i, a >= 0] for i, a in enumerate(assigned)])
    assert torch.equal(matched.box, torch.cat([a[a >= 0] for a in assigned]))
    assert torch.equal(matched.image, torch.cat([torch.full_like(a[a >= 0], i) for i, a in enumerate(assigned)]))
    assert set(matched.image.tolist()) == {0, 1}
    torch.testing.assert_close(matched.embeddings, expected, atol=1e-6, rtol=1e-4)


@both
@pytest.mark.parametrize("norm", ["gn", "none"])
@pytest.mark.parametrize("filled", [True, False])
def test_losses_are_the_detectors_own(tiny, name, norm, filled):
    """``module`` in training, given the same images, whose transform leaves them as they are."""
    detector = build(tiny, name, head_norm=norm)
    images, sizes, targets = example()
    targets = targets if filled else [targets[0], empty()]
    losses = detector.match(images, sizes, targets, detector.projector(4, 3), most=1).losses
    expected = detector.module([image[:, :, : int(w)] for image, (_, w) in zip(images, sizes, strict=True)], targets)
    names = (
        {"boxes": "bbox_regression", "centreness": "bbox_ctrness"} if name == "fcos" else {"boxes": "bbox_regression"}
    )
    assert losses.keys() == names.keys()
    for ours, theirs in names.items():
        assert losses[ours] > 0
        torch.testing.assert_close(losses[ours], expected[theirs], atol=1e-6, rtol=1e-4)


@both
def test_batched_is_single(tiny, name):
    """On the same canvas, whatever is in the padding and in the other images."""
    detector = build(tiny, name).eval()
    images, sizes, targets = example()
    projector = detector.projector(6, 4)
    with torch.no_grad():
        together = detector.match(images, sizes, targets, projector, 10**6)
        for i in range(2):
            alone = images[i : i + 1].clone()
            alone[:, :, :, int(sizes[i, 1]) :] = 7
            single = detector.match(alone, sizes[i : i + 1], targets[i : i + 1], projector, 10**6)
            mine = together.image == i
            assert torch.equal(single.box, together.box[mine])
            torch.testing.assert_close(single.embeddings, together.embeddings[mine], atol=1e-6, rtol=1e-4)


@both
def test_at_most_some_predictions_but_all_boxes_regressed(tiny, name):
    detector = build(tiny, name)
    images, sizes, targets = example()
    projector = detector.projector(6, 4)
    everything = detector.match(images, sizes, targets, projector, 10**6)
    some = detector.match(images, sizes, targets, projector, 5)
    assert len(everything.box) > 5
    assert len(some.box) == len(some.image) == len(some.embeddings) == 5
    for key, value in everything.losses.items():
        torch.testing.assert_close(some.losses[key], value)


@both
@pytest.mark.parametrize("filled", [True, False])
def test_images_without_boxes(tiny, name, filled):
    """Nothing to match: no predictions, losses of zero, and yet every layer that is trained has its gradient."""
    detector = build(tiny, name)
    images, sizes, targets = example()
    targets = [targets[0] if filled else empty(), empty()]
    projector = detector.projector(6, 4)
    matched = detector.match(images, sizes, targets, projector, 10**6)
    assert set(matched.image.tolist()) == ({0} if filled else set())
    assert matched.embeddings.shape == (len(matched.box), 4)
    if not filled:
        assert all(loss == 0 for loss in matched.losses.values())
    (matched.embeddings.sum() + sum(matched.losses.values())).backward()
    for owner in [projector, *(detector.parts[part] for part in ("backbone", "neck", "head", "regressor"))]:
        for parameter, value in owner.named_parameters():
            assert value.grad is not None, parameter
            assert torch.isfinite(value.grad).all(), parameter
    assert all(p.grad is None for p in detector.parts["classifier"].parameters())


@both
def test_without_losses_the_regression_tower_is_left_alone(tiny, name, monkeypatch):
    detector = build(tiny, name)

    def refuse(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(detector.module.head.regression_head, "forward", refuse)
    images, sizes, targets = example()
    matched = detector.match(images, sizes, targets, detector.projector(6, 4), 10, losses=False)
    assert matched.losses == {}
    with pytest.raises(AssertionError, match="computed"):
        detector.match(images, sizes, targets, detector.projector(6, 4), 10)


@both
def test_autocast_leaves_anchors_and_losses_in_float32(tiny, name):
    """In bfloat16, 600 and 602 are the same number."""
    detector = build(tiny, name, long_side_px=640).eval()
    images = torch.rand(1, 3, 64, 640)
    targets = [{"boxes": torch.tensor([[601.0, 3, 633, 40], [400, 9, 523, 55]]), "labels": torch.tensor([1, 2])}]
    projector = detector.projector(6, 4)
    with torch.no_grad():
        exact = detector.match(images, torch.tensor([[64, 640]]), targets, projector, 10**6)
        supervised = detector.module.train()(list(images), targets)
        detector.eval()
        with torch.autocast("cpu", torch.bfloat16):
            rough = detector.match(images, torch.tensor([[64, 640]]), targets, projector, 10**6)
            mine = detector.train().loss(list(images), targets)
    assert torch.equal(rough.box, exact.box)
    for key, value in exact.losses.items():
        assert rough.losses[key].dtype == torch.float32
        torch.testing.assert_close(rough.losses[key], value, rtol=0.02, atol=0.01)
    for key, value in supervised.items():
        assert mine[key].dtype == torch.float32
        torch.testing.assert_close(mine[key], value, rtol=0.02, atol=0.01)


@both
@pytest.mark.parametrize("norm", ["bn", "none"])
def test_pyramids_of_an_r_cnn_are_taken_over(tiny, name, norm):
    """C3..C5's blocks move one place down, norms with them; P2's are reported as not used."""
    theirs = RCNNSettings(**tiny, fpn_norm=norm)
    rcnn = detectors.build(theirs)
    ours = detectors.build(SETTINGS[name](**theirs.shared()))
    assert ours.settings.fpn_norm == norm
    state = rcnn.part_state(["backbone", "neck"])
    adapted, moved = ours.adapt(state)
    assert moved == ["FPN blocks moved by -1: 4 levels up to C5 in the file, 3 here"]
    report = load_state(ours.module, adapted, "file")
    fpn = rcnn.module.backbone.fpn
    for kind in ("inner_blocks", "layer_blocks"):
        mine = getattr(ours.module.backbone.fpn, kind)
        assert len(mine) == 3
        for level, block in enumerate(mine):
            source = getattr(fpn, kind)[level + 1].state_dict()
            assert len(source) == (6 if norm == "bn" else 2)
            for key, value in block.state_dict().items():
                assert torch.equal(value, source[key]), key
    unused = [f"backbone.fpn.{kind}.0.{key}" for kind in ("inner_blocks", "layer_blocks") for key in source]
    assert sorted(report.unexpected) == sorted(f"{key} (a finer level than any here)" for key in unused)
    assert report.reshaped == []
    assert all(key.startswith(("head.", "backbone.fpn.extra_blocks.")) for key in report.missing)


@both
def test_it_trains_and_detects(tiny, scenes, name):
    data = load_detection_data(scenes / "train.json")
    images = [torch.from_numpy(np.array(Image.open(r.path).convert("RGB"))).permute(2, 0, 1) for r in data.images[:2]]
    targets = [{"boxes": torch.from_numpy(a.boxes), "labels": torch.from_numpy(a.labels)} for a in data.annotations[:2]]
    detector = build(tiny, name, num_classes=len(data.categories), min_score=0.0, detections=7).train()
    optimiser = torch.optim.SGD(detector.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = sum(detector.loss(images, targets).values())
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[0] > losses[1] > losses[2]
    with torch.no_grad():
        for found in detector.eval().detect(images):
            assert found["boxes"].shape == (7, 4)
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"] <= 64).all()
            assert (found["labels"] <= len(data.categories)).all()
