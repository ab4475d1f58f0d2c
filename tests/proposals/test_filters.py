import numpy as np
import pytest
from pydantic import ValidationError

from headstart.proposals import ProposalSettings
from headstart.proposals.filters import keep_boxes

PAPER = ProposalSettings()


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


def test_settings_refuse_what_makes_no_sense():
    with pytest.raises(ValidationError, match=r"size_min=0\.9 must be below size_max=0\.8"):
        ProposalSettings(size_min=0.9)
    with pytest.raises(ValidationError, match="engine"):
        ProposalSettings(engine="magic")
    with pytest.raises(ValidationError, match="scales"):
        ProposalSettings(scales=3)
