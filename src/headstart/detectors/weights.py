"""Weights in and out: safetensors first, nothing executed, and a load report every time."""

from __future__ import annotations

import json
import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
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
        moved: in words, what was renamed to fit this detector before it was loaded.
        notes: what those who made the weights say of them.
    """

    source: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[tuple[str, list[int], list[int]]] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        for kind, sentences in (("moved", self.moved), ("note", self.notes)):
            for sentence in sentences:
                table.add_row(kind, "", sentence)
        return table


def summarise(keys: Sequence[str], most: int = 6) -> str:
    """``backbone.body (120), backbone.fpn (16), ...``: keys counted by their first two parts."""
    groups: dict[str, int] = {}
    for key in keys:
        group = key if " -> " in key else ".".join(key.split(".")[:2])
        groups[group] = groups.get(group, 0) + 1
    shown = [f"{group} ({count})" if count > 1 else group for group, count in list(groups.items())[:most]]
    return ", ".join(shown) + (f", and {len(groups) - most} more groups" if len(groups) > most else "")


class _StandIn:
    """Takes the place of an object that checkpoints carry beside the weights; accepts any contents, keeps none."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _StandInMapping:
    """The same for classes derived from dict: torch fills plain dictionaries only, so it makes one."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


# Published checkpoints hold their settings, the best score or a log beside the weights. torch's restricted reader
# refuses the whole file for one such object. Under exactly these names it is given a stand-in instead: the class that
# the file names is not imported, nothing of it runs, and its contents are not used. All other names stay refused.
_STAND_INS = {
    _StandIn: (
        "argparse.Namespace",
        "builtins.getattr",  # a method kept in a log, as (class, name); the stand-in looks nothing up
        "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "typing.Any",
    ),
    _StandInMapping: (
        "collections.defaultdict",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "mmcv.utils.config.ConfigDict",
        "mmengine.config.config.ConfigDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "yacs.config.CfgNode",
    ),
}
_reading = threading.Lock()  # torch keeps the list for the whole process: the first reader done would end it for others


def _read_torch(path: Path) -> Any:
    stand_ins: list[Any] = [(stand_in, name) for stand_in, names in _STAND_INS.items() for name in names]
    try:
        with _reading, torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's words before this one advise to switch the protection off
        detail = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        if detail.startswith("Unsupported operand"):  # not even a pickle of the kind that torch writes
            raise WeightsError(f"{path}: not a readable weights file; expected one written by torch.save") from None
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else detail[:160]
        raise WeightsError(
            f"{path}: holds more than tensors, and reading it would execute code from it, which is refused ({reason}). "
            "Save its state_dict() alone, best as .safetensors; docs/checkpoints.md says how, also for DeepMind's files"
        ) from None
    except Exception as error:  # a damaged file shows as one of many kinds
        reason = (str(error).splitlines() or [repr(error)])[0][:160]
        raise WeightsError(f"{path}: not a readable weights file ({reason})") from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}
    except Exception as error:  # not a zip, damaged inside, Python objects, or numbers that torch has no type for
        raise WeightsError(f"{path}: not a readable .npz file of plain arrays ({error})") from None


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.npz`` file, or of a torch file read with ``weights_only=True``.

    A torch file may keep the weights one level down, under one of ``NESTED_UNDER``. Where several networks lie side by
    side (``{"teacher": {...}, "student": {...}}``), all are returned, their keys starting with ``teacher.`` and so on;
    a name like ``online_network_state_dict`` becomes ``online_network.``.

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
    if path.suffix == ".npy":
        raise WeightsError(
            f"{path}: a .npy file has no names for its arrays; where it holds a pickled dictionary, reading it would "
            "execute code from it, which is refused. docs/checkpoints.md says how to convert it to .npz once"
        )
    loaded = _read_npz(path) if path.suffix == ".npz" else _read_torch(path)
    for key in NESTED_UNDER:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    state: dict[str, Tensor] = {}
    for name, value in loaded.items() if isinstance(loaded, Mapping) else ():
        if isinstance(name, str) and isinstance(value, Tensor):
            state[name] = value
        elif isinstance(name, str) and isinstance(value, Mapping):
            network = name.removesuffix("_state_dict")
            state |= {f"{network}.{k}": v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
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
