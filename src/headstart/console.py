"""What a person sees while waiting: one console, one kind of progress bar.

On a terminal the bar is live. Elsewhere (a file, CI, a cluster's log) the same facts come as plain lines,
at most one every ``PLAIN_INTERVAL_S`` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_INTERVAL_S = 10.0

# Progress and notes go to stderr, results to stdout: `headstart evaluate ... > table.txt` stays clean.
notes = Console(stderr=True, highlight=False)
results = Console(highlight=False)


_shown: list[Progress] = []  # the live display, of which a console has one at a time


class Bar:
    """What :func:`progress` yields. ``advance`` after each unit of work; ``note`` changes the text behind it."""

    def __init__(self, description: str, total: int, unit: str, live: Progress | None) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self.text = ""
        self._live = live
        self._task = live.add_task(description, total=total, note="") if live else None
        self._start = self._last_line = time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        if note is not None:
            self.text = note
        if self._live is not None and self._task is not None:
            self._live.update(self._task, advance=count, note=self.text)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            self.print_line()

    def remove(self) -> None:
        if self._live is not None and self._task is not None:
            self._live.remove_task(self._task)

    def print_line(self) -> None:
        elapsed = time.monotonic() - self._start
        left = (self.total - self.done) * elapsed / max(self.done, 1)
        rate = self.done / max(elapsed, 1e-9)
        line = f"{self.description} {self.done}/{self.total} {self.unit}  {rate:.1f} {self.unit}/s"
        notes.print(f"{line}  eta {short_time(left)}  {self.text}".rstrip(), markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int, unit: str = "images", show: bool = True) -> Iterator[Bar]:
    """A progress bar with ETA for ``total`` units of work; inside of another's it is shown below that one."""
    if not show or not notes.is_terminal:
        bar = Bar(description, total, unit, live=None)
        if not show:
            bar._last_line = float("inf")
        yield bar
        return
    if _shown:
        bar = Bar(description, total, unit, _shown[0])
        try:
            yield bar
        finally:
            bar.remove()
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=notes, refresh_per_second=4) as live:
        _shown.append(live)
        try:
            yield Bar(description, total, unit, live)
        finally:
            _shown.remove(live)


def short_time(seconds: float) -> str:
    """12s, 3m05s, 2h10m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
