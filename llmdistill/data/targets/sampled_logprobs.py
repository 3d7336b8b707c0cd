"""Soft targets of kind `sampled_logprobs`: the sample of kind `sampled`, with the log-probability of every token in it.

A weighted cross-entropy needs the weights alone; any other divergence is a sum of f(p, q), and so needs p as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from llmdistill.data.targets.base import SoftTargets
from llmdistill.data.targets.columns import (
    Array,
    by_position,
    exact_first,
    half_precision,
    joined,
    list_array,
)
from llmdistill.data.targets.sampled import ProportionalSample, exact_and_rank

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from llmdistill.losses import Objective

_NO_SUM = {
    "adaptive_kl": "its weights depend on the full distribution",
    "neg_log_acceptance": "the logarithm of an unbiased estimate is biased",
}
_LEAST_LEFT = 1e-12  # of the mass that tokens share which are not there for certain


@dataclass(frozen=True)
class SampledLogprobs(ProportionalSample, SoftTargets):
    """A sample of K tokens at each of N positions, their log-probabilities and design weights.

    Attributes:
        logprobs_NK: of the teacher, natural logarithms.
        logdesign_NK: −log π, π the probability with which a token is in the sample; 0 for the first `exact`, which are there
            for certain; −inf where there is no token. Each of the two parts is in ascending order of ids.
        exact_N: how many are there for certain.
    """

    logprobs_NK: Array
    logdesign_NK: Array
    exact_N: Array

    name = "sampled_logprobs"
    summary = "the same sample, with the log-probability of each token, for most divergences"
    size = "n"
    columns: ClassVar[tuple[str, ...]] = ("target_ids", "target_logprobs", "target_exact")
    one_each: ClassVar[tuple[str, ...]] = ("target_exact",)
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"target_logprobs": (-np.inf, 0)}
    unbiased = True
    over_classes = False  # f of a sum is not the sum of f
    relative_error = 2**-11  # float16
    bytes_per_token = 2.8
    unbounded: ClassVar[str] = "reverse_kl"
    """The divergence whose estimate has a variance without bound."""
    lacks: ClassVar[str] = "student has mass where the teacher has none"
    """Where."""

    @classmethod
    def from_kept(cls, ids_NK: Array, logprobs_NK: Array) -> "SampledLogprobs":
        exact_N, rank_NK = exact_and_rank(np.exp(logprobs_NK.astype(np.float64)))
        order_NK = exact_first(ids_NK, exact_N, rank_NK)
        ids_NK, logprobs_NK = (np.take_along_axis(values, order_NK, 1) for values in (ids_NK, logprobs_NK))
        return SampledLogprobs(ids_NK.astype(np.int64), logprobs_NK, _logdesign(logprobs_NK, exact_N), exact_N)

    @classmethod
    def encode(cls, sequences: Sequence[Self], vocab_size: int) -> "dict[str, pa.Array]":
        stored = np.array([sequence.logprobs_NK.size for sequence in sequences])
        logprobs = half_precision(joined(sequences, "logprobs_NK").ravel())
        return cls.encode_sample(sequences, vocab_size, list_array(logprobs, stored))

    @classmethod
    def truncate(cls, row: Mapping[str, Any], positions: int) -> dict[str, Array]:
        ids = cls.truncate_ids(row, positions)
        return ids | {"target_logprobs": np.asarray(row["target_logprobs"])[: len(ids["target_ids"])]}

    @classmethod
    def decode(cls, columns: Mapping[str, Array]) -> Self:
        ids_NK, exact_N = cls.decode_ids(columns)
        logprobs_NK = by_position(columns["target_logprobs"].astype(np.float32, copy=False), len(exact_N))
        return cls(ids_NK, logprobs_NK, _logdesign(logprobs_NK, exact_N), exact_N)

    def within(self, vocab_size: int) -> Self:
        is_there_NK = self.ids_NK < vocab_size
        if is_there_NK.all():
            return self
        left_N1 = np.exp(self.logprobs_NK + np.where(is_there_NK, self.logdesign_NK, -np.inf)).sum(axis=1, keepdims=True)
        return replace(
            self,
            ids_NK=np.where(is_there_NK, self.ids_NK, 0),
            logprobs_NK=(self.logprobs_NK - np.log(np.maximum(left_N1, 1e-30))).astype(np.float32),
            logdesign_NK=np.where(is_there_NK, self.logdesign_NK, -np.inf).astype(np.float32),
        )

    def logweights(self) -> Array:
        """log(p/π) less the logarithm of their sum: of a sample drawn from p, which adds up to one already, nothing."""
        logs_NK = self.logprobs_NK + self.logdesign_NK
        top_N1 = logs_NK.max(axis=1, keepdims=True)
        normalised: Array = logs_NK - top_N1 - np.log(np.exp(logs_NK - top_N1).sum(axis=1, keepdims=True))
        return normalised

    def told(self) -> Array:
        return self.logprobs_NK

    @classmethod
    def sentence(cls, described: Mapping[str, Any]) -> str:
        return f"an unbiased sample of {described.get('n')} tokens at every position, with their log-probabilities"

    @classmethod
    def facts(cls, described: Mapping[str, Any], column: Callable[[str], Array]) -> dict[str, str]:
        exact = column("target_exact")
        return {"certain": f"{exact.mean():.1f} of {described['n']} tokens per position, the others by an unbiased draw"}

    @classmethod
    def refuses(cls, loss: str, temperature: float) -> str | None:
        """Divergences without an unbiased estimate, or whose variance is unbounded."""
        reasons = _NO_SUM | {cls.unbounded: f"its variance is unbounded where the {cls.lacks}"}
        if loss in reasons:
            return f"loss is {loss}, which targets of kind {cls.name} cannot estimate: {reasons[loss]}"
        if temperature != 1:
            return f"temperature is {temperature:g}, but targets of kind {cls.name} are unbiased only at temperature 1"
        return None

    def batch(self) -> dict[str, Array]:
        # A number where there is no token, whose weight is 0: 0 times −∞ would be NaN.
        logprobs_NK = np.where(np.isneginf(self.logdesign_NK), 0, self.logprobs_NK).astype(np.float32)
        return {"target_ids": self.ids_NK, "target_logprobs": logprobs_NK, "target_logdesign": self.logdesign_NK}

    @classmethod
    def loss_parts(
        cls, picked_NK: "Tensor", rest_N1: "Tensor", batch: Mapping[str, Any], objective: "Objective"
    ) -> "dict[str, Tensor]":
        from llmdistill.losses.sampled import sampled_divergence

        sample = picked_NK - rest_N1, batch["target_logprobs"], batch["target_logdesign"], batch.get("target_logratio")
        found = {"kl": sampled_divergence("forward_kl", *sample)}
        if objective.loss != "forward_kl":
            found[objective.loss] = sampled_divergence(objective.loss, *sample, beta=objective.beta)
        return found

    @classmethod
    def choice(cls, batch: Mapping[str, Any]) -> "Tensor":
        return (
            batch["target_logprobs"].masked_fill(batch["target_logdesign"].isneginf(), -float("inf")).argmax(dim=1, keepdim=True)
        )


def _logdesign(logprobs_NK: Array, exact_N: Array) -> Array:
    """−log π of tokens drawn in proportion to their probability: log τ − log p after the exact ones, in float32."""
    is_exact_NK = np.arange(logprobs_NK.shape[1]) < exact_N[:, None]
    left_N = 1 - (np.exp(logprobs_NK.astype(np.float64)) * is_exact_NK).sum(axis=1)
    log_tau_N = np.log(np.maximum(left_N, _LEAST_LEFT) / (logprobs_NK.shape[1] - exact_N))
    drawn_NK = np.maximum(log_tau_N[:, None] - logprobs_NK, 0)
    return np.where(np.isneginf(logprobs_NK), -np.inf, np.where(is_exact_NK, 0, drawn_NK)).astype(np.float32)
