"""Columns of soft targets as flat buffers: shared encoding and decoding."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]
ENTROPIES = (-1.0, 1e4)  # of a stored one, in nats; an estimate may be a little below zero
_ROUNDED = 0.1  # how far from one probabilities may add up: float16, and a bfloat16 teacher


def list_array(values: Array, lengths: Array) -> "pa.ListArray":
    """An Arrow list column from a flat buffer and the length of each list."""
    import pyarrow as pa  # the configuration asks the kinds too, and needs none

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def list_column(parts: Sequence[Array], dtype: Any) -> "pa.ListArray":
    """An Arrow list column, one list per array."""
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return list_array(np.concatenate([np.empty(0, dtype), *(part.astype(dtype) for part in parts)]), lengths)


def id_type(vocab_size: int) -> "type[np.unsignedinteger[Any]]":
    """The type in which ids are stored: 16 bits if the vocabulary has at most 65,536 tokens, else 32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def joined(sequences: Sequence[Any], field: str) -> Array:
    """Concatenate the arrays of several sequences."""
    return np.concatenate([getattr(sequence, field) for sequence in sequences])


def half_precision(values: Array) -> Array:
    """Values with float16's precision as float32, whose last bytes are zero and compress well.

    Parquet has a float16 of its own, which Spark and DuckDB do not read.
    """
    return values.astype(np.float16).astype(np.float32)


def exact_first(ids_NK: Array, exact_N: Array, rank_NK: Array) -> Array:
    """The order of a position's tokens in a shard, (N, K): the `exact_N` of the lowest rank first, each part by ids."""
    order_NK: Array = np.lexsort((ids_NK, rank_NK >= exact_N[:, None]), axis=1)
    return order_NK


def id_gaps(ids_NK: Array, exact_N: Array) -> Array:
    """The differences between consecutive ids in the order of `exact_first`; each part counts from zero."""
    gaps_NK = np.diff(ids_NK, axis=1, prepend=0)
    np.put_along_axis(gaps_NK, exact_N[:, None], np.take_along_axis(ids_NK, exact_N[:, None], axis=1), axis=1)
    return gaps_NK


def ids_from_gaps(gaps_NK: Array, exact_N: Array) -> Array:
    """Restore the ids."""
    is_exact_NK = np.arange(gaps_NK.shape[1]) < exact_N[:, None]
    sums_NK = gaps_NK.cumsum(axis=1)
    # The second part counts from zero again: what the first part has summed up to is taken off.
    before_N = np.take_along_axis(sums_NK, np.maximum(exact_N - 1, 0)[:, None], axis=1)[:, 0] * (exact_N > 0)
    ids_NK: Array = sums_NK - np.where(is_exact_NK, 0, before_N[:, None])
    return ids_NK


def entropy_column(sequences: Sequence[Any]) -> "pa.Array":
    """The teacher's `entropy_N` at every position."""
    lengths = np.array([len(sequence.entropy_N) for sequence in sequences])
    return list_array(half_precision(joined(sequences, "entropy_N")), lengths)


def every(columns: Mapping[str, Array], name: str, positions: int) -> Array:
    """Number of values that a flat column has at each position, (N,), if it is the same everywhere."""
    return np.full(positions, len(columns[name]) // max(positions, 1))


def repeats(ids_NK: Array, is_there_NK: Array) -> Array:
    """Whether a token occurs twice at each position, (N,), among those that are there."""
    of_none = -1 - np.arange(ids_NK.shape[1])  # a place without a token is like no other
    sorted_NK = np.sort(np.where(is_there_NK, ids_NK, of_none), axis=1)
    found_N: Array = (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(axis=1)
    return found_N


def masses(logprobs: Array, sizes_N: Array) -> Array:
    """The sum of the probabilities at each position, (N,), from flat logarithms and the number at each position."""
    position = np.repeat(np.arange(len(sizes_N)), sizes_N)
    return np.bincount(position, np.exp(logprobs.astype(np.float64)), len(sizes_N))


def wrong_mass(mass_N: Array, names: str, least: float = 1.0) -> tuple[int, str] | None:
    """The first position whose probabilities add up to more than one or less than `least`, beyond rounding, and why."""
    wrong = np.flatnonzero((mass_N > 1 + _ROUNDED) | (mass_N < least - _ROUNDED))
    return (int(wrong[0]), f"the probabilities in {names} add up to {mass_N[wrong[0]]:.3g}") if wrong.size else None


def by_position(flat: Array, positions: int) -> Array:
    """A flat column with the same number of values at every position, shape (positions, K)."""
    return flat.reshape(positions, len(flat) // max(positions, 1))


def log(values: Array) -> Array:
    """Natural logarithms as float32, −inf for zero."""
    with np.errstate(divide="ignore"):
        logs: Array = np.log(values).astype(np.float32)
    return logs


def merged(class_NK: Array, weights_NK: Array) -> tuple[Array, Array]:
    """The distinct classes of each position, ascending, and the total weight of their tokens, both (N, K).

    Places that are left over have the class −1 and the weight 0.

    Args:
        class_NK: the class of each token.
        weights_NK: what it weighs, not its logarithm.
    """
    positions, k = class_NK.shape
    there_NK = weights_NK > 0
    order_NK = np.argsort(np.where(there_NK, class_NK, np.iinfo(np.int64).max), axis=1, kind="stable")
    sorted_NK, there_NK = np.take_along_axis(class_NK, order_NK, axis=1), np.take_along_axis(there_NK, order_NK, axis=1)
    is_first_NK = np.diff(sorted_NK, axis=1, prepend=-1) != 0
    place_NK = (is_first_NK & there_NK).cumsum(axis=1) - 1
    flat = (np.arange(positions)[:, None] * k + place_NK)[there_NK]
    classes_NK = np.full((positions, k), -1, dtype=np.int64)
    classes_NK.reshape(-1)[flat] = sorted_NK[there_NK]
    sums = np.bincount(flat, np.take_along_axis(weights_NK, order_NK, axis=1)[there_NK], minlength=positions * k)
    return classes_NK, sums.astype(np.float64, copy=False).reshape(positions, k)  # of no position, `bincount` gives integers


def entropy_within(weights_NK: Array, sums_NK: Array) -> Array:
    """The part of a sample's entropy that is within classes, in nats, (N,): Σ w log(w of its class / w).

    It equals the entropy of the tokens minus that of the classes.

    Args:
        weights_NK: what each token weighs.
        sums_NK: what each class weighs, from `merged`.
    """
    within_N: Array = (_x_log_x(sums_NK) - _x_log_x(weights_NK)).sum(axis=1)
    return within_N


def entropy_without(entropy_N: Array, weights_NK: Array, is_left_NK: Array, exact_N: Array) -> Array:
    """The sample's estimate of the entropy of the distribution without some tokens, renormalised, (N,).

    With W the sum of the weights that are left, it is −Σ (w/W) log p + log W over those tokens. For an exact token, log p is
    log w. For drawn tokens only the mean of log p is known, which stands for each of them.

    Args:
        entropy_N: −Σ w log p of all tokens.
        weights_NK: w, which add up to one.
        is_left_NK: whether a token is left.
        exact_N: how many of the first tokens of each position weigh their own probability.
    """
    exact_NK = weights_NK * (np.arange(weights_NK.shape[1]) < exact_N[:, None])
    drawn_NK = weights_NK - exact_NK
    left_N, drawn_N = (weights_NK * is_left_NK).sum(axis=1), drawn_NK.sum(axis=1)
    of_exact_N = -_x_log_x(exact_NK).sum(axis=1)
    kept_N = -_x_log_x(exact_NK * is_left_NK).sum(axis=1)
    share_N = np.divide((drawn_NK * is_left_NK).sum(axis=1), drawn_N, out=np.zeros_like(drawn_N), where=drawn_N > 0)
    kept_N = kept_N + (entropy_N - of_exact_N) * share_N
    safe_N = np.maximum(left_N, 1e-30)
    return np.where(is_left_NK.all(axis=1), entropy_N, np.where(left_N > 0, kept_N / safe_N + np.log(safe_N), 0 * entropy_N))


def _x_log_x(values: Array) -> Array:
    """The product of a number and its logarithm, 0 at 0."""
    return values * np.log(np.where(values > 0, values, 1))
