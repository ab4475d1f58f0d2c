"""Protocols: the data sets that papers measure on, which of their images or boxes are labelled, and how it is scored.

:data:`PROTOCOLS` are small specs (:mod:`headstart.protocols.specs`). :func:`check` says whether a folder holds what one
of them needs; :func:`split` writes its exact images, and boxes, to two files that ``headstart finetune --train`` and
``--val`` take::

    from headstart import protocols

    done = protocols.split("voc_split1", "VOCdevkit", "splits/split1", shots=5, seed=0)
    headstart.finetune("runs/soco", done.train, done.val, out="runs/5shot")
"""

from __future__ import annotations

import difflib
import hashlib
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from headstart.datasets.class_folders import load_class_data
from headstart.datasets.detection import DetectionData, load_detection_data, named, union
from headstart.datasets.splits import Origin, Source, Split, choose_labelled, divide, write_split
from headstart.errors import DataError, SettingsError
from headstart.files import read_json
from headstart.protocols.check import Check, Finding, place_of, root_of
from headstart.protocols.check import check as _check
from headstart.protocols.published import read_published
from headstart.protocols.specs import PROTOCOLS, Annotated, ClassFolders, Protocol


@dataclass(frozen=True)
class Part:
    """A file that :func:`split` wrote, and what is in it. ``sha256`` is of the ids: the same on any machine.

    Of whole images with classes, of which nothing is drawn, it is their folder; then ``boxes`` is None.
    """

    path: Path
    images: int
    boxes: int | None
    sha256: str


@dataclass(frozen=True)
class Splits:
    """What :func:`split` wrote. ``train`` and ``val`` are data sets for every verb that takes such labels."""

    protocol: Protocol
    seed: int
    shots: int | None
    train_part: Part
    val_part: Part

    @property
    def train(self) -> Path:
        return self.train_part.path

    @property
    def val(self) -> Path:
        return self.val_part.path

    def commands(self) -> list[str]:
        """How to train on them, a line a paper's schedule; and how to score, a line a suite of metrics."""
        train, val = (shlex.quote(str(path)) for path in (self.train, self.val))
        tune = [
            f"headstart {self.protocol.verb} START --recipe {recipe} --train {train} --val {val}"
            for recipe in self.protocol.recipes
        ]
        if self.protocol.data.of_classes:
            return [*tune, f"headstart protocol score {self.protocol.name} RUN/eval.json"]
        return tune + [f"headstart evaluate RUN {val} --metric {suite}" for suite in self.protocol.metrics]


@dataclass(frozen=True)
class Groups:
    """What :func:`score` returns: means of AP50 over classes, in 0..1; None where no class of the group has objects."""

    title: ClassVar[str] = "AP50"
    path: Path
    metric: str
    novel: float | None
    base: float | None
    all: float | None

    def values(self) -> dict[str, float | None]:
        return {"novel": self.novel, "base": self.base, "all": self.all}


@dataclass(frozen=True)
class TopK:
    """The same of whole images with classes: accuracies in 0..1; None where there are no more classes than k."""

    title: ClassVar[str] = "accuracy"
    path: Path
    metric: str
    top1: float | None
    top5: float | None

    def values(self) -> dict[str, float | None]:
        return {"top-1": self.top1, "top-5": self.top5}


def find(name: str) -> Protocol:
    """Raises: SettingsError when there is none of that name; near names are given."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    near = difflib.get_close_matches(name, PROTOCOLS, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise SettingsError(f"protocol {name}: no such protocol{hint} Known: {', '.join(PROTOCOLS)}")


def check(name: str, root: Path | str) -> Check:
    """What of a protocol's files is in ``root``, what is missing, and whether it is the official release.

    Raises:
        SettingsError: there is no such protocol.
        DataError: there is no such folder.
    """
    return _check(find(name), root)


def split(
    name: str,
    root: Path | str,
    out: Path | str | None = None,
    *,
    seed: int = 0,
    shots: int | None = None,
    ids: Path | str | None = None,
    val_ids: Path | str | None = None,
) -> Splits:
    """Write a protocol's training and validation images to ``train.json`` and ``val.json`` in the folder ``out``.

    Args:
        name: of the protocol.
        root: the data set's folder; ``check`` says what has to be in it.
        out: unset: ``splits/NAME``, with the number of shots and the seed where they matter.
        seed: of what is drawn.
        shots: boxes of each class, for the few-shot protocols.
        ids: a published list, of images or of boxes, instead of drawing: see
            :func:`headstart.protocols.published.read_published`.
        val_ids: the same for the validation images, where the protocol divides one set; unset: all that ``ids`` does
            not name.

    Raises:
        SettingsError: there is no such protocol, or ``shots`` or ``val_ids`` where it has no use for them.
        DataError: the data are not all there, or a published list does not fit them.
    """
    protocol = find(name)
    few_shot = protocol.labels == "shots"
    if few_shot and shots is None and ids is None:
        raise SettingsError(
            f"protocol {name}: needs the number of boxes of each class (--shots), usually 1, 2, 3, 5 or 10"
        )
    if shots is not None and not few_shot:
        raise SettingsError(f"protocol {name}: has no use for --shots; it takes {protocol.what}")
    if val_ids is not None and (protocol.keep is None or ids is None):
        raise SettingsError("--val-ids: goes with --ids, for a protocol that divides one set of images (fsod_test)")
    root = root_of(protocol.data, root)
    checked = _check(protocol, root)
    if not checked.complete:
        lost = next(f for f in checked.findings if f.state == "missing")
        raise DataError(
            f"{root / lost.path}: {lost.text}. headstart protocol check {name} --root {root} says what else"
        )

    if protocol.data.of_classes:
        if ids is not None:
            raise SettingsError(f"protocol {name}: has no use for --ids; it takes all images")
        train_part, val_part = (_class_part(source, root) for source in protocol.data.files)
        return Splits(protocol, seed, shots, train_part, val_part)
    data, origin = _load(protocol.data.train, root)
    labels = f"{shots}shot" if few_shot else protocol.labels
    if ids is not None:
        labels = f"from {Path(ids).name}"
        train = read_published(ids, data, shots, seed)
    elif protocol.keep is not None:
        train, held_out = divide(data, protocol.keep, seed)
        labels = f"{100 * protocol.keep:g}%"
    elif labels == "all":
        train = Split([image.id for image in data.images])
    else:
        train = choose_labelled(data, labels, seed)

    val_data, val_origin = (data, origin) if protocol.keep is not None else _load(protocol.data.val, root)
    if val_ids is not None:
        val = read_published(val_ids, data, None, seed)
    elif protocol.keep is None:
        val = Split([image.id for image in val_data.images])
    elif ids is None:
        val = held_out
    else:
        taken = set(train.ids)
        val = Split([image.id for image in data.images if image.id not in taken])
    both = set(train.ids) & set(val.ids) if protocol.keep is not None else set()
    if both:
        raise DataError(f"{ids}: {len(both)} of its images are in {val_ids} too; expected no image on both sides")

    folder = Path(out) if out is not None else _folder(protocol, seed, shots, ids)
    said = {"protocol": name, **({"novel": list(protocol.novel)} if protocol.novel else {})}
    parts = []
    for part, chosen, of, where, budget in (
        ("train", train, data, origin, labels),
        ("val", val, val_data, val_origin, "all" if protocol.keep is None else "the rest"),
    ):
        path = folder / f"{part}.json"
        write_split(path, chosen, of, budget, seed, where, part=part, **said)
        counted = sum(chosen.of(of).class_counts().values())
        parts.append(Part(path, len(chosen), counted, chosen.digest(of)))
    return Splits(protocol, seed, shots, *parts)


def score(name: str, evaluations: Sequence[Path | str]) -> list[Groups] | list[TopK]:
    """AP50 of boxes over the novel classes of a few-shot protocol, over the others, and over all; or accuracies.

    Args:
        evaluations: files that ``headstart evaluate``, ``finetune`` and ``linear`` write (``eval.json``), for example
            of several seeds.

    Raises:
        SettingsError: there is no such protocol, or it has no novel classes.
        DataError: a file is something else, or lacks a class.
    """
    protocol = find(name)
    if protocol.data.of_classes:
        return [_top_k(Path(file)) for file in evaluations]
    if not protocol.novel:
        raise SettingsError(f"protocol {name}: has no novel classes; its metrics are what headstart evaluate prints")
    return [_groups(Path(file), protocol) for file in evaluations]


def _groups(file: Path, protocol: Protocol) -> Groups:
    content = read_json(file, "an evaluation that headstart evaluate wrote")
    try:
        by_class = {str(k): v["AP50"] for k, v in content["per_class"]["bbox"].items()}
        metric = str(content["metric"])
    except (KeyError, TypeError, AttributeError):
        raise DataError(f'{file}: has no "metric" or AP50 by class; expected what headstart evaluate wrote') from None
    absent = [name for name in protocol.novel if name not in by_class]
    if absent:
        raise DataError(f"{file}: has no class {named(absent)}; expected an evaluation on VOC")

    def mean(names: Iterable[str]) -> float | None:
        values = [by_class[name] for name in names if by_class[name] is not None]
        return sum(values) / len(values) if values else None

    base = [name for name in by_class if name not in protocol.novel]
    return Groups(file, metric, mean(protocol.novel), mean(base), mean(by_class))


def _top_k(file: Path) -> TopK:
    content = read_json(file, "an evaluation that headstart linear wrote")
    try:
        found = content["metrics"]["accuracy"]
        return TopK(file, str(content["metric"]), found["top1"], found["top5"])
    except (KeyError, TypeError):
        raise DataError(f"{file}: has no top-1 and top-5 accuracy; expected what headstart linear wrote") from None


def _class_part(source: Annotated | ClassFolders, root: Path) -> Part:
    assert isinstance(source, ClassFolders)
    data = load_class_data(root / source.folder)
    pairs = zip(data.images.names, data.labels.tolist(), strict=True)
    lines = sorted(f"{name.rpartition('/')[2]}\t{data.classes[label]}\n" for name, label in pairs)
    return Part(root / source.folder, len(data), None, hashlib.sha256("".join(lines).encode()).hexdigest())


def _load(sources: Sequence[Annotated | ClassFolders], root: Path) -> tuple[DetectionData, Origin]:
    places = tuple(Source(place_of(source, root), source.images) for source in sources if isinstance(source, Annotated))
    parts = [load_detection_data(root / place.file, root / place.images) for place in places]
    return union(root, parts) if len(parts) > 1 else parts[0], Origin(root, places)


def _folder(protocol: Protocol, seed: int, shots: int | None, ids: Path | str | None) -> Path:
    words = [protocol.name]
    if ids is not None:
        words.append(Path(ids).stem)
    if shots is not None:
        words.append(f"{shots}shot")
    if protocol.seeded and ids is None:
        words.append(f"seed{seed}")
    return Path("splits") / "-".join(words)


__all__ = [
    "PROTOCOLS",
    "Check",
    "Finding",
    "Groups",
    "Part",
    "Protocol",
    "Splits",
    "TopK",
    "check",
    "find",
    "score",
    "split",
]
