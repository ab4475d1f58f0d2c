"""What several sections of the page are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headstart.datasets.shards import Member
from headstart.verbs.report import pictures
from headstart.verbs.report.figures import Look
from headstart.verbs.report.runs import Run, Start, start_labels, start_names


@dataclass(frozen=True)
class Note:
    """Something missing, and the command that makes it."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Shown:
    """A figure with its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Key:
    """A line of a legend."""

    label: str
    look: Look


class Pictures:
    """Every photo of the page once, whatever shows it."""

    def __init__(self) -> None:
        self.by_path: dict[Path | Member, pictures.Thumbnail] = {}

    def get(self, path: Path | Member, width: int) -> pictures.Thumbnail:
        """Raises: ImageError."""
        key = path.resolve() if isinstance(path, Path) else path
        if key not in self.by_path:
            self.by_path[key] = pictures.thumbnail(path, f"photo{len(self.by_path)}", width)
        return self.by_path[key]


class Looks:
    """Names and looks of all ways of starting in the report, equal in every section."""

    def __init__(self, runs: Sequence[Run]) -> None:
        starts = {run.key.start for run in runs if run.kind == "finetune"}
        self.starts: list[Start] = sorted(starts, key=lambda start: start.order)
        self.names = start_names(self.starts)
        self.labels = start_labels(self.starts)
        # The first pretrained start is the line people look for: it is the solid one.
        solid = next((i for i, start in enumerate(self.starts) if start.method != "scratch"), 0)
        order = sorted(range(len(self.starts)), key=lambda i: (i != solid, i))
        self.looks = {start: Look(i, order.index(i)) for i, start in enumerate(self.starts)}

    def keys(self, starts: Iterable[Start]) -> list[Key]:
        wanted = set(starts)
        return [Key(self.labels[s], self.looks[s]) for s in self.starts if s in wanted]
