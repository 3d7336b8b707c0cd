"""The origin of the student: an existing model, the pruned teacher, or its architecture with random weights."""

import os
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.machine import inference_precision
from llmdistill.config.student import ORIGINS
from llmdistill.errors import InputError, NonFiniteError, no_such_key
from llmdistill.models.loading import (
    check_model_exists,
    generation_config,
    load_config,
    load_model,
    load_tokenizer,
    torch_dtype,
    whole_on_every_process,
)
from llmdistill.runs import record
from llmdistill.runs.inputs import model_fingerprint
from llmdistill.runs.progress import say, working
from llmdistill.stages.prune import ensure_pruned
from llmdistill.students import adapters

Source = tuple[str, str | None, bool]  # model, revision, trust_remote_code
_START = "checkpoints/adapter-start"
# These follow from the tokenizer, which is the teacher's.
_THE_TOKENIZERS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def origin(experiment: Experiment) -> Source:
    """The model that the student is made from: its own, or the teacher.

    Raises:
        InputError: if the configuration does not name it, or there is no such model.
    """
    student, teacher = experiment.student, experiment.teacher
    if all(getattr(student, name) is None for name in ORIGINS):
        raise InputError("student needs one of the keys student.model, student.prune and student.config")
    found = (student.model, student.revision, student.trust_remote_code)
    model, revision, trust = found if student.model else (teacher.model, teacher.revision, teacher.trust_remote_code)
    assert model is not None
    check_model_exists(model, "student.model" if student.model else "teacher.model")
    return model, revision, trust


def before(experiment: Experiment) -> Source:
    """The student before training: the existing model, or the result of `ensure_before`."""
    student = experiment.student
    if student.model:
        return student.model, student.revision, student.trust_remote_code
    return str(experiment.directory("student-before")), None, False


def ensure_before(experiment: Experiment) -> None:
    """Make `OUTPUT/student-before` if the student is not an existing model and it is missing.

    Raises:
        InputError: if the teacher cannot be pruned, or its architecture cannot be built, as requested.
    """
    if experiment.student.prune:
        ensure_pruned(experiment)
    elif experiment.student.config is not None:
        _ensure_fresh(experiment)


def fresh_claims(experiment: Experiment) -> list[record.Claim]:
    """The student of `student.config` before training, and what it depends on; empty for any other student."""
    student, teacher = experiment.student, experiment.teacher
    if student.config is None:
        return []
    inputs = {teacher.model: model_fingerprint(teacher.model, teacher.revision)}
    claimed = {
        "teacher": teacher.model_dump(mode="json", include={"model", "revision"}),
        "student": {"config": student.config},
        "seed": experiment.seed,
    }
    return [record.Claim(experiment.directory("student-before"), "fresh", claimed, inputs)]


def _ensure_fresh(experiment: Experiment) -> None:
    teacher, (claim,) = experiment.teacher, fresh_claims(experiment)
    if record.claim(*claim) == "done":
        return
    with working("student", "making the student"):
        config = load_config(teacher.model, teacher.revision, teacher.trust_remote_code).get_text_config()
        student = fresh(config, experiment.student.config or {}, experiment.seed, teacher.trust_remote_code)
        student.generation_config = generation_config(teacher.model, teacher.revision) or student.generation_config
        tokenizer = load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code)
    record.begin(*claim, experiment.seed)
    student.save_pretrained(claim.directory)
    tokenizer.save_pretrained(claim.directory)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    record.finish(claim.directory, {"parameters": parameters})
    say("student", f"{parameters / 1e6:,.1f}M parameters with random weights in {claim.directory}")


def fresh(config: Any, changes: dict[str, Any], seed: int, trust_remote_code: bool = False) -> Any:
    """A model of the same architecture with some sizes changed and random weights.

    A list with one entry per layer (`layer_types`) is cut or repeated to the new number of layers unless it is given.

    Args:
        config: configuration of the teacher's text part.
        changes: keys to change, with their values.
        seed: seed of the weights, which depend on nothing else.
        trust_remote_code: as for the teacher.

    Raises:
        InputError: if this architecture does not have a key or allow the sizes.
    """
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    fields = config.to_dict()
    known = fields.keys() - PreTrainedConfig().to_dict().keys()
    for name in changes:
        if name in _THE_TOKENIZERS:
            raise InputError(f"student.config.{name} cannot be changed: the student has the teacher's tokenizer")
        if name not in known:
            raise no_such_key("student.config", name, known, f"{type(config).__name__} has no such key")
    old, new = fields["num_hidden_layers"], changes.get("num_hidden_layers", fields["num_hidden_layers"])
    try:
        if new < 1:
            raise ValueError("there must be at least one layer")
        for name, values in fields.items():
            if isinstance(values, list) and len(values) == old and name in known:
                fields[name] = [values[layer % old] for layer in range(new)]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            student = AutoModelForCausalLM.from_config(
                type(config).from_dict({**fields, **changes}), dtype=config.dtype, trust_remote_code=trust_remote_code
            ).eval()
            student(torch.zeros(1, 2, dtype=torch.long))  # reveals what the configuration does not check itself
    except Exception as error:  # configurations and models may raise anything
        given = ", ".join(f"{name} {value}" for name, value in changes.items())
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"student.config: {type(config).__name__} cannot have {given}: {reason}") from None
    return student


def load_student(experiment: Experiment) -> Any:
    """Load the model before training; must be called by all processes, of which the first makes what is missing.

    Raises:
        InputError: if there is no such model, or it cannot be made, quantised or given adapters as requested.
    """
    from accelerate import PartialState

    _adapters(experiment)  # errors in them are reported before anything is written
    with PartialState().main_process_first(), whole_on_every_process():
        ensure_before(experiment)
    return make_student(experiment)


def make_student(experiment: Experiment) -> Any:
    """Load the model before training: in float32 if all weights train; under adapters, in its own precision or quantised.

    It is on the CPU unless quantised; the trainer moves it, or the part of it that this process holds.
    """
    student = experiment.student
    config, quantised = _adapters(experiment)
    # Frozen weights keep their stored precision, unless this machine only computes in float32.
    frozen = "float32" if inference_precision().dtype == "float32" and not quantised else "checkpoint"
    dtype, device = frozen if config else "float32", None if quantised else "cpu"
    how = {"quantization_config": quantised, "attn_implementation": student.attn_implementation}
    model = _load_before(experiment, dtype=dtype, device=device, **how)
    adapters.keep_gradients(model)
    if config:
        return adapters.attach(model, config, experiment.seed)
    freeze_unread(model)
    return model


def freeze_unread(model: Any) -> None:
    """Freeze the parts that text does not use: everything but the language model of a multimodal model."""
    if model.config.get_text_config() is model.config:
        return
    read = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    trained = {id(parameter) for part in read for parameter in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def _adapters(experiment: Experiment) -> tuple[Any, Any]:
    """The configurations of peft and of the quantisation, or None."""
    student = experiment.student
    config = adapters.lora_config(student.lora) if student.lora else None
    if student.quantize is None:
        return config, None
    import torch

    if student.quantize == "int8" and student.lora and student.lora.args.get("use_dora") and not torch.cuda.is_available():
        raise InputError("student.quantize int8 with student.lora.args.use_dora needs a GPU; use nf4")

    # Products are in the checkpoint's precision, unless this machine only computes in float32.
    dtype = torch.float32 if inference_precision().dtype == "float32" else saved_dtype(experiment)
    return config, adapters.quantization_config(student.quantize, dtype)


def saved_dtype(experiment: Experiment) -> Any:
    """The precision of the student's original checkpoint, in which it is saved."""
    return torch_dtype(load_config(*origin(experiment)).dtype)


def pair_layers(experiment: Experiment, arguments: Any, student: Any, teacher: Any) -> None:
    """Choose the layers to compare if not configured: for a pruned student, by their original positions.

    Args:
        experiment: the configuration.
        arguments: the `DistillConfig`, in which the pairs are stored.
        student: the model before training.
        teacher: the online teacher, if there is one.

    Raises:
        InputError: if the configuration names missing layers, or something that cannot be trained.
    """
    from llmdistill.losses.hidden_states import decoder_layers, of_pruned, resolve

    kept = None
    if experiment.student.prune:
        kept = (record.read_run(experiment.directory("student-before")) or {})["results"]["layers"]
    for name in ("hidden", "attention"):
        part = getattr(arguments, name)
        if part is None:
            continue
        layers = [len(decoder_layers(model)) for model in (student, teacher)]
        if part["layers"] is None and kept:
            part["layers"] = of_pruned(kept, layers[1]) if name == "hidden" else list(enumerate(kept))
        try:
            part["layers"] = resolve(part["layers"], *layers)
        except ValueError as error:
            raise InputError(f"train.{name}.{error}") from None
    sizes = {model.config.get_text_config().hidden_size for model in (student, teacher) if model is not None}
    if arguments.hidden and len(sizes) > 1 and is_sharded(arguments):
        raise InputError(
            "train.hidden: different hidden sizes need a projector, which FSDP and DeepSpeed do not support; use DDP"
        )


def is_sharded(arguments: Any) -> bool:
    """Whether each process will hold a part of the weights, according to accelerate or the arguments."""
    told = any(os.environ.get(f"ACCELERATE_USE_{way}") == "true" for way in ("FSDP", "DEEPSPEED"))
    return told or bool(arguments.fsdp or arguments.deepspeed)


def begin_student(model: Any, directory: Path) -> None:
    """Save what is needed to make the student from the trained model, before training."""
    if adapters.rewrites_base(model):
        adapters.save_start(model, directory / _START)


def save_student(model: Any, tokenizer: Any, experiment: Experiment, directory: Path, end_token_ids: list[int] | None) -> None:
    """Save the trained model as a directory that any engine loads: whole, in the precision of its original checkpoint.

    Adapters are saved next to it, in `adapter`, and merged into the base in its own precision, never into quantised weights.

    Raises:
        NonFiniteError: if a trained weight is not finite; nothing has been written.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise NonFiniteError(f"the trained weight {name} is not finite; nothing was saved")
    if experiment.student.lora:
        adapters.save_adapter(model, directory / "adapter", directory / _START if adapters.rewrites_base(model) else None)
        # On the CPU: a base that was quantised to fit the accelerator may not fit unquantised.
        base = _load_before(experiment, dtype="checkpoint", device="cpu") if experiment.student.quantize else None
        model = adapters.merged(model, directory / "adapter", base)
    if end_token_ids:
        model.generation_config.eos_token_id = end_token_ids
    model.config.use_cache = True  # off in training with gradient checkpointing
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        model.config.get_text_config().output_router_logits = False  # on for the router's loss of a mixture of experts
    model.to(saved_dtype(experiment)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _load_before(experiment: Experiment, **how: Any) -> Any:
    model, revision, trust = before(experiment)
    return load_model(model, revision, trust_remote_code=trust, key="student.model", **how)
