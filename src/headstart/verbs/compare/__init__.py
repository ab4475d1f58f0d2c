"""``compare``: does pretraining pay on these data? The grid of starts, label budgets and seeds, and the answer."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.table import Table

from headstart.console import notes
from headstart.errors import HeadstartError, RunError
from headstart.files import read_json, write_json
from headstart.verbs.compare import words
from headstart.verbs.compare.errors import Change, changes
from headstart.verbs.compare.plan import Cell, Plan, Task, go_on, make_plan, moved
from headstart.verbs.compare.pool import LOGS, alone, finished, run_all, slots
from headstart.verbs.compare.rehearsal import rehearse
from headstart.verbs.compare.statistics import LEVEL, MIN_SEEDS, RULE, Answer, Scores, answer, pairs_needed
from headstart.verbs.report import report
from headstart.verbs.report.comparison import BEYOND, FILE, draw, read

REPORT = "report.html"


@dataclass
class Compared:
    """What :func:`compare` returns.

    ``scores[start][labelled images][seed]`` is AP in 0..1 of the runs that are finished; ``sentences`` are the verdict,
    what it cost, and what to do now, which ``command`` does where it is a command. ``changes``: in types of error.
    ``finished``: False when it was asked to stop; the same call goes on.
    """

    path: Path
    finished: bool
    scores: Scores
    answer: Answer
    sentences: list[str]
    times: Mapping[str, Mapping[str, Any]]
    changes: list[Change]
    command: str = ""

    def tables(self) -> list[Table]:
        return words.tables(self.answer, self.times, self.changes)


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
    looked = _check_same(out, plan)
    rehearse(plan, out, places, show)
    looks = max(1, seeds - MIN_SEEDS + 1) if stop_early else 1
    if show:
        _announce(plan, looks)
    with alone(out):
        said = _run(plan, out, places, seeds, stop_early, looks, looked, show)
    if any(said.scores.values()):
        draw(out)
        report(out, out / REPORT)
    return said


def _run(
    plan: Plan,
    out: Path,
    places: Sequence[str | None],
    seeds: int,
    stop_early: bool,
    looks: int,
    looked: list[str],
    show: bool,
) -> Compared:
    """All of the grid, or until the verdict is clear."""
    said = _conclude(out, plan, seeds, looks, "running", looked)

    def keep(task: Task) -> None:
        _conclude(out, plan, seeds, looks, "running", looked)

    for rounds in range(min(MIN_SEEDS, seeds), seeds + 1) if stop_early else [seeds]:
        try:
            complete = run_all(plan.tasks(rounds), places, out / LOGS, show, keep)
        except HeadstartError:
            _conclude(out, plan, seeds, looks, "stopped", looked)
            raise
        if not complete:
            return _conclude(out, plan, seeds, looks, "stopped", looked)
        said = _conclude(out, plan, rounds, looks, "finished", looked)
        if said.answer.clear and said.answer.contrasts:
            break
    return said


def _announce(plan: Plan, looks: int) -> None:
    tests = math.comb(len(plan.starts), 2)
    listed = ", ".join(f"{text} ({images})" for text, images in plan.budgets.items())
    runs = len(plan.cells) * len(plan.cells[0])
    notes.print(f"{', '.join(plan.starts)}; labelled images: {listed}; {runs} fine-tuning runs at most", markup=False)
    too_small = words.warning(plan.starts, len(plan.budgets), len(plan.cells), pairs_needed(tests, looks))
    for note in [*plan.notes, *([too_small] if too_small else [])]:
        notes.print(f"  {note}", markup=False, soft_wrap=True)


def _check_same(out: Path, plan: Plan) -> list[str]:
    """The digests of tables that verdicts were given on already.

    Raises:
        RunError: ``out`` holds runs that were called with something else.
    """
    if not (out / FILE).is_file():
        if out.is_file() or (out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())):
            raise RunError(f"{out}: is not empty and no comparison; choose another --out")
        return []
    content = read(out)
    before = moved(plan, content["fixed"])
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
    return list(content.get("looked", []))


def _differing(before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [("weights", before, now)]
    keys = sorted(before.keys() | now.keys())
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def _conclude(out: Path, plan: Plan, rounds: int, looks: int, status: str, looked: list[str]) -> Compared:
    """Read what is finished of the first ``rounds`` seeds, and write compare.json; a verdict where all of them are.

    ``looked``: digests of the tables that verdicts were given on, to which this one is added. A table that is looked at
    as the third counts as three looks, whatever was planned.
    """
    cells = [cell for row in plan.cells[:rounds] for cell in row]
    found = _Found(plan, cells, out)
    final = status == "finished" and bool(cells)
    if final:
        digest = sha256("\n".join(sorted(run["path"] for run in found.runs)).encode()).hexdigest()[:12]
        if digest not in looked:
            looked.append(digest)
        looks = max(looks, looked.index(digest) + 1)
    said = answer(found.scores, plan.baseline, looks, final)
    changed = changes(found.errors, plan.baseline, looks, final)
    times = {start: found.times(start) for start in plan.starts}
    advised, start = words.advice(said, {name: time["pretraining"] for name, time in times.items()})
    sentences = words.sentences(said, changed, len(found.runs), len(plan.cells) * len(plan.cells[0]))
    costs = words.costs(times)
    command = "" if start is None else shlex.join(go_on(plan, start))
    told = [*sentences, *costs, *([advised] if advised else [])]
    prepared = [task for task in plan.preparing.values() if task.verb == "pretrain" and finished(task)]
    content = {
        "kind": "compare",
        "status": status,
        "sentences": sentences,
        "costs": costs,
        "advice": advised,
        "command": command,
        "rule": RULE,
        "level": LEVEL,
        "answer": _plain(asdict(said)),
        "errors": [asdict(change) for change in changed],
        "looked": looked,
        "starts": times,
        "pretraining": [str(task.out.relative_to(out)) for task in prepared],
        "runs": found.runs,
        "fixed": plan.fixed,
    }
    write_json(out / FILE, content)
    return Compared(out, status != "stopped", found.scores, said, told, times, changed, command)


class _Found:
    """What the finished runs of some cells say."""

    def __init__(self, plan: Plan, cells: Sequence[Cell], out: Path) -> None:
        self.plan = plan
        self.runs: list[dict[str, Any]] = []
        self.scores: dict[str, dict[int, dict[int, float]]] = {start: {} for start in plan.starts}
        self.errors: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
        self._spent: dict[str, list[float]] = {start: [] for start in plan.starts}
        for cell in cells:
            if finished(cell.task):
                self._read(cell, out)

    def _read(self, cell: Cell, out: Path) -> None:
        evaluated = read_json(cell.task.out / "eval.json")
        metrics = evaluated["metrics"]["bbox"]
        errors = evaluated.get("errors", {}).get("bbox", {}).get("dAP", {})
        spent = _seconds(cell.task)
        run = {"start": cell.start, "labels": cell.budget, "images": cell.images, "seed": cell.seed}
        path = str(cell.task.out.relative_to(out))
        self.runs.append({**run, "path": path, "seconds": spent, **metrics, "errors": errors})
        if metrics["AP"] is not None:
            self.scores[cell.start].setdefault(cell.images, {})[cell.seed] = metrics["AP"]
        for type, gain in errors.items():
            if gain is not None:
                by_start = self.errors.setdefault(type, {start: {} for start in self.plan.starts})
                by_start[cell.start].setdefault(cell.images, {})[cell.seed] = gain
        if spent is not None:
            self._spent[cell.start].append(spent)

    def times(self, start: str) -> dict[str, Any]:
        """Seconds of all pretraining that ``start`` took, its parents' too, and images they were shown; its fine-tuning
        runs, and seconds of one in the mean."""
        chain = [self.plan.preparing[name] for name in self.plan.chains[start]]
        made = [task for task in chain if task.verb == "pretrain" and finished(task)]
        known = [value for value in map(_seconds, made) if value is not None]
        spent = self._spent[start]
        return {
            "chain": self.plan.chains[start],
            "pretraining": sum(known) if known else None,
            "images_seen": sum(map(_images_seen, made)),
            "finetuning": sum(spent) / len(spent) if spent else None,
            "runs": len(spent),
        }


def _seconds(task: Task) -> float | None:
    """Of training, by its log, which also has what was done before a run was killed and went on."""
    summary = read_json(task.out / "run.json").get("summary", {}).get("seconds")
    batch_size = _train(task).get("batch_size")
    log = task.out / "log.jsonl"
    if not batch_size or not log.is_file():
        return summary
    spent, before = 0.0, 0
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry.get("images_per_s"):
            spent += (entry["step"] - before) * batch_size / entry["images_per_s"]
            before = entry["step"]
    return max(spent, summary or 0.0)


def _images_seen(task: Task) -> int:
    steps = read_json(task.out / "run.json").get("summary", {}).get("steps") or 0
    return int(steps * (_train(task).get("batch_size") or 0))


def _train(task: Task) -> Mapping[str, Any]:
    return read_json(task.out / "run.json").get("config", {}).get("train", {})


def _plain(value: Any) -> Any:
    """JSON has no infinity: "fewer" and "more" than the budgets that were tried (0 and infinity)."""
    if isinstance(value, dict):
        labels = ("needed", "low", "high") if "needed" in value else ()
        return {k: BEYOND.get(v, v) if k in labels else _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


__all__: Sequence[str] = ("Compared", "compare")
