"""Views: crops, flips and colour, with boxes and object ids travelling along.

Plain functions on uint8 numpy images, for data workers. A method's ``views`` composes them; nothing here
knows a method. Every random draw comes from the ``rng`` passed in, so one generator state gives one view.

Coordinates count edges, not pixel centres: an image of width W spans x = 0..W, its first pixel is the box
(0, 0, 1, 1). OpenCV's and Pillow's resizing agree, so boxes scale by ``new / old`` without an offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from headstart.errors import SettingsError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L", torchvision and cv2.COLOR_RGB2GRAY
_CROP_TRIES = 10  # torchvision.transforms.RandomResizedCrop


def worker_init(worker_id: int = 0) -> None:
    """For ``DataLoader(worker_init_fn=...)``: OpenCV's own threads off; processes share the cores already."""
    cv2.setNumThreads(0)
    cv2.ocl.setUseOpenCL(False)


@dataclass
class View:
    """An augmented image and what is in it. Functions here return new views and never write into old ones.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        boxes: (n, 4) float32, xyxy in pixels of this view.
        ids: (n,) int64; equal id in two views of an image means the same object.
        frame: (4,) float32 or None: where the left, upper, right and lower edge of the first view's image are, px of
            this view. Beyond the view after a crop, left and right exchanged after a flip; so it tells where any
            point of one view is in another. None: nobody asked.
        labels: (n,) int64 or None: pseudo classes of the boxes, from 1. Put there when a view is ready: the functions
            here do not take them along, as they follow from ids.
    """

    image: np.ndarray
    boxes: np.ndarray
    ids: np.ndarray
    frame: np.ndarray | None = None
    labels: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.image.shape[:2]
        return height, width

    def take(self, which: np.ndarray) -> View:
        """The same image, some of its boxes: ``which`` is a mask (n,) or indices (k,), repeats allowed."""
        return View(self.image, self.boxes[which], self.ids[which], self.frame)


# ------------------------------------------------------------------------------------------------ geometry


def resize(view: View, size: tuple[int, int]) -> View:
    """The whole view at ``size`` (height, width); the aspect ratio is not kept."""
    height, width = view.size
    return crop_and_resize(view, (0, 0, width, height), size)


def random_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] | None = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A random crop of an image, as torchvision's RandomResizedCrop draws it.

    The area is ``U(scale)`` of the image's, the ratio of width to height log-uniform in ``ratio``. Ten tries
    to fit that into the image, then the largest central crop whose ratio is in range.

    Args:
        ratio: None keeps the image's own ratio.

    Returns:
        (x0, y0, x1, y1), whole pixels, inside the image and never empty.
    """
    low, high = ratio or (width / height, width / height)
    for _ in range(_CROP_TRIES):
        area = height * width * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, math.log(low), math.log(high)))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x0 = int(rng.integers(width - w + 1))
            y0 = int(rng.integers(height - h + 1))
            return x0, y0, x0 + w, y0 + h
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    x0, y0 = (width - w) // 2, (height - h) // 2
    return x0, y0, x0 + w, y0 + h


def resize_short(view: View, short_px: int, long_px: int | None = None) -> View:
    """The whole view, its aspect ratio kept: short side ``short_px``, less where the long one would pass ``long_px``.

    As DETR's and torchvision's detectors size their images.
    """
    height, width = view.size
    scale = short_px / min(height, width)
    if long_px is not None:
        scale = min(scale, long_px / max(height, width))
    return resize(view, (max(1, round(height * scale)), max(1, round(width * scale))))


def random_size_crop(view: View, low_px: int, high_px: int, rng: np.random.Generator) -> View:
    """DETR's RandomSizeCrop: any place, width and height uniform in ``low_px`` .. ``high_px`` or up to the image's own.

    Boxes stay, clipped to the crop; those outside have no area left.
    """
    height, width = view.size
    w = int(rng.integers(min(low_px, width), min(high_px, width) + 1))
    h = int(rng.integers(min(low_px, height), min(high_px, height) + 1))
    x0, y0 = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return crop_and_resize(view, (x0, y0, x0 + w, y0 + h), (h, w))


def jitter_scale(view: View, scales: tuple[float, float], canvas_px: int, rng: np.random.Generator) -> View:
    """Large-scale jitter (Ghiasi et al., 2021): sized to fit a canvas times a random scale, and cut where it is larger.

    Smaller than the canvas it stays as it is: batches of views pad, and know where an image ends.
    """
    height, width = view.size
    factor = canvas_px * _uniform(rng, *scales) / max(height, width)
    view = resize(view, (max(1, round(height * factor)), max(1, round(width * factor))))
    height, width = view.size
    y0, x0 = int(rng.integers(max(0, height - canvas_px) + 1)), int(rng.integers(max(0, width - canvas_px) + 1))
    y1, x1 = min(height, y0 + canvas_px), min(width, x0 + canvas_px)
    return crop_and_resize(view, (x0, y0, x1, y1), (y1 - y0, x1 - x0))


def crop_and_resize(view: View, crop: tuple[int, int, int, int], size: tuple[int, int]) -> View:
    """Cut out ``crop`` (x0, y0, x1, y1; whole pixels) and resize it to ``size`` (height, width).

    All boxes stay, in their order, clipped to the crop. Those outside of it have no area left; ask
    :func:`visible` which, and drop them from all views at once with :meth:`View.take`.
    """
    x0, y0, x1, y1 = crop
    height, width = view.size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"crop {crop} is empty or reaches over the image of {height} x {width} (H x W) pixels")
    new_height, new_width = size
    x_scale, y_scale = new_width / (x1 - x0), new_height / (y1 - y0)
    # One offset and one factor for each of x, y, x, y: no loop over boxes.
    offset = np.array((x0, y0, x0, y0), np.float32)
    factor = np.array((x_scale, y_scale, x_scale, y_scale), np.float32)
    boxes = (view.boxes - offset) * factor
    frame = None if view.frame is None else (view.frame - offset) * factor
    return View(_resized(view.image[y0:y1, x0:x1], size), _clip(boxes, new_height, new_width), view.ids, frame)


def visible(boxes: np.ndarray, min_side_px: float = 1.0) -> np.ndarray:
    """(n,) bool: which of ``boxes`` (n, 4) xyxy are at least ``min_side_px`` wide and high."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= min_side_px).all(axis=1)


def hflip(view: View) -> View:
    """Mirrored left to right."""
    width = np.float32(view.image.shape[1])
    boxes = view.boxes.copy()
    boxes[:, 0] = width - view.boxes[:, 2]
    boxes[:, 2] = width - view.boxes[:, 0]
    frame = None
    if view.frame is not None:
        x0, y0, x1, y1 = view.frame
        frame = np.array((width - x0, y0, width - x1, y1), np.float32)
    return View(cv2.flip(view.image, 1), boxes, view.ids, frame)


def jitter_boxes(
    boxes: np.ndarray,
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    prob: float = 0.5,
    frac: float = 0.1,
) -> np.ndarray:
    """SoCo's box jitter (section 3.2): each box, with ``prob``, becomes (x + r w, y + r h, w + r w, h + r h).

    Each of the four r is drawn on its own from U(-frac, frac), as in the released code; the paper has one
    symbol for all. x and y are the box's *centre*, as the paper defines them; the released code adds to the
    corner.

    Args:
        boxes: (n, 4) xyxy px, inside a view of ``height`` x ``width``.
        frac: at most 0.5: then along x and along y the new box still covers a quarter of the old one or more,
            and clipping it to the view leaves it an area.

    Returns:
        (n, 4) float32 xyxy px, clipped to the view.

    Raises:
        SettingsError: ``prob`` or ``frac`` is out of range.
    """
    _check_range("jitter prob", prob, 0, 1)
    _check_range("jitter frac", frac, 0, 0.5)
    hit = rng.random(len(boxes)) < prob
    r = (frac * hit[:, None] * (2 * rng.random((len(boxes), 4)) - 1)).astype(np.float32)
    sides = boxes[:, 2:] - boxes[:, :2]
    centres_shift = r[:, :2] * sides
    half_growth = r[:, 2:] * sides / 2
    jittered = boxes + np.concatenate([centres_shift - half_growth, centres_shift + half_growth], axis=1)
    return _clip(jittered, height, width)


def _clip(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    np.maximum(boxes, np.float32(0), out=boxes)
    return np.minimum(boxes, np.array((width, height, width, height), np.float32), out=boxes)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Area averaging on the axes that shrink, so that nothing aliases; bilinear on those that grow."""
    height, width = size
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    if smaller != image.shape[:2]:
        image = cv2.resize(image, smaller[::-1], interpolation=cv2.INTER_AREA)
    if size != smaller:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(image)


# ---------------------------------------------------------------------------------------------- photometric


@dataclass(frozen=True, kw_only=True)
class Photometric:
    """BYOL's colour pipeline without its crop and flip: jitter, greyscale, Gaussian blur, solarisation.

    Each of the four has its own probability; they come in this order. Called with an image (H, W, 3) uint8
    RGB it returns another one; the input is never written to, but comes back as it is when nothing is drawn.
    The number of draws is always the same: switching one operation off leaves the others' as they were.

    Attributes:
        brightness, contrast, saturation: factors are U(1 - value, 1 + value), not below 0.
        hue: a shift of U(-value, value) turns round the colour circle.
        jitter_prob: of the four above together; their order is random.
        blur_sigma: pixels, uniform between the two. The kernel ends at 3 sigma.
        solarise_threshold: channel values at or above it are inverted, v -> 255 - v.

    Raises:
        SettingsError: a value is out of range.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_prob: float
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_prob: float
    solarise_threshold: int = 128

    def __post_init__(self) -> None:
        for name in ("jitter_prob", "grey_prob", "blur_prob", "solarise_prob"):
            _check_range(name, getattr(self, name), 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            _check_range(name, getattr(self, name), 0, math.inf)
        _check_range("hue", self.hue, 0, 0.5)
        _check_range("solarise_threshold", self.solarise_threshold, 0, 256)
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1] < math.inf:
            raise SettingsError(f"blur_sigma: {self.blur_sigma}; expected two values above 0, the smaller first")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        draws = rng.random(13)
        jitter, grey, blur, solarise, sigma = draws[:5].tolist()
        if jitter < self.jitter_prob:
            image = self._jitter(image, draws[5:9].tolist(), draws[9:13])
        if grey < self.grey_prob:
            image = greyscale(image)
        if blur < self.blur_prob:
            low, high = self.blur_sigma
            image = gaussian_blur(image, low + (high - low) * sigma)
        if solarise < self.solarise_prob:
            image = solarised(image, self.solarise_threshold)
        return image

    def _jitter(self, image: np.ndarray, strength: list[float], keys: np.ndarray) -> np.ndarray:
        """``strength``: four draws from U(0, 1); ``keys``: four more, in whose order the operations run."""
        for operation in keys.argsort().tolist():
            if operation == 0 and self.brightness:
                image = adjust_brightness(image, _factor(strength[0], self.brightness))
            elif operation == 1 and self.contrast:
                image = adjust_contrast(image, _factor(strength[1], self.contrast))
            elif operation == 2 and self.saturation:
                image = adjust_saturation(image, _factor(strength[2], self.saturation))
            elif operation == 3 and self.hue:
                image = adjust_hue(image, self.hue * (2 * strength[3] - 1))
        return image


# (H, W, 3) uint8 RGB in and out; torchvision.transforms.functional's results within rounding. One saturating
# pass of OpenCV over the image each is what makes them several times faster.


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image``; 0 is black, 1 changes nothing."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * (mean grey of the image)``."""
    red, green, blue, _ = cv2.mean(image)
    mean = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * (the image in grey)``."""
    return cv2.addWeighted(image, factor, greyscale(image), 1 - factor, 0)


def adjust_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Rotated round the colour circle by ``turns``. 8-bit HSV: a saturated colour may be 6 levels off."""
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL))
    # OpenCV divides the circle into 256 hues on the way there, and into 255 on the way back.
    rotated = np.rint((np.arange(256) / 256 + turns) % 1 * 255).astype(np.uint8)
    return cv2.cvtColor(cv2.merge((cv2.LUT(hue, rotated), saturation, value)), cv2.COLOR_HSV2RGB_FULL)


def greyscale(image: np.ndarray) -> np.ndarray:
    """Grey, still in three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """``sigma`` in pixels; mirrored at the edges (without repeating the edge pixel)."""
    # sepFilter2D takes half the time of GaussianBlur for 8 bits, and is closer to the exact result.
    kernel = cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel)


def solarised(image: np.ndarray, threshold: int = 128) -> np.ndarray:
    """Values at or above ``threshold`` inverted."""
    values = np.arange(256)
    return cv2.LUT(image, np.where(values < threshold, values, 255 - values).astype(np.uint8))


def _factor(draw: float, spread: float) -> float:
    low = max(0.0, 1 - spread)
    return low + (1 + spread - low) * draw


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    # Generator.uniform is several times slower for one number.
    return low + (high - low) * rng.random()


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN fails too
        raise SettingsError(f"{name}: {value}; expected a value from {low} to {high}")
