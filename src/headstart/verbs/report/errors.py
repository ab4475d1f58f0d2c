"""What the AP of each way of starting is lost to: bars of TIDE's error types, and the same as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.coco_eval import TITLES
from headstart.tide import MAIN, MEANING, SPECIAL
from headstart.verbs.report import figures, words
from headstart.verbs.report.figures import Series
from headstart.verbs.report.parts import Key, Looks, Shown
from headstart.verbs.report.statistics import Group, spread

CAPTIONS = {
    "main": "AP50 that would be gained without this type of error alone, in points. Bars: mean over seeds; lines: "
    "lowest to highest seed. The gains do not add up, since mending one error may uncover another.",
    "special": "The same for all false detections and for all objects that were not found.",
}


@dataclass(frozen=True)
class ErrorTypes:
    """One label budget, boxes or masks."""

    title: str
    sentences: list[str]
    figures: list[Shown]
    columns: list[Key]
    rows: list[tuple[str, str, list[tuple[str, str]]]]  # type, meaning, points and count of each column


def error_types(groups: Sequence[Group], looks: Looks, name: str) -> list[ErrorTypes]:
    """An entry for each IoU type and label budget with evaluations that hold error types."""
    found: list[ErrorTypes] = []
    for iou_type in TITLES:
        for budget in dict.fromkeys(group.key.budget for group in groups):
            mine = [group for group in groups if group.key.budget == budget and _values(group, iou_type, "Miss")]
            if mine:
                found.append(_one(mine, looks, iou_type, f"{name}-errors{len(found)}"))
    return found


def _one(groups: Sequence[Group], looks: Looks, iou_type: str, name: str) -> ErrorTypes:
    labels = [looks.labels[group.key.start] for group in groups]
    shown = []
    for part, types in (("main", MAIN), ("special", SPECIAL)):
        bars = [
            Series(label, looks.looks[group.key.start], {k: _values(group, iou_type, t) for k, t in enumerate(types)})
            for label, group in zip(labels, groups, strict=True)
        ]
        described = "; ".join(
            f"{bar.label}: " + ", ".join(f"{t} {words.percent(_mean(bar.values[k]))}" for k, t in enumerate(types))
            for bar in bars
        )
        alt = f"Points of AP50 that types of error cost. {described}"
        svg = figures.error_bars(bars, [f"{t}: {MEANING[t]}" for t in types], f"{name}-{part}", alt)
        shown.append(Shown(svg, CAPTIONS[part]))
    rows = [
        (t, MEANING[t], [(_cell(_values(g, iou_type, t)), _count(g, iou_type, t)) for g in groups])
        for t in (*MAIN, *SPECIAL)
    ]
    return ErrorTypes(
        title=f"{TITLES[iou_type]}, {words.budget_title(groups[0].key, groups[0].labelled_images)}",
        sentences=[_sentence(label, group, iou_type) for label, group in zip(labels, groups, strict=True)],
        figures=shown,
        columns=[Key(label, looks.looks[g.key.start]) for label, g in zip(labels, groups, strict=True)],
        rows=rows,
    )


def _values(group: Group, iou_type: str, error: str) -> list[float]:
    """Gains in 0..1, in the order of the runs."""
    gains = (e.errors[iou_type].gains.get(error) for e in group.evaluations if iou_type in e.errors)
    return [gain for gain in gains if gain is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _cell(values: Sequence[float]) -> str:
    found = spread(values)
    if found is None:
        return "–"
    return words.percent(found.mean) + ("" if found.std is None else f" ± {words.percent(found.std)}")


def _count(group: Group, iou_type: str, error: str) -> str:
    counts = [e.errors[iou_type].counts.get(error, 0) for e in group.evaluations if iou_type in e.errors]
    return f"{round(statistics.fmean(counts)):,}" if counts else "–"


def _sentence(label: str, group: Group, iou_type: str) -> str:
    ranked = sorted(((_mean(_values(group, iou_type, t)) or 0.0, t) for t in MAIN), reverse=True)
    costly = [f"{t} ({MEANING[t]}), {words.percent(gain)} points" for gain, t in ranked[:2] if gain > 0]
    if not costly:
        return f"{label}: no single type of error costs AP50."
    return f"{label}: most AP50 is lost to {', then to '.join(costly)}."
