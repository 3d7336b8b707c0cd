"""Low-rank adapters (peft) on a student, optionally on quantised weights, and the merged student that they become."""

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Any

from llmdistill.config.student import Lora
from llmdistill.errors import InputError, no_such_key, not_installed
from llmdistill.models.loading import load_model
from llmdistill.runs.files import read_json

# If installed, peft imports it, and it warns about a CPU kernel that it would fetch, and about 8 bits at every layer.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# Set by their own keys, or by this package.
_RESERVED = {
    "r": "student.lora.r",
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "target_modules": "student.lora.target_modules",
    **dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"), "the training itself"),
    **dict.fromkeys(("base_model_name_or_path", "revision"), "student.model"),
}
_NOT_MERGED = "the saved student is merged, and peft cannot merge it into the weights"
_UNSUPPORTED = {
    **dict.fromkeys(("alora_invocation_tokens", "lora_bias", "layer_replication", "arrow_config"), _NOT_MERGED),
    **dict.fromkeys(("megatron_config", "megatron_core", "use_bdlora"), "it is for another engine"),
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "loftq_config"), "it needs data or passes of its own"),
    "monteclora_config": "it needs a loss of its own",
    "kasa_config": "it changes the weights that the adapter is for",
    "runtime_config": "it is for inference",
}
_REWRITING = ("pissa", "olora")  # they move part of the base's weights into the adapters
_NOT_CONVERTED = ("modules_to_save", "trainable_token_indices", "bias")  # parts of the adapter that peft then omits or refuses
_INITS = (True, False, "gaussian", "orthogonal", "mica", "pissa", "olora")


def lora_config(lora: Lora) -> Any:
    """The `peft.LoraConfig`, with errors that name the key.

    Raises:
        InputError: if peft lacks or refuses an argument, or it does not allow merging.
    """
    from peft import LoraConfig

    names = [field.name for field in dataclasses.fields(LoraConfig)]
    for name in lora.args:
        if name in _RESERVED:
            raise InputError(f"student.lora.args.{name} is set by {_RESERVED[name]}")
        if name in _UNSUPPORTED:
            raise InputError(f"student.lora.args.{name} is not supported: {_UNSUPPORTED[name]}")
        if name not in names:
            raise no_such_key("student.lora.args", name, names, "peft.LoraConfig has no such argument")
    init = lora.args.get("init_lora_weights", True)
    if init not in _INITS and not str(init).startswith("pissa_niter_"):
        known = ", ".join(str(name).lower() if isinstance(name, bool) else name for name in _INITS)
        raise InputError(f"student.lora.args.init_lora_weights is {init}, must be one of {known}")
    if lora.args.get("use_dora") and str(init).startswith(_REWRITING):
        raise InputError(f"student.lora.args: use_dora and init_lora_weights {init} do not produce an adapter for the base")
    if str(init).startswith(_REWRITING):
        beside = [name for name in _NOT_CONVERTED if lora.args.get(name) not in (None, "none", [], {})]
        patterns = [name for name in ("rank_pattern", "alpha_pattern") if lora.args.get("use_rslora") and lora.args.get(name)]
        if beside or patterns:
            raise InputError(
                f"student.lora.args: {(beside + patterns)[0]}{' with use_rslora' if not beside else ''} and init_lora_weights "
                f"{init} do not produce an adapter for the base"
            )
    try:
        return LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
            **lora.args,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"student.lora.args: {error}") from None


def attach(model: Any, config: Any, seed: int) -> Any:
    """The model with adapters, and everything else frozen.

    Args:
        model: the loaded model.
        config: from `lora_config`.
        seed: seed for the adapters' initial weights.

    Raises:
        InputError: if they do not fit the model, or could not be merged into it.
    """
    from peft import get_peft_model
    from transformers import set_seed

    modules = [name for name, _ in model.named_modules()]
    for wanted in config.modules_to_save or []:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in modules):
            raise InputError(f"student.lora.args.modules_to_save: {type(model).__name__} has no module {wanted}")
    set_seed(seed)
    try:
        adapted = get_peft_model(model, config)
        check_mergeable(adapted)
    except Exception as error:  # peft raises many types, each with a reason
        raise InputError(f"student.lora: {str(error).strip() or type(error).__name__}") from None
    train_in_float32(adapted)
    return adapted


def train_in_float32(model: Any) -> None:
    """Convert trained adapters and modules to float32: in half precision, small updates of a weight are lost.

    Args:
        model: the model with adapters.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def check_mergeable(model: Any) -> None:
    """Refuse low-rank adapters that cannot be merged: those on a matrix that another module also uses.

    In training the adapter changes only one of them; merged, it would change both. Fully trained modules (`modules_to_save`) and
    single tokens (`trainable_token_indices`) are copies and keep their trained values.

    Args:
        model: the model with adapters, before anything shards it.

    Raises:
        ValueError: names both modules.
    """
    from peft.tuners.lora import LoraLayer

    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name.removeprefix("base_model.model.").removesuffix(".base_layer"))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for parameter in module.get_base_layer().parameters(recurse=False):
                if len(places := users[id(parameter)]) > 1:
                    raise ValueError(
                        f"adapters on {places[0]}, whose matrix is shared with {', '.join(places[1:])}, cannot be merged, since "
                        "that would change both; leave it out of target_modules, or train it fully with modules_to_save"
                    )


def quantization_config(kind: str, dtype: Any) -> Any:
    """Configuration of bitsandbytes for the frozen weights, for `from_pretrained`.

    Args:
        kind: `nf4`, 4-bit NormalFloat with doubly quantised constants (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), or
            `int8`, 8 bits with outliers kept apart (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339).
        dtype: precision of the matrix products, that of the checkpoint.

    Raises:
        InputError: if bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise not_installed(f"student.quantize {kind}", "bitsandbytes")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU.

    It packs them at the first forward pass in evaluation mode, after which gradients silently do not pass through them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def rewrites_base(model: Any) -> bool:
    """Whether the adapters contain part of the base's weights, so that they do not fit the unmodified base."""
    config = getattr(model, "peft_config", {}).get("default")
    return config is not None and str(config.init_lora_weights).startswith(_REWRITING)


def save_start(model: Any, directory: Path) -> None:
    """Save the adapters before training: what they took from the base is subtracted at the end."""
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True  # otherwise loading them would take it out again
    model.save_pretrained(directory)
    config.init_lora_weights = init


def save_adapter(model: Any, directory: Path, start: Path | None) -> None:
    """The trained adapters in a form that peft and vLLM can load on top of the base."""
    model.save_pretrained(directory, path_initial_model_for_weight_conversion=str(start) if start else None)


def merged(model: Any, adapter: Path, base: Any = None) -> Any:
    """The whole student: the base with the adapters merged into it.

    Args:
        model: the trained model.
        adapter: directory of the saved adapters.
        base: the base in its own precision, if the trained model's is quantised: nothing is merged into 4 bits.
    """
    from peft import PeftModel

    return (model if base is None else PeftModel.from_pretrained(base, adapter)).merge_and_unload()


def merge_adapters(adapters: Path, dtype: str, end_token_ids: list[int], directory: Path) -> None:
    """Write the base with the adapters merged into it as a whole model, with its end tokens.

    Raises:
        InputError: if the base is missing, or the adapters cannot be merged into it.
    """
    from peft import PeftModel

    model = load_model(base_of(adapters), dtype=dtype, key="export.model: the adapters' base", device="cpu")
    adapted = PeftModel.from_pretrained(model, adapters)
    try:
        check_mergeable(adapted)
    except ValueError as error:
        raise InputError(f"export.model: {adapters}: {error}") from None
    merged = adapted.merge_and_unload()
    if end_token_ids:
        merged.generation_config.eos_token_id = end_token_ids
    merged.save_pretrained(directory)


def base_of(adapters: Path) -> str:
    """The model that adapters were trained on, by path or name.

    Raises:
        InputError: if they do not name it.
    """
    config = read_json(adapters / "adapter_config.json")
    if not isinstance(config, dict) or not config.get("base_model_name_or_path"):
        raise InputError(f"export.model: {adapters} has no adapter_config.json that names a base")
    return str(config["base_model_name_or_path"])
