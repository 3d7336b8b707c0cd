"""Packing: several whole rows in one sequence of tokens, to avoid padding; they do not attend to each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from llmdistill.models.forward import at_work

Array = np.ndarray[Any, Any]


def row_lengths(dataset: Any) -> Array:
    """Number of tokens in every row of a `load_dataset`."""
    tables = dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]).astype(np.int64)


def pack(lengths: Sequence[int] | Array, capacity: int) -> list[list[int]]:
    """Group row numbers into packs of at most `capacity` tokens: best fit, longest first (Johnson 1974).

    Each row goes into the pack with the least room left. A row longer than `capacity`, which will be cut, is a pack by itself.
    """
    sizes = np.minimum(np.asarray(lengths), capacity)
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by their remaining room in tokens
    rooms = 0  # bit r is set if some pack has room for r: the best fit is the lowest set bit from the length up
    for row in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[row])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
            packs[number].append(row)
        else:
            room, number = capacity, len(packs)
            packs.append([row])
        if room > size:
            with_room[room - size].append(number)
            rooms |= 1 << (room - size)
    return packs


class Packs(torch.utils.data.Dataset[list[Any]]):
    """A dataset's rows in packs; each item is the list of a pack's rows."""

    def __init__(self, dataset: Any, capacity: int) -> None:
        self.dataset = dataset
        self.packs = pack(row_lengths(dataset), capacity)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Any]:
        return [self.dataset[row] for row in self.packs[index]]


def check_apart(model: Any) -> None:
    """Refuse a model in which packed rows affect each other.

    Tested with two short rows in one sequence, by the process that holds the weights. No gradient of one row's logits may reach
    the other row's embeddings, whatever the size of the weights, and the logits must equal those of each row alone, which they
    do not if a model counts positions itself. Call it under the autocast of the training: FlashAttention does not support
    float32.

    Raises:
        ValueError: if they affect each other, or get other positions than alone.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("packing and padding_free cannot be checked with weights that ZeRO-3 shards; use FSDP2 or ZeRO-2")
    device = model.get_input_embeddings().weight.device
    ids_T = torch.arange(3, 15, device=device)
    rows = (slice(0, 7), slice(7, 12))
    position_ids = torch.cat([torch.arange(7, device=device), torch.arange(5, device=device)])
    with at_work(model):
        together_TV, leaks = _leaks(model, ids_T, position_ids, rows)
        with torch.inference_mode():
            alone_TV = torch.cat([model(input_ids=ids_T[row][None], use_cache=False).logits[0].float() for row in rows])
    if not alone_TV.any():  # FSDP loads this process's weights later; the first process has them
        return
    refused = f"packing and padding_free: {type(model).__name__}"
    if leaks:
        raise ValueError(f"{refused} does not isolate packed rows from each other; train without it")
    off = (together_TV - alone_TV).norm() / alone_TV.norm()
    if not off < 0.02:  # bfloat16 rounds differently in another batch
        raise ValueError(f"{refused} computes different logits for packed rows (by {off:.0%}); train without it")


def _leaks(model: Any, ids_T: Any, position_ids_T: Any, rows: Sequence[slice]) -> tuple[Any, bool]:
    """The logits (T, V) of rows in one sequence, and whether the gradient of one row's reaches the embeddings of another."""
    embedded: list[Any] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> Any:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits_TV = model(input_ids=ids_T[None], position_ids=position_ids_T[None], use_cache=False).logits[0].float()
            for row in rows:
                (gradient_1TD,) = torch.autograd.grad(logits_TV[row].square().sum(), embedded[0], retain_graph=True)
                gradient_1TD[:, row] = 0
                if gradient_1TD.any():
                    return logits_TV.detach(), True
    finally:
        hook.remove()
    return logits_TV.detach(), False
