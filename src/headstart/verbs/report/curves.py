"""Losses by step, and what pretraining is watched by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.console import short_time
from headstart.verbs.report import figures, words
from headstart.verbs.report.figures import Curve, Look
from headstart.verbs.report.parts import Key, Looks, Note, Shown
from headstart.verbs.report.runs import Run, method_title


@dataclass
class Pretraining:
    run: Run
    title: str
    figures: list[Shown]
    notes: list[Note]


def pretraining(runs: Sequence[Run]) -> list[Pretraining]:
    return [_pretraining(run, f"pre{i}") for i, run in enumerate(r for r in runs if r.kind == "pretrain")]


def _pretraining(run: Run, name: str) -> Pretraining:
    facts = [method_title(run.method)]
    if run.steps:
        facts.append(words.plural(run.steps, "step"))
    if run.data.get("n_images"):
        facts.append(words.plural(int(run.data["n_images"]), "image"))
    if run.seconds:
        facts.append(short_time(run.seconds))
    section = Pretraining(run, f"{run.name}: {', '.join(facts)}", [], [])
    if not run.log:
        section.notes.append(Note("Nothing was logged yet (log.jsonl is missing or empty).", run.resume_command))
        return section

    steps = np.array([entry["step"] for entry in run.log], np.float64)
    terms = list(dict.fromkeys(term for entry in run.log for term in entry.get("terms") or {}))
    lines = [Curve("loss", Look(1), steps, _column(run.log, "loss")[None])]
    if len(terms) > 1:
        lines += [
            Curve(term, Look(2 + i), steps, _column(run.log, "terms", term)[None]) for i, term in enumerate(terms)
        ]
    first, last = float(lines[0].values[0, 0]), float(lines[0].values[0, -1])
    section.figures.append(
        Shown(
            figures.curves(
                lines,
                f"{name}-loss",
                f"Pretraining loss of {run.name} against steps, from {first:.3g} to {last:.3g}.",
                title="Pretraining loss",
                ylabel="loss",
                legend=len(lines) > 1,
            ),
            _smoothing(len(steps)) + (f" Its only term is {terms[0]}." if len(terms) == 1 else ""),
        )
    )
    deviation = _column(run.log, "watch", "embedding_std")
    if np.isfinite(deviation).any():
        known = np.isfinite(deviation)
        section.figures.append(
            Shown(
                figures.curves(
                    [Curve("spread", Look(1), steps[known], deviation[known][None])],
                    f"{name}-spread",
                    f"Spread of the embeddings against steps, last {deviation[known][-1]:.3g}.",
                    title="Spread of the embeddings",
                    ylabel="spread (1 is even)",
                    zero=True,
                ),
                "How far the normalised embeddings are apart: 1 when spread evenly, 0 when all are one. "
                "Falling to zero is collapse: every box looks the same to the network.",
            )
        )
    shares = [entry.get("watch", {}).get("level_share") for entry in run.log]
    width = max((len(share) for share in shares if share), default=0)
    usable = [i for i, share in enumerate(shares) if share and len(share) == width]
    if width > 1 and len(usable) > 1:
        matrix = np.array([shares[i] for i in usable], np.float64)
        labels = [f"P{2 + level}" for level in range(width)]
        described = ", ".join(f"{label} {100 * s:.0f} %" for label, s in zip(labels, matrix[-1], strict=True))
        section.figures.append(
            Shown(
                figures.level_shares(
                    steps[usable],
                    matrix,
                    labels,
                    f"{name}-levels",
                    f"Boxes by pyramid level; last: {described}.",
                ),
                "Where the boxes are read from the pyramid. A level without boxes is not trained.",
            )
        )
    if len(section.figures) == 1:
        section.notes.append(Note("The log has no collapse watch (embedding spread, share of boxes a level)."))
    return section


def finetuning(runs: Sequence[Run], looks: Looks) -> tuple[list[Shown], list[Key]]:
    """Loss by step, and AP where it was measured on the way; a figure a label budget, a line a way of starting."""
    shown = []
    mine = [run for run in runs if run.kind == "finetune" and run.log]
    sized = sorted(mine, key=lambda run: (run.labelled_images is None, run.labelled_images or 0))
    for i, budget in enumerate(dict.fromkeys(run.key.budget for run in sized)):
        here = [run for run in sized if run.key.budget == budget]
        lines = []
        for start in looks.starts:
            members = [run for run in here if run.key.start == start]
            if members:
                logs = [run.log for run in members]
                lines.append(_aligned(logs, ("loss",), looks.labels[start], looks.looks[start]))
        points = max(len(line.steps) for line in lines)
        title = words.budget_title(here[0].key, here[0].labelled_images)
        shown.append(
            Shown(
                figures.curves(
                    lines,
                    f"fine{i}",
                    f"Fine-tuning loss with {title}. Last values: "
                    + "; ".join(f"{line.label} {_last(line):.3g}" for line in lines),
                    title=title[0].upper() + title[1:],
                    ylabel="training loss",
                ),
                f"Mean over {words.plural(max(len(line.values) for line in lines), 'seed')}; band: lowest "
                "to highest "
                f"seed. {_smoothing(points)}",
            )
        )
        shown += _validated(here, looks, f"valid{i}", title)
    return shown, looks.keys(run.key.start for run in mine)


def _validated(runs: Sequence[Run], looks: Looks, name: str, title: str) -> list[Shown]:
    """AP by step of the runs of one label budget that were evaluated on the way, if there are any."""
    lines = []
    for start in looks.starts:
        logs = [run.validations for run in runs if run.key.start == start and run.validations]
        if logs:
            lines.append(_aligned(logs, ("validation", "AP"), looks.labels[start], looks.looks[start], 100.0))
    if not lines:
        return []
    figure = figures.curves(
        lines,
        name,
        f"AP on the validation images with {title}, in percent. Best values: "
        + "; ".join(f"{line.label} {np.nanmax(line.values, initial=0):.3g}" for line in lines),
        title=title[0].upper() + title[1:],
        ylabel="validation AP, %",
        zero=True,
    )
    return [Shown(figure, "AP on the validation images while training; the best weights are those that are kept.")]


def _smoothing(points: int) -> str:
    window = figures.smoothing_window(points)
    return f"Moving mean over {window} logged steps." if window > 1 else ""


def _aligned(
    logs: Sequence[Sequence[dict[str, Any]]], keys: Sequence[str], label: str, look: Look, scale: float = 1.0
) -> Curve:
    """What ``keys`` lead to in the lines of several runs' logs, times ``scale``."""
    steps = np.array(sorted({entry["step"] for log in logs for entry in log}), np.float64)
    values = np.full((len(logs), len(steps)), np.nan)
    for row, log in enumerate(logs):
        places = np.searchsorted(steps, [entry["step"] for entry in log])
        values[row, places] = scale * _column(log, *keys)
    return Curve(label, look, steps, values)


def _last(line: Curve) -> float:
    known = np.isfinite(line.values).any(axis=0)
    return float(np.nanmean(line.values[:, known][:, -1])) if known.any() else float("nan")


def _column(log: Sequence[dict[str, Any]], *keys: str) -> np.ndarray:
    """(steps,) float64; NaN where a step did not log it."""
    column = np.full(len(log), np.nan)
    for i, entry in enumerate(log):
        value: Any = entry
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            column[i] = value
    column[~np.isfinite(column)] = np.nan
    return column
