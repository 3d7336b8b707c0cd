"""Soft targets: what is kept of the teacher's distribution at each completion token, and its form on disk.

Shape suffixes used across the package: `B` batch, `T` tokens, `N` completion tokens, `K` targets a position,
`V` vocabulary. Log-probabilities are natural logarithms (nats) of the teacher's own distribution at temperature 1.

On disk a `topk` position is K ids (16 bits where the vocabulary allows, else 32), K log-probabilities in float16 and
the mass outside them in float32. Rounding to float16 changes a log-probability by at most one part in 2,048 of its
size; decoding divides by the sum, so that the K entries and the mass outside them always add up to one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TopK:
    """The K most likely tokens at each of N positions, most likely first, and the probability of all others."""

    ids_NK: Array
    logprobs_NK: Array
    tail_N: Array

    def __post_init__(self) -> None:
        if not (self.ids_NK.shape == self.logprobs_NK.shape and self.ids_NK.shape[:1] == self.tail_N.shape):
            raise ValueError("ids, log-probabilities and tail disagree in shape")

    def __len__(self) -> int:
        return len(self.tail_N)


def topk_from_logprobs(ids_NK: Array, logprobs_NK: Array) -> TopK:
    """Targets from the K most likely tokens alone; the mass outside is what is missing to one, never below zero."""
    mass_N = np.exp(logprobs_NK.astype(np.float64)).sum(axis=1)
    return TopK(ids_NK.astype(np.int64), logprobs_NK.astype(np.float32), np.maximum(1.0 - mass_N, 0.0).astype(np.float32))


def topk_from_dense(logprobs_NV: Array, k: int) -> TopK:
    """Targets from full distributions; equal log-probabilities are taken in the order of their ids."""
    ids_NK = np.argsort(-logprobs_NV, axis=1, kind="stable")[:, :k]
    return topk_from_logprobs(ids_NK, np.take_along_axis(logprobs_NV, ids_NK, axis=1))


def encode(sequences: list[TopK], vocab_size: int) -> dict[str, pa.Array]:
    """The target columns of a shard, one list a sequence, from flat buffers."""
    id_type = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    k = sequences[0].ids_NK.shape[1]
    lengths = np.array([len(sequence) for sequence in sequences])
    ids = np.concatenate([sequence.ids_NK.astype(id_type).ravel() for sequence in sequences])
    logprobs = np.concatenate([sequence.logprobs_NK.astype(np.float16).ravel() for sequence in sequences])
    tail = np.concatenate([sequence.tail_N for sequence in sequences])
    return {
        "target_ids": list_array(ids, lengths * k),
        "target_logprobs": list_array(logprobs, lengths * k),
        "target_tail": list_array(tail, lengths),
    }


def decode(ids: Array, logprobs: Array, tail: Array) -> TopK:
    """The targets of any run of positions from their flat columns; entries and tail add up to one."""
    tail_N = np.asarray(tail, dtype=np.float32)
    logprobs_NK = np.asarray(logprobs, dtype=np.float32).reshape(len(tail_N), -1)
    total_N1 = np.exp(logprobs_NK).sum(axis=1, keepdims=True) + tail_N[:, None]
    ids_NK = np.asarray(ids).astype(np.int64).reshape(logprobs_NK.shape)
    return TopK(ids_NK, logprobs_NK - np.log(total_N1), tail_N / total_N1[:, 0])


def list_array(values: Array, lengths: Array) -> pa.ListArray:
    """An Arrow list column from a flat buffer and the length of each list."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
