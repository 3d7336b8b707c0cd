"""The section `train`: the dataset, the loss and the training arguments."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmdistill.config.section import Divergence, PassedOn, Section
from llmdistill.data.targets import SoftTargets

_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]


class _Numbers(BaseModel):
    """Arguments of `trl.SFTConfig` whose bad values transformers accepts silently or reports late."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    learning_rate: _NotNegative = 1
    num_train_epochs: _Positive = 1
    max_steps: Literal[-1] | _Count = -1
    per_device_train_batch_size: _Count = 1
    per_device_eval_batch_size: _Count = 1
    gradient_accumulation_steps: _Count = 1
    max_length: _Count | None = None
    weight_decay: _NotNegative = 0
    max_grad_norm: _NotNegative = 0
    warmup_steps: _NotNegative = 0
    logging_steps: _Positive = 1
    save_steps: _Positive = 1
    eval_steps: _Positive | None = None
    save_total_limit: _Count | None = None
    seed: _Seed = 0
    data_seed: _Seed | None = None


def _check_numbers(args: dict[str, Any]) -> dict[str, Any]:
    try:
        _Numbers.model_validate(args)
    except ValidationError as error:
        found = error.errors()
        name = found[0]["loc"][0]
        why = [detail["msg"] for detail in found if detail["loc"][0] == name][-1]
        raise ValueError(f"{name} is {args[str(name)]!r}: {why.replace('Input', 'it')}") from None
    return args


TrainingArguments = Annotated[PassedOn, AfterValidator(_check_numbers)]


class Hidden(Section):
    """Also match the teacher's hidden states, layer by layer (targets.kind online)."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of this part relative to the others in the loss."""
    loss: Literal["cosine", "mse"] = "cosine"
    """1 - cosine similarity, or mean squared error. If hidden sizes differ, a linear projector is trained with the student."""
    layers: list[tuple[int, int]] | None = None
    """Pairs [student layer, teacher layer] to match; by relative depth if not set."""


class Attention(Section):
    """Also match the teacher's attention maps, by KL (targets.kind online)."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of this part relative to the others in the loss."""
    layers: list[tuple[int, int]] | None = None
    """Pairs [student layer, teacher layer] to match; by relative depth if not set."""


class EarlyStopping(Section):
    """Stop when the KL on the validation rows no longer falls, and keep the best checkpoint."""

    patience: int = Field(default=3, ge=1)
    """Evaluations without improvement after which training stops."""
    min_delta: float = Field(default=0.0, ge=0)
    """Minimum improvement, in nats per token."""


class Mix(Section):
    """Rows of other datasets, mixed with those of `train.dataset`."""

    datasets: list[str] = Field(min_length=1)
    """Directories of the other datasets, with the same kind of targets."""
    share: float = Field(gt=0, lt=1)
    """Share of all training rows that come from them; less if they have too few rows."""


class Examples(Section):
    """One of your own tasks with examples, none of which is among its held-out items."""

    task: str
    """YAML file of the task, which defines the prompt."""
    file: str
    """JSONL file with rows of `{"input": …, "output": …}`."""


class Train(Section):
    """How the student is trained."""

    dataset: str | None = None
    """Directory of the dataset; the output of `curate` if not set."""
    mix: Mix | None = None
    """Further datasets to train on."""
    loss: Divergence = "forward_kl"
    """Divergence between teacher and student at each completion token."""
    alpha: float = Field(default=0.9, ge=0, le=1)
    """Weight of the divergence; the rest, 1 - alpha, is the weight of cross-entropy on the text."""
    alpha_end: float | None = Field(default=None, ge=0, le=1)
    """`alpha` at the last step, for a linear schedule."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature T of both distributions in the divergence, which is multiplied by T²."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Weight in the mixture of teacher and student (default 0.5 for jsd, 0.1 for skew_kl and skew_reverse_kl)."""
    beta_end: float | None = Field(default=None, gt=0, lt=1)
    """`beta` at the last step, for a linear schedule."""
    sequence_alpha: float = Field(default=0.0, ge=0, le=1)
    """Weight of the sequence-level KL, estimated on the teacher's text with importance weights."""
    position_weights: Literal["uniform", "entropy", "certainty"] = "uniform"
    """Weight of each token in the loss: `uniform`, the teacher's `entropy` there, or its `certainty`, exp(-entropy)."""
    reduction: Literal["token", "sequence"] = "token"
    """Whether every token or every sequence of the global batch gets the same weight."""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training prompts used for validation during training, separate from those held out for `eval`. Runs every
    `args.eval_steps` steps, or at every checkpoint if not set."""
    early_stopping: EarlyStopping | None = None
    """Early stopping; needs `validation`."""
    hidden: Hidden | None = None
    """Also match the teacher's hidden states."""
    attention: Attention | None = None
    """Also match the teacher's attention maps."""
    fake_quantize: Literal["w4a16"] | None = None
    """Quantisation-aware training (torchao) for this export format; export with `export.rounding: nearest`."""
    compare_text_only: bool = False
    """Also train a second student for the same number of steps on the text only (alpha 0), for comparison in `eval`."""
    compare_examples: Examples | None = None
    """Also train a student for the same number of steps on the examples of a task only, for comparison in `eval`."""
    args: TrainingArguments = {}
    """Any argument of `trl.SFTConfig`: learning_rate, num_train_epochs, report_to, …"""

    @model_validator(mode="after")
    def _beta_has_a_mixture(self) -> "Train":
        if self.beta is not None and self.loss not in ("jsd", "skew_kl", "skew_reverse_kl"):
            raise ValueError(f"beta is {self.beta}, but {self.loss} has no parameter beta")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> "Train":
        for name in ("alpha", "alpha_end"):
            alpha = getattr(self, name)
            if alpha is not None and alpha + self.sequence_alpha > 1 + 1e-9:
                raise ValueError(f"{name} {alpha} and sequence_alpha {self.sequence_alpha} must add up to at most 1")
        if self.beta_end is not None and self.beta is None:
            raise ValueError(f"beta_end is {self.beta_end}, but beta is not set")
        if self.early_stopping and not self.validation:
            raise ValueError("early_stopping needs validation, the share of the training prompts to validate on")
        for name in ("compare_text_only", "compare_examples"):
            if self.early_stopping and getattr(self, name):
                raise ValueError(
                    f"{name} trains for the same number of steps, which early_stopping does not fix; remove one of them"
                )
        return self

    @property
    def uses_targets(self) -> bool:
        """Whether soft targets have a weight above zero in the loss at any step."""
        return self.alpha > 0 or (self.alpha_end or 0) > 0

    def against(self, kind: type[SoftTargets]) -> str | None:
        """Why this loss does not support a kind of targets; None if it does."""
        reason = kind.refuses(self.loss, self.temperature)
        return reason and f"train.{reason}"
