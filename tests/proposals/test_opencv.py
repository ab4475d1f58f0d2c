import cv2
import numpy as np
import pytest

from headstart.boxes import iou
from headstart.errors import SettingsError
from headstart.proposals import ProposalSettings, make_engine
from headstart.proposals.opencv import OpenCVSelectiveSearch

RNG = np.random.default_rng(0)


def scene(size=96, seed=0):
    """Coloured rectangles on a noisy ground; returns the image and their boxes."""
    rng = np.random.default_rng(seed)
    image = np.full((size, size + 20, 3), 120, np.int16)
    boxes = [[8, 10, 48, 50], [60, 20, 100, 60], [20, 60, 60, 90]]
    for (x1, y1, x2, y2), colour in zip(boxes, ([200, 40, 40], [40, 180, 60], [50, 60, 210]), strict=True):
        image[y1:y2, x1:x2] = colour
    image += rng.integers(-12, 13, image.shape, dtype=np.int16)
    return image.clip(0, 255).astype(np.uint8), np.array(boxes, np.float32)


@pytest.mark.parametrize("colour", ["hsv", "rgb"])
def test_finds_plain_objects(colour):
    image, objects = scene()
    found = OpenCVSelectiveSearch(colour=colour)(image, RNG)
    assert found.dtype == np.float32
    assert found.shape[1] == 4
    assert iou(objects, found).max(axis=1).min() > 0.9
    height, width = image.shape[:2]
    assert (found >= 0).all()
    assert (found <= (width, height, width, height)).all()
    assert (found[:, 2:] > found[:, :2]).all()


def test_same_boxes_in_the_same_order_every_time():
    image = RNG.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    search = OpenCVSelectiveSearch(scale=50)
    first = search(image, RNG)
    assert len(first) > 50
    for _ in range(3):  # OpenCV draws its ranks anew in each call
        np.testing.assert_array_equal(search(image, RNG), first)
    assert len(np.unique(first, axis=0)) == len(first)
    area = (first[:, 2] - first[:, 0]) * (first[:, 3] - first[:, 1])
    assert (np.diff(area) <= 0).all()


@pytest.mark.parametrize(("scale", "sigma", "min_size"), [(500, 0.9, 10), (300, 0.9, 100), (60, 1.7, 20)])
@pytest.mark.parametrize("colour", ["hsv", "rgb"])
def test_starts_from_the_segments_of_these_very_parameters(scale, sigma, min_size, colour):
    # A stream of its own: what other tests draw must not change the image.
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 2)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    seen = cv2.cvtColor(image[:, :, ::-1].copy(), cv2.COLOR_BGR2HSV) if colour == "hsv" else image
    labels = cv2.ximgproc.segmentation.createGraphSegmentation(sigma, float(scale), min_size).processImage(seen)
    segments = set()
    for label in np.unique(labels):
        y, x = np.nonzero(labels == label)
        segments.add((x.min(), y.min(), x.max() + 1, y.max() + 1))
    found = set(map(tuple, OpenCVSelectiveSearch(scale, sigma, min_size, colour)(image, RNG).astype(int)))
    assert len(segments) > 2
    assert segments <= found
    assert len(found) <= 2 * labels.max() + 1  # a tree over the segments


def test_scale_is_for_values_up_to_255():
    """k on 0..255 is k/255 on 0..1, which is how skimage.segmentation.felzenszwalb uses its ``scale``."""
    image, _ = scene()
    segment = cv2.ximgproc.segmentation.createGraphSegmentation
    np.testing.assert_array_equal(
        segment(0.9, 128.0, 10).processImage(image.astype(np.float32)),
        segment(0.9, 0.5, 10).processImage(image.astype(np.float32) / 256),
    )


@pytest.mark.parametrize("shape", [(8, 8), (8, 300), (300, 8), (40, 400)])
@pytest.mark.parametrize("content", ["noise", "black", "white"])
def test_survives_odd_images(shape, content):
    image = {"noise": RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)}.get(content)
    if image is None:
        image = np.full((*shape, 3), 255 * (content == "white"), np.uint8)
    found = OpenCVSelectiveSearch()(image, RNG)
    assert np.isfinite(found).all()
    if content != "noise":
        np.testing.assert_array_equal(found, [[0, 0, shape[1], shape[0]]])


def test_wrong_opencv_wheel_says_what_to_install(monkeypatch):
    monkeypatch.delattr(cv2, "ximgproc")
    with pytest.raises(SettingsError, match="pip install opencv-contrib-python-headless"):
        make_engine(ProposalSettings(engine="opencv"))
    make_engine(ProposalSettings(engine="random"))
