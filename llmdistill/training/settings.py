"""The training arguments of an experiment: what it configures, the defaults of the stage, and what is refused."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.machine import Precision, training_precision
from llmdistill.config.shipped import page
from llmdistill.data.manifest import MANIFEST
from llmdistill.data.targets import SoftTargets
from llmdistill.errors import InputError, no_such_key
from llmdistill.runs.progress import say
from llmdistill.students.origins import is_sharded
from llmdistill.students.sides import is_needed

# Set by keys of their own; given under train.args they would contradict them.
_LOSS = ["loss", "alpha", "alpha_end", "temperature", "beta", "beta_end", "sequence_alpha", "position_weights", "reduction"]
_LOSS += ["hidden", "attention"]
# Arguments of TRL and transformers that the stage sets itself, or that would break what it promises.
_REFUSED = {"output_dir": "is set by the key output"} | {name: f"is set by the key train.{name}" for name in _LOSS}
_REFUSED |= {
    "model_init_kwargs": "is ignored: the section student determines how the student is loaded",
    "trust_remote_code": "is set by the key student.trust_remote_code",
    "resume_from_checkpoint": "is not needed: training continues from its last checkpoint",
    "enable_jit_checkpoint": "is not needed: a checkpoint is saved when training is terminated",
    "save_only_model": "would make it impossible to continue: a checkpoint needs the optimiser and the schedule",
    "ignore_data_skip": "would train on the same rows again after a stop",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "is ignored: the stages determine what is done"),
}
# The second student's: cross-entropy on the text, and nothing of the soft targets.
_TEXT_ONLY: dict[str, Any] = {"alpha": 0.0, "alpha_end": None, "beta": None, "beta_end": None, "sequence_alpha": 0.0}
_TEXT_ONLY |= {"loss": "forward_kl", "temperature": 1.0, "position_weights": "uniform", "hidden": None, "attention": None}
# Whether this machine can do these is not the question where a run is only planned.
_OF_THE_MACHINE = ("bf16", "fp16", "tf32", "use_cpu", "fsdp", "fsdp_config", "deepspeed", "accelerator_config")


def check_training(experiment: Experiment, key: str = "train.args") -> None:
    """Check what the training of a student would refuse, before a teacher has worked for it.

    Args:
        experiment: the configuration.
        key: what the arguments stand under.

    Raises:
        InputError: names the key.
    """
    from llmdistill.students.adapters import lora_config

    train, stored, online = experiment.train, experiment.targets.stored, experiment.targets.online
    general = {name: value for name, value in train.args.items() if name not in _OF_THE_MACHINE}
    directory = experiment.directory("student")
    precision = training_precision(use_cpu=True)
    arguments_of(experiment.with_(train=train.with_(args=general)), directory, False, precision, {"use_cpu": True}, key)
    if experiment.student.lora:
        lora_config(experiment.student.lora)
    if train.dataset is not None or not (experiment.prompts or experiment.score) or is_needed(experiment):
        return  # what is trained on has been made already, or is made by `retokenize`
    if not stored.columns and not online and (train.uses_targets or train.compare_text_only):
        raise InputError(
            f"train.alpha is {train.alpha:g}, but targets.kind is {experiment.targets.kind}; set train.alpha to 0 and "
            "train.compare_text_only to false, or another kind"
        )
    if train.position_weights != "uniform" and (online or not stored.columns or stored.of_text):
        raise InputError(f"train.position_weights is {train.position_weights}, which needs stored soft targets")
    if train.sequence_alpha and experiment.score and not (Path(experiment.score.source) / MANIFEST).is_file():
        raise InputError(
            f"train.sequence_alpha is {train.sequence_alpha:g}, which needs text that a model has sampled with known "
            f"probabilities; {experiment.score.source} (score.source) does not contain them"
        )
    if train.sequence_alpha and not experiment.score and not experiment.generate.shows_everything:
        raise InputError(
            f"train.sequence_alpha is {train.sequence_alpha:g}, which needs sampling that can give any text: "
            "generate.temperature above 0, and neither generate.top_p, top_k, min_tokens, json_schema nor thinking"
        )


def check_arguments(args: Iterable[str], key: str) -> None:
    """Check the names of arguments of `trl.SFTConfig`; `key` is the key that contains them.

    Raises:
        InputError: there is no such argument, or it cannot be chosen here.
    """
    from llmdistill.training.arguments import DistillConfig

    names = [field.name for field in dataclasses.fields(DistillConfig)]
    for name in args:
        if name == "push_to_hub" or name.startswith("hub_"):
            raise InputError(f"{key}.{name} would upload the checkpoints; upload the trained student with `llmdistill push`")
        if name in _REFUSED:
            raise InputError(f"{key}.{name} {_REFUSED[name]}")
        if name not in names:
            raise no_such_key(key, name, names, "trl.SFTConfig has no such argument")


def arguments_of(
    experiment: Experiment,
    directory: Path,
    text_only: bool,
    precision: Precision,
    more: dict[str, Any] | None = None,
    key: str = "train.args",
    stored: type[SoftTargets] | None = None,
) -> Any:
    """The `DistillConfig`, with errors that name the key.

    Args:
        experiment: the configuration.
        directory: of the student.
        text_only: whether it learns the text alone.
        precision: what it is trained in.
        more: arguments that nobody has configured.
        key: what the arguments stand under.
        stored: the kind of the dataset's targets; that of the configuration if it is not known yet.

    Raises:
        InputError: an argument that TRL does not have, or does not take.
    """
    import torch

    from llmdistill.training.arguments import DistillConfig

    check_arguments(experiment.train.args, key)
    defaults = {
        "seed": experiment.seed,
        "bf16": precision.dtype == "bfloat16",
        "fp16": precision.dtype == "float16",
        "learning_rate": experiment.student.default_learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1 it is a share of all steps
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        **_evaluation(experiment, stored or experiment.targets.stored),
    }
    ours = {"output_dir": str(directory / "checkpoints")} | experiment.train.model_dump(include=set(_LOSS))
    try:
        arguments = DistillConfig(
            **{**defaults, **experiment.train.args, **ours, **(_TEXT_ONLY if text_only else {}), **(more or {})}
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}: {error}") from None
    _check_optimizer(arguments, key)
    _check_checkpointing(arguments, experiment)
    if experiment.student.quantize and is_sharded(arguments):
        raise InputError("student.quantize: quantised weights cannot be sharded; use one device or DDP, or remove it")
    if arguments.n_gpu > 1:  # the trainer would cut a batch apart from its targets (DataParallel)
        say("train", f"uses one of {arguments.n_gpu} GPUs; see {page('distributed')} to start a process on each")
        arguments._n_gpu = 1
    return arguments


def _evaluation(experiment: Experiment, stored: type[SoftTargets]) -> dict[str, Any]:
    """Defaults of the arguments for measuring the student during training."""
    train = experiment.train
    if not train.validation:
        for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end"):
            if train.args.get(name, False) not in (False, "no"):
                raise InputError(f"train.args.{name} needs train.validation, the share of the training prompts to validate on")
        return {}
    if train.args.get("eval_strategy") == "no":
        raise InputError("train.args.eval_strategy is no, so the rows of train.validation would be held out without being used")
    saved = "epoch" if train.args.get("save_strategy") == "epoch" else "steps"
    found: dict[str, Any] = {"eval_strategy": saved}
    found |= {"eval_steps": train.args.get("save_steps", 500)} if saved == "steps" else {}
    if train.early_stopping:
        # If the sample does not determine the forward KL, the trained divergence is monitored instead.
        told = not stored.refuses("forward_kl", train.temperature)
        metric = ("kl" if told else train.loss) if train.uses_targets else "ce"
        found |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": False}
        found |= {"restore_callback_states_from_checkpoint": True}  # how long there was no improvement
        if not train.args.get("restore_callback_states_from_checkpoint", True):
            raise InputError("train.args.restore_callback_states_from_checkpoint is false: train.early_stopping would restart")
    return found


def _check_optimizer(arguments: Any, key: str) -> None:
    """Refuse arguments that the optimiser and the schedule do not accept.

    Raises:
        InputError: names the key above them.
    """
    import torch
    from transformers import Trainer, get_scheduler

    if any(name in arguments.optim for name in ("apollo", "galore", "lomo")):  # they need the model
        return
    try:
        made, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = made([torch.zeros(1, requires_grad=True)], **settings)
        more = arguments.lr_scheduler_kwargs or {}
        get_scheduler(
            arguments.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=more
        )
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        raise InputError(f"{key}: the optimiser or its schedule rejects this: {error}") from None


def _check_checkpointing(arguments: Any, experiment: Experiment) -> None:
    """Refuse accelerate's own FSDP checkpointing where it does not work."""
    key = "fsdp_activation_checkpointing"
    if arguments.fsdp:
        asked = arguments.fsdp_plugin_args.get("activation_checkpointing")
    else:
        asked = os.environ.get("ACCELERATE_USE_FSDP") == os.environ.get(key.upper()) == "true"
    if asked and experiment.student.lora:
        raise InputError(
            f"student.lora with {key}: its checkpoints lack the adapter; use train.args.gradient_checkpointing instead"
        )
    if asked and arguments.gradient_checkpointing:
        raise InputError(f"train.args.gradient_checkpointing is true (which it is unless set) and so is {key}; use one of them")
