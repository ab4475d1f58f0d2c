import numpy as np
import pytest
import torch

from headstart import boxes as box_ops

RNG = np.random.default_rng(0)


def some_boxes(*shape):
    corner = RNG.uniform(-20, 90, (*shape, 2))
    return np.concatenate([corner, corner + RNG.uniform(0, 60, (*shape, 2))], -1).astype(np.float32)


@pytest.fixture(params=["numpy", "torch"])
def kind(request):
    """Turns an array into what is tested, and checks that the result is of that kind."""
    convert = np.array if request.param == "numpy" else torch.tensor

    def call(function, *arrays, **rest):
        inputs = [convert(a) for a in arrays]
        before = [np.asarray(i).copy() for i in inputs]
        result = function(*inputs, **rest)
        assert type(result) is type(inputs[0])
        assert result.dtype == inputs[0].dtype
        for array, old in zip(inputs, before, strict=True):
            np.testing.assert_array_equal(np.asarray(array), old)
        return np.asarray(result)

    return call


def slow_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = width * height if width > 0 and height > 0 else 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union else 0.0


def test_iou_against_a_loop(kind):
    a, b = some_boxes(7), some_boxes(5)
    b[0] = a[3]
    b[1, 2:] = b[1, :2]  # empty
    expected = [[slow_iou(x, y) for y in b.astype(float)] for x in a.astype(float)]
    np.testing.assert_allclose(kind(box_ops.iou, a, b), expected, atol=1e-6)
    assert kind(box_ops.iou, a, b)[3, 0] == pytest.approx(1)


def test_iou_of_batches_is_that_of_each(kind):
    a, b = some_boxes(3, 4), some_boxes(3, 6)
    together = kind(box_ops.iou, a, b)
    assert together.shape == (3, 4, 6)
    for i in range(3):
        np.testing.assert_array_equal(together[i], kind(box_ops.iou, a[i], b[i]))


def test_two_empty_boxes_have_no_overlap(kind):
    assert kind(box_ops.iou, np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)) == 0


def test_area_and_size(kind):
    boxes = np.array([[1, 2, 4, 14], [5, 5, 5, 9], [5, 5, 3, 2]], np.float32)
    np.testing.assert_array_equal(kind(box_ops.area, boxes), [36, 0, 0])
    np.testing.assert_array_equal(kind(box_ops.size, boxes), [6, 0, 0])


def test_clip_against_a_loop(kind):
    boxes = some_boxes(20)
    expected = [
        [min(max(x1, 0), 70), min(max(y1, 0), 50), min(max(x2, 0), 70), min(max(y2, 0), 50)] for x1, y1, x2, y2 in boxes
    ]
    np.testing.assert_array_equal(kind(box_ops.clip, boxes, width=70, height=50), expected)


def test_crop_resize_flip_move_boxes_as_they_move_pixels(kind):
    """Paint a box into an image, transform both, find the painted pixels again."""
    height, width = 24, 30
    box = np.array([[6, 4, 12, 20]], np.float32)
    image = np.zeros((height, width))
    image[4:20, 6:12] = 1

    def painted(pixels):
        y, x = np.nonzero(pixels)
        return [[x.min(), y.min(), x.max() + 1, y.max() + 1]]

    np.testing.assert_array_equal(kind(box_ops.flip, box, width=width), painted(image[:, ::-1]))
    np.testing.assert_array_equal(kind(box_ops.crop, box, left=5, top=2), painted(image[2:, 5:]))
    larger = image.repeat(3, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(kind(box_ops.resize, box, scale_x=2, scale_y=3), painted(larger))


def test_crop_and_resize_take_one_number_a_view():
    boxes = some_boxes(3, 4)
    left, top = RNG.uniform(0, 9, (2, 3, 1)).astype(np.float32)
    moved, scaled = box_ops.crop(boxes, left, top), box_ops.resize(boxes, left, top)
    for view in range(3):
        np.testing.assert_array_equal(moved[view], box_ops.crop(boxes[view], left[view, 0], top[view, 0]))
        np.testing.assert_array_equal(scaled[view], box_ops.resize(boxes[view], left[view, 0], top[view, 0]))


@pytest.mark.parametrize("function", [box_ops.area, box_ops.size])
def test_no_boxes(kind, function):
    none = np.zeros((0, 4), np.float32)
    assert kind(function, none).shape == (0,)
    assert kind(box_ops.iou, none, some_boxes(3)).shape == (0, 3)
    assert kind(box_ops.clip, none, width=5, height=5).shape == (0, 4)
