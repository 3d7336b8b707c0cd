"""The section `export`: the formats in which the student is written for serving."""

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from llmdistill.config.section import Dtype, Section

Form = Literal["safetensors", "int8", "w8a8", "w4a16", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m"]


class Export(Section):
    """Formats that `llmdistill export` writes. `run` exports only if this section is present."""

    formats: list[Form] = Field(default=["safetensors"], min_length=1)
    """`safetensors`: unquantised. `int8`: 8-bit weights (torchao). `w8a8`: 8-bit weights and activations, `w4a16`: 4-bit
    weights, both in compressed-tensors for vLLM. `gguf-f16`, `gguf-q8_0`, `gguf-q4_k_m`: one GGUF file for llama.cpp and
    Ollama, with 16, 8 or about 5 bits per weight; `gguf` is all three. Each is written to a directory of its name."""
    model: str | None = None
    """Model directory, or directory of adapters (peft), which are merged first; the output of `train` if not set."""
    dtype: Dtype = "auto"
    """Precision of the weights that are not quantised; `auto` keeps the student's."""
    rounding: Literal["gptq", "nearest"] = "gptq"
    """How w8a8 and w4a16 round weights: each to the `nearest` value, or by `gptq`, which compensates the error of each weight
    in those that follow (needs llm-compressor)."""
    group_size: int | None = Field(default=None, ge=2)
    """Weights per group that shares a scale in w4a16; the largest of 128, 64 and 32 that fits the student if not set."""
    calibration_rows: int = Field(default=128, ge=1)
    """Rows of the dataset used to calibrate gptq."""

    @field_validator("formats", mode="before")
    @classmethod
    def _all_of_gguf(cls, formats: Any) -> Any:
        if not isinstance(formats, list):
            return formats
        three = [form for form in get_args(Form) if form.startswith("gguf-")]
        return [form for name in formats for form in (three if name == "gguf" else [name])]

    @model_validator(mode="after")
    def _each_once(self) -> "Export":
        if twice := sorted({name for name in self.formats if self.formats.count(name) > 1}):
            raise ValueError(f"formats lists {twice[0]} twice")
        return self
