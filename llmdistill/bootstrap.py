"""Intervals for means over tokens, by bootstrap over prompts.

Tokens of one sequence, and samples of one prompt, are not independent; so whole prompts are drawn (a cluster bootstrap,
Efron & Tibshirani 1993, chapter 8) and the mean is a ratio of sums. All models are measured on the same draws, which
makes differences between them paired.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval (percentiles of the bootstrap distribution)."""

    mean: float
    low: float
    high: float


def draw_clusters(clusters: int, resamples: int, seed: int) -> Array:
    """How often each cluster is drawn in each resample; shape (resamples, clusters)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)


def mean_interval(sums: Array, tokens: Array, draws: Array) -> Interval:
    """The mean of a quantity over all tokens.

    Args:
        sums: its sum over each cluster's tokens; shape (clusters,).
        tokens: the tokens of each cluster.
        draws: from `draw_clusters`.
    """
    low, high = np.percentile((draws @ sums) / (draws @ tokens), [2.5, 97.5])
    return Interval(float(sums.sum() / tokens.sum()), float(low), float(high))


@dataclass(frozen=True)
class Draws:
    """Bootstrap resamples of the conversations that rows belong to, the same for everything that is measured on those rows."""

    cluster: Array
    draws: Array

    @classmethod
    def of(cls, conversations: Sequence[str], resamples: int, seed: int) -> "Draws":
        """For rows of these conversations."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(conversations))}
        cluster = np.array([numbers[name] for name in conversations])
        return cls(cluster, draw_clusters(len(numbers), resamples, seed))

    def interval(self, sums: Array, counts: Array) -> dict[str, float]:
        """The ratio of two sums over rows, with its interval."""
        return asdict(mean_interval(np.bincount(self.cluster, sums), np.bincount(self.cluster, counts), self.draws))
