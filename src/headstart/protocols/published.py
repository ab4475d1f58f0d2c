"""Lists of images and boxes that papers publish, read as splits of loaded data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headstart.datasets import lvis
from headstart.datasets.detection import DetectionData, named
from headstart.datasets.splits import Id, Split, choose_shots, read_split
from headstart.errors import DataError, SettingsError
from headstart.files import read_json

_EXPECTED = (
    "a split file, a COCO file of the chosen images, a list of image ids or file names (.json, or .txt with one a "
    "line), or a folder of box_<K>shot_<class>_train.txt"
)
_SHOTS = re.compile(r"box_(\d+)shot_(.+)_train\.txt")
SAME_BOX_PX = 1.5  # how far a corner may be off: some lists count from 1, some round


def read_published(path: Path | str, data: DetectionData, shots: int | None = None, seed: int = 0) -> Split:
    """What a published list chooses of ``data``.

    Args:
        path: one of

            - a split file of Headstart, or a JSON list of image ids;
            - a COCO file with the chosen images; where it has some of their boxes alone, those alone count;
            - a JSON list of file names, or a text file with an id, a file name or a path in each line;
            - a folder of text files ``box_<K>shot_<class>_train.txt``, one a class, with the images whose boxes of that
              class count (Wang et al., Frustratingly Simple Few-Shot Object Detection, 2020). Where they have more
              than K boxes of the class, which ones is left open there; here they are ranked as all shots are.
        shots: K, of such a folder; unset: the only one that it has.
        seed: of that ranking.

    Raises:
        SettingsError: the folder has other numbers of shots.
        DataError: the list is something else, or has what is not in ``data``.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path, data, shots, seed)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder; expected {_EXPECTED}")
    if path.suffix.lower() != ".json":
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return Split(_identified(path, [line.split()[0] for line in lines if line.strip()], data))
    content = read_json(path, _EXPECTED)
    if isinstance(content, dict) and "annotations" in content:
        return _of_coco(path, content, data)
    known = {image.id for image in data.images}
    if isinstance(content, list) and not all(isinstance(entry, (int, str)) and entry in known for entry in content):
        return Split(_identified(path, content, data))
    return read_split(path, data)


def _names(data: DetectionData) -> dict[str, Id]:
    """What images may be called: their id, file name, its last part, that without suffix; never what two are called."""
    names: dict[str, Id] = {}
    for called in (
        lambda image: str(image.id),
        lambda image: image.file_name,
        lambda image: image.file_name.rpartition("/")[2],
        lambda image: image.file_name.rpartition("/")[2].rpartition(".")[0],
    ):
        often = Counter(called(image) for image in data.images)
        names = {called(image): image.id for image in data.images if often[called(image)] == 1} | names
    return names


def _identified(path: Path, entries: Iterable[Any], data: DetectionData) -> list[Id]:
    """Ids of images that a list calls by one of their names, or by a path."""
    by_name = _names(data)
    ids: list[Id] = []
    foreign = []
    for entry in entries:
        text = str(entry)
        last = text.rpartition("/")[2]
        found = next((by_name[n] for n in (text, last, last.rpartition(".")[0]) if n in by_name), None)
        if found is None:
            foreign.append(text)
        else:
            ids.append(found)
    if foreign:
        raise DataError(
            f"{path}: {len(foreign)} of its {len(ids) + len(foreign)} images are not in {data.source}: {named(foreign)}"
        )
    if not ids:
        raise DataError(f"{path}: names no image; expected {_EXPECTED}")
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: names an image twice")
    return ids


def _of_coco(path: Path, content: Mapping[str, Any], data: DetectionData) -> Split:
    entries: Any = content.get("images")
    annotations: Any = content["annotations"]
    for one in (entries, annotations):
        if not isinstance(one, list) or not all(isinstance(entry, dict) for entry in one):
            raise DataError(f'{path}: "images" or "annotations" is not a list of objects; expected {_EXPECTED}')
    ids = _identified(path, [entry.get("id") for entry in entries], data)
    file_names = {image.id: image.file_name for image in data.images}
    for image_id, entry in zip(ids, entries, strict=True):
        name = lvis.file_name(entry)
        if name is not None and name.rpartition("/")[2] != file_names[image_id].rpartition("/")[2]:
            raise DataError(
                f"{path}: image {image_id} is {name}, and in {data.source} {file_names[image_id]}; it was made from "
                "other data, or its ids were changed"
            )
    listed: dict[Id, dict[int, Any]] = {image_id: {} for image_id in ids}
    for annotation in annotations:
        if annotation.get("image_id") in listed:
            listed[annotation["image_id"]][annotation.get("id")] = annotation.get("bbox")
    objects: dict[Id, list[int]] = {}
    for image, own in zip(data.images, data.annotations, strict=True):
        if image.id not in listed or set(own.ids.tolist()) <= listed[image.id].keys():
            continue
        corners = dict(zip(own.ids.tolist(), own.boxes, strict=True))
        for number, box in listed[image.id].items():
            if number not in corners or not _same(corners[number], box):
                raise DataError(
                    f"{path}: annotation {number} of image {image.file_name} is not in {data.source} with that id and "
                    f"box {box}; its ids are others than the data's, so which boxes it means can't be told"
                )
        objects[image.id] = sorted(listed[image.id])
    return Split(ids, objects)


def _same(corners: np.ndarray, box: Any) -> bool:
    try:
        x, y, width, height = (float(value) for value in box)
    except (TypeError, ValueError):
        return False
    return bool(np.abs(corners - [x, y, x + width, y + height]).max() <= SAME_BOX_PX)


def _of_folder(folder: Path, data: DetectionData, shots: int | None, seed: int) -> Split:
    files: dict[int, dict[str, Path]] = {}
    for file in sorted(folder.glob("box_*shot_*_train.txt")):
        if match := _SHOTS.fullmatch(file.name):
            files.setdefault(int(match[1]), {})[match[2]] = file
    if not files:
        raise DataError(f"{folder}: holds no box_<K>shot_<class>_train.txt; expected {_EXPECTED}")
    if shots is None and len(files) > 1:
        raise SettingsError(f"{folder}: has lists of {named(sorted(files))} shots; say which (--shots)")
    shots = next(iter(files)) if shots is None else shots
    if shots not in files:
        raise SettingsError(f"{folder}: has lists of {named(sorted(files))} shots, none of {shots}")
    names = [category.name for category in data.categories]
    absent = [name for name in names if name not in files[shots]]
    foreign = [name for name in files[shots] if name not in names]
    if absent or foreign:
        problem = f"none for {named(absent)}" if absent else f"one for {named(foreign)}, which {data.source} has not"
        raise DataError(f"{folder}: of its lists of {shots} shots there is {problem}; expected one for each class")
    kept: dict[Id, set[int]] = {}
    for name, file in files[shots].items():
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        chosen = data.subset(_identified(file, dict.fromkeys(lines), data))  # an image may have been drawn twice
        label = names.index(name) + 1
        own = [objects.keep((objects.labels == label) & ~objects.iscrowd) for objects in chosen.annotations]
        own = [replace(objects, labels=np.ones_like(objects.labels)) for objects in own]
        boxes = sum(map(len, own))
        if boxes == 0:
            raise DataError(f"{file}: its images have no {name} that is not difficult; expected {shots}")
        one_class = DetectionData(file, [data.categories[label - 1]], chosen.images, own)
        for image_id, numbers in choose_shots(one_class, min(shots, boxes), seed).objects.items():
            kept.setdefault(image_id, set()).update(numbers)
    ids = [image.id for image in data.images if image.id in kept]
    return Split(ids, {image_id: sorted(kept[image_id]) for image_id in ids})
