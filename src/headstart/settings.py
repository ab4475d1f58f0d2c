"""Settings: pydantic models with a description and a unit each, and ``--set key=value`` on top of them."""

from __future__ import annotations

import contextlib
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from headstart.errors import SettingsError


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


S = TypeVar("S", bound=BaseModel)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted key, field)`` of every setting below ``model``."""
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _model_in(annotation: Any) -> type[BaseModel] | None:
    candidates = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def full_key(model: type[BaseModel], key: str) -> str:
    """The dotted key that ``key`` means: itself, or the one setting whose last part it is.

    Raises:
        SettingsError: no such setting (near names are given), or several have that last part.
    """
    known = [name for name, _ in leaves(model)]
    if key in known:
        return key
    matches = [name for name in known if name.endswith(f".{key}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SettingsError(f"--set {key}: could mean {' or '.join(matches)}; write one of them in full")
    short = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, [*known, *short], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise SettingsError(f"--set {key}: no such setting{hint} Known: {', '.join(known)}")


def parse_assignments(model: type[BaseModel], assignments: Sequence[str]) -> dict[str, Any]:
    """``["K=8", "optim.lr=0.1"]`` -> ``{"method.K": 8, "optim.lr": 0.1}``; values are read as YAML."""
    parsed: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise SettingsError(f"--set {assignment}: expected key=value, for example --set optim.lr=0.01")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {assignment}: the value can't be read ({error})") from None
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 (no dot) as text; people mean a number.
            with contextlib.suppress(ValueError):
                value = float(value)
        parsed[full_key(model, key.strip())] = value
    return parsed


def merge(base: Mapping[str, Any], dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Lay ``dotted`` keys over the nested mapping ``base``; returns a new nested dictionary."""
    merged: dict[str, Any] = {k: merge(v, {}) if isinstance(v, Mapping) else v for k, v in base.items()}
    for key, value in dotted.items():
        *parents, last = key.split(".")
        place = merged
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return merged


def flatten(nested: Mapping[str, Any], prefix: str = "", model: type[BaseModel] | None = None) -> dict[str, Any]:
    """The inverse of :func:`merge` on an empty base: nested mappings to dotted keys.

    A mapping that is itself the value of one of ``model``'s settings stays whole.
    """
    whole = {name for name, _ in leaves(model)} if model is not None else set()
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in whole:
            flat |= flatten(value, f"{key}.", model)
        else:
            flat[key] = value
    return flat


def validate(model: type[S], values: Mapping[str, Any], source: str = "settings") -> S:
    """Raises: SettingsError with one line for each bad value, instead of pydantic's own text."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                known = ", ".join(name for name, _ in leaves(model))
                lines.append(f"{place}: no such setting. Known: {known}")
            elif problem["type"] == "value_error" and isinstance(problem["input"], Mapping):
                # Settings that do not go together: the message has them, and the input is all there are.
                said = problem["msg"].removeprefix("Value error, ")
                lines.append(f"{place}: {said}" if place else said)
            else:
                lines.append(f"{place}: {problem['msg']} (got {problem['input']!r})")
        raise SettingsError(f"{source}: " + "; ".join(lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises: SettingsError naming the file and the line."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML ({error})") from None
    if not isinstance(loaded, dict):
        raise SettingsError(f"{path}: expected a mapping of settings, found {type(loaded).__name__}")
    return loaded
