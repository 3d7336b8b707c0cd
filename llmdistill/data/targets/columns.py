"""Columns of soft targets as flat buffers: what the kinds share in encoding and decoding."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]


def list_array(values: Array, lengths: Array) -> "pa.ListArray":
    """An Arrow list column from a flat buffer and the length of each list."""
    import pyarrow as pa  # the configuration asks the kinds too, and needs none

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


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
