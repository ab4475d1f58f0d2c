"""Recipes: a method with all numbers of one experiment, one small YAML file each.

A recipe has up to four sections: ``detector`` (for pretraining and fine-tuning), ``pretrain``, ``finetune`` and
``linear``; each holds settings as ``--set`` takes them, nested, and ``pretrain.method.name`` the method.
``extends: OTHER`` takes over what another recipe says; values beside it win. A mapping with a ``name`` (a detector, a
method) replaces one of another name whole: the settings of a Mask R-CNN mean nothing to the RetinaNet that is
fine-tuned from it.

Its first lines are comments, one line each::

    # PAPER, TABLE: what
    #   the commands
    # Paper: what the paper got
    # Hardware: what it took
    # Note: what else there is to know (any number of these)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headstart.errors import SettingsError
from headstart.settings import read_yaml

FOLDER = Path(__file__).parent
WITH_DETECTOR = ("pretrain", "finetune")
VERBS = (*WITH_DETECTOR, "linear")
SECTIONS = ("detector", *VERBS)


@dataclass(frozen=True)
class Recipe:
    """A recipe that comes with Headstart, for its readers.

    Attributes:
        paper, what: of its first line, before and after the first comma.
        header: all its first comment lines.
        values: its settings by verb, those of the recipes it extends included.
    """

    name: str
    paper: str
    what: str
    commands: tuple[str, ...]
    result: str
    hardware: str
    notes: tuple[str, ...]
    header: str
    values: Mapping[str, Any]

    def text(self) -> str:
        """The header and all values: a recipe of its own, which extends nothing."""
        values = yaml.safe_dump(dict(self.values), sort_keys=False, default_flow_style=None, width=110)
        return f"{self.header}\n{values}"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(recipe: str | Path | None, verb: str) -> dict[str, Any]:
    """Settings of ``verb`` (one of ``VERBS``) in a recipe, given by name or as a file; {} without one.

    Raises:
        SettingsError: no such recipe, it has other sections than these or none for ``verb``, or it extends itself.
    """
    if recipe is None:
        return {}
    path = _find(recipe, FOLDER, "--recipe")
    section = _resolve(path, ())[verb]
    if not section:
        raise SettingsError(f"{path}: has no section {verb}")
    return section


def method_of(recipe: str | Path) -> str:
    """The method that a recipe pretrains with.

    Raises:
        SettingsError: it names none, or can't be read.
    """
    name = read(recipe, "pretrain").get("method", {}).get("name")
    if name is None:
        raise SettingsError(
            f"--recipe {recipe}: names no method (pretrain.method.name); write headstart pretrain METHOD PHOTOS "
            f"--recipe {recipe}"
        )
    return str(name)


def describe(name: str) -> Recipe:
    """What a recipe's comments say, and its values.

    Raises:
        SettingsError: no such recipe, or a line that every recipe has is missing.
    """
    path = _find(name, FOLDER, "recipe")
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    paper, comma, what = header[0].removeprefix("# ").partition(", ") if header else ("", "", "")
    commands = tuple(line.removeprefix("#   ") for line in header if line.startswith("#   "))
    said: dict[str, list[str]] = {"Paper": [], "Hardware": [], "Note": []}
    for line in header[1:]:
        kind, _, text = line.removeprefix("# ").partition(": ")
        if kind in said:
            said[kind].append(text)
    if not comma or not commands or len(said["Paper"]) != 1 or len(said["Hardware"]) != 1:
        raise SettingsError(
            f'{path}: expected comment lines first: "# PAPER, TABLE: what", "#   " before each command, '
            '"# Paper: result" and "# Hardware: what it took"'
        )
    values = {verb: section for verb, section in _resolve(path, ()).items() if section}
    return Recipe(
        name=path.stem,
        paper=paper,
        what=what,
        commands=commands,
        result=said["Paper"][0],
        hardware=said["Hardware"][0],
        notes=tuple(said["Note"]),
        header="\n".join(header),
        values=values,
    )


def _find(recipe: str | Path, folder: Path, asked: str) -> Path:
    """A file, from here or from ``folder``, or the name of a recipe that comes with Headstart."""
    for path in (Path(recipe), folder / recipe, FOLDER / f"{recipe}.yaml"):
        if path.is_file():
            return path
    raise SettingsError(f"{asked} {recipe}: no such file, nor one of {', '.join(names())}")


def _resolve(path: Path, children: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    """Settings of each verb, with the detector's and what the file extends; {} of a verb that has none."""
    if path.resolve() in children:
        chain = " -> ".join(child.name for child in (*children, path))
        raise SettingsError(f"{path}: extends itself ({chain})")
    content = read_yaml(path)
    unknown = content.keys() - {*SECTIONS, "extends"}
    if unknown:
        raise SettingsError(
            f"{path}: unknown section {', '.join(sorted(map(str, unknown)))}; expected extends, {', '.join(SECTIONS)}"
        )
    for section in SECTIONS:
        if not isinstance(content.get(section) or {}, Mapping):
            raise SettingsError(f"{path}: section {section} is not a mapping of settings")
    extended: dict[str, dict[str, Any]] = {verb: {} for verb in VERBS}
    if (parent := content.get("extends")) is not None:
        if not isinstance(parent, str):
            raise SettingsError(f"{path}: extends: expected the name or file of one recipe, found {parent!r}")
        extended = _resolve(_find(parent, path.parent, f"{path}: extends"), (*children, path.resolve()))
    common = {"detector": content["detector"]} if content.get("detector") else {}
    own = {verb: _over(common if verb in WITH_DETECTOR else {}, content.get(verb) or {}) for verb in VERBS}
    return {verb: _over(extended[verb], own[verb]) for verb in VERBS}


def _over(base: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """``child`` laid over ``base``, at any depth; one of another name replaces it."""
    if "name" in base and base["name"] != child.get("name", base["name"]):
        return copy.deepcopy(dict(child))
    merged = copy.deepcopy(dict(base))
    for key, value in child.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _over(merged[key], value) if both else copy.deepcopy(value)
    return merged
