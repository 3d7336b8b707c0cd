"""`DistillConfig`: TRL's `SFTConfig` with the distillation loss, and the arguments that it refuses."""

from dataclasses import dataclass, field
from typing import Any

import torch
import trl

from llmdistill import losses
from llmdistill.config.machine import training_precision
from llmdistill.data.collator import POSITION_WEIGHTS
from llmdistill.losses.hidden_states import Attention, Hidden

# Arguments of TRL and transformers that would change the loss without being part of it, or have no effect: the values that
# they may have, and why.
_NEVER_TOKENISED = "the rows are trained on in the dataset's own token ids"
_NO_PREDICTIONS = "the logits of a whole batch are never computed, so there are no predictions"
_ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_only_loss": ((False,), "the loss is on the completion"),
    "average_tokens_across_devices": ((True,), "the loss is a mean over the tokens of all processes"),
    "completion_only_loss": ((None, True), "the loss is on the completion"),
    "eval_packing": ((None,), "evaluation rows are not packed"),
    "label_smoothing_factor": ((0.0,), "it would change the labels; alpha weights the teacher's distribution against them"),
    "loss_type": (("nll",), "the loss is set by loss and alpha"),
    "packing_strategy": (("bfd",), "rows are packed whole, best fit first"),
    "pad_to_multiple_of": (("auto", None), "batches are padded to their longest row"),
    "truncation_mode": (("keep_start",), "targets are cut at the end"),
    "chat_template_path": ((None,), _NEVER_TOKENISED),
    "eos_token": ((None,), _NEVER_TOKENISED),
    "pad_token": ((None,), "padding is masked, so any token will do"),
    "dataset_text_field": (("text",), _NEVER_TOKENISED),
    "dataset_kwargs": ((None, {"skip_prepare_dataset": True}), _NEVER_TOKENISED),
    "dataset_num_proc": ((None,), _NEVER_TOKENISED),
    "dataloader_in_order": ((True,), "the last batch of an epoch is identified by its position"),
    "train_sampling_strategy": (
        ("random", "sequential", "group_by_length"),
        "its batches repeat rows, and not all processes have as many",
    ),
    "shuffle_dataset": ((False,), "the order is set by train_sampling_strategy"),
    "length_column_name": (("length",), "lengths are those of input_ids"),
    "label_names": ((None,), "the labels are the collator's"),
    "include_for_metrics": (([],), _NO_PREDICTIONS),
    "batch_eval_metrics": ((False,), _NO_PREDICTIONS),
    "eval_do_concat_batches": ((True,), _NO_PREDICTIONS),
    "eval_use_gather_object": ((False,), _NO_PREDICTIONS),
    "eval_accumulation_steps": ((None,), _NO_PREDICTIONS),
    "bf16_full_eval": ((False,), "the student is evaluated in the precision of training"),
    "fp16_full_eval": ((False,), "the student is evaluated in the precision of training"),
}
_REDUCTIONS = ("token", "sequence")


@dataclass
class DistillConfig(trl.SFTConfig):
    """A `trl.SFTConfig` with the fields of the distillation loss.

    Of the inherited fields, `packing` packs several whole rows into one of at most `max_length` tokens, and `padding_free`
    concatenates the rows of a batch instead of padding them. In both cases rows do not attend to each other.

    Args:
        loss: the divergence between teacher and student, one of `losses.DIVERGENCES`.
        alpha: weight of the divergence; 1 − alpha is the weight of cross-entropy on the text.
        alpha_end: alpha at the last step, for a linear schedule.
        temperature: T of both distributions in the divergence, which is multiplied by T².
        beta: weight in the mixture of `jsd`, `skew_kl` and `skew_reverse_kl`; the value of the paper if not set.
        beta_end: beta at the last step, for a linear schedule.
        sequence_alpha: weight of the sequence-level KL (`losses.sequence_kl`).
        position_weights: weight of each token: `uniform`, the teacher's `entropy`, or its `certainty`, exp(−entropy).
        reduction: whether every `token` or every `sequence` of the global batch has the same weight.
        hidden: arguments of `hidden_states.Hidden`, to match the teacher's hidden states.
        attention: arguments of `hidden_states.Attention`, to match the teacher's attention maps.
    """

    loss: str = field(default="forward_kl", metadata={"help": "Divergence between teacher and student."})
    alpha: float = field(default=0.9, metadata={"help": "Weight of the divergence; the rest is cross-entropy."})
    alpha_end: float | None = field(default=None, metadata={"help": "alpha at the last step, for a linear schedule."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature inside the divergence."})
    beta: float | None = field(default=None, metadata={"help": "Weight in the mixture of jsd, skew_kl and skew_reverse_kl."})
    beta_end: float | None = field(default=None, metadata={"help": "beta at the last step, for a linear schedule."})
    sequence_alpha: float = field(default=0.0, metadata={"help": "Weight of the sequence-level KL."})
    position_weights: str = field(default="uniform", metadata={"help": "Weight of each token: uniform, entropy or certainty."})
    reduction: str = field(default="token", metadata={"help": "Whether every token or every sequence has the same weight."})
    hidden: dict[str, Any] | str | None = field(default=None, metadata={"help": "Arguments of hidden_states.Hidden."})
    attention: dict[str, Any] | str | None = field(default=None, metadata={"help": "Arguments of hidden_states.Attention."})
    max_length: int | None = field(
        default=None, metadata={"help": "Truncate sequences to this many tokens; no truncation by default."}
    )

    # Dictionaries, which a command line gives as JSON.
    _VALID_DICT_FIELDS = [*trl.SFTConfig._VALID_DICT_FIELDS, "hidden", "attention"]

    def __post_init__(self) -> None:
        self.objective(0)
        self.objective(1)
        if self.beta_end is not None and self.beta is None:
            raise ValueError(f"beta_end is {self.beta_end}, but beta is not set")
        if self.position_weights not in POSITION_WEIGHTS:
            raise ValueError(f"position_weights is {self.position_weights!r}, must be one of {', '.join(POSITION_WEIGHTS)}")
        if self.reduction not in _REDUCTIONS:
            raise ValueError(f"reduction is {self.reduction!r}, must be one of {', '.join(_REDUCTIONS)}")
        for name, (allowed, why) in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported by DistillTrainer: {why}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}, must be at least 1")
        if self.packing and (self.max_length is None or self.train_sampling_strategy not in ("random", "sequential")):
            raise ValueError("packing needs max_length, the size of a pack in tokens, and no train_sampling_strategy by length")
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        asked: dict[str, Any] = {name: getattr(self, name) for name in ("use_cpu", "bf16", "fp16")}
        if asked["bf16"] and asked["fp16"]:
            raise ValueError("bf16 and fp16 are both true; set one of them")
        if asked["fp16"] and (asked["use_cpu"] or not torch.cuda.is_available()):
            raise ValueError("fp16 training needs CUDA; remove fp16 to train in bfloat16 or float32")
        precision = training_precision(**asked)  # TRL uses bfloat16 on every machine
        self.bf16, self.fp16 = precision.dtype == "bfloat16", precision.dtype == "float16"
        super().__post_init__()
        self._check_accelerator()
        self.layers()

    def _check_accelerator(self) -> None:
        """Refuse settings that would separate a batch from its targets, or give processes or retries different batches."""
        allowed_values = {"dispatch_batches": (None, False), "even_batches": (True,), "use_seedable_sampler": (True,)}
        for name, allowed in allowed_values.items():
            value = getattr(self.accelerator_config, name)
            if value not in allowed:
                raise ValueError(f"accelerator_config.{name}={value} is not supported by DistillTrainer")

    def layers(self) -> tuple[Hidden | None, Attention | None]:
        """Which hidden states or attention maps are compared with the teacher's."""
        hidden: Any = self.hidden
        attention: Any = self.attention
        return None if hidden is None else Hidden(**hidden), None if attention is None else Attention(**attention)

    def objective(self, progress: float) -> losses.Objective:
        """The loss that these fields describe, at a given share of training between 0 and 1."""
        alpha, beta = (
            start if end is None or start is None else start + (end - start) * progress
            for start, end in ((self.alpha, self.alpha_end), (self.beta, self.beta_end))
        )
        assert alpha is not None
        return losses.Objective(self.loss, alpha, self.temperature, beta, self.sequence_alpha)

    @property
    def uses_targets(self) -> bool:
        """Whether soft targets have weight in the loss at any step."""
        return self.alpha > 0 or (self.alpha_end or 0) > 0
