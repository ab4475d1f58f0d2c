import pickle

import cv2
import numpy as np
import pytest

from headstart.boxes import iou
from headstart.datasets.images import decode
from headstart.proposals import ProposalSettings, finder
from headstart.proposals.finder import Finder

OFF = {"aspect_max": None, "size_min": 0.0, "size_max": 1.0}


class Recorder:
    """An engine that keeps the image it was given and finds what it was told to."""

    name, version = "recorder", "1"

    def __init__(self, boxes):
        self.boxes = np.array(boxes, np.float32)

    def __call__(self, image, rng):
        self.image, self.draw = image, rng.uniform()
        return self.boxes


@pytest.fixture
def recorder(monkeypatch):
    engine = Recorder([[16, 32, 80, 96], [0, 0, 130, 64]])
    monkeypatch.setattr(finder, "make_engine", lambda settings: engine)
    return engine


def photo(width, height):
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8), (width, height))


def test_squashed_images_and_boxes_scaled_back_on_each_axis(recorder):
    found = Finder(ProposalSettings(squash_px=128, **OFF))(photo(640, 256), 640, 256, "a.jpg")
    assert recorder.image.shape == (128, 128, 3)
    np.testing.assert_array_equal(found.boxes, [[80, 64, 400, 192], [0, 0, 640, 128]])  # x 5, x 2, clipped
    assert found.n_raw == 2


def test_squashing_is_that_of_the_whole_image(recorder):
    image = photo(640, 256)
    Finder(ProposalSettings(squash_px=128, **OFF))(image, 640, 256, "a.jpg")
    plain = image.reshape(128, 2, 128, 5, 3).mean(axis=(1, 3))  # each pixel the mean of those it stands for
    assert np.abs(recorder.image - plain).max() <= 1


def test_small_images_are_squashed_too(recorder):
    found = Finder(ProposalSettings(squash_px=128, **OFF))(photo(64, 32), 64, 32, "a.jpg")
    assert recorder.image.shape == (128, 128, 3)
    np.testing.assert_array_equal(found.boxes[0], [8, 8, 40, 24])


def test_large_images_keep_their_shape(recorder):
    found = Finder(ProposalSettings(long_side_px=160, **OFF))(photo(640, 256), 640, 256, "a.jpg")
    assert recorder.image.shape == (64, 160, 3)
    np.testing.assert_array_equal(found.boxes, [[64, 128, 320, 256], [0, 0, 520, 256]])


@pytest.mark.parametrize(
    ("settings", "size", "expected"),
    [
        ({}, (640, 480), None),
        ({}, (1280, 960), 480),
        ({"squash_px": 128}, (640, 480), 128),
        ({"squash_px": 128}, (640, 100), None),  # the height is enlarged: all rows are needed
        ({"squash_px": 128}, (128, 128), None),
    ],
)
def test_no_more_is_decoded_than_the_search_needs(settings, size, expected):
    assert Finder(ProposalSettings(**settings)).decode_px(*size) == expected


def test_a_jpeg_decoded_reduced_gives_nearly_the_same_boxes(tmp_path):
    image = np.full((960, 1280, 3), 90, np.uint8)
    image[240:640, 320:800] = (200, 60, 30)
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), image[:, :, ::-1])
    find = Finder(ProposalSettings(squash_px=128))
    reduced = decode(path, find.decode_px(1280, 960))
    assert reduced.shape[0] < 960
    found = find(reduced, 1280, 960, "a.jpg")
    assert iou(np.array([[320, 240, 800, 640]], np.float32), found.boxes).max() > 0.9


def test_the_random_stream_depends_on_seed_and_name_alone(recorder):
    def draw(name, seed=0):
        Finder(ProposalSettings(seed=seed))(photo(64, 64), 64, 64, name)
        return recorder.draw

    assert draw("a.jpg") == draw("a.jpg")
    assert len({draw("a.jpg"), draw("b.jpg"), draw("a.jpg", seed=1)}) == 3


def test_a_pickled_finder_is_its_settings_and_makes_its_engine_again(monkeypatch):
    made = []
    monkeypatch.setattr(finder, "make_engine", lambda settings: made.append(settings) or Recorder([[0, 0, 9, 9]]))
    find = Finder(ProposalSettings(scale=77))
    assert not made
    find(photo(64, 64), 64, 64, "a.jpg")
    find(photo(64, 64), 64, 64, "b.jpg")
    arrived = pickle.loads(pickle.dumps(find))
    assert len(made) == 1
    assert arrived == find
    arrived(photo(64, 64), 64, 64, "a.jpg")
    assert len(made) == 2
