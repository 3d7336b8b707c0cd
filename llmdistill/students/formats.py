"""The formats that `export` writes, one entry each, by the library that writes them.

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
from llmdistill.errors import not_installed
from llmdistill.models.loading import end_token_ids, generation_config, load_model
from llmdistill.runs.progress import counted, say
from llmdistill.students.gguf_file import check_gguf, describe, write_gguf
from llmdistill.students.gguf_types import Quantisation
from llmdistill.students.ollama import modelfile
from llmdistill.students.quantization import fitting_group_size


@dataclass(frozen=True)
class Source:
    """A model to be written, and what is needed for it.

    Attributes:
        model: directory of the model.
        tokenizer: its tokenizer.
        settings: the section `export`.
        calibration: token ids of the rows used by gptq.
    """

    model: str
    tokenizer: Any
    settings: Export
    calibration: list[list[int]]

    def load(self, device: str | None = "cpu", **how: Any) -> Any:
        """The model in the precision to be written."""
        return load_model(self.model, dtype=stored_dtype(self.settings), key="export.model", device=device, **how)


@dataclass(frozen=True)
class ExportFormat:
    """A format in which the student is written.

    Attributes:
        name: name of the format and of its directory.
        libraries: the modules that write and load it, unless `export.rounding` needs another one.
        loaded_by: the programs that load it.
        write: writes a model's weights and configuration into an empty directory, and returns a short description.
        load: loads the result in a precision, to be measured.
        rounded: whether `export.rounding` determines how its weights are rounded.
        check: refuses a model, without weights, whose shape or tokenizer is not supported.
        extra: the extra that installs the library.
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
        """Refuse it if its library is not installed.

        Raises:
            InputError: names what to install.
        """
        if self.by_gptq(settings) and importlib.util.find_spec("llmcompressor") is None:
            instead = f"set export.rounding to nearest (beside vLLM, see {page('export')})"
            raise not_installed(f"export.rounding gptq of {self.name}", "llm-compressor", "gptq", instead=instead)
        for library in self.libraries:
            if importlib.util.find_spec(library) is None:
                raise not_installed(f"export.formats: {self.name}", library, self.extra)


def stored_dtype(settings: Export) -> str:
    """The `dtype` of the result, regardless of what this machine computes in."""
    return "checkpoint" if settings.dtype == "auto" else settings.dtype


def _load(directory: str, dtype: str) -> Any:
    return load_model(directory, dtype=dtype, key="export")


def _load_compressed(directory: str, dtype: str) -> Any:
    """Weights are unpacked, but activations are still rounded."""
    import torch

    with _quiet(), torch.inference_mode():
        model = _load(directory, dtype)
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device))  # compressed-tensors unpacks in the first forward pass
    return model


def _write_whole(source: Source, directory: Path) -> str:
    source.load().save_pretrained(directory)
    return "whole"


def _write_int8(source: Source, directory: Path) -> str:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    source.load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))).save_pretrained(directory)
    return "8-bit weights with a scale per row, rounded to nearest"


def _write_w8a8(source: Source, directory: Path) -> str:
    weights = {"num_bits": 8, "strategy": "channel", "group_size": None}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    model = source.load(_device(source))
    how = _compress(source, model, directory, weights, activations)
    return f"8-bit weights with a scale per row, and 8-bit activations, {how}"


def _write_w4a16(source: Source, directory: Path) -> str:
    model = source.load(_device(source))
    size = fitting_group_size(model, source.settings.group_size)
    weights = {"num_bits": 4, "strategy": "group", "group_size": size}
    return f"4-bit weights with a scale per {size}, {_compress(source, model, directory, weights)}"


def _device(source: Source) -> str | None:
    """The device for rounding weights: the accelerator for gptq, if there is one."""
    return None if source.settings.rounding == "gptq" else "cpu"


def _compress(
    source: Source, model: Any, directory: Path, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> str:
    """Write every linear layer except the output layer in compressed-tensors' format; returns how weights were rounded."""
    head = model.get_output_embeddings()
    apart = [name for name, module in model.named_modules() if module is head]
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    if activations:
        scheme["input_activations"] = activations
    groups = {"config_groups": {"group_0": scheme}, "ignore": apart}
    with _quiet():
        if source.settings.rounding == "nearest":
            _to_nearest(model, groups, directory)
            return "rounded to nearest"
        _by_gptq(model, groups, directory, source)
        return f"rounded by GPTQ on {counted(len(source.calibration), 'row')}"


def _by_gptq(model: Any, groups: dict[str, Any], directory: Path, source: Source) -> None:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323), by llm-compressor."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from loguru import logger
    from torch.utils.data import DataLoader

    logger.disable("llmcompressor")  # which enables its log on import
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()} for ids in source.calibration]
    rows: Any = DataLoader(batches, batch_size=None)
    recipe = GPTQModifier(**groups)
    oneshot(model=model, recipe=recipe, dataset=rows, num_calibration_samples=len(rows), processor=source.tokenizer)
    model.save_pretrained(directory, save_compressed=True)


def _to_nearest(model: Any, groups: dict[str, Any], directory: Path) -> None:
    """Round with compressed-tensors only; the scale of a group is its largest magnitude over half the range."""
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
    """Silence the output of llm-compressor and compressed-tensors: failures raise exceptions."""
    from loguru import logger

    logger.disable("compressed_tensors")
    with _silent():
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Silence warnings and progress bars of libraries."""
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), warnings.catch_warnings(action="ignore"):
        yield


def _write_gguf(quantisation: Quantisation, source: Source, directory: Path) -> str:
    """Write one GGUF file, a Modelfile for Ollama, and what transformers does not read from the file."""
    model, tokenizer, file = source.load(), source.tokenizer, f"model-{quantisation}.gguf"
    ends = end_token_ids(source.model, None, model.config, tokenizer)
    written = write_gguf(model, tokenizer, ends, quantisation, directory / file)
    own = generation_config(source.model, None)
    (directory / "Modelfile").write_text(modelfile(file, tokenizer, ends, own), encoding="utf-8")
    for config in filter(None, (model.config, own)):
        config.save_pretrained(directory)
    if written.unfitting:
        say("export", f"{quantisation}: {counted(written.unfitting, 'weight')} in a wider type, as rows are not whole blocks")
    return describe(written)


def _load_gguf(directory: str, dtype: str) -> Any:
    """Let transformers decode its weights."""
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
