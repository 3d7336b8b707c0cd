"""The section `student`: where the student comes from, and which of its weights are trained."""

from typing import Any, Literal

from pydantic import Field, model_validator

from llmdistill.config.section import PassedOn, Section

ORIGINS = ("model", "prune", "config")  # where a student comes from: exactly one of these keys
# An existing model needs small updates; a pruned or randomly initialised student has more to learn.
# Adapters take ten times the rate of training all weights (reasons: docs/students.md).
_LEARNING_RATES = {"model": 2e-5, "prune": 1e-4, "config": 5e-4}
_ADAPTERS_TAKE = 10


class Prune(Section):
    """Make the student by pruning the teacher: fewer layers, narrower layers, or both. Dimensions that are not set are kept."""

    layers: int | list[int] | None = None
    """Number of layers to keep, or a list of the layers to keep (counted from 0)."""
    by: Literal["block_influence", "kl", "even"] = "block_influence"
    """How to choose layers. `block_influence`: keep those that change their input most on the dataset. `kl`: repeatedly remove
    the layer whose removal, after a refit, adds the least KL to the teacher (takes minutes). `even`: keep evenly spaced
    ones."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Feed-forward neurons to keep in every layer: those with the largest activation on the dataset."""
    key_value_heads: int | None = Field(default=None, ge=1)
    """Key-value heads to keep in every layer, each with its query heads: those with the largest output on the dataset."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Channels of the hidden states to keep: those with the largest activation after the norms on the dataset."""
    calibration_rows: int = Field(default=64, ge=1)
    """Rows of the dataset used to measure activations and to solve the refit."""
    refit: bool = True
    """Refit every layer's o_proj and down_proj by ridge regression to bring its hidden states close to the teacher's."""
    ridge: float = Field(default=1.0, ge=0.01)
    """Ridge penalty that keeps refitted weights near the original ones, relative to the mean squared activation."""

    @model_validator(mode="after")
    def _something(self) -> "Prune":
        if all(getattr(self, name) is None for name in ("layers", "intermediate_size", "key_value_heads", "hidden_size")):
            raise ValueError("give at least one of layers, intermediate_size, key_value_heads and hidden_size")
        return self

    @model_validator(mode="after")
    def _kl_is_after_a_refit(self) -> "Prune":
        if self.by == "kl" and not self.refit:
            raise ValueError("by is kl, which is measured after a refit, but refit is false; remove one of them")
        return self

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> "Prune":
        if self.by != "block_influence" and not isinstance(self.layers, int):
            found = "layers lists them" if self.layers else "layers is not set"
            raise ValueError(f"by is {self.by}, which chooses layers, but {found}; remove by, or set layers to their number")
        if not self.refit and self.ridge != type(self).model_fields["ridge"].default:
            raise ValueError(f"ridge is {self.ridge}, but refit is false; remove one of them")
        return self

    @property
    def by_kl(self) -> bool:
        """Whether the layers to keep are chosen by the KL of each removal."""
        return self.by == "kl" and isinstance(self.layers, int)

    @property
    def measured(self) -> bool:
        """Whether rows of the dataset are needed, for the refit or to choose what to keep."""
        by_influence = self.by != "even" and isinstance(self.layers, int)
        return self.refit or by_influence or any((self.intermediate_size, self.key_value_heads, self.hidden_size))


class Lora(Section):
    """Train low-rank adapters (peft) instead of all weights. They are merged into the saved student."""

    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: int = Field(default=32, ge=1)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Modules to adapt."""
    args: PassedOn = {}
    """Any other argument of `peft.LoraConfig`: use_dora, use_rslora, init_lora_weights, modules_to_save, …"""


class Student(Section):
    """The model to train: an existing one (`model`), a pruned teacher (`prune`), or a randomly initialised one (`config`)."""

    model: str | None = None
    """Model directory or name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    prune: Prune | None = None
    """Prune the teacher."""
    config: dict[str, Any] | None = None
    """Keys of the teacher's `config.json` to change. The student has the resulting architecture, random weights and the
    teacher's tokenizer."""
    lora: Lora | None = None
    """Train LoRA adapters only."""
    quantize: Literal["nf4", "int8"] | None = None
    """Load the frozen weights in 4 or 8 bits while training adapters (QLoRA; needs bitsandbytes)."""
    attn_implementation: str | None = None
    """Attention implementation: sdpa, flash_attention_2 or a kernel on the Hub; the default of transformers if not set."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository."""

    def continued(self, model: str) -> "Student":
        """The same settings for a student that continues from the weights in a directory."""
        return self.with_(**{**dict.fromkeys(ORIGINS), "model": model, "revision": None})

    @property
    def default_learning_rate(self) -> float:
        """Peak learning rate if `train.args` sets none."""
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
            raise ValueError(f"quantize is {self.quantize}, but quantised weights cannot be trained; add lora: {{}}")
        if self.lora and self.config is not None:
            raise ValueError("lora freezes the weights, and those of student.config are random; remove lora")
        return self
