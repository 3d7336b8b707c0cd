"""`DistillTrainer`: TRL's `SFTTrainer` with the distillation loss on stored soft targets."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import trl
from accelerate.data_loader import SkipBatchSampler
from torch.utils.data import BatchSampler
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler

from llmdistill import losses
from llmdistill.data.collator import DistillCollator, completion_labels, first_items, some_tokens, teacher_batch
from llmdistill.data.importance import importance, log_importance
from llmdistill.data.targets import KINDS, Chunks, TextOnly, kind_of
from llmdistill.data.targets.draw import widest
from llmdistill.errors import NonFiniteError
from llmdistill.losses import fused
from llmdistill.losses.classes import ClassTable
from llmdistill.losses.hidden_states import LayerMatch
from llmdistill.models.forward import completion_logits, in_place_of_logits
from llmdistill.models.root_classes import RootClasses, by_name
from llmdistill.students.adapters import check_mergeable, train_in_float32
from llmdistill.training.arguments import DistillConfig
from llmdistill.training.callbacks import last_checkpoint, trained_tokens
from llmdistill.training.compat import adapters_on_the_output_layer
from llmdistill.training.flops import peak_flops, training_flops
from llmdistill.training.packing import Packs, check_apart, row_lengths


class DistillTrainer(trl.SFTTrainer):
    """TRL's `SFTTrainer` with the distillation loss, on a dataset from `llmdistill.load_dataset`.

    loss = Σ w · ((1 − alpha − sequence_alpha) · cross-entropy + alpha · divergence + sequence_alpha · sequence-level KL) / Σ w
    over the completion tokens of the global batch, that is, of all gradient-accumulation steps on all processes. The loss
    does not depend on how the global batch is divided. w is 1 unless `position_weights` or `reduction` is set.

    Logged are the unweighted parts of the loss, in nats per token: `ce`, the divergence under its name, and always `kl`, the
    forward KL on the same targets; also `agreement`, the share of tokens where teacher and student have the same most likely
    token; `tokens_per_s`; `tflops` per device; and `mfu`, their share of the device's peak, if known. For an `eval_dataset`,
    the same parts are logged as `eval_kl` and so on.

    A mixture of experts adds its router's load-balancing loss, with the coefficient of its configuration or of
    `router_aux_loss_coef`, logged as `router`.

    With an online `teacher` (a model), the divergence is computed from its full distribution at every step, and the soft
    targets of the dataset are ignored. `hidden` and `attention` then add terms for its hidden states and attention maps,
    with their own weights.

    With a dataset from `retokenize`, whose targets are in a different vocabulary than the student's, `classes` are those of the
    dataset (`RootClasses.load`), and the divergence is over classes. If its rows have several teachers, pass the classes of
    each by name (`load_classes`); every row is compared in those of the teacher named in its column `teacher`. Several
    online teachers are passed as models by these names.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the arguments conflict with each other, with the dataset or with the model.
    """

    _tag_names = ["trl", "llmdistill"]
    _name = "Distillation"

    def __init__(
        self,
        model: Any,
        args: DistillConfig | None = None,
        train_dataset: Any = None,
        teacher: Any = None,
        eval_dataset: Any = None,
        classes: RootClasses | Mapping[str, RootClasses] | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = DistillConfig(f"{Path(name).name}-distilled")
        _check_given(args, teacher, classes, kwargs)
        train_dataset = self._prepared(args, train_dataset, teacher, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepared(args, rows, teacher, f"eval_dataset {name}") for name, rows in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepared(args, eval_dataset, teacher, "eval_dataset")
        several = isinstance(teacher, Mapping)
        collator = kwargs.get("data_collator") or DistillCollator(0)  # `args` also applies to a given one
        collator.max_length, collator.padding_free = args.max_length, args.packing or args.padding_free
        collator.position_weights, collator.by_sequence = args.position_weights, args.reduction == "sequence"
        collator.with_ids = True
        collator.classes, collator.for_teacher = classes, teacher is not None and (several or classes is not None)
        collator.teachers = list(teacher) if several else []
        if any(args.layers()) and (several or classes is not None):
            raise ValueError("hidden and attention need a single teacher, and a student with its vocabulary")
        kwargs["data_collator"] = collator
        if args.hidden and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # DDP searches the model's forward, but a projector is used after it
        wanted = args.packing, args.padding_free
        args.packing = args.padding_free = False  # handled here; TRL would require its own collator
        with adapters_on_the_output_layer():
            super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        args.packing, args.padding_free = wanted
        if self.data_collator.vocab_size is None:  # a teacher's vocabulary may be padded further
            self.data_collator.vocab_size = self.model.get_output_embeddings().weight.shape[0] or None
        if self.is_fsdp_enabled:
            add_up_in_float32(self.accelerator.state.fsdp_plugin)
        self._router: list[Any] = []  # the router's loss of the last forward of a mixture of experts
        self._watch_router()
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError("context and sequence parallelism are not supported: they separate sequences from their targets")
        if getattr(self.model, "peft_config", {}):
            check_mergeable(self.model)
            if not self.is_fsdp_enabled:  # TRL has converted those next to quantised weights to bfloat16
                train_in_float32(self.model)
        ordered = by_name(classes) if several and classes is not None else teacher  # in the collator's order
        beside = [teacher[name] for name in ordered] if several else [] if teacher is None else [teacher]
        self.teachers = [one.to(self.accelerator.device).eval().requires_grad_(False) for one in beside]
        self.match = self._match(args)
        with self.accelerator.autocast():
            if collator.padding_free:
                for checked in (self.model, *self.teachers):
                    check_apart(checked)
            self._head = fused.find_head(self.model)
            self._teacher_heads = [fused.find_head(one) for one in self.teachers]
        if args.packing:
            self.train_dataset = Packs(self._read_columns(train_dataset), args.max_length or 0)
        self._flops = training_flops(self.model, self.model.get_output_embeddings())
        self._table = None if classes is None else ClassTable.of(classes, self.accelerator.device)
        self._since: float | None = None
        self._step: list[tuple[torch.Tensor, list[str]]] = []  # the loss and the rows of each micro-batch of a step
        self.model_accepts_loss_kwargs = True  # so that `num_items_in_batch` is counted and passed to compute_loss
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": defaultdict(_zero), "eval": defaultdict(_zero)}

    def _watch_router(self) -> None:
        """Keep the router's loss of every forward, which TRL makes a mixture of experts compute."""
        text_config = self.model.config.get_text_config()
        if any(getattr(text_config, name, None) == 0 for name in ("num_local_experts", "num_experts")):
            self.aux_loss_enabled = text_config.output_router_logits = False  # a dense model of such a family
        if self.aux_loss_enabled:  # by a hook, since only the logits of a forward are requested
            whole = self.model.get_base_model() if getattr(self.model, "peft_config", {}) else self.model
            whole.register_forward_hook(lambda module, inputs, output: self._router.append(output.aux_loss))

    @classmethod
    def _prepared(cls, args: DistillConfig, dataset: Any, teacher: Any, name: str) -> Any:
        """The rows with something to learn from or measure on, with the columns that the loss needs."""
        cls.check_dataset(args, dataset, teacher, name)
        rows = with_completions(dataset, args.max_length)
        return _with_importance(rows) if args.sequence_alpha else rows

    @staticmethod
    def check_dataset(args: DistillConfig, dataset: Any, teacher: Any = None, name: str = "train_dataset") -> None:
        """Refuse a dataset that the loss cannot learn from.

        Raises:
            TypeError: if it is not a `datasets.Dataset`.
            ValueError: if it is not from this package, or lacks soft targets of the kind that the loss needs.
        """
        if not isinstance(dataset, datasets.Dataset):
            given = type(dataset).__name__
            raise TypeError(f"{name} must be a datasets.Dataset from load_dataset (without streaming), got {given}")
        columns = dataset.column_names
        for needed in ("input_ids", "completion_start"):
            if needed not in columns:
                raise ValueError(f"{name} has no column {needed}, only {', '.join(columns)}; read it with load_dataset")
        kind = kind_of(columns)
        if args.uses_targets and teacher is None and not kind.columns:
            raise ValueError(f"alpha is {args.alpha}, but {name} has no soft targets; train on its text with alpha 0")
        if args.position_weights != "uniform" and (teacher is not None or kind in (TextOnly, Chunks)):
            raise ValueError(f"position_weights is {args.position_weights}, which needs stored soft targets")
        if args.position_weights != "uniform" and kind.of_writer:
            raise ValueError(f"position_weights is {args.position_weights}, which tokens drawn by the student cannot give")
        if teacher is None:
            if reason := kind.refuses(args.loss, args.temperature):
                raise ValueError(reason)
            if any(args.layers()):
                raise ValueError("hidden and attention need a teacher")

    def _match(self, args: DistillConfig) -> LayerMatch | None:
        if not any(args.layers()):
            return None
        match = LayerMatch(self.model, self.teachers[0], *args.layers(), args.seed)
        if match.projector and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("hidden states of different sizes need a projector, which FSDP and DeepSpeed do not support")
        return match

    def learned_rows(self, dataset: Any) -> Any:
        """The rows of a `load_dataset` to learn from, checked like `train_dataset`; for rows added during training."""
        return self._read_columns(self._prepared(self.args, dataset, self.teachers or None, "rows"))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside from the speed."""
        start = time.perf_counter()
        self._use_averaged()
        yield
        self._router.clear()
        if self._since is not None:
            self._since += time.perf_counter() - start

    def _read_columns(self, dataset: Any) -> Any:
        """The rows with only the columns that the collator reads."""
        self._set_signature_columns_if_needed()
        return dataset.select_columns([name for name in self._signature_columns if name in dataset.column_names])

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["id", "input_ids", "completion_start"]
        self._signature_columns += sorted({name for kind in KINDS.values() for name in kind.columns})
        self._signature_columns += ["target_places", "teacher", "teacher_ids", "teacher_start"]
        if self.args.sequence_alpha:
            self._signature_columns += ["importance", "token_logprobs"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in `Trainer`, but with lengths read from a column's offsets instead of row by row."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return _ByLength(size, row_lengths(rows).tolist(), self.args.seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one optimiser step, and the divisor of the loss."""
        return super().get_batch_samples(map(self._without_filler, epoch_iterator), num_batches, device)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One evaluation batch."""
        return super().prediction_step(model, self._without_filler(inputs), *args, **kwargs)

    def _without_filler(self, batch: Any) -> Any:
        """Count rows once: accelerate fills up the last batch from the first, so that all processes have as many."""
        state = self.accelerator.gradient_state
        rows = rows_in_last_batch(state.active_dataloader) if state.end_of_dataloader else 0
        if not rows:
            return batch
        return first_items(batch, max(rows - self.args.process_index * len(batch["pack_sizes"]), 0))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch, or the rest of it; nothing if training had ended before it was stopped, which Trainer does not notice."""
        if self.state.global_step == self._initial_global_step:  # also if a larger batch did not fit into memory
            self._sums["train"].clear()
            self._step.clear()
        early = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        ended = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in early)
        if ended or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log before writing a checkpoint, which does not contain the counts since the last log."""
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Add callbacks that the resumed checkpoint does not know to the next one; Trainer fails without them."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        super()._save_checkpoint(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the parts of the loss on rows of a `load_dataset`, by default those passed at first."""
        if isinstance(eval_dataset, datasets.Dataset):
            eval_dataset = self._prepared(self.args, eval_dataset, self.teachers or None, "eval_dataset")
        found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return found

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; if an optimiser averages weights (schedule-free ones do), the model ends up with the average."""
        found = super().train(*args, **kwargs)
        self._use_averaged()
        return found

    def _use_averaged(self) -> None:
        if callable(averaged := getattr(self.optimizer, "eval", None)):
            averaged()  # the next step switches back by itself

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; starts the clock of `tokens_per_s` at the first."""
        if self._since is None:
            self._since = time.perf_counter()
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The distillation loss of one micro-batch, divided by the weight of the tokens of the global batch."""
        if return_outputs:
            raise ValueError("the logits of a whole batch are never computed")
        objective, head = self.args.objective(self._progress()), self._head
        labels_N = completion_labels(inputs)
        if self._table is not None and "target_soft" in inputs:
            inputs = {**inputs, "target_table": self._table}
        if self.teachers:
            with torch.no_grad(), self._watched(self.teachers[0], "teacher") as theirs:
                inputs = {**inputs, "teacher_logits": self._teacher_logits(inputs)}
        with self._watched(model, "student") as mine:
            if head is None or not head.is_in(model):
                logits_NV = completion_logits(model, inputs)
                loss, sums = losses.distillation_loss(logits_NV, labels_N, some_tokens(inputs, slice(None)), objective)
            else:
                loss, sums = in_place_of_logits(
                    model, inputs, lambda hidden_ND: fused.distillation_loss(hidden_ND, head, labels_N, inputs, objective)
                )
        if self.match:
            more, parts = self.match.loss(mine, theirs, inputs)
            loss, sums = loss + more, {**sums, **parts}
        weight = inputs["token_weights"].sum()
        router = self._router[-1] if self._router else None
        self._router.clear()
        if router is not None:
            if self.args.gradient_checkpointing and torch.is_grad_enabled() and not router.requires_grad:
                raise RuntimeError(
                    "the router's loss has no gradient under reentrant gradient checkpointing; set "
                    "gradient_checkpointing_kwargs use_reentrant to false, or router_aux_loss_coef to 0"
                )
            loss = loss + self.router_aux_loss_coef * router * weight
            sums = {**sums, "router": router.detach() * len(labels_N)}
        self._count(inputs, {**sums, "loss": loss.detach(), "weight": weight})
        if self.model.training:
            self._step.append((loss.detach(), inputs.get("ids", [])))
        loss = loss / torch.as_tensor(weight if num_items_in_batch is None else num_items_in_batch).clamp(min=1e-12)
        if num_items_in_batch is not None:
            # DDP, FSDP and DeepSpeed average gradients over processes; the divisor counts the tokens of all of them.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _teacher_logits(self, inputs: Any) -> Any:
        """The online teacher's logits that predict each completion token; with several teachers, each in its own tokens."""
        if "teacher_positions" not in inputs:
            return self._logits_of(0, inputs)
        if "target_teacher" not in inputs:
            return self._logits_of(0, teacher_batch(inputs))
        theirs = inputs["target_teacher"]
        # For a batch of only filler, one teacher runs anyway.
        numbers = theirs.unique().tolist() or [next(n for n in range(len(self.teachers)) if f"their_{n}_input_ids" in inputs)]
        there = {number: self._logits_of(number, teacher_batch(inputs, number)) for number in numbers}
        return losses.RoutedLogits(theirs, there)

    def _logits_of(self, number: int, inputs: Any) -> torch.Tensor | fused.ChunkedLogits:
        """The logits of one online teacher, computed in chunks if its output layer allows."""
        return fused.logits_of(self.teachers[number], inputs, self._teacher_heads[number])

    def _watched(self, model: Any, side: Literal["student", "teacher"]) -> Any:
        return self.match.watch(model, side) if self.match else nullcontext()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the step's gradients, before the optimiser uses them.

        Raises:
            NonFiniteError: if the loss or the norm is not finite; the weights are still those of the last step.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        step, self._step = self._step, []
        finite = torch.stack([loss for loss, _ in step]).isfinite().all() if step else torch.tensor(True)
        if norm is not None and self.accelerator.scaler is None:  # float16 searches for the largest usable factor
            finite = finite & torch.as_tensor(norm, device=finite.device).isfinite()
        if not finite:
            raise NonFiniteError(self._not_finite(step, norm))
        return norm

    def _not_finite(self, step: list[tuple[torch.Tensor, list[str]]], norm: Any) -> str:
        bad = [(loss.item(), ids) for loss, ids in step if not loss.isfinite()]
        what = f"the loss is {bad[0][0]}" if bad else f"the norm of the gradients is {float(norm)}"
        ids = [name for _, names in bad or step for name in names]
        rows = f" on the rows {', '.join(ids[:8])}{' …' if len(ids) > 8 else ''}" if ids else ""
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
        return f"step {self.state.global_step + 1}: {what}{rows}; training stops here, {kept}"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the student and, next to a checkpoint, everything else that has learned."""
        # Every process makes the directory before the barrier after which each checks whether the best checkpoint exists.
        Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)
        if self.match and _internal_call and self.args.should_save:
            self.match.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for (
            name,
            parameter,
        ) in self.model.named_parameters():  # peft loads adapters in float32 even if they train in bfloat16
            parameter.data = parameter.data.to(dtypes[name])
        if self.match:
            self.match.load(resume_from_checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, as exact means over the tokens since the last log, and the speed."""
        # Not by the model's mode: after an evaluation at the last step, what is not logged yet comes with the summary.
        mode = "eval" if any(name.endswith("_loss") and name != "train_loss" for name in logs) else "train"
        counted = self._sums[mode]
        if counted:
            reduced = self.accelerator.reduce(torch.stack([counted[name] for name in sorted(counted)]), "sum").tolist()
            sums = dict(zip(sorted(counted), reduced, strict=True))
            counted.clear()
            tokens, inputs, squares, loss, weight = (
                sums.pop(name) for name in ("tokens", "input_tokens", "squares", "loss", "weight")
            )
            prefix = "" if mode == "train" else next((name[:-4] for name in logs if name.endswith("_loss")), "eval_")
            logs |= {f"{prefix}{name}": value / max(tokens, 1) for name, value in sums.items()}
            if mode == "eval":
                logs[f"{prefix}loss"] = loss / max(weight, 1e-12)
            else:
                logs["num_completion_tokens"] = trained_tokens(self.state.log_history) + int(tokens)
                logs |= self._speed(inputs, self._flops.of(inputs, tokens, squares)) | self._scheduled()
        if self._since is not None:
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def _progress(self) -> float:
        """The completed share of the training: 0 in the first step, 1 in the last."""
        return min(self.state.global_step / max(self.state.max_steps - 1, 1), 1.0)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """The divisor of the loss: the weight of all completion tokens of the global batch."""
        if not batch_samples:
            return None
        weight = torch.stack([batch["token_weights"].sum() for batch in batch_samples]).sum().to(device)
        if self.args.world_size > 1:
            weight = self.accelerator.gather(weight.reshape(1)).sum()
        return weight / self.get_tp_size()

    def _count(self, inputs: dict[str, torch.Tensor], sums: dict[str, torch.Tensor]) -> None:
        lengths = inputs["lengths"].to(widest(inputs["lengths"]))
        sums |= {"tokens": lengths.new_full((), len(inputs["positions"]))}
        sums |= {"input_tokens": lengths.sum(), "squares": lengths.square().sum()}
        mine = self._sums["train" if self.model.training else "eval"]
        for name, value in sums.items():
            value = value.to(widest(value))
            mine[name] = mine[name] + value if name in mine else value

    def _speed(self, tokens: float, flops: float) -> dict[str, float]:
        if self._since is None:
            return {}
        seconds = time.perf_counter() - self._since
        per_device = flops / seconds / self.accelerator.num_processes
        peak = peak_flops(self.accelerator.device)
        return {"tokens_per_s": tokens / seconds, "tflops": per_device / 1e12, **({"mfu": per_device / peak} if peak else {})}

    def _scheduled(self) -> dict[str, float]:
        """The scheduled values of the last step."""
        last = (self.state.global_step - 1) / max(self.state.max_steps - 1, 1)
        objective = self.args.objective(min(max(last, 0.0), 1.0))
        ends = {"alpha": self.args.alpha_end, "beta": self.args.beta_end}
        return {name: getattr(objective, name) for name, end in ends.items() if end is not None}


def _check_given(args: Any, teacher: Any, classes: Any, others: dict[str, Any]) -> None:
    """Refuse arguments of `DistillTrainer` that have the wrong type.

    Raises:
        TypeError: names the argument.
        ValueError: if `compute_metrics` is given, or the classes are not those of the teachers.
    """
    if not isinstance(args, DistillConfig):
        raise TypeError(f"args must be a DistillConfig, got {type(args).__name__}")
    for one in teacher.values() if isinstance(teacher, Mapping) else [teacher]:
        if one is not None and not isinstance(one, torch.nn.Module):
            raise TypeError(f"teacher must be a loaded model, got {type(one).__name__}")
    if classes is not None and teacher is not None:
        names, theirs = ([""] if not isinstance(given, Mapping) else sorted(given) for given in (classes, teacher))
        if names != theirs:
            raise ValueError(f"classes are those of {', '.join(names)}, but the teachers are {', '.join(theirs)}")
    if others.get("compute_metrics") is not None:
        raise ValueError("compute_metrics is not supported: the logits of a whole batch are never computed")
    if not isinstance(others.get("data_collator"), DistillCollator | None):
        raise TypeError(f"data_collator must be a DistillCollator, got {type(others['data_collator']).__name__}")


class _ByLength(LengthGroupedSampler):
    """An order determined by the seed and the epoch: the same on all processes, and again after a resume."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.seed + self.epoch())
        return super().__iter__()


def rows_in_last_batch(loader: Any) -> int:
    """Number of dataset rows in the last batch of all processes if it has fewer than the others, else 0.

    `GradientState.remainder` is unknown if the first batches are skipped, as when resuming within an epoch.

    Args:
        loader: the loader as prepared by accelerate.
    """
    sampler = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    while isinstance(sampler, SkipBatchSampler):
        sampler = sampler.batch_sampler
    if sampler is None or sampler.drop_last:
        return 0
    together = 1 if getattr(sampler, "split_batches", False) else getattr(sampler, "num_processes", 1)
    return int(len(loader.dataset) % (sampler.batch_size * together))


def add_up_in_float32(plugin: Any) -> None:
    """Make FSDP2 sum gradients over processes in float32, like DDP, instead of in the precision of the products.

    Args:
        plugin: accelerate's FSDP settings, before the model is sharded.
    """
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def with_completions(dataset: Any, max_length: int | None) -> Any:
    """The rows of a `load_dataset` to learn from: those with a completion token within `max_length`.

    Raises:
        ValueError: if there are none.
    """
    ends = np.minimum(row_lengths(dataset), max_length or np.iinfo(np.int64).max)
    starts = dataset.select_columns(["completion_start"]).with_format("arrow")[:]["completion_start"].to_numpy()
    kept = np.flatnonzero(ends > starts)
    if not len(kept):
        why = f"within max_length, {max_length:,} tokens" if max_length else "at all"
        raise ValueError(f"none of the {len(dataset):,} rows has a completion token {why}")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def _with_importance(dataset: Any) -> Any:
    """The rows with their importance as an additional column."""
    return dataset.add_column("importance", importance(log_importance(dataset))).with_format("numpy")


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)
