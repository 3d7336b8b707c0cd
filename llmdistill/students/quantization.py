"""A model directory written again in another form, whole or quantised, by the libraries that made the forms."""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from llmdistill.config.export import Export, Form
from llmdistill.config.shipped import page
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.runs.record import read_json

_GROUP_SIZES = (128, 64, 32)


def check_form(form: Form, settings: Export) -> None:
    """Refuse a form whose library is not installed.

    Raises:
        InputError: naming what to install.
    """
    by_gptq = form in ("w8a8", "w4a16") and settings.rounding == "gptq"
    package = "llmcompressor" if by_gptq else {"int8": "torchao", "safetensors": "transformers"}.get(form, "compressed_tensors")
    if importlib.util.find_spec(package) is None and by_gptq:
        raise InputError(
            f"export.rounding is gptq, which {form} gets from llm-compressor: install the extra `gptq` "
            f"({page('export')} says how beside vLLM), or set export.rounding to nearest"
        )
    if importlib.util.find_spec(package) is None:
        raise InputError(f"export.formats has {form}, which needs {package}: install the extra `export`")


def write_form(form: Form, source: str, directory: Path, settings: Export, calibration: list[list[int]], tokenizer: Any) -> str:
    """Write the model in `source` with its tokenizer to `directory`, and say how in a few words.

    Args:
        form: what to write.
        source: a model directory.
        directory: it exists and is empty.
        settings: the rest of the section `export`.
        calibration: token ids of the rows on which gptq measures.
        tokenizer: the model's.

    Raises:
        InputError: the form does not fit the model.
    """
    if form == "safetensors":
        load_model(source, dtype=stored_dtype(settings), key="export.model", device="cpu").save_pretrained(directory)
        how = "whole"
    elif form == "int8":
        how = _write_int8(source, directory, settings)
    else:
        how = _write_compressed(form, source, directory, settings, calibration, tokenizer)
    tokenizer.save_pretrained(directory)
    return how


def stored_dtype(settings: Export) -> str:
    """The `dtype` of what is written, which has nothing to do with what this machine computes in."""
    return "checkpoint" if settings.dtype == "auto" else settings.dtype


def _write_int8(source: str, directory: Path, settings: Export) -> str:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    how = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = load_model(source, dtype=stored_dtype(settings), key="export.model", device="cpu", quantization_config=how)
    model.save_pretrained(directory)
    return "8-bit weights, a scale a row, rounded to the nearest"


def _write_compressed(
    form: Form, source: str, directory: Path, settings: Export, calibration: list[list[int]], tokenizer: Any
) -> str:
    """In the format of compressed-tensors: every linear layer but the output layer."""
    by_gptq = settings.rounding == "gptq"
    model = load_model(source, dtype=stored_dtype(settings), key="export.model", device=None if by_gptq else "cpu")
    group = fitting_group_size(model, settings.group_size) if form == "w4a16" else None
    head = model.get_output_embeddings()
    apart = [name for name, module in model.named_modules() if module is head]
    weights = {"num_bits": 4 if group else 8, "type": "int", "symmetric": True, "strategy": "group" if group else "channel"}
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": {**weights, "group_size": group}}
    if form == "w8a8":
        scheme["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = {"config_groups": {"group_0": scheme}, "ignore": apart}
    with _quiet():
        (_by_gptq if by_gptq else _to_nearest)(model, groups, directory, calibration, tokenizer)
    what = f"4-bit weights, a scale for {group} of a row" if group else "8-bit weights, a scale a row, and 8-bit activations"
    return f"{what}, rounded {f'by GPTQ on {len(calibration):,} rows' if by_gptq else 'to the nearest'}"


def _by_gptq(model: Any, groups: dict[str, Any], directory: Path, calibration: list[list[int]], tokenizer: Any) -> None:
    """Frantar et al. 2022, arXiv 2210.17323, by llm-compressor."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from loguru import logger
    from torch.utils.data import DataLoader

    logger.disable("llmcompressor")  # which turns its log on when it is imported
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()} for ids in calibration]
    rows: Any = DataLoader(batches, batch_size=None)
    oneshot(model=model, recipe=GPTQModifier(**groups), dataset=rows, num_calibration_samples=len(rows), processor=tokenizer)
    model.save_pretrained(directory, save_compressed=True)


def _to_nearest(model: Any, groups: dict[str, Any], directory: Path, calibration: list[list[int]], tokenizer: Any) -> None:
    """By compressed-tensors alone; the scale of a group is its largest magnitude over half the range. Needs no rows."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized

    apply_quantization_config(model, QuantizationConfig(**groups))
    for module in filter(is_module_quantized, model.modules()):
        how = module.quantization_scheme.weights
        weight = module.weight.detach().unflatten(-1, (-1, how.group_size or module.weight.shape[-1]))
        scale, _ = calculate_qparams(weight.amin(-1), weight.amax(-1), how)
        module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))


def load_form(directory: str, dtype: str = "auto") -> Any:
    """A model that `write_form` wrote, by transformers: weights are unpacked, the rounding of activations is kept."""
    import torch

    with _quiet(), torch.inference_mode():
        model = load_model(directory, dtype=dtype, key="export")
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device))  # compressed-tensors unpacks at the first pass
    return model


def fake_quantise(model: Any, group_size: int | None) -> None:
    """Have every layer that w4a16 quantises work with its weights rounded to the nearest; gradients pass the rounding by.

    That is the straight-through estimator of Bengio et al. 2013, arXiv 1308.3432; for language models, with a teacher, see
    LLM-QAT (Liu et al. 2023, arXiv 2305.17888). The weights themselves stay as they are and train.

    Raises:
        InputError: torchao is not installed, or the layers do not divide into groups.
    """
    if importlib.util.find_spec("torchao") is None:
        raise InputError("train.fake_quantize needs torchao: install the extra `export`")
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    head = model.get_output_embeddings()
    how = IntxFakeQuantizeConfig(torch.int4, group_size=fitting_group_size(model, group_size), is_symmetric=True)
    layers = lambda module, name: isinstance(module, torch.nn.Linear) and module is not head  # noqa: E731
    quantize_(model, QATConfig(weight_config=how, step="prepare"), filter_fn=layers)


def unfake(model: Any) -> None:
    """Undo `fake_quantise`: the same weights in plain layers."""
    if any(hasattr(module, "weight_fake_quantizer") for module in model.modules()):
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(step="convert"), filter_fn=lambda module, name: hasattr(module, "weight_fake_quantizer"))


def fitting_group_size(model: Any, wanted: int | None) -> int:
    """How many weights of a row share a scale, so that every row of a quantised layer is whole groups.

    Raises:
        InputError: the size asked for does not divide a layer's rows, or none of the usual ones does.
    """
    import torch

    head = model.get_output_embeddings()
    linear = {name: m.in_features for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    for size in (wanted,) if wanted else _GROUP_SIZES:
        odd = next(((name, width) for name, width in linear.items() if width % size), None)
        if odd is None:
            return size
    name, width = odd or ("", 0)
    tried = "export.group_size" if wanted else "w4a16 needs export.group_size: the smallest usual size,"
    raise InputError(f"{tried} {size} does not divide the {width:,} inputs of {name}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without llm-compressor's and compressed-tensors' lines and bars: a failure speaks by its exception."""
    from loguru import logger

    logger.disable("compressed_tensors")
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), warnings.catch_warnings(action="ignore"):
        yield


def merge_adapters(adapters: Path, dtype: str, end_token_ids: list[int], directory: Path) -> None:
    """Write the base with the adapters merged into it as a whole model, which stops at the end tokens.

    Raises:
        InputError: the base is not there.
    """
    from peft import PeftModel

    model = load_model(base_of(adapters), dtype=dtype, key="export.model: the adapters' base", device="cpu")
    merged = PeftModel.from_pretrained(model, adapters).merge_and_unload()
    if end_token_ids:
        merged.generation_config.eos_token_id = end_token_ids
    merged.save_pretrained(directory)


def base_of(adapters: Path) -> str:
    """The model that adapters were trained on, by path or name.

    Raises:
        InputError: they do not say.
    """
    config = read_json(adapters / "adapter_config.json")
    if not isinstance(config, dict) or not config.get("base_model_name_or_path"):
        raise InputError(f"export.model: {adapters} has no adapter_config.json that names a base")
    return str(config["base_model_name_or_path"])
