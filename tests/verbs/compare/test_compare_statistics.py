"""Verdicts and labels saved, on tables of AP whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from headstart.verbs.compare import words
from headstart.verbs.compare.errors import changes
from headstart.verbs.compare.statistics import (
    FEWER,
    GAIN,
    LEVEL,
    MORE,
    answer,
    contrasts,
    differences,
    holm,
    interval,
    labels_needed,
    labels_saved,
    mean_of_means,
    monotone,
    outlook,
    pairs_needed,
    redrawn,
    seeds_for,
    sign_flip,
)

BUDGETS = [5, 10, 25, 50]
STARTS = ["scratch", "soco", "adept"]


def table(rng, seeds=3, budgets=BUDGETS, worth=None, starts=STARTS, sd=0.012, slope=0.08):
    """AP grows with the logarithm of labels; each start's labels count ``worth`` times. Noise of the cell is shared."""
    scores: dict = {start: {images: {} for images in budgets} for start in starts}
    for images in budgets:
        for number in range(seeds):
            shared = rng.normal(0, 0.02)
            for start in starts:
                effective = images * (worth or {}).get(start, 1.0)
                ap = 0.2 + slope * math.log(effective) + shared + rng.normal(0, sd)
                scores[start][images][1000 * images + number] = ap
    return scores


# ---- the tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_sign_flip_is_the_share_of_all_sign_patterns(n):
    values = np.random.default_rng(n).normal(0.3, 1, n)
    observed = abs(values.sum())
    patterns = [
        sum(s * v for s, v in zip(signs, values, strict=True)) for signs in itertools.product([-1, 1], repeat=n)
    ]
    assert sign_flip(values) == pytest.approx(np.mean([abs(s) >= observed - 1e-12 for s in patterns]))


def test_sign_flip_of_many_pairs_is_drawn_and_never_zero():
    values = np.random.default_rng(0).normal(0.2, 1, 40)
    normal = math.erfc(abs(values.sum()) / math.sqrt(2 * (values**2).sum()))
    assert sign_flip(values) == pytest.approx(normal, abs=0.02)
    assert 0 < sign_flip(np.ones(40)) < 1e-3
    assert sign_flip(np.zeros(4)) == 1.0


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_pairs_needed_is_where_the_smallest_chance_passes():
    for tests, looks in [(1, 1), (3, 1), (6, 4)]:
        n = pairs_needed(tests, looks)
        assert 2 / 2**n * tests * looks <= LEVEL < 2 / 2 ** (n - 1) * tests * looks


# ---- verdicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "budgets"), [(3, BUDGETS), (8, [10])])
def test_no_effect_seldom_makes_a_winner(seeds, budgets):
    rng = np.random.default_rng(3)
    found = [contrasts(table(rng, seeds, budgets), "scratch") for _ in range(600)]
    claims = [any(c.verdict != "not shown" for c in cs) for cs in found]
    # At most the nominal rate, but for the luck of the simulation itself; and not so careful that it never speaks.
    assert 0.003 < np.mean(claims) <= LEVEL + 2 * math.sqrt(LEVEL / len(claims))


def test_stopping_early_keeps_the_rate():
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(400):
        scores = table(rng, 6, [10, 25, 50], starts=STARTS[:2])
        for seeds in range(3, 7):
            until = lambda cells, seeds=seeds: {seed: ap for seed, ap in cells.items() if seed % 1000 < seeds}
            seen = {start: {images: until(cells) for images, cells in b.items()} for start, b in scores.items()}
            if contrasts(seen, "scratch", looks=4)[0].verdict != "not shown":
                wrong += 1
                break
    assert 0 < wrong / 400 <= LEVEL


def test_a_planted_effect_helps_and_saves_about_as_many_labels():
    rng = np.random.default_rng(5)
    found = [answer(table(rng, 5, worth={"soco": 2.0}), "scratch") for _ in range(60)]
    assert np.mean([a.contrasts[0].verdict == "better" for a in found]) > 0.95
    assert np.mean([a.winner == "soco" for a in found]) > 0.95
    medians = {
        images: np.median([s.needed for a in found for s in a.saved if (s.start, s.images) == ("soco", images)])
        for images in (5, 10)
    }
    assert medians[5] == pytest.approx(10, rel=0.15)
    assert medians[10] == pytest.approx(20, rel=0.15)
    assert np.mean([s.shown for a in found for s in a.saved if (s.start, s.images) == ("soco", 10)]) > 0.4
    assert not any(s.shown for a in found for s in a.saved if s.start == "adept" and a.contrasts[1].verdict != "better")


def test_a_start_that_hurts_is_said_to_hurt():
    a = answer(table(np.random.default_rng(6), 4, worth={"soco": 0.3}, starts=STARTS[:2]), "scratch")
    assert (a.contrasts[0].verdict, a.winner, a.clear) == ("worse", "scratch", True)
    assert words.sentences(a)[0].startswith("soco hurts: −")
    assert not any(s.shown for s in a.saved)


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_give_no_verdict(seeds):
    a = answer(table(np.random.default_rng(7), seeds, worth={"soco": 9.0}), "scratch")
    assert {c.verdict for c in a.contrasts} == {"not shown"}
    assert all(c.luck is None and f"only {seeds} seed" in c.reason for c in a.contrasts)
    assert a.winner is None
    assert not any(s.shown for s in a.saved)
    assert all((b.low is None) == (seeds == 1) for b in a.bands)


def test_too_few_pairs_say_how_many_it_takes():
    a = answer(table(np.random.default_rng(8), 3, [10], worth={"soco": 9.0}), "scratch")
    assert a.contrasts[0].verdict == "not shown"
    assert "3 pairs are too few" in a.contrasts[0].reason
    assert "it takes 7, so 7 seeds" in a.contrasts[0].reason
    assert a.saved == ()  # one budget: nothing to interpolate


def test_a_pair_is_of_equal_images_and_seed():
    """Whatever the order of runs, and where a seed is missing: with other pairs the luck that is shared would stay."""
    scores = {
        "scratch": {10: {3: 0.9, 1: 0.1, 2: 0.5, 7: 0.0}, 20: {4: 0.3}},
        "soco": {10: {1: 0.11, 2: 0.52, 3: 0.93, 8: 1.0}, 20: {4: 0.34}, 40: {5: 1.0}},
    }
    found = differences(scores, "soco", "scratch")
    assert list(found) == [10, 20]
    np.testing.assert_allclose(found[10], [0.01, 0.02, 0.03])
    np.testing.assert_allclose(found[20], [0.04])


def test_labels_saved_keep_pairs():
    """A start a tenth of the way up in every pair saves as much in every draw, however seeds scatter."""
    theirs = {i: {s: ap + x for s, x in enumerate([0.02, -0.03, 0.01, 0.0])} for i, ap in ((10, 0.1), (100, 0.9))}
    ours = {i: dict(reversed([(s, ap + 0.08) for s, ap in cells.items()])) for i, cells in theirs.items()}
    saved = labels_saved({"scratch": theirs, "soco": ours}, "soco", "scratch")[0]
    assert saved.needed == pytest.approx(10**1.1)
    assert 12 < saved.low < saved.needed < saved.high < 13.3


def test_a_budget_where_it_is_the_other_way_is_named():
    scores = table(np.random.default_rng(9), 4, worth={"soco": 4.0}, starts=STARTS[:2])
    scores["soco"][50] = {seed: ap - 0.03 for seed, ap in scores["scratch"][50].items()}
    (contrast,) = answer(scores, "scratch").contrasts
    assert contrast.verdict == "better"
    assert "But with 50 labelled images it is −3.0" in words.sentences(answer(scores, "scratch"))[0]


def test_unfinished_cells_are_left_out_in_pairs():
    scores = table(np.random.default_rng(10), 4, worth={"soco": 2.0}, starts=STARTS[:2])
    del scores["soco"][5][5000]
    del scores["scratch"][10][10001]
    (contrast,) = answer(scores, "scratch").contrasts
    assert contrast.pairs == 14
    assert [gap.seeds for gap in contrast.gaps] == [3, 3, 4, 4]
    assert answer({"scratch": {}, "soco": {}}, "scratch").contrasts == ()


def test_there_is_no_verdict_while_runs_are_missing():
    scores = table(np.random.default_rng(15), 5, worth={"soco": 9.0})
    assert answer(scores, "scratch").winner == "soco"
    a = answer(scores, "scratch", final=False)
    assert {(c.verdict, c.luck, c.reason) for c in a.contrasts} == {("not shown", None, "runs are missing")}
    assert a.winner is None
    assert a.outlooks == ()
    assert not any(s.shown for s in a.saved)
    (said,) = words.sentences(a, done=30, planned=60)
    assert said.startswith("No verdict yet: 30 of 60 fine-tuning runs are evaluated.")
    assert words.advice(a, {}) == ("", None)


# ---- what is still possible, and errors ----------------------------------------------------------------------------


def raised(scores, start, gain):
    scores[start] = {i: {seed: ap + gain for seed, ap in cells.items()} for i, cells in scores[start].items()}
    return scores


@pytest.mark.parametrize(("seeds", "budgets"), [(3, BUDGETS), (6, [10])])
def test_a_gain_is_seldom_ruled_out_that_is_there(seeds, budgets):
    rng = np.random.default_rng(16)
    wrong = 0
    for _ in range(400):
        scores = raised(raised(table(rng, seeds, budgets), "soco", GAIN), "adept", GAIN)
        against = [c for c in contrasts(scores, "scratch") if c.other == "scratch"]
        wrong += any(outlook(scores, c, 2, 3, 1).most < GAIN for c in against)
    assert 0 < wrong / 400 <= LEVEL + 2 * math.sqrt(LEVEL / 400)


def test_as_many_seeds_as_are_told_show_a_gain_that_matters():
    rng = np.random.default_rng(17)
    draw = lambda seeds: table(rng, seeds, starts=STARTS[:2])
    pairs = lambda scores: list(differences(scores, "soco", "scratch").values())
    told = [seeds_for(pairs(draw(3)), tests=1, looks=2) for _ in range(100)]
    seeds = int(np.median([count or 99 for count in told]))
    shown = [contrasts(raised(draw(seeds), "soco", GAIN), "scratch", 2)[0].verdict == "better" for _ in range(150)]
    assert 0.65 < np.mean(shown) < 0.95
    assert seeds_for([10 * one for one in pairs(draw(3))], tests=1, looks=2) is None


def lost(rng, seeds, missed):
    """Types of error of two starts; ``missed`` is what soco changes in the objects that are not found."""
    gains = {}
    for type in ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"):
        scores = table(rng, seeds, starts=STARTS[:2], slope=0.0)
        gains[type] = raised(scores, "soco", missed) if type == "Miss" else scores
    return gains


def test_no_type_of_error_changes_by_luck():
    rng = np.random.default_rng(18)
    wrong = [any(c.shown for c in changes(lost(rng, 3, 0.0), "scratch")) for _ in range(200)]
    assert np.mean(wrong) <= LEVEL + 2 * math.sqrt(LEVEL / 200)


def test_a_type_of_error_that_becomes_rarer_is_shown_before_and_after():
    gains = lost(np.random.default_rng(19), 4, -0.08)
    found = {c.type: c for c in changes(gains, "scratch")}
    miss = found["Miss"]
    assert miss.shown
    assert miss.low < miss.difference < miss.high < 0
    before = np.mean([np.mean(list(cells.values())) for cells in gains["Miss"]["scratch"].values()])
    assert (miss.before, miss.after) == pytest.approx((before, before + miss.difference))
    a = answer(table(np.random.default_rng(20), 4, starts=STARTS[:2]), "scratch")
    said = words.sentences(a, list(found.values()))[-1]
    assert "before and with soco: Miss (an object that nothing comes near) " in said
    assert f"{100 * miss.before:.1f} → {100 * miss.after:.1f} (95% interval −" in said
    assert not any(c.shown for c in changes(gains, "scratch", final=False))
    assert (
        "soco changes any one type of error is not shown"
        in words.sentences(a, changes(lost(np.random.default_rng(21), 3, 0.0), "scratch"))[-1]
    )


@pytest.mark.parametrize(
    ("worth", "gain", "sd", "start", "said"),
    [
        ({"soco": 2.0}, 0.0, 0.012, "soco", "go on from soco: it is shown to be best"),
        ({"soco": 2.0, "adept": 2.0}, 0.0, 0.012, "adept", "soco and adept are shown to help, not which of them is"),
        ({}, -0.03, 0.003, "scratch", "go on from scratch, and save what the others cost"),
        ({}, 0.0, 0.03, None, "nothing here is shown to beat scratch. soco may still be worth up to +"),
    ],
)
def test_what_to_do_is_what_was_shown(worth, gain, sd, start, said):
    rng = np.random.default_rng(22)
    scores = raised(raised(table(rng, 4, worth=worth, sd=sd), "soco", gain), "adept", gain)
    text, chosen = words.advice(answer(scores, "scratch"), {"scratch": None, "soco": 60.0, "adept": 30.0})
    assert said in text
    assert chosen == start


def test_too_few_seeds_are_told_to_be_more():
    text, start = words.advice(answer(table(np.random.default_rng(23), 2), "scratch"), {})
    assert (text, start) == ("What to do: run it with at least 3 seeds (--seeds); fewer allow no verdict.", None)


# ---- bands and labels saved ----------------------------------------------------------------------------------------


def test_intervals_are_students_and_welchs():
    from scipy import stats

    a, b = np.array([1.0, 2.0, 4.0]), np.array([0.0, 5.0, 1.0, 3.0])
    mean, low, high = interval(a)
    expected = stats.t.interval(0.95, 2, a.mean(), stats.sem(a))
    assert (mean, low, high) == pytest.approx((a.mean(), *expected))
    welch = stats.ttest_ind(a, -b, equal_var=False).confidence_interval()  # a mean of two: half the difference
    assert mean_of_means([a, b])[1:] == pytest.approx((welch.low / 2, welch.high / 2))
    assert mean_of_means([a, b[:1]])[1:] == (None, None)
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_monotone_pools_adjacent_violators():
    def pooled(values):
        blocks: list[list[float]] = []
        for value in values:
            blocks.append([value])
            while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
                blocks[-2:] = [blocks[-2] + blocks[-1]]
        return [np.mean(block) for block in blocks for _ in block]

    curves = np.random.default_rng(11).normal(np.arange(6), 2, (20, 6))
    np.testing.assert_allclose(monotone(curves), [pooled(curve) for curve in curves])


def test_labels_needed_lies_on_the_line_and_is_never_extrapolated():
    budgets, curve = [10, 20, 80], np.array([[0.1, 0.3, 0.3]])
    needed = lambda ap: labels_needed(budgets, curve, np.array([ap]))[0]
    assert needed(0.2) == pytest.approx(math.sqrt(200))
    assert needed(0.1) == pytest.approx(10)
    assert needed(0.3) == pytest.approx(20)  # the first place, where it is flat
    assert needed(0.31) == MORE
    assert needed(0.09) == FEWER
    assert words.labels(MORE, 10, 80) == "more than 80"
    assert words.labels(FEWER, 10, 80) == "fewer than 10"


def test_redrawn_means_have_students_spread_and_keep_pairs():
    rng = np.random.default_rng(12)
    values = rng.normal(0, 1, (1, 5))
    draws = redrawn(np.concatenate([values, values + 3]), 40_000, rng)
    np.testing.assert_allclose(draws[:, 1] - draws[:, 0], 3)
    _, low, high = interval(values[0])
    np.testing.assert_allclose(np.quantile(draws[:, 0], [0.025, 0.975]), [low, high], atol=0.05)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_the_interval_of_labels_saved_covers_the_truth(seeds):
    rng = np.random.default_rng(seeds)
    covered = []
    for _ in range(150):
        scores = table(rng, seeds, worth={"soco": 2.0}, starts=STARTS[:2])
        for saved in labels_saved(scores, "soco", "scratch")[:3]:
            covered.append(saved.low <= 2 * saved.images <= saved.high)
    assert np.mean(covered) >= 0.93


def test_more_than_the_largest_budget():
    a = answer(table(np.random.default_rng(13), 5, worth={"soco": 20.0}, starts=STARTS[:2]), "scratch")
    saved = {s.images: s for s in a.saved}
    assert (saved[50].needed, saved[50].high, saved[50].shown) == (MORE, MORE, True)
    assert "needs more than 50 (95% interval more than 50 to more than 50)" in " ".join(words.sentences(a))


def test_labels_saved_are_not_shown_where_bands_overlap():
    a = answer(table(np.random.default_rng(14), 4, worth={"soco": 1.5}, starts=STARTS[:2], sd=0.02), "scratch")
    bands = {(b.start, b.images): b for b in a.bands}
    for saved in a.saved:
        overlap = bands["soco", saved.images].low <= bands["scratch", saved.images].high
        assert not (overlap and saved.shown)
        assert not overlap or saved.reason == "the bands overlap"
