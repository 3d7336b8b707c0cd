"""A model at work once before training, to see what it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def working(model: Any) -> Iterator[None]:
    """Without dropout, and on whatever device the model is now, while this lasts.

    FlashAttention and FlexAttention work on the accelerator alone. Under FSDP the weights are on the CPU until training starts.
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
