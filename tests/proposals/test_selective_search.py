"""Selective Search as a whole; its steps are in test_kernels.py."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import cv2
import numpy as np
import plain_search as plain
import pytest

from headstart.proposals import SEARCH_DEFAULTS, ProposalSettings, kernels, make_engine
from headstart.proposals import selective_search as module
from headstart.proposals.selective_search import DIVERSE, MODES, SelectiveSearch, prepare, selective_search

ENTRIES = ("segment", "describe", "overlapping", "adjacent", "group", "hsv_bins", "even_bins")
RNG = np.random.default_rng(0)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey(height, width, seed=0):
    return noise(height, width, seed)[..., :1].repeat(3, -1)


def chequers(height, width):
    y, x = np.indices((height, width))
    return np.where((y + x) % 2, 255, 0).astype(np.uint8)[..., None].repeat(3, -1)


def reference_boxes(image, scale, sigma, min_size):
    """x, y, x + w, y + h of the regions of the package itself, in its order."""
    reference = pytest.importorskip("selectivesearch")
    _, regions = reference.selective_search(image, scale, sigma, min_size)
    return [(x, y, x + w, y + h) for x, y, w, h in (region["rect"] for region in regions)]


# exact

PARAMETERS = [(500, 0.9, 10), (300, 0.9, 100), (100, 0.8, 20), (1.0, 0.8, 50)]


@pytest.mark.filterwarnings("ignore:Applying `local_binary_pattern` to floating-point images")
@pytest.mark.parametrize(("scale", "sigma", "min_size"), PARAMETERS)
@pytest.mark.parametrize("name", plain.PHOTOS)
def test_exact_is_the_reference_on_photographs(name, scale, sigma, min_size):
    image = plain.library_photo(name, 120)
    expected = reference_boxes(image, scale, sigma, min_size)
    assert len(expected) > 4
    np.testing.assert_array_equal(selective_search(image, scale, sigma, min_size, "exact"), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Applying `local_binary_pattern` to floating-point images")
@pytest.mark.parametrize(("scale", "sigma", "min_size"), [(500, 0.9, 10), (300, 0.9, 100), (60, 0.7, 20)])
@pytest.mark.parametrize("name", plain.PHOTOS)
def test_exact_is_the_reference_on_larger_photographs(name, scale, sigma, min_size):
    image = plain.library_photo(name, 400)
    expected = reference_boxes(image, scale, sigma, min_size)
    np.testing.assert_array_equal(selective_search(image, scale, sigma, min_size, "exact"), expected)


@pytest.mark.filterwarnings("ignore:Applying `local_binary_pattern` to floating-point images")
@pytest.mark.parametrize(("scale", "sigma", "min_size"), [(500, 0.9, 10), (20, 0, 1), (100, 0.5, 5)])
@pytest.mark.parametrize(
    "image",
    [
        plain.drawing(70, 90, 0),
        plain.drawing(60, 60, 1, colours=3, shapes=40),
        plain.library_photo("grace_hopper.jpg", 70) // 64 * 64,
        chequers(24, 31),
        noise(30, 30, 2) // 128 * 255,
        grey(40, 30, 3),
        noise(1, 40),
        noise(40, 1),
        noise(2, 2),
        noise(1, 1),
        np.zeros((20, 30, 3), np.uint8),
        np.full((20, 30, 3), 255, np.uint8),
    ],
    ids=[
        *("drawing", "crumbs", "posterised", "chequers", "two levels", "grey"),
        *("row", "column", "2 x 2", "pixel", "black", "white"),
    ],
)
def test_exact_is_the_reference_with_a_stable_sort_on_any_image(monkeypatch, image, scale, sigma, min_size):
    """Edges of equal cost keep the order of a stable sort, which the reference does not have by itself."""
    argsort = np.argsort
    monkeypatch.setattr(np, "argsort", lambda array: argsort(array, kind="stable"))
    expected = reference_boxes(image, scale, sigma, min_size)
    monkeypatch.undo()
    np.testing.assert_array_equal(selective_search(image, scale, sigma, min_size, "exact"), expected)


# fixed and diverse


@pytest.mark.parametrize(("scale", "sigma", "min_size"), [(100, 0.8, 50), (30, 0.9, 5), (10, 0, 3), (500, 0.5, 1)])
@pytest.mark.parametrize(
    "image",
    [
        *(plain.library_photo(name, 80) for name in ("grace_hopper.jpg",)),
        plain.drawing(60, 80, 0),
        plain.drawing(50, 50, 1, colours=3, shapes=40),
        noise(30, 40),
        grey(30, 30),
        chequers(20, 25),
        noise(1, 30),
        noise(30, 1),
    ],
    ids=["photo", "drawing", "crumbs", "noise", "grey", "chequers", "row", "column"],
)
def test_fixed_is_the_plain_search(image, scale, sigma, min_size):
    expected = plain.fixed(image, scale, sigma, min_size)
    np.testing.assert_array_equal(selective_search(image, scale, sigma, min_size), expected)


@pytest.mark.parametrize("name", [name for name in plain.PHOTOS if name.endswith("png")])
def test_fixed_is_the_plain_search_on_photographs(name):
    image = plain.library_photo(name, 80)
    expected = plain.fixed(image, 100, 0.8, 10)
    assert len(expected) > 20
    np.testing.assert_array_equal(selective_search(image, 100, 0.8, 10), expected)


@pytest.mark.parametrize(
    "image",
    [plain.library_photo("grace_hopper.jpg", 80), plain.drawing(50, 60, 0), noise(30, 30)],
    ids=["photo", "drawing", "noise"],
)
def test_diverse_is_several_plain_searches_in_turns(image):
    scale, sigma, min_size = 200, 0.8, 2
    hierarchies = []
    for strategy in DIVERSE:
        seen = image
        if strategy.colour != "rgb":
            seen = cv2.cvtColor(image, {"hsv": cv2.COLOR_RGB2HSV_FULL, "lab": cv2.COLOR_RGB2LAB}[strategy.colour])
        bins = plain.hsv_bins(image) if strategy.colour == "rgb" else seen.astype(int) * 25 // 256
        labels = plain.segment(seen, scale * strategy.scale, sigma, min_size * strategy.min_size)
        hierarchies += [plain.grouped_boxes(seen, labels, bins, weights) for weights in strategy.weights]
    assert len(hierarchies) > 3
    np.testing.assert_array_equal(
        selective_search(image, scale, sigma, min_size, "diverse"), plain.in_turns(hierarchies)
    )


def test_diverse_finds_more():
    image = plain.library_photo("grace_hopper.jpg", 200)
    fixed, diverse = (selective_search(image, 300, 0.8, 10, mode) for mode in ("fixed", "diverse"))
    assert len(diverse) > 2 * len(fixed)


IMAGES = {
    "photo": plain.library_photo("grace_hopper.jpg", 300),
    "drawing": plain.drawing(90, 120, 0),
    "noise": noise(120, 110),
    "grey": grey(60, 50),
    "chequers": chequers(33, 40),
    "saturated": noise(40, 40) // 128 * np.uint8(255),
    "flat": np.full((40, 30, 3), 128, np.uint8),
    "black": np.zeros((30, 40, 3), np.uint8),
    "row": noise(1, 90),
    "column": noise(90, 1),
    "two rows": noise(2, 50),
    "2 x 2": noise(2, 2),
    "pixel": noise(1, 1),
    "very wide": noise(1, 33_000).repeat(2, 0),
}


@pytest.mark.parametrize("parameters", [(), (500, 0.9, 10), (1, 0, 1), (50, 6.5, 0)], ids=str)
@pytest.mark.parametrize("mode", ["fixed", "diverse"])
@pytest.mark.parametrize("name", IMAGES)
def test_boxes_are_whole_and_lie_in_the_image(name, mode, parameters):
    image = IMAGES[name]
    height, width, _ = image.shape
    boxes = selective_search(image, *parameters, mode=mode)
    assert boxes.dtype == np.float32
    assert boxes.shape == (len(boxes), 4)
    np.testing.assert_array_equal(boxes, np.rint(boxes))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes[:, 2:] <= (width, height)).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert boxes[0].tolist() == [0, 0, width, height]


@pytest.mark.parametrize("mode", ["fixed", "diverse"])
@pytest.mark.parametrize("name", ["flat", "black", "pixel"])
def test_an_image_without_contents_is_one_box(name, mode):
    height, width, _ = IMAGES[name].shape
    assert selective_search(IMAGES[name], mode=mode).tolist() == [[0, 0, width, height]]
    assert selective_search(IMAGES[name], mode="exact").tolist() == [[0, 0, width - 1, height - 1]]


@pytest.mark.parametrize("mode", MODES)
def test_objects_are_found(mode):
    image = np.full((80, 120, 3), (90, 140, 60), np.uint8)
    objects = [(10, 12, 40, 50), (60, 20, 110, 44), (70, 50, 90, 70)]
    for (x1, y1, x2, y2), colour in zip(objects, ((220, 40, 30), (30, 60, 200), (240, 230, 90)), strict=True):
        image[y1:y2, x1:x2] = colour
    image = (image + np.random.default_rng(0).integers(-8, 9, image.shape)).astype(np.uint8)
    found = {tuple(box) for box in selective_search(image, 300, 0.5, 20, mode).astype(int).tolist()}
    for x1, y1, x2, y2 in objects:
        assert ((x1, y1, x2 - 1, y2 - 1) if mode == "exact" else (x1, y1, x2, y2)) in found


# The same boxes whatever else


@pytest.mark.parametrize("mode", MODES)
def test_layout_of_the_array_does_not_matter_and_it_stays_as_it_was(mode):
    image = plain.library_photo("grace_hopper.jpg", 100).copy()
    before = image.copy()
    expected = selective_search(image, mode=mode)
    read_only = image.copy()
    read_only.flags.writeable = False
    double = image.repeat(2, 0).repeat(2, 1)
    with_alpha = np.concatenate([image, image[..., :1]], -1)
    for same in (
        np.asfortranarray(image),
        read_only,
        double[::2, ::2],
        with_alpha[..., :3],
        image[::-1].copy()[::-1],
        np.moveaxis(np.moveaxis(image, -1, 0).copy(), 0, -1),
    ):
        np.testing.assert_array_equal(selective_search(same, mode=mode), expected)
        np.testing.assert_array_equal(same, before)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("mode", MODES)
def test_memory_used_before_does_not_matter(mode):
    """A thread works in the same memory again and again: other sizes and contents leave nothing behind."""
    small, large = plain.library_photo("grace_hopper.jpg", 60), noise(150, 170)
    results = {}

    def fresh():
        results["small"] = selective_search(small, mode=mode)

    thread = threading.Thread(target=fresh)
    thread.start()
    thread.join()
    for other in (large, large[:, :9], np.zeros((400, 3, 3), np.uint8)):
        selective_search(other, 10, 0.5, 1, mode)
        np.testing.assert_array_equal(selective_search(small, mode=mode), results["small"])


@pytest.mark.parametrize("mode", MODES)
def test_threads_side_by_side_find_what_one_finds_alone(mode):
    photo = plain.library_photo("grace_hopper.jpg", 200)
    images = [photo[: 60 + 17 * i % 100, 3 * i :] for i in range(24)]
    expected = [selective_search(image, 200, 0.8, 10, mode) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(lambda image: selective_search(image, 200, 0.8, 10, mode), images))
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)


def in_a_worker(image):
    """Boxes of all modes, and how much had to be compiled for them."""
    boxes = [SelectiveSearch(mode=mode)(image, RNG) for mode in MODES]
    return boxes, {name: getattr(kernels, name).stats.cache_misses.total() for name in ENTRIES}


def test_a_worker_finds_what_its_parent_finds_and_compiles_nothing():
    image = plain.library_photo("grace_hopper.jpg", 100)
    expected, _ = in_a_worker(image)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found, compilations = pool.submit(in_a_worker, image).result()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert compilations == dict.fromkeys(ENTRIES, 0)


def test_noise_of_which_each_pixel_is_a_segment():
    """The most segments there can be; one after the other is merged."""
    image = noise(160, 160)
    boxes = selective_search(image, 1e-6, 0, 0)
    assert len(boxes) > 25_600
    assert len(selective_search(image, 1e-6, 0, 0, "exact")) == 25_600  # boxes of 1 px have no inside: no neighbours


# Parameters


@pytest.mark.parametrize("mode", MODES)
def test_parameters_left_out_are_the_defaults_of_the_mode(mode):
    image = plain.library_photo("grace_hopper.jpg", 100)
    assert set(SEARCH_DEFAULTS) == set(MODES)
    defaults = SEARCH_DEFAULTS[mode]
    expected = selective_search(image, defaults["scale"], defaults["sigma"], int(defaults["min_size"]), mode)
    np.testing.assert_array_equal(selective_search(image, mode=mode), expected)
    for name, value in (("scale", 7), ("sigma", 0), ("min_size", 1)):  # each counts by itself
        changed = selective_search(image, mode=mode, **{name: value})
        np.testing.assert_array_equal(changed, selective_search(image, **{**defaults, name: value}, mode=mode))
        assert len(changed) != len(expected)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([[0, 0, 0]], TypeError, "expected an image as a uint8 NumPy array, got list"),
        (np.zeros((4, 4, 3)), TypeError, "got float64 array"),
        (np.zeros((4, 4, 3), np.int8), TypeError, "got int8 array"),
        (np.zeros((4, 4), np.uint8), ValueError, r"expected an RGB image \(H, W, 3\) .* got shape \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"got shape \(4, 4, 4\)"),
        (np.zeros((4, 4, 1), np.uint8), ValueError, r"got shape \(4, 4, 1\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), ValueError, r"got shape \(1, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"of 1 to 268,435,456 px, got shape \(0, 4, 3\)"),
        (np.zeros((4, 0, 3), np.uint8), ValueError, r"got shape \(4, 0, 3\)"),
        (np.broadcast_to(np.uint8(0), (2**14 + 1, 2**14, 3)), ValueError, r"got shape \(16385, 16384, 3\)"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_rgb_image_is_refused(image, error, message, mode):
    with pytest.raises(error, match=message):
        selective_search(image, mode=mode)


@pytest.mark.parametrize(
    "wrong",
    [{"scale": 0}, {"scale": -1}, {"scale": np.inf}, {"scale": np.nan}]
    + [{"sigma": -0.1}, {"sigma": 1001}, {"sigma": np.inf}, {"sigma": np.nan}, {"min_size": -1}],
    ids=str,
)
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(
        ValueError, match="expected scale > 0, 0 <= sigma <= 1000, min_size >= 0, got .*" + str(*wrong.values())
    ):
        selective_search(noise(8, 8), **wrong)


def test_min_size_may_be_larger_than_any_image():
    image = plain.drawing(30, 40, 0)
    assert len(selective_search(image, 10, 0.5, 2)) > 1
    for min_size in (30 * 40, 2**31, 2**32):
        assert selective_search(image, 10, 0.5, min_size).tolist() == [[0, 0, 40, 30]]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode='quality'; expected one of fixed, exact, diverse"):
        selective_search(noise(8, 8), mode="quality")


# The engine


def test_prepared_is_prepared_for_every_image():
    """Nothing is compiled, or loaded, in the midst of the work: one version of each function serves all of it."""
    prepare(show=False)
    image = noise(40, 50)
    read_only = image.copy()
    read_only.flags.writeable = False
    for mode in MODES:
        for each in (
            image,
            read_only,
            image[::2, ::-1],
            np.asfortranarray(image),
            image[:1],
            image[:, :1],
            image[:1, :1],
        ):
            selective_search(each, mode=mode)
        for parameters in ((100, 1, 10), (100.0, 0.0, 0), (np.float32(10), np.float64(0.5), np.int32(5))):
            selective_search(image, *parameters, mode)
    assert {name: len(getattr(kernels, name).signatures) for name in ENTRIES} == dict.fromkeys(ENTRIES, 1)


def test_every_entry_is_one_that_prepare_calls():
    entries = {
        name
        for name, value in vars(kernels).items()
        if getattr(value, "_cache", None).__class__.__name__ == "FunctionCache"
    }
    assert entries == set(ENTRIES)


@pytest.mark.parametrize("mode", MODES)
def test_engine_gives_the_boxes_of_the_function(mode):
    image = plain.library_photo("grace_hopper.jpg", 100)
    engine = make_engine(ProposalSettings(mode=mode, scale=60, sigma=0.7, min_size=9))
    assert isinstance(engine, SelectiveSearch)
    assert (engine.name, engine.version) == ("selective_search", module.VERSION)
    np.testing.assert_array_equal(engine(image, RNG), selective_search(image, 60, 0.7, 9, mode))
    np.testing.assert_array_equal(
        make_engine(ProposalSettings(mode=mode))(image, RNG), selective_search(image, mode=mode)
    )
    np.testing.assert_array_equal(SelectiveSearch(mode=mode)(image, RNG), selective_search(image, mode=mode))


def test_engine_draws_nothing():
    rng = np.random.default_rng(3)
    SelectiveSearch()(noise(20, 20), rng)
    assert rng.bit_generator.state == np.random.default_rng(3).bit_generator.state


@pytest.mark.parametrize(("show", "kept", "said"), [(True, False, True), (True, True, False), (False, False, False)])
def test_says_so_before_it_compiles(monkeypatch, capsys, show, kept, said):
    monkeypatch.setattr(module, "is_kept", lambda function: kept)
    SelectiveSearch(show=show)
    captured = capsys.readouterr()
    assert ("Compiling Selective Search: about 10 s" in captured.err) == said
    assert captured.out == ""
