"""Soft targets of kind `sampled`: n different tokens, drawn with probability proportional to size (see `draw`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from llmdistill.data.targets.base import MemberTokens
from llmdistill.data.targets.columns import (
    ENTROPIES,
    Array,
    by_position,
    entropy_column,
    entropy_within,
    entropy_without,
    every,
    exact_first,
    half_precision,
    id_gaps,
    id_type,
    ids_from_gaps,
    joined,
    list_array,
    log,
    masses,
    merged,
    wrong_mass,
)
from llmdistill.data.targets.unbiased import UnbiasedSample

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

_MOST = 255  # tokens of a member's sample


class ProportionalSample:
    """How K tokens at each of N positions are drawn in proportion to their probability, and how they are stored.

    The first `exact_N` tokens of a position are there for certain, the others by the draw; each part is in ascending order of
    ids, of which the gaps are stored.
    """

    @classmethod
    def uniforms(cls, n: int) -> int:
        """One random number per position."""
        return 1

    @classmethod
    def keep(cls, logprobs_NV: "Tensor", n: int, uniform_NU: "Tensor") -> "Tensor":
        """The ids of a drawn sample, (N, n)."""
        from llmdistill.data.targets import draw

        return draw.sample(logprobs_NV, n, uniform_NU[:, 0])

    @staticmethod
    def encode_sample(sequences: Sequence[Any], vocab_size: int, logprobs: "pa.Array") -> "dict[str, pa.Array]":
        """The columns for the ids, their log-probabilities if stored, and the number of exact tokens."""
        lengths, exact_N = np.array([len(sequence) for sequence in sequences]), joined(sequences, "exact_N")
        gaps_NK = id_gaps(joined(sequences, "ids_NK"), exact_N)
        return {
            "target_ids": list_array(gaps_NK.ravel().astype(id_type(vocab_size)), lengths * gaps_NK.shape[1]),
            "target_logprobs": logprobs,
            "target_exact": list_array(exact_N.astype(np.uint8), lengths),
        }

    @staticmethod
    def truncate_ids(row: Mapping[str, Any], positions: int) -> dict[str, Array]:
        """These columns for the first positions of a row."""
        exact_N = np.asarray(row["target_exact"])
        k = len(row["target_ids"]) // max(len(exact_N), 1)
        return {"target_ids": np.asarray(row["target_ids"])[: positions * k], "target_exact": exact_N[:positions]}

    @classmethod
    def sizes(cls, columns: Mapping[str, Array], positions: int) -> dict[str, Array]:
        """One log-probability per token."""
        return {"target_logprobs": every(columns, "target_ids", positions)}

    @classmethod
    def wrong_position(cls, columns: Mapping[str, Array], row_N: Array) -> tuple[int, str] | None:
        """Refuse probabilities of distinct tokens that add up to more than one."""
        logprobs = columns["target_logprobs"]
        return wrong_mass(masses(logprobs, cls.sizes(columns, len(row_N))["target_logprobs"]), "target_logprobs", least=0.0)

    @staticmethod
    def decode_ids(columns: Mapping[str, Array]) -> tuple[Array, Array]:
        """The ids (N, K) and the number of exact ones (N,)."""
        exact_N = columns["target_exact"].astype(np.int64)
        gaps_NK = by_position(columns["target_ids"].astype(np.int64, copy=False), len(exact_N))
        return ids_from_gaps(gaps_NK, exact_N), exact_N


@dataclass(frozen=True)
class Sampled(ProportionalSample, UnbiasedSample):
    """An unbiased sample of K tokens at each of N positions.

    In a row the first `exact` tokens have their own probability as weight, the others share what is left equally;
    each part is in ascending order of ids.
    """

    logweights_NK: Array
    exact_N: Array
    entropy_N: Array

    name = "sampled"
    summary = "an unbiased sample of n tokens"
    columns = ("target_ids", "target_logprobs", "target_exact", "target_entropy")
    one_each = ("target_exact", "target_entropy")
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"target_logprobs": (-np.inf, 0), "target_entropy": ENTROPIES}
    relative_error = 2**-11  # float16
    bytes_per_token = 2.2

    @classmethod
    def from_kept(cls, ids_NK: Array, logprobs_NK: Array, sizes_NK: Array | None = None) -> Self:
        """Build from drawn tokens; `sizes_NK` is what they were drawn in proportion to, if not their probabilities."""
        k = ids_NK.shape[1]
        sizes_NK = np.exp(logprobs_NK.astype(np.float64)) if sizes_NK is None else sizes_NK
        exact_N, rank_NK = exact_and_rank(sizes_NK)
        order_NK = exact_first(ids_NK, exact_N, rank_NK)
        ids_NK, logprobs_NK, sizes_NK = (np.take_along_axis(values, order_NK, 1) for values in (ids_NK, logprobs_NK, sizes_NK))
        is_exact_NK = np.arange(k) < exact_N[:, None]
        with np.errstate(divide="ignore"):
            stored_NK = np.log(sizes_NK).astype(np.float16).astype(np.float32)
        logweights_NK = _share_the_rest(np.where(is_exact_NK, stored_NK, -np.inf), exact_N)
        told_NK = np.where(np.isneginf(logprobs_NK), 0, logprobs_NK)
        entropy_N = -(np.exp(logweights_NK) * told_NK).sum(axis=1)
        return cls(ids_NK.astype(np.int64), logweights_NK, exact_N, entropy_N)

    @classmethod
    def of_member(cls, n: int) -> int:
        return min(2 * n, _MOST)

    @classmethod
    def mix(cls, members: MemberTokens, n: int, uniform_NU: Array) -> Self:
        """A sample of the members' samples.

        A member m with the weight v_m has drawn a sample with weights w_m from p_m, with E[Σ w_m f] = Σ p_m f. So the union
        of all, in which a token weighs W = Σ_m v_m w_m, is a sample of the mean p̄ = Σ_m v_m p_m: E[Σ W f] = Σ p̄ f. W adds
        up to one, and is a distribution over at most M·K tokens, from which n are drawn in turn: E[Σ w f | W] = Σ W f, so
        E[Σ w f] = Σ p̄ f. What all members kept exactly weighs p̄ in the union, and in the end if it is exact there too.
        `entropy_N`, −Σ w log p̄, is the case f = −log p̄: an unbiased estimate of the entropy of the mean.
        """
        import torch

        from llmdistill.data.targets import draw

        own_MNK = members.logprobs_LMNK[np.arange(len(members.ids_MNK)), np.arange(len(members.ids_MNK))]
        weights_MNK = _weights(np.exp(own_MNK.astype(np.float64))) * np.exp(members.log_weights_M)[:, None, None]
        ids_NJ, sums_NJ, logprobs_NJ = members.merged(weights_MNK)
        with np.errstate(divide="ignore"):
            log_sums_NJ = torch.from_numpy(np.log(sums_NJ))
        at_Nn = draw.sample(log_sums_NJ, n, torch.from_numpy(uniform_NU[:, 0])).numpy()
        return cls.from_kept(*(np.take_along_axis(values, at_Nn, 1) for values in (ids_NJ, logprobs_NJ, sums_NJ)))

    @classmethod
    def encode(cls, sequences: Sequence[Self], vocab_size: int) -> "dict[str, pa.Array]":
        is_exact_NK = np.arange(sequences[0].ids_NK.shape[1]) < joined(sequences, "exact_N")[:, None]
        logprobs = half_precision(joined(sequences, "logweights_NK")[is_exact_NK])
        stored = np.array([int(sequence.exact_N.sum()) for sequence in sequences])
        made = cls.encode_sample(sequences, vocab_size, list_array(logprobs, stored))
        return made | {"target_entropy": entropy_column(sequences)}

    @classmethod
    def truncate(cls, row: Mapping[str, Any], positions: int) -> dict[str, Array]:
        ids = cls.truncate_ids(row, positions)
        return ids | {
            "target_logprobs": np.asarray(row["target_logprobs"])[: int(ids["target_exact"].sum())],
            "target_entropy": np.asarray(row["target_entropy"], dtype=np.float32)[:positions],
        }

    @classmethod
    def sizes(cls, columns: Mapping[str, Array], positions: int) -> dict[str, Array]:
        """One log-probability per exact token."""
        return {"target_logprobs": columns["target_exact"]}

    @classmethod
    def decode(cls, columns: Mapping[str, Array]) -> Self:
        ids_NK, exact_N = cls.decode_ids(columns)
        logweights_NK = np.full(ids_NK.shape, -np.inf, dtype=np.float32)
        logweights_NK[np.arange(ids_NK.shape[1]) < exact_N[:, None]] = columns["target_logprobs"]
        return cls(ids_NK, _share_the_rest(logweights_NK, exact_N), exact_N, columns["target_entropy"])

    def of_classes(self, class_V: Array, dropped: int | None = None) -> Self:
        class_NK = class_V[self.ids_NK]
        left = self if dropped is None else self._left(class_NK != dropped)
        weights_NK = np.exp(left.logweights_NK.astype(np.float64))
        classes_NK, sums_NK = merged(class_NK, weights_NK)
        entropy_N = left.entropy_N - entropy_within(weights_NK, sums_NK)
        return type(self)(classes_NK, log(sums_NK), self.exact_N, entropy_N.astype(np.float32))

    def within(self, vocab_size: int) -> Self:
        return self._left(self.ids_NK < vocab_size)

    def _left(self, is_left_NK: Array) -> Self:
        """The same without some tokens; the weights of the others are renormalised."""
        if is_left_NK.all():
            return self
        weights_NK = np.exp(self.logweights_NK.astype(np.float64))
        entropy_N = entropy_without(self.entropy_N, weights_NK, is_left_NK, self.exact_N)
        left_NK = weights_NK * is_left_NK
        logweights_NK = log(left_NK / np.maximum(left_NK.sum(axis=1, keepdims=True), 1e-30))
        return type(self)(self.ids_NK * is_left_NK, logweights_NK, self.exact_N, entropy_N.astype(np.float32))

    def logweights(self) -> Array:
        return self.logweights_NK

    @classmethod
    def sentence(cls, described: Mapping[str, Any]) -> str:
        return f"an unbiased sample of {described.get('n')} tokens at every position"

    @classmethod
    def facts(cls, described: Mapping[str, Any], column: Callable[[str], Array]) -> dict[str, str]:
        exact = column("target_exact")
        return {"kept exactly": f"{exact.mean():.1f} of {described['n']} tokens per position, the others by an unbiased draw"}


def exact_and_rank(sizes_NK: Array) -> tuple[Array, Array]:
    """Number of a sample's tokens that are certain to be drawn, (N,), and the rank of each by size, (N, K)."""
    import torch

    from llmdistill.data.targets import draw

    order_NK = np.argsort(-sizes_NK, axis=1, kind="stable")
    exact_N: Array = draw.count_exact(torch.from_numpy(np.take_along_axis(sizes_NK, order_NK, 1))).numpy()
    return exact_N, np.argsort(order_NK, axis=1, kind="stable")


def _weights(sizes_MNK: Array) -> Array:
    """The weights of sampled tokens, from what they were drawn in proportion to, in float64."""
    sizes_RK = sizes_MNK.reshape(-1, sizes_MNK.shape[-1])
    exact_R, rank_RK = exact_and_rank(sizes_RK)
    is_exact_RK = rank_RK < exact_R[:, None]
    left_R = np.maximum(1 - (sizes_RK * is_exact_RK).sum(axis=1), 1e-12)
    shares_R = left_R / (sizes_RK.shape[1] - exact_R)
    return np.where(is_exact_RK, sizes_RK, shares_R[:, None]).reshape(sizes_MNK.shape)


def _share_the_rest(logweights_NK: Array, exact_N: Array) -> Array:
    """Distribute the remaining mass equally over the tokens that are not exact (−inf so far)."""
    k = logweights_NK.shape[1]
    left_N = np.maximum(1 - np.exp(logweights_NK).sum(axis=1, dtype=np.float64), 1e-12)
    log_tau_N = np.log(left_N / (k - exact_N))
    return np.where(np.arange(k) < exact_N[:, None], logweights_NK, log_tau_N[:, None]).astype(np.float32)
