"""Run folders as the report sees them: read once, tolerant of what is missing, never silent about it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.console import notes
from headstart.errors import DataError, RunError
from headstart.files import read_json
from headstart.runs import LINEAR, read_record
from headstart.settings import flatten

METHOD_TITLES = {
    "scratch": "scratch",
    "soco": "SoCo",
    "adept": "ADePT",
    "aligndet": "AlignDet",
    "detreg": "DETReg",
    "updetr": "UP-DETR",
    "proseco": "ProSeCo",
    "joindet": "JoinDet",
}


@dataclass(frozen=True)
class Start:
    """A way of starting: what the runs of one line in a figure share. Budgets and seeds come on top."""

    method: str
    pretrain_steps: int
    detector: str  # canonical JSON of the detector's settings
    steps: int | None  # of fine-tuning; None while a run has not logged any

    @property
    def order(self) -> tuple[bool, str, str, int, int]:
        """Reading order: scratch before pretrained, short before long."""
        return (self.method != "scratch", self.detector, self.method, self.pretrain_steps, self.steps or 0)


@dataclass(frozen=True)
class GroupKey:
    """Runs with equal keys differ in their seed only (other differences are looked for and named)."""

    start: Start
    budget: str


@dataclass(frozen=True)
class Errors:
    """Error types of one IoU type: gains of AP50 in 0..1, and how many there are."""

    gains: dict[str, float | None]
    counts: dict[str, int]


@dataclass
class Evaluation:
    """One ``eval*.json``. Metrics are in 0..1, None where undefined; ``errors`` by IoU type, where it has them."""

    file: Path
    data: str
    images: int
    metrics: dict[str, dict[str, float | None]]
    per_class: dict[str, dict[str, dict[str, float | None]]]
    detections: Path | None
    suite: str = "coco"
    errors: dict[str, Errors] = field(default_factory=dict)


@dataclass
class Run:
    path: Path
    kind: str  # "pretrain" | "finetune"
    status: str
    record: dict[str, Any]  # run.json
    log: list[dict[str, Any]]
    validations: list[dict[str, Any]] = field(default_factory=list)  # lines of the log of evaluations on the way
    evaluations: list[Evaluation] = field(default_factory=list)
    label_ids: tuple[str, ...] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.record.get("name") or self.path.name)

    @property
    def seed(self) -> int | None:
        seed = self.record.get("seed")
        return int(seed) if isinstance(seed, int | float) else None

    @property
    def config(self) -> dict[str, Any]:
        """Dotted keys to values."""
        return flatten(_mapping(self.record.get("config")))

    @property
    def data(self) -> dict[str, Any]:
        return _mapping(self.record.get("data"))

    @property
    def start(self) -> dict[str, Any]:
        return _mapping(self.record.get("start"))

    @property
    def labels(self) -> dict[str, Any]:
        return _mapping(self.record.get("labels"))

    @property
    def summary(self) -> dict[str, Any]:
        return _mapping(self.record.get("summary"))

    @property
    def method(self) -> str:
        """What pretrained these weights ("scratch": nothing), or what this run pretrains with."""
        if self.kind == "pretrain":
            return str(self.record.get("method") or self.start.get("method") or "unknown method")
        return str(self.start.get("method") or "scratch")

    @property
    def steps(self) -> int | None:
        """Steps done: by the summary, or for an unfinished run by the log."""
        done = self.summary.get("steps")
        if isinstance(done, int | float):
            return int(done)
        return int(self.log[-1]["step"]) if self.log else None

    @property
    def seconds(self) -> float | None:
        done = self.summary.get("seconds")
        if isinstance(done, int | float):
            return float(done)
        last = self.log[-1].get("seconds") if self.log else None
        return float(last) if isinstance(last, int | float) else None

    @property
    def command(self) -> str:
        command = self.record.get("command")
        if isinstance(command, str):
            return command
        if not command:
            return ""
        program, *arguments = (str(part) for part in command)
        if Path(program).name in ("headstart", "__main__.py"):
            return shlex.join(["headstart", *arguments])
        return shlex.join([*(["python"] if program.endswith(".py") else []), program, *arguments])

    @property
    def resume_command(self) -> str:
        command = self.command
        return command if not command or "--resume" in command.split() else f"{command} --resume"

    @property
    def detector(self) -> dict[str, Any]:
        """Dotted settings of the detector, without what the labels decide."""
        chosen = _mapping(self.record.get("config")).get("detector")
        settings = flatten(chosen) if isinstance(chosen, dict) else {"name": chosen or "unknown detector"}
        return {key: value for key, value in settings.items() if key != "num_classes"}

    @property
    def key(self) -> GroupKey:
        start = Start(
            method=self.method,
            pretrain_steps=int(self.start.get("pretrain_steps") or 0),
            detector=json.dumps(self.detector, sort_keys=True, default=str),
            steps=self.steps,
        )
        return GroupKey(start, str(self.labels.get("budget", "all")))

    @property
    def labelled_images(self) -> int | None:
        count = self.labels.get("images")
        return int(count) if isinstance(count, int | float) else None


def read_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Every run once, oldest first.

    Raises:
        RunError: no folder is given, or one of them is not a run, or none is of a detector.
    """
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(Path(path).resolve(), Path(path))
    if not unique:
        raise RunError("report: no run folder given; expected for example: headstart report runs/*")
    detecting = [path for path in unique.values() if not _is_linear(path)]
    for path in unique.values():
        if path not in detecting:
            notes.print(f"{path}: a linear evaluation, of which a report shows nothing: left out", markup=False)
    if not detecting:
        raise RunError("report: there are linear evaluations alone, whose accuracies are in their eval.json")
    return sorted((read_run(path) for path in detecting), key=lambda run: str(run.record.get("created")))


def _is_linear(path: Path) -> bool:
    try:
        return read_record(path)["kind"] == LINEAR
    except (RunError, DataError):
        return False  # and no run that can be read


def read_run(path: Path) -> Run:
    """Raises: RunError when ``path`` is not a run folder, saying what makes one."""
    if not path.exists():
        raise RunError(f"{path}: no such folder; expected a run folder, as pretrain and finetune make")
    if not path.is_dir():
        raise RunError(f"{path}: is a file; expected a run folder, as pretrain and finetune make")
    if not (path / "run.json").is_file():
        raise RunError(f"{path}: not a run folder (no run.json); leave it out of the report")
    try:
        record = read_json(path / "run.json", "the record of a run")
    except DataError as error:
        raise RunError(str(error)) from None
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind not in ("pretrain", "finetune"):
        raise RunError(f'{path / "run.json"}: "kind" is {kind!r}; expected "pretrain" or "finetune"')

    run = Run(path, kind, str(record.get("status", "unknown")), record, log=[])
    run.log, run.validations = _read_log(path / "log.jsonl", run.notes)
    for file in sorted(path.glob("eval*.json"), key=lambda f: (f.name != "eval.json", f.name)):
        evaluation = _read_evaluation(file, run.notes)
        if evaluation is not None:
            run.evaluations.append(evaluation)
    run.label_ids = _read_label_ids(path / str(run.labels.get("ids_file") or "labels.json"))
    return run


def _read_log(file: Path, notes: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Steps, and validations, in order, each once: a resumed run writes again what came after its last checkpoint."""
    if not file.is_file():
        return [], []
    by_step: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    unreadable = 0
    with open(file, encoding="utf-8", errors="replace") as handle:
        for line in handle:
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                (validations if "validation" in entry else by_step)[int(entry["step"])] = entry
            except (ValueError, TypeError, KeyError):
                unreadable += 1
    if unreadable:
        notes.append(f"{file}: {unreadable} unreadable line{'s' * (unreadable > 1)} left out")
    return [by_step[step] for step in sorted(by_step)], [validations[step] for step in sorted(validations)]


def _read_evaluation(file: Path, notes: list[str]) -> Evaluation | None:
    try:
        values = read_json(file, "the scores of an evaluation")
        metrics = {
            iou_type: {name: _defined(value) for name, value in scores.items()}
            for iou_type, scores in values["metrics"].items()
        }
        per_class = {
            iou_type: {
                str(name): {metric: _defined(value) for metric, value in scores.items()}
                for name, scores in classes.items()
            }
            for iou_type, classes in values.get("per_class", {}).items()
        }
        named = values.get("detections")
        return Evaluation(
            file=file,
            data=str(values.get("data", "")),
            images=int(values.get("images", 0)),
            metrics=metrics,
            per_class=per_class,
            detections=file.parent / named if isinstance(named, str) else None,
            suite=str(values.get("metric", "coco")),
            errors={
                iou_type: Errors(
                    {name: _defined(gain) for name, gain in found["dAP"].items()},
                    {name: int(count) for name, count in found["counts"].items()},
                )
                for iou_type, found in values.get("errors", {}).items()
            },
        )
    except (DataError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, DataError) else f"{file}: not an evaluation ({error!r})"
        notes.append(f"{reason}. Make it again with headstart evaluate.")
        return None


def _read_label_ids(file: Path) -> tuple[str, ...] | None:
    """The labelled images of a run, and which boxes of them, to tell whether two runs were given the same ones."""
    try:
        images = read_json(file)["images"]
        return tuple(sorted(f"{image['id']}{image.get('annotations', '')}" for image in images))
    except (DataError, KeyError, TypeError, AttributeError):
        return None


def _defined(value: Any) -> float | None:
    """COCO tools write -1 for "undefined", others null or NaN."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return float(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def method_title(method: str) -> str:
    """ "aligndet on soco" -> "AlignDet on SoCo": names that are known, as their papers write them."""
    return re.sub("|".join(METHOD_TITLES), lambda m: METHOD_TITLES[m[0]], method)


def start_names(starts: Sequence[Start]) -> dict[Start, str]:
    """How training began, in as few words as tell the ways of starting apart.

    "SoCo", or "SoCo (600 steps)" when there is another SoCo; with the detector's settings in which they
    differ. Starts which differ in the length of fine-tuning alone share a name.
    """
    several_pretrainings = len({(s.method, s.pretrain_steps) for s in starts}) > len({s.method for s in starts})
    detectors = {s.detector: json.loads(s.detector) for s in starts}
    keys = dict.fromkeys(key for settings in detectors.values() for key in settings)
    names_of = dict.fromkeys(settings.get("name") for settings in detectors.values())
    families = [[s for s in detectors.values() if s.get("name") == name] for name in names_of]
    # What another family is made of goes without saying.
    alike = lambda key, settings: len({json.dumps(s.get(key)) for s in settings}) <= 1
    differing = [key for key in keys if not all(alike(key, of_one) for of_one in families)]
    differing += ["name"] * (len(families) > 1)
    names = {}
    for start in starts:
        name = method_title(start.method)
        if start.pretrain_steps and several_pretrainings:
            name += f" ({start.pretrain_steps:,} steps)"
        for key in differing:
            value = detectors[start.detector].get(key)
            name += f", {value}" if key in ("name", "backbone") else f", {key.split('.')[-1]} {value}"
        names[start] = name
    return names


def start_labels(starts: Sequence[Start]) -> dict[Start, str]:
    """The names with the length of fine-tuning, where that differs: "scratch, 300 steps"."""
    names = start_names(starts)
    if len({start.steps for start in starts}) <= 1:
        return names
    return {s: name if s.steps is None else f"{name}, {s.steps:,} steps" for s, name in names.items()}
