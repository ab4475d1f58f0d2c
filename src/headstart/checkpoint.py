"""Checkpoints: written whole or not at all, resumed exactly, read without executing anything.

step_000500/model.safetensors    parameters and buffers of everything that trains
step_000500/state.pt             optimiser, random states, counters (torch.load with weights_only=True)
latest                           the name of the newest complete one
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headstart.console import notes
from headstart.errors import RunError
from headstart.files import replacing, write_text

FORMAT = 1


@dataclass
class Checkpoint:
    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]


def random_state() -> dict[str, Any]:
    """State of the random number generators of this process that training draws from."""
    version, internal, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict that safetensors takes: contiguous, and shared tensors copied under each of their names."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()}


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    random_states: list[dict[str, Any]],
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``run/step_XXXXXX`` and point ``latest`` at it, then remove all but the newest ``keep``.

    Raises:
        RunError: disk full or not writable; the checkpoints that were there are untouched.
    """
    path = run / f"step_{step:06d}"
    with replacing(path) as temporary:
        temporary.mkdir()
        save_file(plain_state(model), temporary / "model.safetensors", metadata={"format": "pt"})
        state = {
            "format": FORMAT,
            "step": step,
            "optimizer": optimizer.state_dict(),
            "random": random_states,
            **extra,
        }
        torch.save(state, temporary / "state.pt")
    write_text(run / "latest", path.name + "\n")
    for old in _complete(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _complete(run: Path) -> list[Path]:
    """Checkpoint folders, oldest first. Unfinished ones have another name until they are whole."""
    return sorted(p for p in run.glob("step_*") if (p / "state.pt").is_file())


def load_latest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, or None where there is none.

    Raises:
        RunError: there are checkpoints, and not one is readable.
    """
    folders = _complete(run)[::-1]
    problems = []
    for folder in folders:
        try:
            checkpoint = load(folder)
        except RunError as error:
            problems.append(str(error))
            notes.print(f"[yellow]{error}; trying the one before[/yellow]")
        else:
            return checkpoint
    if problems:
        raise RunError(f"{run}: none of its {len(folders)} checkpoints can be read. " + "; ".join(problems))
    return None


def load(folder: Path) -> Checkpoint:
    """Raises: RunError naming the damaged file."""
    try:
        model = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder / 'model.safetensors'}: damaged ({error})") from None
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        reason = str(error).splitlines()[0][:200]
        raise RunError(f"{folder / 'state.pt'}: damaged or not a checkpoint of ours ({reason})") from None
    if state.get("format") != FORMAT:
        raise RunError(f"{folder}: checkpoint format {state.get('format')}, expected {FORMAT}")
    return Checkpoint(state["step"], model, state)


def clear(run: Path) -> None:
    """Remove all checkpoints of a run that nobody will go on with."""
    (run / "latest").unlink(missing_ok=True)
    for folder in run.glob("step_*"):
        shutil.rmtree(folder, ignore_errors=True)


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint's folder, unread."""
    folders = _complete(run)
    return folders[-1] if folders else None
