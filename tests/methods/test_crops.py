"""Crops against Pillow's, colours against torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from headstart import detectors
from headstart.methods import crops


def as_batch(*photos: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)


@pytest.fixture
def detector():
    torch.manual_seed(0)
    settings = {"name": "retinanet", "backbone": "resnet18", "fpn_channels": 8, "short_side_px": 64}
    return detectors.build(detectors.parse_settings(settings)).eval()


@pytest.mark.parametrize("box", [(10, 8, 42, 40), (0, 0, 80, 60), (60, 30, 80, 60), (3, 5, 12, 50)])
@pytest.mark.parametrize("px", [16, 64])
def test_crops_are_pillows(box, px, photo):
    """Where a crop grows, Pillow's bilinear filter is the same; where it shrinks, its box filter nearly so."""
    (ours,) = crops.cut(as_batch(photo), [torch.tensor([box])], px)
    width, height = box[2] - box[0], box[3] - box[1]
    image = Image.fromarray(photo).crop(box)
    # An axis at a time: Pillow's bilinear filter, made for shrinking, is twice as wide.
    for size in ((px, image.height), (px, px)):
        shrinks = size != image.size and (size[0] < image.width or size[1] < image.height)
        image = image.resize(size, Image.BOX if shrinks else Image.BILINEAR)
    theirs = np.asarray(image).transpose(2, 0, 1) / 255
    inner = slice(1, -1)  # at the edges ours sees beyond the box, as no crop of Pillow's can
    worst = np.abs(ours.numpy() - theirs)[:, inner, inner]
    assert worst.mean() < (0.004 if max(width, height) <= px else 0.02)


def test_shrinking_does_not_alias():
    """A checkerboard of single pixels, shrunk four times, is even grey; single samples would give black or white."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    (ours,) = crops.cut(as_batch(np.stack([board] * 3, axis=-1)), [torch.tensor([[0, 0, 64, 64]])], 16)
    assert (ours - 0.5).abs().max() < 0.01


def test_order_is_image_by_image(photo):
    images = as_batch(photo, photo[::-1].copy(), photo)
    boxes = [torch.tensor([[0.0, 0, 20, 20], [30, 10, 60, 50]]), torch.zeros(0, 4), torch.tensor([[5.0, 5, 70, 30]])]
    found = crops.cut(images, boxes, 32)
    one = [crops.cut(images[i : i + 1], [b[None]], 32) for i in (0, 2) for b in boxes[i]]
    torch.testing.assert_close(found, torch.cat(one))
    as_floats = crops.cut(images / 255, boxes, 32)
    torch.testing.assert_close(found, as_floats)


def test_no_boxes_at_all(photo, detector):
    none = [torch.zeros(0, 4)] * 2
    assert crops.cut(as_batch(photo, photo), none, 32).shape == (0, 3, 32, 32)
    assert crops.describe(detector, as_batch(photo, photo), none, stage=3, colour=1.0).shape == (0, 128)


@pytest.mark.parametrize(("stage", "width"), [(3, 128), (None, 512)])
def test_what_the_backbone_says(stage, width, photo, detector, monkeypatch):
    """The mean of a plain ResNet's map; in parts as at once; without gradient."""
    boxes = [torch.tensor([[0.0, 0, 20, 20], [30, 10, 60, 50], [5, 5, 70, 30]])]
    found = crops.describe(detector, as_batch(photo), boxes, stage=stage, px=64)
    assert found.shape == (3, width)
    assert not found.requires_grad
    body = detector.body
    x = (crops.cut(as_batch(photo), boxes, 64) - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        for name, layer in body.items():
            x = layer(x)
            if name == {3: "layer2", None: "layer4"}[stage]:
                break
    torch.testing.assert_close(found, x.mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(crops, "TOGETHER", 2)
    torch.testing.assert_close(crops.describe(detector, as_batch(photo), boxes, stage=stage, px=64), found)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.3])
def test_brightness_contrast_and_saturation_are_torchvisions(which, factor, photo):
    one = as_batch(photo) / 255 * 0.6 + 0.15  # nothing is clipped
    factors = torch.ones(1, 3)
    factors[0, which] = factor
    theirs = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)[which](one, factor)
    torch.testing.assert_close(crops.adjust(one, factors, torch.zeros(1)), theirs, atol=2e-3, rtol=0)


def test_they_are_applied_one_after_the_other(photo):
    one = as_batch(photo) / 255 * 0.4 + 0.3
    theirs = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(one, 0.9), 1.2), 0.7)
    ours = crops.adjust(one, torch.tensor([[0.9, 1.2, 0.7]]), torch.zeros(1))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_a_turn_of_the_hue_keeps_greys_and_luma_and_turns_back(photo):
    luma = torch.tensor(crops.LUMA)
    one = as_batch(photo) / 255 * 0.3 + 0.35
    ones, turn = torch.ones(1, 3), torch.tensor([0.08])
    turned = crops.adjust(one, ones, turn)
    assert (turned - one).abs().max() > 0.02
    torch.testing.assert_close(torch.einsum("c,bchw", luma, turned), torch.einsum("c,bchw", luma, one))
    torch.testing.assert_close(crops.adjust(turned, ones, -turn), one, atol=1e-5, rtol=0)
    grey = torch.full((1, 3, 4, 4), 0.4)
    torch.testing.assert_close(crops.adjust(grey, ones, turn), grey)
    # Red goes towards yellow, as torchvision turns it, and from there towards green.
    for turns, more, less in ((0.08, 1, 2), (0.3, 1, 0)):
        red = torch.tensor([0.6, 0.3, 0.3])[None, :, None, None].expand(1, 3, 4, 4)
        for turned in (crops.adjust(red, ones, torch.tensor([turns])), tv.adjust_hue(red, turns)):
            assert turned[0, more, 0, 0] > turned[0, less, 0, 0] + 0.05


def test_each_crop_has_its_own_colours(photo):
    torch.manual_seed(0)
    same = (as_batch(photo) / 255).expand(200, -1, -1, -1).contiguous()
    before = same.clone()
    changed = crops.recolour(same, 1.0)
    assert torch.equal(same, before), "crops are not written to"
    assert changed.min() >= 0
    assert changed.max() <= 1
    means = changed.mean(dim=(1, 2, 3))
    assert len(torch.unique(means)) > 100
    grey = (changed.amax(dim=1) - changed.amin(dim=1)).amax(dim=(1, 2)) < 1e-4
    assert 0.1 < grey.float().mean() < 0.3  # GREY_PROB = .2
    rough = (changed.diff(dim=-1).abs().mean(dim=(1, 2, 3)) / changed.std(dim=(1, 2, 3))).float()
    assert rough.min() < 0.8 * rough.max(), "some are blurred"


def test_colours_are_float32_under_autocast(photo):
    one = (as_batch(photo) / 255).expand(8, -1, -1, -1)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(crops.recolour(one, 1.0))
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0])


def test_strength_0_changes_nothing(photo):
    one = as_batch(photo) / 255
    state = torch.get_rng_state()
    assert crops.recolour(one, 0.0) is one
    assert torch.equal(torch.get_rng_state(), state)
