"""COCO annotation files: https://cocodataset.org/#format-data (object detection).

Images are looked for, in this order, relative to: the folder given by the caller, the file's own folder, and
in it ``images/``, ``<stem>/`` and ``<stem>/images/``. Of a file in a folder ``annotations/`` they are looked for
beside that folder too, and there also in the last word of the file's name: ``train2017/`` of
``annotations/instances_train2017.json``. LVIS's files are read as well: :mod:`headstart.datasets.lvis`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from headstart.datasets import lvis
from headstart.datasets.detection import (
    Annotations,
    Category,
    DetectionData,
    ImageRecord,
    Notes,
    RawObject,
    check_missing,
    find_image,
    finite,
    image_size,
    usable,
)
from headstart.errors import DataError
from headstart.files import read_json

EXPECTED = 'a COCO object with "images", "annotations" and "categories"'
_BOX = "expected [x, y, width, height] in pixels"


def load_coco(
    path: Path | str,
    images: Path | str | None = None,
    only: Collection[int | str] | None = None,
    content: Any = None,
) -> DetectionData:
    """Read a COCO file. See :func:`headstart.datasets.detection.load_detection_data`.

    ``content``: of the file, where it has been read already.

    Raises:
        DataError: as there.
    """
    path = Path(path)
    content = read_json(path, EXPECTED) if content is None else content
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {_kind(content)}; expected {EXPECTED}")
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise DataError(f'{path}: has no "{key}"; expected {EXPECTED}')
        if not isinstance(content[key], list) or not all(isinstance(entry, dict) for entry in content[key]):
            raise DataError(f'{path}: "{key}" is not a list of objects; expected {EXPECTED}')

    if only is not None:
        chosen = [entry for entry in content["images"] if entry.get("id") in only]
        objects_of = [entry for entry in content["annotations"] if entry.get("image_id") in only]
        content = {**content, "images": chosen, "annotations": objects_of}

    notes = Notes(path)
    categories = _categories(path, content["categories"], notes)
    label_of = {category.id: k + 1 for k, category in enumerate(categories)}
    if not content["images"] and only is None:
        raise DataError(f'{path}: "images" is empty; expected at least one image')
    records = _images(path, content["images"], images, notes)
    objects: dict[int | str, list[RawObject]] = {i: [] for i in records}
    names = {entry["id"]: lvis.file_name(entry) for entry in content["images"]}
    for index, entry in enumerate(content["annotations"]):
        raw, image_id = _object(path, index, entry, names, label_of, records, notes)
        if raw is not None:
            objects[image_id].append(raw)
    entries = {entry["id"]: entry for entry in content["images"]}
    annotations: list[Annotations] = []
    for image_id, record in records.items():
        negative, not_exhaustive = lvis.federated(path, entries[image_id], label_of)
        found = usable(objects[image_id], record, notes)
        annotations.append(replace(found, negative=negative, not_exhaustive=not_exhaustive))
    return DetectionData(path, categories, list(records.values()), annotations, notes.sentences())


def _kind(value: Any) -> str:
    return {list: "list", str: "string", type(None): "null", bool: "boolean"}.get(type(value), "number")


def _categories(path: Path, entries: list[dict[str, Any]], notes: Notes) -> list[Category]:
    if not entries:
        raise DataError(f'{path}: "categories" is empty; expected at least one {{"id": 1, "name": "cat"}}')
    categories: dict[int, Category] = {}
    for index, entry in enumerate(entries):
        number, name = entry.get("id"), entry.get("name")
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(name, str):
            raise DataError(f'{path}: category at index {index} is {entry}; expected {{"id": 1, "name": "cat"}}')
        if number in categories:
            raise DataError(f"{path}: category id {number} is given twice ({categories[number].name}, {name})")
        categories[number] = Category(number, name, lvis.frequency(entry))
    # Some exporters give the name of the whole group to one of its classes; results are kept by name.
    often = Counter(category.name for category in categories.values())
    for number, category in categories.items():
        if often[category.name] > 1:
            categories[number] = replace(category, name=f"{category.name} (id {number})")
            notes.add("categories that shared a name were told apart by their id", categories[number].name)
    return [categories[number] for number in sorted(categories)]


def _images(
    path: Path, entries: list[dict[str, Any]], images: Path | str | None, notes: Notes
) -> dict[int | str, ImageRecord]:
    """Records by id of the images that exist."""
    here = path.parent
    folders = [here, here / "images", here / path.stem, here / path.stem / "images"]
    if here.name == "annotations":
        folders += [here.parent, here.parent / "images", here.parent / path.stem.rpartition("_")[2]]
    if images is not None:
        if not Path(images).is_dir():
            raise DataError(f"{images}: no such folder; expected the folder of the images of {path}")
        folders.insert(0, Path(images))
    records: dict[int | str, ImageRecord] = {}
    seen: dict[int | str, str] = {}
    missing: list[str] = []
    for index, entry in enumerate(entries):
        image_id, name = entry.get("id"), lvis.file_name(entry)
        if not isinstance(name, str) or not name:
            raise DataError(f'{path}: image at index {index} has no "file_name"; expected a path as text')
        if not isinstance(image_id, (int, str)) or isinstance(image_id, bool):
            raise DataError(f'{path}: image at index {index} ({name}) has "id" {image_id!r}; expected a number')
        if image_id in seen:
            raise DataError(f"{path}: image id {image_id} is given twice ({seen[image_id]}, {name})")
        seen[image_id] = name
        found = find_image([name], folders)
        if found is None:
            missing.append(name)
            notes.add("images are missing, they and their objects were left out", name)
            continue
        size = _size(path, entry, name, found, notes)
        if size is None:
            missing.append(name)
            continue
        records[image_id] = ImageRecord(image_id, found, name, *size)
    check_missing(path, missing, len(entries), folders)
    return records


def _size(path: Path, entry: dict[str, Any], name: str, found: Path, notes: Notes) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    if width is None or height is None:
        return image_size(found, notes)
    if not (finite(width) and finite(height) and width >= 1 and height >= 1):
        raise DataError(f"{path}: image {name} is {width!r} x {height!r}; expected width and height in pixels")
    return int(width), int(height)


def _object(
    path: Path,
    index: int,
    entry: dict[str, Any],
    names: dict[int | str, str],
    label_of: dict[int, int],
    records: dict[int | str, ImageRecord],
    notes: Notes,
) -> tuple[RawObject | None, Any]:
    """The object and the id of its image; None when it can't be used (then noted) or its image is missing."""
    place = f"annotation {entry['id']}" if "id" in entry else f"annotation at index {index}"
    image_id = entry.get("image_id")
    if not isinstance(image_id, (int, str)) or image_id not in names:
        reason = f"is of image_id {image_id!r}" if "image_id" in entry else 'has no "image_id"'
        raise DataError(f'{path}: {place} {reason}; expected the "id" of an entry of "images"')
    place += f" (image {names[image_id]})"
    category = entry.get("category_id")
    if not isinstance(category, int) or category not in label_of:
        reason = f"is of category_id {category!r}" if "category_id" in entry else 'has no "category_id"'
        raise DataError(f"{path}: {place} {reason}; expected one of {sorted(label_of)}")
    if "bbox" not in entry:
        raise DataError(f'{path}: {place} has no "bbox"; {_BOX}')
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(finite(value) for value in box):
        raise DataError(f'{path}: {place} has "bbox" {box}; {_BOX}, all finite')
    area = entry.get("area")
    if area is not None and not (finite(area) and area >= 0):
        raise DataError(f'{path}: {place} has "area" {area}; expected square pixels')
    if image_id not in records:
        return None, image_id
    crowd = bool(entry.get("iscrowd", 0))
    segmentation = _segmentation(f"{path}: {place}", entry.get("segmentation"), records[image_id])
    if segmentation == []:
        notes.add("objects with an outline of fewer than 3 points left out", place)
        return None, image_id
    x, y, width, height = box
    number = entry.get("id")
    own = number if isinstance(number, int) else None
    box = (x, y, x + width, y + height)
    return RawObject(place, box, label_of[category], area, crowd, segmentation, own), image_id


def _segmentation(place: str, value: Any, image: ImageRecord) -> Any:
    """Polygons, a run-length dictionary, or None; an empty list when no polygon has three points."""
    expected = 'expected polygons [[x, y, x, y, ...], ...] or {"size": [height, width], "counts": ...}'
    if value is None or value == []:
        return None
    if isinstance(value, dict):
        if not isinstance(value.get("counts"), (list, str)) or "size" not in value:
            raise DataError(f'{place} has a "segmentation" with keys {sorted(value)}; {expected}')
        if value["size"] != [image.height, image.width]:
            raise DataError(
                f'{place} has a "segmentation" of size {value["size"]}; '
                f"expected [height, width] of the image, {[image.height, image.width]}"
            )
        return value
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        raise DataError(f'{place} has a "segmentation" of another kind; {expected}')
    for polygon in value:
        if len(polygon) % 2 or not all(finite(number) for number in polygon):
            raise DataError(f'{place} has a "segmentation" with an odd or non-finite coordinate; {expected}')
    return [polygon for polygon in value if len(polygon) >= 6]
