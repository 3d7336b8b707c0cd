"""The section `export`: the forms in which the student is written for those who serve it."""

from typing import Literal

from pydantic import Field, model_validator

from llmdistill.config.section import Dtype, Section

Form = Literal["safetensors", "int8", "w8a8", "w4a16"]


class Export(Section):
    """What `llmdistill export` writes; `run` exports where this section is given."""

    formats: list[Form] = Field(default=["safetensors"], min_length=1)
    """`safetensors`: whole. `int8`: 8-bit weights (torchao). `w8a8`: 8-bit weights and activations, and `w4a16`: 4-bit weights,
    both for vLLM (compressed-tensors, by llm-compressor). Each becomes a directory of that name."""
    model: str | None = None
    """Model directory, or a directory of adapters (peft), which are merged first; what `train` wrote if not given."""
    dtype: Dtype = "auto"
    """Precision of the weights that are not quantised; `auto` is the student's own."""
    rounding: Literal["gptq", "nearest"] = "gptq"
    """How w8a8 and w4a16 round weights: each to the `nearest`, or by `gptq`, which makes up for one's error in the next ones."""
    group_size: int | None = Field(default=None, ge=2)
    """Weights of a row that share a scale in w4a16; the largest of 128, 64 and 32 that fits the student if not given."""
    calibration_rows: int = Field(default=128, ge=1)
    """Rows of the dataset on which gptq measures what the student's layers see."""

    @model_validator(mode="after")
    def _each_once(self) -> "Export":
        if twice := sorted({name for name in self.formats if self.formats.count(name) > 1}):
            raise ValueError(f"formats has {twice[0]} twice")
        return self
