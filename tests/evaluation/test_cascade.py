"""Confidence, calibration and thresholds: against brute force, statsmodels, and distributions whose risk is known."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from llmdistill.evaluation.cascade import (
    TARGETS,
    Clusters,
    auroc,
    cascade,
    cross_fitted,
    items_needed,
    likelihood,
    platt,
)
from llmdistill.evaluation.statistics import Draws


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_auroc_is_the_share_of_pairs_in_the_right_order(items):
    scores, positive = np.array([score for score, _ in items], float), np.array([found for _, found in items])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == (pytest.approx(np.mean(pairs)) if pairs else None)


@pytest.mark.parametrize(("n", "most"), [(28, (None, None, None)), (29, (0, None, None)), (59, (1, 0, None))])
def test_too_few_items_for_a_target(n, most):
    """Without one disagreement in n, 0.05^(1/n) is shown: 90% takes 29 items, 95% 59, 99% 299."""
    alone = Clusters.of(np.arange(n))
    assert tuple(alone.most(target) for target in TARGETS) == most
    assert [items_needed(target) for target in TARGETS] == [29, 59, 299]


def test_clusters_of_other_sizes_need_more():
    """What is needed is what `most` allows: of one cluster fewer, not even none may disagree."""
    sizes = [1] * 345 + [2, 3]
    clusters = Clusters.of(np.repeat(np.arange(len(sizes)), sizes))
    for target in TARGETS:
        needed = clusters.needed(target)
        assert needed >= items_needed(target)
        assert (clusters.most(target) is None) == (needed > len(sizes))
        here, less = (np.resize(clusters.sizes, count) for count in (needed, needed - 1))
        assert [Clusters.of(np.repeat(np.arange(len(s)), s)).most(target) is None for s in (here, less)] == [False, True]


@pytest.mark.parametrize("n", [298, 299, 473, 474, 1000, 5000])
@pytest.mark.parametrize("target", TARGETS)
def test_the_bound_is_that_of_clopper_and_pearson(n, target):
    """Of statsmodels: the upper end of the two-sided 90% interval is the one-sided 95% bound."""
    below = [k for k in range(n) if proportion_confint(k, n, alpha=0.1, method="beta")[1] <= 1 - target]
    assert Clusters.of(np.arange(n)).most(target) == (below[-1] if below else None)


@given(
    st.lists(st.tuples(st.integers(-4, 0), st.booleans(), st.integers(0, 6)), min_size=1, max_size=25),
    st.integers(0, 4),
)
def test_the_threshold_is_the_lowest_that_lets_few_clusters_disagree(items, most):
    scores = np.array([score for score, _, _ in items], float)
    agrees = np.array([found for _, found, _ in items])
    groups = [group for _, _, group in items]
    failing = {s: {group for value, found, group in items if value >= s and not found} for s in scores}
    fine = [s for s in scores if sum(groups.count(group) for group in failing[s]) <= most]
    assert Clusters.of(np.array(groups)).threshold(scores, agrees, most) == (min(fine) if fine else None)


def test_the_promised_agreement_holds_in_95_of_100_samples():
    """P(disagree | score s) = c (1 − s) with s uniform: a cascade with threshold t disagrees in c (1 − t)² / 2 of requests."""
    generator, c, n, target = np.random.default_rng(0), 0.4, 300, 0.95
    clusters = Clusters.of(np.arange(n))
    most = clusters.most(target)
    broken, answered = [], []
    for _ in range(1000):
        scores = generator.random(n)
        agrees = generator.random(n) >= c * (1 - scores)
        found = clusters.threshold(scores, agrees, most)
        broken.append(c * (1 - found) ** 2 / 2 > 1 - target)
        answered.append(1 - found)
    assert np.mean(broken) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)
    # Half of the requests could be answered if the distribution were known; it must not be far less.
    assert 0.35 < np.mean(answered) < 0.5


@pytest.mark.parametrize("failing", [(0.6, 0.1), (0.05, 0.4), (0.3, 0.3)], ids=["large ones", "small ones", "all alike"])
def test_the_promise_is_of_requests_where_clusters_differ_in_size(failing):
    """One cluster in ten has 12 items, which agree or disagree together; the promise is kept whichever fail more often."""
    generator, n, target = np.random.default_rng(1), 400, 0.9
    broken, most = [], {}
    for _ in range(400):
        is_large, confidence = generator.random(n) < 0.1, generator.random(n)
        fails = generator.random(n) < np.where(is_large, *failing) * (1 - confidence)
        cluster = np.repeat(np.arange(n), np.where(is_large, 12, 1))
        clusters = Clusters.of(cluster)
        if len(cluster) not in most:  # which tells how many of the clusters are large
            most[len(cluster)] = clusters.most(target)
        found = clusters.threshold(confidence[cluster], ~fails[cluster], most[len(cluster)])
        share = (0.1 * 12 * failing[0] + 0.9 * failing[1]) / (0.1 * 12 + 0.9)  # of the items, by the definition of the draw
        broken.append(share * (1 - found) ** 2 / 2 > 1 - target)
    assert np.mean(broken) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_a_few_large_clusters_that_disagree_are_not_hidden_by_many_small_ones():
    """280 items alone agree, 20 clusters of 30 do not: 20 of 300 clusters, and 600 of 880 items."""
    clusters = [str(n) for n in range(280)] + [f"large {n}" for n in range(20) for _ in range(30)]
    agrees = np.arange(880) < 280
    found = measured(np.linspace(-2, -1, 880), agrees, clusters=clusters)
    assert (found["clusters"], found["largest_cluster"]) == (300, 30)
    for entry in found["thresholds"]:  # the least confident of the items of their own may be answered, or none
        assert not entry["shown"] or entry["agreement"] >= entry["target"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=7), st.floats(0.02, 0.5), st.integers(0, 2**32), st.data())
def test_no_probabilities_of_clusters_make_so_few_disagreements_likelier(sizes, share, seed, data):
    """The exact distribution of the items that disagree, for random probabilities with this share, against the bound."""
    items = data.draw(st.integers(0, sum(sizes) - 1))
    generator, m = np.random.default_rng(seed), np.array(sizes)
    p = generator.dirichlet(np.full(len(m), 0.3)) * share * m.sum() / m
    p = np.minimum(p, 1)
    missing = share * m.sum() - p @ m  # what was cut off goes where there is room
    for place in generator.permutation(len(m)):
        more = min(1 - p[place], missing / m[place])
        p[place], missing = p[place] + more, missing - more * m[place]
    distribution = np.ones(1)
    for size, probability in zip(m, p, strict=True):
        step = np.zeros(size + 1)
        step[0], step[size] = 1 - probability, probability
        distribution = np.convolve(distribution, step)
    assert distribution[: items + 1].sum() <= likelihood(items, m, share) + 1e-6


def test_the_worst_probabilities_by_hand():
    """299 items and a pair, none of which disagrees, at 1% of 301 items: p of the pair is 1 − 1 / 2λ, of the others 1 − 1 / λ."""
    price = 300 / (301 - 3.01)
    sizes = np.array([2] + [1] * 299)
    assert likelihood(0, sizes, 0.01) == pytest.approx(1 / (2 * price) * price**-299, rel=1e-3)
    assert Clusters.of(np.repeat(np.arange(300), sizes)).most(0.99) is None
    # A few more items make good for the pair; with one size all agree with 299.
    assert Clusters.of(np.repeat(np.arange(345), [2] + [1] * 344)).most(0.99) == 0
    assert Clusters.of(np.repeat(np.arange(1001), [50] + [1] * 1000)).most(0.95) >= 0


def test_platts_fit_is_the_logistic_regression_on_his_targets():
    generator = np.random.default_rng(1)
    scores = -generator.exponential(3, 200)
    positive = generator.random(200) < 1 / (1 + np.exp(-(0.8 * scores + 2)))
    n = positive.sum()
    targets = np.where(positive, (n + 1) / (n + 2), 1 / (202 - n))
    wanted = sm.GLM(targets, sm.add_constant(scores), family=sm.families.Binomial()).fit().params
    assert platt(scores, positive) == pytest.approx((wanted[1], wanted[0]), rel=1e-4)


@pytest.mark.parametrize("agreeing", [0, 20])
def test_where_all_agree_or_none_the_fit_is_the_smoothed_share(agreeing):
    slope, intercept = platt(np.arange(20.0), np.arange(20) < agreeing)
    p = 1 / (1 + math.exp(-intercept))
    assert (slope, p) == pytest.approx((0, (agreeing + 1) / 22), abs=1e-5)


def test_no_item_is_judged_by_a_fit_on_itself_or_its_cluster():
    generator = np.random.default_rng(2)
    scores, agrees, cluster = generator.normal(size=40), generator.random(40) < 0.6, np.arange(40) // 2
    before = cross_fitted(scores, agrees, cluster, 7)
    changed = agrees.copy()
    changed[:2] = ~changed[:2]
    after = cross_fitted(scores, changed, cluster, 7)
    assert (after[:2] == before[:2]).all()
    assert (after != before).sum() >= 30  # of the other folds


def test_calibrated_probabilities_are_those_that_the_answers_were_drawn_with():
    generator = np.random.default_rng(3)
    scores = -generator.exponential(2, 4000)
    p = 1 / (1 + np.exp(-(1.2 * scores + 3)))
    agrees = generator.random(4000) < p
    assert np.abs(cross_fitted(scores, agrees, np.arange(4000), 0) - p).max() < 0.05
    found = measured(scores, agrees)["calibration"]
    assert found["error"] < 0.02
    assert found["brier"] == pytest.approx((p * (1 - p)).mean(), abs=0.01)
    assert found["brier_of_the_rate"] == pytest.approx(agrees.mean() * (1 - agrees.mean()))
    assert (found["slope"], found["intercept"]) == pytest.approx((1.2, 3), rel=0.15)


def measured(scores, agrees, right=None, clusters=None):
    """Each score as the log-probabilities of two tokens."""
    clusters = clusters or [str(n) for n in range(len(scores))]
    right = right or {"student": agrees.astype(float), "teacher": np.ones(len(scores))}
    tokens = [[0.25 * score, 0.75 * score] for score in scores]
    return cascade(tokens, agrees, right, clusters, Draws.of(clusters, 100, 0), 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_the_curve_by_hand(seed):
    generator = np.random.default_rng(seed)
    n = 30
    scores = -generator.integers(1, 40, n) / 4  # with ties, and exact in floating point
    agrees = generator.random(n) < 0.8
    right = {name: generator.integers(0, 2, n).astype(float) for name in ("student", "teacher")}
    found = measured(scores, agrees, right)
    assert [point["threshold"] for point in found["curve"]] == sorted(set(scores.tolist()), reverse=True)
    for point in found["curve"]:
        by_student = [number for number in range(n) if scores[number] >= point["threshold"]]
        by_teacher = [number for number in range(n) if scores[number] < point["threshold"]]
        assert point["answered"] == pytest.approx(len(by_student) / n)
        assert point["agreement"] == pytest.approx((sum(agrees[by_student]) + len(by_teacher)) / n)
        assert point["agreement_of_answered"] == pytest.approx(np.mean(agrees[by_student]))
        total = sum(right["student"][by_student]) + sum(right["teacher"][by_teacher])
        assert point["score"] == pytest.approx(total / n)
    first = found["thresholds"][0]
    assert (first["target"], first["items_needed"], first["shown"]) == (0.9, 29, True)
    fewer = [point for point in found["curve"] if point["agreement"] == 1]  # of 30 items none may disagree for 90%
    assert first["threshold"] == (fewer[-1]["threshold"] if fewer else None)
    assert first["answered"]["mean"] == pytest.approx(fewer[-1]["answered"] if fewer else 0)
    assert [(entry["threshold"], entry["shown"]) for entry in found["thresholds"][1:]] == [(None, False)] * 2


def test_items_of_a_cluster_count_as_one():
    """120 items of 60 passages: two disagreements in one passage are one, in two they are two."""
    scores, clusters = np.linspace(-1, -2, 120), [str(n // 2) for n in range(120)]
    # Of 60 passages one may disagree for 90%, none for 95%.
    for wrong, last_90, last_95 in (((), 119, 119), ((118, 119), 119, 117), ((117, 118), 117, 116), ((2, 3), 119, 1)):
        agrees = ~np.isin(np.arange(120), wrong)
        found = measured(scores, agrees, clusters=clusters)["thresholds"]
        assert [entry["threshold"] for entry in found[:2]] == pytest.approx([scores[last_90], scores[last_95]])
        assert not found[2]["shown"]


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    scores = np.linspace(-9, -1, 500)
    curve = measured(scores, np.ones(500, bool))["curve"]
    assert len(curve) == 50
    assert (curve[0]["answered"], curve[-1]["answered"]) == (1 / 500, 1)
    assert measured(scores, np.ones(500, bool))["auroc"] == {"sum": None, "mean": None, "min": None}
