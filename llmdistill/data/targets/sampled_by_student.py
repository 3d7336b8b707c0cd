"""Soft targets of kind `sampled_by_student`: tokens drawn from the student, with the teacher's probabilities.

In rounds the student writes and draws a sample by its own distribution q₀, with inclusion probabilities π = min(1, q₀/τ). The
teacher reads the text and gives log p of the tokens in the sample. Σ f(p, q)/π over it is unbiased for Σ f(p, q) over the
vocabulary, whatever the student has become since; its variance is small where f vanishes with q.

Rows of the teacher's text that are mixed in have a sample of the teacher's (`sampled`), which estimates forward KL alone, so
that is what is learned from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from llmdistill.data.targets.columns import Array, by_position, half_precision, joined, list_array
from llmdistill.data.targets.sampled import Sampled
from llmdistill.data.targets.sampled_logprobs import SampledLogprobs

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from llmdistill.losses import Objective

_LARGEST_RATIO = 20.0  # of a stored mean log ratio, either way


@dataclass(frozen=True)
class SampledByStudent(SampledLogprobs):
    """Like kind `sampled_logprobs`, with π from the student that wrote the text.

    Attributes:
        logratio_N: the mean of log(q₀/p) over the drawn tokens of all other positions of the row: what the control variate of
            the loss is made from. A position's own sample has no part in it, which would make the estimate biased.
        entropy_N: of a position of the teacher's text, where `logdesign_NK` are the log-weights of kind `sampled` and
            `logprobs_NK` is 0, its entropy by that sample; NaN elsewhere.
    """

    logratio_N: Array
    entropy_N: Array

    name = "sampled_by_student"
    summary = "the same sample drawn from the student that wrote the text, which rounds make of `sampled`"
    columns = ("target_ids", "target_logprobs", "target_exact", "target_logdesign", "target_logratio")
    one_each = ("target_exact", "target_logratio")
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "target_logprobs": (-np.inf, 0), "target_logdesign": (-np.inf, 1e4), "target_logratio": (-1e4, 1e4)
    }  # fmt: skip
    bytes_per_token = 4.3
    of_writer = True
    unbounded = "forward_kl"
    lacks = "teacher has mass where the student has none"

    @classmethod
    def keep(cls, logprobs_NV: "Tensor", n: int, uniform_NU: "Tensor") -> "Tensor":
        raise NotImplementedError("the sample is that of the model that wrote the text")

    @classmethod
    def from_kept(cls, ids_NK: Array, logprobs_NK: Array) -> "SampledLogprobs":
        raise NotImplementedError("the sample is that of the model that wrote the text")

    @classmethod
    def of_sample(cls, drawn: SampledLogprobs, logprobs_NK: Array) -> Self:
        """Build from the sample drawn by the writer of a row, and the teacher's log-probabilities of its tokens."""
        k = drawn.ids_NK.shape[1]
        is_drawn_NK = np.arange(k) >= drawn.exact_N[:, None]
        ratio_NK = np.clip(drawn.logprobs_NK.astype(np.float64) - logprobs_NK, -_LARGEST_RATIO, _LARGEST_RATIO)
        # A drawn token stands for τ, so a position counts with the mass that its drawn tokens stand for.
        tau_N = np.exp((drawn.logprobs_NK + drawn.logdesign_NK.astype(np.float64))[:, -1])
        sums_N, mass_N = tau_N * (ratio_NK * is_drawn_NK).sum(axis=1), tau_N * is_drawn_NK.sum(axis=1)
        others_N = np.maximum(mass_N.sum() - mass_N, 1e-30)
        logratio_N = np.where(len(drawn) > 1, (sums_N.sum() - sums_N) / others_N, 0.0)
        none_N = np.full(len(drawn), np.nan, dtype=np.float32)
        return cls(drawn.ids_NK, logprobs_NK, drawn.logdesign_NK, drawn.exact_N, logratio_N, none_N)

    @classmethod
    def of_teachers(cls, drawn: Sampled) -> Self:
        """Build from a sample of the teacher's."""
        zero_NK, zero_N = np.zeros_like(drawn.logweights_NK), np.zeros_like(drawn.entropy_N)
        return cls(drawn.ids_NK, zero_NK, drawn.logweights_NK, drawn.exact_N, zero_N, drawn.entropy_N)

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], positions: Sequence[int] | Array) -> Self:
        """Rows without a `target_logratio` are the teacher's, of kind `sampled`."""
        by_teacher = [len(row["target_logratio"]) == 0 for row in rows]
        if not any(by_teacher) or not sum(positions):
            return super().of_rows(rows, positions)
        parts = [
            cls.of_teachers(Sampled.of_rows([row], [count])) if theirs else super(SampledByStudent, cls).of_rows([row], [count])
            for row, count, theirs in zip(rows, positions, by_teacher, strict=True)
            if count
        ]
        return cls(*(joined(parts, field.name) for field in fields(cls)))

    def within(self, vocab_size: int) -> Self:
        """Drop a token: in the student's sample its term becomes 0; in the teacher's, weights are renormalised."""
        is_there_NK = self.ids_NK < vocab_size
        if is_there_NK.all():
            return self
        as_teachers = Sampled(self.ids_NK, self.logdesign_NK, self.exact_N, self.entropy_N).within(vocab_size)
        by_student_NK = np.where(is_there_NK, self.logdesign_NK, -np.inf)
        design_NK = np.where(np.isnan(self.entropy_N)[:, None], by_student_NK, as_teachers.logweights_NK)
        return replace(
            self, ids_NK=as_teachers.ids_NK, logdesign_NK=design_NK.astype(np.float32), entropy_N=as_teachers.entropy_N
        )

    @classmethod
    def encode(cls, sequences: Sequence[Self], vocab_size: int) -> "dict[str, pa.Array]":
        lengths = np.array([len(sequence) for sequence in sequences])
        k = sequences[0].ids_NK.shape[1]
        is_drawn_NK = np.arange(k) >= joined(sequences, "exact_N")[:, None]
        drawn = np.array([k * len(sequence) - int(sequence.exact_N.sum()) for sequence in sequences])
        return super().encode(sequences, vocab_size) | {
            "target_logdesign": list_array(half_precision(joined(sequences, "logdesign_NK")[is_drawn_NK]), drawn),
            "target_logratio": list_array(half_precision(joined(sequences, "logratio_N")), lengths),
        }

    @classmethod
    def truncate(cls, row: Mapping[str, Any], positions: int) -> dict[str, Array]:
        shared = super().truncate(row, positions)
        drawn = len(shared["target_ids"]) - int(shared["target_exact"].sum())
        return shared | {
            "target_logdesign": np.asarray(row["target_logdesign"])[:drawn],
            "target_logratio": np.asarray(row["target_logratio"])[:positions],
        }

    @classmethod
    def sizes(cls, columns: Mapping[str, Array], positions: int) -> dict[str, Array]:
        sizes = super().sizes(columns, positions)
        return sizes | {"target_logdesign": sizes["target_logprobs"] - columns["target_exact"]}

    @classmethod
    def decode(cls, columns: Mapping[str, Array]) -> Self:
        ids_NK, exact_N = cls.decode_ids(columns)
        logprobs_NK = by_position(columns["target_logprobs"].astype(np.float32, copy=False), len(exact_N))
        logdesign_NK = np.zeros(ids_NK.shape, dtype=np.float32)
        logdesign_NK[np.arange(ids_NK.shape[1]) >= exact_N[:, None]] = columns["target_logdesign"]
        logratio_N = columns["target_logratio"].astype(np.float32)
        none_N = np.full(len(exact_N), np.nan, dtype=np.float32)
        return cls(ids_NK, logprobs_NK, logdesign_NK, exact_N, logratio_N, none_N)

    @classmethod
    def sentence(cls, described: Mapping[str, Any]) -> str:
        return f"{described.get('n')} tokens at every position, drawn from the student that wrote the text"

    def batch(self) -> dict[str, Array]:
        mixed = {} if np.isnan(self.entropy_N).all() else {"target_entropy": self.entropy_N}
        return super().batch() | {"target_logratio": self.logratio_N} | mixed

    @classmethod
    def loss_parts(
        cls, picked_NK: "Tensor", rest_N1: "Tensor", batch: Mapping[str, Any], objective: "Objective"
    ) -> "dict[str, Tensor]":
        import torch

        from llmdistill.losses import weighted_kl

        found = super().loss_parts(picked_NK, rest_N1, batch, objective)
        if "target_entropy" not in batch:
            return found
        entropy_N = batch["target_entropy"]
        kl_N = weighted_kl(picked_NK - rest_N1, batch["target_logdesign"], entropy_N.nan_to_num())
        return {name: torch.where(entropy_N.isnan(), value_N, kl_N) for name, value_N in found.items()}

    @classmethod
    def choice(cls, batch: Mapping[str, Any]) -> "Tensor":
        if "target_entropy" not in batch:
            return super().choice(batch)
        by_student_N1 = batch["target_entropy"].isnan()[:, None]
        return batch["target_logprobs"].where(by_student_N1, batch["target_logdesign"]).argmax(dim=1, keepdim=True)
