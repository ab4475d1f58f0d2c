"""The text of ``load_in_torchvision.py``: the same detector, built without Headstart.

A detector is described once, as a :class:`Call` of functions in :mod:`headstart.detectors.builders`; the call makes the
module, and its text is the source of the functions it needs, their imports and the call itself.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

BUILDERS = "headstart.detectors.builders"


@dataclass(frozen=True)
class Call:
    """``function(**arguments)``, arguments may be calls themselves; the rest are literals."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def __call__(self) -> Any:
        made = {name: value() if isinstance(value, Call) else value for name, value in self.arguments.items()}
        return self.function(**made)

    def expression(self, indent: str = "") -> str:
        inner = indent + "    "
        lines = [f"{self.function.__name__}("]
        for name, value in self.arguments.items():
            text = value.expression(inner) if isinstance(value, Call) else repr(value)
            lines.append(f"{inner}{name}={text},")
        return "\n".join([*lines, f"{indent})"])

    def functions(self) -> Iterator[Callable[..., Any]]:
        for value in self.arguments.values():
            if isinstance(value, Call):
                yield from value.functions()
        yield self.function


def plain_code(call: Call) -> str:
    """Python text that binds ``detector`` to what ``call()`` gives, with torch, torchvision and timm alone."""
    wanted: dict[tuple[str, str], None] = {}
    for function in call.functions():
        _collect(function.__module__, function.__name__, wanted)
    imports: dict[str, None] = {}
    bodies = []
    for module, name in wanted:
        source = _source(module)
        bodies.append(source.definitions[name])
        imports |= dict.fromkeys(source.imports[used] for used in source.uses[name] if used in source.imports)
    lines = ["from __future__ import annotations", "", *sorted(imports), ""]
    return "\n".join(lines) + "\n\n" + "\n\n\n".join([*bodies, f"detector = {call.expression()}"]) + "\n"


@dataclass(frozen=True)
class _Source:
    definitions: dict[str, str]  # name -> its text
    uses: dict[str, set[str]]  # name -> names in its text
    imports: dict[str, str]  # name -> the line that imports it
    ours: dict[str, str]  # name -> the builders' module it is imported from


@lru_cache
def _source(module: str) -> _Source:
    file = sys.modules[module].__file__ if module in sys.modules else import_module(module).__file__
    assert file is not None
    with open(file, encoding="utf-8") as stream:
        text = stream.read()
    found = _Source({}, {}, {}, {})
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found.definitions[node.name] = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
            found.uses[node.name] = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - {node.name}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            found.definitions[name] = ast.get_source_segment(text, node) or ""
            found.uses[name] = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            for alias in node.names:
                name = alias.asname or alias.name
                if str(node.module).startswith(BUILDERS):
                    found.ours[name] = str(node.module)
                else:
                    renamed = f" as {alias.asname}" if alias.asname else ""
                    found.imports[name] = f"from {node.module} import {alias.name}{renamed}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                found.imports[name] = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
    return found


def _collect(module: str, name: str, wanted: dict[tuple[str, str], None]) -> None:
    """``name`` after everything it needs."""
    if (module, name) in wanted:
        return
    source = _source(module)
    for used in sorted(source.uses[name]):
        if used in source.definitions:
            _collect(module, used, wanted)
        elif used in source.ours:
            _collect(source.ours[used], used, wanted)
    wanted[(module, name)] = None
