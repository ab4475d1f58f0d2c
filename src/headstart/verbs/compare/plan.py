"""The whole grid, settled before anything runs: what is wrong with it is said at once, not after hours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from headstart import detectors, methods, recipes
from headstart.datasets.detection import DetectionData, load_detection_data
from headstart.datasets.splits import parse_budget
from headstart.detectors.detector import DetectorSettings
from headstart.errors import SettingsError
from headstart.settings import flatten, full_key, merge, parse_assignments, validate
from headstart.verbs.compare.starts import FIRST, Start, parse_start, parse_starts
from headstart.verbs.evaluate import in_order_of
from headstart.verbs.finetune import config_type as finetune_type
from headstart.verbs.pretrain import config_type as pretrain_type
from headstart.verbs.start import SCRATCH, detector_of, for_family

RUNS = "runs"
MAX_SEEDS = 1000


@dataclass(frozen=True)
class Task:
    """One run: the verb, what it is called with, where it writes, and the tasks that come before it."""

    name: str
    verb: Literal["propose", "pretrain", "finetune"]
    arguments: Mapping[str, Any]
    out: Path
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A fine-tuning run of the grid."""

    start: str
    budget: str
    images: int
    seed: int
    task: Task


@dataclass
class Plan:
    """``preparing``: proposals and pretraining by name. ``chains``: what of it each start is made of, first to last.

    ``tuning``, ``pretraining``: the settings that fine-tuning, and each pretraining, will have; for what looks ahead.
    ``sources``: what the runs of each start are given, a word or a path.
    """

    baseline: str
    starts: list[str]
    budgets: dict[str, int]  # as they were given -> images
    preparing: dict[str, Task]
    chains: dict[str, list[str]]
    cells: list[list[Cell]]  # a list a seed
    fixed: dict[str, Any]  # what may not change when the comparison goes on
    data: DetectionData
    held_out: DetectionData
    tuning: Any
    pretraining: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tasks(self, rounds: int) -> list[Task]:
        """All until the seed number ``rounds``, in the order they are wanted in."""
        return [*self.preparing.values(), *(cell.task for one in self.cells[:rounds] for cell in one)]


def cell_seed(images: int, number: int) -> int:
    """Seed of the run ``number`` with so many labelled images: no two budgets share random numbers.

    Budgets that shared seeds would share images and luck, and their differences would count as more than they are.
    """
    return MAX_SEEDS * images + number


def make_plan(
    out: Path,
    *,
    train: Path | str,
    val: Path | str,
    unlabelled: Path | str | None,
    starts: Sequence[str],
    labels: Sequence[str | int],
    seeds: int,
    detector: str | None,
    backbone: str | None,
    train_images: Path | str | None,
    val_images: Path | str | None,
    proposals: Path | str | None,
    recipe: Path | str | None,
    pretrain_recipes: Sequence[Path | str],
    schedule: Mapping[str, Any],
    pretrain_schedule: Mapping[str, Any],
    settings: Mapping[str, Any] | Sequence[str],
    pretrain_settings: Mapping[str, Any] | Sequence[str],
) -> Plan:
    """Raises: SettingsError, DataError, RunError: whatever in this grid can be known to be wrong beforehand."""
    chosen = parse_starts(starts)
    if not 1 <= seeds <= MAX_SEEDS:
        raise SettingsError(f"--seeds {seeds}: expected 1 to {MAX_SEEDS}")
    tuning, given = _tuning(chosen, detector, backbone, recipe, schedule, settings)
    built = tuning.detector
    data = load_detection_data(train, _path(train_images))
    held_out = in_order_of(load_detection_data(val, _path(val_images)), [c.name for c in data.categories])
    plan = Plan(
        baseline=SCRATCH if any(s.source == SCRATCH for s in chosen) else chosen[0].name,
        starts=[start.name for start in chosen],
        budgets=_budgets(data, labels),
        preparing={},
        chains={},
        cells=[],
        fixed={},
        data=data,
        held_out=held_out,
        tuning=tuning,
    )
    pinned = {f"detector.{k}": v for k, v in flatten(built.model_dump(mode="json")).items() if k != "num_classes"}
    making = _Preparing(
        plan, out, built, unlabelled, proposals, recipe, pretrain_recipes, pretrain_schedule, pretrain_settings
    )
    origins = {}
    for i, start in enumerate(chosen):
        origins[start.name] = making.origin(start)
        if start.method is not None and origins[start.name][1] != start.name:  # a method that was put on FIRST
            plan.starts[i] = origins[start.name][1]
            if plan.starts.count(plan.starts[i]) > 1:
                raise SettingsError(
                    f"--starts: {start.name} means {plan.starts[i]} here, and both are named; expected one"
                )
    plan.sources = {name: origins[start.name][0] for start, name in zip(chosen, plan.starts, strict=True)}
    for number in range(seeds):
        row = []
        for budget, images in plan.budgets.items():
            for start, name in zip(chosen, plan.starts, strict=True):
                seed = cell_seed(images, number)
                weights, needed = origins[start.name]
                run = out / RUNS / f"{name}-{budget.replace('%', 'pct')}-seed{seed}"
                arguments = {
                    "start": weights,
                    "train": train,
                    "val": val,
                    "labels": budget,
                    "detector": built.name,
                    "train_images": train_images,
                    "val_images": val_images,
                    "recipe": recipe,
                    "seed": seed,
                    "settings": {**given, **pinned},
                    **schedule,
                }
                task = Task(run.name, "finetune", arguments, run, (needed,) if needed in plan.preparing else ())
                row.append(Cell(name, budget, images, seed, task))
        plan.cells.append(row)
    plan.fixed = _fixed(plan, chosen)
    return plan


def go_on(plan: Plan, start: str) -> list[str]:
    """The command that fine-tunes from ``start`` with all labels, as the runs of the grid were."""
    called = plan.cells[0][-1].task.arguments
    section = recipes.read(called["recipe"], "finetune")
    source = plan.sources[start]
    name = start if start in plan.pretraining else ""
    base = plan.pretraining[name].detector.model_dump(mode="json") if name else detector_of(source)
    family = str(called["detector"])
    kind = finetune_type(family)
    values = merge({}, {f"detector.{k}": v for k, v in for_family(family, base).items() if k != "num_classes"})
    values = merge(merge(values, flatten(section, model=kind)), {"detector.name": family})
    untold = flatten(validate(kind, values, "finetune").model_dump(mode="json"), model=kind)  # type: ignore[attr-defined]
    options = {key: called[key] for key in ("train", "val", "train_images", "val_images", "detector", "recipe")}
    options |= {key: called[key] for key in ("epochs", "max_steps", "batch_size")}
    command = ["headstart", "finetune", source]
    for key, value in options.items():
        if value is not None:
            command += [f"--{key.replace('_', '-')}", str(value)]
    for key, value in called["settings"].items():
        if key != "detector.name" and not (key.startswith("detector.") and untold.get(key) == value):
            command += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return command


def _tuning(
    starts: Sequence[Start],
    detector: str | None,
    backbone: str | None,
    recipe: Path | str | None,
    schedule: Mapping[str, Any],
    settings: Mapping[str, Any] | Sequence[str],
) -> tuple[Any, dict[str, Any]]:
    """The settings of all fine-tuning runs, and those of them that were given, dotted, but for the detector's.

    The detector is as the first start that is a run was built, then the recipe, then what was asked for, as in
    fine-tuning.
    """
    sources = [_root(start).source for start in starts]
    base: Mapping[str, Any] = next((found for source in sources if source and (found := detector_of(source))), {})
    section = recipes.read(recipe, "finetune")
    name = detector or section.get("detector", {}).get("name") or base.get("name") or "faster_rcnn"
    kind = finetune_type(name)
    given = {full_key(kind, k): v for k, v in settings.items()} if isinstance(settings, Mapping) else None
    if given is None:
        given = parse_assignments(kind, list(settings))
    values = merge({"optim": {"schedule": "steps"}}, {f"detector.{k}": v for k, v in for_family(name, base).items()})
    values = merge(values, flatten(section, model=kind))
    asked = {"detector.name": name, **({"detector.backbone": backbone} if backbone else {}), **_train(schedule)}
    values = merge(values, {**asked, **given})
    config: Any = validate(kind, values, "compare")
    return config, {key: value for key, value in given.items() if not key.startswith("detector.")}


def _root(start: Start) -> Start:
    return start if start.on is None else _root(start.on)


def _train(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the verbs have arguments of their own for; what is unset is left out."""
    return {f"train.{key}": value for key, value in schedule.items() if value is not None}


def _path(value: Path | str | None) -> Path | None:
    return None if value is None else Path(value)


def _budgets(data: DetectionData, labels: Sequence[str | int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in (str(label).strip() for label in labels):
        budget = parse_budget(text)
        if budget.file is not None:
            raise SettingsError(f"--labels {text}: a file names one choice of images; every seed needs another")
        counts[text] = budget.images(len(data))
    if not counts:
        raise SettingsError("--labels: expected one budget or more, for example 1%,5%,10%,100%")
    if len(set(counts.values())) < len(counts):
        listed = ", ".join(f"{text} ({count} images)" for text, count in counts.items())
        raise SettingsError(f"--labels: two budgets are the same number of images: {listed}")
    return dict(sorted(counts.items(), key=lambda item: item[1]))


class _Preparing:
    """Collects the proposals and pretraining runs that the starts need, each once."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        detector: DetectorSettings,
        unlabelled: Path | str | None,
        proposals: Path | str | None,
        recipe: Path | str | None,
        pretrain_recipes: Sequence[Path | str],
        schedule: Mapping[str, Any],
        settings: Mapping[str, Any] | Sequence[str],
    ) -> None:
        self.plan, self.out, self.detector = plan, out, detector
        self.unlabelled, self.proposals, self.schedule, self.settings = unlabelled, proposals, schedule, settings
        self.recipes: dict[str, Path | str] = {}
        if recipe is not None and (method := _method_of(recipe)) is not None:
            self.recipes[method] = recipe
        self.recipes |= {recipes.method_of(one): one for one in pretrain_recipes}
        self.named: dict[str, Start] = {}

    def origin(self, start: Start) -> tuple[str, str]:
        """What is fine-tuned: a word or a path; and the name of the start."""
        if start.method is None:
            self._name(start)
            self.plan.chains[start.name] = []
            return start.source, start.name
        if self.unlabelled is None:
            raise SettingsError(f"--starts {start.name}: has to be pretrained; expected --unlabelled PHOTOS")
        method = start.method
        recipe = self.recipes.get(method)
        section = recipes.read(recipe, "pretrain") if recipe is not None else {}
        family = self._family(method, section)
        kind = pretrain_type(method, family)
        base = for_family(family, self.detector.model_dump(mode="json"))
        given = {
            **{f"detector.{k}": v for k, v in flatten(base).items() if k not in ("name", "num_classes")},
            **_assigned(kind, method, self.settings),
        }
        values = merge({"proposals": dict(methods.method_type(method).proposals)}, {})
        named = section.get("method", {})
        named.pop("name", None)
        values = merge(
            merge(values, flatten(section, model=kind)), {"detector.name": family, **_train(self.schedule), **given}
        )
        config: Any = validate(kind, values, f"compare, pretraining {method}")
        if config.detector.backbone != self.detector.backbone:
            raise SettingsError(
                f"compare, pretraining {method}: detector.backbone is {config.detector.backbone}, and fine-tuning has "
                f"{self.detector.backbone}; expected the same"
            )
        made = methods.method_type(method)(config.method)
        on = start.on
        if on is None and (reason := made.needs_start(detectors.build(config.detector))):
            on = parse_start(FIRST)
            self.plan.notes.append(f"{method} {reason}: {method}@{FIRST}")
        name = method if on is None else f"{method}@{on.name}"
        self._name(Start(name, method=method, on=on))
        run = self.out / RUNS / name
        weights, before = (None, "") if on is None else self.origin(on)
        needs = [before] if before in self.plan.preparing else []
        boxes = None
        if made.needs_proposals and made.refresh_every(1) is None:
            boxes = self.proposals
            if boxes is None:
                task = self._propose(config.proposals)
                boxes = task.out
                needs.append(task.name)
        arguments = {
            "detector": family,
            "images": self.unlabelled,
            "method": method,
            "start": weights,
            "proposals": boxes,
            "recipe": recipe,
            "settings": given,
            **self.schedule,
        }
        self.plan.preparing.setdefault(name, Task(name, "pretrain", arguments, run, tuple(needs)))
        self.plan.pretraining.setdefault(name, config)
        self.plan.chains[name] = [*dict.fromkeys([*self.plan.chains.get(before, []), *needs, name])]
        return str(run), name

    def _name(self, start: Start) -> None:
        """Raises: SettingsError where a file is named as what is pretrained here: one would be taken for the other."""
        if self.named.setdefault(start.name, start) != start:
            raise SettingsError(
                f"--starts: two ways of starting are named {start.name}, weights that are there and what is pretrained "
                "here; put methods on these weights (METHOD@PATH), or rename the file or folder"
            )

    def _family(self, method: str, section: Mapping[str, Any]) -> str:
        """The detector that a method pretrains: the one that is compared, wherever it can."""
        if methods.goes_with(method, self.detector.name):
            return self.detector.name
        return str(section.get("detector", {}).get("name") or methods.method_type(method).detector)

    def _propose(self, settings: Any) -> Task:
        values = settings.model_dump(mode="json")
        key = sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
        name = f"boxes-{key}"
        task = Task(name, "propose", {"images": self.unlabelled, "settings": values}, self.out / f"{name}.parquet")
        return self.plan.preparing.setdefault(name, task)


def _method_of(recipe: Path | str) -> str | None:
    """The method that a recipe pretrains with; None where it only fine-tunes."""
    try:
        return recipes.method_of(recipe)
    except SettingsError:
        return None


def _assigned(kind: Any, method: str, settings: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Of ``{"optim.lr": 0.1, "soco:K": 8}`` or ``["optim.lr=0.1", "soco:K=8"]``, what is for ``method``; dotted."""
    texts = list(settings)
    owners = [text.partition("=")[0].rpartition(":")[0].strip() for text in texts]
    for text, owner in zip(texts, owners, strict=True):
        if owner and owner not in methods.METHODS:
            raise SettingsError(f"--pretrain-set {text}: {owner!r} is no method ({', '.join(methods.METHODS)})")
    mine = [text for text, owner in zip(texts, owners, strict=True) if owner in ("", method)]
    bare = lambda text: text[len(text.partition("=")[0].rpartition(":")[0]) :].removeprefix(":")
    if isinstance(settings, Mapping):
        return {full_key(kind, bare(text)): settings[text] for text in mine}
    return parse_assignments(kind, [bare(text) for text in mine])


def _fixed(plan: Plan, starts: Sequence[Start]) -> dict[str, Any]:
    """JSON of what runs are called with: starts, budgets and seeds may be added later, but none of this may change."""
    own = ("start", "labels", "seed")
    tuning = {key: value for key, value in plan.cells[0][0].task.arguments.items() if key not in own}
    sources = {start.name: start.source for start in starts if start.method is None}
    called = {**{name: task.arguments for name, task in plan.preparing.items()}, **sources, "fine-tuning": tuning}
    return json.loads(json.dumps(called, default=str))


def moved(plan: Plan, before: Mapping[str, Any]) -> dict[str, Any]:
    """``before``, a ``fixed`` of some earlier call, with what was made in its folder where it is now."""
    here = {task.out.name: str(task.out) for task in plan.preparing.values()}
    found = {}
    for name, called in before.items():
        found[name] = called
        if name in plan.preparing and isinstance(called, dict):
            now = plan.preparing[name].arguments
            own = {key for key in ("start", "proposals") if str(now.get(key)) in here.values() and called.get(key)}
            found[name] = {**called, **{key: here.get(Path(called[key]).name, called[key]) for key in own}}
    return found
