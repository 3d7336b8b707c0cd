"""Forward passes of a causal language model: only at completion positions, and with the output layer replaced."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def output_layer(model: Any) -> torch.nn.Module:
    """The model's output layer, whether or not DDP or peft wrap the model."""
    layer: torch.nn.Module = getattr(model, "module", model).get_output_embeddings()
    return layer


def completion_logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """The model's logits that predict each completion token, shape (N, V); only those go through the output layer.

    The selection happens before the output layer, so that everything the model does there (scale, soft-cap, adapter) and
    everything that wraps the model (DDP, peft) is unchanged.
    """
    layer, text = output_layer(model), ("input_ids", "attention_mask", "position_ids")
    project = layer.forward

    def forward(hidden_BTD: torch.Tensor) -> torch.Tensor:  # which may be on another device if the model is split
        return project(hidden_BTD.flatten(0, 1)[batch["positions"].to(hidden_BTD.device)])

    with replaced_forward(layer, forward):
        logits_NV: torch.Tensor = model(**{name: batch[name] for name in text if name in batch}, use_cache=False).logits
    return logits_NV


def in_place_of_logits(
    model: Any, batch: Mapping[str, Any], compute: Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
) -> tuple[torch.Tensor, Any]:
    """The result of `compute` for the hidden states (N, D) whose logits predict each completion token: a tensor and more.

    It runs inside the model's forward instead of the output layer, so everything that wraps the model (DDP, FSDP, peft,
    autocast) applies to it too. The model returns zero times the tensor as its logits, which is added to the result: there DDP
    looks for parameters in use, and FSDP gathers weights when a gradient comes back through it.
    """
    made = []

    def forward(hidden_ND: torch.Tensor) -> torch.Tensor:
        made.append(compute(hidden_ND))
        return made[0][0].reshape(1, 1, 1) * 0

    with replaced_forward(output_layer(model), forward):
        zero = completion_logits(model, batch).sum()
    value, more = made[0]
    return value + zero, more


@contextmanager
def replaced_forward(layer: Any, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Temporarily replace a layer's forward. A hook would not do: `torch.compile` ignores hooks after the first call."""
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


@contextmanager
def at_work(model: Any) -> Iterator[None]:
    """Temporarily without dropout, and on the model's current device.

    FlashAttention and FlexAttention work only on the accelerator. Under FSDP the weights are on the CPU until training starts.
    """
    was_training, attention = model.training, model.config._attn_implementation
    on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    replaced = on_cpu and attention not in ("eager", "sdpa")
    model.eval()
    if replaced:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.train(was_training)
        if replaced:
            model.set_attn_implementation(attention)
