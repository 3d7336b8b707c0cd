"""Intervals for means over tokens, by bootstrap over prompts.

Tokens of one sequence, and samples of one prompt, are not independent; so whole prompts are drawn (a cluster bootstrap,
Efron & Tibshirani 1993, chapter 8) and the mean is a ratio of sums. All models are measured on the same draws, which
makes differences between them paired.
"""

from dataclasses import dataclass
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
