"""Groups of seeds, their spread, and what may be said about a difference between two of them.

The rule, which the report prints beside its verdicts. Few seeds allow few claims, so only two patterns count:

- paired: with the same seeds on both sides, every difference points the same way. By luck alone that happens
  with probability 2 / 2^n for n pairs (sign-flip test, two-sided).
- apart: the lowest value of one side is above the highest of the other. By luck alone: 2 / C(n + m, n)
  (permutation test, two-sided).

"shown" needs one of them with a probability of at most ``LUCK``; a pattern that is likelier than that (three
or four pairs which all point one way) is a "hint"; everything else is "not shown". Exact, and no normal
distribution is assumed; with many comparisons in one report some will pass by luck.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headstart.verbs.report.runs import Evaluation, GroupKey, Run

LUCK = 0.10
RULE = (
    "“Shown” needs at least 3 seeds on each side and one of two patterns: with the same seeds on both sides, "
    "every difference points the same way; or the two ranges of values do not overlap. And the pattern "
    "must be "
    "unlikely by luck alone, at most 1 in 10 (exact sign-flip and permutation tests, two-sided). A pattern "
    "likelier than that is a “hint”. Everything else is “not shown”, which does not mean that there is no "
    "difference. Each comparison stands alone: among many, some will pass by luck."
)


@dataclass
class Group:
    """Runs that differ in their seed only, with the evaluation of each on one data set."""

    key: GroupKey
    runs: list[Run]
    evaluations: list[Evaluation]

    def values(self, metric: str, iou_type: str = "bbox") -> list[float]:
        """Defined values in 0..1, in the order of the runs."""
        found = (e.metrics.get(iou_type, {}).get(metric) for e in self.evaluations)
        return [value for value in found if value is not None]

    def by_seed(self, metric: str, iou_type: str = "bbox") -> dict[int, float]:
        """Mean value by seed; a seed that was run twice still counts once."""
        collected: dict[int, list[float]] = {}
        for run, evaluation in zip(self.runs, self.evaluations, strict=True):
            value = evaluation.metrics.get(iou_type, {}).get(metric)
            if value is not None and run.seed is not None:
                collected.setdefault(run.seed, []).append(value)
        return {seed: statistics.fmean(values) for seed, values in collected.items()}

    @property
    def labelled_images(self) -> int | None:
        counts = {run.labelled_images for run in self.runs} - {None}
        return counts.pop() if len(counts) == 1 else None


@dataclass(frozen=True)
class Spread:
    n: int
    mean: float
    std: float | None  # sample standard deviation; None for a single value
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """``ours`` minus ``other``, in AP (0..1)."""

    ours: Group
    other: Group
    difference: float
    paired: tuple[float, ...]  # by seed, for the seeds both sides have
    apart: bool
    luck: float | None  # probability of the pattern by luck alone; None without a pattern
    verdict: Literal["shown", "hint", "not shown"]
    reason: str


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), std, min(values), max(values))


def compare(ours: Group, other: Group, metric: str = "AP", iou_type: str = "bbox") -> Comparison | None:
    """None when a side has no value at all."""
    a, b = ours.by_seed(metric, iou_type), other.by_seed(metric, iou_type)
    if not a or not b:
        return None
    seeds = sorted(a.keys() & b.keys())
    paired = tuple(a[seed] - b[seed] for seed in seeds)
    balanced = len(seeds) >= 3
    difference = statistics.fmean(paired) if balanced else statistics.fmean(a.values()) - statistics.fmean(b.values())
    one_way = bool(paired) and (min(paired) > 0 or max(paired) < 0)
    apart = min(a.values()) > max(b.values()) or max(a.values()) < min(b.values())
    if min(len(a), len(b)) < 3:
        fewest = min(len(a), len(b))
        reason = f"only {fewest} seed{'s' * (fewest > 1)} on one side; at least 3 are needed"
        return Comparison(ours, other, difference, paired, apart, None, "not shown", reason)

    chances = {}
    if one_way and balanced:
        chances[f"all {len(paired)} paired seeds point the same way"] = 2 / 2 ** len(paired)
    if apart:
        chances["the ranges do not overlap"] = 2 / math.comb(len(a) + len(b), len(a))
    if not chances:
        reason = "the seeds do not agree on a direction" if balanced else "the ranges overlap"
        return Comparison(ours, other, difference, paired, apart, None, "not shown", reason)
    pattern, luck = min(chances.items(), key=lambda item: item[1])
    verdict: Literal["shown", "hint"] = "shown" if luck <= LUCK + 1e-12 else "hint"
    reason = f"{pattern}, which luck alone would bring about 1 time in {round(1 / luck)}"
    return Comparison(ours, other, difference, paired, apart, luck, verdict, reason)


def comparisons(groups: Sequence[Group]) -> list[Comparison]:
    """Pretrained against scratch at equal label budget, equal schedule first; then method against method."""
    found = []
    for ours in groups:
        if ours.key.start.method == "scratch":
            continue
        others = [g for g in groups if g is not ours and comparable(ours, g)]
        for other in sorted(others, key=lambda g: (g.key.start.method != "scratch", not same_length(ours, g))):
            if other.key.start.method == "scratch" or (
                same_length(ours, other) and groups.index(ours) > groups.index(other)
            ):
                comparison = compare(ours, other)
                if comparison is not None:
                    found.append(comparison)
    return found


def comparable(a: Group, b: Group) -> bool:
    return a.key.budget == b.key.budget and a.key.start.detector == b.key.start.detector


def same_length(a: Group, b: Group) -> bool:
    return a.key.start.steps == b.key.start.steps


def group_runs(pairs: Sequence[tuple[Run, Evaluation]]) -> list[Group]:
    """Groups in reading order: by budget, scratch before pretrained, short before long."""
    groups: dict[GroupKey, Group] = {}
    for run, evaluation in pairs:
        group = groups.setdefault(run.key, Group(run.key, [], []))
        group.runs.append(run)
        group.evaluations.append(evaluation)
    for group in groups.values():
        order = sorted(range(len(group.runs)), key=lambda i: (group.runs[i].seed is None, group.runs[i].seed))
        group.runs = [group.runs[i] for i in order]
        group.evaluations = [group.evaluations[i] for i in order]
    return sorted(groups.values(), key=lambda g: (_budget_size(g), *g.key.start.order))


def _budget_size(group: Group) -> float:
    return group.labelled_images if group.labelled_images is not None else math.inf
