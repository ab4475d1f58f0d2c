"""Weights in and out: safetensors first, nothing executed, and a load report every time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headstart.detectors.detector import Detector
from headstart.errors import WeightsError
from headstart.files import replacing, write_text

# Some checkpoints keep the weights under one of these.
NESTED_UNDER = ("state_dict", "model", "model_state_dict")


@dataclass
class LoadReport:
    """What became of every weight. Silence here is how this field loses weeks.

    Attributes:
        matched: keys loaded.
        missing: keys of the detector that the file does not have; they keep their random start.
        unexpected: keys of the file that the detector does not have; they were not used.
        reshaped: (key, shape in the file, shape in the detector); not loaded.
        reinitialised: keys in both that were left at their random start on purpose.
    """

    source: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, list[int], list[int]]] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        table = Table(title=f"Weights from {self.source}", title_justify="left")
        table.add_column("")
        table.add_column("keys", justify="right")
        table.add_column("which")
        meaning = {
            "matched": self.matched,
            "missing (random start)": self.missing,
            "unexpected (not used)": self.unexpected,
            "reshaped (not loaded)": [f"{k} {a} -> {b}" for k, a, b in self.reshaped],
            "re-initialised": self.reinitialised,
        }
        for name, keys in meaning.items():
            table.add_row(name, str(len(keys)), summarise(keys))
        return table


def summarise(keys: Sequence[str], most: int = 6) -> str:
    """``backbone.body (120), backbone.fpn (16), ...``: keys counted by their first two parts."""
    groups: dict[str, int] = {}
    for key in keys:
        group = key if " -> " in key else ".".join(key.split(".")[:2])
        groups[group] = groups.get(group, 0) + 1
    shown = [f"{group} ({count})" if count > 1 else group for group, count in list(groups.items())[:most]]
    return ", ".join(shown) + (f", and {len(groups) - most} more groups" if len(groups) > most else "")


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a torch file read with ``weights_only=True``.

    Raises:
        WeightsError: no such file, damaged, holds no tensors, or would have to execute code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path}: not a readable safetensors file ({error})") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0][:160]
        raise WeightsError(
            f"{path}: holds more than tensors, and reading it would execute code from it, which is refused "
            f"({reason}). Save its state_dict() alone, best as .safetensors"
        ) from None
    except Exception as error:  # a damaged file shows as one of many kinds
        raise WeightsError(f"{path}: not a readable weights file ({str(error).splitlines()[0][:160]})") from None
    for key in NESTED_UNDER:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    state = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not state:
        raise WeightsError(f"{path}: holds no tensors; expected a state dict")
    return state


def read_metadata(path: Path | str) -> dict[str, Any]:
    """What :func:`save_detector` wrote beside the weights; empty for other files."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("headstart", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError):
        return {}


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], source: str, reinitialise: Sequence[str] = ()
) -> LoadReport:
    """Load what fits into ``module``, and say what became of the rest.

    Args:
        reinitialise: prefixes of keys that keep their random start although the file may have them.

    Raises:
        WeightsError: not a single key matched.
    """
    report = LoadReport(source)
    own = module.state_dict()
    fitting: dict[str, Tensor] = {}
    for key, value in state.items():
        if key not in own:
            report.unexpected.append(key)
        elif key.startswith(tuple(reinitialise)) and reinitialise:
            report.reinitialised.append(key)
        elif value.shape != own[key].shape:
            report.reshaped.append((key, list(value.shape), list(own[key].shape)))
        else:
            fitting[key] = value
    report.matched = list(fitting)
    report.missing = [key for key in own if key not in state]
    if not fitting:
        examples = ", ".join(list(state)[:3])
        raise WeightsError(
            f"{source}: not one of its {len(state)} keys fits the detector (file: {examples}, ...; "
            f"detector: {', '.join(list(own)[:3])}, ...)"
        )
    module.load_state_dict(fitting, strict=False)
    return report


def save_detector(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Weights under the library's own key names, loadable with ``load_state_dict`` and no trace of us."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "headstart": json.dumps(metadata)})


def write_plain_code(run: Path, detector: Detector, loading: str) -> None:
    """``load_in_torchvision.py``: build the detector with the library alone, then ``loading``.

    Nothing is written for a user's own object, whose construction only the user knows.
    """
    code = detector.plain_code()
    if code is not None:
        write_text(run / "load_in_torchvision.py", f"{code}\n{loading}")
