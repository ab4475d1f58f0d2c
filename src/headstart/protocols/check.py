"""Is a data set where a protocol looks for it, and is it the official release? Names are compared; no image is read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from headstart.datasets import coco, lvis
from headstart.datasets.class_folders import load_class_data
from headstart.datasets.detection import named
from headstart.errors import DataError
from headstart.files import read_json
from headstart.protocols.specs import Annotated, ClassFolders, DataSet, Protocol, amount

State = Literal["ok", "missing", "differs"]


@dataclass(frozen=True)
class Finding:
    """What is at ``path`` (below the root). "differs": usable, but not as in the official release."""

    path: str
    state: State
    text: str


@dataclass(frozen=True)
class Check:
    protocol: Protocol
    root: Path
    findings: tuple[Finding, ...]

    @property
    def complete(self) -> bool:
        """Nothing is missing."""
        return all(finding.state != "missing" for finding in self.findings)

    @property
    def official(self) -> bool:
        """Nothing is missing, and all numbers are those of the official release."""
        return all(finding.state == "ok" for finding in self.findings)


def root_of(data: DataSet, root: Path | str) -> Path:
    """``root``, or the data set's own folder in it.

    Raises:
        DataError: there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected the folder of {data.title}, {data.folder}/, from {data.url}")
    return root / data.folder if (root / data.folder).is_dir() else root


def place_of(source: Annotated, root: Path) -> str:
    """Where the annotation file is, or else should be."""
    if source.otherwise is not None and not (root / source.file).exists() and (root / source.otherwise).exists():
        return source.otherwise
    return source.file


def check(protocol: Protocol, root: Path | str) -> Check:
    """What of ``protocol``'s files is in ``root``, and what is not.

    Raises:
        DataError: there is no such folder.
    """
    root = root_of(protocol.data, root)
    findings: list[Finding] = []
    for source in protocol.data.files:
        if isinstance(source, ClassFolders):
            findings.append(_check_classes(source, root))
        else:
            findings += _check_voc(source, root) if source.file.endswith(".txt") else _check_coco(source, root)
    return Check(protocol, root, tuple(findings))


def _check_classes(source: ClassFolders, root: Path) -> Finding:
    path = f"{source.folder}/"
    official = (source.count, None, source.classes)
    if not (root / source.folder).is_dir():
        return Finding(path, "missing", f"no such folder; expected {amount(*official)}, a folder each")
    try:
        data = load_class_data(root / source.folder, progress=True)
    except DataError as error:
        return Finding(path, "missing", f"can't be used: {error}")
    return _compared(path, (len(data), None, len(data.classes)), official)


def _check_coco(source: Annotated, root: Path) -> list[Finding]:
    place = place_of(source, root)
    if not (root / place).is_file():
        return [
            Finding(place, "missing", f"no such file; expected {amount(source.count, source.boxes, source.classes)}")
        ]
    try:
        content = read_json(root / place, coco.EXPECTED)
    except DataError as error:
        return [Finding(place, "missing", f"can't be read: {error}")]
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(entries, list) for entries in lists):
        return [Finding(place, "missing", f"is something else; expected {coco.EXPECTED}")]
    images, boxes, classes = (len(content[key]) for key in ("images", "annotations", "categories"))
    official = (source.count, source.boxes, source.classes)
    names = [str(lvis.file_name(image)) for image in content["images"] if isinstance(image, dict)]
    return [_compared(place, (images, boxes, classes), official), _images(source.images, names, root)]


def _check_voc(source: Annotated, root: Path) -> list[Finding]:
    if not (root / source.file).is_file():
        return [Finding(source.file, "missing", f"no such file; expected the names of {source.count} images")]
    lines = (root / source.file).read_text(encoding="utf-8", errors="replace").splitlines()
    stems = [line.split()[0] for line in lines if line.strip()]
    folder = f"{source.file.split('/')[0]}/Annotations"
    annotated = _images(folder, [f"{stem}.xml" for stem in stems], root, "annotation files")
    if annotated.state == "ok":
        boxes, unreadable = 0, []
        for stem in stems:
            try:
                objects = ElementTree.parse(root / folder / f"{stem}.xml").getroot().iterfind("object")
                boxes += sum((node.findtext("difficult") or "0").strip() != "1" for node in objects)
            except (ElementTree.ParseError, ValueError):
                unreadable.append(f"{stem}.xml")
        if unreadable:
            annotated = Finding(f"{folder}/", "missing", f"{len(unreadable)} files are not XML: {named(unreadable)}")
        else:
            annotated = _compared(f"{folder}/", (len(stems), boxes, None), (source.count, source.boxes, None))
    return [
        _compared(source.file, (len(stems), None, None), (source.count, None, None)),
        annotated,
        _images(source.images, [f"{stem}.jpg" for stem in stems], root),
    ]


def _compared(
    path: str, found: tuple[int, int | None, int | None], official: tuple[int, int | None, int | None]
) -> Finding:
    same = all(there is None or number == there for number, there in zip(found, official, strict=True))
    text = amount(*found)
    return Finding(path, "ok", text) if same else Finding(path, "differs", f"{text}; {amount(*official)} officially")


def _images(folder: str, names: Iterable[str], root: Path, what: str = "images") -> Finding:
    """Whether all ``names``, which may have folders in them, are below ``folder``."""
    listed = lru_cache(maxsize=None)(_listed)
    missing, count = [], 0
    for name in names:
        parent, _, last = name.rpartition("/")
        count += 1
        if last not in listed(root / folder / parent):
            missing.append(name)
    path = f"{folder}/" if folder else "./"
    if missing:
        return Finding(path, "missing", f"{len(missing)} of {count} {what} are not there: {named(missing)}")
    return Finding(path, "ok", f"all {count} {what}")


def _listed(folder: Path) -> frozenset[str]:
    """Names in a folder; none of one that isn't there. One look at the folder is much faster than one a file."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except OSError:
        return frozenset()
