"""Students: an existing model, or the teacher with fewer layers."""

import copy
from typing import Any

import numpy as np
import torch

from llmdistill.collator import DistillCollator
from llmdistill.config import Prune
from llmdistill.errors import InputError
from llmdistill.targets import Array


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """`keep` of `layers` layer numbers, the first and the last among them, the others evenly between."""
    return [int(number) for number in np.linspace(0, layers - 1, keep).round()]


def choose_layers(prune: Prune, layers: int, influence: Array | None) -> list[int]:
    """The numbers of the layers that stay.

    Raises:
        InputError: the configuration asks for layers that the teacher does not have.
    """
    if isinstance(prune.layers, list):
        if not prune.layers or sorted(set(prune.layers)) != prune.layers or not 0 <= prune.layers[0] <= prune.layers[-1] < layers:
            raise InputError(f"student.prune.layers must be ascending layer numbers from 0 to {layers - 1}, got {prune.layers}")
        return prune.layers
    if not 1 <= prune.layers <= layers:
        raise InputError(f"student.prune.layers is {prune.layers}, but the teacher has {layers} layers")
    if prune.by == "even":
        return evenly_spaced(layers, prune.layers)
    assert influence is not None
    return sorted(int(number) for number in np.argsort(-influence, kind="stable")[: prune.layers])


def prune_layers(teacher: Any, keep: list[int]) -> Any:
    """A copy of the teacher with only the layers `keep`; embeddings, final norm and head stay.

    Raises:
        InputError: the architecture's layers are not where they are known to be.
    """
    student = copy.deepcopy(teacher)
    decoder = _decoder(student)
    decoder.layers = torch.nn.ModuleList([decoder.layers[number] for number in keep])
    for number, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = number
    config = student.config.get_text_config()
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[number] for number in keep]
    return student


@torch.inference_mode()
def block_influence(teacher: Any, rows: list[dict[str, Any]], batch_size: int = 8) -> Array:
    """How much each layer changes its input: 1 − mean cosine of a token's hidden state before and after it.

    Block influence (BI) of ShortGPT, Men et al. 2024, arXiv 2403.03853. Shape: (layers,).
    """
    layers = _decoder(teacher).layers
    total = np.zeros(len(layers))
    tokens = 0

    def measure(number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine_BT = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            total[number] += float((1 - cosine_BT)[mask_BT].sum())

        return hook

    handles = [layer.register_forward_hook(measure(number), with_kwargs=True) for number, layer in enumerate(layers)]
    collate = DistillCollator(pad_token_id=0)
    try:
        for start in range(0, len(rows), batch_size):
            batch = {name: values.to(teacher.device) for name, values in collate(rows[start : start + batch_size]).items()}
            mask_BT = batch["attention_mask"].bool()
            tokens += int(mask_BT.sum())
            teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return total / tokens


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or not all(hasattr(layer.self_attn, "layer_idx") for layer in decoder.layers):
        raise InputError(f"student.prune: {type(model).__name__} does not keep its layers where llama, qwen and gemma models do")
    return decoder
