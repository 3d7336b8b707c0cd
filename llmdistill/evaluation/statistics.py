"""Intervals and tests for models that are measured on the same items.

Tokens of one sequence, samples of one prompt, and questions on one passage are not independent; so whole clusters of them
are drawn (a cluster bootstrap, Efron & Tibshirani 1993, chapter 8) and a mean is a ratio of sums. All models are measured on
the same draws, which makes differences between them paired.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from llmdistill.errors import InputError

Array = np.ndarray[Any, Any]
FEW = 30  # clusters, below which the percentiles of a bootstrap are too near each other
_EXACT = 25  # discordant pairs up to which McNemar's test is the exact binomial one


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval (percentiles of the bootstrap distribution)."""

    mean: float
    low: float
    high: float


def interval_text(interval: Mapping[str, float], form: str, factor: float = 1, to: str = " to ") -> tuple[str, str]:
    """An interval for people: its mean, and `LOW to HIGH`.

    Args:
        interval: with `mean`, `low` and `high`.
        form: of a number, as `format` takes it: `.2f`.
        factor: from the interval to what is shown.
        to: what stands between the ends.
    """
    mean, low, high = (format(factor * interval[key], form) for key in ("mean", "low", "high"))
    return mean, f"{low}{to}{high}"


@dataclass(frozen=True)
class McNemar:
    """Where two models differ on items that are right or wrong, and how likely that is if they are equally good."""

    only_first: int
    only_second: int
    p: float
    test: Literal["exact binomial", "chi-squared"]


def draw_clusters(clusters: int, resamples: int, seed: int) -> Array:
    """How often each cluster is drawn in each resample; shape (resamples, clusters)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)


def resampled_means(sums: Array, sizes: Array, draws: Array) -> Array:
    """The mean of every resample; shape (resamples,).

    Args:
        sums: of a quantity over each cluster; shape (clusters,).
        sizes: how many tokens or items each cluster has, or their weight.
        draws: from `draw_clusters`.
    """
    with np.errstate(invalid="ignore"):  # where a resample has none of a rare kind, its mean is not a number
        return np.asarray((draws @ sums) / (draws @ sizes))


def percentile_interval(value: float, resampled: Array) -> Interval:
    """What was measured, with the middle 95% of what the resamples gave."""
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def mean_interval(sums: Array, sizes: Array, draws: Array) -> Interval:
    """The mean of a quantity over all tokens or items, as in `resampled_means`.

    Of a difference between two models on the same clusters it is the paired difference.
    """
    return percentile_interval(sums.sum() / sizes.sum(), resampled_means(sums, sizes, draws))


def cluster_numbers(keys: Sequence[Any]) -> Array:
    """Equal keys get equal numbers, counted from 0 in order of appearance."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def check_clusters(clusters: int, what: str, remedy: str) -> str | None:
    """Refuse too few independent prompts or items for an interval; a warning where there are enough, but few.

    Args:
        clusters: how many there are.
        what: their name, for the message.
        remedy: which key gives more.

    Raises:
        InputError: there are fewer than two.
    """
    if clusters < 2:
        raise InputError(f"eval: {clusters} {what}, but an interval needs at least 2; {remedy}")
    if clusters < FEW:
        return f"only {clusters} {what}: with fewer than {FEW}, 95% intervals are too narrow; treat them as indications"
    return None


def mcnemar(first: Array, second: Array) -> McNemar:
    """McNemar's test of two models on the same items, two-sided.

    With at most 25 items on which they differ it is the exact binomial test, with more the chi-squared test with Edwards's
    correction (Edwards 1948). Items count as independent.

    Args:
        first: whether each item is right with one model; shape (items,).
        second: the same with the other.
    """
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    if b + c <= _EXACT:
        tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
        return McNemar(b, c, min(1.0, 2 * tail / 2 ** (b + c)), "exact binomial")
    chi_squared = (abs(b - c) - 1) ** 2 / (b + c) if b != c else 0.0
    return McNemar(b, c, math.erfc(math.sqrt(chi_squared / 2)), "chi-squared")


def two_sided_p(resampled: Array) -> float:
    """How likely a difference so far from zero is, from its resamples (Efron & Tibshirani 1993, chapter 15); never 0."""
    below, above = int((resampled <= 0).sum()), int((resampled >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(resampled) + 1))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for having asked several questions (Holm 1979), in the order given."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = worst
    return adjusted


def clusters_needed(sums: Array, sizes: Array, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """How many such clusters would show a mean difference like the one seen, with this power at this two-sided level.

    By the normal approximation, from the spread of the clusters around the ratio of sums; None if the difference is zero.
    """
    mean = sums.sum() / sizes.sum()
    if mean == 0:
        return None
    spread = np.std((sums - mean * sizes) / sizes.mean(), ddof=1)
    z = NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)
    return max(2, math.ceil(round((z * spread / abs(mean)) ** 2, 9)))


@dataclass(frozen=True)
class Draws:
    """Bootstrap resamples of the conversations that rows belong to, the same for everything that is measured on those rows."""

    cluster: Array
    draws: Array

    @classmethod
    def of(cls, conversations: Sequence[str], resamples: int, seed: int) -> "Draws":
        """For rows of these conversations."""
        cluster = cluster_numbers(conversations)
        return cls(cluster, draw_clusters(int(cluster.max()) + 1, resamples, seed))

    def sums(self, values: Array) -> Array:
        """Of the rows of each conversation."""
        return np.bincount(self.cluster, values)

    def interval(self, sums: Array, counts: Array) -> dict[str, float]:
        """The ratio of two sums over rows, with its interval."""
        return asdict(mean_interval(self.sums(sums), self.sums(counts), self.draws))

    def resampled(self, sums: Array, counts: Array) -> Array:
        """The ratio of two sums over rows in every resample."""
        return resampled_means(self.sums(sums), self.sums(counts), self.draws)
