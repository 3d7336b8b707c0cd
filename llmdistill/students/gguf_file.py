"""A model as one GGUF file for llama.cpp, Ollama and programs based on them; `gguf` writes the container.

The weights and hyperparameters are those that llama.cpp reads for an architecture (docs/gguf.md of ggml has the keys).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.errors import InputError
from llmdistill.students.gguf_types import Quantisation, encode, fitting_type, wanted_type
from llmdistill.students.gguf_vocabulary import check_vocabulary, write_vocabulary

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Written:
    """The contents of a GGUF file.

    Attributes:
        types: number of weights of each type.
        unfitting: number of weights in a wider type, because their rows are not whole blocks.
    """

    types: Counter[str]
    unfitting: int


def check_gguf(model: Any, tokenizer: Any) -> None:
    """Refuse a model that llama.cpp would not compute like transformers, or whose tokenizer it does not support.

    Args:
        model: the model, with or without weights.
        tokenizer: its tokenizer.

    Raises:
        InputError: names what the file cannot represent.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"export.formats has gguf, which is written for {known}: the student is of type {config.model_type}")
    rope = config.rope_parameters
    others = {
        "hidden_act": (config.hidden_act, config.hidden_act == "silu"),
        "rope_type": (rope["rope_type"], rope["rope_type"] in _ROPES),
        "partial_rotary_factor": (rope.get("partial_rotary_factor"), rope.get("partial_rotary_factor", 1) == 1),
        "layer_types": ("sliding_attention", "sliding_attention" not in (getattr(config, "layer_types", None) or ())),
    }
    for name, (value, fits) in others.items():
        if not fits:
            raise InputError(f"export.formats has gguf, which is not written for a student whose {name} is {value}")
    for _ in _weights(model):
        pass
    check_vocabulary(tokenizer, config.vocab_size)


def write_gguf(model: Any, tokenizer: Any, ends: list[int], quantisation: Quantisation, file: Path) -> Written:
    """Write a model with its tokenizer and chat template to one file.

    Args:
        model: on the CPU, and accepted by `check_gguf`.
        tokenizer: its tokenizer.
        ends: the tokens that end an answer.
        quantisation: quantisation of the weights.
        file: the output file.

    Raises:
        InputError: if a weight exceeds the 16-bit range.
    """
    import gguf

    layers, tied = model.config.num_hidden_layers, _tied(model)
    writer = gguf.GGUFWriter(file, model.config.model_type)
    _write_hyperparameters(writer, model)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantisation}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_vocabulary(writer, tokenizer, model.config.vocab_size, ends)
    chosen, unfitting = [], 0
    for name, _, weight in _weights(model):
        wanted = wanted_type(name, weight.shape, quantisation, layers, tied)
        chosen.append(fitting_type(wanted, weight.shape[-1]))
        unfitting += chosen[-1] != wanted
        _announce(writer, name, weight.shape, chosen[-1])
    factors = _rope_factors(model)
    if factors is not None:
        _announce(writer, "rope_freqs.weight", factors.shape, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for kind, (_, name, weight) in zip(chosen, _weights(model), strict=True):  # one at a time, to save memory
        writer.write_tensor_data(_encoded(_ordered(model, name, weight), name, kind))
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()
    return Written(Counter(chosen), unfitting)


def _weights(model: Any) -> Iterator[tuple[str, str, Any]]:
    """Every weight with its names in GGUF and in transformers; an output layer tied to the embeddings is written only once.

    Raises:
        InputError: if GGUF has no name for it.
    """
    import gguf

    architecture = next(key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == model.config.model_type)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tied = _tied(model)
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"export.formats has gguf, which has no place for the student's {name}")
        yield found, name, weight


def _tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _announce(writer: Any, name: str, shape: Any, kind: str) -> None:
    """Add a weight to the file's table; the data follow in the same order."""
    import gguf
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    plain = {"F32": np.float32, "F16": np.float16}.get(kind)
    dtype = np.dtype(plain or np.uint8)
    stored = tuple(shape) if plain else gguf.quant_shape_to_byte_shape(tuple(shape), number)
    size = int(np.prod(shape)) // per_block * block_bytes
    writer.add_tensor_info(name, stored, dtype, size, raw_dtype=None if plain else number)


def _ordered(model: Any, name: str, weight: Any) -> Any:
    """The weight in float32, as an array, with its rows in GGUF's order.

    llama.cpp rotates neighbouring elements of a llama's queries and keys, transformers those half a head apart; for Qwen, both
    rotate the latter.
    """
    config, array = model.config, weight.detach().float().cpu().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type != "llama" or heads is None:
        return array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _encoded(array: Any, name: str, kind: str) -> Any:
    import numpy as np

    if kind == "F32":
        return array
    largest = np.abs(array).max()
    if not largest <= np.finfo(np.float16).max:
        raise InputError(f"export: {name} has a weight of magnitude {largest:.3g}, which the 16-bit floats of GGUF do not hold")
    return encode(np.ascontiguousarray(array), kind)


def _write_hyperparameters(writer: Any, model: Any) -> None:
    """The hyperparameters that llama.cpp needs; epsilon and base are those of `config.json`."""
    import gguf

    config, rope = model.config, model.config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_factors(model: Any) -> Any:
    """The divisor of each rotary frequency for the type of Llama 3; None for others."""
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config, rope = model.config, model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
    return (plain / scaled).numpy().astype(np.float32)


def describe(written: Written) -> str:
    """A short description of a file's contents."""
    types = ", ".join(f"{number} in {kind}" for kind, number in sorted(written.types.items()))
    odd = f"; {written.unfitting} of them in a wider type, as their rows are not whole blocks" if written.unfitting else ""
    return f"weights by type: {types}{odd}"
