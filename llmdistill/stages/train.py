"""`llmdistill train`: train the student on the dataset; the result is a directory that any engine loads."""

import dataclasses
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.machine import Precision, training_precision
from llmdistill.config.teacher import Teacher
from llmdistill.config.train import Examples
from llmdistill.data.cards import model_card, write_card
from llmdistill.data.dataset import load_dataset
from llmdistill.data.manifest import MANIFEST, has_several_tokenizers, read_manifest
from llmdistill.data.targets import KINDS
from llmdistill.errors import InputError
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
from llmdistill.runs.files import read_json
from llmdistill.runs.inputs import file_input, model_fingerprint, sha256
from llmdistill.runs.progress import counted, say, working
from llmdistill.students.origins import (
    begin_student,
    load_student,
    make_student,
    origin,
    pair_layers,
    save_student,
)
from llmdistill.students.quantization import fake_quantise, unfake
from llmdistill.students.sides import teacher_tokenizer, tokenizer_of, training_dataset
from llmdistill.training.callbacks import last_checkpoint, same_rows_a_step, show_progress, stop_with_a_checkpoint
from llmdistill.training.examples import example_rows, read_examples
from llmdistill.training.rows import check_mix, learnable, mixed_rows, split
from llmdistill.training.settings import arguments_of, check_training
from llmdistill.training.traps import traps

_MAY_NAME_A_FILE = ("deepspeed", "fsdp_config", "accelerator_config")  # arguments of trl.SFTConfig


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
    inputs = {str(file): sha256(file) for file in manifests} | _models_and_files(experiment)
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
    found = {model: model_fingerprint(model, revision)}
    for name, teacher in experiment.routed.items() if experiment.targets.online else ():
        check_model_exists(teacher.model, f"teachers.{name}.model" if name else "teacher.model")
        found[teacher.model] = model_fingerprint(teacher.model, teacher.revision)
    for name in _MAY_NAME_A_FILE:
        value = experiment.train.args.get(name)
        if isinstance(value, str) and value.endswith((".json", ".jinja", ".j2")):
            found |= file_input(value, f"train.args.{name}")
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
    dataset, validation = split(experiment, rows)
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
    state = read_json(experiment.directory("student") / "trainer_state.json")
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


def settled(experiment: Experiment, claim: record.Claim) -> Precision:
    """The precision of matrix products: as the training was started, as configured, or the preferred one of this machine."""
    asked = experiment.train.args
    found = training_precision(asked.get("use_cpu", False), asked.get("bf16"), asked.get("fp16", False))
    return record.settled_precision(claim.directory, claim.settings, claim.inputs, found)


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
