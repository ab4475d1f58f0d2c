"""RetinaNet's rule: which anchors answer for which boxes."""

from __future__ import annotations

import pytest
import torch

from headstart import detectors
from headstart.detectors.retinanet import RetinaNetSettings


@pytest.fixture(scope="module")
def detector():
    return detectors.build(RetinaNetSettings(backbone="resnet18", fpn_channels=8, num_classes=3))


def maps(height: int, width: int) -> list[torch.Tensor]:
    return [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in (8, 16, 32, 64, 128)]


def iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def by_loops(anchors: list[list[float]], boxes: list[list[float]]) -> list[int]:
    """.5 and more: the box with the highest IoU; as much as any anchor has with a box: the same; from .4 on: -2."""
    table = [[iou(anchor, box) for box in boxes] for anchor in anchors]
    best = [max(row[k] for row in table) for k in range(len(boxes))]
    found = []
    for row in table:
        highest = max(row)
        if highest >= 0.5 or any(row[k] == best[k] for k in range(len(boxes))):
            found.append(row.index(highest))
        else:
            found.append(-2 if highest >= 0.4 else -1)
    return found


def some_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([100.0, 70])
    return torch.cat([corner, corner + 6 + torch.rand(count, 2, generator=generator) * 90], dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_assignment_is_torchvisions_and_the_loops(detector, seed, monkeypatch):
    anchors, counts = detector.anchors(torch.zeros(1, 3, 96, 128), maps(96, 128))
    assert counts == [12 * 16 * 9, 6 * 8 * 9, 3 * 4 * 9, 2 * 2 * 9, 1 * 9]
    boxes = some_boxes(4, seed).round()  # whole numbers: IoUs are the same however they are computed
    boxes = torch.cat([boxes, anchors[[counts[0] + 40]], torch.tensor([[0.0, 0, 128, 96], [0, 0, 3, 2]])])
    found = detector.assign(anchors, boxes, counts)
    assert {-2, -1, 4} <= set(found.tolist())

    captured = []
    monkeypatch.setattr(detector.module.head, "compute_loss", lambda *given: captured.append(given[3]))
    detector.module.compute_loss([{"boxes": boxes}], {}, [anchors])
    assert torch.equal(found, captured[0][0])
    expected = by_loops(anchors.double().tolist(), boxes.double().tolist())
    assert found.tolist() == expected


def test_each_box_has_an_anchor_even_if_poor(detector):
    anchors, counts = detector.anchors(torch.zeros(1, 3, 64, 64), maps(64, 64))
    boxes = torch.tensor([[10.0, 10, 14, 14], [30, 40, 33, 60]])
    assert set(detector.assign(anchors, boxes, counts).tolist()) == {-1, 0, 1}
