"""Views against plain slow references: loops over boxes for the geometry, torchvision for the colours."""

from __future__ import annotations

import math
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from headstart import views
from headstart.errors import SettingsError
from headstart.views import Photometric, View

SEEDS = range(5)


def photo(seed: int, height: int = 61, width: int = 83) -> np.ndarray:
    """Smooth colours with some noise and full range: what a photo does to rounding and clipping."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def random_boxes(rng: np.random.Generator, n: int, height: int, width: int) -> np.ndarray:
    x = np.sort(rng.uniform(0, width, (n, 2)), axis=1)
    y = np.sort(rng.uniform(0, height, (n, 2)), axis=1)
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1).astype(np.float32)


def random_view(seed: int, n: int = 7, height: int = 61, width: int = 83) -> View:
    rng = np.random.default_rng(seed)
    ids = rng.permutation(100)[:n].astype(np.int64)
    return View(photo(seed, height, width), random_boxes(rng, n, height, width), ids)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.dtype == b.dtype == np.uint8
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ------------------------------------------------------------------------------------------------ geometry


def crop_and_resize_slowly(boxes: np.ndarray, crop: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    x0, y0, x1, y1 = crop
    height, width = size
    out = []
    for left, top, right, bottom in boxes.tolist():
        left, right = min(max(left, x0), x1), min(max(right, x0), x1)
        top, bottom = min(max(top, y0), y1), min(max(bottom, y0), y1)
        x, y = width / (x1 - x0), height / (y1 - y0)
        out.append([(left - x0) * x, (top - y0) * y, (right - x0) * x, (bottom - y0) * y])
    return np.array(out).reshape(-1, 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_crop_and_resize_moves_boxes_as_a_loop_does(seed: int) -> None:
    view = random_view(seed)
    crop = views.random_crop_box(*view.size, np.random.default_rng(seed), scale=(0.1, 0.6))
    out = views.crop_and_resize(view, crop, (40, 96))
    assert out.image.shape == (40, 96, 3)
    assert out.boxes.dtype == np.float32
    np.testing.assert_allclose(out.boxes, crop_and_resize_slowly(view.boxes, crop, (40, 96)), atol=1e-4)
    np.testing.assert_array_equal(out.ids, view.ids)


def test_resize_is_the_crop_of_everything() -> None:
    view = random_view(3)
    out = views.resize(view, (122, 166))
    np.testing.assert_allclose(out.boxes, view.boxes * 2, atol=1e-4)
    assert views.resize(view, view.size).image.tobytes() == view.image.tobytes()


@pytest.mark.parametrize("size", [(30, 41), (17, 60), (61, 83)])
def test_shrinking_averages_areas(size: tuple[int, int]) -> None:
    """A checkerboard of single pixels turns grey: nothing aliases, whatever the two factors are."""
    board = (np.indices((122, 166)).sum(axis=0) % 2 * 255).astype(np.uint8)
    view = View(np.repeat(board[..., None], 3, axis=2), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    out = views.resize(view, size).image.astype(int)
    assert np.abs(out - 127.5).max() <= 20


def test_one_axis_shrinks_and_the_other_grows() -> None:
    """Stripes along x, 8 times narrower and twice as high: area average along x, untouched along y."""
    stripes = np.tile(np.array([0, 255], np.uint8), 80)
    image = np.broadcast_to(stripes[None, :, None], (10, 160, 3)).copy()
    view = View(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    out = views.resize(view, (20, 20)).image.astype(int)
    assert np.abs(out - 127.5).max() <= 1


@pytest.mark.parametrize("crop", [(0, 0, 0, 10), (5, 5, 4, 9), (0, 0, 84, 10), (-1, 0, 10, 10)])
def test_impossible_crops_are_refused(crop: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="61 x 83"):
        views.crop_and_resize(random_view(0), crop, (32, 32))


def test_visible_says_what_the_crop_left() -> None:
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [18, 0, 40, 40], [19.5, 0, 40, 40]], np.float32)
    view = View(photo(0), boxes, np.arange(4))
    out = views.crop_and_resize(view, (0, 0, 20, 20), (20, 20))
    assert views.visible(out.boxes).tolist() == [True, False, True, False]
    assert views.visible(out.boxes, min_side_px=3).tolist() == [True, False, False, False]
    assert views.visible(out.boxes, min_side_px=2).tolist() == [True, False, True, False]
    assert views.visible(out.boxes, min_side_px=0.25).tolist() == [True, False, True, True]
    kept = out.take(views.visible(out.boxes))
    assert kept.ids.tolist() == [0, 2]
    np.testing.assert_array_equal(kept.boxes, out.boxes[[0, 2]])
    assert out.take(np.array([2, 2, 0])).ids.tolist() == [2, 2, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_hflip_against_a_loop_and_twice_is_nothing(seed: int) -> None:
    view = random_view(seed)
    flipped = views.hflip(view)
    expected = [[83 - x1, y0, 83 - x0, y1] for x0, y0, x1, y1 in view.boxes.tolist()]
    np.testing.assert_allclose(flipped.boxes, expected, atol=1e-4)
    np.testing.assert_array_equal(flipped.image, view.image[:, ::-1])
    again = views.hflip(flipped)
    np.testing.assert_array_equal(again.image, view.image)
    np.testing.assert_allclose(again.boxes, view.boxes, atol=1e-4)
    np.testing.assert_array_equal(again.ids, view.ids)


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_painted_rectangle_stays_in_its_box(data: st.DataObject) -> None:
    """Paint a box; after crop, resize and flip, box and paint still bound each other within a pixel."""
    height, width = data.draw(st.integers(40, 120)), data.draw(st.integers(40, 120))
    x0, y0 = data.draw(st.integers(0, width - 16)), data.draw(st.integers(0, height - 16))
    x1, y1 = data.draw(st.integers(x0 + 16, width)), data.draw(st.integers(y0 + 16, height))
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 2] = 255
    image[y0:y1, x0:x1] = (255, 0, 0)
    view = View(image, np.array([[x0, y0, x1, y1]], np.float32), np.array([5]))
    size = data.draw(st.tuples(st.integers(32, 160), st.integers(32, 160)))
    crop = views.random_crop_box(height, width, np.random.default_rng(data.draw(st.integers(0, 1000))))
    out = views.crop_and_resize(view, crop, size)
    if data.draw(st.booleans()):
        out = views.hflip(out)
    red = out.image[..., 0] > out.image[..., 2]
    if not views.visible(out.boxes, min_side_px=3)[0]:
        assert red.sum() <= 4 * max(size)  # a sliver of at most that many pixels
        return
    # An edge lies where the colours are mixed half and half: one source pixel wide.
    scale = max(size[0] / (crop[3] - crop[1]), size[1] / (crop[2] - crop[0]), 1)
    assert np.abs(np.array(bounds(red)) - out.boxes[0]).max() <= 0.75 + 0.5 * scale


# ------------------------------------------------------------------------------------------- random crops


def test_random_crop_has_the_area_and_ratio_asked_for() -> None:
    rng = np.random.default_rng(0)
    crops = np.array([views.random_crop_box(480, 640, rng) for _ in range(3000)])
    w, h = crops[:, 2] - crops[:, 0], crops[:, 3] - crops[:, 1]
    assert crops.min() >= 0
    assert crops[:, 2].max() <= 640
    assert crops[:, 3].max() <= 480
    areas, ratios = w * h / (480 * 640), w / h
    assert 0.49 < areas.min() < 0.52
    assert 0.95 < areas.max() <= 1
    assert 0.74 < ratios.min() < 0.77
    assert 1.3 < ratios.max() < 1.35
    # Positions are uniform: as far from the left edge as from the right, on average.
    assert abs((crops[:, 0] + crops[:, 2]).mean() / 2 - 320) < 4
    assert abs((crops[:, 1] + crops[:, 3]).mean() / 2 - 240) < 3


def test_random_crop_is_distributed_as_torchvisions() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.zeros(3, 96, 96)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )  # y, x, h, w
    rng = np.random.default_rng(0)
    ours = np.array([views.random_crop_box(96, 96, rng) for _ in range(4000)])
    ours = np.stack([ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], axis=1)
    for column in range(4):
        quantiles = [np.quantile(sample[:, column], [0.05, 0.25, 0.5, 0.75, 0.95]) for sample in (ours, theirs)]
        np.testing.assert_allclose(*quantiles, atol=2.5)


@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [(10, 400, (193, 0, 206, 10)), (400, 9, (0, 194, 9, 206)), (1, 1, (0, 0, 1, 1))],
)
def test_random_crop_falls_back_to_the_centre(height: int, width: int, crop: tuple[int, ...]) -> None:
    assert views.random_crop_box(height, width, np.random.default_rng(0), scale=(0.9, 1.0)) == crop


def test_random_crop_can_keep_the_ratio() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        x0, y0, x1, y1 = views.random_crop_box(300, 600, rng, ratio=None)
        assert abs((x1 - x0) - 2 * (y1 - y0)) <= 2
        assert (x1 - x0) * (y1 - y0) >= 0.49 * 300 * 600


# --------------------------------------------------------------------------------------------- box jitter


@pytest.mark.parametrize("seed", SEEDS)
def test_jitter_is_the_equation_of_the_paper(seed: int) -> None:
    boxes = random_boxes(np.random.default_rng(seed), 9, 100, 200)
    out = views.jitter_boxes(boxes, np.random.default_rng(seed), height=100, width=200)
    draws = np.random.default_rng(seed)
    hits = draws.random(9) < 0.5
    expected = []
    for box, hit in zip(boxes.tolist(), hits, strict=True):
        r = [2 * 0.1 * draws.random() - 0.1 for _ in range(4)]
        x, y, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]
        if hit:
            x, y, w, h = x + r[0] * w, y + r[1] * h, w + r[2] * w, h + r[3] * h
        expected.append([max(x - w / 2, 0), max(y - h / 2, 0), min(x + w / 2, 200), min(y + h / 2, 100)])
    assert 0 < hits.sum() < 9
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-4)
    np.testing.assert_array_equal(out[~hits], boxes[~hits])


def test_jitter_statistics() -> None:
    """Half of the boxes; centre and size move on their own, each by U(-.1, .1) of the side."""
    boxes = np.tile(np.array([[400, 300, 500, 500]], np.float32), (8000, 1))
    out = views.jitter_boxes(boxes, np.random.default_rng(1), height=1000, width=1000)
    moved = (out != boxes).any(axis=1)
    assert abs(moved.mean() - 0.5) < 0.02
    sides = out[moved, 2:] - out[moved, :2]
    centres = (out[moved, 2:] + out[moved, :2]) / 2
    r = np.concatenate([(centres - (450, 400)) / (100, 200), sides / (100, 200) - 1], axis=1)
    assert np.abs(r).max() <= 0.1 + 1e-5
    np.testing.assert_allclose(np.quantile(r, [0.1, 0.5, 0.9], axis=0).T, [[-0.08, 0, 0.08]] * 4, atol=0.006)
    assert np.abs(np.corrcoef(r.T) - np.eye(4)).max() < 0.05


@pytest.mark.parametrize("frac", [0.1, 0.5])
def test_jittered_boxes_stay_in_the_view_and_keep_an_area(frac: float) -> None:
    rng = np.random.default_rng(0)
    corner = np.array([[0, 0, 1, 1], [95, 0, 96, 40], [0, 0, 96, 64], [0, 63, 2, 64]], np.float32)
    boxes = np.tile(corner, (2000, 1))
    out = views.jitter_boxes(boxes, rng, height=64, width=96, prob=1.0, frac=frac)
    assert out.min() >= 0
    assert (out <= (96, 64, 96, 64)).all()
    assert ((out[:, 2:] - out[:, :2]) >= 0.249 * (boxes[:, 2:] - boxes[:, :2])).all()


@pytest.mark.parametrize(("prob", "frac"), [(-0.1, 0.1), (1.1, 0.1), (0.5, 0.6), (0.5, math.nan)])
def test_jitter_out_of_range(prob: float, frac: float) -> None:
    with pytest.raises(SettingsError, match="expected a value from 0 to"):
        views.jitter_boxes(
            np.zeros((1, 4), np.float32), np.random.default_rng(0), height=9, width=9, prob=prob, frac=frac
        )


# -------------------------------------------------------------------------------------------- photometric


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.93, 1.0, 1.4])
@pytest.mark.parametrize("seed", SEEDS)
def test_jitter_operations_are_torchvisions(seed: int, factor: float) -> None:
    """Within one grey level: torchvision cuts fractions off, we round."""
    image = photo(seed)
    for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation"):
        ours = getattr(views, name)(image, factor)
        theirs = array(getattr(F, name)(tensor(image), factor))
        pillow = np.asarray(getattr(F, name)(Image.fromarray(image), factor))
        assert largest_difference(ours, theirs) <= 1, name
        assert largest_difference(ours, pillow) <= 2, name


@pytest.mark.parametrize("turns", [-0.1, -0.037, 0.0, 0.01, 0.1, 0.43])
@pytest.mark.parametrize("seed", SEEDS)
def test_hue_is_torchvisions(seed: int, turns: float) -> None:
    """8-bit HSV has 256 hues: a pixel may be a few levels off, the image is not."""
    image = photo(seed)
    exact = array(F.adjust_hue(tensor(image).double() / 255, turns)) * 255
    error = np.abs(views.adjust_hue(image, turns) - exact)
    assert error.mean() < 0.5
    assert np.quantile(error, 0.95) <= 2.5
    assert error.max() <= 7  # Pillow's own hue shift is up to 14 levels off


def test_hue_of_primary_colours() -> None:
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    green, blue = views.adjust_hue(red, 1 / 3), views.adjust_hue(red, -1 / 3)
    assert np.abs(green[0, 0].astype(int) - (0, 255, 0)).max() <= 3
    assert np.abs(blue[0, 0].astype(int) - (0, 0, 255)).max() <= 3
    grey = np.full((4, 4, 3), 90, np.uint8)
    np.testing.assert_array_equal(views.adjust_hue(grey, 0.1), grey)


@pytest.mark.parametrize("seed", SEEDS)
def test_greyscale_is_torchvisions(seed: int) -> None:
    image = photo(seed)
    ours = views.greyscale(image)
    assert largest_difference(ours, array(F.rgb_to_grayscale(tensor(image), 3))) <= 1
    assert largest_difference(ours, np.asarray(F.rgb_to_grayscale(Image.fromarray(image), 3))) <= 1
    assert (ours == ours[..., :1]).all()


@pytest.mark.parametrize("sigma", [0.1, 0.33, 0.7, 1.3, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_blur_is_torchvisions(seed: int, sigma: float) -> None:
    """Ours ends at 3 sigma, theirs (23 taps, as in BYOL for 224 px) goes on."""
    image = photo(seed)
    theirs = array(F.gaussian_blur(tensor(image), [23, 23], [sigma, sigma]))
    assert largest_difference(views.gaussian_blur(image, sigma), theirs) <= 2


def test_blur_keeps_a_constant_and_takes_small_images() -> None:
    for value in (0, 1, 128, 255):
        image = np.full((5, 3, 3), value, np.uint8)
        np.testing.assert_array_equal(views.gaussian_blur(image, 2.0), image)


@pytest.mark.parametrize("threshold", [0, 1, 128, 200, 255])
def test_solarise_is_torchvisions(threshold: int) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(8, 32, 1).repeat(3, axis=2)
    np.testing.assert_array_equal(views.solarised(image, threshold), array(F.solarize(tensor(image), threshold)))


def test_photometric_draws_with_its_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count which operations run, in which order, with which arguments."""
    calls: list[tuple[str, float]] = []

    def spy(name: str) -> None:
        def record(image: np.ndarray, value: float = math.nan) -> np.ndarray:
            calls.append((name, value))
            return image

        monkeypatch.setattr(views, name, record)

    for name in ("brightness", "contrast", "saturation", "hue"):
        spy(f"adjust_{name}")
    for name in ("greyscale", "gaussian_blur", "solarised"):
        spy(name)
    transform = Photometric(blur_prob=0.1, solarise_prob=0.3)
    rng, image = np.random.default_rng(0), photo(0)
    runs = 4000
    jittered = 0
    values: dict[str, list[float]] = {}
    positions: dict[str, list[int]] = {}
    jitters, happened = [], []
    for _ in range(runs):
        calls.clear()
        transform(image, rng)
        names = [name for name, _ in calls]
        jitter = [name for name in names if name.startswith("adjust")]
        assert len(jitter) in (0, 4)
        assert names[: len(jitter)] == jitter
        rest = names[len(jitter) :]
        assert rest == [name for name in ("greyscale", "gaussian_blur", "solarised") if name in rest]
        jittered += bool(jitter)
        happened.append([bool(jitter), *(name in rest for name in ("greyscale", "gaussian_blur", "solarised"))])
        if jitter:
            draws = dict(calls)
            order = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
            jitters.append([*(draws[name] for name in order), *(names.index(name) for name in order[:3])])
        for position, (name, value) in enumerate(calls):
            values.setdefault(name, []).append(value)
            positions.setdefault(name, []).append(position)
    assert abs(jittered / runs - 0.8) < 0.025
    for name, prob in {"greyscale": 0.2, "gaussian_blur": 0.1, "solarised": 0.3}.items():
        assert abs(len(values[name]) / runs - prob) < 0.025
    expected = {
        "adjust_brightness": (0.6, 1.4),
        "adjust_contrast": (0.6, 1.4),
        "adjust_saturation": (0.8, 1.2),
        "adjust_hue": (-0.1, 0.1),
        "gaussian_blur": (0.1, 2.0),
    }
    for name, (low, high) in expected.items():
        drawn = np.array(values[name])
        assert low <= drawn.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.04 * (high - low)
        if name.startswith("adjust"):  # every operation is as often first as last
            assert np.abs(np.bincount(positions[name], minlength=4) / jittered - 0.25).max() < 0.03
    assert set(values["solarised"]) == {128}
    # The four events are independent; so are the factors, of each other and of the order. Two positions of a
    # permutation of 4 are not: their correlation is -1/3.
    assert np.abs(np.corrcoef(np.array(happened, float).T) - np.eye(4)).max() < 0.06
    correlation = np.corrcoef(np.array(jitters).T)
    expected_correlation = np.eye(7)
    expected_correlation[4:, 4:] = np.where(np.eye(3), 1, -1 / 3)
    assert np.abs(correlation - expected_correlation).max() < 0.07


def test_photometric_is_its_operations_in_the_order_of_byol() -> None:
    image = photo(2)
    everything = Photometric(hue=0, contrast=0, saturation=0, jitter_prob=1, grey_prob=1, blur_prob=1, solarise_prob=1)
    out = everything(image, np.random.default_rng(4))
    draws = np.random.default_rng(4).random(13)
    expected = views.adjust_brightness(image, 0.6 + 0.8 * draws[5])
    expected = views.gaussian_blur(views.greyscale(expected), 0.1 + 1.9 * draws[4])
    np.testing.assert_array_equal(out, views.solarised(expected, 128))


def test_photometric_same_rng_same_image_and_the_input_stays() -> None:
    transform = Photometric(blur_prob=0.5, solarise_prob=0.5)
    image = photo(1)
    before = image.copy()
    image.flags.writeable = False
    first = [transform(image, rng) for rng in [np.random.default_rng(7)] for _ in range(20)]
    second = [transform(image, rng) for rng in [np.random.default_rng(7)] for _ in range(20)]
    other = transform(image, np.random.default_rng(8))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == image.shape
        assert a.dtype == np.uint8
    assert (other != first[0]).any()
    np.testing.assert_array_equal(image, before)


def test_photometric_uses_as_many_draws_whatever_happens() -> None:
    states = []
    for prob in (0.0, 1.0):
        rng = np.random.default_rng(3)
        Photometric(jitter_prob=prob, grey_prob=prob, blur_prob=prob, solarise_prob=prob)(photo(0), rng)
        states.append(rng.bit_generator.state)
    assert states[0] == states[1]


def test_photometric_with_nothing_on_changes_nothing() -> None:
    image = photo(0)
    off = Photometric(jitter_prob=0, grey_prob=0, blur_prob=0, solarise_prob=0)
    flat = Photometric(brightness=0, contrast=0, saturation=0, hue=0, grey_prob=0, blur_prob=0, solarise_prob=0)
    for transform in (off, flat):
        np.testing.assert_array_equal(transform(image, np.random.default_rng(0)), image)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"jitter_prob": 1.5}, "jitter_prob: 1.5; expected a value from 0 to 1"),
        ({"blur_prob": -0.1}, "blur_prob"),
        ({"brightness": -1}, "brightness"),
        ({"hue": 0.6}, "hue: 0.6; expected a value from 0 to 0.5"),
        ({"saturation": math.nan}, "saturation"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"solarise_threshold": 300}, "solarise_threshold"),
    ],
)
def test_photometric_out_of_range(wrong: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Photometric(**{"blur_prob": 0.1, "solarise_prob": 0.2, **wrong})


# ------------------------------------------------------------------------------------------------ together


def pipeline(view: View, rng: np.random.Generator) -> View:
    out = views.resize(view, (64, 64))
    out = views.crop_and_resize(out, views.random_crop_box(*out.size, rng), (64, 64))
    out.boxes = views.jitter_boxes(out.boxes, rng, height=64, width=64)
    if rng.random() < 0.5:
        out = views.hflip(out)
    return View(Photometric(blur_prob=0.5, solarise_prob=0.2)(out.image, rng), out.boxes, out.ids)


def test_no_global_state_takes_part() -> None:
    view = random_view(0)
    np.random.seed(1)
    first = [pipeline(view, np.random.default_rng(seed)) for seed in range(10)]
    np.random.seed(2)
    second = [pipeline(view, np.random.default_rng(seed)) for seed in range(10)]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.ids, view.ids)
    assert any((a.image != first[0].image).any() for a in first[1:])


def test_zero_boxes_work_everywhere() -> None:
    out = pipeline(random_view(0, n=0), np.random.default_rng(0))
    assert out.boxes.shape == (0, 4)
    assert out.boxes.dtype == np.float32
    assert out.ids.shape == (0,)
    assert views.visible(out.boxes).shape == (0,)
    assert out.take(views.visible(out.boxes)).boxes.shape == (0, 4)


def test_old_views_are_never_written_to() -> None:
    view = random_view(0)
    for part in (view.image, view.boxes, view.ids):
        part.flags.writeable = False
    for seed in range(10):
        pipeline(view, np.random.default_rng(seed))


def test_images_come_out_contiguous() -> None:
    view = random_view(0)
    for out in (views.hflip(view), views.crop_and_resize(view, (3, 4, 23, 34), (30, 20))):
        assert out.image.flags.c_contiguous


def test_worker_init_leaves_opencv_one_thread_and_views_need_no_torch() -> None:
    code = (
        "import sys; import cv2; from headstart import views; cv2.setNumThreads(4); views.worker_init(0); "
        "assert cv2.getNumThreads() == 1, cv2.getNumThreads(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -------------------------------------------------------------------------------------------- sizes, as DETR has them


@pytest.mark.parametrize(
    ("size", "short", "long", "wanted"),
    [((60, 80), 30, None, (30, 40)), ((80, 60), 30, None, (40, 30)), ((40, 160), 80, 100, (25, 100))],
)
def test_resize_short_keeps_the_shape(size, short, long, wanted):
    view = random_view(0, height=size[0], width=size[1])
    resized = views.resize_short(view, short, long)
    assert resized.size == wanted
    factor = np.array([wanted[1] / size[1], wanted[0] / size[0]] * 2, np.float32)
    np.testing.assert_allclose(resized.boxes, view.boxes * factor, atol=1e-3)
    assert resized.ids.tolist() == view.ids.tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_random_size_crop_is_a_piece_of_the_image(seed):
    view = random_view(seed)
    cropped = views.random_size_crop(view, 20, 50, np.random.default_rng(seed))
    height, width = cropped.size
    assert 20 <= height <= 50
    assert 20 <= width <= 50
    places = [
        (y, x)
        for y in range(view.size[0] - height + 1)
        for x in range(view.size[1] - width + 1)
        if np.array_equal(view.image[y : y + height, x : x + width], cropped.image)
    ]
    assert len(places) == 1
    ((y, x),) = places
    moved = view.boxes - np.array([x, y, x, y], np.float32)
    np.testing.assert_allclose(cropped.boxes, moved.clip(0, [width, height, width, height]), atol=1e-4)


def test_random_size_crop_of_a_small_image_is_all_of_it():
    view = random_view(0, height=12, width=15)
    cropped = views.random_size_crop(view, 20, 50, np.random.default_rng(0))
    assert np.array_equal(cropped.image, view.image)


def test_jitter_scale_cuts_what_is_larger_than_the_canvas_and_pads_nothing():
    view = random_view(1)
    sizes = set()
    for seed in range(40):
        jittered = views.jitter_scale(view, (0.25, 2.0), 64, np.random.default_rng(seed))
        assert max(jittered.size) <= 64
        assert (jittered.boxes >= 0).all()
        assert (jittered.boxes <= 64).all()
        sizes.add(jittered.size)
    assert min(min(size) for size in sizes) < 24  # scaled down, and left so
    assert (64, 64) in sizes  # scaled up, and cut
    same = views.jitter_scale(view, (1.0, 1.0), 83, np.random.default_rng(0))
    np.testing.assert_allclose(same.boxes, view.boxes, atol=1e-3)
