"""A run is a folder: what was asked, with what, on what, and what came of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import headstart
from headstart import distributed
from headstart.console import notes
from headstart.errors import RunError
from headstart.files import clear_leftovers, read_json, write_json
from headstart.settings import flatten

RECORD = "run.json"
DETECTOR_FILE = "detector.safetensors"
LINEAR = "linear"  # the kind of a run that trains a classifier on a backbone, and no detector
# Settings that change how a run goes, not what it computes; they may differ when a run is resumed.
FREE_ON_RESUME = {
    "train.workers",
    "train.device",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_unreadable",
}


class Run:
    """A run folder being written."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.record = record

    @classmethod
    def start(cls, path: Path | str, record: Mapping[str, Any], resume: bool) -> Run:
        """:meth:`open` by the first process; the others go on when the folder is there."""
        run = cls.open(path, record, resume) if distributed.is_main() else cls(Path(path), dict(record))
        distributed.barrier()
        return run

    @classmethod
    def open(cls, path: Path | str, record: Mapping[str, Any], resume: bool) -> Run:
        """Create the folder, or take up the one that is there.

        Raises:
            RunError: it exists and ``resume`` is off; it is not a run; or it was started with other settings.
        """
        path = Path(path)
        if path.is_file():
            raise RunError(f"{path}: is a file; --out expects a folder to create")
        existing = path / RECORD
        if existing.is_file():
            before = read_record(path)
            if not resume:
                state = before.get("status", "unknown")
                raise RunError(
                    f"{path}: holds a {before.get('kind', '')} run already (status: {state}). "
                    "Continue it with --resume, or choose another --out"
                )
            _same_configuration(path, before, record)
            clear_leftovers(path)
            run = cls(path, {**before, "config": record["config"]})
        else:
            if path.is_dir() and any(path.iterdir()):
                raise RunError(f"{path}: is not empty and not a run; choose another --out")
            if resume:
                notes.print(f"{path}: nothing to resume yet; starting from the beginning")
            run = cls(path, {**base_record(path.name), **record})
        run.write(status="running")
        return run

    def write(self, **changes: Any) -> None:
        self.record |= changes
        write_json(self.path / RECORD, self.record)


def base_record(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "headstart": headstart.__version__,
        "versions": versions(),
        "git": git_revision(),
        "hardware": hardware(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def read_record(path: Path | str) -> dict[str, Any]:
    """Raises: RunError where ``path`` is not a run folder."""
    path = Path(path)
    if not (path / RECORD).is_file():
        raise RunError(f"{path}: not a run folder (no {RECORD} in it)")
    record = read_json(path / RECORD, "the record of a run")
    if not isinstance(record, dict) or "kind" not in record or "config" not in record:
        raise RunError(f"{path / RECORD}: not the record of a run (no 'kind' and 'config' in it)")
    return record


def read_detector_record(path: Path | str) -> dict[str, Any]:
    """:func:`read_record` of a run whose result is a detector.

    Raises:
        RunError: ``path`` is not a run folder, or its run made none.
    """
    record = read_record(path)
    if record["kind"] == LINEAR:
        begun = record.get("start", {}).get("from", "its start")
        raise RunError(
            f"{path}: is a linear evaluation, whose classifier of whole images is no detector; expected a pretrained "
            f"or fine-tuned run, such as what it began with: {begun}"
        )
    return record


def _same_configuration(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if before.get("kind") != now["kind"]:
        raise RunError(f"{path}: is a {before.get('kind')} run, not a {now['kind']} run; choose another --out")
    old = flatten({"config": before["config"], "data": before.get("data", {})})
    new = flatten({"config": now["config"], "data": now.get("data", {})})
    different = [
        f"{key.removeprefix('config.')}: was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key.removeprefix("config.") not in FREE_ON_RESUME and _plain(old.get(key)) != _plain(new.get(key))
    ]
    if different:
        raise RunError(
            f"{path}: was started with other settings, so it can't be resumed with these: "
            + "; ".join(different[:6])
            + (f"; and {len(different) - 6} more" if len(different) > 6 else "")
            + ". Repeat the first command, or choose another --out"
        )


def _plain(value: Any) -> Any:
    """What ``value`` is after a trip through JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def versions() -> dict[str, str]:
    names = [
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "scipy",
        "scikit-learn",
        "pillow",
        "opencv-contrib-python-headless",
    ]
    found = {"python": platform.python_version()}
    for name in [*names, "pyarrow", "faster-coco-eval"]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Revision of the code in the working folder, marked "+" when changed; None outside of git."""
    try:
        revision = _git("rev-parse", "HEAD")
        return revision + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": usable_cores(), "gpus": gpus, "system": platform.platform()}


def usable_cores() -> int:
    """Cores this process may use: fewer than the machine has, in a container or a cluster's job."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def fingerprint(names: Sequence[str], sizes: Sequence[int]) -> str:
    """Short hash of which images a run saw: their names and sizes in bytes or pixels."""
    import hashlib

    digest = hashlib.sha256()
    for name, size in zip(names, sizes, strict=True):
        digest.update(f"{name}\0{size}\n".encode())
    return digest.hexdigest()[:16]
