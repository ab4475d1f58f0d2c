"""Numbers and findings in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headstart.verbs.report.runs import GroupKey, Run, Start
from headstart.verbs.report.statistics import Comparison, Group, Spread, same_length, spread

MINUS = "−"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference of AP in points; two decimals where one would say zero."""
    points = 100 * value
    text = f"{abs(points):.1f}" if abs(points) >= 0.05 else f"{abs(points):.2f}"
    return f"{MINUS if points < 0 else '+'}{text}"


def range_text(values: Spread) -> str:
    return f"{percent(values.low)} to {percent(values.high)}"


def plural(count: int, noun: str) -> str:
    ending = "es" if noun.endswith("x") else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def budget_title(key: GroupKey, labelled_images: int | None) -> str:
    """As in "82 labelled images (10%)"; the budget as it was given when the count is not known."""
    if labelled_images is None:
        return "all labels" if key.budget == "all" else f"label budget {key.budget}"
    given = "" if key.budget == str(labelled_images) else f" ({key.budget})"
    return f"{plural(labelled_images, 'labelled image')}{given}"


def findings(groups: Sequence[Group], found: Sequence[Comparison], names: Mapping[Start, str]) -> list[str]:
    """What the table says, the main finding first: one pair of starts a sentence or two."""
    if all(group.key.start.method == "scratch" for group in groups):
        return ["Only runs from scratch were evaluated here, so nothing can be said about pretraining."]
    against_scratch = [c for c in found if c.other.key.start.method == "scratch"]
    if not against_scratch:
        return [
            "No run from scratch with the same detector and label budget was evaluated here, so it can't be "
            "said whether pretraining helped."
        ]
    sentences = []
    pairs = dict.fromkeys((c.ours.key.start, c.other.key.start) for c in found)
    for ours, other in sorted(pairs, key=lambda p: (p[1].method != "scratch", p[0].steps != p[1].steps)):
        mine = [c for c in found if (c.ours.key.start, c.other.key.start) == (ours, other)]
        sentences.append(_one_budget(mine[0], names) if len(mine) == 1 else _several_budgets(mine, names))
    if not any(same_length(c.ours, c.other) for c in against_scratch):
        sentences.append(
            "No run from scratch was fine-tuned for as many steps, so these comparisons are of schedules too."
        )
    return sentences


def _one_budget(comparison: Comparison, names: Mapping[Start, str]) -> str:
    ours, other = comparison.ours, comparison.other
    a, b = spread(ours.values("AP")), spread(other.values("AP"))
    assert a is not None
    assert b is not None
    size = f"{signed(comparison.difference)[1:]} points {'more' if comparison.difference >= 0 else 'less'}"
    return (
        f"With {budget_title(ours.key, ours.labelled_images)}{_steps(comparison)}, {names[ours.key.start]} "
        f"reaches {percent(a.mean)} AP against {percent(b.mean)} {_with_other(comparison, names)}: {size}. "
        f"{_verdict(comparison)}"
    )


def _verdict(comparison: Comparison) -> str:
    name = "gain" if comparison.difference >= 0 else "loss"
    if comparison.verdict == "shown":
        return f"A {name} is shown: {comparison.reason}."
    if comparison.verdict == "hint":
        return f"That hints at a {name} but does not show it: {comparison.reason}."
    return f"A {name} is not shown: {comparison.reason}."


def _several_budgets(found: Sequence[Comparison], names: Mapping[Start, str]) -> str:
    first = found[0]
    parts = [
        f"{signed(c.difference)} with {budget_title(c.ours.key, c.ours.labelled_images)} ({c.verdict})" for c in found
    ]
    name = names[first.ours.key.start]
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
    steps = _steps(first).replace(" and", ", both with")
    return f"{name[0].upper()}{name[1:]} against {_other(first, names)}{steps}, in points of AP: {listed}."


def _steps(comparison: Comparison) -> str:
    steps = comparison.ours.key.start.steps
    same = steps == comparison.other.key.start.steps
    return f" and {steps:,} steps of fine-tuning" if same and steps else ""


def _other(comparison: Comparison, names: Mapping[Start, str]) -> str:
    other = names[comparison.other.key.start]
    mine, theirs = comparison.ours.key.start.steps, comparison.other.key.start.steps
    if mine == theirs or not mine or not theirs:
        return other
    times = f"{theirs / mine:.2g} times as long" if theirs > mine else f"for {theirs / mine:.0%} of the time"
    return f"{other} fine-tuned {times} ({theirs:,} steps)"


def _with_other(comparison: Comparison, names: Mapping[Start, str]) -> str:
    return f"{'from' if comparison.other.key.start.method == 'scratch' else 'with'} {_other(comparison, names)}"


# Settings that say where something is or how fast it runs, not what is learned.
_HARMLESS = {"seed", "out", "name", "resume", "device", "workers", "num_workers", "log_every"}
_HARMLESS |= {"checkpoint_every", "keep_checkpoints", "max_unreadable"}


def doubts(groups: Sequence[Group], labels: Mapping[Start, str]) -> list[str]:
    """What weakens the numbers: named once each, so that nobody has to find out later."""
    notes = []
    for start in dict.fromkeys(group.key.start for group in groups if group.key.start.method != "scratch"):
        sources = [str(run.start.get("from")) for group in groups if group.key.start == start for run in group.runs]
        if len(sources) > 1 and len(set(sources)) == 1:
            notes.append(
                f"{labels[start]}: the {len(sources)} runs start from one pretrained checkpoint "
                f"({sources[0]}), so "
                "the spread shows the luck of fine-tuning, not of pretraining."
            )
    for group in groups:
        runs, where = (
            group.runs,
            f"{labels[group.key.start]}, {budget_title(group.key, group.labelled_images)}",
        )
        seeds = [run.seed for run in runs]
        twice = sorted({seed for seed in seeds if seed is not None and seeds.count(seed) > 1})
        if twice:
            notes.append(f"{where}: seed {', '.join(map(str, twice))} occurs more than once; paired by its mean.")
        differing = {key for key in differing_settings(runs) if not _harmless(key)}
        if differing:
            notes.append(
                f"{where}: its runs differ in more than the seed ({', '.join(sorted(differing))}), so the "
                "spread "
                "is not one of seeds alone."
            )
    trained_on = {str(run.data.get("train")) for group in groups for run in group.runs}
    if len(trained_on) > 1:
        notes.append(f"The runs were fine-tuned on different files: {', '.join(sorted(trained_on))}.")
    return notes + _different_labels(groups)


def _different_labels(groups: Sequence[Group]) -> list[str]:
    """Pairing by seed means little when equal seeds were given different labelled images."""
    notes = []
    by_budget: dict[tuple[str, int], list[Run]] = {}
    for group in groups:
        for run in group.runs:
            if run.seed is not None and run.label_ids is not None:
                by_budget.setdefault((group.key.budget, run.seed), []).append(run)
    for (budget, seed), runs in by_budget.items():
        if len({run.label_ids for run in runs}) > 1:
            notes.append(
                f"Label budget {budget}, seed {seed}: the runs were given different labelled images "
                f"({', '.join(run.name for run in runs)}), so pairing them by seed is weak."
            )
    return notes


def differing_settings(runs: Sequence[Run]) -> set[str]:
    """Dotted settings in which ``runs`` are not all equal."""
    configs = [run.config for run in runs]
    keys = {key for config in configs for key in config}
    return {key for key in keys if len({repr(config.get(key)) for config in configs}) > 1}


def _harmless(key: str) -> bool:
    return key.split(".")[-1] in _HARMLESS
