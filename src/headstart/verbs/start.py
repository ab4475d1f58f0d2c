"""What a run starts from: another run, a weights file, a transformers folder, the library's own weights, or nothing."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headstart import detectors
from headstart.detectors import backbones
from headstart.detectors.checkpoints import BackboneState, to_backbone
from headstart.detectors.detector import Detector
from headstart.detectors.formats import originals, transformers_folders
from headstart.detectors.weights import LoadReport, load_state, read_metadata, read_state
from headstart.errors import RunError, SettingsError, WeightsError
from headstart.runs import DETECTOR_FILE, RECORD, read_detector_record

SCRATCH = "scratch"
IMAGENET = "imagenet"  # the library's own supervised weights of the backbone
WORDS = (SCRATCH, IMAGENET)


def detector_of(start: Path | str) -> dict[str, Any]:
    """Detector settings of the run or the transformers folder that ``start`` is; empty for scratch, words and files.

    Raises:
        RunError: ``start`` is neither a run, nor a file, nor a word that is known.
        SettingsError: it is a run of a detector object, whose settings nobody wrote down, or a folder of another model.
    """
    path = Path(start)
    if str(start) in WORDS or path.is_file():
        return {}
    if not path.is_dir():
        words = " or ".join(f"'{word}'" for word in WORDS)
        raise RunError(f"{start}: no such run folder or weights file; expected one of these, or {words}")
    if is_foreign(path):
        return transformers_folders.read_settings(path)
    settings = dict(read_detector_record(path)["config"]["detector"])
    if "object" in settings:
        raise SettingsError(
            f"{path}: was made from a detector object, of which only the weights were kept; "
            f"start from {path / DETECTOR_FILE} and name the detector (--detector, --backbone)"
        )
    return settings


def for_family(name: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``base``, the settings of the detector that a run starts from, those that the family ``name`` takes over."""
    settings = detectors.settings_type(name)
    known = detectors.settings_type(str(base["name"])) if "name" in base else settings
    if known is settings:
        return dict(base)
    shared = detectors.parse_settings(base).shared()
    return {key: value for key, value in shared.items() if key in settings.model_fields}


def load_start(detector: Detector, start: Path | str) -> LoadReport:
    """The weights of ``start`` into ``detector``, whatever of them fits.

    A file that knows the detector's own backbone is taken key by key. Any other is a backbone's: a published checkpoint
    (:mod:`headstart.detectors.checkpoints`) or another kind of detector, whose other parts are taken where they fit.

    Raises:
        RunError: a run that has not finished.
        SettingsError: the library's own weights are asked for, and the detector is the user's own object.
        WeightsError: nothing in the file fits, reading it would execute code, or the library's weights can't be had.
    """
    if str(start) == IMAGENET:
        if detector.settings is None:
            raise SettingsError(f"{IMAGENET}: the backbone's name is not known; load its weights into the object")
        weights = BackboneState("plain", "", backbones.pretrained(detector.settings.backbone))
        return _of_backbone(detector, {}, weights, start)
    file, state, words = _read(start)
    adapted, moved = detector.adapt(state)
    own = detector.part_state(["backbone"])
    if own.keys() & adapted.keys():
        report = load_state(detector.module, adapted, str(file))
        report.moved, report.notes = words + moved, list(read_metadata(file).get("notes", []))
        return report
    backbone = to_backbone(state, str(file), detector.plain_backbone)
    known = detector.module.state_dict()
    others = {key: value for key, value in adapted.items() if key in known}
    return _of_backbone(detector, others, backbone, file)


def load_backbone(body: nn.Module, name: str, start: Path | str) -> LoadReport:
    """The weights of the backbone that ``start`` has into ``body``, a backbone alone; all else of it is left out.

    Args:
        body: of :func:`headstart.detectors.backbones.body`.
        name: of the backbone.
        start: as of :func:`load_start`.

    Raises:
        RunError: a run that has not finished.
        WeightsError: a part of ``body`` would stay random, reading would execute code, or the library's weights
            can't be had.
    """
    words: list[str] = []
    if str(start) == IMAGENET:
        source, found = IMAGENET, BackboneState("plain", "", backbones.pretrained(name))
    else:
        file, state, words = _read(start)
        source = str(file)
        state, renamed = originals.adapt(state)
        words = words + renamed
        own = backbones.own_names(state)
        if set(own.values()) & body.state_dict().keys():
            others = {"other parts of the detector": [key for key in state if key not in own]}
            found = BackboneState("detector", "", {name: state[key] for key, name in own.items()}, others)
        else:
            found = to_backbone(state, source, backbones.one_of(body).state_dict())
    placed, moved = backbones.place(body, found.state)
    report = load_state(body, placed, f"{source} ({found.layout})")
    _say_of_backbone(report, found, words + moved)
    random = [key for key in report.missing if not key.endswith("num_batches_tracked") and ".links." not in f".{key}"]
    random += [key for key, _, _ in report.reshaped]
    if random:
        raise WeightsError(
            f"{source}: has no weights that fit for {len(random)} keys of {name} ({', '.join(random[:3])}, ...), which "
            "would stay random. Is it of another --backbone?"
        )
    return report


def _read(start: Path | str) -> tuple[Path, dict[str, Tensor], list[str]]:
    """The file of a run, of a transformers folder or itself, the weights, and in words what was renamed."""
    file = weights_of(start)
    if is_foreign(Path(start)):
        return file, *transformers_folders.read_weights(Path(start))
    if not file.is_file():
        raise RunError(f"{start}: has no {DETECTOR_FILE}, so it did not finish; continue it with --resume")
    return file, read_state(file), []


def is_foreign(path: Path) -> bool:
    """Whether ``path`` is a folder that transformers wrote, and no run."""
    return not (path / RECORD).exists() and transformers_folders.is_folder(path)


def weights_of(start: Path | str) -> Path:
    """The file in which the weights of ``start`` are, whether it is there or not."""
    path = Path(start)
    if is_foreign(path):
        return path / transformers_folders.WEIGHTS[0]
    return path / DETECTOR_FILE if path.is_dir() else path


def _of_backbone(detector: Detector, others: dict[str, Tensor], backbone: BackboneState, source: Any) -> LoadReport:
    placed, moved = detector.from_backbone(backbone.state)
    report = load_state(detector.module, {**others, **placed}, f"{source} ({backbone.layout})")
    _say_of_backbone(report, backbone, moved, others)
    return report


def _say_of_backbone(
    report: LoadReport, backbone: BackboneState, moved: list[str], others: Container[str] = ()
) -> None:
    """What became of the rest of the file; ``others`` were used after all."""
    report.moved = moved + [f"{key}: {a} resized to {b}" for key, a, b in backbone.resized]
    for reason, keys in backbone.dropped.items():
        left = [key for key in keys if key not in others]
        if left:
            report.unexpected += left
            report.moved.append(f"not used, {reason}: {len(left)} keys")


def start_record(start: Any) -> dict[str, Any]:
    """What run.json says of it."""
    if isinstance(start, nn.Module):
        return {"from": type(start).__name__, "method": "given", "pretrain_steps": 0}
    if str(start) in WORDS:
        return {"from": str(start), "method": str(start), "pretrain_steps": 0}
    metadata = read_metadata(weights_of(start))
    method = metadata.get("made_by") or metadata.get("method") or metadata.get("kind") or Path(start).stem
    return {"from": str(start), "method": method, "pretrain_steps": metadata.get("steps", 0)}
