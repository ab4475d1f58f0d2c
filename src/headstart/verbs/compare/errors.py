"""What a way of starting changes in the errors: AP50 that each type costs, before and after, where it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headstart.tide import MAIN
from headstart.verbs.compare.statistics import LEVEL, Scores, chance, differences, holm, mean_of_means


@dataclass(frozen=True)
class Change:
    """AP50 (0..1) that errors of one ``type`` cost, mean over label budgets: with the baseline, and with ``start``.

    ``luck`` is corrected for all types and starts; None: no verdict is possible.
    """

    start: str
    type: str
    before: float
    after: float
    difference: float
    low: float | None
    high: float | None
    luck: float | None
    shown: bool


def changes(gains: Mapping[str, Scores], baseline: str, looks: int = 1, final: bool = True) -> list[Change]:
    """By start and main type of TIDE, as :func:`headstart.verbs.compare.statistics.contrasts` does it for AP.

    A family of tests of its own: the chance of one wrong change or more that is called shown is at most ``LEVEL``.

    Args:
        gains: type -> start -> labelled images -> seed -> AP50 that would be gained without such errors.
        final: whether nothing is missing; before, no change is shown.
    """
    starts = dict.fromkeys(start for scores in gains.values() for start in scores)
    found: dict[tuple[str, str], tuple[float, Mapping[int, np.ndarray]]] = {}
    for start in (start for start in starts if start != baseline):
        for type in (type for type in MAIN if type in gains):
            scores = gains[type]
            if table := differences(scores, start, baseline):
                ours, theirs = scores[start], scores[baseline]
                means = [np.mean([v for seed, v in theirs[i].items() if seed in ours[i]]) for i in table]
                found[start, type] = float(np.mean(means)), table
    lucks = {key: chance(table) for key, (_, table) in found.items()} if final else {}
    tested = [key for key, luck in lucks.items() if luck is not None]
    corrected = dict(zip(tested, holm([lucks[key] or 0.0 for key in tested]), strict=True))
    listed = []
    for key, (before, pairs) in found.items():
        mean, low, high = mean_of_means(list(pairs.values()))
        luck = min(1.0, looks * corrected[key]) if key in corrected else None
        shown = luck is not None and luck <= LEVEL + 1e-12 and mean != 0
        listed.append(Change(*key, before, before + mean, mean, low, high, luck, shown))
    return listed
