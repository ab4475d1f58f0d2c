"""Writes that can be killed at any moment: to a temporary name first, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headstart.errors import DataError, RunError

TEMPORARY_PREFIX = ".tmp-"
_UMASK = os.umask(0o077)  # it can't be asked for without being set
os.umask(_UMASK)


def temporary_name(path: Path) -> Path:
    """A name beside ``path``, so that renaming it to ``path`` stays on one file system and is atomic."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary name for a file or folder; on success it takes the place of ``path``.

    Nothing is left behind on failure, and the old ``path`` stays as it was.

    Raises:
        RunError: the disk is full or not writable (the message says which path).
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _finish(temporary)
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(
            f"{path}: could not be written ({error.strerror or error}). "
            "What was there before is untouched. Free some space or choose another --out."
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _finish(path: Path) -> None:
    """To the disk, since a rename can get there before the data does, and a power cut would leave an empty file; and
    readable as new files are here: safetensors makes its own readable for nobody else."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        file.chmod(0o666 & ~_UMASK)


def write_text(path: Path | str, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


def read_json(path: Path | str, expected: str = "a JSON object") -> Any:
    """Raises: DataError naming the file, the line and ``expected``."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected {expected}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text ({error}); expected {expected}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg}); expected {expected}"
        ) from None


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process had not finished writing in ``folder``."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
