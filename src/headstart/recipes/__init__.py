"""Recipes: a method with all numbers of one experiment, one small YAML file each.

A recipe has up to three sections: ``detector`` (for both verbs), ``pretrain`` and ``finetune``; each holds settings
as ``--set`` takes them, nested. Its first comment lines are the command, what the paper got, what it took.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.errors import SettingsError
from headstart.settings import read_yaml

FOLDER = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(recipe: str | Path | None, verb: str) -> dict[str, Any]:
    """Settings of ``verb`` ("pretrain" or "finetune") in a recipe, given by name or as a file; {} without one.

    Raises:
        SettingsError: no such recipe, or it has other sections than these.
    """
    if recipe is None:
        return {}
    path = Path(recipe)
    if not path.is_file():
        path = FOLDER / f"{recipe}.yaml"
    if not path.is_file():
        raise SettingsError(f"--recipe {recipe}: no such file, nor one of {', '.join(names())}")
    content = read_yaml(path)
    unknown = content.keys() - {"detector", "pretrain", "finetune"}
    if unknown:
        raise SettingsError(
            f"{path}: unknown section {', '.join(sorted(unknown))}; expected detector, pretrain, finetune"
        )
    if verb not in content and "detector" not in content:
        raise SettingsError(f"{path}: has no section {verb}")
    section = dict(content.get(verb) or {})
    detector = {**(content.get("detector") or {}), **(section.get("detector") or {})}
    if not isinstance(section, Mapping):
        raise SettingsError(f"{path}: section {verb} is not a mapping")
    if detector:
        section["detector"] = detector
    return section
