"""The answer of ``headstart compare``, as its folder holds it: verdict, curve with bands, labels saved, times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headstart.console import short_time
from headstart.errors import DataError, RunError
from headstart.files import read_json
from headstart.tide import MAIN, MEANING
from headstart.verbs.report import figures, words
from headstart.verbs.report.figures import BandLine, Look, Series
from headstart.verbs.report.parts import Key, Looks, Shown
from headstart.verbs.report.runs import Run

FILE = "compare.json"
BEYOND = {0.0: "fewer", math.inf: "more"}  # labels needed outside of the budgets: JSON has no infinity
PICTURES = ("compare.png", "compare.svg")


@dataclass(frozen=True)
class Answered:
    """What the page shows of one comparison."""

    path: Path
    state: str  # "" when it is finished
    sentences: list[str]
    rule: str
    baseline: str
    figure: Shown
    legend: list[Key]
    contrasts: list[dict[str, str]]
    saved: list[dict[str, str]]
    times: list[dict[str, str]]
    costs: list[str]
    advice: str
    command: str
    errors: Shown | None
    error_rows: list[dict[str, Any]]
    others: list[str]  # the starts that are no baseline


def run_folders(paths: Sequence[Path | str]) -> tuple[list[Path], list[tuple[Path, dict[str, Any]]]]:
    """Run folders, those of comparisons in their place; and the comparisons.

    Raises:
        RunError: a comparison has no run yet, or its file is damaged.
    """
    folders: list[Path] = []
    found = []
    for path in map(Path, paths):
        if not (path / FILE).is_file():
            folders.append(path)
            continue
        content = read(path)
        inside = [*content["pretraining"], *(run["path"] for run in content["runs"])]
        if not inside:
            raise RunError(f"{path}: no run of this comparison is finished yet")
        folders += [path / name for name in inside]
        found.append((path, content))
    return folders, found


def read(folder: Path) -> dict[str, Any]:
    """Raises: RunError where it is not what ``compare`` wrote."""
    try:
        content = read_json(folder / FILE, "the answer of headstart compare")
    except DataError as error:
        raise RunError(str(error)) from None
    if not isinstance(content, dict) or content.get("kind") != "compare":
        raise RunError(f'{folder / FILE}: "kind" is not "compare"; expected the answer of headstart compare')
    return content


def answered(path: Path, content: Mapping[str, Any], runs: Sequence[Run], looks: Looks, name: str) -> Answered:
    """``looks``: of the page, which this section keeps to where each start is one of the page's."""
    answer = content["answer"]
    own = _looks(path, content, runs, looks)
    lines = _lines(content, own)
    counts = [band["images"] for band in answer["bands"]]
    smallest, largest = min(counts, default=0), max(counts, default=0)
    described = "; ".join(
        f"{line.label}: " + ", ".join(f"{y:.1f} at {x:g}" for x, y in zip(line.x, line.mean, strict=True))
        for line in lines
    )
    return Answered(
        path=path,
        state="" if content["status"] == "finished" else f"Not finished ({content['status']}): runs are missing.",
        sentences=content["sentences"],
        rule=content["rule"],
        baseline=answer["baseline"],
        figure=Shown(
            figures.ap_bands(lines, f"{name}-bands", f"AP in % against labelled images. {described}"),
            "Mean over seeds, and Student's 95% interval of it. The horizontal axis is logarithmic.",
        ),
        legend=[Key(start, look) for start, look in own.items()],
        contrasts=[_contrast(c) for c in answer["contrasts"]],
        saved=[_saved(s, smallest, largest) for s in answer["saved"]],
        times=[
            {"start": start, "pretraining": time_text(time["pretraining"]), "finetuning": time_text(time["finetuning"])}
            for start, time in content["starts"].items()
        ],
        costs=content.get("costs", []),
        advice=content.get("advice", ""),
        command=content.get("command", ""),
        errors=_errors(content, own, f"{name}-errors"),
        error_rows=_error_rows(content),
        others=[start for start in content["starts"] if start != answer["baseline"]],
    )


def _errors(content: Mapping[str, Any], looks: Mapping[str, Look], name: str) -> Shown | None:
    """Bars of error types, of all runs together, paired or not; nothing where no run says them."""
    series = []
    for start, look in looks.items():
        gains = [run["errors"] for run in content["runs"] if run["start"] == start and run.get("errors")]
        if gains:
            values: dict[float, list[float]] = {
                k: [one[t] for one in gains if one.get(t) is not None] for k, t in enumerate(MAIN)
            }
            series.append(Series(start, look, values))
    if not series:
        return None
    described = "; ".join(
        f"{one.label}: " + ", ".join(f"{MAIN[int(k)]} {100 * np.mean(v):.1f}" for k, v in one.values.items() if v)
        for one in series
    )
    alt = f"Points of AP50 that types of error cost. {described}"
    return Shown(
        figures.error_bars(series, [f"{t}: {MEANING[t]}" for t in MAIN], name, alt),
        "AP50 that each type of error costs, in points: mean over all runs of a start; lines: from the lowest run "
        "to the highest.",
    )


def _error_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a type of error: with the baseline, then of each other start what it is with that, and the difference.

    Where runs are missing, starts have other pairs: then a cell says itself what the baseline has in its pairs.
    """
    rows = []
    for type in MAIN:
        mine = {change["start"]: change for change in content.get("errors", []) if change["type"] == type}
        if not mine:
            continue
        before = next(iter(mine.values()))["before"]
        cells = [
            {
                "before": "" if math.isclose(c["before"], before, abs_tol=1e-9) else words.percent(c["before"]),
                "after": words.percent(c["after"]),
                "difference": words.signed(c["difference"]),
                "range": "" if c["low"] is None else f"{words.signed(c['low'])} to {words.signed(c['high'])}",
                "shown": c["shown"],
                "less": c["difference"] < 0,
            }
            if (c := mine.get(start))
            else None
            for start in content["starts"]
            if start != content["answer"]["baseline"]
        ]
        rows.append({"type": type, "meaning": MEANING[type], "before": words.percent(before), "cells": cells})
    return rows


def draw(folder: Path) -> None:
    """The curve of a comparison as pictures in its folder, for a talk or a README."""
    content = read(folder)
    starts = {start: Look(i, i) for i, start in enumerate(_baseline_first(content))}
    for file in PICTURES:
        figures.save_ap_bands(_lines(content, starts), folder / file)


def _baseline_first(content: Mapping[str, Any]) -> list[str]:
    baseline = content["answer"]["baseline"]
    return sorted(content["starts"], key=lambda start: start != baseline)


def _looks(path: Path, content: Mapping[str, Any], runs: Sequence[Run], looks: Looks) -> dict[str, Look]:
    by_folder = {run.path.resolve(): run for run in runs}
    meant = {
        start: {by_folder[(path / run["path"]).resolve()].key.start for run in content["runs"] if run["start"] == start}
        for start in content["starts"]
    }
    every = [next(iter(of_page)) for of_page in meant.values() if len(of_page) == 1]
    if len(set(every)) == len(meant):
        return {start: looks.looks[one] for start, one in zip(meant, every, strict=True)}
    return {start: Look(i, i) for i, start in enumerate(_baseline_first(content))}


def _lines(content: Mapping[str, Any], looks: Mapping[str, Look]) -> list[BandLine]:
    lines = []
    for start, look in looks.items():
        mine = [band for band in content["answer"]["bands"] if band["start"] == start]
        if mine:
            columns = [[band[key] for band in mine] for key in ("images", "mean", "low", "high")]
            x, *values = (np.array(column, np.float64) for column in columns)  # None becomes NaN
            lines.append(BandLine(start, look, x, *(100 * value for value in values)))
    return lines


def _contrast(c: Mapping[str, Any]) -> dict[str, str]:
    gaps = ", ".join(f"{words.signed(gap['difference'])} ({gap['images']:,})" for gap in c["gaps"])
    return {
        "ours": c["ours"],
        "other": c["other"],
        "difference": words.signed(c["difference"]),
        "range": "–" if c["low"] is None else f"{words.signed(c['low'])} to {words.signed(c['high'])}",
        "gaps": gaps,
        "verdict": {"not shown": "not shown", "worse": "hint"}.get(c["verdict"], "shown"),
        "said": c["verdict"],
        "reason": c["reason"],
    }


def _saved(s: Mapping[str, Any], smallest: int, largest: int) -> dict[str, str]:
    text = lambda count: labels_text(count, smallest, largest)
    return {
        "start": s["start"],
        "images": f"{s['images']:,}",
        "ap": words.percent(s["ap"]),
        "needed": text(s["needed"]) if s["shown"] else "not shown",
        "range": f"{text(s['low'])} to {text(s['high'])}" if s["shown"] else s["reason"],
    }


def labels_text(count: float | str | None, smallest: int, largest: int) -> str:
    """Labelled images that a curve says are needed, or that it ends before ("more") or after ("fewer")."""
    beyond = {"more": f"more than {largest:,}", "fewer": f"fewer than {smallest:,}", None: "–"}
    return beyond[count] if isinstance(count, str) or count is None else f"{count:,.0f}"


def time_text(seconds: float | None) -> str:
    return "–" if seconds is None else short_time(seconds)
