"""The answer in plain words, and as tables for the console."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from headstart.tide import MAIN, MEANING
from headstart.verbs.compare.errors import Change
from headstart.verbs.compare.statistics import GAIN, MIN_SEEDS, POWER, Answer, Contrast, Outlook, Saved
from headstart.verbs.report.comparison import BEYOND, labels_text, time_text
from headstart.verbs.report.words import percent, plural, signed


def sentences(answer: Answer, changes: Sequence[Change] = (), done: int = 0, planned: int = 0) -> list[str]:
    """Which way of starting is best, the verdict on each, the labels it saves, and what changes in the errors: each
    only where it is shown, and nothing before ``done`` are all the ``planned`` runs."""
    if not answer.final:
        return [
            f"No verdict yet: {done} of {plural(planned, 'fine-tuning run')} are evaluated. One that is read on the "
            "way would be right less often than it says. The same command goes on."
        ]
    if not answer.contrasts:
        return ["Nothing can be said yet: no two ways of starting were evaluated with the same labels and seeds."]
    said = []
    for contrast in answer.against_baseline():
        said.append(_verdict(contrast))
        said += _labels(answer, contrast)
    if len({band.start for band in answer.bands}) > 2:
        if answer.winner is not None:
            said.insert(0, f"Best: {answer.winner}, which is shown to be better than each of the others.")
        else:
            said.append("Which way of starting is best is not shown: none is shown to be better than all others.")
    return said + _errors(changes)


def _errors(changes: Sequence[Change]) -> list[str]:
    said = []
    for start in dict.fromkeys(change.start for change in changes):
        shown = [change for change in changes if change.start == start and change.shown]
        parts = [
            f"{c.type} ({MEANING[c.type]}) {percent(c.before)} → {percent(c.after)}{_range(c.low, c.high)}"
            for c in sorted(shown, key=lambda c: -abs(c.difference))
        ]
        if parts:
            said.append(f"Points of AP50 lost to types of error, before and with {start}: {'; '.join(parts)}.")
        elif any(change.luck is not None for change in changes):
            said.append(f"That {start} changes any one type of error is not shown.")
    return said


def advice(answer: Answer, pretraining: Mapping[str, float | None]) -> tuple[str, str | None]:
    """What to do now, and the start to go on from; nothing inside the noise is advised as if it were shown.

    Args:
        pretraining: seconds that each start took to make; None where it was there.
    """
    against = answer.against_baseline()
    if not answer.final:
        return "", None
    if not against or all(c.luck is None for c in against):
        return f"What to do: run it with at least {MIN_SEEDS} seeds (--seeds); fewer allow no verdict.", None
    helping = [c.ours for c in against if c.verdict == "better"]
    if helping:
        best = answer.winner or min(helping, key=lambda start: pretraining.get(start) or 0.0)
        if answer.winner is None and len(helping) > 1:
            why = f"{_and(helping)} are shown to help, not which of them is better; {best} takes the least pretraining"
        else:
            why = "it is shown to be best" if answer.winner is not None and len(against) > 1 else "it is shown to help"
        return f"What to do: go on from {best}: {why}.", best
    possible = [o for o in answer.outlooks if o.most is None or o.most >= GAIN]
    if not possible:
        none = f"no other is worth {100 * GAIN:.0f} point of AP, as far as 95% certainty goes"
        return f"What to do: go on from {answer.baseline}, and save what the others cost: {none}.", answer.baseline
    return f"What to do: nothing here is shown to beat {answer.baseline}. {' '.join(map(_outlook, possible))}", None


def _outlook(outlook: Outlook) -> str:
    if outlook.most is None:
        return f"Of {outlook.start} there are too few seeds."
    said = f"{outlook.start} may still be worth up to {signed(outlook.most)} points; to show a gain of "
    said += f"{100 * GAIN:.0f} point, if there is one, takes "
    if outlook.seeds is None:
        return said + "more seeds than are worth it, with the scatter seen here."
    odds = f"{POWER:.0%} of the time, a rough estimate"
    return f"{said}about {outlook.seeds} seeds (--seeds {outlook.seeds}; {odds}), which is then a second look."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def costs(times: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What pretraining cost beside fine-tuning, and all of it together."""
    runs = sum(time["runs"] for time in times.values())
    spent = sum(time["runs"] * (time["finetuning"] or 0.0) for time in times.values())
    if not runs or not spent:
        return []
    one = spent / runs
    said = [
        f"Pretraining {start} took {time_text(time['pretraining'])}, as long as {time['pretraining'] / one:.1f} "
        "fine-tuning runs"
        + (f", and showed it {plural(time['images_seen'], 'image')}" if time["images_seen"] else "")
        + "."
        for start, time in times.items()
        if time["pretraining"]
    ]
    return [
        *said,
        f"{plural(runs, 'fine-tuning run')} took {time_text(spent)}, {time_text(one)} each in the mean. Evaluation and "
        "the search for boxes are not counted.",
    ]


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
    return labels_text(BEYOND.get(count, count) if count is not None else None, smallest, largest)


def saved_text(saved: Saved, smallest: int, largest: int) -> str:
    if not saved.shown:
        return f"not shown: {saved.reason}"
    low, high = (labels(v, smallest, largest) for v in (saved.low, saved.high))
    return f"{labels(saved.needed, smallest, largest)} ({low} to {high})"


def tables(answer: Answer, times: Mapping[str, Mapping[str, Any]], changes: Sequence[Change] = ()) -> list[Table]:
    """AP by start and budget with its band, verdict and times; the labels the baseline needs; the types of error."""
    budgets = sorted({band.images for band in answer.bands})
    table = Table(title="AP, % (± to the end of the 95% band)", title_justify="left", box=None, pad_edge=False)
    table.add_column("start")
    for images in budgets:
        table.add_column(plural(images, "image"), justify="right")
    for column in (f"against {escape(answer.baseline)}", "pretraining", "a fine-tuning"):
        table.add_column(column)
    verdicts = {c.ours: f"{c.verdict}, {signed(c.difference)}" for c in answer.against_baseline()}
    bands = {(band.start, band.images): band for band in answer.bands}
    for start, time in times.items():
        cells = []
        for images in budgets:
            band = bands.get((start, images))
            half = "" if band is None or band.high is None else f" ± {percent(band.high - band.mean)}"
            cells.append("–" if band is None else f"{percent(band.mean)}{half}")
        spent = [time_text(time["pretraining"]), time_text(time["finetuning"])]
        table.add_row(_start(start), *cells, verdicts.get(start, ""), *spent)
    found = [table]
    if answer.saved:
        title = f"Labelled images that {escape(answer.baseline)} needs for the same AP (95% interval)"
        saved = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("start", "with", "AP", escape(answer.baseline)):
            saved.add_column(column)
        for one in answer.saved:
            text = saved_text(one, budgets[0], budgets[-1])
            saved.add_row(_start(one.start), f"{one.images:,}", percent(one.ap), text)
        found.append(saved)
    if changes:
        found.append(_error_table(answer, changes))
    return found


def _start(name: str) -> str:
    """A cell; files and folders may have brackets in their names."""
    return f"[cyan]{escape(name)}[/cyan]"


def _error_table(answer: Answer, changes: Sequence[Change]) -> Table:
    title = "Points of AP50 lost to each type of error, mean over label budgets (* a change that is shown)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("start")
    types = [type for type in MAIN if any(change.type == type for change in changes)]
    for type in types:
        table.add_column(type, justify="right")
    starts = dict.fromkeys(change.start for change in changes)
    by_type = {(change.start, change.type): change for change in changes}
    first = {type: next(change for change in changes if change.type == type) for type in types}
    table.add_row(_start(answer.baseline), *(percent(first[type].before) for type in types))
    for start in starts:
        cells = []
        for type in types:
            change = by_type.get((start, type))
            if change is None:
                cells.append("–")
                continue
            other = not math.isclose(change.before, first[type].before, abs_tol=1e-9)  # pairs, where runs are missing
            before = f"{percent(change.before)} → " if other else ""
            cells.append(f"{before}{percent(change.after)}{'*' if change.shown else ''}")
        table.add_row(_start(start), *cells)
    return table


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
