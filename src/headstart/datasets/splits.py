"""Label budgets and splits: which images count as labelled, and of some of them which objects.

Everything is drawn by ranking: things are ordered by the SHA-256 of "<seed>:<what they are called in the data>". The
outcome depends on the data and the seed alone, not on a random generator, a platform, a version, or the order in a
file. A split is written to a file with the exact ids; such a file can be given wherever a budget can, and one that
also says where its data are can be read like a data set of its own.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headstart.datasets.detection import DetectionData, load_detection_data, named, union
from headstart.errors import DataError, SettingsError
from headstart.files import read_json, write_json

_EXPECTED = (
    'a share such as "10%", a number of images such as "25", boxes of each class such as "5shot", "all", or a split '
    "file (.json)"
)
_EXPECTED_FILE = 'a split: {"images": [{"id": 1, "file_name": "a.jpg"}, ...]} or a list of ids'

Id = int | str


@dataclass(frozen=True)
class Budget:
    """How much is labelled: exactly one of ``share`` of the images (0..1], ``count`` of them, ``shots`` (boxes of each
    class) and ``file`` is set."""

    text: str
    share: float | None = None
    count: int | None = None
    shots: int | None = None
    file: Path | None = None

    def images(self, available: int) -> int:
        """The number of images out of ``available``, at least one, of a share or a count.

        Raises:
            SettingsError: a ``count`` is more than there are; or it is neither of the two.
        """
        if self.share is not None:
            return max(1, math.floor(self.share * available + 0.5))
        if self.count is None:
            raise SettingsError(f"labels {self.text}: is no number of images; expected a share or a number")
        if self.count > available:
            raise SettingsError(f"labels {self.text}: there are only {available} labelled images")
        return self.count


@dataclass(frozen=True)
class Split:
    """Images by their ids, and of those that do not keep all objects, the numbers of the kept (``Annotations.ids``)."""

    ids: list[Id]
    objects: Mapping[Id, Sequence[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, data: DetectionData) -> DetectionData:
        """What the split leaves of ``data``.

        Raises:
            DataError: it names an image that is not there, or an object that its image does not have.
        """
        chosen = data.subset(self.ids)
        for k, image in enumerate(chosen.images):
            if (numbers := self.objects.get(image.id)) is None:
                continue
            annotations = chosen.annotations[k]
            unknown = set(numbers) - set(annotations.ids.tolist())
            if unknown:
                raise DataError(
                    f"{data.source}: image {image.file_name} has no object numbered {named(sorted(unknown))}; "
                    "the split was made from other data"
                )
            chosen.annotations[k] = annotations.keep(np.isin(annotations.ids, list(numbers)))
        return chosen

    def digest(self, data: DetectionData) -> str:
        """SHA-256, in hexadecimal, of what is chosen, in any order: equal splits have equal ones on any machine."""
        names = {image.id: image.file_name for image in data.images}
        lines = [f"{i}\t{names[i]}\t{sorted(self.objects[i]) if i in self.objects else 'all'}\n" for i in self.ids]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """An annotation file below a data set's folder, and the folder of its images; with forward slashes."""

    file: str
    images: str


@dataclass(frozen=True)
class Origin:
    """Where a split's data are, so that its file can be read as a data set."""

    root: Path
    sources: tuple[Source, ...]


def parse_budget(text: str | int | Path) -> Budget:
    """``"10%"``, ``"25"`` (images), ``"5shot"`` (boxes of each class), ``"all"``, or the path of a split file.

    Raises:
        SettingsError: none of these, or out of range.
    """
    text = str(text).strip()
    if text == "all":
        return Budget(text, share=1.0)
    if re.fullmatch(r"\d+(\.\d+)?%", text):
        if not 0 < (percent := float(text[:-1])) <= 100:
            raise SettingsError(f"labels {text}: expected more than 0% and at most 100%")
        return Budget(text, share=percent / 100)
    if re.fullmatch(r"\d+", text):
        if int(text) < 1:
            raise SettingsError(f"labels {text}: expected at least 1 image")
        return Budget(text, count=int(text))
    if re.fullmatch(r"\d+shot", text):
        if int(text[:-4]) < 1:
            raise SettingsError(f"labels {text}: expected at least 1 box of each class")
        return Budget(text, shots=int(text[:-4]))
    if Path(text).is_file():
        return Budget(text, file=Path(text))
    problem = "no such file" if text.endswith(".json") else "not understood"
    raise SettingsError(f"labels {text!r}: {problem}; expected {_EXPECTED}")


def choose_labelled(data: DetectionData, budget: Budget | str | int, seed: int = 0) -> Split:
    """What counts as labelled.

    Of a share or a number of images: images are ranked by ``"<seed>:<file name>"``. First, in that order, those that
    bring a class not seen yet; then the rest. The budget takes the first of this sequence, so that a larger budget
    with the same seed contains the smaller one. Of shots: see :func:`choose_shots`.

    Raises:
        SettingsError: the budget asks for more images than there are.
        DataError: the budget is a file that does not fit the data, or asks for more boxes of a class than there are.
    """
    if not isinstance(budget, Budget):
        budget = parse_budget(budget)
    if budget.file is not None:
        return read_split(budget.file, data)
    if budget.shots is not None:
        return choose_shots(data, budget.shots, seed)
    covered: set[int] = set()
    first: list[int] = []
    rest: list[int] = []
    for index in _ranked(data, seed):
        classes = _classes(data, index)
        (first if classes - covered else rest).append(index)
        covered |= classes
    return Split([data.images[index].id for index in (first + rest)[: budget.images(len(data))]])


def choose_shots(data: DetectionData, shots: int, seed: int = 0) -> Split:
    """``shots`` boxes of each class, and no others of their images.

    The boxes of a class, crowds aside, are ranked by ``"<seed>:<file name>:<the object's number>"`` and the first are
    taken: every box is as likely as another, and more shots with the same seed contain the fewer ones.

    Raises:
        DataError: there are fewer boxes of a class, or two objects of an image have the same number.
    """
    ranked: dict[int, list[tuple[bytes, int, int]]] = {k: [] for k in range(1, len(data.categories) + 1)}
    for index, (image, objects) in enumerate(zip(data.images, data.annotations, strict=True)):
        if len(set(objects.ids.tolist())) < len(objects):
            raise DataError(f"{data.source}: two annotations of image {image.file_name} have the same id")
        for number, label, crowd in zip(
            objects.ids.tolist(), objects.labels.tolist(), objects.iscrowd.tolist(), strict=True
        ):
            if not crowd:
                ranked[label].append((_rank(seed, f"{image.file_name}:{number}"), index, number))
    few = [f"{data.categories[k - 1].name} ({len(boxes)})" for k, boxes in ranked.items() if len(boxes) < shots]
    if few:
        raise DataError(f"{data.source}: has fewer than {shots} boxes of {named(few)}; expected {shots} of each class")
    kept: dict[int, list[int]] = {}
    for boxes in ranked.values():
        for _, index, number in sorted(boxes)[:shots]:
            kept.setdefault(index, []).append(number)
    order = [index for index in _ranked(data, seed) if index in kept]
    return Split([data.images[i].id for i in order], {data.images[i].id: sorted(kept[i]) for i in order})


def divide(data: DetectionData, share: float, seed: int = 0) -> tuple[Split, Split]:
    """Two parts, the first with ``share`` of the images, both with every class that ``data`` has objects of.

    The second part is filled first, from the images ranked as in :func:`choose_labelled`: with those that bring it a
    class it does not have yet, then with the others; an image that is the last of a class stays in the first part.

    Raises:
        DataError: that can't be done: a class is in one image alone, or there are too many classes for a part.
    """
    size = len(data) - math.floor(share * len(data) + 0.5)
    left = Counter(k for index in range(len(data)) for k in _classes(data, index))
    single = [data.categories[k - 1].name for k, images in sorted(left.items()) if images == 1]
    if single:
        raise DataError(f"{data.source}: only one image has {named(single)}; expected two, one for each part")
    second: dict[int, None] = {}
    covered: set[int] = set()
    for only_new in (True, False):
        for index in _ranked(data, seed):
            classes = _classes(data, index)
            wanted = index not in second and (classes - covered or not only_new)
            if wanted and len(second) < size and all(left[k] > 1 for k in classes):
                second[index] = None
                covered |= classes
                left -= Counter(classes)
    absent = [data.categories[k - 1].name for k in sorted(left) if k not in covered]
    if absent or len(second) < size:
        missing = f"without {named(absent)}" if absent else f"of {len(second)}"
        raise DataError(
            f"{data.source}: {size} of its {len(data)} images can't be set apart with every class in both parts; "
            f"got a part {missing}"
        )
    first = [index for index in _ranked(data, seed) if index not in second]
    return Split([data.images[i].id for i in first]), Split([data.images[i].id for i in second])


def _ranked(data: DetectionData, seed: int) -> list[int]:
    """Positions of the images, ordered by the digest of seed and file name."""
    return sorted(range(len(data)), key=lambda index: (_rank(seed, data.images[index].file_name), index))


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _classes(data: DetectionData, index: int) -> set[int]:
    """Labels of an image's objects, crowds aside."""
    objects = data.annotations[index]
    return set(objects.labels[~objects.iscrowd].tolist())


# ---- files -----------------------------------------------------------------------------------------------


def write_split(
    path: Path | str,
    split: Split,
    data: DetectionData,
    budget: Budget | str | int,
    seed: int,
    origin: Origin | None = None,
    **said: Any,
) -> None:
    """The exact ids and file names, and the kept objects' numbers where an image does not keep all, as JSON.

    Args:
        origin: where ``data`` are; the file is then a data set for :func:`load_detection_data`.
        said: what else the file should say.

    Raises:
        DataError: an id is not in ``data``.
        RunError: the file can't be written.
    """
    images = [
        {"id": image.id, "file_name": image.file_name}
        | ({"annotations": list(split.objects[image.id])} if image.id in split.objects else {})
        for image in data.subset(split.ids).images
    ]
    text = budget.text if isinstance(budget, Budget) else str(budget)
    content: dict[str, Any] = {**said, "data": data.source.name, "labels": text, "seed": seed}
    content["sha256"] = split.digest(data)
    if origin is not None:
        content["root"] = _from(Path(path).resolve().parent, origin.root.resolve())
        content["sources"] = [{"file": s.file, "images": s.images} for s in origin.sources]
    write_json(path, {**content, "images": images})


def _from(folder: Path, root: Path) -> str:
    """``root`` as seen from ``folder``: both may be moved together."""
    try:
        return Path(os.path.relpath(root, folder)).as_posix()
    except ValueError:  # another drive
        return root.as_posix()


def read_split(path: Path | str, data: DetectionData) -> Split:
    """What a file of :func:`write_split` says; a plain JSON list of ids is read too.

    Raises:
        DataError: the file is something else, is empty, or names images or objects that are not in ``data``.
    """
    path = Path(path)
    names, split = _entries(path, read_json(path, _EXPECTED_FILE))
    known = {image.id: image.file_name for image in data.images}
    foreign = [
        f"{i} ({name})" if name else str(i)
        for i, name in zip(split.ids, names, strict=True)
        if i not in known or (name is not None and name != known[i])
    ]
    if foreign:
        raise DataError(
            f"{path}: {len(foreign)} of its {len(split)} images are not in {data.source}: {named(foreign)}; "
            "it was made from other data"
        )
    try:
        split.of(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return split


def _entries(path: Path, content: Any) -> tuple[list[str | None], Split]:
    """File names, None where not given, and the split; not yet compared with any data."""
    entries = content.get("images") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise DataError(f"{path}: has no list of images; expected {_EXPECTED_FILE}")
    if not entries:
        raise DataError(f"{path}: names no image; expected {_EXPECTED_FILE}")
    ids: list[Id] = []
    names: list[str | None] = []
    objects: dict[Id, list[int]] = {}
    for index, entry in enumerate(entries):
        image_id = entry.get("id") if isinstance(entry, dict) else entry
        if not isinstance(image_id, (int, str)):
            raise DataError(f"{path}: entry {index} has no id; expected {_EXPECTED_FILE}")
        ids.append(image_id)
        names.append(entry.get("file_name") if isinstance(entry, dict) else None)
        kept = entry.get("annotations") if isinstance(entry, dict) else None
        if kept is not None:
            if not isinstance(kept, list) or not all(isinstance(number, int) for number in kept):
                raise DataError(f'{path}: entry {index} has "annotations" {kept!r}; expected a list of their ids')
            objects[image_id] = kept
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: names an image twice")
    return names, Split(ids, objects)


def is_data_set(content: Any) -> bool:
    """A split file that says where its data are."""
    return isinstance(content, dict) and "sources" in content and "annotations" not in content


def load_split(path: Path, content: Mapping[str, Any], images: Path | str | None = None) -> DetectionData:
    """What a split file with an ``origin`` chooses, in its order. ``images``: where not in their own folders.

    Raises:
        DataError: as :func:`load_detection_data`; or the data are not where the file says.
    """
    _, split = _entries(path, content)
    sources, root = content["sources"], content.get("root")
    if not isinstance(root, str) or not isinstance(sources, list) or not sources:
        raise DataError(f'{path}: "root" or "sources" is not what it should be; expected a folder, and a list of files')
    parts = []
    for source in sources:
        if not isinstance(source, dict) or not isinstance(source.get("file"), str):
            raise DataError(f'{path}: "sources" has {source!r}; expected {{"file": "...", "images": "..."}}')
        file = path.parent / root / source["file"]
        if not file.exists():
            raise DataError(
                f"{path}: its data are not in {path.parent / root} (no {file}). Write it again for where they are now: "
                f"headstart protocol split {content.get('protocol')} --root DIR --ids {path} --out OTHER"
            )
        folder = path.parent / root / str(source.get("images", ""))
        parts.append(load_detection_data(file, folder if images is None else images, only=set(split.ids)))
    data = union(path, parts)
    absent = set(split.ids) - {image.id for image in data.images}
    if absent:
        raise DataError(
            f"{path}: {len(absent)} of its {len(split)} images are missing: {named(sorted(absent, key=str))}; "
            f"looked in {', '.join(str(path.parent / root / s['file']) for s in sources)} and beside"
        )
    return split.of(data)
