"""Labelled images: what every annotation format is read into, with the same checks for each.

What can't be understood stops the reading, with the file, the place and the expectation in the message. What
can be understood but not used (a box without size, an image that is not there) is left out, counted and named
in ``DetectionData.notes``.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from headstart.datasets.images import size_of
from headstart.errors import DataError, ImageError
from headstart.files import read_json
from headstart.masks import decode

MAX_MISSING = 0.1  # share of images that may be missing
# Corners given 0- or 1-based and rounded coordinates reach up to a pixel over the edge in most data sets;
# cutting that off is not worth a note.
EDGE_TOLERANCE_PX = 1.0
NAMED = 5  # how many cases a note names


@dataclass(frozen=True)
class Category:
    """``frequency``: LVIS's "r" (rare), "c" (common) or "f" (frequent); None elsewhere."""

    id: int
    name: str
    frequency: str | None = None


@dataclass(frozen=True)
class ImageRecord:
    """``width`` and ``height`` in pixels are those the boxes refer to: after EXIF rotation."""

    id: int | str
    path: Path
    file_name: str
    width: int
    height: int


@dataclass
class Annotations:
    """The objects of one image.

    ``segmentations`` holds an entry an object: polygons ``[[x, y, x, y, ...], ...]`` in pixels, a COCO
    run-length dictionary, or None. ``ids`` are the objects' numbers in the file, unique within the image: COCO's
    annotation ids, or the place among VOC's objects, from 1.

    In federated data (LVIS) not every class was looked for in every image: ``negative`` are the labels known to be
    absent, ``not_exhaustive`` those of which some objects have no box. What is neither there nor in ``negative`` was
    not looked for. Both are None in data where all classes were.
    """

    boxes: np.ndarray  # (n, 4) float32 xyxy pixels
    labels: np.ndarray  # (n,) int64, 1..C; 0 is background, as in torchvision
    areas: np.ndarray  # (n,) float32, square pixels
    iscrowd: np.ndarray  # (n,) bool: ignored in evaluation, no target in training
    segmentations: list[Any]
    ids: np.ndarray = None  # type: ignore[assignment]  # (n,) int64; where not given, 1..n
    negative: np.ndarray | None = None  # (m,) int64
    not_exhaustive: np.ndarray | None = None  # (m,) int64

    def __post_init__(self) -> None:
        if self.ids is None:
            self.ids = np.arange(1, len(self.boxes) + 1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.boxes)

    def keep(self, chosen: np.ndarray) -> Annotations:
        """The objects where ``chosen`` (n,) bool is true."""
        return replace(
            self,
            boxes=self.boxes[chosen],
            labels=self.labels[chosen],
            areas=self.areas[chosen],
            iscrowd=self.iscrowd[chosen],
            segmentations=[s for s, kept in zip(self.segmentations, chosen, strict=True) if kept],
            ids=self.ids[chosen],
        )


@dataclass
class DetectionData:
    """A labelled data set. Label ``k`` means ``categories[k - 1]``; ``annotations`` runs along ``images``."""

    source: Path
    categories: list[Category]  # sorted by id, names unique
    images: list[ImageRecord]
    annotations: list[Annotations]
    notes: list[str] = field(default_factory=list)  # what was left out or cut, counted and named

    def __len__(self) -> int:
        return len(self.images)

    @property
    def is_federated(self) -> bool:
        """Not every class was looked for in every image (LVIS)."""
        return any(a.negative is not None for a in self.annotations)

    @property
    def has_masks(self) -> bool:
        """Every object (crowds aside) has a segmentation, and there is at least one."""
        objects = [
            segmentation
            for a in self.annotations
            for segmentation, crowd in zip(a.segmentations, a.iscrowd, strict=True)
            if not crowd
        ]
        return bool(objects) and all(segmentation is not None for segmentation in objects)

    def subset(self, image_ids: Iterable[int | str]) -> DetectionData:
        """The images of these ids, in that order, with all categories.

        Raises:
            DataError: an id is not in the data, or is given twice.
        """
        place = {image.id: index for index, image in enumerate(self.images)}
        ids = list(image_ids)
        unknown = [i for i in ids if i not in place]
        if unknown:
            raise DataError(f"{self.source}: has no image with id {named(unknown)}")
        if len(set(ids)) < len(ids):
            twice = [i for i in dict.fromkeys(ids) if ids.count(i) > 1]
            raise DataError(f"{self.source}: image id {named(twice)} chosen twice")
        chosen = [place[i] for i in ids]
        return replace(self, images=[self.images[i] for i in chosen], annotations=[self.annotations[i] for i in chosen])

    def with_categories(self, categories: Sequence[Category]) -> DetectionData:
        """The same data with labels that count through ``categories``, matched by name.

        Use it before comparing with a detector trained on other data: two files may number their classes
        differently, or one may lack a class.

        Raises:
            DataError: the data has objects of a category that is not among ``categories``.
        """
        wanted = {category.name: k + 1 for k, category in enumerate(categories)}
        used = {int(label) for a in self.annotations for label in a.labels}
        foreign = [self.categories[k - 1].name for k in sorted(used) if self.categories[k - 1].name not in wanted]
        if foreign:
            raise DataError(
                f"{self.source}: has objects of category {named(foreign)}; expected only {named(wanted, len(wanted))}"
            )
        to_new = np.array([0] + [wanted.get(c.name, 0) for c in self.categories], np.int64)

        def known(labels: np.ndarray | None) -> np.ndarray | None:
            return None if labels is None else to_new[labels][to_new[labels] > 0]

        annotations = [
            replace(a, labels=to_new[a.labels], negative=known(a.negative), not_exhaustive=known(a.not_exhaustive))
            for a in self.annotations
        ]
        frequency = {c.name: c.frequency for c in self.categories}
        renamed = [replace(c, frequency=c.frequency or frequency.get(c.name)) for c in categories]
        return replace(self, categories=renamed, annotations=annotations)

    def class_counts(self) -> dict[str, int]:
        """Objects of each category, crowds not counted."""
        labels = [a.labels[~a.iscrowd] for a in self.annotations]
        counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=len(self.categories) + 1)
        return {category.name: int(counts[k + 1]) for k, category in enumerate(self.categories)}

    def coco_image_id(self, index: int) -> int:
        """COCO's tools want integers: the image's own id, or where ids are strings its position, from 1."""
        own = self.images[index].id
        return own if self._has_integer_ids and isinstance(own, int) else index + 1

    @cached_property
    def _has_integer_ids(self) -> bool:
        return all(isinstance(image.id, int) for image in self.images)

    def to_coco(self) -> dict[str, Any]:
        """COCO ground truth: bbox as xywh, the categories' own ids, annotation ids from 1.

        Federated data have what LVIS adds: ``neg_category_ids`` and ``not_exhaustive_category_ids`` of images,
        ``frequency`` of categories.
        """
        integer_ids = self._has_integer_ids
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index, (image, objects) in enumerate(zip(self.images, self.annotations, strict=True)):
            image_id = image.id if integer_ids else index + 1
            entry: dict[str, Any] = {
                "id": image_id,
                "file_name": image.file_name,
                "width": image.width,
                "height": image.height,
            }
            for key, labels in (
                ("neg_category_ids", objects.negative),
                ("not_exhaustive_category_ids", objects.not_exhaustive),
            ):
                if labels is not None:
                    entry[key] = [self.categories[k - 1].id for k in labels.tolist()]
            images.append(entry)
            for k in range(len(objects)):
                x0, y0, x1, y1 = (float(v) for v in objects.boxes[k])
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": self.categories[int(objects.labels[k]) - 1].id,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(objects.areas[k]),
                    "iscrowd": int(objects.iscrowd[k]),
                }
                if objects.segmentations[k] is not None:
                    annotation["segmentation"] = objects.segmentations[k]
                annotations.append(annotation)
        return {
            "info": {"description": self.source.name},
            "categories": [
                {"id": c.id, "name": c.name} | ({"frequency": c.frequency} if c.frequency else {})
                for c in self.categories
            ],
            "images": images,
            "annotations": annotations,
        }


def union(source: Path, parts: Sequence[DetectionData]) -> DetectionData:
    """One data set of several with the same categories, for example VOC 2007 and 2012.

    Raises:
        DataError: the categories differ, or two of them have an image of the same id.
    """
    first = parts[0]
    for other in parts[1:]:
        if [c.name for c in other.categories] != [c.name for c in first.categories]:
            raise DataError(f"{source}: {first.source} and {other.source} have different categories; expected the same")
    images = [image for part in parts for image in part.images]
    if len({image.id for image in images}) < len(images):
        twice = [i for i, count in Counter(image.id for image in images).items() if count > 1]
        raise DataError(f"{source}: several of its files have an image with id {named(twice)}")
    annotations = [a for part in parts for a in part.annotations]
    return DetectionData(source, first.categories, images, annotations, [n for part in parts for n in part.notes])


def load_detection_data(
    path: Path | str, images: Path | str | None = None, *, only: Collection[int | str] | None = None
) -> DetectionData:
    """Read a labelled data set.

    Args:
        path: a COCO ``.json`` file; or for Pascal VOC a folder with ``Annotations/``, a list
            ``ImageSets/Main/<name>.txt``, or a folder of ``.xml`` files; or a split of ``headstart protocol split``.
        images: the folder that the images' file names are relative to. Without it, and after it, they are
            looked for around ``path``: see :mod:`headstart.datasets.coco` and :mod:`headstart.datasets.voc`.
        only: leave out all images but those of these ids, as if the file did not have them.

    Raises:
        DataError: the annotations are not what they should be (the message names the place), or more than
            a tenth of the images are missing.
    """
    from headstart.datasets import coco, splits, voc  # they import this module

    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected a COCO .json file or a Pascal VOC folder")
    if path.is_dir() or path.suffix.lower() == ".txt":
        return voc.load_voc(path, images, only)
    if path.suffix.lower() == ".json":
        content = read_json(path, coco.EXPECTED)
        if splits.is_data_set(content):
            return splits.load_split(path, content, images)
        return coco.load_coco(path, images, only, content)
    raise DataError(
        f"{path}: unknown kind of annotations; expected a COCO .json file, a Pascal VOC folder, or a VOC "
        "list of images (ImageSets/Main/*.txt)"
    )


def masks_of(annotations: Annotations, height: int, width: int) -> np.ndarray:
    """(n, height, width) uint8, 0 or 1.

    Raises:
        DataError: an object has no segmentation, or one that can't be decoded.
    """
    masks = np.zeros((len(annotations), height, width), np.uint8)
    for k, segmentation in enumerate(annotations.segmentations):
        if segmentation is None:
            raise DataError(f"object {k} has no segmentation; expected polygons or run lengths")
        try:
            masks[k] = decode(segmentation, height, width)
        except (ValueError, RuntimeError, TypeError) as error:
            raise DataError(f"object {k}: the segmentation can't be decoded ({error})") from error
    return masks


# ---- shared by the readers of the formats ----------------------------------------------------------------


@dataclass
class RawObject:
    """An object as the file gives it. ``place`` says where, for messages: "annotation 17 (image 42.jpg)"."""

    place: str
    box: Sequence[float]  # xyxy pixels, finite
    label: int
    area: float | None = None
    iscrowd: bool = False
    segmentation: Any = None
    id: int | None = None  # the object's number in the file; unset: its place among the image's objects, from 1


class Notes:
    """Collects what was left out or cut; a sentence for each kind, with the count and the first cases."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._cases: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, case: str) -> None:
        self._cases[kind].append(case)

    def sentences(self) -> list[str]:
        return [f"{self.source.name}: {kind}: {len(c)} ({named(c)})" for kind, c in self._cases.items()]


def named(cases: Iterable[Any], limit: int = NAMED) -> str:
    """The first few, and how many more there are."""
    names = [str(case) for case in cases]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def usable(objects: Iterable[RawObject], image: ImageRecord, notes: Notes) -> Annotations:
    """Boxes cut at the image's edge; those without size or outside the image left out."""
    boxes: list[np.ndarray] = []
    kept: list[RawObject] = []
    ids: list[int] = []
    limits = np.array([image.width, image.height, image.width, image.height], np.float32)
    for place, o in enumerate(objects, 1):
        box = np.asarray(o.box, np.float32)
        if box[2] <= box[0] or box[3] <= box[1]:
            notes.add("boxes of zero or negative size left out", o.place)
            continue
        inside = np.clip(box, 0, limits)
        if inside[2] <= inside[0] or inside[3] <= inside[1]:
            notes.add("boxes outside their image left out", o.place)
            continue
        if np.abs(inside - box).max() > EDGE_TOLERANCE_PX:
            notes.add("boxes cut at the edge of their image", o.place)
        boxes.append(inside)
        kept.append(o)
        ids.append(place if o.id is None else o.id)
    array = np.array(boxes, np.float32).reshape(-1, 4)
    box_areas = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
    areas = [float(a) if o.area is None else o.area for o, a in zip(kept, box_areas, strict=True)]
    return Annotations(
        boxes=array,
        labels=np.array([o.label for o in kept], np.int64),
        areas=np.array(areas, np.float32),
        iscrowd=np.array([o.iscrowd for o in kept], bool),
        segmentations=[o.segmentation for o in kept],
        ids=np.array(ids, np.int64),
    )


def find_image(names: Sequence[str], folders: Sequence[Path]) -> Path | None:
    """The first of ``names`` that is a file in the first folder that has one."""
    return next((p for folder in folders for name in names if (p := folder / name).is_file()), None)


def check_missing(source: Path, missing: Sequence[str], total: int, folders: Sequence[Path]) -> None:
    """Raises: DataError when all images, or more than ``MAX_MISSING`` of them, are missing."""
    if missing and (len(missing) == total or len(missing) > MAX_MISSING * total):
        searched = ", ".join(str(folder) for folder in folders)
        raise DataError(
            f"{source}: {len(missing)} of {total} images are missing or can't be read ({named(missing)}); "
            f"looked in {searched}. Name their folder with --images DIR"
        )


def image_size(path: Path, notes: Notes) -> tuple[int, int] | None:
    """From the image's header, for files that do not say; None, and a note, when it can't be read."""
    try:
        return size_of(path)
    except ImageError as error:
        notes.add("images can't be read, they and their objects were left out", str(error))
        return None


def finite(value: Any) -> bool:
    """A plain number that is neither NaN nor infinite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
