"""Rows to batches, and the one place where targets meet the logits that predict them.

Soft-target row t of a sequence is the teacher's distribution for `input_ids[completion_start + t]` given everything
before it. The student's logits for it stand at position `completion_start + t − 1`. No other module shifts anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmdistill import targets

TARGET_COLUMNS = sorted({name for names in targets.COLUMNS.values() for name in names})


@dataclass
class DistillCollator:
    """Pads rows of a dataset to a batch and gathers their soft targets in one flat run of N completion tokens.

    The batch holds `input_ids`, `attention_mask` and `labels` (B, T), the labels −100 outside the completions;
    `positions` (N,), where in the flattened (B × T) the logits stand that predict each completion token;
    and the soft targets that the rows have: `target_ids` (N, K) with `target_logprobs` (N, K) and `target_tail` (N,) for
    topk, or with `target_logweights` (N, K) and `target_entropy` (N,) for sampled and multinomial ones.

    Args:
        pad_token_id: fills `input_ids`; masked in attention and labels, so any id will do.
        max_length: sequences are cut to so many tokens, their targets with them; None keeps them whole.
    """

    pad_token_id: int
    max_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch from rows as `load_dataset` gives them."""
        ids = [np.asarray(row["input_ids"])[: self.max_length] for row in rows]
        starts = np.array([int(row["completion_start"]) for row in rows])
        lengths = np.array([len(sequence) for sequence in ids])
        counts = np.maximum(lengths - starts, 0)
        width = int(lengths.max())

        columns_T = np.arange(width)
        real_BT = columns_T < lengths[:, None]
        completion_BT = real_BT & (columns_T >= starts[:, None])
        input_ids_BT = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        input_ids_BT[real_BT] = np.concatenate(ids)
        batch = {
            "input_ids": input_ids_BT,
            "attention_mask": real_BT.astype(np.int64),
            "labels": np.where(completion_BT, input_ids_BT, -100),
            "positions": np.flatnonzero(completion_BT) - 1,  # the shift: logits at t − 1 predict token t
        }
        kind = targets.kind_of(list(rows[0]))
        if kind != "none":
            batch |= _gather_targets(rows, kind, counts)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def _gather_targets(rows: Sequence[Mapping[str, Any]], kind: str, counts: targets.Array) -> dict[str, targets.Array]:
    cut = [targets.cut(row, kind, count) for row, count in zip(rows, counts, strict=True)]
    decoded = targets.decode({name: np.concatenate([row[name] for row in cut]) for name in cut[0]})
    if isinstance(decoded, targets.TopK):
        return {"target_ids": decoded.ids_NK, "target_logprobs": decoded.logprobs_NK, "target_tail": decoded.tail_N}
    return {"target_ids": decoded.ids_NK, "target_logweights": decoded.logweights_NK, "target_entropy": decoded.entropy_N}


def output_layer(model: Any) -> torch.nn.Module:
    """The model's output layer, however DDP or peft wrap the model."""
    layer: torch.nn.Module = getattr(model, "module", model).get_output_embeddings()
    return layer


def completion_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits that predict each completion token, shape (N, V); nothing else goes through the output layer.

    The selection happens in front of the output layer, so whatever the model does there (scale, soft-cap, adapter)
    and whatever wraps the model (DDP, peft) stays as it is.
    """

    def select(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0].flatten(0, 1)[batch["positions"]],)

    handle = output_layer(model).register_forward_pre_hook(select)
    try:
        logits_NV: torch.Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
    finally:
        handle.remove()
    return logits_NV


def in_place_of_logits(
    model: Any, batch: Mapping[str, torch.Tensor], compute: Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
) -> tuple[torch.Tensor, Any]:
    """What `compute` makes of the hidden states (N, D) whose logits predict each completion token: a tensor and more.

    It runs inside the model's forward in the output layer's place, so whatever wraps the model (DDP, peft, autocast) holds
    for it too. The tensor also stands for the logits in the model's output, where DDP looks for what takes part.
    """
    made = []

    def forward(hidden_ND: torch.Tensor) -> torch.Tensor:
        made.append(compute(hidden_ND))
        return made[0][0].reshape(1, 1, 1)

    layer = output_layer(model)
    layer.forward = forward
    try:
        completion_logits(model, batch)
    finally:
        del layer.forward
    return made[0]
