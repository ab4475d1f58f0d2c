"""What the template shows, section by section, and what to do about the parts that are missing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headstart.coco_eval import SUITES
from headstart.console import short_time
from headstart.verbs.report import figures, statistics, words
from headstart.verbs.report.centres import Section as CentresSection
from headstart.verbs.report.centres import centres
from headstart.verbs.report.detections import read_kept
from headstart.verbs.report.errors import ErrorTypes, error_types
from headstart.verbs.report.figures import Look, Series
from headstart.verbs.report.gallery import Gallery, gallery
from headstart.verbs.report.parts import Key, Looks, Note, Pictures, Shown
from headstart.verbs.report.runs import Evaluation, Run, Start, method_title
from headstart.verbs.report.statistics import Comparison, Group


@dataclass(frozen=True)
class Cell:
    """Mean and spread of one metric over the seeds of a group, as text."""

    mean: str
    std: str
    range: str


@dataclass(frozen=True)
class Row:
    name: str
    pretraining: str
    finetuning: str
    look: Look
    budget: str
    n: int
    cells: list[Cell]
    dots: list[float]  # AP of each seed as a share of the strip's width
    mean: float | None


@dataclass(frozen=True)
class Versus:
    ours: str
    other: str
    budget: str
    difference: str
    paired: str
    verdict: str
    reason: str


@dataclass
class ClassTable:
    title: str
    columns: list[Key]
    rows: list[tuple[str, list[str]]]
    collapsed: bool


@dataclass
class Results:
    """All runs evaluated on one data set, by one suite of metrics."""

    data: str
    images: int
    suite: str
    columns: list[str]
    rows: list[Row]
    axis: tuple[str, str]
    findings: list[str]
    doubts: list[str]
    versus: list[Versus]
    figure: Shown
    legend: list[Key]
    errors: list[ErrorTypes]
    class_tables: list[ClassTable]
    gallery: Gallery
    centres: CentresSection


@dataclass
class Setting:
    key: str
    values: list[tuple[str, str]]  # value, the runs that have it ("" when all do)

    @property
    def differs(self) -> bool:
        return len(self.values) > 1


def results(runs: Sequence[Run], looks: Looks, photos: Pictures, images: int, threshold: float) -> list[Results]:
    """One entry for each data set and suite of metrics that runs were evaluated by, the one with most runs first.

    Evaluations whatever the class (proposals) say nothing of a detector that knows classes, and are left out.
    """
    by_data: dict[tuple[str, int, str], list[tuple[Run, Evaluation]]] = {}
    for run in runs:
        if run.kind != "finetune":
            continue
        seen = set()
        for evaluation in (e for e in run.evaluations if e.suite != "proposals"):
            where = Path(evaluation.data)
            key = (str(where.resolve()) if where.exists() else evaluation.data, evaluation.images, evaluation.suite)
            if key not in seen:  # finetune's own evaluation and a later one of the same data are one result
                seen.add(key)
                by_data.setdefault(key, []).append((run, evaluation))
    found = sorted(by_data.values(), key=len, reverse=True)
    return [_results(pairs, looks, photos, images, threshold, f"data{i}") for i, pairs in enumerate(found)]


def _results(
    pairs: Sequence[tuple[Run, Evaluation]],
    looks: Looks,
    photos: Pictures,
    images: int,
    threshold: float,
    name: str,
) -> Results:
    groups = statistics.group_runs(pairs)
    found = statistics.comparisons(groups)
    metrics = [("AP", "bbox"), ("AP50", "bbox"), ("AP75", "bbox")]
    if any("segm" in evaluation.metrics for _, evaluation in pairs):
        metrics.append(("AP", "segm"))
    values = [value for group in groups for value in group.values("AP")]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    pad = max(0.06 * (high - low), 0.002)
    low, high = max(low - pad, 0.0), high + pad
    place = lambda value: round((value - low) / (high - low), 4)

    rows = []
    for group in groups:
        ap = group.values("AP")
        rows.append(
            Row(
                name=looks.names[group.key.start],
                pretraining=_steps_text(group.key.start.pretrain_steps),
                finetuning=_steps_text(group.key.start.steps),
                look=looks.looks[group.key.start],
                budget=words.budget_title(group.key, group.labelled_images),
                n=len(group.runs),
                cells=[_cell(group.values(metric, iou_type)) for metric, iou_type in metrics],
                dots=[place(value) for value in ap],
                mean=place(sum(ap) / len(ap)) if ap else None,
            )
        )
    evaluation = pairs[0][1]
    kept = read_kept(groups, looks)
    return Results(
        data=evaluation.data,
        images=evaluation.images,
        suite=SUITES.get(evaluation.suite, evaluation.suite),
        columns=["Mask AP" if iou_type == "segm" else metric for metric, iou_type in metrics],
        rows=rows,
        axis=(words.percent(low), words.percent(high)),
        findings=words.findings(groups, found, looks.names),
        doubts=words.doubts(groups, looks.labels),
        versus=[_versus(comparison, looks) for comparison in found],
        figure=_labels_figure(groups, looks, name),
        legend=looks.keys(group.key.start for group in groups),
        errors=error_types(groups, looks, name),
        class_tables=_class_tables(groups, looks),
        gallery=gallery(kept, photos, images, threshold),
        centres=centres(kept, looks, photos, images),
    )


def _steps_text(steps: int | None) -> str:
    return f"{steps:,} steps" if steps else "–"


def _cell(values: Sequence[float]) -> Cell:
    spread = statistics.spread(values)
    if spread is None:
        return Cell("–", "", "")
    if spread.std is None:
        return Cell(words.percent(spread.mean), "", "")
    return Cell(words.percent(spread.mean), f"± {words.percent(spread.std)}", words.range_text(spread))


def _versus(comparison: Comparison, looks: Looks) -> Versus:
    ours, other = comparison.ours, comparison.other
    return Versus(
        ours=looks.labels[ours.key.start],
        other=looks.labels[other.key.start],
        budget=words.budget_title(ours.key, ours.labelled_images),
        difference=words.signed(comparison.difference),
        paired=", ".join(words.signed(value) for value in comparison.paired) or "no common seed",
        verdict=comparison.verdict,
        reason=comparison.reason,
    )


def _labels_figure(groups: Sequence[Group], looks: Looks, name: str) -> Shown:
    series: dict[Start, dict[float, list[float]]] = {}
    for group in groups:
        values = group.values("AP")
        if values and group.labelled_images:
            series.setdefault(group.key.start, {})[group.labelled_images] = values
    lines = [Series(looks.labels[s], looks.looks[s], series[s]) for s in looks.starts if s in series]
    budgets = {budget for line in lines for budget in line.values}
    if len(budgets) > 1:
        described = "; ".join(
            f"{line.label}: "
            + ", ".join(f"{100 * float(np.mean(v)):.1f} at {b:g}" for b, v in sorted(line.values.items()))
            for line in lines
        )
        return Shown(
            figures.ap_against_labels(lines, f"{name}-labels", f"AP in % against labelled images. {described}"),
            "Large marks: mean over seeds. Small marks: each seed. Bars: lowest to highest seed. The "
            "horizontal "
            "axis is logarithmic; lines stand a little apart so that they do not cover each other.",
        )
    shown = [group for group in groups if group.values("AP")]
    if not shown:
        return Shown("", "No evaluation here holds an AP for boxes.")
    strips = [Series(looks.labels[g.key.start], looks.looks[g.key.start], {0.0: g.values("AP")}) for g in shown]
    described = "; ".join(
        f"{strip.label}: {', '.join(words.percent(v) for v in strip.values[0.0])}" for strip in strips
    )
    return Shown(
        figures.seeds_strip(
            strips, [g.by_seed("AP") for g in shown], f"{name}-seeds", f"AP in % of each seed. {described}"
        ),
        "A mark a seed, a tick at the mean, a bar from the lowest to the highest; thin lines join equal "
        "seeds. "
        "With a second label budget this becomes AP against labelled images.",
    )


def _class_tables(groups: Sequence[Group], looks: Looks) -> list[ClassTable]:
    """AP by class, mean over seeds; a table a label budget and IoU type."""
    tables = []
    for iou_type, title in (("bbox", "Box AP by class"), ("segm", "Mask AP by class")):
        for budget in dict.fromkeys(group.key.budget for group in groups):
            mine = [
                group
                for group in groups
                if group.key.budget == budget and any(e.per_class.get(iou_type) for e in group.evaluations)
            ]
            names = dict.fromkeys(
                name for group in mine for e in group.evaluations for name in e.per_class.get(iou_type, {})
            )
            if not names:
                continue
            rows = []
            for name in names:
                cells = []
                for group in mine:
                    values = [e.per_class.get(iou_type, {}).get(name, {}).get("AP") for e in group.evaluations]
                    defined = [value for value in values if value is not None]
                    cells.append(words.percent(sum(defined) / len(defined)) if defined else "–")
                rows.append((name, cells))
            full_title = f"{title}, {words.budget_title(mine[0].key, mine[0].labelled_images)}"
            columns = [Key(looks.labels[g.key.start], looks.looks[g.key.start]) for g in mine]
            tables.append(ClassTable(full_title, columns, rows, collapsed=len(rows) > 12))
    return tables


def settings(runs: Sequence[Run]) -> list[tuple[str, list[Setting]]]:
    """All settings of each kind of run; where runs differ, each value with the runs that have it."""
    tables = []
    for kind, title in (("pretrain", "Pretraining"), ("finetune", "Fine-tuning")):
        mine = [run for run in runs if run.kind == kind]
        if not mine:
            continue
        configs = [run.config if "train.seed" in run.config else {**run.config, "seed": run.seed} for run in mine]
        rows = []
        for key in dict.fromkeys(key for config in configs for key in config):
            having: dict[str, list[str]] = {}
            for run, config in zip(mine, configs, strict=True):
                having.setdefault(_value_text(config[key]) if key in config else "not set", []).append(run.name)
            rows.append(
                Setting(key, [(v, "" if len(having) == 1 else ", ".join(names)) for v, names in having.items()])
            )
        tables.append((title, sorted(rows, key=lambda row: (not row.differs, row.key))))
    return tables


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def environments(runs: Sequence[Run]) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """(names of runs, facts) for each different environment."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in runs:
        hardware, versions = run.record.get("hardware") or {}, run.record.get("versions") or {}
        facts = [(str(k), _value_text(v)) for k, v in hardware.items()] if isinstance(hardware, dict) else []
        facts.append(("headstart", str(run.record.get("headstart", "unknown"))))
        if run.record.get("git"):
            facts.append(("git", _value_text(run.record["git"])))
        if isinstance(versions, dict):
            facts += [(str(k), str(v)) for k, v in versions.items() if k != "headstart"]
        groups.setdefault(tuple(facts), []).append(run.name)
    return [(names, list(facts)) for facts, names in groups.items()]


def missing(runs: Sequence[Run], found: Sequence[Results]) -> list[Note]:
    """What a full report would hold besides, and the command that makes it."""
    notes = []
    pretrained = [run for run in runs if run.kind == "pretrain"]
    tuned = [run for run in runs if run.kind == "finetune"]
    for run in runs:
        if run.status == "finished":
            continue
        state = "was stopped" if run.status == "stopped" else "is still running or was killed"
        done = f" after step {run.steps}" if run.steps is not None else ""
        notes.append(Note(f"{run.name} {state}{done}. This continues it:", run.resume_command))
    for run in tuned:
        if not run.evaluations:
            validation = shlex.quote(str(run.data.get("val") or "val.json"))
            notes.append(
                Note(
                    f"{run.name} has no evaluation yet.",
                    f"headstart evaluate {shlex.quote(str(run.path))} {validation}",
                )
            )
    older = [(run, e) for run in tuned for e in run.evaluations if not e.errors and e.suite != "proposals"]
    if older:
        again = [
            shlex.join(
                [
                    "headstart",
                    "evaluate",
                    str(run.path),
                    e.data or "val.json",
                    "--metric",
                    e.suite,
                    "--out",
                    str(e.file),
                ]
            )
            for run, e in older
        ]
        text = f"{words.plural(len(older), 'evaluation')} of an older version, without what AP is lost to:"
        notes.append(Note(text, "\n".join(again)))
    if not tuned:
        source = shlex.quote(str(pretrained[0].path))
        notes.append(
            Note(
                "No fine-tuning run was given, so there is no AP to report.",
                f"headstart finetune {source} --train train.json --val val.json --labels 10% --seed 0",
            )
        )
    elif not any(run.method == "scratch" for run in tuned):
        notes.append(
            Note(
                "No run from scratch was given, so there is nothing to compare pretraining with.",
                "headstart finetune scratch --train train.json --val val.json --labels 10% --seed 0",
            )
        )
    given = {run.path.resolve() for run in runs}
    sources = {str(run.start.get("from")) for run in tuned if run.method != "scratch" and run.start.get("from")}
    for source in sorted(sources):
        path = Path(source)
        folder = path if path.is_dir() else path.parent
        inside = [folder, *folder.parents]
        if not any(place.resolve() in given for place in inside) and (folder / "run.json").is_file():
            notes.append(
                Note(
                    f"The pretraining run {source} is not part of this report; with it come its curves.",
                    shlex.join(["headstart", "report", str(folder), *(str(run.path) for run in runs)]),
                )
            )
    notes += [Note(text) for run in runs for text in run.notes]
    return notes


def run_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    return [
        {
            "name": run.name,
            "path": str(run.path),
            "kind": "pretraining" if run.kind == "pretrain" else "fine-tuning",
            "start": method_title(run.method),
            "labels": words.budget_title(run.key, run.labelled_images) if run.kind == "finetune" else "–",
            "seed": "–" if run.seed is None else str(run.seed),
            "steps": "–" if run.steps is None else f"{run.steps:,}",
            "time": "–" if run.seconds is None else short_time(run.seconds),
            "status": run.status if run.status != "running" else "running or killed",
        }
        for run in runs
    ]
