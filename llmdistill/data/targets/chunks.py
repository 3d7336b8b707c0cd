"""Targets of kind `chunks`: log-probabilities of only the text that a teacher wrote, for a different vocabulary.

A chunk is a stretch of text that begins and ends with a token of both tokenizers (`data.alignment`). The teacher's
probability of it is one number, so what is learned is one event per chunk: that it is written, or not (ALM, arXiv 2503.20083).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from llmdistill.data.targets.base import SoftTargets
from llmdistill.data.targets.columns import Array, list_column

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from llmdistill.losses import Objective


@dataclass(frozen=True)
class Chunks(SoftTargets):
    """At the last token of each chunk its size in tokens and the teacher's log-probability, elsewhere 0; at N positions.

    `ids_NK` is empty, (N, 0): no token is kept but the written ones.
    """

    sizes_N: Array
    logprobs_N: Array

    name = "chunks"
    summary = "the log-probabilities of the text written by an endpoint, in the student's tokens"
    columns = ("target_chunks", "target_chunk_logprobs")
    one_each = ("target_chunks", "target_chunk_logprobs")
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"target_chunk_logprobs": (-np.inf, 0)}
    of_text = True
    most_likely = True

    @classmethod
    def keep(cls, logprobs_NV: "Tensor", n: int, uniform_NU: "Tensor") -> "Tensor":
        raise NotImplementedError("chunks are made from finished text")

    @classmethod
    def from_kept(cls, ids_NK: Array, logprobs_NK: Array) -> None:
        raise NotImplementedError("chunks are made from finished text")

    @classmethod
    def encode(cls, sequences: Sequence[Self], vocab_size: int) -> "dict[str, pa.Array]":
        return {
            "target_chunks": list_column([sequence.sizes_N for sequence in sequences], np.uint16),
            "target_chunk_logprobs": list_column([sequence.logprobs_N for sequence in sequences], np.float32),
        }

    @classmethod
    def truncate(cls, row: Mapping[str, Any], positions: int) -> dict[str, Array]:
        return {name: np.asarray(row[name])[:positions] for name in cls.columns}

    @classmethod
    def wrong_position(cls, columns: Mapping[str, Array], row_N: Array) -> tuple[int, str] | None:
        """Refuse a chunk that overlaps the previous one, or begins in another row."""
        sizes_N = columns["target_chunks"].astype(np.int64)
        ends = np.flatnonzero(sizes_N)
        begins, free = ends + 1 - sizes_N[ends], np.concatenate([[0], ends + 1])[:-1]
        free = np.maximum(free, np.searchsorted(row_N, row_N[ends]))
        if (wrong := ends[begins < free]).size:
            return int(wrong[0]), f"target_chunks is {sizes_N[wrong[0]]}, more tokens than there are after the previous chunk"
        return None

    @classmethod
    def decode(cls, columns: Mapping[str, Array]) -> Self:
        sizes_N = columns["target_chunks"].astype(np.int64)
        return cls(np.empty((len(sizes_N), 0), dtype=np.int64), sizes_N, columns["target_chunk_logprobs"].astype(np.float32))

    def after(self, start: int) -> Self:
        rest = super().after(start)
        sizes_N = np.where(rest.sizes_N <= np.arange(1, len(rest) + 1), rest.sizes_N, 0)  # a chunk that begins before is none
        return type(self)(rest.ids_NK, sizes_N, rest.logprobs_N)

    def logweights(self) -> Array:
        return np.empty((len(self), 0), dtype=np.float32)

    @classmethod
    def sentence(cls, described: Mapping[str, Any]) -> str:
        return "the log-probability of every chunk of text"

    def batch(self) -> dict[str, Array]:
        """`target_chunk` (N,): the number of the chunk that each token is in, −1 in none; and `target_logprobs` (N,)."""
        ends = np.flatnonzero(self.sizes_N)
        sizes = self.sizes_N[ends]
        chunk_N = np.full(len(self), -1, dtype=np.int64)
        inside = np.repeat(ends + 1 - sizes - (sizes.cumsum() - sizes), sizes) + np.arange(sizes.sum())
        chunk_N[inside] = np.repeat(np.arange(len(ends)), sizes)
        return {"target_chunk": chunk_N, "target_logprobs": self.logprobs_N, "target_ends": self.sizes_N > 0}

    @classmethod
    def loss_parts(
        cls, picked_NK: "Tensor", rest_N1: "Tensor", batch: Mapping[str, Any], objective: "Objective"
    ) -> "dict[str, Tensor]":
        raise NotImplementedError("see losses.chunks")

    @classmethod
    def choice(cls, batch: Mapping[str, Any]) -> "Tensor":
        raise NotImplementedError("no token but the written ones is known")
