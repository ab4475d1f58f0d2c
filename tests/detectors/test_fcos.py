"""FCOS's rule: which points answer for which boxes."""

from __future__ import annotations

import pytest
import torch

from headstart import detectors
from headstart.detectors.fcos import FCOSSettings

STRIDES = (8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def detector():
    return detectors.build(FCOSSettings(backbone="resnet18", fpn_channels=8, num_classes=3)).eval()


def maps(height: int, width: int) -> list[torch.Tensor]:
    return [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in STRIDES]


def by_loops(height: int, width: int, boxes: list[list[float]]) -> list[int]:
    """On a canvas that all strides divide. The points are the cells' corners, as in torchvision."""
    found = []
    for level, stride in enumerate(STRIDES):
        low = 0 if level == 0 else 4 * stride
        high = float("inf") if level == len(STRIDES) - 1 else 8 * stride
        for y in range(0, height, stride):
            for x in range(0, width, stride):
                best, smallest = -1, float("inf")
                for k, (x1, y1, x2, y2) in enumerate(boxes):
                    sides = [x - x1, y - y1, x2 - x, y2 - y]
                    near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < 1.5 * stride
                    area = (x2 - x1) * (y2 - y1)
                    if near and min(sides) > 0 and low < max(sides) < high and area < smallest:
                        best, smallest = k, area
                found.append(best)
    return found


def some_boxes(seed: int) -> torch.Tensor:
    """On a grid of 4 px, so that many touch points, ranges and edges, and areas differ by 16 px or not at all."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 40, (14, 2), generator=generator) * 4.0
    side = torch.randint(1, 40, (14, 2), generator=generator) * 4.0
    boxes = torch.cat([corner, corner + side], dim=1)
    boxes[:, 2].clamp_(max=256)
    boxes[:, 3].clamp_(max=128)
    boxes = boxes[(boxes[:, 3] - boxes[:, 1] > 0)]
    turned = boxes[0] + torch.tensor([4.0, 0, 4, 0])
    special = torch.tensor([[0.0, 0, 256, 128], [16, 16, 80, 80], [40, 40, 40, 80], [8, 8, 72, 40]])
    return torch.cat([boxes, boxes[:2], turned[None], special])  # twice the same, as large, without width, ranges' ends


@pytest.mark.parametrize("seed", range(6))
def test_assignment_is_torchvisions_and_the_loops(detector, seed, monkeypatch):
    anchors, counts = detector.anchors(torch.zeros(1, 3, 128, 256), maps(128, 256))
    boxes = some_boxes(seed)
    found = detector.assign(anchors, boxes, counts)

    captured = []
    monkeypatch.setattr(detector.module.head, "compute_loss", lambda *given: captured.append(given[3]))
    detector.module.compute_loss([{"boxes": boxes}], {}, [anchors], counts)
    assert torch.equal(found, captured[0][0])
    assert found.tolist() == by_loops(128, 256, boxes.tolist())
    assert len(set(found.tolist())) > 5


@pytest.mark.parametrize("seed", range(6))
def test_assignment_is_torchvisions_on_any_numbers(detector, seed, monkeypatch):
    """Canvases that no stride divides, boxes at any place, areas that differ by less than torchvision can tell."""
    generator = torch.Generator().manual_seed(seed)
    anchors, counts = detector.anchors(torch.zeros(1, 3, 150, 210), maps(150, 210))
    corner = torch.rand(60, 2, generator=generator) * 150
    boxes = torch.cat([corner, corner + torch.rand(60, 2, generator=generator) * 100], dim=1)
    boxes = torch.cat([boxes, boxes + torch.rand(60, 4, generator=generator) * 0.02])
    captured = []
    monkeypatch.setattr(detector.module.head, "compute_loss", lambda *given: captured.append(given[3]))
    detector.module.compute_loss([{"boxes": boxes}], {}, [anchors], counts)
    assert torch.equal(detector.assign(anchors, boxes, counts), captured[0][0])


def test_assignment_does_not_see_the_padding(detector):
    """Points answer for boxes they lie in, so a larger canvas changes nothing."""
    targets = [{"boxes": torch.tensor([[3.0, 5, 120, 126], [50, 40, 128, 90], [0, 0, 30, 30]])}]
    projector = detector.projector(4, 3)
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        alone = detector.match(images, torch.tensor([[128, 128]]), targets, projector, 10**6)
        wide = torch.nn.functional.pad(images, (0, 128))
        padded = detector.match(wide, torch.tensor([[128, 128]]), targets, projector, 10**6)
    assert set(alone.box.tolist()) == {0, 1, 2}
    assert torch.equal(alone.box, padded.box)


def test_the_last_level_has_no_end(detector):
    """A side 1280 px away is ten times its unit."""
    anchors, counts = detector.anchors(torch.zeros(1, 3, 256, 2560), maps(256, 2560))
    boxes = torch.tensor([[0.0, 0, 2560, 256], [600, 20, 1500, 240]])
    found = detector.assign(anchors, boxes, counts)
    assert found.tolist() == by_loops(256, 2560, boxes.tolist())
    assert 0 in found[-counts[-1] :]


def test_boxes_begin_with_an_area_so_that_the_loss_has_a_slope():
    """torchvision's begin at zero, where GIoU is flat: a few steps later its boxes are still empty."""
    torch.manual_seed(0)
    detector = detectors.build(detectors.parse_settings({"name": "fcos", "backbone": "resnet18", "fpn_channels": 8}))
    regression = detector.module.head.regression_head
    boxes = regression([torch.randn(1, 8, 4, 4)])[0]
    assert boxes.shape[-1] == 4
    assert (boxes - 4).abs().max() < 1
