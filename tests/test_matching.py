"""One-to-one matching, and the geometry of its costs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from headstart.matching import cxcywh, giou, giou_cost, hungarian, in_shares, l1_cost, padded, similarity_cost, xyxy


def cheapest(cost: torch.Tensor) -> float:
    """The least total over all ways to give each of K objects a prediction of its own (N >= K)."""
    n, k = cost.shape
    ways = itertools.permutations(range(n), k)
    return min(sum(float(cost[p, o]) for o, p in enumerate(way)) for way in ways)


def test_pairs_are_of_least_cost_in_each_image():
    torch.manual_seed(0)
    cost, counts = torch.randn(4, 5, 3), [3, 0, 1, 2]
    image, prediction, object_ = hungarian(cost, counts)
    for b, count in enumerate(counts):
        mine = image == b
        assert sorted(object_[mine].tolist()) == list(range(count))
        assert len(set(prediction[mine].tolist())) == count
        total = cost[b][prediction[mine], object_[mine]].sum()
        assert float(total) == pytest.approx(cheapest(cost[b, :, :count]), abs=1e-6)


def test_more_objects_than_predictions():
    image, prediction, object_ = hungarian(torch.tensor([[[3.0, 1.0, 2.0]]]), [3])
    assert (image.tolist(), prediction.tolist(), object_.tolist()) == ([0], [0], [1])


def test_nothing_to_match():
    for cost, counts in ((torch.zeros(2, 5, 0), [0, 0]), (torch.zeros(2, 5, 3), [0, 0]), (torch.zeros(0, 5, 3), [])):
        image, prediction, object_ = hungarian(cost, counts)
        assert len(image) == len(prediction) == len(object_) == 0
        assert image.dtype == torch.int64


def test_costs_that_are_not_finite_are_avoided():
    cost = torch.tensor([[[float("nan"), 1.0], [2.0, float("inf")]]])
    _, prediction, object_ = hungarian(cost, [2])
    assert dict(zip(prediction.tolist(), object_.tolist(), strict=True)) == {0: 1, 1: 0}


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        hungarian(torch.zeros(1, 4, 2), [3])


def test_padding_is_zeros():
    rows = [torch.ones(2, 4), torch.zeros(0, 4), torch.full((3, 4), 2.0)]
    out = padded(rows)
    assert out.shape == (3, 3, 4)
    assert out[0].tolist() == [[1.0] * 4, [1.0] * 4, [0.0] * 4]
    assert out[1].sum() == 0
    assert padded([torch.zeros(0, 4)] * 2).shape == (2, 0, 4)


def test_costs_against_torchvision_and_loops():
    torch.manual_seed(0)
    a, b = torch.rand(2, 5, 4), torch.rand(2, 3, 4)
    for i in range(2):
        torch.testing.assert_close(
            giou_cost(xyxy(a), xyxy(b))[i], 1 - generalized_box_iou(xyxy(a)[i], xyxy(b)[i]), atol=1e-5, rtol=1e-5
        )
        for n, k in itertools.product(range(5), range(3)):
            assert float(l1_cost(a, b)[i, n, k]) == pytest.approx(float((a[i, n] - b[i, k]).abs().sum()), abs=1e-6)
            cosine = torch.cosine_similarity(a[i, n], b[i, k], dim=0)
            assert float(similarity_cost(a, b)[i, n, k]) == pytest.approx(-float(cosine), abs=1e-6)


def test_giou_of_boxes_without_area_is_finite():
    point = torch.tensor([0.3, 0.3, 0.3, 0.3])
    assert float(giou(point, point)) == 0
    assert torch.isfinite(giou(point, torch.tensor([0.0, 0.0, 1.0, 1.0])))


def test_formats_of_boxes():
    boxes = torch.tensor([[10.0, 20.0, 50.0, 40.0]])
    torch.testing.assert_close(cxcywh(boxes), box_convert(boxes, "xyxy", "cxcywh"))
    torch.testing.assert_close(xyxy(cxcywh(boxes)), boxes)
    shares = in_shares(boxes, torch.tensor([80, 100]))
    assert shares.tolist() == [[pytest.approx(v) for v in (0.3, 0.375, 0.4, 0.25)]]
