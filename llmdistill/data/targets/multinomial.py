"""Soft targets of kind `multinomial`: n independent draws with replacement, each of weight 1/n (arXiv 2503.16870)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from llmdistill.data.targets.base import MemberTokens
from llmdistill.data.targets.columns import (
    ENTROPIES,
    Array,
    entropy_column,
    entropy_within,
    entropy_without,
    id_type,
    list_array,
    log,
    merged,
)
from llmdistill.data.targets.unbiased import UnbiasedSample

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor


@dataclass(frozen=True)
class Multinomial(UnbiasedSample):
    """The distinct tokens of n independent draws at each of N positions, ascending, and their counts.

    K is the most that any position has; where a position has fewer, the count is 0.
    """

    counts_NK: Array
    entropy_N: Array

    name = "multinomial"
    summary = "n independent draws"
    columns = ("target_ids", "target_counts", "target_distinct", "target_entropy")
    one_each = ("target_distinct", "target_entropy")
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "target_counts": (1, 255), "target_distinct": (1, 255), "target_entropy": ENTROPIES
    }  # fmt: skip
    distinct = False
    bytes_per_token = 0.8

    @classmethod
    def uniforms(cls, n: int) -> int:
        return n

    @classmethod
    def keep(cls, logprobs_NV: "Tensor", n: int, uniform_NU: "Tensor") -> "Tensor":
        from llmdistill.data.targets import draw

        return draw.sample_with_replacement(logprobs_NV, uniform_NU)

    @classmethod
    def from_kept(cls, ids_NK: Array, logprobs_NK: Array) -> Self:
        """Build from the n draws of each position and the log-probability of each."""
        positions, n = ids_NK.shape
        sorted_Nn = np.sort(ids_NK, axis=1)
        is_first_Nn = np.diff(sorted_Nn, axis=1, prepend=-1) != 0
        place_Nn = is_first_Nn.cumsum(axis=1) - 1
        distinct_N = place_Nn[:, -1] + 1
        rows_Nn = np.broadcast_to(np.arange(positions)[:, None], (positions, n))
        distinct_NK = np.zeros((positions, int(distinct_N.max(initial=0))), dtype=np.int64)
        counts_NK = np.zeros_like(distinct_NK)
        distinct_NK[rows_Nn, place_Nn] = sorted_Nn
        np.add.at(counts_NK, (rows_Nn, place_Nn), 1)
        return cls(distinct_NK, counts_NK, -logprobs_NK.mean(axis=1, dtype=np.float64).astype(np.float32))

    @classmethod
    def mix(cls, members: MemberTokens, n: int, uniform_NU: Array) -> Self:
        """For each draw, choose a member by weight and take its own draw: n independent draws from the mean."""
        ends_M = np.exp(members.log_weights_M).cumsum()
        member_Nn = np.minimum(np.searchsorted(ends_M, uniform_NU, side="right"), len(ends_M) - 1)
        at = member_Nn, np.arange(len(member_Nn))[:, None], np.arange(n)
        return cls.from_kept(members.ids_MNK[at], members.mean_MNK[at])

    @classmethod
    def encode(cls, sequences: Sequence[Self], vocab_size: int) -> "dict[str, pa.Array]":
        held = [sequence.counts_NK > 0 for sequence in sequences]
        gaps = [np.diff(sequence.ids_NK, axis=1, prepend=0)[mask] for sequence, mask in zip(sequences, held, strict=True)]
        counts = [sequence.counts_NK[mask] for sequence, mask in zip(sequences, held, strict=True)]
        distinct = [mask.sum(axis=1) for mask in held]
        sizes = np.array([mask.sum() for mask in held])
        return {
            "target_ids": list_array(np.concatenate(gaps).astype(id_type(vocab_size)), sizes),
            "target_counts": list_array(np.concatenate(counts).astype(np.uint8), sizes),
            "target_distinct": list_array(np.concatenate(distinct).astype(np.uint8), np.array([len(mask) for mask in held])),
            "target_entropy": entropy_column(sequences),
        }

    @classmethod
    def truncate(cls, row: Mapping[str, Any], positions: int) -> dict[str, Array]:
        distinct_N = np.asarray(row["target_distinct"])[:positions]
        held = int(distinct_N.sum())
        return {
            "target_ids": np.asarray(row["target_ids"])[:held],
            "target_counts": np.asarray(row["target_counts"])[:held],
            "target_distinct": distinct_N,
            "target_entropy": np.asarray(row["target_entropy"], dtype=np.float32)[:positions],
        }

    @classmethod
    def sizes(cls, columns: Mapping[str, Array], positions: int) -> dict[str, Array]:
        return dict.fromkeys(("target_ids", "target_counts"), columns["target_distinct"])

    @classmethod
    def decode(cls, columns: Mapping[str, Array]) -> Self:
        distinct_N = columns["target_distinct"].astype(np.int64)
        held_NK = np.arange(distinct_N.max(initial=0)) < distinct_N[:, None]
        gaps_NK, counts_NK = np.zeros(held_NK.shape, dtype=np.int64), np.zeros(held_NK.shape, dtype=np.int64)
        gaps_NK[held_NK] = columns["target_ids"]
        counts_NK[held_NK] = columns["target_counts"]
        return cls(gaps_NK.cumsum(axis=1) * held_NK, counts_NK, columns["target_entropy"])

    def of_classes(self, class_V: Array, dropped: int | None = None) -> Self:
        class_NK = class_V[self.ids_NK]
        left = self if dropped is None else self._left(class_NK != dropped)
        classes_NK, sums_NK = merged(class_NK, left.counts_NK)
        total_N1 = np.maximum(left.counts_NK.sum(axis=1, keepdims=True), 1)
        entropy_N = left.entropy_N - entropy_within(left.counts_NK / total_N1, sums_NK / total_N1)
        return type(self)(classes_NK, sums_NK.astype(np.int64), entropy_N.astype(np.float32))

    def within(self, vocab_size: int) -> Self:
        return self._left(self.ids_NK < vocab_size)

    def _left(self, is_left_NK: Array) -> Self:
        """The same without some tokens."""
        weights_NK = self.counts_NK / np.maximum(self.counts_NK.sum(axis=1, keepdims=True), 1)
        entropy_N = entropy_without(self.entropy_N, weights_NK, is_left_NK, np.zeros(len(self), dtype=np.int64))
        return type(self)(self.ids_NK * is_left_NK, self.counts_NK * is_left_NK, entropy_N.astype(np.float32))

    def logweights(self) -> Array:
        """log(count / n), float32."""
        return log(self.counts_NK / np.maximum(self.counts_NK.sum(1, keepdims=True), 1))

    @classmethod
    def sentence(cls, described: Mapping[str, Any]) -> str:
        return f"{described.get('n')} independent draws at every position"

    @classmethod
    def facts(cls, described: Mapping[str, Any], column: Callable[[str], Array]) -> dict[str, str]:
        return {"distinct": f"{column('target_distinct').mean():.1f} of {described['n']} draws per position"}
