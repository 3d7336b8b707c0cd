"""Loading models and tokenizers by their Hugging Face names, with readable errors."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmdistill.config.machine import Precision, Runtime, inference_precision, torch_device
from llmdistill.errors import InputError
from llmdistill.runs.files import read_json


def check_model_exists(model: str | Path, key: str) -> None:
    """Refuse, before anything is loaded, a path that is not a model directory.

    Args:
        model: a directory, or a name on the Hub; a `Path` is always a directory.
        key: key of the configuration, for errors.

    Raises:
        InputError: names the key.
    """
    directory = Path(model)
    if (directory / "config.json").is_file():
        return
    if isinstance(model, Path):
        raise InputError(f"{key}: {model} is not a model directory (it has no config.json)")
    if directory.is_dir() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"{key}: {model} is neither a model directory (it has no config.json) nor a name on the Hub")


def check_tokenizer_exists(tokenizer: str, key: str) -> None:
    """Refuse, before anything is loaded, a path that is not a directory with a tokenizer.

    Raises:
        InputError: names the key.
    """
    if not any((Path(tokenizer) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        check_model_exists(tokenizer, key)


def load_config(model: str, revision: str | None, trust_remote_code: bool = False, key: str = "teacher.model") -> Any:
    """The model's configuration.

    Raises:
        InputError: if there is no such model.
    """
    check_model_exists(model, key)
    from transformers import AutoConfig

    return _found(model, key, lambda: AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code))


def load_tokenizer(model: str, revision: str | None, trust_remote_code: bool = False, key: str = "teacher.model") -> Any:
    """The model's tokenizer.

    Raises:
        InputError: if there is no such model, or it has no tokenizer.
    """
    check_tokenizer_exists(model, key)
    from transformers import AutoTokenizer

    return _found(
        model, key, lambda: AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    )


def load_model(
    model: str,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    key: str = "teacher.model",
    device: str | None = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    gguf_file: str | None = None,
    spread: bool = False,
) -> Any:
    """Load the model in evaluation mode, by default on the accelerator if there is one.

    Args:
        model: directory or name on the Hub.
        revision: revision on the Hub.
        dtype: precision of the weights; `auto` is the one for this machine, `checkpoint` the stored one.
        trust_remote_code: whether to run code from the model's repository.
        key: key of the configuration, for errors.
        device: device to load it on.
        quantization_config: transformers' quantisation while loading.
        attn_implementation: attention implementation.
        gguf_file: the file in the directory with the weights, which are decoded; the shape is that of `config.json`.
        spread: whether to split a model that is too large for one accelerator over all of them, layer by layer.

    Raises:
        InputError: if there is no such model, or its weights do not fit into the free memory.
    """
    check_model_exists(model, key)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if device is None:
        device = torch_device()
    dtype = model_precision(model, revision, dtype, trust_remote_code, key).dtype
    over_all = False
    if quantization_config is None:
        needed = _weight_bytes(model, revision, dtype, trust_remote_code, key)
        # Measurements need room besides the weights.
        over_all = spread and device != "cpu" and torch.accelerator.device_count() > 1 and 2 * needed > free_memory(device)
        if not over_all:
            check_fits(model, needed, dtype, key, device)
    how: dict[str, Any] = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        how["attn_implementation"] = attn_implementation
    if gguf_file is not None:
        how |= {"gguf_file": gguf_file, "config": load_config(model, revision, trust_remote_code, key)}
    if quantization_config is not None:
        how["quantization_config"] = quantization_config
    if over_all:
        how["device_map"] = "auto"
    elif quantization_config is not None or device != "cpu":  # it is created on its final device
        how["device_map"] = {"": device if device == "cpu" else torch.accelerator.current_device_index()}
    loaded = _found(model, key, lambda: AutoModelForCausalLM.from_pretrained(model, **how))
    _make_writable(loaded.generation_config)
    return (_taking_any_device(loaded) if over_all else loaded).eval()


def _taking_any_device(model: Any) -> Any:
    """A model laid out by transformers, with its output on the device of its input, even if it is on a single device."""
    if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        add_hook_to_module(model, AlignDevicesHook(execution_device=model.device, io_same_device=True), append=True)
    return model


def _weight_bytes(model: str, revision: str | None, dtype: str, trust_remote_code: bool, key: str) -> int:
    """Size in bytes of a model's weights in a precision; `auto` is that of the checkpoint.

    For quantised checkpoints, and those with their own code, only the size of the files is known; 0 if there are none.
    """
    stored = model_bytes(model)
    config = load_config(model, revision, trust_remote_code, key)
    is_special = getattr(config, "quantization_config", None) or getattr(config, "auto_map", None)
    if is_special or (dtype == "auto" and stored is not None):
        return stored or 0
    width = torch_dtype(config.dtype if dtype == "auto" else dtype).itemsize
    made = _found(model, key, lambda: meta_model(config))
    return width * sum(parameter.numel() for parameter in made.parameters())


def meta_model(config: Any) -> Any:
    """The model of a configuration with shapes but no weights; code from its repository does not run."""
    import torch
    from transformers import AutoModelForCausalLM

    with whole_on_every_process(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def torch_dtype(named: Any) -> Any:
    """A precision as torch's dtype; a configuration may give it by name, and the default is float32."""
    import torch

    return getattr(torch, named) if isinstance(named, str) else named or torch.float32


def _make_writable(generation_config: Any) -> None:
    """Repair generation settings that transformers reads but does not write, which would end training at a checkpoint.

    A temperature, or another sampling setting, means that the model samples, unless the file says that it does not; settings of
    what is off are reset to their defaults.
    """
    from transformers import GenerationConfig

    if generation_config is None:
        return
    for _ in range(2):
        try:
            generation_config.validate(strict=True)
            return
        except ValueError as error:
            said = str(error)
        if generation_config.do_sample is None and "do_sample" in said:
            generation_config.do_sample = True
        else:
            for name in re.findall(r"^- `(\w+)`", said, re.MULTILINE):
                setattr(generation_config, name, getattr(GenerationConfig(), name))


def model_precision(
    model: str,
    revision: str | None = None,
    asked: str = "auto",
    trust_remote_code: bool = False,
    key: str = "teacher.model",
    runtime: Runtime = "torch",
) -> Precision:
    """The precision of a model; its `dtype` is passed to transformers and vLLM, whose `auto` is the checkpoint's.

    Quantised checkpoints are left unchanged, as they are made for a particular precision.

    Args:
        model: directory or name on the Hub.
        revision: revision on the Hub.
        asked: a precision, `auto` for the one for this machine, or `checkpoint`.
        trust_remote_code: whether to run code from the model's repository.
        key: key of the configuration, for errors.
        runtime: the library whose view of the device decides.
    """
    if asked == "checkpoint":
        return Precision("auto", "the precision of the checkpoint")
    if asked == "auto" and getattr(load_config(model, revision, trust_remote_code, key), "quantization_config", None):
        return Precision("auto", "the precision that the quantised checkpoint was made for")
    return inference_precision(asked, runtime)


def continue_prompts(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: Sequence[int], **how: Any
) -> Any:
    """Generate after prompts of any lengths, in one batch; shape (B, T), on the CPU, padded after the end tokens.

    Args:
        model: from `load_model`.
        prompts: token ids.
        max_new_tokens: maximum length of an answer.
        end_ids: the tokens that end an answer; those of the model's generation configuration if empty.
        how: more arguments of `generate`.
    """
    import torch

    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    ends: dict[str, Any] = {"eos_token_id": list(end_ids), "pad_token_id": end_ids[0]} if end_ids else {"pad_token_id": 0}
    with torch.inference_mode(), plain_generation(model):
        output_BT = model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=max_new_tokens, **ends, **how)
    return output_BT[:, width:].cpu()


@contextmanager
def plain_generation(*models: Any) -> Iterator[None]:
    """Temporarily make `generate` use only its arguments, and only the tokens of the model's generation configuration.

    Otherwise a repetition penalty or another published setting of a model would change text that is called greedy.
    """
    from transformers import GenerationConfig

    own = [model.generation_config for model in models]
    try:
        for model, config in zip(models, own, strict=True):
            names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
            model.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in names})
        yield
    finally:
        for model, config in zip(models, own, strict=True):
            model.generation_config = config


def check_fits(model: str, needed: int, dtype: str, key: str, device: str) -> None:
    """Refuse a model whose weights are larger than the free memory.

    Raises:
        InputError: names both sizes.
    """
    free, form = free_memory(device), "" if dtype == "auto" else f" in {dtype}"
    if needed > free:
        raise InputError(
            f"{key}: the weights of {model} take {needed / 1e9:.1f} GB{form}, but only {free / 1e9:.1f} GB are free on {device}"
        )


def free_memory(device: str) -> int:
    """Free bytes on a device, including what torch caches there."""
    import psutil
    import torch

    if torch.device(device).type in ("cpu", "mps"):
        return int(psutil.virtual_memory().available)
    hand_back_memory()
    return int(torch.accelerator.get_memory_info(device)[0])


def hand_back_memory() -> None:
    """Return unused memory to the accelerator, for another process or engine."""
    import gc

    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def whole_on_every_process() -> Iterator[None]:
    """Temporarily make a process that is about to train under FSDP or DeepSpeed load a model as if it were alone.

    Otherwise transformers would load weights in only one process (FSDP) or spread them (ZeRO-3).
    """
    from transformers.integrations import deepspeed

    key = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    asked, zero = os.environ.pop(key, None), deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero
        if asked is not None:
            os.environ[key] = asked


def generation_config(model: str, revision: str | None) -> Any:
    """The model's generation configuration in a form that can be written; None if it has none."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(model, revision=revision)
    except OSError:
        return None
    _make_writable(found)
    return found


def end_token_ids(model: str, revision: str | None, config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion; loads no weights.

    They are the model's own, the tokenizer's, and the one that the chat template writes after an answer.
    """
    ends = own_end_ids(model, revision, config, tokenizer)
    more = [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return ends + [end for end in dict.fromkeys(more) if end is not None and end not in ends]


def own_end_ids(model: str, revision: str | None, config: Any, tokenizer: Any) -> list[int]:
    """The model's own end tokens, from its generation configuration; loads no weights, and does not need `config`."""
    generation = generation_config(model, revision)
    own = config.get_text_config().eos_token_id if config else None
    known = [generation.eos_token_id] if generation else [own, tokenizer.eos_token_id]
    end = next((value for value in known if value is not None), None)
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an answer, if any."""
    if not tokenizer.chat_template:
        return None
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception:  # templates may raise anything
        return None
    behind = text.rpartition("answer")[2]
    added = tokenizer.added_tokens_decoder
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in added and added[token].special), None)


def special_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that mark turns and ends and are not text."""
    return sorted(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)


def vocabulary_hash(tokenizer: Any) -> str:
    """Hash of the mapping from tokens to ids; equal within a model family even if matrices are padded differently."""
    content = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(content.encode()).hexdigest()


def token_identity(tokenizer: Any, end_ids: Iterable[int]) -> tuple[Any, ...]:
    """A value that is equal for two tokenizers if they encode the same conversation and its end identically."""
    return vocabulary_hash(tokenizer), tokenizer.chat_template, tuple(sorted(end_ids))


def describe_tokenizer(tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> dict[str, Any]:
    """The entry in `dataset.json` for the tokenizer whose ids are stored.

    Args:
        tokenizer: the tokenizer.
        vocab_size: size of the model's output layer.
        end_ids: the tokens that end a completion.
    """
    return {
        "vocab_size": vocab_size,
        "vocabulary_hash": vocabulary_hash(tokenizer),
        "end_token_ids": list(end_ids),
        "special_token_ids": special_token_ids(tokenizer),
        "chat_template": tokenizer.chat_template,
    }


def context_length(config: Any) -> int | None:
    """The longest sequence that the model supports, in tokens."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def model_bytes(directory: str) -> int | None:
    """Size in bytes of the weight files in a model directory; None for a model on the Hub, or if there are none."""
    path = Path(directory)
    index = read_json(path / "model.safetensors.index.json")
    if index:
        return sum((path / name).stat().st_size for name in set(index["weight_map"].values()))
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.gguf"):  # the first kind found, in transformers' order
        if files := list(path.glob(pattern)):
            return sum(file.stat().st_size for file in files)
    return None


def _found(model: str, key: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{key}: cannot load {model}: {str(error).splitlines()[0]}") from None
