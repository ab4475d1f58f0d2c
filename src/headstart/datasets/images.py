"""Images, in files or in tar shards: decode them to RGB whatever they are, say what is wrong with others."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from headstart.datasets.shards import Member
from headstart.errors import ImageError

IMAGE_SUFFIXES: frozenset[str] = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
)
MAX_PIXELS = 100_000_000
MIN_SIDE_PX = 8

# Pillow is asked for these only: some of its other readers start programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF")
_ORIENTATION_TAG = 0x0112
_SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")


def decode(path: Path | Member | str, short_side_px: int | None = None) -> np.ndarray:
    """The image as (H, W, 3) uint8 RGB: contiguous, writable, upright (EXIF rotation applied).

    The content decides the format, not the suffix. Greyscale, palette and CMYK become RGB, alpha is laid on
    white, 16 bits are scaled to 8 (65535 -> 255, not clipped); of several frames or pages the first is taken.

    Args:
        short_side_px: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is several times faster, as
            long as its short side stays at or above this many pixels. Other formats keep their size.

    Raises:
        ImageError: missing, empty, truncated, not an image, more than ``MAX_PIXELS`` pixels, or a side
            shorter than ``MIN_SIDE_PX``. The message starts with the path.
    """
    with _opened(path) as image:
        if short_side_px is not None and image.format in ("JPEG", "MPO"):
            # draft() takes the largest reduction that keeps *both* sides at or above what it is given; a
            # square request is therefore right for rotated images too.
            image.draft(None, (short_side_px, short_side_px))
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)


def size_of(path: Path | Member | str) -> tuple[int, int]:
    """(width, height) in pixels after EXIF rotation, from the header alone: the pixels may still be broken.

    Raises:
        ImageError: as :func:`decode`, except that a truncated image passes.
    """
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


@contextmanager
def _opened(path: Path | Member | str) -> Iterator[Image.Image]:
    """The image with its header read and its size checked. What goes wrong inside becomes an ImageError."""
    try:
        with _stream(path) as handle, Image.open(handle, formats=_FORMATS) as image:
            _check_size(path, image.size)
            yield image
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: too large; at most {MAX_PIXELS:,} pixels are read ({error})") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image of a known format; it begins with {_beginning(path)}") from None
    # Pillow's readers meet damaged files with nearly any exception: SyntaxError, struct.error, zlib.error ...
    except Exception as error:
        raise ImageError(f"{path}: can't be decoded ({error or type(error).__name__})") from error


def _stream(path: Path | Member | str) -> BinaryIO:
    if isinstance(path, Member):
        if path.size == 0:
            raise ImageError(f"{path}: empty (zero bytes)")
        return path.open()
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ImageError(f"{path}: not a regular file")
    if status.st_size == 0:
        raise ImageError(f"{path}: empty file (zero bytes)")
    return open(path, "rb")


def _check_size(path: Path | Member | str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{path}: too large, {width} x {height}; at most {MAX_PIXELS:,} pixels are read")
    if min(width, height) < MIN_SIDE_PX:
        raise ImageError(f"{path}: too small, {width} x {height} pixels; a side needs at least {MIN_SIDE_PX}")


def _beginning(path: Path | Member | str) -> str:
    with _stream(path) as handle:
        return repr(handle.read(16))


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; values above 4 swap width and height."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the pixels; every viewer shows such images as stored
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode in _SIXTEEN_BIT_MODES or image.mode == "I":
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("32-bit greyscale has no fixed range; save it as 8 or 16 bits")
        grey = ((wide + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating point pixels have no fixed range; save it as 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))
