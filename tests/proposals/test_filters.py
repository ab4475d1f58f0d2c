import numpy as np
import pytest
from pydantic import ValidationError

from headstart.proposals import ProposalSettings
from headstart.proposals.filters import keep_boxes, select, suppress

PAPER = ProposalSettings()
OFF = {"aspect_max": None, "size_min": 0.0, "size_max": 1.0}


def box(w, h, x=0, y=0):
    return [x, y, x + w, y + h]


def test_keeps_what_the_paper_keeps():
    """SoCo section 3.2, written as its two inequalities."""
    rng = np.random.default_rng(0)
    width, height = 200, 120
    corner = rng.uniform(0, 100, (500, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 150, (500, 2))], 1).astype(np.float32)
    expected = []
    for x1, y1, x2, y2 in boxes.astype(float):
        w, h = x2 - x1, y2 - y1
        if 1 / 3 <= w / h <= 3 and 0.3 <= (w * h) ** 0.5 / (width * height) ** 0.5 <= 0.8:
            expected.append([x1, y1, x2, y2])
    kept, fallback = keep_boxes(boxes, width, height, PAPER)
    np.testing.assert_array_equal(kept, np.array(expected))
    assert 50 < len(kept) < 450
    assert fallback == ""
    assert kept.dtype == np.float32


def test_limits_belong_to_the_range():
    boxes = np.array([box(30, 30), box(80, 80), box(30, 90), box(90, 30)], np.float32)
    kept, _ = keep_boxes(boxes, 100, 100, PAPER)
    np.testing.assert_array_equal(kept, boxes)
    outside = np.array([box(29, 30), box(81, 80), box(29, 90), box(91, 30)], np.float32)
    kept, _ = keep_boxes(np.concatenate([boxes, outside]), 100, 100, PAPER)
    np.testing.assert_array_equal(kept, boxes)


@pytest.mark.parametrize(
    ("boxes", "expected", "fallback"),
    [
        ([box(10, 10), box(99, 99), box(99, 5)], [box(10, 10), box(99, 99)], "ratio"),
        ([box(99, 32), box(99, 5), box(99, 31)], [box(99, 32)], "any_box"),
        ([box(99, 31), box(5, 99)], [box(100, 100)], "whole_image"),
        ([box(0, 0), box(0, 50)], [box(100, 100)], "whole_image"),
        (np.zeros((0, 4)), [box(100, 100)], "whole_image"),
    ],
)
def test_fallbacks_in_their_order(boxes, expected, fallback):
    kept, used = keep_boxes(np.array(boxes, np.float32), 100, 100, PAPER)
    np.testing.assert_array_equal(kept, expected)
    assert used == fallback


def test_settings_move_the_limits():
    boxes = np.array([box(10, 10), box(50, 50), box(90, 25)], np.float32)
    keep = lambda **changes: keep_boxes(boxes, 100, 100, ProposalSettings(**changes))[0].tolist()
    assert keep() == [box(50, 50)]
    assert keep(size_min=0.1) == [box(10, 10), box(50, 50)]
    assert keep(size_max=0.49) == [box(10, 10), box(50, 50)]  # the fallback: ratio rule only
    assert keep(aspect_max=4) == [box(50, 50), box(90, 25)]


def test_no_filter_keeps_all_but_empty_boxes():
    boxes = np.array([box(100, 100), box(0, 50), box(1, 99), box(50, 0), box(99, 1)], np.float32)
    kept, fallback = keep_boxes(boxes, 100, 100, ProposalSettings(**OFF))
    np.testing.assert_array_equal(kept, boxes[[0, 2, 4]])
    assert fallback == ""


def test_shortest_side_holds_for_the_fallbacks_too():
    """SoCo's released code: filter_ratio_size, else filter_ratio, else filter_none, each with w, h >= 32."""
    code = ProposalSettings(preset="soco_code")
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 40, (60, 2))
    seen = set()
    for _ in range(200):
        boxes = np.concatenate([corner, corner + rng.uniform(0, rng.uniform(20, 90), (60, 2))], 1).astype(np.float32)
        boxes = boxes[: rng.integers(1, 6)]
        w, h = (boxes[:, 2:] - boxes[:, :2]).astype(float).T
        long_enough = (w >= 32) & (h >= 32)
        ratio = long_enough & (w / h <= 3) & (h / w <= 3)
        sized = ratio & (np.sqrt(w * h) / 120 >= 0.3) & (np.sqrt(w * h) / 120 <= 0.8)
        expected = next((boxes[rule] for rule in (sized, ratio, long_enough) if rule.any()), [box(120, 120)])
        kept, fallback = keep_boxes(boxes, 120, 120, code)
        np.testing.assert_array_equal(kept, expected)
        seen.add(fallback)
    assert seen >= {"", "ratio", "whole_image"}


def plain_nms(boxes, limit):
    kept = []
    for candidate in boxes.astype(float):
        overlaps = []
        for other in kept:
            w = min(candidate[2], other[2]) - max(candidate[0], other[0])
            h = min(candidate[3], other[3]) - max(candidate[1], other[1])
            both = max(w, 0) * max(h, 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (candidate, other)]
            overlaps.append(both / (sum(areas) - both))
        if all(overlap <= limit for overlap in overlaps):
            kept.append(candidate)
    return np.array(kept, np.float32)


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7])
def test_suppression_against_a_plain_loop_in_the_engines_order(limit):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 50, (120, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(20, 60, (120, 2))], 1).astype(np.float32)
    kept = suppress(boxes, limit)
    np.testing.assert_array_equal(kept, plain_nms(boxes, limit))
    assert 5 < len(kept) < 115
    assert not np.array_equal(suppress(boxes[::-1], limit)[::-1], kept)  # the order is the rank
    np.testing.assert_array_equal(suppress(np.repeat(boxes[:3], 2, axis=0), limit), plain_nms(boxes[:3], limit))


def test_an_overlap_of_just_the_limit_stays():
    boxes = np.array([box(100, 100), box(100, 50)], np.float32)
    assert len(suppress(boxes, 0.5)) == 2
    assert len(suppress(boxes, 0.49)) == 1


def test_filter_then_suppression_then_top_k():
    boxes = np.array(
        [
            box(98, 98),  # filter: too large; it would suppress the next
            box(79, 79),
            box(78, 78),  # suppressed
            box(40, 40, 60, 60),
            box(5, 5),  # filter: too small
            box(35, 35, 0, 65),
        ],
        np.float32,
    )
    chosen = lambda **s: select(boxes, 100, 100, ProposalSettings(**s))[0].tolist()
    assert chosen() == boxes[[1, 2, 3, 5]].tolist()
    assert chosen(nms_iou=0.5) == boxes[[1, 3, 5]].tolist()
    assert chosen(nms_iou=0.5, top_k=2) == boxes[[1, 3]].tolist()
    assert chosen(top_k=2) == boxes[[1, 2]].tolist()
    assert chosen(top_k=99) == chosen()


def test_suppression_and_top_k_hold_for_fallbacks_too():
    boxes = np.array([box(10, 10), box(10, 9), box(11, 11, 50, 50), box(12, 12, 20, 70)], np.float32)
    kept, fallback = select(boxes, 100, 100, ProposalSettings(nms_iou=0.5, top_k=2))
    assert fallback == "ratio"
    np.testing.assert_array_equal(kept, boxes[[0, 2]])


def test_settings_refuse_what_makes_no_sense():
    with pytest.raises(ValidationError, match=r"size_min=0\.9 must be below size_max=0\.8"):
        ProposalSettings(size_min=0.9)
    with pytest.raises(ValidationError, match="engine"):
        ProposalSettings(engine="magic")
    with pytest.raises(ValidationError, match="scales"):
        ProposalSettings(scales=3)
