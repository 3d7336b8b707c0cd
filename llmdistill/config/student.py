"""The section `student`: where the model that learns comes from, and which of its weights train."""

from typing import Any, Literal

from pydantic import Field, model_validator

from llmdistill.config.section import PassedOn, Section

ORIGINS = ("model", "prune", "config")  # where a student comes from: exactly one of these keys
# A model that can do the task is changed gently; what was cut out of the teacher, or starts from nothing, has more to learn.
# Adapters take ten times the rate of training all weights (docs/training.md has the reasons).
_LEARNING_RATES = {"model": 2e-5, "prune": 1e-4, "config": 5e-4}
_ADAPTERS_TAKE = 10


class Prune(Section):
    """The student is the teacher with less of it: fewer layers, or narrower ones. What is not given stays whole."""

    layers: int | list[int] | None = None
    """How many layers stay, or which ones (counted from 0)."""
    by: Literal["block_influence", "even"] = "block_influence"
    """How the layers that stay are chosen: those that change their input most on the dataset, or evenly spaced."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Feed-forward neurons that stay in every layer, those with the largest activation on the dataset."""
    key_value_heads: int | None = Field(default=None, ge=1)
    """Key-value heads that stay in every layer, each with its query heads, those with the largest output on the dataset."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Channels that stay between the layers, those with the largest activation after the norms on the dataset."""
    calibration_rows: int = Field(default=64, ge=1)
    """Rows of the dataset on which all of this is measured, and the refit solved."""
    refit: bool = True
    """Solve every layer's down_proj again, by ridge regression, so that the student's hidden states come near the teacher's.
    Not for models with a norm behind it (gemma): there it is left out, and refused if it is set to true."""
    ridge: float = Field(default=1.0, ge=0.01)
    """Strength of the ridge that keeps refitted weights near the old ones, relative to the mean of the squared activations."""

    @model_validator(mode="after")
    def _something(self) -> "Prune":
        if all(getattr(self, name) is None for name in ("layers", "intermediate_size", "key_value_heads", "hidden_size")):
            raise ValueError("give at least one of layers, intermediate_size, key_value_heads and hidden_size")
        return self

    @property
    def measured(self) -> bool:
        """Whether rows of the dataset are needed, for the refit or to choose what stays."""
        by_influence = self.by == "block_influence" and isinstance(self.layers, int)
        return self.refit or by_influence or any((self.intermediate_size, self.key_value_heads, self.hidden_size))


class Lora(Section):
    """Train low-rank adapters (peft) instead of all weights; they are merged into the saved student."""

    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: int = Field(default=32, ge=1)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter."""
    args: PassedOn = {}
    """Any argument of `peft.LoraConfig`: use_dora, use_rslora, init_lora_weights, modules_to_save, …"""


class Student(Section):
    """The model that learns: an existing one (`model`), the pruned teacher (`prune`), or a fresh one (`config`)."""

    model: str | None = None
    """Model directory or name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    prune: Prune | None = None
    """Cut the student out of the teacher."""
    config: dict[str, Any] | None = None
    """The teacher's architecture with these keys of its `config.json` changed, random weights and the teacher's tokenizer."""
    lora: Lora | None = None
    """Train adapters only."""
    quantize: Literal["nf4", "int8"] | None = None
    """Hold the frozen weights in 4 or 8 bits while the adapters train (QLoRA; needs bitsandbytes)."""
    attn_implementation: str | None = None
    """How attention is computed: sdpa, flash_attention_2, a kernel on the Hub; transformers' own choice if not given."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""

    def continued(self, model: str) -> "Student":
        """The same settings for a student that goes on from the weights in a directory."""
        return self.with_(**{**dict.fromkeys(ORIGINS), "model": model, "revision": None})

    @property
    def default_learning_rate(self) -> float:
        """The peak learning rate where `train.args` gives none."""
        (rate,) = (rate for name, rate in _LEARNING_RATES.items() if getattr(self, name) is not None)
        return rate * _ADAPTERS_TAKE if self.lora else rate

    @model_validator(mode="after")
    def _one_origin(self) -> "Student":
        given = [f"student.{name}" for name in ORIGINS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give either {' or '.join(given)}, not both")
        return self

    @model_validator(mode="after")
    def _adapters_need_weights(self) -> "Student":
        if self.quantize and self.lora is None:
            raise ValueError(f"quantize is {self.quantize}, but quantised weights do not train; add lora: {{}}")
        if self.lora and self.config is not None:
            raise ValueError("lora trains adapters beside frozen weights, and those of student.config are random; remove lora")
        return self
