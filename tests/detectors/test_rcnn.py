"""The R-CNN family is torchvision's own: same names, same shapes, same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torchvision.models import detection
from torchvision.ops import roi_align

from headstart import detectors
from headstart.detectors.rcnn import RCNNSettings
from headstart.errors import SettingsError


def shapes(module) -> dict:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"name": "mask_rcnn"}, "maskrcnn_resnet50_fpn_v2"),
        ({"name": "faster_rcnn"}, "fasterrcnn_resnet50_fpn_v2"),
        ({"name": "mask_rcnn", "head": "2fc"}, "maskrcnn_resnet50_fpn"),
        ({"name": "faster_rcnn", "head": "2fc"}, "fasterrcnn_resnet50_fpn"),
    ],
)
def test_defaults_are_torchvisions_models(settings, reference):
    ours = detectors.build(RCNNSettings(num_classes=5, **settings)).module
    theirs = getattr(detection, reference)(weights=None, weights_backbone=None, num_classes=6)
    assert shapes(ours) == shapes(theirs)
    theirs.load_state_dict(ours.state_dict())  # strict


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "faster_rcnn"},
        {"name": "mask_rcnn"},
        {"name": "faster_rcnn", "head": "2fc"},
        {"name": "mask_rcnn", "neck": "c4"},
        {"name": "faster_rcnn", "neck": "c4"},
    ],
)
def test_plain_code_builds_the_same_detector(tiny, settings):
    """The text in ``load_in_torchvision.py`` knows nothing of us and gives the same outputs."""
    ours = detectors.build(RCNNSettings(num_classes=3, **{**tiny, **settings}))
    code = ours.plain_code()
    assert "headstart" not in code
    scope: dict = {}
    exec(code, scope)
    theirs = scope["detector"]
    theirs.load_state_dict(ours.module.state_dict())
    images = [torch.rand(3, 50, 70), torch.rand(3, 80, 60)]
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        for a, b in zip(ours.detect(images), theirs(images), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key])


def test_uint8_and_float_images_are_the_same(tiny):
    # Seeded: the two are rounded once, differently, when they are normalised. Some random networks make more of that
    # than the bound below, which no test before this one should decide.
    torch.manual_seed(0)
    detector = detectors.build(RCNNSettings(num_classes=3, **tiny)).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        one, other = detector.normalise(images), detector.normalise(images.float() / 255)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
        a, b = detector.features(images), detector.features(images.float() / 255)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def test_features_are_what_the_detector_itself_computes(tiny):
    detector = detectors.build(RCNNSettings(num_classes=3, **{**tiny, "short_side_px": 64, "long_side_px": 64})).eval()
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        prepared, _ = detector.module.transform([image])
        theirs = detector.module.backbone(prepared.tensors)
        ours = detector.features(image[None])
    assert list(ours) == ["0", "1", "2", "3"]  # no P6
    for name, map_ in ours.items():
        torch.testing.assert_close(map_, theirs[name], atol=1e-5, rtol=1e-4)


def test_pixels_are_normalised_as_the_detector_does_it(tiny):
    """uint8 and float give the same, and the images that came in stay as they were."""
    detector = detectors.build(RCNNSettings(**tiny, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]))
    bytes_ = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    floats = bytes_.float() / 255
    before = bytes_.clone(), floats.clone()
    expected = torch.stack([detector.module.transform.normalize(image) for image in floats])
    torch.testing.assert_close(detector.normalise(bytes_), expected)
    torch.testing.assert_close(detector.normalise(floats), expected)
    assert torch.equal(bytes_, before[0])
    assert torch.equal(floats, before[1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("chosen", [[1, 1, 3], [0, 2, 2], [2, 2, 2], [3, 3, 3]])
def test_levels_without_boxes_get_the_gradient_they_always_had(tiny, chosen, layout):
    """``embed`` leaves them out; torchvision's way, pooling no boxes from them, gives zeros at full price."""
    ours = detectors.build(RCNNSettings(**tiny)).to(memory_format=layout)
    theirs = copy.deepcopy(ours)
    images = torch.rand(1, 3, 64, 64).to(memory_format=layout)
    boxes = torch.tensor([[[0.0, 0, 30, 30], [5, 5, 60, 60], [8, 0, 20, 50]]])
    levels = torch.tensor([chosen])
    ours.embed(ours.features(images), boxes, (64, 64), levels).square().sum().backward()

    pooled = torch.zeros(3, 8, 7, 7)
    for level, map_ in enumerate(theirs.features(images).values()):
        mine = levels[0] == level
        rois = torch.cat([torch.zeros(int(mine.sum()), 1), boxes[0, mine]], dim=1)
        of_level = roi_align(map_, rois, 7, 1 / (4 * 2**level), 2, aligned=True)
        pooled = pooled.index_put((mine,), of_level)
    theirs.module.roi_heads.box_head(pooled).square().sum().backward()

    for part in ("backbone", "neck", "head"):
        pairs = zip(ours.parts[part].named_parameters(), theirs.parts[part].parameters(), strict=True)
        for (name, a), b in pairs:
            assert a.grad is not None, f"{part} {name}"
            torch.testing.assert_close(a.grad, torch.zeros_like(a) if b.grad is None else b.grad, msg=name)


def test_any_torchvision_object_of_the_family_is_taken():
    mobile = detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=3)
    wrapped = detectors.wrap(mobile)
    features = wrapped.features(torch.zeros(1, 3, 64, 64))
    assert "pool" not in features
    boxes = torch.tensor([[[0.0, 0, 30, 30], [5, 5, 60, 60]]])
    assert wrapped.eval().embed(features, boxes, (64, 64)).shape == (2, wrapped.embed_width())
    with pytest.raises(SettingsError, match="not a detector of a known family"):
        detectors.wrap(torch.nn.Linear(1, 1))


def test_unknown_names_say_what_is_known():
    with pytest.raises(SettingsError, match="choose one of faster_rcnn, mask_rcnn"):
        detectors.family("yolo")
    with pytest.raises(SettingsError, match=r"--backbone resnet19.*resnet18"):
        detectors.build(RCNNSettings(backbone="resnet19"))


def test_every_parameter_belongs_to_one_part(tiny):
    for settings in ({}, {"name": "mask_rcnn"}, {"neck": "c4"}):
        detector = detectors.build(RCNNSettings(**{**tiny, **settings}))
        prefixes = [p for group in detector.prefixes.values() for p in group]
        for name, _ in detector.module.named_parameters():
            assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name
        assert sum(len(detector.part_state([part])) for part in detector.parts) == len(detector.module.state_dict())


def test_anchors_stay_exact_under_autocast(tiny):
    """torchvision's take the maps' dtype; in bfloat16 those beyond 256 px were whole pixels off."""
    detector = detectors.build(
        RCNNSettings(num_classes=3, **{**tiny, "short_side_px": 320, "long_side_px": 640})
    ).train()
    seen = []
    detector.module.rpn.anchor_generator.register_forward_hook(lambda module, inputs, anchors: seen.append(anchors))
    images = [torch.randint(0, 256, (3, 320, 640), dtype=torch.uint8)]
    targets = [{"boxes": torch.tensor([[300.0, 100, 500, 300]]), "labels": torch.tensor([1])}]
    detector.loss(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        detector.loss(images, targets)
        projector = detector.projector(4, 4)
        detector.match(images[0][None], torch.tensor([[320, 640]]), targets, projector, 10)
    assert len(seen) == 3
    for anchors in seen:
        assert torch.equal(anchors[0], seen[0][0])
