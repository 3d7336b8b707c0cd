"""Columns of soft targets as flat buffers: what the kinds share in encoding and decoding."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]
ENTROPIES = (-1.0, 1e4)  # of a stored one, in nats; an estimate may be a little below zero


def list_array(values: Array, lengths: Array) -> "pa.ListArray":
    """An Arrow list column from a flat buffer and the length of each list."""
    import pyarrow as pa  # the configuration asks the kinds too, and needs none

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def list_column(parts: Sequence[Array], dtype: Any) -> "pa.ListArray":
    """An Arrow list column, a list from each array."""
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return list_array(np.concatenate([np.empty(0, dtype), *(part.astype(dtype) for part in parts)]), lengths)


def id_type(vocab_size: int) -> "type[np.unsignedinteger[Any]]":
    """The type in which ids are stored: 16 bits where the vocabulary has at most 65,536 tokens, else 32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def joined(sequences: Sequence[Any], field: str) -> Array:
    """An array of several sequences, one behind the other."""
    return np.concatenate([getattr(sequence, field) for sequence in sequences])


def half_precision(values: Array) -> Array:
    """Values with float16's precision as float32, whose last bytes are zero and compress to nothing.

    Parquet has a float16 of its own, which Spark and DuckDB do not read.
    """
    return values.astype(np.float16).astype(np.float32)


def exact_first(ids_NK: Array, exact_N: Array, rank_NK: Array) -> Array:
    """The order of a position's tokens in a shard, (N, K): the `exact_N` of the lowest rank first, each part by ids."""
    order_NK: Array = np.lexsort((ids_NK, rank_NK >= exact_N[:, None]), axis=1)
    return order_NK


def id_gaps(ids_NK: Array, exact_N: Array) -> Array:
    """Of ids in the order of `exact_first` the differences to the one before; each part counts from zero."""
    gaps_NK = np.diff(ids_NK, axis=1, prepend=0)
    np.put_along_axis(gaps_NK, exact_N[:, None], np.take_along_axis(ids_NK, exact_N[:, None], axis=1), axis=1)
    return gaps_NK


def ids_from_gaps(gaps_NK: Array, exact_N: Array) -> Array:
    """The ids again."""
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


def entropies_of(row: Mapping[str, Any], positions: int) -> Array:
    """What `entropy_column` has stored of the first so many positions; older rows have one mean for all of theirs."""
    stored = np.asarray(row["target_entropy"], dtype=np.float32)
    return stored[:positions] if stored.ndim else np.full(positions, stored)


def by_position(flat: Array, positions: int) -> Array:
    """A flat column of as many values at every position, shape (positions, K)."""
    return flat.reshape(positions, len(flat) // max(positions, 1))


def log(values: Array) -> Array:
    """Natural logarithms as float32, −inf for zero."""
    with np.errstate(divide="ignore"):
        logs: Array = np.log(values).astype(np.float32)
    return logs


def merged(class_NK: Array, weights_NK: Array) -> tuple[Array, Array]:
    """The distinct classes of each position, in ascending order, and what their tokens weigh together, both (N, K).

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


def entropy_within(class_NK: Array, weights_NK: Array, classes_NK: Array, sums_NK: Array) -> Array:
    """What of a sample's entropy is between tokens of the same class, in nats, (N,): Σ w log(w of its class / w).

    Args:
        class_NK: the class of each token.
        weights_NK: what it weighs.
        classes_NK: of `merged`.
        sums_NK: of `merged`.
    """
    of_class_NKK = (class_NK[:, :, None] == classes_NK[:, None, :]) & (sums_NK > 0)[:, None, :]
    sum_NK = (of_class_NKK * sums_NK[:, None, :]).sum(axis=2)
    ratio_NK = np.divide(sum_NK, weights_NK, out=np.ones_like(sum_NK), where=(weights_NK > 0) & (sum_NK > 0))
    within_N: Array = (weights_NK * np.log(ratio_NK)).sum(axis=1)
    return within_N
