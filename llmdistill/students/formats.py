"""The formats that `export` writes, one entry each, by the libraries that made them.

Their names are those of `export.formats` (`config/export.py`).
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmdistill.config.export import Export, Form
from llmdistill.config.shipped import page
from llmdistill.errors import InputError
from llmdistill.models.loading import end_token_ids, generation_config, load_model
from llmdistill.runs.progress import counted, say
from llmdistill.students.gguf_file import check_gguf, describe, write_gguf
from llmdistill.students.gguf_types import Quantisation
from llmdistill.students.ollama import modelfile
from llmdistill.students.quantization import fitting_group_size


@dataclass(frozen=True)
class Source:
    """A model that is to be written, and what that takes.

    Attributes:
        model: its directory.
        tokenizer: the model's.
        settings: the section `export`.
        calibration: token ids of the rows on which gptq measures.
    """

    model: str
    tokenizer: Any
    settings: Export
    calibration: list[list[int]]

    def load(self, device: str | None = "cpu", **how: Any) -> Any:
        """The model in the precision that is written."""
        return load_model(self.model, dtype=stored_dtype(self.settings), key="export.model", device=device, **how)


@dataclass(frozen=True)
class ExportFormat:
    """A format in which the student is written.

    Attributes:
        name: the format's, and that of its directory.
        libraries: the modules that write and load it, where `export.rounding` does not need another one.
        loaded_by: who loads it.
        write: writes a model's weights and configuration into an empty directory, and says how in a few words.
        load: loads what was written, in a precision, to be measured.
        rounded: whether `export.rounding` decides how its weights are rounded.
        check: refuses a model whose shape, or tokenizer, it does not fit; the model has no weights.
        extra: what to install for the library.
    """

    name: Form
    libraries: tuple[str, ...]
    loaded_by: str
    write: Callable[[Source, Path], str]
    load: Callable[[str, str], Any]
    rounded: bool = False
    check: Callable[[Any, Any, Export], Any] | None = None
    extra: str = "export"

    def by_gptq(self, settings: Export) -> bool:
        """Whether rows of the dataset are needed to round its weights."""
        return self.rounded and settings.rounding == "gptq"

    def check_library(self, settings: Export) -> None:
        """Refuse it where its library is not installed.

        Raises:
            InputError: naming what to install.
        """
        if self.by_gptq(settings) and importlib.util.find_spec("llmcompressor") is None:
            raise InputError(
                f"export.rounding is gptq, which needs llm-compressor for {self.name}: install the extra "
                f"`gptq` (see {page('export')} for its use beside vLLM), or set export.rounding to nearest"
            )
        for library in self.libraries:
            if importlib.util.find_spec(library) is None:
                raise InputError(f"export.formats has {self.name}, which needs {library}: install the extra `{self.extra}`")


def stored_dtype(settings: Export) -> str:
    """The `dtype` of what is written, which has nothing to do with what this machine computes in."""
    return "checkpoint" if settings.dtype == "auto" else settings.dtype


def _load(directory: str, dtype: str) -> Any:
    return load_model(directory, dtype=dtype, key="export")


def _load_compressed(directory: str, dtype: str) -> Any:
    """Weights are unpacked, the rounding of activations is kept."""
    import torch

    with _quiet(), torch.inference_mode():
        model = _load(directory, dtype)
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device))  # compressed-tensors unpacks at the first pass
    return model


def _write_whole(source: Source, directory: Path) -> str:
    source.load().save_pretrained(directory)
    return "whole"


def _write_int8(source: Source, directory: Path) -> str:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    source.load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))).save_pretrained(directory)
    return "8-bit weights, a scale a row, rounded to the nearest"


def _write_w8a8(source: Source, directory: Path) -> str:
    weights = {"num_bits": 8, "strategy": "channel", "group_size": None}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    model = source.load(_device(source))
    return f"8-bit weights, a scale a row, and 8-bit activations, {_compress(source, model, directory, weights, activations)}"


def _write_w4a16(source: Source, directory: Path) -> str:
    model = source.load(_device(source))
    size = fitting_group_size(model, source.settings.group_size)
    weights = {"num_bits": 4, "strategy": "group", "group_size": size}
    return f"4-bit weights, a scale for {size} of a row, {_compress(source, model, directory, weights)}"


def _device(source: Source) -> str | None:
    """Where weights are rounded: by gptq on the accelerator, if there is one."""
    return None if source.settings.rounding == "gptq" else "cpu"


def _compress(
    source: Source, model: Any, directory: Path, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> str:
    """Write in the format of compressed-tensors, every linear layer but the output layer; how the weights were rounded."""
    head = model.get_output_embeddings()
    apart = [name for name, module in model.named_modules() if module is head]
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    if activations:
        scheme["input_activations"] = activations
    groups = {"config_groups": {"group_0": scheme}, "ignore": apart}
    with _quiet():
        if source.settings.rounding == "nearest":
            _to_nearest(model, groups, directory)
            return "rounded to the nearest"
        _by_gptq(model, groups, directory, source)
        return f"rounded by GPTQ on {counted(len(source.calibration), 'row')}"


def _by_gptq(model: Any, groups: dict[str, Any], directory: Path, source: Source) -> None:
    """Frantar et al. 2022, arXiv 2210.17323, by llm-compressor."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from loguru import logger
    from torch.utils.data import DataLoader

    logger.disable("llmcompressor")  # which turns its log on when it is imported
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()} for ids in source.calibration]
    rows: Any = DataLoader(batches, batch_size=None)
    recipe = GPTQModifier(**groups)
    oneshot(model=model, recipe=recipe, dataset=rows, num_calibration_samples=len(rows), processor=source.tokenizer)
    model.save_pretrained(directory, save_compressed=True)


def _to_nearest(model: Any, groups: dict[str, Any], directory: Path) -> None:
    """By compressed-tensors alone; the scale of a group is its largest magnitude over half the range."""
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without llm-compressor's and compressed-tensors' lines and bars: a failure speaks by its exception."""
    from loguru import logger

    logger.disable("compressed_tensors")
    with _silent():
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Without the warnings and bars of libraries."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), warnings.catch_warnings(action="ignore"):
        yield


def _write_gguf(quantisation: Quantisation, source: Source, directory: Path) -> str:
    """One file, what Ollama needs beside it, and what transformers does not read from the file."""
    model, tokenizer, file = source.load(), source.tokenizer, f"model-{quantisation}.gguf"
    ends = end_token_ids(source.model, None, model.config, tokenizer)
    written = write_gguf(model, tokenizer, ends, quantisation, directory / file)
    own = generation_config(source.model, None)
    (directory / "Modelfile").write_text(modelfile(file, tokenizer, ends, own), encoding="utf-8")
    for config in filter(None, (model.config, own)):
        config.save_pretrained(directory)
    if written.unfitting:
        say("export", f"{quantisation}: {counted(written.unfitting, 'weight')} in a wider type, the rows being no whole blocks")
    return describe(written)


def _load_gguf(directory: str, dtype: str) -> Any:
    """Its weights decoded by transformers."""
    (file,) = Path(directory).glob("*.gguf")
    with _silent():
        return load_model(directory, dtype=dtype, key="export", gguf_file=file.name)


def _gguf(name: Form, quantisation: Quantisation, *more: str) -> ExportFormat:
    return ExportFormat(
        name,
        ("gguf", "accelerate", *more),
        "llama.cpp, Ollama and transformers",
        partial(_write_gguf, quantisation),
        _load_gguf,
        check=lambda model, tokenizer, settings: check_gguf(model, tokenizer),
        extra="gguf",
    )


FORMATS: dict[str, ExportFormat] = {
    entry.name: entry
    for entry in (
        ExportFormat("safetensors", ("transformers",), "everything", _write_whole, _load),
        ExportFormat("int8", ("torchao",), "transformers and vLLM, with torchao installed", _write_int8, _load),
        ExportFormat("w8a8", ("compressed_tensors",), "vLLM and transformers", _write_w8a8, _load_compressed, rounded=True),
        ExportFormat(
            "w4a16",
            ("compressed_tensors",),
            "vLLM and transformers",
            _write_w4a16,
            _load_compressed,
            rounded=True,
            check=lambda model, tokenizer, settings: fitting_group_size(model, settings.group_size),
        ),
        _gguf("gguf-f16", "F16"),
        _gguf("gguf-q8_0", "Q8_0"),
        _gguf("gguf-q4_k_m", "Q4_K_M", "libgguf"),
    )
}
