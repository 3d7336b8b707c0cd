import numpy as np
import pytest
import scipy.stats
import statsmodels.stats.contingency_tables
import statsmodels.stats.multitest
import statsmodels.stats.power
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.errors import InputError
from llmdistill.evaluation.statistics import (
    check_clusters,
    cluster_numbers,
    clusters_needed,
    draw_clusters,
    holm,
    mcnemar,
    mean_interval,
)


def test_the_mean_is_over_tokens_not_over_rows():
    interval = mean_interval(np.array([1.0, 30.0]), np.array([1, 10]), draw_clusters(2, 200, 0))
    assert interval.mean == 31 / 11
    assert (interval.low, interval.high) == (1.0, 3.0)


def test_agrees_with_scipy():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 60, size=80)
    sums = tokens * generator.gamma(2, 1, size=80)
    got = mean_interval(sums, tokens, draw_clusters(80, 20_000, 1))

    def ratio(s, t, axis):
        return s.sum(axis) / t.sum(axis)

    want = scipy.stats.bootstrap((sums, tokens), ratio, paired=True, n_resamples=20_000, method="percentile", rng=2)
    np.testing.assert_allclose([got.low, got.high], want.confidence_interval, rtol=0.01)


def test_the_paired_difference_agrees_with_scipy():
    generator = np.random.default_rng(5)
    first = generator.random(200) < 0.7
    second = np.where(generator.random(200) < 0.8, first, ~first)
    difference = first.astype(float) - second
    got = mean_interval(difference, np.ones(200), draw_clusters(200, 20_000, 1))

    def of_means(a, b, axis):
        return a.mean(axis) - b.mean(axis)

    data = (first.astype(float), second.astype(float))
    want = scipy.stats.bootstrap(data, of_means, paired=True, n_resamples=20_000, method="percentile", rng=2)
    np.testing.assert_allclose([got.low, got.high], want.confidence_interval, atol=0.006)


@pytest.mark.slow
def test_coverage_where_one_prompt_has_several_samples():
    """Nineteen in twenty intervals hold the true difference; by rows instead of prompts far fewer do."""
    generator = np.random.default_rng(3)
    by_prompt = by_row = 0
    for seed in range(400):
        sizes = generator.integers(1, 9, size=80)
        prompt = np.repeat(np.arange(80), sizes)
        rows = 0.3 + generator.normal(0, 1, size=80)[prompt] + generator.normal(0, 0.5, size=len(prompt))
        clustered = mean_interval(np.bincount(prompt, rows), sizes, draw_clusters(80, 400, seed))
        by_prompt += clustered.low <= 0.3 <= clustered.high
        alone = mean_interval(rows, np.ones(len(rows)), draw_clusters(len(rows), 400, seed))
        by_row += alone.low <= 0.3 <= alone.high
    assert 0.915 <= by_prompt / 400 <= 0.985  # three standard errors of a share of 0.95 in 400, and the same again below
    assert by_row / 400 < 0.75


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (3, 9), (10, 10), (12, 13), (25, 0)])
def test_mcnemar_with_few_pairs_is_the_binomial_test(b, c):
    got = mcnemar(*_pairs(b, c))
    assert (got.only_first, got.only_second, got.test) == (b, c, "exact binomial")
    table = [[7, b], [c, 4]]
    assert got.p == pytest.approx(statsmodels.stats.contingency_tables.mcnemar(table, exact=True).pvalue, rel=1e-12)
    if b + c:
        assert got.p == pytest.approx(scipy.stats.binomtest(b, b + c).pvalue, rel=1e-12)


@pytest.mark.parametrize(("b", "c"), [(26, 0), (20, 9), (300, 340), (14, 13)])
def test_mcnemar_with_many_pairs_is_edwards_test(b, c):
    got = mcnemar(*_pairs(b, c))
    assert got.test == "chi-squared"
    table = [[7, b], [c, 4]]
    want = statsmodels.stats.contingency_tables.mcnemar(table, exact=False, correction=True).pvalue
    assert got.p == pytest.approx(want, rel=1e-9)


def test_mcnemar_of_equals_is_one():
    assert mcnemar(*_pairs(40, 40)).p == 1


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_agrees_with_statsmodels(p):
    want = statsmodels.stats.multitest.multipletests(p, method="holm")[1]
    np.testing.assert_allclose(holm(p), want, atol=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_clusters_needed_agrees_with_statsmodels(share):
    sums = np.where(np.arange(1000) < 1000 * share, 1.0, 0.0) - np.where(np.arange(1000) >= 995, 1.0, 0.0)
    effect = sums.mean() / sums.std(ddof=1)
    want = statsmodels.stats.power.NormalIndPower().solve_power(effect, alpha=0.05, power=0.8, ratio=0)
    assert clusters_needed(sums, np.ones(1000)) == int(np.ceil(want))


def test_as_many_clusters_as_needed_have_the_power():
    """Of many experiments of that size, four in five find the difference by a z-test."""
    generator = np.random.default_rng(8)
    sizes = generator.integers(1, 6, size=4000)
    sums = generator.normal(0.2 * sizes, sizes)
    needed = clusters_needed(sums, sizes)
    found = 0
    for _ in range(1000):
        drawn = generator.integers(0, 4000, size=needed)
        s, n = sums[drawn], sizes[drawn]
        mean = s.sum() / n.sum()
        error = np.std((s - mean * n) / n.mean(), ddof=1) / np.sqrt(needed)
        found += abs(mean) > 1.959964 * error
    assert 0.75 < found / 1000 < 0.85


def test_no_difference_needs_no_number():
    assert clusters_needed(np.array([1.0, -1.0]), np.ones(2)) is None
    assert clusters_needed(np.array([1.0, 1.0]), np.ones(2)) == 2


def test_too_few_clusters():
    with pytest.raises(InputError, match=r"eval: 1 prompts, but an interval needs at least 2; raise eval.held_out"):
        check_clusters(1, "prompts", "raise eval.held_out")
    assert check_clusters(2, "prompts", "").startswith("only 2 prompts: with fewer than 30, ")
    assert check_clusters(30, "prompts", "") is None


def test_cluster_numbers():
    assert cluster_numbers(["b", "a", "b"]).tolist() == [0, 1, 0]


def _pairs(b, c):
    """Seven items that both models have right, four that both have wrong, and those between."""
    first = np.array([True] * (7 + b) + [False] * (c + 4))
    second = np.array([True] * 7 + [False] * b + [True] * c + [False] * 4)
    return first, second
