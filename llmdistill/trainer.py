"""`DistillTrainer`: TRL's `SFTTrainer` with the distillation loss on stored soft targets."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import trl

from llmdistill import losses
from llmdistill.collator import TARGET_COLUMNS, DistillCollator, completion_logits
from llmdistill.targets import kind_of


@dataclass
class DistillConfig(trl.SFTConfig):
    """A `trl.SFTConfig` with three more fields.

    Args:
        loss: the divergence between teacher and student, `forward_kl`.
        alpha: weight of the divergence; the rest, 1 − alpha, is cross-entropy on the teacher's text.
        temperature: of both distributions inside the divergence, which is multiplied by its square.
    """

    loss: str = field(default="forward_kl", metadata={"help": "Divergence between teacher and student."})
    alpha: float = field(default=0.9, metadata={"help": "Weight of the divergence; the rest is cross-entropy."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature inside the divergence."})
    max_length: int | None = field(default=None, metadata={"help": "Sequences are cut to so many tokens; whole by default."})

    def __post_init__(self) -> None:
        if self.loss != "forward_kl":
            raise ValueError(f"loss is {self.loss!r}, must be 'forward_kl'")
        if not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise ValueError(f"alpha must be in [0, 1] and temperature above 0, got {self.alpha} and {self.temperature}")
        # What would change the loss without being part of it is refused, not ignored.
        for name in ("packing", "padding_free", "assistant_only_loss", "label_smoothing_factor"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by DistillTrainer")
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()


class DistillTrainer(trl.SFTTrainer):
    """Trains on a dataset of `llmdistill.load_dataset`: exact token ids, completion tokens only, soft targets.

    loss = Σ over completion tokens of ((1 − alpha) · cross-entropy + alpha · divergence) / N, where N counts the
    completion tokens of the whole global batch: of every gradient-accumulation step on every process. So it does not
    depend on how the global batch is cut up. `kl` and `ce` in the logs are the two parts in nats a token.

    With a `teacher`, a model, the divergence is from its full distribution, computed beside the student at every step; the
    dataset's soft targets are not looked at.
    """

    _tag_names = ["trl", "llmdistill"]
    _name = "Distillation"

    def __init__(self, model: Any, args: DistillConfig, train_dataset: Any, teacher: Any = None, **kwargs: Any) -> None:
        if args.alpha > 0 and teacher is None and "target_ids" not in train_dataset.column_names:
            raise ValueError(f"alpha is {args.alpha}, but the dataset has no soft targets; train on its text with alpha 0")
        if args.temperature != 1 and kind_of(train_dataset.column_names) in ("sampled", "multinomial"):
            raise ValueError(f"temperature is {args.temperature}, but sampled targets are unbiased at temperature 1 only")
        kwargs.setdefault("data_collator", DistillCollator(pad_token_id=0, max_length=args.max_length))
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError("mixture-of-experts students with a router loss are not supported; set router_aux_loss_coef to 0")
        self.teacher = teacher and teacher.to(self.accelerator.device).eval().requires_grad_(False)
        self.model_accepts_loss_kwargs = True  # so that `num_items_in_batch` is counted and given to compute_loss
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": defaultdict(_zero), "eval": defaultdict(_zero)}

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "completion_start", *TARGET_COLUMNS]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The distillation loss of one micro-batch, divided by the tokens of the global batch."""
        args = self.args
        logits_NV = completion_logits(model, inputs)
        labels_N = inputs["labels"][inputs["labels"] != -100]
        ce = losses.cross_entropy(logits_NV, labels_N).sum()
        loss = (1 - args.alpha) * ce
        sums = {"ce": ce, "tokens": torch.tensor(float(len(labels_N)), device=ce.device)}
        if self.teacher is not None or "target_ids" in inputs:
            with torch.set_grad_enabled(args.alpha > 0 and torch.is_grad_enabled()):
                sums["kl"] = self._divergence(logits_NV, inputs).sum()
            loss = loss + args.alpha * sums["kl"]
        mode = "train" if self.model.training else "eval"
        for name, value in sums.items():
            self._sums[mode][name] = self._sums[mode][name].to(value.device) + value.detach().double()

        if num_items_in_batch is None:
            loss = loss / max(len(labels_N), 1)
        else:
            loss = loss / num_items_in_batch
            if args.average_tokens_across_devices:  # DDP averages gradients over processes; N counts all their tokens
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"logits": logits_NV}) if return_outputs else loss

    def _divergence(self, logits_NV: torch.Tensor, inputs: Any) -> torch.Tensor:
        if self.teacher is None:
            return divergence(logits_NV, inputs, self.args.temperature)
        with torch.no_grad():
            teacher_NV = completion_logits(self.teacher, inputs)
        return losses.dense_kl(logits_NV, teacher_NV, self.args.temperature)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `ce` and `kl`, exact means over the tokens since the last log, and the tokens trained on so far."""
        mode = "train" if self.model.training else "eval"
        sums = {name: self.accelerator.reduce(value, "sum").item() for name, value in sorted(self._sums[mode].items())}
        self._sums[mode].clear()
        if sums.get("tokens"):
            prefix = "eval_" if mode == "eval" else ""
            logs |= {f"{prefix}{name}": sums[name] / sums["tokens"] for name in ("ce", "kl") if name in sums}
            if mode == "train":
                self._total_train_tokens += int(sums["tokens"])
                logs["num_completion_tokens"] = self._total_train_tokens
        super().log(logs, start_time)


def divergence(logits_NV: torch.Tensor, batch: Mapping[str, torch.Tensor], temperature: float) -> torch.Tensor:
    """Forward KL on whatever targets the batch has, shape (N,)."""
    if "target_logweights" in batch:
        return losses.sampled_kl(logits_NV, batch["target_ids"], batch["target_logweights"], batch["target_entropy"])
    return losses.forward_kl(logits_NV, batch["target_ids"], batch["target_logprobs"], batch["target_tail"], temperature)


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)
