"""``compare``: does pretraining pay on these data? The grid of starts, label budgets and seeds, and the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from headstart.console import notes
from headstart.errors import RunError
from headstart.files import read_json, write_json
from headstart.verbs.compare import words
from headstart.verbs.compare.plan import Plan, Task, make_plan
from headstart.verbs.compare.pool import LOGS, finished, run_all, slots
from headstart.verbs.compare.rehearsal import rehearse
from headstart.verbs.compare.statistics import LEVEL, MIN_SEEDS, RULE, Answer, Scores, answer, pairs_needed
from headstart.verbs.report import report
from headstart.verbs.report.comparison import FILE, draw, read

REPORT = "report.html"


@dataclass
class Compared:
    """What :func:`compare` returns.

    ``scores[start][labelled images][seed]`` is AP in 0..1 of the runs that are finished; ``sentences`` are the verdict.
    ``finished``: False when it was asked to stop; the same call goes on.
    """

    path: Path
    finished: bool
    scores: Scores
    answer: Answer
    sentences: list[str]
    times: Mapping[str, Mapping[str, Any]]

    def tables(self) -> list[Table]:
        return words.tables(self.answer, self.times)


def compare(
    train: Path | str,
    val: Path | str,
    *,
    out: Path | str,
    starts: Sequence[str],
    labels: Sequence[str | int] = ("1%", "5%", "10%", "100%"),
    seeds: int = 3,
    unlabelled: Path | str | None = None,
    detector: str | None = None,
    backbone: str | None = None,
    train_images: Path | str | None = None,
    val_images: Path | str | None = None,
    proposals: Path | str | None = None,
    recipe: Path | str | None = None,
    pretrain_recipes: Sequence[Path | str] = (),
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    pretrain_epochs: float | None = None,
    pretrain_max_steps: int | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    pretrain_settings: Mapping[str, Any] | Sequence[str] = (),
    device: str | None = None,
    jobs: int | None = None,
    stop_early: bool = False,
    show: bool = True,
) -> Compared:
    """Fine-tune every way of starting with every label budget and seed, by one schedule, and say what it shows.

    A call goes on where an earlier one with the same ``out`` stopped; starts, budgets and seeds may be added to it.
    Several runs at once are processes of their own: a script then needs ``if __name__ == "__main__":``.

    Args:
        train, val: labels to fine-tune with, and to evaluate on: COCO JSON, Pascal VOC folder or list.
        out: folder of the runs and the answer.
        starts: "scratch", "imagenet", run folders, weights files, methods, and methods on another start
            ("aligndet@soco", see :mod:`headstart.verbs.compare.starts`). The baseline is scratch, or else the first.
        labels: label budgets: shares ("10%"), numbers of images, "all".
        seeds: runs for each start and budget.
        unlabelled: photos to pretrain on, once for each method.
        detector, backbone: the one detector of all runs; unset: the recipe's, or as the first start that is a run.
        train_images, val_images: folders of the images, where they are not beside the annotations.
        proposals: boxes of ``unlabelled``; unset: found here, once for all methods that want the same.
        recipe: numbers of fine-tuning, and of the method that it pretrains with.
        pretrain_recipes: numbers of other methods, a recipe each.
        epochs, max_steps, batch_size: the schedule of fine-tuning, the same for all.
        pretrain_epochs, pretrain_max_steps: length of every pretraining.
        settings: any other of detector and fine-tuning, ``{"optim.lr": 0.01}`` or ``["optim.lr=0.01"]``.
        pretrain_settings: of every pretraining, or of one method: ``["batch_size=64", "soco:K=8"]``.
        device: "auto", "cpu", "cuda", "cuda:1".
        jobs: runs at once; unset: one a CUDA device, one on the CPU.
        stop_early: add seeds one by one, from 3 on, and stop when each start's verdict is clear.
        show: progress and notes.

    Raises:
        SettingsError, DataError: the grid can't be run; found before anything of it is.
        RunError: ``out`` is a comparison with other settings, or a run failed.
    """
    out = Path(out)
    places = slots(device, jobs)
    plan = make_plan(
        out,
        train=train,
        val=val,
        unlabelled=unlabelled,
        starts=starts,
        labels=labels,
        seeds=seeds,
        detector=detector,
        backbone=backbone,
        train_images=train_images,
        val_images=val_images,
        proposals=proposals,
        recipe=recipe,
        pretrain_recipes=pretrain_recipes,
        schedule={"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size},
        pretrain_schedule={"epochs": pretrain_epochs, "max_steps": pretrain_max_steps},
        settings=settings,
        pretrain_settings=pretrain_settings,
    )
    _check_same(out, plan)
    rehearse(plan, out, places, show)
    looks = max(1, seeds - MIN_SEEDS + 1) if stop_early else 1
    if show:
        _announce(plan, looks)
    complete, said = True, _conclude(out, plan, 0, looks, "running")
    for rounds in range(min(MIN_SEEDS, seeds), seeds + 1) if stop_early else [seeds]:

        def keep(task: Task, rounds: int = rounds) -> None:
            _conclude(out, plan, rounds, looks, "running")

        complete = run_all(plan.tasks(rounds), places, out / LOGS, show, keep)
        said = _conclude(out, plan, rounds, looks, "finished" if complete else "stopped")
        if not complete or (said.answer.clear and said.answer.contrasts):
            break
    if any(said.scores.values()):
        draw(out)
        report(out, out / REPORT)
    return said


def _announce(plan: Plan, looks: int) -> None:
    tests = math.comb(len(plan.starts), 2)
    listed = ", ".join(f"{text} ({images})" for text, images in plan.budgets.items())
    runs = len(plan.cells) * len(plan.cells[0])
    notes.print(f"{', '.join(plan.starts)}; labelled images: {listed}; {runs} fine-tuning runs at most", markup=False)
    too_small = words.warning(plan.starts, len(plan.budgets), len(plan.cells), pairs_needed(tests, looks))
    for note in [*plan.notes, *([too_small] if too_small else [])]:
        notes.print(f"  {note}", markup=False, soft_wrap=True)


def _check_same(out: Path, plan: Plan) -> None:
    """Raises: RunError where ``out`` holds runs that were called with something else."""
    if not (out / FILE).is_file():
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise RunError(f"{out}: is not empty and no comparison; choose another --out")
        return
    before = read(out)["fixed"]
    different = [
        f"{name}, {key}: was {old!r}, now {new!r}"
        for name in before.keys() & plan.fixed.keys()
        for key, old, new in _differing(before[name], plan.fixed[name])
    ]
    if different:
        raise RunError(
            f"{out}: was begun with other settings: {'; '.join(sorted(different)[:6])}. "
            "Repeat the first command (starts, labels and seeds may be added), or choose another --out"
        )
    plan.fixed = {**before, **plan.fixed}


def _differing(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [("weights", before, now)]
    keys = sorted(before.keys() | now.keys())
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def _conclude(out: Path, plan: Plan, rounds: int, looks: int, status: str) -> Compared:
    """Read what is finished of the first ``rounds`` seeds, and write compare.json."""
    scores: dict[str, dict[int, dict[int, float]]] = {start: {} for start in plan.starts}
    seconds: dict[str, list[float]] = {start: [] for start in plan.starts}
    runs = []
    for cell in (cell for row in plan.cells[:rounds] for cell in row if finished(cell.task)):
        metrics = read_json(cell.task.out / "eval.json")["metrics"]["bbox"]
        spent = _seconds(cell.task)
        run = {"start": cell.start, "labels": cell.budget, "images": cell.images, "seed": cell.seed}
        runs.append({**run, "path": str(cell.task.out.relative_to(out)), "seconds": spent, **metrics})
        if metrics["AP"] is not None:
            scores[cell.start].setdefault(cell.images, {})[cell.seed] = metrics["AP"]
        if spent is not None:
            seconds[cell.start].append(spent)
    found = answer(scores, plan.baseline, looks)
    times = {start: _times(plan, start, seconds[start]) for start in plan.starts}
    said = Compared(out, status != "stopped", scores, found, words.sentences(found), times)
    prepared = [task for task in plan.preparing.values() if task.verb == "pretrain" and finished(task)]
    content = {
        "kind": "compare",
        "status": status,
        "sentences": said.sentences,
        "rule": RULE,
        "level": LEVEL,
        "answer": _plain(asdict(found)),
        "starts": times,
        "pretraining": [str(task.out.relative_to(out)) for task in prepared],
        "runs": runs,
        "fixed": plan.fixed,
    }
    write_json(out / FILE, content)
    return said


def _times(plan: Plan, start: str, seconds: Sequence[float]) -> dict[str, Any]:
    """Seconds of all pretraining that ``start`` took, its parents' too, and of a fine-tuning run in the mean."""
    chain = [plan.preparing[name] for name in plan.chains[start]]
    spent = [_seconds(task) for task in chain if task.verb == "pretrain" and finished(task)]
    known = [value for value in spent if value is not None]
    return {
        "chain": plan.chains[start],
        "pretraining": sum(known) if known else None,
        "finetuning": sum(seconds) / len(seconds) if seconds else None,
    }


def _seconds(task: Task) -> float | None:
    return read_json(task.out / "run.json").get("summary", {}).get("seconds")


def _plain(value: Any) -> Any:
    """JSON has no infinity: "fewer" and "more" than the budgets that were tried (0 and infinity)."""
    if isinstance(value, dict):
        beyond = {0.0: "fewer", math.inf: "more"}
        labels = ("needed", "low", "high") if "needed" in value else ()
        return {k: beyond.get(v, v) if k in labels else _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


__all__: Sequence[str] = ("Compared", "compare")
