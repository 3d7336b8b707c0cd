"""The section `rounds`: on-policy distillation in rounds, on the student's own text."""

import json
from typing import Any

from pydantic import Field

from llmdistill.config.section import Divergence, Section
from llmdistill.config.train import TrainingArguments


class Rounds(Section):
    """On-policy rounds after training on the teacher's text: the student generates, the teacher scores, the student trains."""

    n: int = Field(default=1, ge=1)
    """Number of rounds; `rounds: 2` is short for `rounds: {n: 2}`."""
    every: int | None = Field(default=None, ge=1)
    """Micro-rounds: optimiser steps per round, all part of one training run with one schedule, in a single process. If not set,
    each round is a separate training run."""
    teacher_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows of a round that come from the teacher's text, instead of train.mix. With targets.kind sampled,
    they are always learned by forward KL, regardless of the loss of the rounds."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts that the student answers per round: the first N of the training split; all if not set. In micro-rounds: N drawn
    at random for each round; if not set, as many as its steps train on."""
    loss: Divergence | None = None
    """Divergence in the rounds; `train.loss` if not set. For any other than forward_kl, the tokens of targets.kind sampled are
    drawn by the student."""
    args: TrainingArguments = {}
    """Arguments of `trl.SFTConfig` that override `train.args` in the rounds. In micro-rounds, save_steps and save_total_limit
    are read only from here."""

    @property
    def last(self) -> str:
        """Location of the last student in the directory `rounds`; micro-rounds have only one."""
        return "" if self.every else f"{self.n}/"


def as_section(value: Any) -> Any:
    """Expand a number of rounds to a section; 0 means none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"n": value} if value else None
    return value


_WRITTEN_LATER = "the rows are generated during training"
_ONE_PROCESS = "the engines and the trainer share one process"
# Values that arguments of `trl.SFTConfig` may have in micro-rounds, and why; the first is the one to set.
_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "packing": ((False,), _WRITTEN_LATER),
    "auto_find_batch_size": ((False,), "the number of rows of a round is fixed before it starts"),
    "train_sampling_strategy": (("random", "sequential"), _WRITTEN_LATER),
    "dataloader_persistent_workers": ((False,), _WRITTEN_LATER),
    "fsdp": ((None, False, "", []), _ONE_PROCESS),
    "deepspeed": ((None,), _ONE_PROCESS),
}


def against_micro_rounds(experiment: Any) -> str | None:
    """Why an `Experiment` with `rounds.every` cannot be run; None if it can."""
    rounds, teacher, train, curate = experiment.rounds, experiment.teacher, experiment.train, experiment.curate
    by_vllm = teacher.students_engine == "vllm"
    reasons = {
        "store": (experiment.store, "the rows of micro-rounds are not uploaded"),
        f"teacher.engine {teacher.engine}": (teacher.abilities.api, "an API would be billed for every round"),
        f"teacher.ensemble with engine {teacher.engine}": (teacher.in_turn, "its members would be loaded in every round"),
        "teacher.tensor_parallel_size above 1": (teacher.tensor_parallel_size > 1, "everything runs on one GPU"),
        "student.lora with engine vllm": (
            experiment.student.lora and by_vllm,
            "adapters cannot be passed to vLLM; set teacher.engine to transformers",
        ),
        "train.fake_quantize with engine vllm": (
            train.fake_quantize and by_vllm,
            "vLLM would generate with unrounded weights; set teacher.engine to transformers",
        ),
        "train.validation": (train.validation, f"{_WRITTEN_LATER}; set it to 0"),
        "a judge in curate": (
            any(step.judge or (step.best_of and step.best_of.judge) for step in curate),
            "it would be loaded in every round; remove it",
        ),
    }
    for key, (is_set, reason) in reasons.items():
        if is_set:
            return f"rounds.every does not support {key}: {reason}"
    for name in ("max_steps", "num_train_epochs"):
        if name in rounds.args:
            return f"rounds.args.{name} has no effect in micro-rounds, which train for rounds.n times rounds.every steps"
    for name, (allowed, reason) in _ARGUMENTS.items():
        value = (train.args | rounds.args).get(name, allowed[0])
        if value not in allowed:
            return f"rounds.every does not support {name} {value}: {reason}; set rounds.args.{name} to {json.dumps(allowed[0])}"
    return None
