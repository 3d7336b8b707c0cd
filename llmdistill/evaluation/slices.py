"""Distributions in float32 over a vocabulary, for a few positions at a time, as those of a batch may not fit into memory."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmdistill.evaluation.statistics import Array

Tensor = Any  # of torch, which is not imported here

# Size of one such tensor, of which several are held at a time. On a CPU, larger ones are no faster.
SLICE_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}


@dataclass(frozen=True)
class Compared:
    """A batch of rows, and the N positions in it at which models are compared.

    Attributes:
        rows: number of rows.
        row_N: the row of each position.
        position_N: its position in the row's completion.
        labels_N: the outcome that was written, a token or a class.
        ends: the outcomes that end a completion.
        width: size of the widest distribution at a position.
        logprobs: returns the log-probabilities of all outcomes for a model name and a slice of the positions.
        sums: further sums for each row.
    """

    rows: int
    row_N: Array
    position_N: Array
    labels_N: Tensor
    ends: list[int]
    width: int
    logprobs: Callable[[str, slice], Tensor]
    sums: dict[str, Array]


def by_slices(measure: Callable[[slice], dict[str, Tensor]], count: int, width: int, device: str) -> dict[str, Tensor]:
    """Measure all positions, in slices that fit into memory.

    Args:
        measure: returns the values at each position of a slice, by name.
        count: number of positions.
        width: size of the widest distribution at a position.
        device: type of the device that they are on.
    """
    most = max(SLICE_BYTES.get(device, SLICE_BYTES["cpu"]) // (4 * width), 1)
    size = math.ceil(count / max(math.ceil(count / most), 1))  # the last slice is about as large as the others
    parts = [measure(slice(start, start + size)) for start in range(0, count, size)] if count else [measure(slice(0, 0))]
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def widest(models: Iterable[Any]) -> int:
    """The largest number of logits per position of any model."""
    return max(int(model.config.get_text_config().vocab_size) for model in models)


def _joined(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(parts)
