"""Export: a run's weights for another library, under its key names and in its tensor layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from headstart import detectors
from headstart.detectors.detector import Detector
from headstart.detectors.formats import FOLDERS, format_module, transformers_folders
from headstart.detectors.weights import read_metadata, read_state, save_detector, summarise
from headstart.errors import RunError, SettingsError, WeightsError
from headstart.files import replacing
from headstart.runs import DETECTOR_FILE, RECORD, read_detector_record

SUFFIXES = (".safetensors", ".pth")


@dataclass
class Exported:
    """What :func:`export` returns.

    Attributes:
        path: the file or folder written.
        parts: part -> how many of its keys were written, perhaps none.
        missing: part -> how many of its keys the run does not have, since it did not train that part.
        missing_there: keys of the other library's model that the run has no counterpart for, where that is known.
        dropped: reason -> keys that the other library has no place for.
        trimmed: reason -> keys of which it has no place for some rows.
        settings: what the model over there has to be set to, under the names of that library's configuration.
        loading: the lines that load the file there.
    """

    path: Path
    to: str
    parts: dict[str, int]
    missing: dict[str, int] = field(default_factory=dict)
    missing_there: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    trimmed: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    loading: str = ""

    def table(self) -> Table:
        table = Table(title=f"{self.path} ({self.to})", title_justify="left")
        table.add_column("part")
        table.add_column("keys", justify="right")
        table.add_column("")
        for part, written in self.parts.items():
            absent = self.missing.get(part, 0)
            table.add_row(part, str(written), f"{absent} not in the run" if absent else "")
        table.add_section()
        for reason, keys in self.dropped.items():
            table.add_row("left out", str(len(keys)), f"{reason}: {summarise(keys)}")
        for reason, keys in self.trimmed.items():
            table.add_row("trimmed", str(len(keys)), f"{reason}: {summarise(keys)}")
        if self.missing_there:
            table.add_row("missing there", str(len(self.missing_there)), summarise(self.missing_there))
        return table


def export(
    run: Path | str, to: str = "torchvision", out: Path | str | None = None, *, format: str | None = None
) -> Exported:
    """Write a run's weights for another library.

    Args:
        run: folder of a finished run. A pretrained one has the parts it trained, a fine-tuned one has all.
        to: "torchvision", "detectron2", "mmdetection", "timm" (the backbone alone), or "transformers" (a folder, of a
            DETR or Deformable DETR).
        out: file to write, or folder; unset: ``RUN/TO.safetensors``, or ``RUN/transformers``.
        format: "safetensors" or "pth", a torch file as that library's own loaders read it; unset: what ``out`` ends
            in, or safetensors.

    Raises:
        RunError: not a finished run.
        SettingsError: the other library has no such detector, backbone or part; the message says which.
        WeightsError: the run's weights can't be read, or are not those of its detector.
    """
    run = Path(run)
    library = format_module(to)
    record = read_detector_record(run)
    file = run / DETECTOR_FILE
    if not file.is_file():
        raise RunError(f"{run}: has no {DETECTOR_FILE}, so it did not finish; continue it with --resume")
    path = _target(run, to, out, format)
    if path.resolve() == file.resolve():
        raise RunError(f"{path}: is the run's own file; choose another --out")
    described = record["config"].get("detector", {})
    state, metadata = read_state(file), read_metadata(file)
    known = "object" not in described
    if not known and to != "torchvision":
        raise SettingsError(
            f"--to {to}: {run} was trained on a detector object ({described['object']}), and what it was built from "
            "is not in the run; only --to torchvision keeps its names as they are"
        )
    detector = detectors.build(detectors.parse_settings(described)) if known else None
    owners = _parts(detector, state)
    strange = [key for key in state if key not in owners]
    if strange:
        raise WeightsError(f"{file}: does not fit the detector of {run / RECORD} ({summarise(strange)})")
    settings = detector.settings.model_dump(mode="json") if detector is not None and detector.settings else {}
    translated = library.from_torchvision(state, str(settings.get("backbone", "")))
    if not translated.state:
        raise SettingsError(f"--to {to}: {file} holds nothing that goes there ({summarise(list(state))})")
    wanted: dict[str, Any] = {}
    if detector is not None:
        wanted = library.model_settings(detector.module.state_dict(), settings)
    about = metadata | {"format": to}
    if settings:
        about |= {"detector": settings["name"], "backbone": settings["backbone"], "channels": "RGB, in [0, 1]"}
        about |= {name: settings[name] for name in ("image_mean", "image_std") if name in settings}
    missing_there = translated.missing
    if to in FOLDERS:
        # Only a detector that was built here gets so far.
        assert detector is not None
        classes = metadata.get("classes") or [f"LABEL_{number}" for number in range(settings["num_classes"] or 90)]
        whole = library.from_torchvision(detector.module.state_dict(), str(settings["backbone"])).state
        missing_there = [name for name in whole if name not in translated.state]
        config = wanted | library.class_names(classes)
        transformers_folders.write(path, translated.state, config, library.processor_settings(settings), about)
        wanted = {}  # all of it is in the folder
    elif path.suffix == ".pth":
        tensors = {key: value.clone() for key, value in translated.state.items()}
        with replacing(path) as temporary:
            torch.save(library.torch_file(tensors, about), temporary)
    else:
        save_detector(path, translated.state, about)
    left_out = {key for keys in translated.dropped.values() for key in keys}
    written = [key for key in state if key not in left_out]
    absent = _counts(owners, [key for key in owners if key not in state])
    return Exported(
        path=path,
        to=to,
        parts=_counts(owners, written),
        missing={part: keys for part, keys in absent.items() if keys},
        missing_there=missing_there,
        dropped=translated.dropped,
        trimmed=translated.trimmed,
        settings=wanted,
        loading=library.loading(str(path)),
    )


def _target(run: Path, to: str, out: Path | str | None, format: str | None) -> Path:
    if format is not None and f".{format}" not in SUFFIXES:
        raise SettingsError(f"--format {format}: not known; choose one of {', '.join(s[1:] for s in SUFFIXES)}")
    if to in FOLDERS:
        if format not in (None, SUFFIXES[0][1:]):
            raise SettingsError(f"--format {format}: --to {to} writes a folder with {SUFFIXES[0][1:]}")
        return Path(out) if out is not None else run / to
    path = Path(out) if out is not None else run / f"{to}.{format or SUFFIXES[0][1:]}"
    if path.suffix not in SUFFIXES or format not in (None, path.suffix[1:]):
        expected = f".{format}" if format else " or ".join(SUFFIXES)
        raise SettingsError(f"--out {path}: expected a name that ends in {expected}")
    return path


def _parts(detector: Detector | None, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Key -> the part it belongs to; for a user's own object, the first word of its name."""
    if detector is None:
        return {key: key.partition(".")[0] for key in state}
    return {key: part for part in detector.parts for key in detector.part_state([part])}


def _counts(owners: Mapping[str, str], keys: list[str]) -> dict[str, int]:
    """How many of ``keys`` each part owns."""
    found = dict.fromkeys(owners.values(), 0)
    for key in keys:
        found[owners[key]] += 1
    return found
