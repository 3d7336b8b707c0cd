"""Distributions in float32 over a vocabulary, of some positions at a time: those of a whole batch may not fit into the memory."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from llmdistill.evaluation.statistics import Array

Tensor = Any  # of torch, which is not imported here

# Of one such tensor, of which some are held at a time. On a CPU larger ones are no faster.
SLICE_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}


@dataclass(frozen=True)
class Compared:
    """A batch of rows, and the N positions in it at which models are compared.

    Attributes:
        rows: how many there are.
        row_N: the row of each position.
        position_N: its place in the row's completion.
        labels_N: the outcome that was written, a token or a class.
        ends: the outcomes that end a completion.
        width: numbers of a position in the widest distribution.
        logprobs: the log-probabilities of all outcomes by a model, given by its name, at a slice of the positions.
        sums: of each row, what is known beside its positions.
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
    """What is measured at all positions, of which as many are looked at together as memory is meant for.

    Args:
        measure: the values at each position of a slice, by name.
        count: of all positions.
        width: numbers of a position in the widest distribution.
        device: the type of the device that they are on.
    """
    most = max(SLICE_BYTES.get(device, SLICE_BYTES["cpu"]) // (4 * width), 1)
    size = math.ceil(count / max(math.ceil(count / most), 1))  # about as many in the last slice as in the others
    parts = [measure(slice(start, start + size)) for start in range(0, count, size)] if count else [measure(slice(0, 0))]
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def widest(models: Iterable[Any]) -> int:
    """The most logits of a position that one of the models gives."""
    return max(int(model.config.get_text_config().vocab_size) for model in models)


def _joined(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(parts)
