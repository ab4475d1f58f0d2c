from __future__ import annotations

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headstart.datasets import images
from headstart.errors import ImageError


def photo(height: int = 60, width: int = 90) -> np.ndarray:
    """A smooth image (JPEG keeps it well) whose four corners differ, so that any flip or rotation shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=2).astype(np.uint8)


def save(array: np.ndarray, path: Path, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 6) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).max()) <= tolerance


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64))


# ---- decode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".jpg", ".webp", ".jfif", ".gif"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    options = {".jpg": {"quality": 95}, ".jfif": {"quality": 95}, ".webp": {"lossless": True}}.get(suffix, {})
    path = save(photo(), tmp_path / f"a{suffix}", **options)
    array = images.decode(path)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert close(array, photo(), {".gif": 60}.get(suffix, 6))  # a GIF has 256 colours


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(photo()).save(path, format="PNG")
    assert np.array_equal(images.decode(path), photo())
    assert np.array_equal(images.decode(path, short_side_px=8), photo())


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.fromarray(photo()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert close(images.decode(tmp_path / "a.jpg"), photo(), 12)
    assert images.decode(tmp_path / "a.jpg", short_side_px=30).shape == (30, 45, 3)


def test_greyscale(tmp_path: Path) -> None:
    grey = photo()[:, :, 0]
    array = images.decode(save(grey, tmp_path / "a.png"))
    assert np.array_equal(array, np.stack([grey] * 3, axis=2))


def test_one_bit(tmp_path: Path) -> None:
    Image.fromarray(photo()[:, :, 0] > 100).save(tmp_path / "a.png")
    assert np.array_equal(images.decode(tmp_path / "a.png")[:, :, 1], (photo()[:, :, 0] > 100) * 255)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    wide = np.linspace(0, 65535, 60 * 90).reshape(60, 90).astype(np.uint16)
    array = images.decode(save(wide, tmp_path / f"a{suffix}"))
    assert np.array_equal(array[:, :, 0], np.round(wide / 257).astype(np.uint8))
    assert array[0, 0, 0] == 0
    assert array[-1, -1, 2] == 255


def test_sixteen_bit_colour_png(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    wide = photo().astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "a.png"), wide[:, :, ::-1])
    assert np.array_equal(images.decode(tmp_path / "a.png"), photo())


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_fixed_range_are_refused(tmp_path: Path, dtype: type) -> None:
    path = save(photo()[:, :, 0].astype(dtype) * 1000, tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif: .*no fixed range; save it as 8 or 16 bits"):
        images.decode(path)


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    alpha = np.full((60, 90), 255, np.uint8)
    alpha[:, 30:60] = 0
    alpha[:, 60:] = 128
    array = images.decode(save(np.dstack([photo(), alpha]), tmp_path / "a.png"))
    expected = photo().astype(float)
    expected += (255 - expected) * (1 - alpha[:, :, None] / 255)
    assert close(array, expected.round(), 1)


def test_grey_alpha_and_transparent_colour(tmp_path: Path) -> None:
    grey_alpha = Image.merge("LA", [Image.new("L", (20, 20), 10), Image.new("L", (20, 20), 0)])
    grey_alpha.save(tmp_path / "la.png")
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert (images.decode(tmp_path / "la.png") == 255).all()
    assert (images.decode(tmp_path / "rgb.png") == 255).all()


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    flat = np.zeros((20, 20, 3), np.uint8)
    flat[:, 10:] = (200, 30, 40)
    palette = Image.fromarray(flat).quantize(4)
    palette.save(tmp_path / "a.png")
    assert np.array_equal(images.decode(tmp_path / "a.png"), flat)
    palette.save(tmp_path / "b.png", transparency=palette.getpixel((15, 5)))
    array = images.decode(tmp_path / "b.png")
    assert (array[:, 10:] == 255).all()
    assert (array[:, :10] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("short_side_px", [None, 100])
def test_exif_rotation(tmp_path: Path, orientation: int, short_side_px: int | None) -> None:
    upright = photo(200, 420)
    # What a camera stores so that turning it as `orientation` says gives the upright image.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(np.ascontiguousarray(stored), tmp_path / "a.jpg", exif=exif, quality=95)
    assert images.size_of(path) == (420, 200)
    array = images.decode(path, short_side_px)
    step = 1 if short_side_px is None else 2
    assert close(array, upright[step // 2 :: step, step // 2 :: step], 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_image_as_stored(tmp_path: Path) -> None:
    path = save(photo(), tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01", quality=95)
    assert close(images.decode(path), photo())
    exif = Image.Exif()
    exif[0x0112] = 77
    path = save(photo(), tmp_path / "b.jpg", exif=exif, quality=95)
    assert images.size_of(path) == (90, 60)


@pytest.mark.parametrize(
    ("wanted", "height"), [(400, 400), (201, 400), (200, 200), (101, 200), (100, 100), (50, 50), (3, 50)]
)
def test_reduced_decoding_keeps_the_short_side(tmp_path: Path, wanted: int, height: int) -> None:
    path = save(photo(400, 640), tmp_path / "a.jpg")
    array = images.decode(path, wanted)
    assert array.shape == (height, height * 640 // 400, 3)
    assert images.decode(path).shape == (400, 640, 3)


# ---- bad files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp", ".gif"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_truncated(tmp_path: Path, suffix: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    path = save(noise, tmp_path / f"cut{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ImageError, match=rf"cut\{suffix}: (can't be decoded|not an image)"):
        images.decode(path)


def test_truncated_is_found_at_reduced_scale_too(tmp_path: Path) -> None:
    path = save(photo(400, 640), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:-2000])
    assert images.size_of(path) == (640, 400)  # the header is whole
    with pytest.raises(ImageError, match=r"cut\.jpg: can't be decoded \(.*truncated"):
        images.decode(path, 100)


def test_header_only(tmp_path: Path) -> None:
    path = save(photo(), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ImageError, match=r"cut\.jpg: "):
        images.decode(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.jpg: empty file \(zero bytes\)"),
        (b"hello, I am text", r"a\.jpg: not an image of a known format; it begins with b'hello, I am text'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", r"a\.jpg: not an image of a known format"),
        (png_header(100_000, 100_000), r"a\.jpg: too large"),
        (png_header(10_001, 10_000), r"a\.jpg: too large, 10001 x 10000; at most 100,000,000 pixels"),
        (png_header(1, 1), r"a\.jpg: too small, 1 x 1 pixels; a side needs at least 8"),
        (png_header(7, 500), r"a\.jpg: too small, 7 x 500 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_named_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (images.decode, images.size_of):
        with pytest.raises(ImageError, match=message):
            read(path)


def test_enormous_images_are_refused_without_decoding(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(100_000, 100_000))
    tracemalloc.start()
    with pytest.raises(ImageError):
        images.decode(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10_000_000


def test_enormous_is_refused_also_where_pillows_own_limit_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "a.png").write_bytes(png_header(100_000, 100_000))
    with pytest.raises(ImageError, match="too large, 100000 x 100000"):
        images.decode(tmp_path / "a.png")


def test_missing_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        images.decode(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        images.decode(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match=r"pipe\.jpg: not a regular file"):
        images.decode(tmp_path / "pipe.jpg")


def test_smallest_allowed(tmp_path: Path) -> None:
    path = save(photo(8, 8), tmp_path / "a.png")
    assert np.array_equal(images.decode(path), photo(8, 8))
