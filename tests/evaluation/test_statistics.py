import dataclasses

import numpy as np
import pytest
import scipy.stats
import statsmodels.stats.contingency_tables
import statsmodels.stats.multitest
import statsmodels.stats.power
import statsmodels.stats.proportion
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.errors import InputError
from llmdistill.evaluation.statistics import (
    Draws,
    check_clusters,
    cluster_numbers,
    clusters_needed,
    draw_clusters,
    holm,
    mcnemar,
    mean_interval,
    pairs_interval,
    ratio,
    share_interval,
    share_interval_text,
    share_text,
    times_text,
)


def test_the_mean_is_over_tokens_not_over_rows():
    interval = mean_interval(np.array([1.0, 30.0]), np.array([1, 10]), draw_clusters(2, 200, 0))
    assert interval.mean == 31 / 11
    assert interval.low < 1
    assert interval.high > 3
    kl = Draws.of(["a", "b"], 200, 0).interval(np.array([1.0, 30.0]), np.array([1, 10]), least=0)
    assert kl["low"] == 0, "a quantity that is never negative has no interval below zero"


def test_the_standard_error_agrees_with_scipy():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 60, size=80)
    sums = tokens * generator.gamma(2, 1, size=80)
    got = ratio(sums, tokens, draw_clusters(80, 20_000, 1))

    def of_sums(s, t, axis):
        return s.sum(axis) / t.sum(axis)

    want = scipy.stats.bootstrap((sums, tokens), of_sums, paired=True, n_resamples=20_000, method="percentile", rng=2)
    assert got.error == pytest.approx(want.standard_error, rel=0.03)
    assert got.values.std() == pytest.approx(want.standard_error, rel=0.03)
    interval = got.interval()
    student = scipy.stats.t.ppf(0.975, 79) * got.error
    assert interval.low <= got.value - student + 1e-12
    assert interval.high >= got.value + student - 1e-12
    np.testing.assert_allclose([interval.low, interval.high], want.confidence_interval, rtol=0.04)


def test_of_equal_clusters_the_error_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(size=50)
    got = ratio(values, np.ones(50), draw_clusters(50, 10, 0))
    assert got.error == pytest.approx(scipy.stats.sem(values), rel=1e-12)


def test_clusters_that_have_none_of_a_group_count_for_nothing():
    """Five of two hundred conversations are long enough for a group by position: four degrees of freedom."""
    sums, sizes = np.zeros(200), np.zeros(200)
    sums[[3, 50, 90, 120, 199]], sizes[[3, 50, 90, 120, 199]] = [2.0, 3.0, 0.0, 4.0, 2.0], [4.0, 3.0, 2.0, 6.0, 5.0]
    got, alone = (
        ratio(*values, draw_clusters(len(values[0]), 10, 0)) for values in ((sums, sizes), (sums[sizes > 0], sizes[sizes > 0]))
    )
    assert (got.value, got.freedom) == (alone.value, alone.freedom) == (0.55, 4)
    assert got.error == pytest.approx(alone.error, rel=1e-12)
    both = [
        share_interval(*values, draw_clusters(len(values[0]), 10, 0))
        for values in ((sums, sizes), (sums[sizes > 0], sizes[sizes > 0]))
    ]
    assert both[0] == pytest.approx(both[1])


@pytest.mark.parametrize(("right", "items"), [(0, 40), (1, 40), (20, 40), (40, 40), (3, 12)])
def test_a_share_has_wilsons_interval(right, items):
    """Of independent items it is that of statsmodels; with none or all of them right it has a width, too."""
    hits = (np.arange(items) < right).astype(float)
    got = share_interval(hits, np.ones(items), draw_clusters(items, 100, 0))
    want = statsmodels.stats.proportion.proportion_confint(right, items, method="wilson")
    np.testing.assert_allclose([got.low, got.high], want, atol=1e-6)
    assert got.high > got.low
    by_rows = Draws.of([str(n) for n in range(items)], 100, 0).share(hits, np.ones(items))
    assert by_rows == dataclasses.asdict(got)


def test_items_that_are_all_alike_in_a_cluster_count_as_one():
    """Twelve clusters of ten equal items say as much as twelve items, but for the quantile."""
    hits = np.where(np.arange(12) < 7, 10.0, 0.0)
    got = share_interval(hits, np.full(12, 10.0), draw_clusters(12, 100, 0))
    alone = share_interval(hits / 10, np.ones(12), draw_clusters(12, 100, 0))
    assert got.high - got.low == pytest.approx(1.15 * (alone.high - alone.low), rel=0.03)


def share_of(values, clusters=None):
    """With its interval, of items that are independent unless they are in clusters."""
    values = np.array(values, dtype=float)
    keys = [str(number) for number in (range(len(values)) if clusters is None else clusters)]
    return Draws.of(keys, 400, 0).share(values, np.ones(len(values)))


def test_a_tie_among_wins_is_no_more_certain_than_wins_alone():
    """Agresti and Coull's four items added by hand; between the intervals of Wilson with a win or a loss in its place."""
    got, items = share_of([1] * 11 + [0.5]), np.array([1] * 13 + [0.5, 0, 0])
    half = scipy.stats.t.ppf(0.975, 11) * np.sqrt(items.var() / 16)
    assert got["mean"] == pytest.approx(11.5 / 12)
    assert got["low"] == pytest.approx(items.mean() - half, abs=0.002)
    assert got["high"] == 1
    assert share_of([1] * 11 + [0])["low"] < got["low"] < share_of([1] * 12)["low"]
    alike = share_of(np.repeat([1] * 11 + [0.5], 10), np.repeat(np.arange(12), 10))
    assert alike["low"] < 0.8, "items that are all alike in a cluster are no 120 of them"


def test_where_nearly_all_are_ties_the_mean_is_known_well():
    """A hundred of them and the four items: four deviations of one half."""
    got, half = share_of([0.5] * 100), scipy.stats.t.ppf(0.975, 99) * np.sqrt(4 * 0.25 / 104 / 104)
    assert got == pytest.approx({"mean": 0.5, "low": 0.5 - half, "high": 0.5 + half})


def test_of_many_tokens_the_interval_is_that_of_the_mean():
    """Of 200 texts with some thirty tokens, four more tell nothing."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(5, 60, size=200).astype(float)
    shares, draws = generator.beta(60, 40, size=200) * sizes, Draws.of([str(n) for n in range(200)], 400, 0)
    got, want = draws.share(shares, sizes), draws.interval(shares, sizes)
    assert [got["low"], got["high"]] == pytest.approx([want["low"], want["high"]], abs=1e-3)


def test_win_rates_with_ties_are_within_their_intervals_in_19_of_20_samples():
    """Twelve prompts, 80% won and 10% tied; the interval of the bootstrap and Student's t alone holds the rate in 88%."""
    generator, held, count = np.random.default_rng(12), 0, 400
    for seed in range(count):
        outcome = generator.choice([1.0, 0.5, 0.0], size=12, p=[0.8, 0.1, 0.1])
        got = Draws.of([str(n) for n in range(12)], 200, seed).share(outcome, np.ones(12))
        held += got["low"] <= 0.85 <= got["high"]
    assert held / count > 0.93


def test_pairs_by_hand():
    """Three items that only the first has right, one that only the second has, six where they agree."""
    got = pairs_interval(np.array([1, 1, 1, -1, 0, 0, 0, 0, 0, 0]))
    centre, half = 4 / 12 - 2 / 12, 1.959964 * np.sqrt((6 / 12 - (2 / 12) ** 2) / 12)
    assert got.mean == 0.2
    np.testing.assert_allclose([got.low, got.high], [centre - half, centre + half], rtol=1e-6)
    same = Draws.of(list("abcdefghijkl"), 50, 0).pairs(np.zeros(12))
    assert same["low"] <= 0 < same["high"], "no difference in twelve items is not no difference"


def clusters(generator, n):
    return generator.integers(5, 60, size=n).astype(float)


def normal(generator, n):
    sizes = clusters(generator, n)
    return (generator.normal(0.2, 0.5, size=n) * sizes, sizes), 0.2, Draws.interval


def skewed(generator, n):
    """As the KL of a student: many texts with little, some with much of it."""
    sizes = clusters(generator, n)
    return (generator.exponential(0.8, size=n) * sizes, sizes), 0.8, Draws.interval


def tokens_alike(generator, n):
    """Shares of tokens that depend on the text that they are in."""
    sizes = clusters(generator, n)
    return (generator.binomial(sizes.astype(int), generator.beta(6, 4, size=n)).astype(float), sizes), 0.6, Draws.share


def right_or_wrong(generator, n):
    return (generator.binomial(1, 0.7, size=n).astype(float), np.ones(n)), 0.7, Draws.share


def pairs(generator, n):
    """Where the models differ on two items in five; on fewer of few items, all that can happen is in most intervals."""
    return (generator.choice([1.0, -1.0, 0.0], size=n, p=[0.3, 0.1, 0.6]),), 0.2, Draws.pairs


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0%"),
        (1, "100%"),
        (0.4, "40%"),
        (0.01, "1%"),
        (0.996, "99.6%"),
        (0.9996, "99.96%"),
        (0.0018, "0.2%"),
        (1e-9, "0.000%"),
    ],
)
def test_a_share_looks_like_all_or_nothing_only_if_it_is(share, text):
    assert share_text(share) == text


def test_an_interval_has_the_decimals_of_its_mean():
    assert share_interval_text({"mean": 0.996, "low": 0.9951, "high": 0.9968}) == ("99.6", "99.5 to 99.7")
    assert share_interval_text({"mean": 0.4, "low": 0.35, "high": 1.0}) == ("40", "35 to 100")
    assert [times_text(ratio) for ratio in (1.84, 1.04, 0.5, 0.0432)] == ["1.8×", "1.0×", "0.5×", "0.043×"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, 34, 200])
@pytest.mark.parametrize("quantity", [normal, skewed, tokens_alike, right_or_wrong, pairs])
def test_nineteen_in_twenty_intervals_hold_the_true_value(quantity, n):
    """The share over 700 samples, whose own standard error is 0.008, is between 0.93 and 0.97, give or take two of those."""
    generator = np.random.default_rng(n)
    held, count = 0, 700
    for seed in range(count):
        given, truth, interval = quantity(generator, n)
        got = interval(Draws.of([str(number) for number in range(n)], 400, seed), *given)
        held += got["low"] <= truth <= got["high"]
    assert 0.913 < held / count < 0.987


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
    with pytest.raises(InputError, match=r"eval: 1 prompt, but an interval needs at least 2; raise eval.held_out"):
        check_clusters(1, "prompts", "raise eval.held_out")
    assert check_clusters(2, "prompts", "").startswith("only 2 prompts: with fewer than 12, ")
    assert check_clusters(12, "prompts", "") is None


def test_cluster_numbers():
    assert cluster_numbers(["b", "a", "b"]).tolist() == [0, 1, 0]


def _pairs(b, c):
    """Seven items that both models have right, four that both have wrong, and those between."""
    first = np.array([True] * (7 + b) + [False] * (c + 4))
    second = np.array([True] * 7 + [False] * b + [True] * c + [False] * 4)
    return first, second
