"""Rank statistics and bounds, against scikit-learn, SciPy and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from trimtab.training.statistics import (
    Interval,
    auroc,
    auroc_interval,
    difference_interval,
    lowest_promise,
    mean_interval,
    permutation_p,
    promised_threshold,
    relabelled,
    share_interval,
    texts_for,
    win_rates,
)


def texts_of(rng, count, shift=0.0, alike=0.5):
    own = rng.standard_normal(count) * alike**0.5 + shift
    return [mean + (1 - alike) ** 0.5 * rng.standard_normal(rng.integers(2, 9)) for mean in own]


def test_the_auroc_counts_each_text_once_and_ties_as_one_half():
    rng = np.random.default_rng(0)
    scores = [np.round(one, 1) for one in texts_of(rng, 12, 0.5) + texts_of(rng, 9)]
    labels = np.arange(21) < 12
    lengths = np.array([len(one) for one in scores])
    expected = roc_auc_score(
        np.repeat(labels, lengths), np.concatenate(scores), sample_weight=np.repeat(1 / lengths, lengths)
    )
    assert auroc(win_rates(scores), labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("positive", "negative", "shift"), [(10, 10, 0.0), (10, 40, 1.0), (10, 10, 2.5)])
def test_the_interval_of_the_auroc_covers_the_truth(positive, negative, shift, alike):
    rng = np.random.default_rng(1)
    truth, labels, runs = stats.norm.cdf(shift / 2**0.5), np.arange(positive + negative) < positive, 150
    covered = 0
    for _ in range(runs):
        rates = win_rates(texts_of(rng, positive, shift, alike) + texts_of(rng, negative, 0.0, alike))
        covered += (found := auroc_interval(rates, labels, 0.95)).low <= truth <= found.high
    assert covered >= 0.88 * runs


def test_ten_texts_told_apart_without_a_fault_do_not_prove_perfection():
    found = auroc_interval(win_rates([np.array([float(n)]) for n in range(20)]), np.arange(20) >= 10, 0.95)
    assert found.value == found.high == 1.0
    assert 0.7 < found.low < 0.9


def test_the_permutation_test_is_exact_on_all_relabellings():
    scores = [np.array([value]) for value in (5.0, 4.0, 1.0, 3.0, 2.0, 0.0)]
    labels = np.array([True, True, True, False, False, False])
    rates = win_rates(scores)
    found = auroc(rates, labels)
    every = [np.isin(np.arange(6), chosen) for chosen in itertools.combinations(range(6), 3)]
    exact = np.mean([auroc(rates, one) >= found - 1e-12 for one in every])
    assert permutation_p(rates, labels, np.arange(6), 0) == pytest.approx(exact, abs=0.02)


def test_relabelling_moves_whole_groups_and_shuffles_within_pairs():
    positive = np.array([True, True, False, False, True, False, True])
    groups = np.array([0, 0, 1, 1, 2, 2, 3])
    labels = relabelled(positive, groups, 200, np.random.default_rng(0))
    assert (labels[:, 0] == labels[:, 1]).all()
    assert (labels[:, 2] == labels[:, 3]).all()
    assert (labels[:, 4] != labels[:, 5]).all()
    assert (labels[:, [0, 2, 6]].sum(1) == 2).all()
    assert 60 < labels[:, 4].sum() < 140


def test_the_permutation_test_seldom_finds_something_in_noise():
    rng = np.random.default_rng(2)
    labels = np.arange(20) < 10
    ps = [permutation_p(win_rates(texts_of(rng, 20)), labels, np.arange(20), n, permutations=199) for n in range(200)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(ps) <= level) <= level + 4 * math.sqrt(level * (1 - level) / 200)


@pytest.mark.parametrize("hits", [0, 3, 30, 60])
def test_the_bound_of_a_mean_contains_clopper_and_pearsons_and_is_not_much_wider(hits):
    values = np.arange(60) < hits
    found = mean_interval(values.astype(float), 0.95)
    exact = stats.binomtest(hits, 60).proportion_ci(0.95, "exact")
    assert found.low <= exact.low + 1e-9
    assert found.high >= exact.high - 1e-9
    assert found.high - found.low <= 1.35 * (exact.high - exact.low)


def test_how_many_texts_a_promise_needs():
    assert [texts_for(rate, 0.95) for rate in (0.01, 0.05, 0.1)] == [299, 59, 29]
    for n in (1, 12, 59, 300):
        assert texts_for(lowest_promise(n, 0.95), 0.95) == n
        assert (1 - lowest_promise(n, 0.95)) ** n == pytest.approx(0.05)


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("texts", [59, 200])
def test_a_promised_rate_is_kept_in_as_many_cases_as_stated(texts, alike):
    rng = np.random.default_rng(3)
    kept, runs = 0, 200
    for _ in range(runs):
        threshold = promised_threshold(texts_of(rng, texts, alike=alike), 0.05, 0.95)
        assert threshold is not None
        kept += stats.norm.sf(threshold) <= 0.05  # a token is standard normal
    assert kept >= 0.9 * runs


def test_a_promise_beyond_the_texts_is_none_and_ties_stay_together():
    texts = [np.array([0.0, 1.0])] * 58
    assert promised_threshold(texts, 0.05, 0.95) is None
    assert promised_threshold([*texts, texts[0]], 0.05, 0.95) > 1.0
    assert promised_threshold([np.array([0.0, 1.0])] * 400, 0.6, 0.95) == pytest.approx(0.5)
    assert promised_threshold(texts, 1.0, 0.95) < 0.0


@pytest.mark.parametrize("alike", [0.0, 0.6, 1.0])
def test_the_interval_of_a_share_covers_the_truth_whether_or_not_parts_of_a_text_are_alike(alike):
    rng, covered, runs = np.random.default_rng(4), 0, 200
    for _ in range(runs):
        counts = rng.integers(0, 5, 60)
        own = rng.random(60) < 0.3
        hits = [
            sum(mine if rng.random() < alike else rng.random() < 0.3 for _ in range(n))
            for n, mine in zip(counts, own, strict=True)
        ]
        found = share_interval(np.array(hits, float), counts.astype(float), 0.95)
        covered += found.low <= 0.3 <= found.high
    assert covered >= 0.89 * runs


def test_a_share_of_nothing_or_of_all_is_no_certainty():
    ones = np.ones(20)
    assert share_interval(3 * ones, 3 * ones, 0.95).low == pytest.approx(20 / (20 + 1.96**2), rel=1e-3)
    nothing = share_interval(0 * ones, 0 * ones, 0.95)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_the_interval_of_a_difference_is_newcombes():
    one, other = (
        share_interval(np.array([56.0]), np.array([70.0]), 0.95),
        share_interval(np.array([48.0]), np.array([80.0]), 0.95),
    )
    wilson = [stats.binomtest(k, n).proportion_ci(0.95, "wilson") for k, n in ((56, 70), (48, 80))]
    ends = [Interval(k / n, ci.low, ci.high) for (k, n), ci in zip(((56, 70), (48, 80)), wilson, strict=True)]
    found = difference_interval(*ends)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    assert one.low < wilson[0].low  # one text of seventy sentences is one text
    assert other.high > wilson[1].high
