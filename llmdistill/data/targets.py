"""Soft targets: what is kept of the teacher's distribution at each completion token, and its form on disk.

Shape suffixes used across the package: `B` batch, `T` tokens, `N` completion tokens, `K` targets a position,
`V` vocabulary. Log-probabilities are natural logarithms (nats) of the teacher's own distribution at temperature 1.
The columns are described in docs/dataset.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]

COLUMNS = {
    "topk": ("target_ids", "target_logprobs", "target_tail"),
    "sampled": ("target_ids", "target_logprobs", "target_exact", "target_entropy"),
    "multinomial": ("target_ids", "target_counts", "target_distinct", "target_entropy"),
}


@dataclass(frozen=True)
class TopK:
    """The K most likely tokens at each of N positions, most likely first, and the probability of all others."""

    ids_NK: Array
    logprobs_NK: Array
    tail_N: Array

    def __len__(self) -> int:
        return len(self.tail_N)


@dataclass(frozen=True)
class Sampled:
    """An unbiased sample of K tokens at each of N positions (see `pps`): E[Σ weight · f] = Σ p · f.

    In a row the first `exact` tokens have their own probability as weight, the others share what is left equally;
    each part is in ascending order of ids. `entropy` is −Σ weight · log p, an unbiased estimate of the teacher's entropy
    that has the same noise as the cross-entropy against the sample, so that their difference, the KL, has little.
    """

    ids_NK: Array
    logweights_NK: Array
    exact_N: Array
    entropy_N: Array

    def __len__(self) -> int:
        return len(self.exact_N)


@dataclass(frozen=True)
class Multinomial:
    """The distinct tokens of n independent draws at each of N positions, in ascending order, and how often each came.

    K is the most that any position has; where a position has fewer, the count is 0. `entropy` is −Σ count/n · log p.
    """

    ids_NK: Array
    counts_NK: Array
    entropy_N: Array

    def __len__(self) -> int:
        return len(self.entropy_N)

    @property
    def logweights_NK(self) -> Array:
        """log(count / n), −inf where the count is 0; float32."""
        with np.errstate(divide="ignore"):
            logweights_NK: Array = np.log(self.counts_NK / self.counts_NK.sum(1, keepdims=True), dtype=np.float32)
        return logweights_NK


SoftTargets = TopK | Sampled | Multinomial


def topk_from_logprobs(ids_NK: Array, logprobs_NK: Array) -> TopK:
    """Targets from the K most likely tokens alone; the mass outside is what is missing to one, never below zero."""
    mass_N = np.exp(logprobs_NK.astype(np.float64)).sum(axis=1)
    return TopK(ids_NK.astype(np.int64), logprobs_NK.astype(np.float32), np.maximum(1.0 - mass_N, 0.0).astype(np.float32))


def topk_from_dense(logprobs_NV: Array, k: int) -> TopK:
    """Targets from full distributions; equal log-probabilities are taken in the order of their ids."""
    ids_NK = np.argsort(-logprobs_NV, axis=1, kind="stable")[:, :k]
    return topk_from_logprobs(ids_NK, np.take_along_axis(logprobs_NV, ids_NK, axis=1))


def sampled_from_logprobs(ids_NK: Array, logprobs_NK: Array) -> Sampled:
    """Targets from a drawn sample (`pps.sample`) and the teacher's log-probabilities of its tokens."""
    import torch  # only to make targets: reading them, and a dry run, need none

    from llmdistill.data import pps

    k = ids_NK.shape[1]
    p_NK = np.exp(logprobs_NK.astype(np.float64))
    descending_NK = -np.sort(-p_NK, axis=1)
    exact_N = pps.count_exact(torch.from_numpy(descending_NK)).numpy()
    rank_NK = np.argsort(np.argsort(-p_NK, axis=1, kind="stable"), axis=1, kind="stable")
    order_NK = np.lexsort((ids_NK, rank_NK >= exact_N[:, None]), axis=1)
    ids_NK = np.take_along_axis(ids_NK, order_NK, axis=1).astype(np.int64)
    logprobs_NK = np.take_along_axis(logprobs_NK, order_NK, axis=1)
    is_exact_NK = np.arange(k) < exact_N[:, None]
    stored_NK = logprobs_NK.astype(np.float16).astype(np.float32)
    logweights_NK = _share_the_rest(np.where(is_exact_NK, stored_NK, -np.inf), exact_N)
    return Sampled(ids_NK, logweights_NK, exact_N, -(np.exp(logweights_NK) * logprobs_NK).sum(axis=1))


def multinomial_from_logprobs(ids_Nn: Array, logprobs_Nn: Array) -> Multinomial:
    """Targets from n draws with replacement (`pps.sample_with_replacement`) and the log-probability of each."""
    positions, n = ids_Nn.shape
    sorted_Nn = np.sort(ids_Nn, axis=1)
    is_first_Nn = np.diff(sorted_Nn, axis=1, prepend=-1) != 0
    place_Nn = is_first_Nn.cumsum(axis=1) - 1
    distinct_N = place_Nn[:, -1] + 1
    rows_Nn = np.broadcast_to(np.arange(positions)[:, None], (positions, n))
    ids_NK = np.zeros((positions, int(distinct_N.max(initial=0))), dtype=np.int64)
    counts_NK = np.zeros_like(ids_NK)
    ids_NK[rows_Nn, place_Nn] = sorted_Nn
    np.add.at(counts_NK, (rows_Nn, place_Nn), 1)
    return Multinomial(ids_NK, counts_NK, -logprobs_Nn.mean(axis=1, dtype=np.float64).astype(np.float32))


def from_logprobs(kind: str, ids_NK: Array, logprobs_NK: Array) -> SoftTargets | None:
    """Targets of a kind from the tokens that an engine kept (`pps.keep`); None for text only."""
    if kind == "none":
        return None
    if kind == "topk":
        return topk_from_logprobs(ids_NK, logprobs_NK)
    return sampled_from_logprobs(ids_NK, logprobs_NK) if kind == "sampled" else multinomial_from_logprobs(ids_NK, logprobs_NK)


def after(targets: SoftTargets, start: int) -> SoftTargets:
    """The targets of all positions but the first `start`."""
    return type(targets)(*(getattr(targets, field.name)[start:] for field in fields(targets)))


def encode(sequences: Sequence[SoftTargets], vocab_size: int) -> dict[str, pa.Array]:
    """The target columns of a shard, one list a sequence, from flat buffers."""
    id_type: type[np.unsignedinteger[Any]] = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    lengths = np.array([len(sequence) for sequence in sequences])
    columns = {}
    if isinstance(sequences[0], Multinomial):
        return _encode_multinomial(sequences, id_type)
    k = sequences[0].ids_NK.shape[1]
    if isinstance(sequences[0], TopK):
        columns["target_ids"] = list_array(_joined(sequences, "ids_NK").ravel().astype(id_type), lengths * k)
        columns["target_logprobs"] = list_array(_joined(sequences, "logprobs_NK").ravel().astype(np.float16), lengths * k)
        columns["target_tail"] = list_array(_joined(sequences, "tail_N"), lengths)
        return columns
    exact_N = _joined(sequences, "exact_N")
    is_exact_NK = np.arange(k) < exact_N[:, None]
    ids_NK = _joined(sequences, "ids_NK")
    gaps_NK = np.diff(ids_NK, axis=1, prepend=0)
    np.put_along_axis(gaps_NK, exact_N[:, None], np.take_along_axis(ids_NK, exact_N[:, None], axis=1), axis=1)
    logprobs = _joined(sequences, "logweights_NK")[is_exact_NK].astype(np.float16)
    stored = [int(sequence.exact_N.sum()) for sequence in sequences if isinstance(sequence, Sampled)]
    columns["target_ids"] = list_array(gaps_NK.ravel().astype(id_type), lengths * k)
    columns["target_logprobs"] = list_array(logprobs, np.array(stored))
    columns["target_exact"] = list_array(exact_N.astype(np.uint8), lengths)
    columns["target_entropy"] = _mean_entropies(sequences)
    return columns


def kind_of(columns: Sequence[str]) -> str:
    """The kind of soft targets that a dataset with these columns has; `none` for text only."""
    return next((kind for kind, names in COLUMNS.items() if set(names) <= set(columns)), "none")


def cut(row: Mapping[str, Any], kind: str, positions: int) -> dict[str, Array]:
    """The target columns of a stored row, for its first so many positions."""
    if kind == "topk":
        k = len(row["target_ids"]) // len(row["target_tail"])
        sizes = (positions * k, positions * k, positions)
        return {name: np.asarray(row[name])[:size] for name, size in zip(COLUMNS[kind], sizes, strict=True)}
    entropy_N = np.full(positions, row["target_entropy"], dtype=np.float32)
    if kind == "multinomial":
        distinct_N = np.asarray(row["target_distinct"])[:positions]
        held = int(distinct_N.sum())
        ids, counts = np.asarray(row["target_ids"])[:held], np.asarray(row["target_counts"])[:held]
        return {"target_ids": ids, "target_counts": counts, "target_distinct": distinct_N, "target_entropy": entropy_N}
    exact_N = np.asarray(row["target_exact"])
    k = len(row["target_ids"]) // len(exact_N)
    return {
        "target_ids": np.asarray(row["target_ids"])[: positions * k],
        "target_logprobs": np.asarray(row["target_logprobs"])[: int(exact_N[:positions].sum())],
        "target_exact": exact_N[:positions],
        "target_entropy": entropy_N,
    }


def decode(columns: Mapping[str, Array]) -> SoftTargets:
    """The targets of any run of positions from their flat columns, as `cut` gives them; weights add up to one."""
    if "target_tail" in columns:
        tail_N = np.asarray(columns["target_tail"], dtype=np.float32)
        logprobs_NK = _positions(columns["target_logprobs"].astype(np.float32, copy=False), len(tail_N))
        total_N1 = np.exp(logprobs_NK).sum(axis=1, keepdims=True) + tail_N[:, None]
        ids_NK = _positions(columns["target_ids"].astype(np.int64, copy=False), len(tail_N))
        return TopK(ids_NK, logprobs_NK - np.log(total_N1), tail_N / total_N1[:, 0])
    if "target_counts" in columns:
        return _decode_multinomial(columns)
    exact_N = columns["target_exact"].astype(np.int64)
    gaps_NK = _positions(columns["target_ids"].astype(np.int64, copy=False), len(exact_N))
    is_exact_NK = np.arange(gaps_NK.shape[1]) < exact_N[:, None]
    sums_NK = gaps_NK.cumsum(axis=1)
    # The second part counts from zero again: what the first part has summed up to is taken off.
    before_N = np.take_along_axis(sums_NK, np.maximum(exact_N - 1, 0)[:, None], axis=1)[:, 0] * (exact_N > 0)
    ids_NK = sums_NK - np.where(is_exact_NK, 0, before_N[:, None])
    logweights_NK = np.full(gaps_NK.shape, -np.inf, dtype=np.float32)
    logweights_NK[is_exact_NK] = columns["target_logprobs"]
    return Sampled(ids_NK, _share_the_rest(logweights_NK, exact_N), exact_N, columns["target_entropy"])


def entropies(targets: SoftTargets) -> Array:
    """How undecided the teacher was at each position, in nats: the entropy over what is stored, the tail as one outcome.

    It follows from the distribution alone, not from the luck of a draw, for `topk` and `sampled`; of tokens that share a
    weight, it counts each. It never exceeds log(K + 1).
    """
    if isinstance(targets, TopK):
        p_NJ = np.concatenate([np.exp(targets.logprobs_NK), targets.tail_N[:, None]], axis=1)
    else:
        p_NJ = np.exp(targets.logweights_NK)
    entropy_N: Array = -(p_NJ * np.log(np.maximum(p_NJ, 1e-30))).sum(axis=1)
    return np.maximum(entropy_N, 0)


def _encode_multinomial(sequences: Sequence[Any], id_type: type[np.unsignedinteger[Any]]) -> dict[str, pa.Array]:
    held = [sequence.counts_NK > 0 for sequence in sequences]
    gaps = [np.diff(sequence.ids_NK, axis=1, prepend=0)[mask] for sequence, mask in zip(sequences, held, strict=True)]
    counts = [sequence.counts_NK[mask] for sequence, mask in zip(sequences, held, strict=True)]
    distinct = [mask.sum(axis=1) for mask in held]
    sizes = np.array([mask.sum() for mask in held])
    return {
        "target_ids": list_array(np.concatenate(gaps).astype(id_type), sizes),
        "target_counts": list_array(np.concatenate(counts).astype(np.uint8), sizes),
        "target_distinct": list_array(np.concatenate(distinct).astype(np.uint8), np.array([len(mask) for mask in held])),
        "target_entropy": _mean_entropies(sequences),
    }


def _decode_multinomial(columns: Mapping[str, Array]) -> Multinomial:
    distinct_N = columns["target_distinct"].astype(np.int64)
    held_NK = np.arange(distinct_N.max(initial=0)) < distinct_N[:, None]
    gaps_NK, counts_NK = np.zeros(held_NK.shape, dtype=np.int64), np.zeros(held_NK.shape, dtype=np.int64)
    gaps_NK[held_NK] = columns["target_ids"]
    counts_NK[held_NK] = columns["target_counts"]
    return Multinomial(gaps_NK.cumsum(axis=1) * held_NK, counts_NK, columns["target_entropy"])


def list_array(values: Array, lengths: Array) -> pa.ListArray:
    """An Arrow list column from a flat buffer and the length of each list."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _share_the_rest(logweights_NK: Array, exact_N: Array) -> Array:
    """Give the tokens that are not exact (−inf so far) the mass that is left, in equal parts."""
    k = logweights_NK.shape[1]
    left_N = np.maximum(1 - np.exp(logweights_NK).sum(axis=1, dtype=np.float64), 1e-12)
    log_tau_N = np.log(left_N / (k - exact_N))
    return np.where(np.arange(k) < exact_N[:, None], logweights_NK, log_tau_N[:, None]).astype(np.float32)


def _positions(flat: Array, positions: int) -> Array:
    return flat.reshape(positions, len(flat) // max(positions, 1))


def _mean_entropies(sequences: Sequence[Any]) -> pa.Array:
    return pa.array(np.array([sequence.entropy_N.mean() for sequence in sequences], dtype=np.float32))


def _joined(sequences: Sequence[Any], field: str) -> Array:
    return np.concatenate([getattr(sequence, field) for sequence in sequences])
