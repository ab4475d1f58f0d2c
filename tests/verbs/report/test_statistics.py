from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from headstart.verbs.report import words
from headstart.verbs.report.runs import Evaluation, GroupKey, Run, Start, start_labels, start_names
from headstart.verbs.report.statistics import Group, compare, comparisons, group_runs, spread

DETECTOR = '{"name": "faster_rcnn"}'


def group(
    values: dict[int, float], method: str = "scratch", steps: int = 300, budget: str = "10", **more: int
) -> Group:
    start = {"method": method, "pretrain_steps": 600 * (method != "scratch"), "from": f"runs/{method}"}
    runs, evaluations = [], []
    for seed, value in values.items():
        record = {
            "kind": "finetune",
            "name": f"{method}-{seed}",
            "seed": seed,
            "config": {"detector": {"name": "faster_rcnn"}, **more},
            "start": start,
            "labels": {"budget": budget, "images": int(budget)},
            "summary": {"steps": steps},
        }
        runs.append(Run(Path("run"), "finetune", "finished", record, log=[]))
        evaluations.append(Evaluation(Path("eval.json"), "val.json", 9, {"bbox": {"AP": value}}, {}, None))
    return Group(runs[0].key, runs, evaluations)


def three(*values: float, **more: object) -> Group:
    return group(dict(enumerate(values)), **more)  # type: ignore[arg-type]


def test_spread_is_the_sample_standard_deviation() -> None:
    values = spread([0.1, 0.4, 0.3])
    assert values is not None
    assert values.mean == pytest.approx(np.mean([0.1, 0.4, 0.3]))
    assert values.std == pytest.approx(np.std([0.1, 0.4, 0.3], ddof=1))
    assert (values.n, values.low, values.high) == (3, 0.1, 0.4)
    assert spread([0.2]).std is None  # type: ignore[union-attr]
    assert spread([]) is None


def sign_flip_probability(n: int) -> float:
    """By counting: how often do n fair coins all agree?"""
    outcomes = list(itertools.product([-1, 1], repeat=n))
    return sum(len(set(outcome)) == 1 for outcome in outcomes) / len(outcomes)


def separation_probability(n: int, m: int) -> float:
    """By counting: how often does a random split of n + m ranks leave two ranges apart?"""
    splits = list(itertools.combinations(range(n + m), n))
    apart = [s for s in splits if max(s) < min(set(range(n + m)) - set(s), default=n + m) or min(s) >= m]
    return len(apart) / len(splits)


def test_ranges_apart_are_shown_with_the_probability_of_a_permutation() -> None:
    found = compare(three(0.40, 0.42, 0.41, method="soco"), three(0.30, 0.39, 0.35))
    assert found is not None
    assert found.verdict == "shown"
    assert found.luck == pytest.approx(separation_probability(3, 3)) == pytest.approx(0.1)
    assert found.difference == pytest.approx(0.41 - 0.3466667, abs=1e-6)
    assert "ranges do not overlap" in found.reason


@pytest.mark.parametrize(("n", "verdict"), [(3, "hint"), (4, "hint"), (5, "shown"), (6, "shown")])
def test_pairs_that_point_one_way_need_numbers(n: int, verdict: str) -> None:
    base = [0.20 + 0.05 * i for i in range(n)]
    found = compare(three(*(v + 0.01 for v in base), method="soco"), three(*base))
    assert found is not None
    assert (found.verdict, found.apart) == (verdict, False)
    assert found.luck == pytest.approx(sign_flip_probability(n))
    assert found.paired == pytest.approx([0.01] * n)


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ({0: 0.9}, {0: 0.1}),  # one seed shows no spread
        ({0: 0.9, 1: 0.8}, {0: 0.1, 1: 0.1}),  # two agree half of the time
        ({0: 0.9, 1: 0.8}, {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1}),
        ({0: 0.30, 1: 0.36, 2: 0.33}, {0: 0.31, 1: 0.32, 2: 0.35}),  # inside the noise
        ({0: 0.3, 1: 0.3, 2: 0.3}, {0: 0.3, 1: 0.3, 2: 0.3}),  # equal
        ({0: 0.35, 1: 0.31, 2: 0.4}, {5: 0.32, 6: 0.36, 7: 0.29}),  # nothing to pair, overlapping
    ],
)
def test_no_winner_inside_the_noise(ours: dict[int, float], other: dict[int, float]) -> None:
    for a, b in ((ours, other), (other, ours)):
        found = compare(group(a, method="soco"), group(b))
        assert found is not None
        assert found.verdict == "not shown"
        assert found.luck is None


def test_noise_alone_is_rarely_shown() -> None:
    """Both sides from one distribution: by the rule at most about LUCK of the comparisons may be shown."""
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(2000):
        a, b = rng.normal(0.3, 0.02, (2, 3))
        found = compare(three(*a, method="soco"), three(*b))
        assert found is not None
        verdicts.append(found.verdict)
    assert 0.07 < verdicts.count("shown") / 2000 < 0.13


def test_a_loss_is_shown_as_well() -> None:
    ours, other = three(0.2, 0.21, 0.22, method="soco"), three(0.3, 0.31, 0.32)
    (found,) = comparisons([other, ours])
    assert (found.verdict, found.difference) == ("shown", pytest.approx(-0.1))
    names = start_names([ours.key.start, other.key.start])
    (sentence,) = words.findings([other, ours], [found], names)
    assert "SoCo reaches 21.0 AP against 31.0 from scratch: 10.0 points less. A loss is shown" in sentence


def test_a_seed_that_ran_twice_counts_once() -> None:
    twice = three(0.40, 0.50, 0.60, method="soco")
    twice.runs.append(twice.runs[0])
    twice.evaluations.append(twice.evaluations[1])
    assert twice.by_seed("AP") == {0: pytest.approx(0.45), 1: 0.5, 2: 0.6}
    found = compare(twice, three(0.1, 0.1, 0.1))
    assert found is not None
    assert found.luck == pytest.approx(0.1)
    assert any("occurs more than once" in doubt for doubt in words.doubts([twice], {twice.key.start: "SoCo"}))


def test_same_schedule_comes_before_longer_schedules_and_other_budgets_are_never_compared() -> None:
    short, long = three(0.3, 0.31, 0.32), three(0.35, 0.4, 0.38, steps=900)
    ours, elsewhere = three(0.36, 0.38, 0.4, method="soco"), three(0.5, 0.5, 0.5, budget="25")
    found = comparisons([long, elsewhere, short, ours])
    assert [(c.ours, c.other) for c in found] == [(ours, short), (ours, long)]


def test_methods_are_compared_once_and_with_equal_schedules_only() -> None:
    soco, adept = three(0.3, 0.3, 0.3, method="soco"), three(0.4, 0.4, 0.4, method="adept")
    longer = three(0.4, 0.4, 0.4, method="adept", steps=900)
    pairs = [(c.ours.key.start.method, c.other.key.start.method) for c in comparisons([soco, adept, longer])]
    assert pairs == [("adept", "soco")]


def test_words_for_several_budgets() -> None:
    groups = [
        three(0.20, 0.21, 0.22),
        three(0.30, 0.31, 0.33, method="soco"),
        three(0.28, 0.29, 0.30, budget="25"),
        three(0.29, 0.28, 0.33, method="soco", budget="25"),
    ]
    names = start_names(list(dict.fromkeys(g.key.start for g in groups)))
    sentences = words.findings(groups, comparisons(groups), names)
    assert sentences[0] == (
        "SoCo against scratch, both with 300 steps of fine-tuning, in points of AP: "
        "+10.3 with 10 labelled images (shown) and +1.0 with 25 labelled images (not shown)."
    )
    assert len(sentences) == 1  # no labels saved by means alone: where the noise is larger they are nothing


def test_what_cannot_be_said_is_said() -> None:
    scratch, soco = three(0.3, 0.3, 0.3), three(0.4, 0.4, 0.4, method="soco")
    names = start_names([scratch.key.start, soco.key.start])
    assert "nothing can be said about pretraining" in words.findings([scratch], [], names)[0]
    assert "No run from scratch" in words.findings([soco], [], names)[0]
    other_length = three(0.3, 0.3, 0.3, steps=900)
    names = start_names([other_length.key.start, soco.key.start])
    found = words.findings([other_length, soco], comparisons([other_length, soco]), names)
    assert "3 times as long (900 steps)" in found[0]
    assert "schedules too" in found[1]


def test_doubts_name_hidden_differences() -> None:
    groups = [three(0.3, 0.3, 0.3, method="soco"), three(0.3, 0.4, 0.3)]
    groups[0].runs[1].record["config"] = {"detector": {"name": "faster_rcnn"}, "optim": {"lr": 0.1}}
    for i, run in enumerate(groups[0].runs + groups[1].runs):
        run.label_ids = ("a.jpg",) if i != 5 else ("b.jpg",)
    doubts = words.doubts(groups, start_labels([g.key.start for g in groups]))
    assert any("one pretrained checkpoint" in doubt for doubt in doubts)
    assert any("optim.lr" in doubt for doubt in doubts)
    assert any("seed 2" in doubt and "different labelled images" in doubt for doubt in doubts)


def test_seed_and_place_are_no_difference() -> None:
    groups = [three(0.3, 0.3, 0.3)]
    for i, run in enumerate(groups[0].runs):
        run.record["config"] = {"detector": {"name": "faster_rcnn"}, "seed": i, "out": f"runs/{i}"}
    assert words.doubts(groups, {groups[0].key.start: "scratch"}) == []


def test_groups_differ_in_anything_but_the_seed() -> None:
    sources = [
        three(0.3, 0.3),
        three(0.3, 0.3, method="soco"),
        three(0.3, 0.3, steps=900),
        three(0.3, 0.3, budget="25"),
    ]
    pairs = [(r, e) for g in sources for r, e in zip(g.runs, g.evaluations, strict=True)]
    groups = group_runs(pairs[::-1])
    order = [(g.key.budget, g.key.start.method, g.key.start.steps) for g in groups]
    assert order == [
        ("10", "scratch", 300),
        ("10", "scratch", 900),
        ("10", "soco", 300),
        ("25", "scratch", 300),
    ]
    assert all([run.seed for run in g.runs] == [0, 1] for g in groups)


def test_names_say_what_differs_and_no_more() -> None:
    wide = '{"fpn_channels": 256, "name": "faster_rcnn"}'
    narrow = '{"fpn_channels": 64, "name": "faster_rcnn"}'
    a, b = Start("scratch", 0, DETECTOR, 300), Start("soco", 600, DETECTOR, 300)
    assert list(start_labels([a, b]).values()) == ["scratch", "SoCo"]
    c = Start("soco", 1200, DETECTOR, 900)
    assert start_labels([a, b, c])[c] == "SoCo (1,200 steps), 900 steps"
    d, e = Start("soco", 600, wide, 300), Start("soco", 600, narrow, 300)
    assert list(start_names([d, e]).values()) == ["SoCo, fpn_channels 256", "SoCo, fpn_channels 64"]


def test_budgets_keep_their_unit() -> None:
    key = GroupKey(Start("scratch", 0, DETECTOR, 1), "10%")
    assert words.budget_title(key, 82) == "82 labelled images (10%)"
    assert words.budget_title(key, None) == "label budget 10%"
    assert words.budget_title(GroupKey(key.start, "1"), 1) == "1 labelled image"


def test_small_differences_do_not_become_zero() -> None:
    assert (words.signed(0.0003), words.signed(-0.021)) == ("+0.03", "−2.1")
    assert not math.isnan(spread([0.1, 0.1]).std)  # type: ignore[union-attr, arg-type]
