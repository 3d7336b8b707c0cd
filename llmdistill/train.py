"""`llmdistill train`: the student learns from the dataset; the result is a directory that any engine loads."""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

from llmdistill import stage
from llmdistill.card import model_card
from llmdistill.config import Experiment
from llmdistill.dataset import MANIFEST, load_dataset, read_manifest
from llmdistill.errors import InputError
from llmdistill.models import check_model_exists, load_config, load_model, load_tokenizer, tokenise_chat, vocabulary_hash
from llmdistill.progress import StageBar, console, say
from llmdistill.prune import ensure_pruned

# Set by keys of their own; given under train.args they would contradict them.
_RESERVED = {"output_dir": "output"} | {name: f"train.{name}" for name in ("loss", "alpha", "temperature", "beta")}


def train(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/student`, and `OUTPUT/student-text-only` if asked for, going on from the last checkpoint.

    Raises:
        InputError: the dataset, the student or the output directory are not usable; nothing was written.
    """
    directories = [(experiment.directory("student"), experiment.train.alpha)]
    if experiment.train.compare_text_only:
        directories.append((experiment.directory("student-text-only"), 0.0))
    if dry_run and not (experiment.dataset_directory / MANIFEST).is_file():
        _say_plan(experiment, None)
        return
    manifest = read_manifest(experiment.dataset_directory)
    _check_loss(experiment, manifest)
    key = "teacher.model" if experiment.student.model is None else "student.model"
    model, revision, _ = _origin(experiment, key)
    settings = experiment.model_dump(mode="json", include={"seed", "student", "train"})
    online = experiment.targets.kind == "online"
    if online:
        settings["targets"] = {"kind": "online"}
    if experiment.student.prune or online:
        settings["teacher"] = experiment.teacher.model_dump(mode="json", include={"model", "revision"})
    inputs = {
        str(experiment.dataset_directory / MANIFEST): stage.sha256(experiment.dataset_directory / MANIFEST),
        model: stage.model_fingerprint(model, revision),
    }
    if online:
        inputs[experiment.teacher.model] = stage.model_fingerprint(experiment.teacher.model, experiment.teacher.revision)
    states = [stage.claim(directory, "train", {**settings, "alpha": alpha}, inputs) for directory, alpha in directories]
    if dry_run:
        _say_plan(experiment, manifest)
        return
    for (directory, alpha), state in zip(directories, states, strict=True):
        if state == "done":
            say("train", f"{directory} is finished")
        else:
            _train_one(experiment, manifest, directory, alpha, {**settings, "alpha": alpha}, inputs)


def _train_one(
    experiment: Experiment,
    manifest: dict[str, Any],
    directory: Path,
    alpha: float,
    settings: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    with console.status("loading the student"):
        from llmdistill.trainer import DistillTrainer

        arguments = _arguments(experiment, directory, alpha)
        model, revision, trust = _origin(experiment)
        saved_dtype = load_config(model, revision, trust).dtype or "float32"
        tokenizer, same_vocabulary = _tokenizer(experiment, manifest)
        dataset = load_dataset(experiment.dataset_directory, "train")
        if not same_vocabulary:
            dataset = _tokenise_again(dataset, tokenizer)
        main = arguments.process_index == 0
        student = _student(experiment)
        teacher = _online_teacher(experiment) if alpha else None
    if main:
        stage.begin(directory, "train", settings, inputs, experiment.seed)
    label = "train" if alpha or not experiment.train.compare_text_only else "text only"
    trainer = DistillTrainer(
        model=student,
        args=arguments,
        train_dataset=dataset,
        teacher=teacher,
        processing_class=tokenizer,
        peft_config=_lora(experiment),
    )
    _show_progress(trainer, label)
    trainer.train(resume_from_checkpoint=last_checkpoint(directory / "checkpoints"))

    trained = trainer.accelerator.unwrap_model(trainer.model)
    if main:
        if experiment.student.lora:
            trained.save_pretrained(directory / "adapter")
            trained = trained.merge_and_unload()
        if same_vocabulary:
            trained.generation_config.eos_token_id = manifest["tokenizer"]["end_token_ids"]
        _save(trained, tokenizer, directory, saved_dtype)
        trainer.state.save_to_json(str(directory / "trainer_state.json"))
        results = {"steps": trainer.state.global_step, **_last_losses(trainer.state.log_history)}
        stage.write_text(directory / "README.md", model_card(experiment, manifest, directory.name, alpha, results))
        stage.finish(directory, results)


def last_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint that was written to its end; the trainer writes its state last."""
    finished = []
    for candidate in directory.glob("checkpoint-*"):
        try:
            finished.append((int(json.loads((candidate / "trainer_state.json").read_text())["global_step"]), str(candidate)))
        except (OSError, ValueError, KeyError):
            continue
    return max(finished)[1] if finished else None


def _origin(experiment: Experiment, check: str | None = None) -> tuple[str, str | None, bool]:
    """The model that the student starts from: its own, or the teacher that is pruned."""
    student, teacher = experiment.student, experiment.teacher
    if student.model is None and student.prune is None:
        raise InputError("student needs one of the keys student.model and student.prune")
    origin = (student.model, student.revision, student.trust_remote_code)
    model, revision, trust = origin if student.model else (teacher.model, teacher.revision, teacher.trust_remote_code)
    assert model is not None
    if check:
        check_model_exists(model, check)
    return model, revision, trust


def _check_loss(experiment: Experiment, manifest: dict[str, Any]) -> None:
    if experiment.targets.kind == "online":
        return
    if manifest["targets"]["kind"] == "none" and (experiment.train.alpha > 0 or experiment.train.compare_text_only):
        raise InputError(
            f"train.alpha is {experiment.train.alpha}, but {experiment.dataset_directory} has no soft targets "
            "(targets.kind: none); set train.alpha to 0 and train.compare_text_only to false, or targets.kind to online"
        )
    if reason := experiment.train.against(manifest["targets"]["kind"]):
        raise InputError(f"{reason}, and {experiment.dataset_directory} has sampled ones; use targets.kind topk")


def _arguments(experiment: Experiment, directory: Path, alpha: float) -> Any:
    """The `DistillConfig`, with errors that name the key.

    Raises:
        InputError: an argument that TRL does not have, or does not take.
    """
    import torch

    from llmdistill.trainer import DistillConfig

    names = [field.name for field in dataclasses.fields(DistillConfig)]
    for name in experiment.train.args:
        if name == "push_to_hub" or name.startswith("hub_"):
            raise InputError(f"train.args.{name} would upload the checkpoints; push the trained student with `llmdistill push`")
        if name in _RESERVED:
            raise InputError(f"train.args.{name} is set by the key {_RESERVED[name]}")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean train.args.{near[0]}?" if near else ""
            raise InputError(f"no such key train.args.{name}: trl.SFTConfig has no such argument{hint}")
    defaults = {"seed": experiment.seed, "report_to": "none", "logging_steps": 1, "disable_tqdm": True}
    defaults["use_cpu"] = not torch.accelerator.is_available()
    ours = {
        "output_dir": str(directory / "checkpoints"),
        "loss": experiment.train.loss,
        "alpha": alpha,
        "temperature": experiment.train.temperature,
        "beta": experiment.train.beta,
    }
    try:
        arguments = DistillConfig(**{**defaults, **experiment.train.args, **ours})
    except (TypeError, ValueError) as error:
        raise InputError(f"train.args: {error}") from None
    if arguments.distributed_state.distributed_type in ("FSDP", "DEEPSPEED"):
        raise InputError("train: runs on one device or under DDP (accelerate launch --multi_gpu), not under FSDP or DeepSpeed")
    return arguments


def _tokenizer(experiment: Experiment, manifest: dict[str, Any]) -> tuple[Any, bool]:
    """The tokenizer to save with the student, and whether it is the teacher's.

    With one vocabulary it is the teacher's: the student learns exactly those ids, its chat template and its end token
    among them, also where the student was a base model that knew another end token.

    Raises:
        InputError: token-level targets for a student with another vocabulary.
    """
    teacher = manifest["tokenizer"]
    model, revision, trust = _origin(experiment)
    tokenizer = load_tokenizer(model, revision, trust, "student.model")
    student_size = load_config(model, revision, trust, "student.model").get_text_config().vocab_size
    if vocabulary_hash(tokenizer) == teacher["vocabulary_hash"]:
        tokenizer.chat_template = teacher["chat_template"]
        return tokenizer, True
    if manifest["targets"]["kind"] == "none" and experiment.targets.kind != "online":
        return tokenizer, False
    name, size = Path(manifest["teacher"]["model"]).name, teacher["vocab_size"]
    student_has = f"{student_size:,}" if student_size != size else f"{student_size:,} others"
    raise InputError(
        f"teacher and student do not share a vocabulary: {name} has {size:,} tokens, {model} has {student_has}.\n"
        "Token-level targets need one tokenizer. Use targets.kind: none (text only), or a student of the same family."
    )


def _tokenise_again(dataset: Any, tokenizer: Any) -> Any:
    """Text-only rows in the ids of another tokenizer, through its own chat template."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        whole, start = tokenise_chat(tokenizer, row["prompt"], row["completion"])
        return {"input_ids": whole, "completion_start": start}

    kept = ["input_ids", "completion_start"]
    plain = dataset.with_format(None)
    return plain.map(convert, remove_columns=[name for name in plain.column_names if name not in kept]).with_format("numpy")


def _student(experiment: Experiment) -> Any:
    """The model before training: float32 where all weights train, its own precision under LoRA."""
    from accelerate import PartialState

    model, revision, trust = _origin(experiment)
    dtype = "auto" if experiment.student.lora else "float32"
    if experiment.student.prune is None:
        return load_model(model, revision, dtype, trust, "student.model")
    with PartialState().main_process_first():
        ensure_pruned(experiment)
    return load_model(str(experiment.directory("pruned")), None, dtype)


def _online_teacher(experiment: Experiment) -> Any:
    """The teacher to run beside the student, if the targets are not to be stored ones."""
    teacher = experiment.teacher
    if experiment.targets.kind != "online":
        return None
    return load_model(teacher.model, teacher.revision, teacher.dtype, teacher.trust_remote_code)


def _lora(experiment: Experiment) -> Any:
    lora = experiment.student.lora
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, task_type="CAUSAL_LM"
    )


def _save(model: Any, tokenizer: Any, directory: Path, dtype: Any) -> None:
    """A model directory in the precision of the checkpoint that the student comes from."""
    import torch

    model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _show_progress(trainer: Any, label: str) -> None:
    """Replace the trainer's own progress bars and prints by one line."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.tokens = 0
            self.facts: list[str] = []
            self.bar = StageBar(label, state.max_steps, state.global_step).__enter__() if state.is_world_process_zero else None

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.bar and "ce" in logs:
                self.facts = [f"{name} {logs[name]:.2f}" for name in ("kl", "ce") if name in logs]
                new = logs["num_completion_tokens"] - self.tokens
                self.tokens += new
                self.bar.advance(0, new, self.facts)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar:
                self.bar.advance(1)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar:
                self.bar.__exit__(None, None, None)

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar())


def _last_losses(history: list[dict[str, Any]]) -> dict[str, float]:
    logged = [entry for entry in history if "ce" in entry]
    return {name: logged[-1][name] for name in ("kl", "ce", "num_completion_tokens") if logged and name in logged[-1]}


def _say_plan(experiment: Experiment, manifest: dict[str, Any] | None) -> None:
    if manifest is None:
        say("train", f"{experiment.dataset_directory} is not there yet")
    else:
        rows = sum(entry["rows"] for entry in manifest["shards"] if entry["split"] == "train")
        tokens = sum(entry["tokens"] for entry in manifest["shards"] if entry["split"] == "train")
        say("train", f"{rows:,} rows, {tokens:,} completion tokens in {experiment.dataset_directory}")
    say("train", f"would write {experiment.directory('student')}")
