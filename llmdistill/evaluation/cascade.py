"""When to ask the teacher: the student answers, and if it is not confident enough, the teacher does (a cascade).

The confidence is log q of the student's whole answer, the sum over its tokens: the maximum class probability of Hendrycks &
Gimpel (2017, arXiv 1610.02136) if the classes are answers (Chow-Sum in Gupta et al. 2024, arXiv 2404.10136). An answer
agrees if it equals the teacher's by the measure of the task; what the teacher answers itself agrees by definition.

The share of requests in which the cascade disagrees falls with the threshold, so a single confidence bound, at the lowest
threshold that satisfies it, holds without a correction for having tried all of them (Bates et al. 2021, arXiv 2101.02703,
theorem 1). A cluster disagrees, with all of its items, if any of them does. If all clusters have the same size, the bound is
the exact one of Clopper & Pearson (1934), otherwise that of Chernoff (1952), whichever clusters are the ones that disagree.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmdistill.evaluation.statistics import Array, Draws, cluster_numbers

TARGETS = (0.9, 0.95, 0.99)
LEVEL = 0.95
_FOLDS = 5
_GROUPS = 10  # of items with similar confidence
_POINTS = 50  # of a curve


def cascade(
    logprobs: Sequence[Sequence[float]],
    agrees: Array,
    right: dict[str, Array],
    clusters: Sequence[str],
    draws: Draws,
    seed: int,
) -> dict[str, Any]:
    """The entry of a task in `metrics.json` under `cascade`.

    Args:
        logprobs: log-probabilities of the tokens of each of the student's answers, in nats.
        agrees: whether each equals the teacher's; shape (items,).
        right: scores of `student` and `teacher`; shape (items,) each.
        clusters: the cluster of each item; clusters are resampled as a whole.
        draws: resamples of the clusters.
        seed: seed of the folds.
    """
    sums = np.array([math.fsum(tokens) for tokens in logprobs])
    others = {"mean": [np.mean(tokens) for tokens in logprobs], "min": [min(tokens) for tokens in logprobs]}
    cluster = cluster_numbers(clusters)
    by_cluster = Clusters.of(cluster)
    answered = sums[:, None] >= _points(sums)  # (items, points)
    return {
        "clusters": len(by_cluster.sizes),
        "largest_cluster": int(by_cluster.sizes.max()),
        "agreement": draws.share(agrees.astype(float), np.ones(len(sums))),
        "auroc": {"sum": auroc(sums, agrees), **{name: auroc(np.array(values), agrees) for name, values in others.items()}},
        "calibration": _calibration(sums, agrees, cluster, seed),
        "none": _at(None, np.zeros(len(sums), bool), agrees, right),
        "curve": [_at(threshold, here, agrees, right) for threshold, here in zip(_points(sums), answered.T, strict=True)],
        "thresholds": [_for(target, sums, agrees, right, by_cluster, draws) for target in TARGETS],
    }


def auroc(scores: Array, positive: Array) -> float | None:
    """Probability that a positive item scores higher than another one, ties half (Hanley & McNeil 1982); None without both."""
    from scipy.stats import rankdata

    n = int(positive.sum())
    if n in (0, len(positive)):
        return None
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def platt(scores: Array, positive: Array) -> tuple[float, float]:
    """Slope a and intercept b of P(positive) = sigmoid(a·score + b) (Platt 1999), with his targets, which keep both finite.

    They are (N₊ + 1) / (N₊ + 2) and 1 / (N₋ + 2) for the N₊ positive and the N₋ other items.
    """
    from scipy.optimize import minimize

    n = positive.sum()
    target = np.where(positive, (n + 1) / (n + 2), 1 / (len(positive) - n + 2))
    middle, spread = scores.mean(), scores.std() or 1.0
    x = np.stack([(scores - middle) / spread, np.ones(len(scores))])

    def loss(weights: Array) -> tuple[float, Array]:
        logit = weights @ x
        return float((np.logaddexp(0, logit) - target * logit).sum()), x @ (_sigmoid(logit) - target)

    a, b = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    return float(a / spread), float(b - a * middle / spread)


def cross_fitted(scores: Array, positive: Array, cluster: Array, seed: int) -> Array:
    """The calibrated probability of each item, from a fit on the other four of five folds of clusters."""
    count = int(cluster.max()) + 1
    fold = np.random.default_rng(seed).permutation(np.arange(count) % _FOLDS)[cluster]
    found = np.empty(len(scores))
    for number in np.unique(fold):
        here = fold == number
        a, b = platt(scores[~here], positive[~here])
        found[here] = _sigmoid(a * scores[here] + b)
    return found


def items_needed(target: float) -> int:
    """The minimum number of independent items that can show an agreement if none of them disagrees."""
    return math.ceil(math.log(1 - LEVEL) / math.log(target))


@dataclass(frozen=True)
class Clusters:
    """The items of a task by cluster; a cluster disagrees as a whole or not at all.

    Attributes:
        cluster: the cluster of each item; shape (items,).
        sizes: the size of each cluster; shape (clusters,).
    """

    cluster: Array
    sizes: Array

    @classmethod
    def of(cls, cluster: Array) -> "Clusters":
        """Build from the cluster number of each item."""
        return cls(cluster, np.bincount(cluster))

    def most(self, target: float) -> int | None:
        """Most items in disagreeing clusters with which the target is shown at 95% confidence; None if not even with 0."""
        from scipy.stats import binom

        count, size = len(self.sizes), int(self.sizes[0])
        if (self.sizes == size).all():
            # The bound is below 1 − target where so few disagreements are that unlikely if it is their share.
            allowed = int((binom.cdf(np.arange(count), count, 1 - target) <= 1 - LEVEL).sum())
            return size * (allowed - 1) if allowed else None
        items = range(len(self.cluster))
        allowed = bisect_right(items, 1 - LEVEL, key=lambda few: likelihood(few, self.sizes, 1 - target))
        return allowed - 1 if allowed else None

    def needed(self, target: float) -> int | None:
        """Number of clusters of these sizes that can show an agreement if none disagrees; None if over 100 times as many."""
        if (self.sizes == self.sizes[0]).all():
            return items_needed(target)
        counts = range(1, 100 * len(self.sizes))
        shown = bisect_left(counts, True, key=lambda m: likelihood(0, np.resize(self.sizes, m), 1 - target) <= 1 - LEVEL)
        return counts[shown] if shown < len(counts) else None

    def threshold(self, scores: Array, agrees: Array, most: float) -> float | None:
        """The lowest score above which clusters with a disagreeing item have at most this many items, or None."""
        highest = np.full(len(self.sizes), -np.inf)
        np.maximum.at(highest, self.cluster[~agrees], scores[~agrees])  # per cluster, the score at which it first disagrees
        fine = [score for score in np.unique(scores) if self.sizes[highest >= score].sum() <= most]
        return float(fine[0]) if fine else None


def likelihood(items: int, sizes: Array, share: float) -> float:
    """Upper bound on the probability that no more items disagree if on average this share does.

    Clusters disagree independently of each other, cluster i with probability pᵢ, Σ mᵢ pᵢ = share · Σ mᵢ. This is Chernoff's
    bound (1952) for the worst such p, min over θ of exp(θ · items) · Π (1 − pᵢ (1 − exp(−θ mᵢ))); for no items, Π (1 − pᵢ).

    Args:
        items: number of items that disagree.
        sizes: mᵢ, shape (clusters,).
        share: between 0 and 1.
    """
    from scipy.optimize import brentq, minimize_scalar

    m, counts = np.unique(sizes, return_counts=True)
    wanted = share * float(m @ counts)

    def exponent(log_theta: float) -> float:
        theta = math.exp(log_theta)
        falls = -np.expm1(-theta * m)

        def worst(log_price: float) -> Array:
            """The p at which the product, whose logarithm is concave in p, falls by the same amount per additional item."""
            return np.clip(1 / falls - 1 / (math.exp(log_price) * m), 0, 1)

        low = high = math.log(float((falls / m).min()))  # where all are 0
        while float((m * counts) @ worst(high)) < wanted:
            high += 1
        p = worst(brentq(lambda log_price: float((m * counts) @ worst(log_price)) - wanted, low, high))
        return theta * items + float(counts @ np.log1p(-p * falls))

    return math.exp(min(minimize_scalar(exponent, bounds=(-12, 4), method="bounded").fun, 0.0))


def _for(
    target: float, scores: Array, agrees: Array, right: dict[str, Array], clusters: Clusters, draws: Draws
) -> dict[str, Any]:
    """The threshold for an agreement, and its results."""
    most = clusters.most(target)
    found = {"target": target, "level": LEVEL, "items_needed": clusters.needed(target)}
    if most is None:
        return {**found, "threshold": None, "shown": False}
    lowest = clusters.threshold(scores, agrees, most)
    here = np.zeros(len(scores), bool) if lowest is None else scores >= lowest
    figures = _at(lowest, here, agrees, right)
    return {**found, **figures, "shown": True, "answered": draws.share(here.astype(float), np.ones(len(scores)))}


def _at(threshold: float | None, answered: Array, agrees: Array, right: dict[str, Array]) -> dict[str, Any]:
    """The results of a cascade whose student answers these items."""
    return {
        "threshold": threshold,
        "answered": float(answered.mean()),
        "agreement": float((~answered | agrees).mean()),
        "agreement_of_answered": float(agrees[answered].mean()) if answered.any() else None,
        "score": float(np.where(answered, right["student"], right["teacher"]).mean()),
    }


def _points(scores: Array) -> Array:
    """Thresholds from the highest score to the lowest, fifty at most."""
    distinct = np.unique(scores)[::-1]
    return distinct[np.unique(np.linspace(0, len(distinct) - 1, _POINTS).round().astype(int))]


def _calibration(scores: Array, agrees: Array, cluster: Array, seed: int) -> dict[str, Any]:
    """Platt's fit on all items, and its error on items that it was not fitted on."""
    slope, intercept = platt(scores, agrees)
    p = cross_fitted(scores, agrees, cluster, seed)
    groups = np.array_split(np.argsort(p, kind="stable"), min(_GROUPS, len(p)))
    error = sum(len(group) * abs(p[group].mean() - agrees[group].mean()) for group in groups) / len(p)
    return {
        "slope": slope,
        "intercept": intercept,
        "error": float(error),
        "brier": float(((p - agrees) ** 2).mean()),
        "brier_of_the_rate": float(agrees.mean() * (1 - agrees.mean())),
    }


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))
