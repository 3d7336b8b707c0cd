"""The section `rounds`: on-policy distillation in rounds, on the student's own text."""

import json
from typing import Any

from pydantic import Field

from llmdistill.config.section import Divergence, Section
from llmdistill.config.train import TrainingArguments


class Rounds(Section):
    """On-policy rounds after training on the teacher's text: the student writes, the teacher scores, the student trains on it."""

    n: int = Field(default=1, ge=1)
    """Number of rounds; `rounds: 2` is short for `rounds: {n: 2}`."""
    every: int | None = Field(default=None, ge=1)
    """Micro-rounds: optimiser steps per round, of one training with one schedule, in a single process. If not set, every round is
    a training of its own."""
    teacher_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows of a round that come from the teacher's text, in place of train.mix. With targets.kind sampled
    they are learnt by forward KL, whatever the loss of the rounds."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts that the student answers per round: the first N of the training split; all if not set. In micro-rounds: N drawn at
    random for each round; as many as its steps train on if not set."""
    loss: Divergence | None = None
    """Divergence in the rounds; `train.loss` if not set. For another one than forward_kl, targets.kind sampled is a sample that
    the student draws."""
    args: TrainingArguments = {}
    """Arguments of `trl.SFTConfig` that override `train.args` in the rounds. save_steps and save_total_limit of micro-rounds are
    only read here."""

    @property
    def last(self) -> str:
        """Where in the directory `rounds` the last student is: of micro-rounds there is one."""
        return "" if self.every else f"{self.n}/"


def as_section(value: Any) -> Any:
    """A number of rounds is short for a section; 0 is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"n": value} if value else None
    return value


_WRITTEN_LATER = "the rows are written while it trains"
_ONE_PROCESS = "the engines and the trainer share one process"
# Arguments of `trl.SFTConfig` by what they may be in micro-rounds, and why; the first is what to set.
_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "packing": ((False,), _WRITTEN_LATER),
    "auto_find_batch_size": ((False,), "how many rows a round takes is decided before it"),
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
        "teacher.tensor_parallel_size above 1": (teacher.tensor_parallel_size > 1, "everything is on one GPU"),
        "student.lora with engine vllm": (
            experiment.student.lora and by_vllm,
            "adapters are not handed over to it; set teacher.engine to transformers",
        ),
        "train.fake_quantize with engine vllm": (
            train.fake_quantize and by_vllm,
            "it would write with weights that are not rounded; set teacher.engine to transformers",
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
            return f"rounds.args.{name} is not read in micro-rounds: they train for rounds.n times rounds.every steps"
    for name, (allowed, reason) in _ARGUMENTS.items():
        value = (train.args | rounds.args).get(name, allowed[0])
        if value not in allowed:
            return f"rounds.every does not support {name} {value}: {reason}; set rounds.args.{name} to {json.dumps(allowed[0])}"
    return None
