"""Images/s of our decode + SoCo's three views, over the same views plainly written with Pillow + torchvision.

    python benchmarks/loader.py [--images 64] [--repeats 7]

Both sides run in this one process on one thread, on the same files and boxes, in turns. Each repeat gives one
ratio; the table shows their geometric mean. Ours is what a data worker calls: ``decode`` and ``SoCo.views``.
The plain side is transforms.v2 on Pillow images, as in torchvision's references and in public BYOL code.
Where there is a choice it takes the faster: Pillow's Gaussian blur (torchvision's takes five times as long),
boxes in numpy without a loop, and uint8 tensors at the end, since ours are uint8 too.

The images are generated: JPEGs of 640x480 and 160x160 with the spectrum and file size of photos. Where the
environment's HEADSTART_DATA names a folder with bccd/ or coco6k/, those are measured too.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as F

from headstart.datasets.image_set import ImageSet
from headstart.datasets.images import decode, size_of
from headstart.methods.soco import CROP_RETRIES, SoCo, SoCoSettings
from headstart.views import worker_init

TARGET = 2.0
VIEW_PX = ((224, 112), (96, 48))  # (V1 and V2, V3): the paper's, and the demo's
BOXES = 24  # an image; about what Selective Search leaves after the filter

Sample = tuple[Path, np.ndarray]  # a file and its proposals, (n, 4) float32 xyxy in its pixels
Views = list[tuple[Tensor, np.ndarray, np.ndarray]]  # images, boxes, ids


class Ours:
    def __init__(self, view_px: int, v3_px: int) -> None:
        self.method = SoCo(SoCoSettings(view_px=view_px, v3="downsample", v3_px=v3_px))
        self.rng = np.random.default_rng(0)

    def __call__(self, sample: Sample) -> Views:
        path, boxes = sample
        width, _ = size_of_cached(path)
        image = decode(path, short_side_px=self.method.decode_px)
        views = self.method.views(image, boxes * np.float32(image.shape[1] / width), self.rng)
        return [(torch.from_numpy(view.image).permute(2, 0, 1), view.boxes, view.ids) for view in views]


class Plain:
    def __init__(self, view_px: int, v3_px: int, k: int = 4) -> None:
        self.view_px, self.v3_px, self.k = view_px, v3_px, k
        self.rng = np.random.default_rng(0)
        self.colour = [self.byol(blur, solarise) for blur, solarise in ((1.0, 0.0), (0.1, 0.2), (0.1, 0.2))]

    @staticmethod
    def byol(blur_prob: float, solarise_prob: float) -> T.Compose:
        return T.Compose(
            [
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([PillowBlur()], p=blur_prob),
                T.RandomSolarize(128, p=solarise_prob),
            ]
        )

    def __call__(self, sample: Sample) -> Views:
        path, boxes = sample
        image = Image.open(path).convert("RGB")
        boxes1 = boxes * np.float32(self.view_px) / np.array([image.width, image.height] * 2, np.float32)
        v1 = F.resize(image, [self.view_px, self.view_px])
        for _ in range(1 + CROP_RETRIES):
            v2, boxes2 = self.crop(v1, boxes1)
            v3 = F.resize(v2, [self.v3_px, self.v3_px])
            boxes3 = boxes2 * np.float32(self.v3_px / self.view_px)
            common = np.flatnonzero((boxes3[:, 2:] - boxes3[:, :2] >= 1).all(axis=1))
            if len(common):
                break
        views = (v1, v2, v3)
        if not len(common):
            return self.finish(views, [whole(view, self.k) for view in views], np.zeros(self.k))
        extra = self.rng.choice(common, max(0, self.k - len(common)))
        chosen = np.concatenate([self.rng.permutation(common)[: self.k], extra])
        return self.finish(views, [b[chosen] for b in (boxes1, boxes2, boxes3)], chosen)

    def crop(self, image: Image.Image, boxes: np.ndarray) -> tuple[Image.Image, np.ndarray]:
        top, left, height, width = RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3])
        size = [self.view_px, self.view_px]
        scale = np.array([self.view_px / width, self.view_px / height] * 2, np.float32)
        boxes = (boxes - np.array([left, top, left, top], np.float32)) * scale
        return F.resized_crop(image, top, left, height, width, size), boxes.clip(0, self.view_px)

    def finish(self, images: Sequence[Image.Image], boxes: Sequence[np.ndarray], ids: np.ndarray) -> Views:
        boxes = [self.jitter(boxes[0]), *boxes[1:]]
        out = []
        for image, colour, box in zip(images, self.colour, boxes, strict=True):
            image = colour(image)
            if torch.rand(1) < 0.5:
                image = F.horizontal_flip(image)
                x0, y0, x1, y1 = box.T
                box = np.stack([image.width - x1, y0, image.width - x0, y1], axis=1)
            out.append((F.pil_to_tensor(image), box, ids))
        return out

    def jitter(self, boxes: np.ndarray) -> np.ndarray:
        r = self.rng.uniform(-0.1, 0.1, (len(boxes), 4)) * (self.rng.random((len(boxes), 1)) < 0.5)
        sides = boxes[:, 2:] - boxes[:, :2]
        centres = (boxes[:, 2:] + boxes[:, :2]) / 2 + r[:, :2] * sides
        half = sides * (1 + r[:, 2:]) / 2
        jittered = np.concatenate([centres - half, centres + half], axis=1)
        return jittered.clip(0, self.view_px).astype(np.float32)


class PillowBlur:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def whole(view: Image.Image, count: int) -> np.ndarray:
    return np.tile(np.array([[0, 0, view.width, view.height]], np.float32), (count, 1))


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Random colours at every scale, weaker the finer (as in photos), and some sharp-edged shapes."""
    image = np.full((height, width, 3), 118, np.float32)
    for octave in range(8):
        shape = math.ceil(height / 2**octave), math.ceil(width / 2**octave)
        # Most of a photo's contrast is in the brightness, little in the colour.
        layer = rng.normal(size=(*shape, 1)) + 0.4 * rng.normal(size=(*shape, 3))
        layer = cv2.resize(layer.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        image += 1.6 * 1.75**octave * layer
    for _ in range(12):
        centre = rng.uniform((0, 0), (width, height))
        axes = rng.uniform(0.04, 0.25, 2) * min(height, width)
        mask = np.zeros((height, width), np.uint8)
        cv2.ellipse(mask, (tuple(centre), tuple(2 * axes), rng.uniform(0, 180)), 1, -1)
        image += mask[..., None] * rng.normal(0, 40, 3).astype(np.float32)
    return image.clip(0, 255).astype(np.uint8)


def generated(folder: Path, count: int, height: int, width: int) -> list[Path]:
    rng = np.random.default_rng(0)
    folder.mkdir()
    paths = [folder / f"{i:04d}.jpg" for i in range(count)]
    for path in paths:
        Image.fromarray(photo(rng, height, width)).save(path, quality=85)
    return paths


_sizes: dict[Path, tuple[int, int]] = {}


def size_of_cached(path: Path) -> tuple[int, int]:
    """In training the size comes from the proposal file, not from the image."""
    if path not in _sizes:
        _sizes[path] = size_of(path)
    return _sizes[path]


def with_boxes(paths: Sequence[Path]) -> list[Sample]:
    """Boxes with the sides that the proposal filter keeps: .3 to .8 of the image's."""
    rng = np.random.default_rng(1)
    samples = []
    for path in paths:
        size = np.array(size_of_cached(path))
        sides = rng.uniform(0.3, 0.8, (BOXES, 2)) * size
        corner = rng.uniform(0, 1, (BOXES, 2)) * (size - sides)
        samples.append((path, np.concatenate([corner, corner + sides], axis=1).astype(np.float32)))
    return samples


def images_per_s(pipeline: Callable[[Sample], Views], samples: Sequence[Sample]) -> float:
    start = time.perf_counter()
    for sample in samples:
        pipeline(sample)
    return len(samples) / (time.perf_counter() - start)


def measure(samples: Sequence[Sample], view_px: int, v3_px: int, repeats: int) -> list[tuple[float, float]]:
    """(ours, plain) images/s of every repeat."""
    pipelines: list[Callable[[Sample], Views]] = [Ours(view_px, v3_px), Plain(view_px, v3_px)]
    for pipeline in pipelines:  # files into the cache, libraries loaded
        for sample in samples:
            pipeline(sample)
    rates = []
    for repeat in range(repeats):
        first = repeat % 2  # who goes first changes, in case the machine's speed drifts
        rate = {i: images_per_s(pipelines[i], samples) for i in (first, 1 - first)}
        rates.append((rate[0], rate[1]))
    return rates


def sources(folder: Path, count: int) -> list[tuple[str, list[Path]]]:
    found = [
        ("generated 640x480", generated(folder / "large", count, 480, 640)),
        ("generated 160x160", generated(folder / "small", count, 160, 160)),
    ]
    data = os.environ.get("HEADSTART_DATA")
    for name in ("bccd", "coco6k") if data else ():
        images = Path(str(data)) / name / "images"
        if images.is_dir():
            found.append((name, [images / path for path in ImageSet(images).names[:count]]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="images of each kind (default: 64)")
    parser.add_argument("--repeats", type=int, default=7, help="times both sides are measured (default: 7)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    worker_init()

    columns = ("images", "KiB", "views px", "ours img/s", "plain img/s", "ratio", "lowest", "highest")
    table = Table(*columns)
    worst = math.inf
    with tempfile.TemporaryDirectory() as folder:
        for name, paths in sources(Path(folder), options.images):
            samples = with_boxes(paths)
            kib = statistics.mean(path.stat().st_size for path in paths) / 1024
            for view_px, v3_px in VIEW_PX:
                rates = measure(samples, view_px, v3_px, options.repeats)
                ratios = [ours / plain for ours, plain in rates]
                ratio = statistics.geometric_mean(ratios)
                worst = min(worst, ratio)
                ours, plain = (statistics.geometric_mean(side) for side in zip(*rates, strict=True))
                table.add_row(
                    name,
                    f"{kib:.0f}",
                    f"{view_px}, {view_px}, {v3_px}",
                    f"{ours:.0f}",
                    f"{plain:.0f}",
                    f"{ratio:.2f}",
                    f"{min(ratios):.2f}",
                    f"{max(ratios):.2f}",
                )
    Console(width=100).print(table)
    print(f"lowest ratio {worst:.2f}; wanted: at least {TARGET} in every row")
    return 0 if worst >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
