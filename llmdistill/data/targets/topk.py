"""Soft targets of kind `topk`: the k most likely tokens, and the mass outside them as one bucket in the loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from llmdistill.data.targets.base import MemberTokens, SoftTargets
from llmdistill.data.targets.columns import (
    Array,
    by_position,
    every,
    half_precision,
    id_type,
    joined,
    list_array,
    log,
    merged,
    repeats,
    wrong_mass,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from llmdistill.losses import Objective

# On the demo's data the 64 most likely tokens leave 4.7% of the mass outside and cost a student 1.8% of its distance, which
# an unbiased sample of 16 costs too, in a fifth of the bytes; the 16 most likely leave 9.9% and cost 4.8% (docs/targets.md).
_MASS_OUTSIDE = 0.05


@dataclass(frozen=True)
class TopK(SoftTargets):
    """The K most likely tokens at each of N positions, most likely first, and the probability of all others."""

    logprobs_NK: Array
    tail_N: Array

    name = "topk"
    summary = "the k most likely tokens and the probability mass outside them"
    size = "k"
    columns = ("target_ids", "target_logprobs", "target_tail")
    one_each = ("target_tail",)
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"target_logprobs": (-np.inf, 0), "target_tail": (0, 1)}
    most_likely = True
    has_tail = True
    relative_error = 2**-11  # float16
    bytes_per_token = 2.6

    @classmethod
    def keep(cls, logprobs_NV: "Tensor", n: int, uniform_NU: "Tensor") -> "Tensor":
        from llmdistill.data.targets import draw

        return draw.most_likely(logprobs_NV, n)

    @classmethod
    def from_kept(cls, ids_NK: Array, logprobs_NK: Array) -> Self:
        """The mass outside is one minus the rest, never below zero."""
        mass_N = np.exp(logprobs_NK.astype(np.float64)).sum(axis=1)
        return cls(ids_NK.astype(np.int64), logprobs_NK.astype(np.float32), np.maximum(1.0 - mass_N, 0.0).astype(np.float32))

    @classmethod
    def mix(cls, members: MemberTokens, n: int, uniform_NU: Array) -> Self:
        """The most likely tokens among the k most likely of any member; all probabilities are exact."""
        ids_NJ, _, logprobs_NJ = members.merged(np.zeros(members.ids_MNK.shape))
        order_NK = np.argsort(-logprobs_NJ, axis=1, kind="stable")[:, :n]
        return cls.from_kept(np.take_along_axis(ids_NJ, order_NK, 1), np.take_along_axis(logprobs_NJ, order_NK, 1))

    @classmethod
    def encode(cls, sequences: Sequence[Self], vocab_size: int) -> "dict[str, pa.Array]":
        lengths = np.array([len(sequence) for sequence in sequences])
        k = sequences[0].ids_NK.shape[1]
        return {
            "target_ids": list_array(joined(sequences, "ids_NK").ravel().astype(id_type(vocab_size)), lengths * k),
            "target_logprobs": list_array(half_precision(joined(sequences, "logprobs_NK").ravel()), lengths * k),
            "target_tail": list_array(joined(sequences, "tail_N"), lengths),
        }

    @classmethod
    def truncate(cls, row: Mapping[str, Any], positions: int) -> dict[str, Array]:
        k = len(row["target_ids"]) // max(len(row["target_tail"]), 1)
        sizes = (positions * k, positions * k, positions)
        return {name: np.asarray(row[name])[:size] for name, size in zip(cls.columns, sizes, strict=True)}

    @classmethod
    def sizes(cls, columns: Mapping[str, Array], positions: int) -> dict[str, Array]:
        return {"target_logprobs": every(columns, "target_ids", positions)}

    @classmethod
    def wrong_position(cls, columns: Mapping[str, Array], row_N: Array) -> tuple[int, str] | None:
        """Refuse probabilities that do not add up to one, or a token that occurs twice."""
        tail_N, logprobs_NK = columns["target_tail"], by_position(columns["target_logprobs"], len(row_N))
        mass_N = np.exp(logprobs_NK.astype(np.float64)).sum(axis=1) + tail_N
        if (found := wrong_mass(mass_N, "target_logprobs and target_tail")) is not None:
            return found
        ids_NK = by_position(columns["target_ids"].astype(np.int64), len(row_N))
        if (wrong := np.flatnonzero(repeats(ids_NK, ~np.isneginf(logprobs_NK)))).size:
            return int(wrong[0]), "target_ids contains a token twice at one position"
        return None

    @classmethod
    def decode(cls, columns: Mapping[str, Array]) -> Self:
        tail_N = np.asarray(columns["target_tail"], dtype=np.float32)
        logprobs_NK = by_position(columns["target_logprobs"].astype(np.float32, copy=False), len(tail_N))
        total_N1 = np.exp(logprobs_NK).sum(axis=1, keepdims=True) + tail_N[:, None]
        ids_NK = by_position(columns["target_ids"].astype(np.int64, copy=False), len(tail_N))
        return cls(ids_NK, logprobs_NK - np.log(total_N1), tail_N / total_N1[:, 0])

    def of_classes(self, class_V: Array, dropped: int | None = None) -> Self:
        class_NK, p_NK, tail_N = class_V[self.ids_NK], np.exp(self.logprobs_NK.astype(np.float64)), self.tail_N
        if dropped is not None:
            tail_N = tail_N + (p_NK * (class_NK == dropped)).sum(axis=1)
            p_NK *= class_NK != dropped
        classes_NK, sums_NK = merged(class_NK, p_NK)
        return type(self)(classes_NK, log(sums_NK), tail_N.astype(np.float32))

    def within(self, vocab_size: int) -> Self:
        is_there_NK = self.ids_NK < vocab_size
        if is_there_NK.all():
            return self
        p_NK = np.exp(self.logprobs_NK)
        return type(self)(
            np.where(is_there_NK, self.ids_NK, 0),
            np.where(is_there_NK, self.logprobs_NK, -np.inf).astype(np.float32),
            (self.tail_N + (p_NK * ~is_there_NK).sum(axis=1)).astype(np.float32),
        )

    def logweights(self) -> Array:
        return self.logprobs_NK

    def outcomes(self) -> Array:
        return np.concatenate([np.exp(self.logprobs_NK), self.tail_N[:, None]], axis=1)

    @classmethod
    def sentence(cls, described: Mapping[str, Any]) -> str:
        return f"the {described.get('k')} most likely tokens at every position and the mass outside them"

    @classmethod
    def facts(cls, described: Mapping[str, Any], column: Callable[[str], Array]) -> dict[str, str]:
        tail = column("target_tail")
        if not (is_known := tail < 1).any():  # where it is 1, an endpoint has not shown the distribution
            return {"kept mass": "not known"}
        tail = tail[is_known]
        return {"kept mass": f"{1 - tail.mean():.2%} on average, {1 - np.percentile(tail, 95):.2%} at the 5th percentile"}

    @classmethod
    def warning(cls, table: "pa.Table") -> str | None:
        """Warn of too much probability mass outside the targets."""
        import pyarrow.compute as pc

        tail = pc.list_flatten(table.column("target_tail"))
        mean = pc.mean(pc.filter(tail, pc.less(tail, 1))).as_py()  # where it is 1, an endpoint has not shown the distribution
        if mean is None or mean <= _MASS_OUTSIDE:
            return None
        ids = pc.sum(pc.list_value_length(table.column("target_ids"))).as_py()
        return (
            f"targets.k is {ids // len(tail)}, which leaves {mean:.0%} of the teacher's probability mass "
            "outside the targets; raise targets.k, or set targets.kind to sampled, which is unbiased"
        )

    def batch(self) -> dict[str, Array]:
        """Move tokens without probability outside: the first token with one takes their slots, or the same token takes all."""
        is_outside_NK, ids_NK = np.isneginf(self.logprobs_NK) & (self.ids_NK >= 0), self.ids_NK
        if is_outside_NK.any():
            first_N1 = np.isneginf(self.logprobs_NK).argmin(axis=1)[:, None]
            ids_NK = np.where(is_outside_NK, np.take_along_axis(ids_NK, first_N1, axis=1), ids_NK)
        return {"target_ids": ids_NK, "target_logprobs": self.logprobs_NK, "target_tail": self.tail_N}

    @classmethod
    def present(cls, picked_NK: "Tensor", rest_N1: "Tensor", batch: Mapping[str, Any]) -> "tuple[Tensor, Tensor]":
        """Where no token has a probability, the one that stands in all places is one of the others."""
        import torch

        from llmdistill.losses import SMALLEST

        is_outside_NK = batch["target_logprobs"].isneginf()
        whole_N1 = torch.where(is_outside_NK.all(dim=1, keepdim=True), torch.logaddexp(rest_N1, picked_NK[:, :1]), rest_N1)
        return picked_NK.masked_fill(is_outside_NK, SMALLEST), whole_N1

    @classmethod
    def loss_parts(
        cls, picked_NK: "Tensor", rest_N1: "Tensor", batch: Mapping[str, Any], objective: "Objective"
    ) -> "dict[str, Tensor]":
        from llmdistill.losses import bucket_outcomes

        return objective.divergences(*bucket_outcomes(batch["target_logprobs"], batch["target_tail"], picked_NK, rest_N1))

    @classmethod
    def choice(cls, batch: Mapping[str, Any]) -> "Tensor":
        return batch["target_logprobs"].argmax(dim=1, keepdim=True)
