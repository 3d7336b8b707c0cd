"""Importance weights, which make text sampled from one distribution represent another.

The teacher's text is drawn from s, its distribution at the sampling temperature; the sequence-level KL is a mean over
texts drawn from p, its distribution at temperature 1. E_s[p/s · f] = E_p[f].
"""

from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]


def log_importance(dataset: Any) -> Array:
    """The importance of every row, as its logarithm log p(y|x) − log s(y|x), from the columns of a `load_dataset`.

    Raises:
        ValueError: the rows do not say with which probability they were sampled.
    """
    columns = ["token_logprobs", "sampling_logprob"]
    parts = []
    if "sampling_logprob" in dataset.column_names:
        for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
            sampled = table["sampling_logprob"].combine_chunks()
            parts.append(_sums(table["token_logprobs"].combine_chunks()) - sampled.to_numpy(zero_copy_only=False))
    found = np.concatenate(parts) if parts else np.array([np.nan])
    if np.isnan(found).any():
        raise ValueError(
            "sequence_alpha needs text whose sampling probability is known: written by `generate` with temperature above 0 "
            "and without top_p and top_k"
        )
    return found


def importance(log_weights_S: Array) -> Array:
    """Weights with a mean of one, truncated at √S (truncated importance sampling, Ionides 2008).

    They are normalised over the whole dataset and not over a batch, so that how it is cut into batches changes nothing.

    Args:
        log_weights_S: of S texts.
    """
    weights_S = np.exp(log_weights_S - np.max(log_weights_S))
    cut_S = np.minimum(weights_S / weights_S.mean(), np.sqrt(len(weights_S)))
    result: Array = cut_S / cut_S.mean()
    return result


def effective_sample_size(weights_S: Array) -> float:
    """The number of equally weighted texts with the same precision of the mean: (Σw)² / Σw² (Kish 1965)."""
    return float(weights_S.sum() ** 2 / (weights_S**2).sum())


def _sums(lists: pa.ListArray) -> Array:
    """The sum of each list, in float64."""
    values = np.concatenate([[0.0], np.cumsum(lists.flatten().to_numpy(), dtype=np.float64)])
    ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))
    sums: Array = values[ends] - values[np.concatenate([[0], ends[:-1]])]
    return sums
