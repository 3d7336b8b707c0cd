"""`DistillTrainer`: TRL's `SFTTrainer` with the distillation loss on stored soft targets."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import trl

from llmdistill import fused, losses
from llmdistill.collator import TARGET_COLUMNS, DistillCollator, completion_logits, in_place_of_logits
from llmdistill.targets import kind_of


@dataclass
class DistillConfig(trl.SFTConfig):
    """A `trl.SFTConfig` with four more fields.

    Args:
        loss: the divergence between teacher and student, one of `losses.DIVERGENCES`.
        alpha: weight of the divergence; the rest, 1 − alpha, is cross-entropy on the teacher's text.
        temperature: of both distributions inside the divergence, which is multiplied by its square.
        beta: of the mixture inside `jsd`, `skew_kl` and `skew_reverse_kl`; the paper's if not given.
    """

    loss: str = field(default="forward_kl", metadata={"help": "Divergence between teacher and student."})
    alpha: float = field(default=0.9, metadata={"help": "Weight of the divergence; the rest is cross-entropy."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature inside the divergence."})
    beta: float | None = field(default=None, metadata={"help": "Of the mixture inside jsd, skew_kl and skew_reverse_kl."})
    max_length: int | None = field(default=None, metadata={"help": "Sequences are cut to so many tokens; whole by default."})

    def __post_init__(self) -> None:
        self.objective()
        # What would change the loss without being part of it is refused, not ignored.
        for name in ("packing", "padding_free", "assistant_only_loss", "label_smoothing_factor"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by DistillTrainer")
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()

    def objective(self) -> losses.Objective:
        """The loss that these fields describe."""
        return losses.Objective(self.loss, self.alpha, self.temperature, self.beta)


class DistillTrainer(trl.SFTTrainer):
    """Trains on a dataset of `llmdistill.load_dataset`: exact token ids, completion tokens only, soft targets.

    loss = Σ over completion tokens of ((1 − alpha) · cross-entropy + alpha · divergence) / N, where N counts the
    completion tokens of the whole global batch: of every gradient-accumulation step on every process. So it does not
    depend on how the global batch is cut up. In the logs are the parts, in nats a token: `ce`, the divergence under its
    name, and always `kl`, the forward KL on the same targets.

    With a `teacher`, a model, the divergence is from its full distribution, computed beside the student at every step; the
    dataset's soft targets are not looked at.
    """

    _tag_names = ["trl", "llmdistill"]
    _name = "Distillation"

    def __init__(self, model: Any, args: DistillConfig, train_dataset: Any, teacher: Any = None, **kwargs: Any) -> None:
        if args.alpha > 0 and teacher is None and "target_ids" not in train_dataset.column_names:
            raise ValueError(f"alpha is {args.alpha}, but the dataset has no soft targets; train on its text with alpha 0")
        if teacher is None:
            args.objective().check_targets(kind_of(train_dataset.column_names))
        kwargs.setdefault("data_collator", DistillCollator(pad_token_id=0, max_length=args.max_length))
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError("mixture-of-experts students with a router loss are not supported; set router_aux_loss_coef to 0")
        self.teacher = teacher and teacher.to(self.accelerator.device).eval().requires_grad_(False)
        # A teacher's whole distribution is no smaller than the student's logits: with one, they are held.
        self._head = fused.find_head(self.model) if teacher is None else None
        self.model_accepts_loss_kwargs = True  # so that `num_items_in_batch` is counted and given to compute_loss
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": defaultdict(_zero), "eval": defaultdict(_zero)}

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "completion_start", *TARGET_COLUMNS]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The distillation loss of one micro-batch, divided by the tokens of the global batch."""
        args = self.args
        objective, head = args.objective(), self._head
        labels_N = inputs["labels"][inputs["labels"] != -100]
        if self.teacher is not None:
            with torch.no_grad():
                inputs = {**inputs, "teacher_logits": completion_logits(self.teacher, inputs)}
        if head is None or return_outputs or not head.is_in(model):
            logits_NV = completion_logits(model, inputs)
            loss, sums = losses.distillation_loss(logits_NV, labels_N, inputs, objective)
        else:
            loss, sums = in_place_of_logits(
                model, inputs, lambda hidden_ND: fused.distillation_loss(hidden_ND, head, labels_N, inputs, objective)
            )
        sums["tokens"] = torch.tensor(float(len(labels_N)), device=loss.device)
        mode = "train" if self.model.training else "eval"
        for name, value in sums.items():
            self._sums[mode][name] = self._sums[mode][name].to(value.device) + value.double()

        if num_items_in_batch is None:
            loss = loss / max(len(labels_N), 1)
        else:
            loss = loss / num_items_in_batch
            if args.average_tokens_across_devices:  # DDP averages gradients over processes; N counts all their tokens
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"logits": logits_NV}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, exact means over the tokens since the last log, and the tokens trained on so far."""
        mode = "train" if self.model.training else "eval"
        sums = {name: self.accelerator.reduce(value, "sum").item() for name, value in sorted(self._sums[mode].items())}
        self._sums[mode].clear()
        if tokens := sums.pop("tokens", 0):
            prefix = "eval_" if mode == "eval" else ""
            logs |= {f"{prefix}{name}": value / tokens for name, value in sums.items()}
            if mode == "train":
                self._total_train_tokens += int(tokens)
                logs["num_completion_tokens"] = self._total_train_tokens
        super().log(logs, start_time)


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)
