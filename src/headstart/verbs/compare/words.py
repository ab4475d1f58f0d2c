"""The answer in plain words, and as tables for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from headstart.console import short_time
from headstart.verbs.compare.statistics import FEWER, MIN_SEEDS, MORE, Answer, Contrast, Saved
from headstart.verbs.report.words import percent, plural, signed


def sentences(answer: Answer) -> list[str]:
    """The verdict on each way of starting, the labels it saves, and which is best: each only where it is shown."""
    if not answer.contrasts:
        return ["Nothing can be said yet: no two ways of starting were evaluated with the same labels and seeds."]
    said = []
    for contrast in answer.against_baseline():
        said.append(_verdict(contrast))
        said += _labels(answer, contrast)
    if len({band.start for band in answer.bands}) > 2:
        said.append(
            f"Best: {answer.winner}, which is shown to be better than each of the others."
            if answer.winner is not None
            else "Which way of starting is best is not shown: none is shown to be better than all others."
        )
    return said


def _verdict(c: Contrast) -> str:
    size = f"{signed(c.difference)} points of AP against {c.other}, {_over(c)}{_range(c.low, c.high)}"
    if c.verdict == "not shown":
        return f"It is not shown whether {c.ours} helps: {size}. {c.reason[0].upper()}{c.reason[1:]}."
    said = f"{c.ours} {'helps' if c.verdict == 'better' else 'hurts'}: {size}. {c.reason[0].upper()}{c.reason[1:]}."
    sign = 1 if c.verdict == "better" else -1
    for gap in c.gaps:  # a mean over budgets may hide one where it is the other way
        if sign * gap.difference < 0:
            where = plural(gap.images, "labelled image")
            said += f" But with {where} it is {signed(gap.difference)}{_range(gap.low, gap.high)}."
    return said


def _over(c: Contrast) -> str:
    if len(c.gaps) == 1:
        return f"with {plural(c.gaps[0].images, 'labelled image')}"
    return f"mean over {len(c.gaps)} label budgets"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" (95% interval {signed(low)} to {signed(high)})"


def _labels(answer: Answer, contrast: Contrast) -> list[str]:
    mine = [s for s in answer.saved if s.start == contrast.ours]
    if contrast.verdict != "better" or not mine:
        return []
    shown = [saved for saved in mine if saved.shown]
    if not shown:
        reasons = ", ".join(dict.fromkeys(saved.reason for saved in mine))
        return [f"Labels saved by {contrast.ours}: not shown ({reasons})."]
    largest = max(band.images for band in answer.bands if band.start == answer.baseline)
    smallest = min(band.images for band in answer.bands if band.start == answer.baseline)
    said = [
        f"with {plural(s.images, 'labelled image')} it reaches {percent(s.ap)} AP, for which {answer.baseline} needs "
        f"{labels(s.needed, smallest, largest)} (95% interval {labels(s.low, smallest, largest)} to "
        f"{labels(s.high, smallest, largest)})"
        for s in shown
    ]
    return [f"Labels saved by {contrast.ours}: {'; '.join(said)}."]


def labels(count: float | None, smallest: int, largest: int) -> str:
    """A number of labelled images that was read off a curve, which ends."""
    if count is None:
        return "–"
    if count == MORE:
        return f"more than {largest:,}"
    if count == FEWER:
        return f"fewer than {smallest:,}"
    return f"{count:,.0f}"


def saved_text(saved: Saved, smallest: int, largest: int) -> str:
    if not saved.shown:
        return f"not shown: {saved.reason}"
    low, high = (labels(v, smallest, largest) for v in (saved.low, saved.high))
    return f"{labels(saved.needed, smallest, largest)} ({low} to {high})"


def tables(answer: Answer, times: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """AP by start and budget with its band, verdict and times; then the labels the baseline needs."""
    budgets = sorted({band.images for band in answer.bands})
    table = Table(title="AP, % (± to the end of the 95% band)", title_justify="left", box=None, pad_edge=False)
    table.add_column("start")
    for images in budgets:
        table.add_column(plural(images, "image"), justify="right")
    for column in (f"against {answer.baseline}", "pretraining", "a fine-tuning"):
        table.add_column(column)
    verdicts = {c.ours: f"{c.verdict}, {signed(c.difference)}" for c in answer.against_baseline()}
    bands = {(band.start, band.images): band for band in answer.bands}
    for start, time in times.items():
        cells = []
        for images in budgets:
            band = bands.get((start, images))
            half = "" if band is None or band.high is None else f" ± {percent(band.high - band.mean)}"
            cells.append("–" if band is None else f"{percent(band.mean)}{half}")
        spent = [_time(time["pretraining"]), _time(time["finetuning"])]
        table.add_row(f"[cyan]{start}[/cyan]", *cells, verdicts.get(start, ""), *spent)
    found = [table]
    if answer.saved:
        title = f"Labelled images that {answer.baseline} needs for the same AP (95% interval)"
        saved = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("start", "with", "AP", answer.baseline):
            saved.add_column(column)
        for one in answer.saved:
            text = saved_text(one, budgets[0], budgets[-1])
            saved.add_row(f"[cyan]{one.start}[/cyan]", f"{one.images:,}", percent(one.ap), text)
        found.append(saved)
    return found


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else short_time(seconds)


def warning(starts: Sequence[str], budgets: int, seeds: int, needed: int) -> str | None:
    """That a grid is too small to show anything, said before it runs."""
    if seeds < MIN_SEEDS:
        return f"{plural(seeds, 'seed')}: no verdict; at least {MIN_SEEDS} are needed (--seeds)"
    if seeds * budgets < needed:
        return (
            f"{len(starts)} starts, {plural(budgets, 'label budget')} and {seeds} seeds give {seeds * budgets} pairs "
            f"of runs for each two starts: too few to show anything. It takes {needed}: --seeds "
            f"{-(-needed // budgets)}, or more label budgets"
        )
    return None
