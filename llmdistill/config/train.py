"""The section `train`: what the student learns from, by which loss, and how."""

from typing import Literal

from pydantic import Field, model_validator

from llmdistill.config.section import Divergence, PassedOn, Section
from llmdistill.data.targets import SoftTargets


class Hidden(Section):
    """The student's hidden states are to resemble the teacher's, layer by layer (targets.kind online)."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of this part beside the others of the loss."""
    loss: Literal["cosine", "mse"] = "cosine"
    """1 - cosine, or mean squared error; where the sizes differ, through a linear projector that learns with the student."""
    layers: list[tuple[int, int]] | None = None
    """Pairs [student's layer, teacher's layer] whose outputs are compared; by position if not given."""


class Attention(Section):
    """The student's attention maps are to resemble the teacher's, by KL (targets.kind online)."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of this part beside the others of the loss."""
    layers: list[tuple[int, int]] | None = None
    """Pairs [student's layer, teacher's layer] whose maps are compared; by position if not given."""


class EarlyStopping(Section):
    """Stop where the KL on the validation rows has stopped falling, and keep the best checkpoint."""

    patience: int = Field(default=3, ge=1)
    """Evaluations without a better one, after which training stops."""
    min_delta: float = Field(default=0.0, ge=0)
    """How much lower counts as better, in nats a token."""


class Mix(Section):
    """Rows of other datasets among those of `train.dataset`."""

    datasets: list[str] = Field(min_length=1)
    """Their directories; their targets are of the same kind."""
    share: float = Field(gt=0, lt=1)
    """Share of all training rows that are theirs, or less where they have not so many."""


class Train(Section):
    """How the student learns."""

    dataset: str | None = None
    """The dataset's directory; what `curate` wrote if not given."""
    mix: Mix | None = None
    """Other datasets to train on, too."""
    loss: Divergence = "forward_kl"
    """The divergence between teacher and student at each completion token."""
    alpha: float = Field(default=0.9, ge=0, le=1)
    """Weight of the soft targets; what is left to 1 is cross-entropy on the teacher's text."""
    alpha_end: float | None = Field(default=None, ge=0, le=1)
    """`alpha` at the last step, if it is to change: linearly, from step to step."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both distributions inside the divergence, which is multiplied by its square."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Weight inside the mixture of teacher and student (loss jsd: 0.5 if not given; skew_kl and skew_reverse_kl: 0.1)."""
    beta_end: float | None = Field(default=None, gt=0, lt=1)
    """`beta` at the last step, if it is to change."""
    sequence_alpha: float = Field(default=0.0, ge=0, le=1)
    """Weight of the KL between whole texts, estimated on the teacher's own, each weighted by its importance."""
    position_weights: Literal["uniform", "entropy", "certainty"] = "uniform"
    """What a token counts: all the same, by the teacher's `entropy` there, or by its `certainty`, exp(-entropy)."""
    reduction: Literal["token", "sequence"] = "token"
    """Whether every token of the global batch counts alike, or every sequence."""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training prompts on which the student is measured while it trains; 0 is none. They are not those held out
    for `eval`. How often is `args.eval_steps`, or with every checkpoint if not given."""
    early_stopping: EarlyStopping | None = None
    """Stop where validation says so; needs `validation`."""
    hidden: Hidden | None = None
    """Also learn from the teacher's hidden states."""
    attention: Attention | None = None
    """Also learn from the teacher's attention maps."""
    fake_quantize: Literal["w4a16"] | None = None
    """Train through weights rounded as `export` will round them in this form, with `export.rounding: nearest`, so that it costs
    less (quantisation-aware training, torchao)."""
    compare_text_only: bool = False
    """Train a second student for the same steps on the text alone (alpha 0), so that `eval` shows the difference."""
    args: PassedOn = {}
    """Any argument of `trl.SFTConfig`: learning_rate, num_train_epochs, report_to, …"""

    @model_validator(mode="after")
    def _beta_has_a_mixture(self) -> "Train":
        if self.beta is not None and self.loss not in ("jsd", "skew_kl", "skew_reverse_kl"):
            raise ValueError(f"beta is {self.beta}, but {self.loss} has no such parameter")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> "Train":
        for name in ("alpha", "alpha_end"):
            alpha = getattr(self, name)
            if alpha is not None and alpha + self.sequence_alpha > 1 + 1e-9:
                raise ValueError(f"{name} {alpha} and sequence_alpha {self.sequence_alpha} must add up to 1 at most")
        if self.beta_end is not None and self.beta is None:
            raise ValueError(f"beta_end is {self.beta_end}, but there is no beta to begin with")
        if self.early_stopping and not self.validation:
            raise ValueError("early_stopping needs validation, a share of the training prompts to measure on")
        if self.early_stopping and self.compare_text_only:
            raise ValueError("compare_text_only trains for the same steps, and with early_stopping those are not known before")
        return self

    @property
    def uses_targets(self) -> bool:
        """Whether soft targets have a weight in the loss, at some step."""
        return self.alpha > 0 or (self.alpha_end or 0) > 0

    def against(self, kind: type[SoftTargets]) -> str | None:
        """Why this loss cannot learn from targets of a kind; None if it can."""
        reason = kind.refuses(self.loss, self.temperature)
        return reason and f"train.{reason}"
