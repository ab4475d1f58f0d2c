"""Every step of Selective Search against plain_search.py, and against scikit-image and selectivesearch themselves."""

from __future__ import annotations

import colorsys

import numpy as np
import plain_search as plain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.proposals import kernels
from headstart.proposals.selective_search import _value_bins

COLOUR = kernels.COLOUR_BINS
EQUAL = (1.0, 1.0, 1.0, 1.0)


def noise(height, width, seed, levels=256):
    """Pixels of a few even levels, down to two: the fewer, the more edges cost exactly the same."""
    values = np.random.default_rng(seed).integers(0, levels, (height, width, 3))
    return (values * 255 // (levels - 1)).astype(np.uint8)


def smooth(height, width, seed):
    """Noise with neighbours alike and hardly an edge like another: no ties, and segments of many sizes."""
    image = plain.blur(noise(height, width, seed), 2.0)
    image = (image - image.min()) / (image.max() - image.min()) * 255
    return np.clip(image + np.random.default_rng(seed).normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def padded(image):
    return np.pad(np.moveaxis(image, -1, 0), ((0, 0), (1, 1), (1, 1))).copy()


def segment(image, scale=100.0, sigma=0.9, min_size=10):
    """Labels of ``kernels.segment``; what it works in starts as rubbish."""
    height, width, _ = image.shape
    pixels = height * width

    def rubbish(dtype, *shape):
        return np.full(shape, 0xA5 if np.dtype(dtype).kind != "f" else np.nan, dtype)

    labels = rubbish(np.int32, height, width)
    n = kernels.segment(
        np.require(image, requirements=["C", "W"]),
        scale / 255.0,
        min_size,
        plain.gaussian(sigma).copy(),
        rubbish(np.uint8, 3, height + 2, width + 2),
        rubbish(np.float64, 3, height, width),
        rubbish(np.uint32, 4, pixels),
        rubbish(np.uint64, 4 * pixels + 1),
        rubbish(np.uint64, 4 * pixels + 1),
        rubbish(np.uint32, kernels.COUNTS),
        rubbish(np.uint32, pixels),
        rubbish(np.uint32, 2 * pixels),
        rubbish(np.uint32, pixels),
        labels,
    )
    assert n == labels.max() + 1
    return labels


def describe(image, labels, exact, bins=None):
    """histograms (n, B), sizes (n,), boxes (n, 4), codes (3, H, W) of ``kernels.describe``."""
    n = int(labels.max()) + 1
    found = np.empty((2 * n, COLOUR + 6 if exact else 105)), np.empty(2 * n, np.int32), np.empty((2 * n, 4), np.int32)
    codes = np.empty((3, *labels.shape), np.uint8)
    bins = np.empty_like(codes) if bins is None else np.ascontiguousarray(bins, np.uint8)
    value_bin = np.array([np.histogram(v, 25, (0.0, 255.0))[0].argmax() for v in range(256)], np.uint8)
    kernels.describe(padded(image), labels.astype(np.int32), n, exact, value_bin, bins, codes, *found)
    return *(array[:n] for array in found), codes


def blocks(height, width, seed, n):
    """(H, W) labels 0 .. n - 1 at random in blocks of 3 px: most segments are in several pieces."""
    coarse = np.random.default_rng(seed).integers(0, n, (height // 3 + 1, width // 3 + 1))
    labels = coarse.repeat(3, 0).repeat(3, 1)[:height, :width]
    return np.unique(labels, return_inverse=True)[1].reshape(height, width).astype(np.int32)


# Segmentation


@pytest.mark.parametrize("sigma", [0.2, 0.9, 1, 3.5])
@pytest.mark.parametrize("shape", [(7, 30), (1, 1), (1, 9), (40, 2)])
def test_the_plain_blur_has_the_bits_of_scipy(sigma, shape):
    ndimage = pytest.importorskip("scipy.ndimage")
    image = noise(*shape, 0)
    expected = ndimage.gaussian_filter(image * (1 / 255), (sigma, sigma, 0))
    np.testing.assert_array_equal(plain.blur(image, sigma), expected)


@pytest.mark.parametrize(
    ("scale", "sigma", "min_size"),
    [
        (500, 0.9, 10),
        (100, 0.9, 100),
        (100, 0.8, 1),
        (30, 0, 1),
        (1, 0.5, 0),
        (1e-3, 0.9, 5),
        (1e9, 0.9, 10),
        (60, 3, 3),
    ],
)
@pytest.mark.parametrize("image", [smooth(48, 64, 0), noise(40, 50, 1), noise(37, 41, 2, 3), plain.drawing(50, 40, 3)])
def test_segments_are_the_plain_ones(image, scale, sigma, min_size):
    expected = plain.segment(image, scale, sigma, min_size)
    np.testing.assert_array_equal(segment(image, scale, sigma, min_size), expected)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([2, 3, 5, 20, 256]),
    scale=st.floats(-3, 5).map(lambda power: 10**power),
    sigma=st.sampled_from([0.0, 0.1, 0.5, 0.9, 2.3]),
    min_size=st.integers(0, 60),
)
def test_segments_of_any_small_image_are_the_plain_ones(shape, seed, levels, scale, sigma, min_size):
    image = noise(*shape, seed, levels)
    expected = plain.segment(image, scale, sigma, min_size)
    np.testing.assert_array_equal(segment(image, scale, sigma, min_size), expected)


@pytest.mark.parametrize("cost", [0.0, 1 / 255, 3 / 255, 1.0])
@pytest.mark.parametrize("off", [-1e-7, -1e-9, 0, 1e-9, 1e-7])
def test_a_cost_close_to_the_threshold_is_compared_as_scikit_image_does(cost, off):
    """In float64 with a threshold of float32: 1e-9 more or less is nothing, where it rounds away."""
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1, 0] = round(cost * 255)
    scale = 255 * max(cost + off, 1e-12)
    np.testing.assert_array_equal(segment(image, scale, 0.0, 0), plain.segment(image, scale, 0.0, 0))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**32 - 1),
    highest=st.integers(1, 6),
    scale=st.integers(1, 24),
)
def test_costs_that_equal_thresholds(shape, seed, highest, scale):
    """Small whole numbers meet whole numbers divided by sizes."""
    grey = np.random.default_rng(seed).integers(0, highest + 1, (*shape, 1), dtype=np.uint8).repeat(3, -1)
    grey[..., 1:] = 0
    np.testing.assert_array_equal(segment(grey, scale, 0.0, 1), plain.segment(grey, scale, 0.0, 1))


@pytest.mark.parametrize("before", [0, 1])
def test_costs_that_equal_thresholds_of_segments(before):
    """Two halves one step apart, where scale / size, with the inner cost ``before``, is that step but for rounding."""
    rng = np.random.default_rng(0)
    joined = []
    for size in range(2, 40):
        for step in rng.integers(2, 80, (25, 3)):
            row = np.full((1, 2 * size, 3), 100, np.uint8)
            row[:, size:] += step.astype(np.uint8)
            row[:, [0, -1], 0] -= before
            scale = (np.sqrt(float(step @ step)) - before) * size
            labels = segment(row, scale, 0.0, 1)
            np.testing.assert_array_equal(labels, plain.segment(row, scale, 0.0, 1))
            joined.append(labels[0, -1] == labels[0, 0])
    assert 0.2 < np.mean(joined) < 0.8


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(-12, 0).map(lambda power: 10**power),
    sigma=st.sampled_from([0.9, 2.0, 4.0]),
    lights=st.integers(1, 5),
    min_size=st.sampled_from([1, 2, 20, 100]),
)
def test_very_small_costs(seed, scale, sigma, lights, min_size):
    """Single dim pixels in the dark, blurred: nearly flat, and with many costs that are hardly more than none."""
    image = np.zeros((20, 26, 3), np.uint8)
    rng = np.random.default_rng(seed)
    image[rng.integers(0, 20, lights), rng.integers(0, 26, lights), rng.integers(0, 3, lights)] = 1
    expected = plain.segment(image, scale, sigma, min_size)
    np.testing.assert_array_equal(segment(image, scale, sigma, min_size), expected)


def test_a_pixel_between_two_segments_goes_to_the_nearer():
    """By whole numbers it is as near to one as to the other, by float64 often not; equal ones: to the left."""
    first, step = np.random.default_rng(0).integers(1, 85, (2, 40_000, 3))
    image = first[:, None] + step[:, None] * np.array([[0], [0], [1], [2], [2]])  # five pixels in a row
    _, left, middle, right, _ = np.moveaxis(image * (1 / 255), 1, 0)
    costs = []
    for one, other in ((left, middle), (middle, right)):
        r, g, b = (other - one).T
        costs.append(np.sqrt(r * r + g * g + b * b))
    nearer = np.where(costs[0] <= costs[1], 0, 4)
    assert 0.1 < np.mean(nearer == 4) < 0.9
    labels = segment(image.reshape(1, -1, 3).astype(np.uint8), 1e-9, 0.0, 2).reshape(-1, 5)
    np.testing.assert_array_equal(labels[:, 2], labels[np.arange(40_000), nearer])
    assert (labels[:, 0] != labels[:, 4]).all()


def test_edges_that_cost_just_what_a_round_ends_with():
    """A pixel whose edges cost 1, all others a little less; 1 is a round number in float32, too."""
    image = np.where(np.random.default_rng(0).random((40, 50, 1)) < 0.5, (254, 22, 0), 0).astype(np.uint8)
    image[9:12, 9:12] = 0
    image[10, 10] = (255, 0, 0)
    assert segment(image, 1e6, 0.0, 1).max() == 0


@pytest.mark.parametrize(
    ("scale", "sigma", "min_size"), [(500, 0.9, 10), (100, 0.9, 10), (1, 0.8, 20), (300, 0.9, 100), (50, 2.0, 1)]
)
@pytest.mark.parametrize("name", plain.PHOTOS)
def test_segments_of_photographs_are_those_of_scikit_image(name, scale, sigma, min_size):
    segmentation = pytest.importorskip("skimage.segmentation")
    image = plain.library_photo(name, 240)
    expected = segmentation.felzenszwalb(image, scale, sigma, min_size)
    assert expected.max() > 10
    np.testing.assert_array_equal(segment(image, scale, sigma, min_size), expected)


@pytest.mark.parametrize(("scale", "sigma", "min_size"), [(500, 0.9, 10), (20, 0, 1), (100, 0.4, 30)])
@pytest.mark.parametrize(
    "image", [plain.drawing(90, 120, 0), noise(80, 70, 1, 4), np.kron([[0, 1], [1, 0]] * 20, np.ones((4, 30)))]
)
def test_segments_of_drawings_are_those_of_scikit_image_with_a_stable_sort(monkeypatch, image, scale, sigma, min_size):
    segmentation = pytest.importorskip("skimage.segmentation")
    if image.ndim == 2:
        image = np.repeat(image[..., None] * 255, 3, -1).astype(np.uint8)
    argsort = np.argsort
    monkeypatch.setattr(np, "argsort", lambda array: argsort(array, kind="stable"))
    expected = segmentation.felzenszwalb(image, scale, sigma, min_size)
    np.testing.assert_array_equal(segment(image, scale, sigma, min_size), expected)


def same_parts(one, other):
    """Whether two label images are the same but for their numbers."""
    both = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1).shape[1]
    return both == one.max() + 1 == other.max() + 1


@pytest.mark.parametrize(("scale", "sigma", "min_size"), [(100, 0.9, 10), (20, 0.6, 1), (60, 1.3, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_what_leaves_the_costs_alone_leaves_the_segments_alone(seed, scale, sigma, min_size):
    """Mirroring, turning, adding a constant, exchanging channels: where no two costs are nearly equal."""
    image = smooth(45, 60, seed) // 2 + 30
    costs = np.sort([cost for cost, _, _ in plain.edges(plain.blur(image, sigma))])
    assert np.diff(costs).min() > 1e-13  # the image is fit for this test

    def parts(changed):
        return segment(changed, scale, sigma, min_size)

    expected = parts(image)
    assert 2 < expected.max() + 1 < image[..., 0].size / 4
    assert same_parts(parts(image[:, ::-1])[:, ::-1], expected)
    assert same_parts(parts(image[::-1])[::-1], expected)
    assert same_parts(parts(image.transpose(1, 0, 2)).T, expected)
    assert same_parts(parts(image + np.uint8(70)), expected)
    assert same_parts(parts(255 - image), expected)
    assert same_parts(parts(image[..., [2, 0, 1]]), expected)
    assert not same_parts(np.roll(expected, 1, 1), expected)


@pytest.mark.parametrize("min_size", [1, 10, 200, 10_000])
def test_segments_hang_together_and_none_is_too_small(min_size):
    ndimage = pytest.importorskip("scipy.ndimage")
    for image in (smooth(60, 80, 0), noise(60, 80, 1), plain.drawing(60, 80, 2)):
        labels = segment(image, 50, 0.9, min_size)
        assert np.bincount(labels.ravel()).min() >= min(min_size, labels.size)
        for label in range(labels.max() + 1):
            assert ndimage.label(labels == label, np.ones((3, 3)))[1] == 1
        first = np.unique(labels, return_index=True)[1]
        assert (np.diff(first) > 0).all()


def test_a_larger_scale_gives_fewer_segments():
    images = [smooth(60, 80, seed) for seed in range(4)]
    counts = [np.mean([segment(i, scale, 0.9, 1).max() for i in images]) for scale in (3, 10, 30, 100, 300, 1000)]
    assert (np.diff(counts) < 0).all()


# Features


def test_hsv_bins_of_a_great_many_colours():
    red, green, blue = np.meshgrid(np.r_[0:256:17, 1, 127, 254], np.arange(256), np.arange(256), indexing="ij")
    for image in np.stack([red, green, blue], -1).astype(np.uint8):
        for order in ([0, 1, 2], [1, 2, 0], [2, 0, 1]):
            colours = np.ascontiguousarray(image[..., order])
            bins = np.empty((3, 256, 256), np.uint8)
            kernels.hsv_bins(padded(colours), _value_bins(), bins)
            np.testing.assert_array_equal(np.moveaxis(bins, 0, -1), plain.hsv_bins(colours))


def test_the_plain_hsv_bins_are_those_of_the_standard_library():
    colours = noise(60, 60, 0)
    colours[:20] = noise(20, 60, 1, 6)
    for (r, g, b), bins in zip(colours.reshape(-1, 3).tolist(), plain.hsv_bins(colours).reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        for bin_, share in zip(bins, (h, s, v / 255), strict=True):
            assert bin_ in {min(int(25 * share + rounding), 24) for rounding in (-1e-9, 1e-9)}


def test_even_bins():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1) + np.array([0, 80, 160], np.uint8)
    bins = np.empty((3, 16, 16), np.uint8)
    kernels.even_bins(padded(image), bins)
    np.testing.assert_array_equal(np.moveaxis(bins, 0, -1), image.astype(int) * 25 // 256)
    assert set(np.bincount(bins[0].ravel())) == {10, 11}  # as even as 256 values in 25 bins can be


def codes_of(image):
    return describe(image, np.zeros(image.shape[:2], np.int32), exact=False, bins=np.zeros((3, *image.shape[:2])))[3]


@pytest.mark.parametrize(
    "image",
    [
        noise(40, 50, 0),
        noise(40, 50, 1, 3),
        smooth(30, 30, 2),
        plain.drawing(30, 40, 3),
        noise(1, 20, 4),
        noise(9, 1, 5),
    ],
)
def test_local_binary_patterns_are_the_plain_ones(image):
    expected = [plain.patterns(image[..., channel]) for channel in range(3)]
    np.testing.assert_array_equal(codes_of(image), expected)


def test_local_binary_patterns_where_a_corner_comes_closest_to_the_centre():
    """Of all sums s of two sides and differences t of the corner to the centre: those next to equality."""
    far, near = 0.70711, 0.29289
    s = np.arange(-510, 511).repeat(5)
    t = np.rint(-s * near / far).astype(int) + np.tile(np.arange(-2, 3), 1021)
    rows = []
    for centre in (0, 3, 100, 128, 200, 255):
        beside, above, corner = s // 2 + centre, s - s // 2 + centre, t + centre
        fits = np.all([(v >= 0) & (v <= 255) for v in (beside, above, corner)], axis=0)
        block = np.empty((fits.sum(), 3, 3), np.uint8)
        block[:, 1, 1] = centre
        block[:, 1, ::2], block[:, ::2, 1] = beside[fits, None], above[fits, None]
        block[:, ::2, ::2] = corner[fits, None, None]
        rows.append(block.reshape(-1, 3))
    image = np.repeat(np.concatenate(rows)[..., None], 3, -1)
    expected = plain.patterns(image[..., 0])
    corners = 0b10101010
    assert {code & corners for code in expected[1::3, 1].tolist()} == {0, corners}
    np.testing.assert_array_equal(codes_of(image)[0], expected)


@pytest.mark.filterwarnings("ignore:Applying `local_binary_pattern` to floating-point images")
def test_local_binary_patterns_are_those_of_scikit_image_where_no_corner_equals_the_centre():
    feature = pytest.importorskip("skimage.feature")
    for image in (noise(60, 70, 0), plain.library_photo("coffee.png", 120), noise(50, 50, 1, 6)):
        codes = codes_of(image)
        for channel in range(3):
            plane = image[..., channel]
            clear = ~plain.patterns(plane, ambiguous=True)
            assert clear.mean() > 0.5
            expected = feature.local_binary_pattern(plane.astype(float), 8, 1.0)
            np.testing.assert_array_equal(codes[channel][clear], expected[clear])


def test_a_flat_area_has_one_pattern():
    codes = codes_of(np.full((20, 400, 3), 77, np.uint8))
    assert (codes[:, 1:-1, 1:-1] == 255).all()


@pytest.mark.parametrize("seed", range(3))
def test_fixed_features_are_the_plain_ones(seed):
    image, labels = noise(40, 55, seed, 7), blocks(40, 55, seed, (1, 9, 60)[seed])
    bins = noise(40, 55, seed + 10).astype(int) * 25 // 256
    found, sizes, boxes, _ = describe(image, labels, False, np.moveaxis(bins, -1, 0))
    planes = [(bins[..., c], 25) for c in range(3)] + [
        (plain.patterns(image[..., c]) * 10 // 256, 10) for c in range(3)
    ]
    np.testing.assert_array_equal(found, plain.histograms(labels, planes))
    np.testing.assert_allclose(found.sum(1), 6)
    expected_sizes, expected_boxes = plain.sizes_and_boxes(labels)
    np.testing.assert_array_equal(sizes, expected_sizes)
    np.testing.assert_array_equal(boxes, expected_boxes)


@pytest.mark.filterwarnings("ignore:Applying `local_binary_pattern` to floating-point images")
@pytest.mark.parametrize(
    "image",
    [
        plain.library_photo("grace_hopper.jpg", 90),
        noise(40, 50, 0),
        noise(60, 40, 1, 3),
        plain.drawing(40, 120, 2),
        np.full((12, 700, 3), 9, np.uint8),  # a flat area's pattern depends on the place
        np.full((300, 20, 3), 255, np.uint8),
        noise(30, 300, 4, 2) // 64 * np.uint8(3),
        noise(1, 30, 5, 9),
        noise(60, 600, 6, 4)
        // 85,  # even steps: a corner equals its centre where a neighbour is one up and one is one down
    ],
    ids=["photo", "noise", "levels", "drawing", "wide", "high", "two", "row", "steps"],
)
def test_exact_features_are_those_of_the_reference(image):
    """Hue and saturation have one bin each that counts; of the 30 patterns' bins, two a channel do."""
    reference = pytest.importorskip("selectivesearch.selectivesearch")
    labels = blocks(*image.shape[:2], 0, 30)
    regions = reference._extract_regions(np.concatenate([image.astype(float), labels[..., None]], -1))
    histograms, sizes, boxes, _ = describe(image, labels, exact=True)
    assert len(regions) == len(sizes)
    for label, region in regions.items():
        i = int(label)
        colour, texture = region["hist_c"], region["hist_t"]
        counted = np.zeros(30, bool)
        counted[[0, 9, 10, 19, 20, 29]] = True
        assert colour[0] == colour[25] == 1
        assert not colour[1:25].any()
        assert not colour[26:50].any()
        assert not texture[~counted].any()
        np.testing.assert_array_equal(histograms[i], np.concatenate([colour[50:], texture[counted]]))
        assert sizes[i] == region["size"]
        assert boxes[i].tolist() == [region[side] for side in ("min_x", "min_y", "max_x", "max_y")]


# Neighbours


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), side=st.integers(1, 30))
def test_overlapping_pairs_are_the_plain_ones(seed, n, side):
    corners = np.random.default_rng(seed).integers(0, side, (n, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1)], -1).astype(np.int32)
    expected = np.array(plain.overlapping(boxes)).reshape(-1, 2)
    spare = np.concatenate([boxes, np.tile(np.int32([0, 0, side, side]), (n, 1))])  # rows from n on don't count
    np.testing.assert_array_equal(kernels.overlapping(spare, n), expected)


def test_overlapping_of_very_many_pairs():
    """All in each other, the first around the rest: more pairs than there was room for at first."""
    steps = np.arange(150, dtype=np.int32)
    boxes = np.stack([steps, steps, 400 - steps, 400 - steps], -1)
    expected = np.stack(np.triu_indices(150, 1), -1)
    np.testing.assert_array_equal(kernels.overlapping(boxes, 150), expected)
    np.testing.assert_array_equal(kernels.overlapping(boxes[::-1].copy(), 150), np.empty((0, 2)))


def test_overlapping_pairs_of_segments_are_those_of_the_reference():
    reference = pytest.importorskip("selectivesearch.selectivesearch")
    labels = segment(plain.library_photo("astronaut.png", 120), 30, 0.9, 5)
    _, boxes = plain.sizes_and_boxes(labels)
    regions = {i: dict(zip(("min_x", "min_y", "max_x", "max_y"), box, strict=True)) for i, box in enumerate(boxes)}
    expected = [(a, b) for (a, _), (b, _) in reference._extract_neighbours(regions)]
    assert len(expected) > 50
    np.testing.assert_array_equal(kernels.overlapping(boxes.astype(np.int32), len(boxes)), expected)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 700),
    block=st.booleans(),
)
def test_adjacent_pairs_are_the_plain_ones(shape, seed, n, block):
    labels = np.random.default_rng(seed).integers(0, n, shape)
    labels = blocks(*shape, seed, n) if block else np.unique(labels, return_inverse=True)[1].reshape(shape)
    n = int(labels.max()) + 1
    expected = np.array(plain.adjacent(labels)).reshape(-1, 2)
    np.testing.assert_array_equal(kernels.adjacent(labels.astype(np.int32), n), expected)


@pytest.mark.parametrize("order", ["rows", "random"])
def test_adjacent_pairs_when_each_pixel_is_a_segment(order):
    """Thousands of pairs, many more than there was room for at first."""
    labels = np.arange(40 * 50).reshape(40, 50)
    if order == "random":
        labels = np.random.default_rng(0).permutation(labels.ravel()).reshape(40, 50)
    found = kernels.adjacent(labels.astype(np.int32), labels.size)
    assert len(found) == 40 * 49 + 39 * 50 + 2 * 39 * 49
    np.testing.assert_array_equal(found, plain.adjacent(labels))


def test_pixels_that_touch_at_a_corner_make_neighbours():
    labels = np.array([[0, 1, 1], [1, 2, 1], [1, 1, 3]], np.int32)
    assert kernels.adjacent(labels, 4).tolist() == [[0, 1], [0, 2], [1, 2], [1, 3], [2, 3]]
    one_bend = np.array([[1, 0], [0, 1]], np.int32)
    assert kernels.adjacent(one_bend, 2).tolist() == [[0, 1]]


# Grouping


def things(n, seed, kinds, n_bins=6, parts=4):
    """Histograms, sizes and boxes of n segments of a few kinds: the fewer kinds, the more ties.

    Shares are of so many parts: 4 is exact in floating point, 7 is not.
    """
    rng = np.random.default_rng(seed)
    histograms = rng.integers(0, parts + 1, (kinds, n_bins)) / parts
    sizes = rng.integers(1, 1 + min(kinds, 50), kinds)
    corners = rng.integers(0, 2 + kinds, (kinds, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1)], -1)
    kind = rng.integers(0, kinds, n)
    return histograms[kind], sizes[kind], boxes[kind]


def compare(pairs, histograms, sizes, boxes, n_colour=4, sure=0.0, pixels=1000, weights=EQUAL):
    """Group both ways; returns the number of regions."""
    n = len(sizes)
    pairs = np.array(pairs, np.int32).reshape(-1, 2)
    looks, areas, places = (
        np.full((2 * n, histograms.shape[1]), np.nan),
        np.zeros(2 * n, np.int32),
        np.zeros((2 * n, 4), np.int32),
    )
    looks[:n], areas[:n], places[:n] = histograms, sizes, boxes
    expected = plain.group(pairs.tolist(), histograms, n_colour, sure, sizes, boxes, pixels, weights)
    count = kernels.group(pairs, n, looks, n_colour, sure, areas, places, pixels, np.array(weights))
    np.testing.assert_array_equal(places[:count], expected[2])
    np.testing.assert_array_equal(areas[:count], expected[1])
    np.testing.assert_array_equal(looks[:count], expected[0])
    return count


def some_pairs(n, density, seed):
    every = np.stack(np.triu_indices(n, 1), -1)
    return every[np.random.default_rng(seed).random(len(every)) < density]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    density=st.sampled_from([0.02, 0.1, 0.3, 1.0]),
    kinds=st.sampled_from([1, 2, 4, 1000]),
    weights=st.tuples(*4 * [st.sampled_from([0.0, 0.5, 1.0])]),
    n_colour=st.integers(0, 6),
    sure=st.sampled_from([0.0, 2.0]),
    parts=st.sampled_from([4, 7]),
)
def test_groups_of_any_small_graph_are_the_plain_ones(seed, n, density, kinds, weights, n_colour, sure, parts):
    compare(some_pairs(n, density, seed), *things(n, seed, kinds, parts=parts), n_colour, sure, weights=weights)


@pytest.mark.parametrize("kinds", [1, 3, 1000])
@pytest.mark.parametrize("weights", [EQUAL, (0.0, 0.0, 1.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)])
@pytest.mark.parametrize("shape", ["chain", "star", "last is the hub", "ring", "two halves", "grid", "no pairs"])
def test_groups_of_plain_shapes(shape, weights, kinds):
    n = 64
    step = np.arange(n)
    place = step.reshape(8, 8)
    pairs = {
        "chain": np.stack([step[:-1], step[1:]], -1),
        "star": np.stack([0 * step[1:], step[1:]], -1),
        "last is the hub": np.stack([step[:-1], 0 * step[1:] + n - 1], -1),
        "ring": np.concatenate([[[0, 1], [0, n - 1]], np.stack([step[1:-1], step[2:]], -1)]),
        "two halves": np.array([(a, b) for a, b in some_pairs(n, 0.2, 0) if (a < n // 2) == (b < n // 2)]),
        "grid": np.array(plain.adjacent(place)),
        "no pairs": np.empty((0, 2)),
    }[shape]
    count = compare(pairs, *things(n, 0, kinds), weights=weights)
    assert count == {"two halves": 2 * n - 2, "no pairs": n}.get(shape, 2 * n - 1)


def test_a_giant_with_hundreds_of_neighbours():
    """Each merge gives it new pairs with all that are left, so that dead ones are thrown out meanwhile."""
    n = 420
    assert n * n / 2 > 1 << 16  # pairs that are made; there is room for so many at first
    histograms, sizes, boxes = things(n, 0, 1000)
    sizes[0], boxes[0] = 300, (0, 0, 1000, 1000)
    assert compare([(0, i) for i in range(1, n)], histograms, sizes, boxes, weights=(1.0, 1.0, 0.0, 0.0)) == 2 * n - 1


def test_many_regions_of_which_few_are_neighbours():
    """More regions than there is room for pairs at first, so that there must come more."""
    n = 70_000
    histograms, sizes, boxes = things(n, 0, 1000, n_bins=3)
    places = np.sort(np.random.default_rng(0).choice(n, 80, replace=False))
    pairs = places[some_pairs(80, 0.1, 0)]
    assert n < compare(pairs, histograms, sizes, boxes, n_colour=2) < n + 80


def test_pairs_are_merged_youngest_first_where_all_are_alike():
    histograms, sizes, boxes = np.ones((4, 2)), np.full(4, 1), np.tile([0, 0, 4, 4], (4, 1))
    boxes[:, 0] = np.arange(4)
    pairs = np.array([(0, 1), (0, 2), (0, 3)], np.int32)
    looks, areas, places = np.ones((8, 2)), np.ones(8, np.int32), np.tile(boxes, (2, 1)).astype(np.int32)
    count = kernels.group(pairs, 4, looks, 1, 0.0, areas, places, 100, np.zeros(4))
    assert count == 7
    assert areas[4:7].tolist() == [2, 3, 4]
    # 0 and 3 first; then what they made and 2, the younger of its two pairs
    assert plain.group(pairs.tolist(), histograms, 1, 0.0, sizes, boxes, 100, (0.0,) * 4)[2][4:] == places[4:7].tolist()
