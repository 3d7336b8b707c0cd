"""Students pruned from the teacher: measure the importance of its parts on some text, choose, and build the smaller model.

For models whose layers are built like llama's: qwen, gemma, mistral, olmo, granite, smollm3. Importance is that of Minitron
(Muralidharan et al. 2024, arXiv 2407.14679), measured by activations in one pass over a calibration set, and block influence
for layers.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmdistill.config.student import Prune
from llmdistill.data.collator import DistillCollator, text_only
from llmdistill.data.targets import Array
from llmdistill.errors import InputError
from llmdistill.students.sizes import check_sizes

# The axes of every parameter of a layer: which of the kept indices select along them.
_AXES = {
    "q_proj": ("heads", "hidden"),
    "k_proj": ("key_values", "hidden"),
    "v_proj": ("key_values", "hidden"),
    "o_proj": ("hidden", "heads"),
    "gate_proj": ("neurons", "hidden"),
    "up_proj": ("neurons", "hidden"),
    "down_proj": ("hidden", "neurons"),
    "embed_tokens": ("all", "hidden"),
    "lm_head": ("all", "hidden"),
    "q_norm": ("heads",),  # over all heads together (olmo2); one shared by the heads is not pruned (qwen3, gemma3)
    "k_norm": ("key_values",),
    "norm": ("hidden",),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "pre_feedforward_layernorm": ("hidden",),
    "post_feedforward_layernorm": ("hidden",),
}
_NORMS = [name for name in _AXES if name.endswith("_layernorm")]
# Settings of a module that follow from the model's sizes, or from the position of the layer.
_SIZES = re.compile("size|heads|features|dim|normalized_shape|layer_idx")


@dataclass(frozen=True)
class Importance:
    """The importance of every part of a model, from one pass over some text; L layers.

    Attributes:
        layers: block influence, 1 − mean cosine between a layer's input and output (ShortGPT, Men et al. 2024,
            arXiv 2403.03853); shape (L,).
        neurons: mean |activation| of every feed-forward neuron; shape (L, intermediate size).
        heads: mean Euclidean norm of the output of each key-value head's group of query heads; shape (L, groups).
        hidden: mean |activation| of every channel after the norms, summed over the norms; shape (hidden size,).
    """

    layers: Array
    neurons: Array
    heads: Array
    hidden: Array


@dataclass(frozen=True)
class Kept:
    """The indices to keep, ascending: layers, the neurons and key-value heads in each of them, and channels."""

    layers: list[int]
    neurons: list[Array]
    heads: list[Array]
    hidden: Array


def evenly_spaced(layers: int, keep: int) -> list[int]:
    """`keep` of `layers` layer numbers, including the first and the last, evenly spaced."""
    return [int(number) for number in np.linspace(0, layers - 1, keep).round()]


def choose(prune: Prune, config: Any, importance: Importance | None) -> Kept:
    """Choose the parts of a model to keep.

    Args:
        prune: the section of the configuration.
        config: configuration of the model's text part.
        importance: importance on the calibration set; None if not used.

    Raises:
        InputError: if the configuration asks for more than the teacher has.
    """
    check_sizes(prune, config.to_dict())
    layers = _choose_layers(prune, config.num_hidden_layers, importance.layers if importance else None)

    def best(key: str, size: int, scores: Array | None) -> Array:
        asked = getattr(prune, key)
        if asked is None:
            return np.arange(size)
        assert scores is not None
        return np.sort(np.argsort(-scores, kind="stable")[:asked])

    def score(field: str, *index: int) -> Array | None:
        return None if importance is None else np.asarray(getattr(importance, field))[index]

    return Kept(
        layers,
        [best("intermediate_size", config.intermediate_size, score("neurons", layer)) for layer in layers],
        [best("key_value_heads", config.num_key_value_heads, score("heads", layer)) for layer in layers],
        best("hidden_size", config.hidden_size, score("hidden")),
    )


def _choose_layers(prune: Prune, layers: int, influence: Array | None) -> list[int]:
    if prune.layers is None:
        return list(range(layers))
    if isinstance(prune.layers, list):
        return prune.layers
    if prune.by == "even":
        return evenly_spaced(layers, prune.layers)
    assert influence is not None
    return sorted(int(number) for number in np.argsort(-influence, kind="stable")[: prune.layers])


def prune_model(teacher: Any, kept: Kept) -> Any:
    """A new model with the parts of the teacher that are kept; the teacher is not changed.

    Raises:
        InputError: if it is not known how to prune a parameter of the architecture.
    """
    config = copy.deepcopy(teacher.config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    state = {}
    for name, tensor in teacher.state_dict().items():
        match = re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", name)
        place = kept.layers.index(int(match[2])) if match and int(match[2]) in kept.layers else None
        if match and place is None:
            continue
        indices = {"hidden": kept.hidden}
        if match and place is not None:
            indices["neurons"] = kept.neurons[place]
            indices["key_values"] = _expanded(kept.heads[place], head_dim)
            indices["heads"] = _expanded(kept.heads[place], queries * head_dim)
            name = f"{match[1]}{place}{match[3]}"
        state[name] = _select(name, tensor, indices, head_dim)
    _cut_lists(config, kept.layers)
    config.head_dim = head_dim
    config.num_key_value_heads = len(kept.heads[0])
    config.num_attention_heads = len(kept.heads[0]) * queries
    config.intermediate_size = len(kept.neurons[0])
    config.hidden_size = len(kept.hidden)
    try:
        config.validate()
        student = type(teacher)._from_config(config, dtype=teacher.dtype).to(teacher.device)
        student.load_state_dict(state)
    except Exception as error:  # configurations check themselves and may raise anything
        raise InputError(
            f"student.prune: {type(teacher).__name__} cannot have these sizes: {str(error).splitlines()[-1].strip()}"
        ) from None
    student.generation_config = copy.deepcopy(teacher.generation_config)
    check_layers(teacher, student.eval(), kept)
    return student


def _cut_lists(config: Any, layers: list[int]) -> None:
    """Keep the entries of these layers in every list with one entry per layer, such as `layer_types`."""
    count = config.num_hidden_layers
    for name, values in config.to_dict().items():
        if isinstance(values, (list, tuple)) and len(values) == count and not name.endswith(("token_id", "architectures")):
            setattr(config, name, [getattr(config, name)[number] for number in layers])
    config.num_hidden_layers = len(layers)


@torch.inference_mode()
def check_layers(teacher: Any, student: Any, kept: Kept) -> None:
    """Refuse a student whose layers differ from the teacher's in their settings.

    Some configurations determine by a layer's number what it does (rotary positions, a window, a scale), so a layer that moves
    would do something else. The settings of all modules are compared and, if only layers are pruned, the logits with those of
    the teacher with its other layers bypassed.

    Raises:
        InputError: names the difference.
    """
    before, after = decoder_of(teacher).layers, decoder_of(student).layers
    refused = f"student.prune: the layers of {type(teacher).__name__} cannot be pruned: in the smaller model"
    for number, layer in zip(kept.layers, after, strict=True):
        for (name, theirs), (_, mine) in zip(before[number].named_modules(), layer.named_modules(), strict=True):
            for key, value in vars(theirs).items():
                told = vars(mine).get(key)
                if isinstance(value, (bool, int, float, str, type(None))) and not _SIZES.search(key) and told != value:
                    raise InputError(f"{refused} {name or 'layer'}.{key} of layer {number} is {told}, not {value}")
    widths = ("hidden_size", "intermediate_size", "num_attention_heads")
    if any(getattr(student.config, key) != getattr(teacher.config, key) for key in widths):
        return
    ids_1T = torch.arange(3, 15, device=teacher.device)[None]

    def let_pass(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    gone = [layer for number, layer in enumerate(before) if number not in kept.layers]
    handles = [layer.register_forward_hook(let_pass, with_kwargs=True) for layer in gone]
    try:
        want = teacher(input_ids=ids_1T, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    off = (student(input_ids=ids_1T, use_cache=False).logits.float() - want).norm() / want.norm()
    if not off < 0.02:
        raise InputError(f"{refused} they give different logits than in the teacher (by {off:.0%})")


def _select(name: str, tensor: Tensor, indices: dict[str, Array], head_dim: int) -> Tensor:
    *_, module, kind = name.split(".")
    axes = _AXES.get(module)
    if axes is None or kind not in ("weight", "bias"):
        raise InputError(
            f"student.prune: cannot prune the parameter {name}; models built like llama can be pruned (qwen, gemma, olmo, …)"
        )
    shared = module in ("q_norm", "k_norm") and len(tensor) == head_dim
    for number, axis in enumerate(axes[: tensor.ndim]):
        if axis != "all" and not shared:
            tensor = tensor.index_select(number, torch.as_tensor(indices[axis], device=tensor.device))
    return tensor


def _expanded(groups: Array, size: int) -> Array:
    """The indices of groups of this many neighbours."""
    expanded: Array = (groups[:, None] * size + np.arange(size)).ravel()
    return expanded


@torch.inference_mode()
def measure(teacher: Any, rows: Sequence[dict[str, Any]], batch_size: int = 8) -> Importance:
    """Measure the importance of every part of the teacher on the calibration rows, including prompts.

    Raises:
        InputError: if the layers of the architecture are not found.
    """
    decoder = decoder_of(teacher)
    config = teacher.config.get_text_config()
    sums: dict[tuple[str, int], Any] = {}
    tokens = 0

    def add(part: str, layer: int, values: Tensor) -> None:
        """Sum over the tokens that are not padding; values have their shape first."""
        sums[part, layer] = sums.get((part, layer), 0) + values[mask_BT].double().sum(0).cpu().numpy()

    def watch_layer(number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            add("layers", number, 1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1))

        return hook

    def watch_heads(number: int) -> Any:
        groups = config.num_key_value_heads
        return lambda module, args: add("heads", number, args[0].float().unflatten(-1, (groups, -1)).norm(dim=-1))

    def watch_neurons(number: int) -> Any:
        return lambda module, args: add("neurons", number, args[0].float().abs())

    def watch_norm(module: Any, args: Any, output: Tensor) -> None:
        add("hidden", 0, output.float().abs())

    handles = [decoder.norm.register_forward_hook(watch_norm)]
    for number, layer in enumerate(decoder.layers):
        handles += [
            layer.register_forward_hook(watch_layer(number), with_kwargs=True),
            layer.self_attn.o_proj.register_forward_pre_hook(watch_heads(number)),
            layer.mlp.down_proj.register_forward_pre_hook(watch_neurons(number)),
            *(getattr(layer, norm).register_forward_hook(watch_norm) for norm in _NORMS if hasattr(layer, norm)),
        ]
    collate = DistillCollator(pad_token_id=0)
    try:
        for start in range(0, len(rows), batch_size):
            batch = collate(text_only(rows[start : start + batch_size]))
            batch = {name: values.to(teacher.device) for name, values in batch.items()}
            mask_BT = batch["attention_mask"].bool()
            tokens += int(mask_BT.sum())
            teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    layers = range(len(decoder.layers))
    parts = {part: np.stack([sums[part, number] for number in layers]) / tokens for part in ("layers", "neurons", "heads")}
    return Importance(**parts, hidden=sums["hidden", 0] / tokens)


def decoder_of(model: Any) -> Any:
    """The part of a model that contains its layers.

    Raises:
        InputError: if the layers cannot be pruned.
    """
    try:
        decoder, config = model.get_decoder(), model.config
        sizes = [config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size, config.hidden_size]
        parts = [(layer.post_attention_layernorm, layer.self_attn.o_proj, layer.mlp.down_proj) for layer in decoder.layers]
        known = len(parts) == sizes[0]
    except (AttributeError, RuntimeError):  # a configuration with per-layer sizes, or of several models
        known = False
    if not known:
        raise InputError(f"student.prune: {type(model).__name__} is not built like llama models (qwen, gemma, olmo, …)")
    return decoder
