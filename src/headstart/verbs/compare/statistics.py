"""What a table of AP values allows to say: which way of starting is better, and how many labels it saves.

A table is ``scores[start][labelled images][seed] -> AP`` in 0..1. Equal (images, seed) means the same labelled images
and the same random numbers for every start, and cells of different (images, seed) are drawn independently of each
other (:func:`headstart.verbs.compare.plan.cell_seed`). So the differences of two starts are one pair a cell, and if the
start made no difference, each of them would have either sign with equal chance: the sign-flip test is exact, whatever
the distribution of AP. It tests the mean over label budgets of the differences; with every pair of starts that is
compared, it is corrected by Holm's method, and by Bonferroni's for each time that was looked (``--stop-early``), so
that the chance of one wrong claim or more in the whole comparison is at most ``LEVEL``.

Bands and intervals describe; they are Student's, of single means, and corrected for nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from scipy.special import stdtrit  # Student's quantiles

Scores = Mapping[str, Mapping[int, Mapping[int, float]]]

LEVEL = 0.05
MIN_SEEDS = 3  # as in the report: with fewer there is no verdict
EXACT = 14  # pairs up to which all patterns of signs are tried; beyond, as many random ones
DRAWS = 2000  # of the bootstrap
GAIN = 0.01  # AP that pretraining is worth having for: a point
POWER = 0.8  # chance of showing it, that more seeds are counted for
MOST_SEEDS = 50  # nobody is told to run more
FEWER, MORE = 0.0, math.inf  # labels needed: outside of the budgets that were tried
UNFINISHED = "runs are missing"  # why there is no verdict before all that was planned is there
RULE = (
    "Every way of starting was fine-tuned on the same labelled images, with the same seeds and schedule, so runs are "
    "compared in pairs. A difference is shown when the mean over label budgets of the paired differences is unlikely "
    "by luck alone: exact sign-flip test, two-sided, at least 3 seeds, corrected by Holm's method for all pairs of "
    "starts, and for each time --stop-early looked, or seeds were added after a verdict. The chance of any wrong claim "
    "in this answer is at most 5%, and that of one on types of error too, which are tested in the same way. Labels "
    "saved are read off the baseline's mean AP, made monotone and interpolated on the logarithm of labels, never "
    "beyond the budgets that were tried; they are shown where a gain is, the two 95% bands do not overlap, and the "
    "bootstrap interval over seeds does not reach down to the labels given. Seeds vary the labelled images, new "
    "weights and training, not the pretraining, which was run once."
)


@dataclass(frozen=True)
class Band:
    """Mean AP over seeds and Student's 95% interval of it, which one seed does not have."""

    start: str
    images: int
    seeds: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Gap:
    """``ours`` minus ``other`` with so many labelled images, over common seeds."""

    images: int
    seeds: int
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Contrast:
    """``ours`` minus ``other`` in AP (0..1), mean over label budgets; ``luck`` is corrected for all there is."""

    ours: str
    other: str
    difference: float
    low: float | None
    high: float | None
    pairs: int
    luck: float | None  # None: no verdict is possible
    verdict: Literal["better", "worse", "not shown"]
    reason: str
    gaps: tuple[Gap, ...]


@dataclass(frozen=True)
class Saved:
    """Labels that the baseline needs for the AP that ``start`` reaches with ``images``.

    ``needed`` and its 95% interval: a number of images, or ``FEWER`` (than the smallest budget), ``MORE`` (than the
    largest). ``low`` and ``high`` are None with one seed.
    """

    start: str
    images: int
    ap: float
    needed: float
    low: float | None
    high: float | None
    shown: bool
    reason: str  # why it is not shown


@dataclass(frozen=True)
class Outlook:
    """What is still possible where no gain is shown.

    ``most``: the mean gain in AP is less, with a chance of 5% at most that this is wrong for any of the starts; None
    with too few seeds. ``seeds``: about as many would show a gain of ``GAIN``, if there is one, with a chance of
    ``POWER``; None: more than ``MOST_SEEDS``, or not known.
    """

    start: str
    most: float | None
    seeds: int | None


@dataclass(frozen=True)
class Answer:
    """All that may be said. ``winner``: the start that is shown to be better than every other.

    ``final``: nothing is missing. Before that there is no verdict: luck would be counted more often than it is told.
    """

    baseline: str
    looks: int
    final: bool
    bands: tuple[Band, ...]
    contrasts: tuple[Contrast, ...]  # against the baseline first
    saved: tuple[Saved, ...]
    outlooks: tuple[Outlook, ...]
    winner: str | None

    def against_baseline(self) -> list[Contrast]:
        return [c for c in self.contrasts if c.other == self.baseline]

    @property
    def clear(self) -> bool:
        """Whether of every start it is shown how it does against the baseline."""
        return all(c.verdict != "not shown" for c in self.against_baseline())


def answer(scores: Scores, baseline: str, looks: int = 1, final: bool = True) -> Answer:
    """
    Args:
        looks: how often verdicts are looked at, at most, as runs are added.
        final: whether these are all the runs that this look was to have.
    """
    others = [start for start in scores if start != baseline]
    found = contrasts(scores, baseline, looks)
    if not final:
        found = [replace(c, luck=None, verdict="not shown", reason=UNFINISHED) for c in found]
    bands = tuple(
        Band(start, images, len(seeds), *interval(list(seeds.values())))
        for start, budgets in scores.items()
        for images, seeds in sorted(budgets.items())
        if seeds
    )
    helps = {c.ours for c in found if c.other == baseline and c.verdict == "better"}
    saved = tuple(s for start in others for s in labels_saved(scores, start, baseline, start in helps))
    if not final:
        saved = tuple(replace(s, shown=False, reason=UNFINISHED) for s in saved)
    open_ = [c for c in found if c.other == baseline and c.verdict == "not shown"] if final else []
    outlooks = tuple(outlook(scores, c, len(others), len(found), looks) for c in open_)
    beaten = {start: {c.other for c in found if c.ours == start and c.verdict == "better"} for start in scores}
    for c in found:
        if c.verdict == "worse":
            beaten[c.other].add(c.ours)
    winner = next((start for start in scores if others and beaten[start] == scores.keys() - {start}), None)
    return Answer(baseline, looks, final, bands, tuple(found), saved, outlooks, winner)


def outlook(scores: Scores, contrast: Contrast, starts: int, tests: int, looks: int) -> Outlook:
    """Of one of so many ``starts``, which took ``tests`` against each other and the baseline."""
    table = list(differences(scores, contrast.ours, contrast.other).values())
    if min(map(len, table)) < MIN_SEEDS:
        return Outlook(contrast.ours, None, None)
    _, _, most = mean_of_means(table, 2 * LEVEL / (starts * looks))
    return Outlook(contrast.ours, most, seeds_for(table, tests, looks + 1))


def seeds_for(groups: Sequence[np.ndarray], tests: int, looks: int) -> int | None:
    """Seeds that show a mean difference of ``GAIN`` with a chance of ``POWER``, given how these pairs scatter.

    The gain is one that would matter, not the one observed, whose luck would be counted on a second time. As for a
    t-test, which the sign-flip test nearly is; the scatter is itself an estimate of few pairs, so this is a rough one.
    """
    scatter = math.sqrt(sum(float(group.var(ddof=1)) for group in groups)) / len(groups)
    for seeds in range(MIN_SEEDS, MOST_SEEDS + 1):
        freedom = len(groups) * (seeds - 1)
        quantiles = stdtrit(freedom, 1 - LEVEL / (2 * tests * looks)) + stdtrit(freedom, POWER)
        enough = seeds * len(groups) >= pairs_needed(tests, looks)
        if enough and quantiles * scatter / math.sqrt(seeds) <= GAIN:
            return seeds
    return None


def differences(scores: Scores, ours: str, other: str) -> dict[int, np.ndarray]:
    """Labelled images -> (seeds that both have,) paired differences."""
    found = {}
    for images in sorted(scores[ours].keys() & scores[other].keys()):
        a, b = scores[ours][images], scores[other][images]
        common = sorted(a.keys() & b.keys())
        if common:
            found[images] = np.array([a[seed] - b[seed] for seed in common])
    return found


def contrasts(scores: Scores, baseline: str, looks: int = 1) -> list[Contrast]:
    """Each start against the baseline, then each two of the others; nothing of two that have no cell in common."""
    others = [start for start in scores if start != baseline]
    couples = [(start, baseline) for start in others] + [(b, a) for a, b in combinations(others, 2)]
    tables = {couple: differences(scores, *couple) for couple in couples}
    tables = {couple: table for couple, table in tables.items() if table}
    lucks = {couple: chance(table) for couple, table in tables.items()}
    tested = [couple for couple, luck in lucks.items() if luck is not None]
    corrected = dict(zip(tested, holm([lucks[c] or 0.0 for c in tested]), strict=True))
    found = []
    for couple, table in tables.items():
        mean, low, high = mean_of_means(list(table.values()))
        n = sum(map(len, table.values()))
        luck = min(1.0, looks * corrected[couple]) if couple in corrected else None
        gaps = tuple(Gap(images, len(d), *interval(d)) for images, d in table.items())
        verdict: Literal["better", "worse", "not shown"] = "not shown"
        if luck is not None and luck <= LEVEL + 1e-12 and mean != 0:
            verdict = "better" if mean > 0 else "worse"
        reason = _reason(table, mean, luck, len(tested), looks)
        found.append(Contrast(*couple, mean, low, high, n, luck, verdict, reason, gaps))
    return found


def chance(table: Mapping[int, np.ndarray]) -> float | None:
    """Chance of so large a mean over budgets by luck alone; None where a budget has too few seeds to say."""
    if min(map(len, table.values())) < MIN_SEEDS:
        return None
    return sign_flip(np.concatenate([d / len(d) for d in table.values()]))


def _reason(table: Mapping[int, np.ndarray], mean: float, luck: float | None, tests: int, looks: int) -> str:
    every = np.concatenate(list(table.values()))
    if luck is None:
        fewest = min(map(len, table.values()))
        return f"only {fewest} seed{'s' * (fewest > 1)} to compare; at least {MIN_SEEDS} are needed"
    needed = pairs_needed(tests, looks)
    if luck > LEVEL and len(every) < needed:
        seeds = math.ceil(needed / len(table))
        return f"{len(every)} pairs are too few to show anything here; it takes {needed}, so {seeds} seeds"
    same_way = int((every * np.sign(mean) > 0).sum())
    odds = "more often than not" if luck > 0.5 else f"1 time in {round(1 / luck):,}"
    return f"{same_way} of {len(every)} pairs point this way; luck alone would do as much {odds}"


def pairs_needed(tests: int, looks: int = 1) -> int:
    """Pairs below which even differences that all point one way would not show anything, with so many tests."""
    return math.ceil(1 + math.log2(tests * looks / LEVEL) - 1e-9)


@functools.lru_cache
def _signs(n: int) -> np.ndarray:
    """(patterns, n) of -1 and 1: all with a first 1, which are as good as all, or random ones behind the real one."""
    if n <= EXACT:
        bits = np.arange(2 ** (n - 1))[:, None] >> np.arange(n)[None, :] & 1
        return 1.0 - 2.0 * np.roll(bits, 1, axis=1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(2**EXACT, n))
    signs[0] = 1
    return signs


def sign_flip(values: np.ndarray) -> float:
    """Two-sided chance that signs drawn by luck make a sum as far from zero as that of ``values`` (n,)."""
    if not len(values):
        return 1.0
    sums = np.abs(_signs(len(values)) @ values)
    return float((sums >= abs(values.sum()) - 1e-12).mean())


def holm(lucks: Sequence[float]) -> list[float]:
    """Each corrected for being one of so many (Holm, 1979)."""
    adjusted, worst = [0.0] * len(lucks), 0.0
    for rank, i in enumerate(sorted(range(len(lucks)), key=lambda i: lucks[i])):
        worst = max(worst, (len(lucks) - rank) * lucks[i])
        adjusted[i] = min(1.0, worst)
    return adjusted


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float | None, float | None]:
    """Mean, and Student's 95% interval of it."""
    return mean_of_means([np.asarray(values, np.float64)])


def mean_of_means(groups: Sequence[np.ndarray], level: float = LEVEL) -> tuple[float, float | None, float | None]:
    """The mean over groups of their means, and Student's interval of it (Welch and Satterthwaite's), 95% or other."""
    mean = float(np.mean([group.mean() for group in groups]))
    if min(map(len, groups)) < 2:
        return mean, None, None
    parts = np.array([group.var(ddof=1) / len(group) for group in groups])
    if not parts.any():
        return mean, mean, mean
    freedom = parts.sum() ** 2 / (parts**2 / [len(group) - 1 for group in groups]).sum()
    half = float(stdtrit(freedom, 1 - level / 2) * np.sqrt(parts.sum()) / len(groups))
    return mean, mean - half, mean + half


def monotone(means: np.ndarray) -> np.ndarray:
    """The nearest curves that never fall (least squares), for ``means`` (..., budgets)."""
    n = means.shape[-1]
    total = np.concatenate([np.zeros((*means.shape[:-1], 1)), np.cumsum(means, -1)], -1)
    fitted = np.empty_like(means)
    for k in range(n):
        lowest = [
            np.min([(total[..., j + 1] - total[..., i]) / (j + 1 - i) for j in range(k, n)], axis=0)
            for i in range(k + 1)
        ]
        fitted[..., k] = np.max(lowest, axis=0)
    return fitted


def labels_needed(budgets: Sequence[int], curves: np.ndarray, ap: np.ndarray) -> np.ndarray:
    """Labels at which each monotone curve (draws, budgets) first reaches ``ap`` (draws,), on the logarithm of labels.

    ``FEWER`` where it starts above, ``MORE`` where it never gets there: nothing is extrapolated.
    """
    logs = np.log(np.asarray(budgets, np.float64))
    reached = curves >= ap[:, None]
    right = reached.argmax(axis=1)
    left = np.maximum(right - 1, 0)
    rows = np.arange(len(curves))
    low, high = curves[rows, left], curves[rows, right]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(high > low, (ap - low) / (high - low), 0.0)
    needed = np.exp(logs[left] + share * (logs[right] - logs[left]))
    needed[(right == 0) & (low > ap)] = FEWER
    needed[~reached.any(axis=1)] = MORE
    return needed


def redrawn(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, S) means of ``values`` (S, seeds): a bootstrap over seeds that stays honest when there are few.

    Every seed's deviations get one random multiplier for all S starts, so that pairs stay pairs. Multipliers are
    normal, divided as Student's t is: drawing seeds again with replacement would make 3 seeds look too much alike.
    """
    n = values.shape[1]
    mean = values.mean(axis=1)
    widened = np.sqrt((n - 1) / rng.chisquare(n - 1, (count, 1)))
    multipliers = widened * rng.standard_normal((count, n)) / math.sqrt(n * (n - 1))
    return mean + multipliers @ (values - mean[:, None]).T


def labels_saved(scores: Scores, start: str, baseline: str, helps: bool = True) -> list[Saved]:
    """For each label budget of ``start``; nothing where the baseline has fewer than two budgets in common."""
    tables = {}
    for images in sorted(scores[start].keys() & scores[baseline].keys()):
        seeds = sorted(scores[start][images].keys() & scores[baseline][images].keys())
        if seeds:
            tables[images] = np.array([[scores[s][images][seed] for seed in seeds] for s in (start, baseline)])
    budgets = list(tables)
    if len(budgets) < 2:
        return []
    ours, theirs = np.array([table.mean(axis=1) for table in tables.values()]).T
    needed = [float(labels_needed(budgets, monotone(theirs)[None], ours[i : i + 1])[0]) for i in range(len(budgets))]
    lows: list[float | None] = [None] * len(budgets)
    highs: list[float | None] = [None] * len(budgets)
    if min(table.shape[1] for table in tables.values()) > 1:
        rng = np.random.default_rng(0)
        draws = np.stack([redrawn(table, DRAWS, rng) for table in tables.values()])  # (budgets, draws, 2)
        curves = monotone(draws[..., 1].T)
        for i in range(len(budgets)):
            drawn = labels_needed(budgets, curves, draws[i, :, 0])
            lows[i], highs[i] = (_quantile(drawn, q) for q in (LEVEL / 2, 1 - LEVEL / 2))
    found = []
    for i, (images, table) in enumerate(tables.items()):
        _, our_low, _ = interval(table[0])
        _, _, their_high = interval(table[1])
        low = lows[i]
        reason = ""
        if our_low is None or their_high is None or low is None:
            reason = "one seed has no band"
        elif our_low <= their_high:
            reason = "the bands overlap"
        elif not helps:
            reason = "no gain is shown"
        elif low <= images:
            reason = "its interval reaches down to the labels given"
        found.append(Saved(start, images, float(ours[i]), needed[i], low, highs[i], not reason, reason))
    return found


def _quantile(values: np.ndarray, share: float) -> float:
    return float(np.quantile(values, share, method="inverted_cdf"))  # one of the values: they may be infinite
