"""Label budgets: which images count as labelled. Seeded, the same on every machine, and written to a file."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headstart.datasets.detection import DetectionData, named
from headstart.errors import DataError, SettingsError
from headstart.files import read_json, write_json

_EXPECTED = 'a share such as "10%", a number of images such as "25", "all", or a split file (.json)'


@dataclass(frozen=True)
class Budget:
    """How many images are labelled: exactly one of ``share`` (0..1], ``count`` and ``file`` is set."""

    text: str
    share: float | None = None
    count: int | None = None
    file: Path | None = None

    def images(self, available: int) -> int:
        """The number of images out of ``available``, at least one.

        Raises:
            SettingsError: a ``count`` is more than there are.
        """
        if self.share is not None:
            return max(1, math.floor(self.share * available + 0.5))
        assert self.count is not None
        if self.count > available:
            raise SettingsError(f"labels {self.text}: there are only {available} labelled images")
        return self.count


def parse_budget(text: str | int | Path) -> Budget:
    """``"10%"``, ``"25"`` (images), ``"all"``, or the path of a file that :func:`write_split` wrote.

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
    if Path(text).is_file():
        return Budget(text, file=Path(text))
    problem = "no such file" if text.endswith(".json") else "not understood"
    raise SettingsError(f"labels {text!r}: {problem}; expected {_EXPECTED}")


def choose_labelled(data: DetectionData, budget: Budget | str | int, seed: int = 0) -> list[int | str]:
    """Ids of the images that count as labelled.

    Images are ordered by the SHA-256 of ``"<seed>:<file name>"``, which is the same on any platform and in
    any version. First, in that order, those that bring a class not seen yet; then the rest. The budget takes
    the first of this sequence, so that a larger budget with the same seed contains the smaller one.

    Raises:
        SettingsError: the budget asks for more images than there are.
        DataError: the budget is a file that does not fit the data.
    """
    if not isinstance(budget, Budget):
        budget = parse_budget(budget)
    if budget.file is not None:
        return read_split(budget.file, data)

    def digest(index: int) -> tuple[bytes, int]:
        name = data.images[index].file_name
        return hashlib.sha256(f"{seed}:{name}".encode()).digest(), index

    order = sorted(range(len(data.images)), key=digest)
    covered: set[int] = set()
    first: list[int] = []
    rest: list[int] = []
    for index in order:
        objects = data.annotations[index]
        classes = set(objects.labels[~objects.iscrowd].tolist())
        (first if classes - covered else rest).append(index)
        covered |= classes
    return [data.images[index].id for index in (first + rest)[: budget.images(len(order))]]


def write_split(
    path: Path | str, ids: Sequence[int | str], data: DetectionData, budget: Budget | str | int, seed: int
) -> None:
    """The exact ids and file names, as JSON.

    Raises:
        DataError: an id is not in ``data``.
        RunError: the file can't be written.
    """
    chosen = data.subset(ids)
    images = [{"id": image.id, "file_name": image.file_name} for image in chosen.images]
    text = budget.text if isinstance(budget, Budget) else str(budget)
    write_json(path, {"data": data.source.name, "labels": text, "seed": seed, "images": images})


def read_split(path: Path | str, data: DetectionData) -> list[int | str]:
    """The ids in a file of :func:`write_split`; a plain JSON list of ids is read too.

    Raises:
        DataError: the file is something else, is empty, or names images that are not in ``data``.
    """
    expected = 'a split: {"images": [{"id": 1, "file_name": "a.jpg"}, ...]} or a list of ids'
    content = read_json(path, expected)
    entries = content.get("images") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise DataError(f"{path}: has no list of images; expected {expected}")
    if not entries:
        raise DataError(f"{path}: names no image; expected {expected}")
    names = {image.id: image.file_name for image in data.images}
    ids: list[int | str] = []
    foreign: list[str] = []
    for index, entry in enumerate(entries):
        image_id = entry.get("id") if isinstance(entry, dict) else entry
        if not isinstance(image_id, (int, str)):
            raise DataError(f"{path}: entry {index} has no id; expected {expected}")
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if image_id not in names or (name is not None and name != names[image_id]):
            foreign.append(f"{image_id} ({name})" if name else str(image_id))
        ids.append(image_id)
    if foreign:
        raise DataError(
            f"{path}: {len(foreign)} of its {len(ids)} images are not in {data.source}: {named(foreign)}; "
            "it was made from other data"
        )
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: names an image twice")
    return ids
