"""`llmdistill train`: train the student on the dataset; the result is a directory that any engine loads."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.machine import Precision, training_precision
from llmdistill.config.shipped import page
from llmdistill.config.teacher import Teacher
from llmdistill.config.train import Examples
from llmdistill.data.cards import model_card, write_card
from llmdistill.data.dataset import (
    MANIFEST,
    ROW_GROUP,
    conversation_keys,
    has_several_tokenizers,
    is_held_out,
    load_dataset,
    read_batches,
    read_manifest,
    shard_files,
)
from llmdistill.data.targets import KINDS, Sampled, SampledByStudent, SoftTargets
from llmdistill.errors import InputError, no_such_key
from llmdistill.evaluation.routes import teachers_of_rows
from llmdistill.models.loading import (
    check_model_exists,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    vocabulary_hash,
    whole_on_every_process,
)
from llmdistill.models.root_classes import RootClasses, load_classes
from llmdistill.objectstore.copies import upload_checkpoints
from llmdistill.runs import record
from llmdistill.runs.progress import counted, say, working
from llmdistill.students.origins import (
    begin_student,
    is_sharded,
    load_student,
    make_student,
    origin,
    pair_layers,
    save_student,
)
from llmdistill.students.quantization import fake_quantise, unfake
from llmdistill.students.sides import is_needed, teacher_tokenizer, tokenizer_of, training_dataset
from llmdistill.training.callbacks import last_checkpoint, same_rows_a_step, show_progress, stop_with_a_checkpoint
from llmdistill.training.examples import example_rows, read_examples
from llmdistill.training.traps import traps

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
_MAY_NAME_A_FILE = ("deepspeed", "fsdp_config", "accelerator_config")  # arguments of trl.SFTConfig
# The second student's: cross-entropy on the text, and nothing of the soft targets.
_TEXT_ONLY: dict[str, Any] = {"alpha": 0.0, "alpha_end": None, "beta": None, "beta_end": None, "sequence_alpha": 0.0}
_TEXT_ONLY |= {"loss": "forward_kl", "temperature": 1.0, "position_weights": "uniform", "hidden": None, "attention": None}


def train(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/student`, and the students for comparison, continuing from the last checkpoint.

    Raises:
        InputError: the dataset, the student or the output directory are not usable; nothing was written.
    """
    _models_and_files(experiment)
    if examples := experiment.train.compare_examples:
        read_examples(examples)
    dataset = training_dataset(experiment)
    mixed = [read_manifest(directory, "train.mix.datasets") for directory in experiment.mixed_datasets]
    if dry_run:
        with suppress(ImportError):  # without TRL its arguments are not known, and a dry run needs none
            check_training(experiment)
    if dry_run and experiment.train.dataset is None and not (dataset / MANIFEST).is_file():
        _say_plan(experiment, None)
        return
    if dataset != experiment.dataset_directory and not dataset.is_dir():
        if has_several_tokenizers(read_manifest(experiment.dataset_directory)):
            raise InputError(
                f"teachers: the rows of {experiment.dataset_directory} are in the tokens of each; run `retokenize` first"
            )
        whole = read_manifest(experiment.dataset_directory)
        raise InputError(f"{_other_vocabulary(experiment, experiment.dataset_directory, whole)}; run `retokenize` first")
    manifest = read_manifest(dataset)
    _check_loss(experiment, manifest)
    check_mix(experiment, manifest, mixed)
    states = [(claim, record.claim(*claim)) for claim in claims(experiment)]
    if dry_run:
        _say_plan(experiment, manifest)
        return
    for claim, state in states:
        if state == "done":
            say("train", f"{claim.directory} is finished")
        else:
            train_one(experiment, manifest, claim)


def claims(experiment: Experiment) -> list[record.Claim]:
    """The student and, if requested, those of the text only and of a task's examples only, and what they depend on."""
    directories = {experiment.directory("student"): False}
    if experiment.train.compare_text_only:
        directories[experiment.directory("student-text-only")] = True
    settings = _settings(experiment)
    manifests = [directory / MANIFEST for directory in (training_dataset(experiment), *experiment.mixed_datasets)]
    inputs = {str(file): record.sha256(file) for file in manifests} | _models_and_files(experiment)
    found = [
        record.Claim(directory, "train", {**settings, "text_only": text_only}, inputs)
        for directory, text_only in directories.items()
    ]
    if examples := experiment.train.compare_examples:
        _, _, read = read_examples(examples)
        shown = {"template_args": template_args} if (template_args := experiment.teacher.template_args) else {}
        told = {**settings, "text_only": True, "examples_only": True, **shown}
        found.append(record.Claim(experiment.directory("student-examples"), "train", told, inputs | read))
    return found


def _settings(experiment: Experiment) -> dict[str, Any]:
    """The sections of the configuration that the student depends on."""
    settings = experiment.model_dump(mode="json", include={"seed", "student", "train"})
    online = experiment.targets.online
    if online:
        settings["targets"] = {"kind": experiment.targets.kind}
    if experiment.student.model is None or online:
        settings["teacher"] = _weights(experiment.teacher, online)
    if online and experiment.teachers:
        settings["teachers"] = {name: _weights(one, online) for name, one in experiment.teachers.items()}
    if experiment.train.fake_quantize and experiment.export and experiment.export.group_size:
        settings["export"] = {"group_size": experiment.export.group_size}
    return settings


def _weights(teacher: Teacher, computes: bool) -> dict[str, Any]:
    """The weights and the precision of a teacher, if it is online."""
    more = {"dtype"} if computes and teacher.dtype != "auto" else set()
    return teacher.model_dump(mode="json", include={"model", "revision"} | more)


def _models_and_files(experiment: Experiment) -> dict[str, str]:
    """Path or name and hash of the inputs besides the datasets.

    Raises:
        InputError: one is missing.
    """
    model, revision, _ = origin(experiment)
    found = {model: record.model_fingerprint(model, revision)}
    for name, teacher in experiment.routed.items() if experiment.targets.online else ():
        check_model_exists(teacher.model, f"teachers.{name}.model" if name else "teacher.model")
        found[teacher.model] = record.model_fingerprint(teacher.model, teacher.revision)
    for name in _MAY_NAME_A_FILE:
        value = experiment.train.args.get(name)
        if isinstance(value, str) and value.endswith((".json", ".jinja", ".j2")):
            found |= record.file_input(value, f"train.args.{name}")
    return found


@dataclasses.dataclass(frozen=True)
class _Materials:
    """The inputs of the trainer.

    Attributes:
        precision: what the student is trained in.
        arguments: a `DistillConfig`.
        student: before training, or as it was left.
        teacher: where the targets are computed during training, else None; of several, each by its name.
        tokenizer: the student's.
        classes: of rows from `retokenize`, by the teachers' names, else None.
        rows: of the training split, as they are stored.
        dataset: what is trained on.
        validation: what is set aside of it, if anything is.
    """

    precision: Precision
    arguments: Any
    student: Any
    teacher: Any
    tokenizer: Any
    classes: dict[str, RootClasses] | None
    rows: Any
    dataset: Any
    validation: Any


def _materials(experiment: Experiment, manifest: dict[str, Any], claim: record.Claim, precision: Precision) -> _Materials:
    """Load everything, and check consistency."""
    text_only, examples = claim.settings.get("text_only", False), _examples_of(experiment, claim)
    more = {"max_steps": _steps_of_the_student(experiment)} if examples else {}
    stored = None if experiment.targets.online else KINDS[manifest["targets"]["kind"]]
    arguments = arguments_of(experiment, claim.directory, text_only, precision, more, stored=stored)
    tokenizer = _tokenizer(experiment, manifest)
    directory_read = training_dataset(experiment)
    rows = mixed_rows(experiment, load_dataset(directory_read, "train"))
    if experiment.targets.online and experiment.teachers and "teacher" not in rows.column_names:
        names = teachers_of_rows(experiment, rows.with_format(None)["metadata"])
        rows = rows.add_column("teacher", names).with_format("numpy")
    classes = load_classes(directory_read) if "alignment" in manifest else None
    dataset, validation = _split(experiment, rows)
    if examples:
        ends = manifest["tokenizer"]["end_token_ids"]
        dataset = example_rows(examples, tokenizer, ends, experiment.teacher.template_args)
    dataset, validation = learnable(dataset, arguments), validation and learnable(validation, arguments)
    student = load_student(experiment)
    if experiment.train.fake_quantize:
        fake_quantise(student, experiment.export.group_size if experiment.export else None)
    teacher = None if text_only else _online_teacher(experiment, arguments)
    if any(arguments.layers()):
        pair_layers(experiment, arguments, student, teacher)
    _check_fit(arguments, dataset, student, teacher)
    return _Materials(precision, arguments, student, teacher, tokenizer, classes, rows, dataset, validation)


def _examples_of(experiment: Experiment, claim: record.Claim) -> Examples | None:
    """The training data of a student that does not learn from the dataset."""
    return experiment.train.compare_examples if claim.settings.get("examples_only") else None


def _steps_of_the_student(experiment: Experiment) -> int:
    """Number of steps of the student, which the students for comparison repeat."""
    state = record.read_json(experiment.directory("student") / "trainer_state.json")
    assert state is not None
    return int(state["global_step"])


def train_one(
    experiment: Experiment, manifest: dict[str, Any], claim: record.Claim, prepare: Callable[[Any], None] | None = None
) -> None:
    """Train one student, from its last checkpoint if there is one, and save it.

    Args:
        experiment: the configuration.
        manifest: of the dataset.
        claim: of the directory that the student is saved in.
        prepare: called with the trainer before it trains.
    """
    directory, text_only = claim.directory, claim.settings.get("text_only", False)
    examples = _examples_of(experiment, claim)
    with working(claim.stage, "loading the student"):
        from accelerate.utils import broadcast_object_list

        precision = settled(experiment, claim)
        made = _materials(experiment, manifest, claim, precision)
    if made.arguments.process_index == 0:
        record.begin_computing(*claim, experiment.seed, precision)
        begin_student(made.student, directory)
        parameters = made.student.num_parameters()
        for text in [] if text_only else traps(experiment.student, made.arguments, manifest, made.rows, parameters):
            say("warning", text)
    trainer = _trainer(experiment, made)
    show_progress(trainer, "examples only" if examples else "text only" if text_only else claim.stage)
    # What one process finds counts for all: another may still see a shared disk as it was.
    (checkpoint,) = broadcast_object_list([last_checkpoint(directory / "checkpoints")])
    same_rows_a_step(trainer, checkpoint)
    upload_checkpoints(experiment, trainer, directory)
    stop = stop_with_a_checkpoint(trainer)
    if prepare:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    if stop.asked:
        if trainer.is_world_process_zero():
            print(f"terminated; run the same command to continue from step {trainer.state.global_step:,}", file=sys.stderr)
        sys.exit(143)
    _save(experiment, manifest, directory, trainer, made, examples.file if examples else None)
    trainer.accelerator.wait_for_everyone()


def _trainer(experiment: Experiment, made: _Materials) -> Any:
    """Create the trainer.

    Raises:
        InputError: it rejects an argument.
    """
    try:
        trainer = _made_trainer(experiment, made)
        batches = len(trainer.get_train_dataloader())
        if not batches:
            raise ValueError(
                f"dataloader_drop_last: {counted(len(made.dataset), 'row')} are fewer than the "
                f"{made.arguments.per_device_train_batch_size:,} of a batch, so nothing would be trained on"
            )
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"train.args: {error}") from None
    return trainer


def _made_trainer(experiment: Experiment, made: _Materials) -> Any:
    from transformers import EarlyStoppingCallback

    from llmdistill.training.trainer import DistillTrainer

    trainer = DistillTrainer(
        model=made.student,
        args=made.arguments,
        train_dataset=made.dataset,
        eval_dataset=made.validation,
        teacher=made.teacher,
        classes=made.classes,
        processing_class=made.tokenizer,
    )
    if early := experiment.train.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(early.patience, early.min_delta))
    return trainer


def _save(
    experiment: Experiment, manifest: dict[str, Any], directory: Path, trainer: Any, made: _Materials, examples: str | None
) -> None:
    """Write the trained student, its card and its record, in one process."""
    trained = _trained(experiment, trainer)
    if trained is None:
        return
    unfake(trained)
    save_student(trained, made.tokenizer, experiment, directory, manifest["tokenizer"]["end_token_ids"])
    trainer.state.save_to_json(str(directory / "trainer_state.json"))
    results = {"steps": trainer.state.global_step, **_kept_losses(trainer)}
    write_card(
        directory / "README.md",
        lambda: model_card(experiment, manifest, directory.name, made.arguments, results, examples, _counts(made)),
    )
    record.finish(directory, results)


def _counts(made: _Materials) -> tuple[int, int]:
    """Rows and completion tokens of the training data."""
    from llmdistill.training.packing import row_lengths

    limit = made.arguments.max_length or sys.maxsize
    starts = made.dataset.select_columns(["completion_start"]).with_format("arrow")[:]["completion_start"].to_numpy()
    return len(made.dataset), int((row_lengths(made.dataset).clip(max=limit) - starts).clip(0).sum())


def _check_loss(experiment: Experiment, manifest: dict[str, Any]) -> None:
    if experiment.targets.online:
        return _check_teachers(experiment, manifest)
    kind = KINDS[manifest["targets"]["kind"]]
    dataset = training_dataset(experiment)
    if not kind.columns and (experiment.train.uses_targets or experiment.train.compare_text_only):
        raise InputError(
            f"train.alpha is {experiment.train.alpha}, but {dataset} has no soft targets "
            "(targets.kind: none); set train.alpha to 0 and train.compare_text_only to false, or targets.kind to online"
        )
    if reason := experiment.train.against(kind):
        raise InputError(f"{reason}, and {dataset} has {kind.name} ones; use targets.kind topk")


def _check_teachers(experiment: Experiment, manifest: dict[str, Any]) -> None:
    """Refuse an online teacher that would read the rows' ids in a different vocabulary.

    Raises:
        InputError: names it.
    """
    for name, teacher in experiment.routed.items():
        tokenizer, key = teacher_tokenizer(experiment, name)
        if vocabulary_hash(tokenizer) != tokenizer_of(manifest, name)["vocabulary_hash"]:
            raise InputError(f"{key}: the vocabulary of {teacher.model} differs from that of {training_dataset(experiment)}")


def check_mix(experiment: Experiment, manifest: dict[str, Any], mixed: list[dict[str, Any]]) -> None:
    """Refuse to mix datasets with different vocabularies or kinds of targets."""
    for directory, other in zip(experiment.mixed_datasets, mixed, strict=True):
        if has_several_tokenizers(other):
            raise InputError(
                f"train.mix.datasets: the rows of {directory} are in the tokens of several teachers; mix in what `retokenize` "
                "makes of them"
            )
        for what, mine, theirs in (
            ("targets", _kind_of(manifest["targets"]), _kind_of(other["targets"])),
            ("vocabulary", manifest["tokenizer"]["vocabulary_hash"], other["tokenizer"]["vocabulary_hash"]),
            ("classes", *(one.get("alignment", {}).get("classes_hash") for one in (manifest, other))),
        ):
            if mine != theirs and not (what == "targets" and _are_the_teachers(mine, theirs)):
                raise InputError(f"train.mix.datasets: {directory} has different {what} than {training_dataset(experiment)}")


def _kind_of(described: dict[str, Any]) -> tuple[str, Any]:
    """The kind and size of the targets; other entries are not known for every source."""
    return described["kind"], described.get(KINDS[described["kind"]].size or "")


def _are_the_teachers(mine: tuple[str, Any], theirs: tuple[str, Any]) -> bool:
    """Whether targets are the teacher's sample of its own text, learned next to the student's sample of its own text."""
    return (mine[0], theirs[0]) == (SampledByStudent.name, Sampled.name) and mine[1] == theirs[1]


def _with_columns(rows: Any, others: Any) -> Any:
    """Add columns of soft targets that only other rows have, as empty lists."""
    import datasets
    import pyarrow as pa

    for name in sorted(set(others.column_names) - set(rows.column_names)):
        if name.startswith("target_"):
            empty = pa.nulls(len(rows), others.data.schema.field(name).type).fill_null([])
            rows = datasets.concatenate_datasets([rows, datasets.Dataset(pa.table({name: empty}))], axis=1)
    return rows.with_format("numpy")


def _held_out_prompts(directory: Path) -> set[str]:
    """The subjects of a dataset's held-out rows."""
    tables = read_batches(shard_files(directory, "test"), ["prompt", "completion", "metadata"])
    return {key for table in tables for key in conversation_keys(table)}


def _without(rows: Any, directory: Path, held_out: dict[Path, set[str]]) -> Any:
    """The rows of a dataset whose subject is not held out elsewhere; reports how many are left out."""
    prompts = {prompt for other, found in held_out.items() if other != directory for prompt in found}
    if not prompts:
        return rows
    keys: list[str] = []
    for table in rows.select_columns(["prompt", "completion", "metadata"]).with_format("arrow").iter(batch_size=ROW_GROUP):
        keys += conversation_keys(table)
    kept = [number for number, key in enumerate(keys) if key not in prompts]
    if len(kept) < len(keys):
        say("train", f"leaves out {counted(len(keys) - len(kept), 'row')} whose prompts another dataset holds out")
    return rows.select(kept) if len(kept) < len(keys) else rows


def mixed_rows(experiment: Experiment, rows: Any) -> Any:
    """The rows mixed with those of other datasets, up to their share, drawn without repeats."""
    mix = experiment.train.mix
    if mix is None:
        return rows
    import datasets
    import numpy as np

    # What one of the datasets holds out is no row of the others; none has what it holds out itself.
    held_out = {
        directory: _held_out_prompts(directory) for directory in (training_dataset(experiment), *experiment.mixed_datasets)
    }
    rows = _without(rows, training_dataset(experiment), held_out)
    parts = [_without(load_dataset(directory, "train"), directory, held_out) for directory in experiment.mixed_datasets]
    others = datasets.concatenate_datasets(parts)
    rows, others = _with_columns(rows, others), _with_columns(others, rows)
    wanted = min(round(len(rows) * mix.share / (1 - mix.share)), len(others))
    drawn = np.sort(np.random.default_rng(experiment.seed).permutation(len(others))[:wanted])
    say("train", f"{counted(len(rows), 'row')}, and {wanted:,} of the {len(others):,} of other datasets")
    columns = [name for name in rows.column_names if name in others.column_names]
    return datasets.concatenate_datasets([rows.select_columns(columns), others.select_columns(columns).select(drawn)])


def _split(experiment: Experiment, dataset: Any) -> tuple[Any, Any]:
    """The rows for training and for validation, None if there are none; all rows of a prompt are on the same side.

    Raises:
        InputError: one side is empty.
    """
    share = experiment.train.validation
    if not share:
        return dataset, None
    sides = []
    for table in dataset.select_columns(["prompt", "completion", "metadata"]).with_format("arrow").iter(batch_size=ROW_GROUP):
        sides += [is_held_out(key, f"{experiment.seed} validation", share) for key in conversation_keys(table)]
    rows = [[row for row, side in enumerate(sides) if side == wanted] for wanted in (False, True)]
    if not all(rows):
        raise InputError(
            f"train.validation is {share:g}: of {len(sides):,} rows, {len(rows[1]):,} would be used for validation and "
            f"{len(rows[0]):,} for training; both need at least one"
        )
    return dataset.select(rows[0]), dataset.select(rows[1])


def learnable(dataset: Any, arguments: Any) -> Any:
    """The rows with completion tokens to learn; reports the number of the others.

    Raises:
        InputError: there are none.
    """
    from llmdistill.training.trainer import with_completions

    try:
        kept = with_completions(dataset, arguments.max_length)
    except ValueError as error:
        raise InputError(f"train.args.max_length: {error}") from None
    if left := len(dataset) - len(kept):
        within = f" within train.args.max_length, {arguments.max_length:,} tokens" if arguments.max_length else ""
        say("train", f"leaves out {left:,} of {len(dataset):,} rows, which have no completion tokens{within}")
    return kept


def _check_fit(arguments: Any, dataset: Any, student: Any, teacher: Any) -> None:
    """Check what the trainer would refuse, before anything is written.

    Raises:
        InputError: the loss does not fit the dataset, or the student cannot be trained on packed rows.
    """
    import torch

    from llmdistill.data.importance import effective_sample_size, importance, log_importance
    from llmdistill.training.packing import check_apart, row_lengths
    from llmdistill.training.trainer import DistillTrainer

    try:
        DistillTrainer.check_dataset(arguments, dataset, teacher)
        if arguments.packing or arguments.padding_free:
            half = torch.bfloat16 if arguments.bf16 else torch.float16
            with torch.autocast(student.device.type, half, enabled=arguments.bf16 or arguments.fp16):
                check_apart(student)
        longest = min(int(row_lengths(dataset).max(initial=0)), arguments.max_length or sys.maxsize)
        positions = context_length(student.config)
        if positions and longest > positions:
            raise ValueError(
                f"rows have up to {longest:,} tokens, but the student supports only {positions:,}; "
                f"set train.args.max_length to {positions} or less, or choose another student"
            )
        if arguments.sequence_alpha:
            rows = effective_sample_size(importance(log_importance(dataset)))
            say(
                "train",
                f"effective sample size of the sequence-level KL: {rows:,.0f} of {len(dataset):,} rows",
            )
    except ValueError as error:
        raise InputError(f"train: {error}") from None


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


def settled(experiment: Experiment, claim: record.Claim) -> Precision:
    """The precision of matrix products: as the training was started, as configured, or the preferred one of this machine."""
    asked = experiment.train.args
    found = training_precision(asked.get("use_cpu", False), asked.get("bf16"), asked.get("fp16", False))
    return record.settled_precision(claim.directory, claim.settings, claim.inputs, found)


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


def _tokenizer(experiment: Experiment, manifest: dict[str, Any]) -> Any:
    """The tokenizer to save with the student, which learns the dataset's ids unchanged.

    Its chat template and end token are the dataset's, also where the student was a base model that knew another end token.

    Raises:
        InputError: if the student has a different vocabulary.
    """
    model, revision, trust = origin(experiment)
    tokenizer = load_tokenizer(model, revision, trust, "student.model")
    if vocabulary_hash(tokenizer) != manifest["tokenizer"]["vocabulary_hash"]:
        raise InputError(_other_vocabulary(experiment, training_dataset(experiment), manifest))
    tokenizer.chat_template = manifest["tokenizer"]["chat_template"]
    return tokenizer


def _other_vocabulary(experiment: Experiment, dataset: Path, manifest: dict[str, Any]) -> str:
    """The message for different vocabularies of the student and a dataset, with both sizes."""
    model, revision, trust = origin(experiment)
    size = load_config(model, revision, trust, "student.model").get_text_config().vocab_size
    its = manifest["tokenizer"]["vocab_size"]
    return f"student.model: {model} and {dataset} have different vocabularies, of {size:,} and {its:,} tokens"


def _online_teacher(experiment: Experiment, arguments: Any) -> Any:
    """The online teacher, or all of them by name, if targets are not stored and the loss needs it."""
    if not experiment.targets.online or not (arguments.uses_targets or any(arguments.layers())):
        return None
    with whole_on_every_process():
        loaded = {
            name: load_model(teacher.model, teacher.revision, teacher.dtype, teacher.trust_remote_code, device="cpu")
            for name, teacher in experiment.routed.items()
        }
    return loaded if experiment.teachers else loaded[""]


def _trained(experiment: Experiment, trainer: Any) -> Any:
    """The trained student in the main process, None in the others; must be called by all processes.

    Where each process holds a part of the weights, they are gathered and put into the student as it was before.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else {}
    if not trainer.is_world_process_zero():
        return None
    if not sharded:
        return trainer.accelerator.unwrap_model(trainer.model)
    with whole_on_every_process():
        student = make_student(experiment)
    trained = {name: weights[name] for name, parameter in student.named_parameters() if parameter.requires_grad}
    student.load_state_dict(trained, strict=False)
    return student


def _kept_losses(trainer: Any) -> dict[str, float]:
    """The parts of the loss at the step whose weights are kept, and on the validation rows at that evaluation.

    `best_step` is that step, where it is not the last.
    """
    state = trainer.state
    last: dict[str, Any] = {}
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    step = int(best.rpartition("-")[2]) if best else state.global_step
    for entry in state.log_history:
        last |= entry if entry["step"] <= step else {}
    if step < state.global_step:
        last["best_step"] = step
    names = ("best_step", "kl", "ce", "agreement", "num_completion_tokens", "eval_kl", "eval_ce", "eval_agreement")
    return {name: last[name] for name in names if name in last}


def _say_plan(experiment: Experiment, manifest: dict[str, Any] | None) -> None:
    if manifest is None:
        say("train", f"{training_dataset(experiment)} does not exist yet")
    else:
        rows = sum(entry["rows"] for entry in manifest["shards"] if entry["split"] == "train")
        tokens = sum(entry["tokens"] for entry in manifest["shards"] if entry["split"] == "train")
        say("train", f"{counted(rows, 'row')}, {counted(tokens, 'completion token')} in {training_dataset(experiment)}")
    say("train", f"would write {experiment.directory('student')}")
