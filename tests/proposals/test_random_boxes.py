import numpy as np
import pytest

from headstart.proposals import ProposalSettings, make_engine
from headstart.proposals.filters import keep_boxes


@pytest.mark.parametrize("shape", [(100, 100), (300, 60), (60, 300)])
def test_boxes_fit_and_pass_the_filter(shape):
    settings = ProposalSettings(engine="random", random_boxes=200)
    height, width = shape
    boxes = make_engine(settings)(np.zeros((*shape, 3), np.uint8), np.random.default_rng(0))
    assert boxes.shape == (200, 4)
    assert boxes.dtype == np.float32
    assert (boxes >= 0).all()
    assert (boxes <= (width, height, width, height)).all()
    kept, fallback = keep_boxes(boxes, width, height, settings)
    assert len(kept) == 200
    assert fallback == ""


def test_sizes_and_places_use_their_whole_range():
    engine = make_engine(ProposalSettings(engine="random", random_boxes=2000))
    boxes = engine(np.zeros((100, 100, 3), np.uint8), np.random.default_rng(0))
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    size, aspect = np.sqrt(w * h) / 100, w / h
    assert size.min() < 0.32
    assert size.max() > 0.78
    assert aspect.min() < 0.36
    assert aspect.max() > 2.8
    assert boxes[:, 0].min() < 2
    assert boxes[:, 2].max() > 98


def test_the_seed_decides():
    engine = make_engine(ProposalSettings(engine="random", random_boxes=8))
    image = np.zeros((50, 70, 3), np.uint8)
    draw = lambda seed: engine(image, np.random.default_rng(seed))
    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


def test_an_image_too_thin_for_such_boxes_gets_none():
    engine = make_engine(ProposalSettings(engine="random"))
    assert engine(np.zeros((10, 2000, 3), np.uint8), np.random.default_rng(0)).shape == (0, 4)


def test_patches_have_any_shape_and_leave_a_margin():
    """UP-DETR's released code: both sides uniform in [8, side of the image - 8]."""
    engine = make_engine(ProposalSettings(engine="random_patches", random_boxes=5000))
    boxes = engine(np.zeros((60, 100, 3), np.uint8), np.random.default_rng(0))
    assert boxes.dtype == np.float32
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    assert (w.min(), w.max(), h.min(), h.max()) == (8, 92, 8, 52)
    assert (boxes.min(axis=0)[:2] == 0).all()
    assert (boxes.max(axis=0)[2:] == (100, 60)).all()
    np.testing.assert_allclose(np.histogram(w, 5, (8, 93))[0], 1000, atol=120)  # uniform
    assert abs(np.corrcoef(w, h)[0, 1]) < 0.05  # drawn apart


@pytest.mark.parametrize("side", [8, 9, 15, 16])
def test_patches_of_tiny_images_fit(side):
    engine = make_engine(ProposalSettings(engine="random_patches", random_boxes=50))
    boxes = engine(np.zeros((side, 40, 3), np.uint8), np.random.default_rng(0))
    assert (boxes[:, 1] >= 0).all()
    assert (boxes[:, 3] <= side).all()
    assert ((boxes[:, 3] - boxes[:, 1]) >= 8).all()
