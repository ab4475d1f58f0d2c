"""What a run starts from: another run, a weights file, the library's own weights, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from headstart.detectors.detector import Detector
from headstart.detectors.weights import LoadReport, load_state, read_metadata, read_state
from headstart.errors import RunError, SettingsError
from headstart.runs import DETECTOR_FILE, read_record

SCRATCH = "scratch"


def detector_of(start: Path | str) -> dict[str, Any]:
    """Detector settings of the run that ``start`` is; empty for scratch, the library's weights and files.

    Raises:
        RunError: ``start`` is neither a run, nor a file, nor a word that is known.
    """
    path = Path(start)
    if str(start) == SCRATCH or path.is_file():
        return {}
    if not path.is_dir():
        raise RunError(f"{start}: no such run folder or weights file; expected one of these, or '{SCRATCH}'")
    settings = dict(read_record(path)["config"]["detector"])
    if "object" in settings:
        raise SettingsError(
            f"{path}: was made from a detector object, of which only the weights were kept; "
            f"start from {path / DETECTOR_FILE} and name the detector (--detector, --backbone)"
        )
    return settings


def load_start(detector: Detector, start: Path | str) -> LoadReport:
    """The weights of ``start`` into ``detector``, whatever of them fits.

    Raises:
        RunError: a run that has not finished.
        WeightsError: nothing in the file fits, or reading it would execute code.
    """
    path = Path(start)
    file = path / DETECTOR_FILE if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"{path}: has no {DETECTOR_FILE}, so it did not finish; continue it with --resume")
    state, moved = detector.adapt(read_state(file))
    report = load_state(detector.module, state, str(file))
    report.moved = moved
    return report


def start_record(start: Any) -> dict[str, Any]:
    """What run.json says of it."""
    if isinstance(start, nn.Module):
        return {"from": type(start).__name__, "method": "given", "pretrain_steps": 0}
    if str(start) == SCRATCH:
        return {"from": SCRATCH, "method": SCRATCH, "pretrain_steps": 0}
    path = Path(start)
    metadata = read_metadata(path / DETECTOR_FILE if path.is_dir() else path)
    method = metadata.get("method") or metadata.get("kind") or path.stem
    return {"from": str(start), "method": method, "pretrain_steps": metadata.get("steps", 0)}
