"""`llmdistill prune`: make the student by pruning the teacher and refitting; reports what was removed, and the effect."""

from typing import Any

import numpy as np

from llmdistill.config import Experiment
from llmdistill.config.student import Prune
from llmdistill.data.dataset import load_dataset
from llmdistill.data.manifest import MANIFEST, read_manifest
from llmdistill.errors import InputError
from llmdistill.evaluation.statistics import share_text
from llmdistill.models.loading import check_model_exists, load_config, load_model, load_tokenizer
from llmdistill.runs import record
from llmdistill.runs.inputs import model_fingerprint, sha256
from llmdistill.runs.progress import say, working
from llmdistill.students.sides import training_dataset

_LOOKED_AT = 12  # rows: the KL from the teacher is a first look, not an evaluation


def prune(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/student-before`, the student before training.

    Raises:
        InputError: there is nothing to prune, the teacher or the dataset are not usable, or more is to stay than there is.
    """
    if experiment.student.prune is None:
        raise InputError("the key student.prune is missing; `prune` needs it to know what to keep")
    directory = experiment.directory("student-before")
    check_model_exists(experiment.teacher.model, "teacher.model")
    if dry_run:
        rows = f" by rows of {training_dataset(experiment)}" if experiment.student.prune.measured else ""
        say("prune", f"would write {directory}{rows}")
    elif not ensure_pruned(experiment):
        say("prune", f"{directory} is finished")


def claims(experiment: Experiment) -> list[record.Claim]:
    """The pruned teacher, and what it depends on."""
    settings, teacher = experiment.student.prune, experiment.teacher
    assert settings is not None
    inputs = {teacher.model: model_fingerprint(teacher.model, teacher.revision)}
    if settings.measured:
        inputs[str(training_dataset(experiment) / MANIFEST)] = _dataset_hash(experiment)
    claimed = {
        "teacher": teacher.model_dump(mode="json", include={"model", "revision"}),
        "student": {"prune": settings.model_dump(mode="json")},
    }
    return [record.Claim(experiment.directory("student-before"), "prune", claimed, inputs)]


def ensure_pruned(experiment: Experiment) -> bool:
    """Make the pruned teacher if it does not exist; returns whether it did not."""
    settings, teacher = experiment.student.prune, experiment.teacher
    assert settings is not None
    directory = experiment.directory("student-before")
    check_model_exists(teacher.model, "teacher.model")
    (claim,) = claims(experiment)
    if record.claim(*claim) == "done":
        return False
    with working("prune", "measuring the teacher, pruning the student"):
        student, results, lines = _make(experiment, settings)
        tokenizer = load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code)
    record.begin(*claim, experiment.seed)
    student.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    record.finish(directory, results)
    for line in lines:
        say("prune", line)
    near = results.get("kl_from_teacher", {})
    if near.get("refitted", 0) > near.get("cut", 0):
        say(
            "warning",
            "the refit does not reduce the KL here; raise student.prune.calibration_rows, or set student.prune.refit to false",
        )
    before, after = results["parameters_before"], results["parameters"]
    smaller = f"{share_text(1 - after / before)} smaller"
    say("prune", f"{before / 1e6:,.1f}M parameters become {after / 1e6:,.1f}M ({smaller}) in {directory}")
    return True


def _dataset_hash(experiment: Experiment) -> str:
    try:
        read_manifest(training_dataset(experiment))
    except InputError as error:
        raise InputError(
            f"{error}; student.prune needs its rows, except for listed or evenly spaced layers with student.prune.refit false"
        ) from None
    return sha256(training_dataset(experiment) / MANIFEST)


def _make(experiment: Experiment, settings: Prune) -> tuple[Any, dict[str, Any], list[str]]:
    """The student in the precision of the teacher's checkpoint, the results for `run.json`, and messages.

    Everything is measured and solved in float32.
    """
    from llmdistill.students.layer_choice import TeacherKl, parts_kept
    from llmdistill.students.pruning import decoder_of, prune_model

    teacher = experiment.teacher
    model = load_model(teacher.model, teacher.revision, "float32", teacher.trust_remote_code)
    calibration, others = calibration_and_others(experiment, settings.calibration_rows) if settings.measured else ([], [])
    decoder_of(model)  # another architecture is refused before anything of it is looked for
    kept, importance, removed = parts_kept(settings, model, calibration)
    config = model.config.get_text_config()
    student = prune_model(model, kept)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (model, student)]
    results = {"parameters_before": sizes[0], "parameters": sizes[1], **_indices(kept, config)}
    if removed:
        results["removed"] = [{"layer": layer, "kl": kl} for layer, kl in removed]
    lines = _what_went(settings, config, kept, importance, removed)
    dtype = _stored_dtype(experiment)
    nearness = TeacherKl(model, others) if others else None
    near = {"cut": nearness.kl(rounded(student, dtype))} if nearness else {}
    if settings.refit:
        from llmdistill.students.refit import refit

        errors = refit(student, model, kept, calibration, settings.ridge)
        results["refit"] = [{"layer": layer, "before": a, "after": b} for layer, (a, b) in zip(kept.layers, errors, strict=True)]
        if nearness:
            near["refitted"] = nearness.kl(rounded(student, dtype))
    if others:
        results["kl_from_teacher"] = {**near, "rows": len(others)}
        lines.append(_how_near(near, len(others)))
    elif settings.measured:
        lines.append(f"all rows of {training_dataset(experiment)} were measured; none is left for the KL from the teacher")
    return student.to(dtype), results, lines


def calibration_and_others(experiment: Experiment, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Calibration rows, and others from held-out prompts or, if there are none, from the remaining training rows."""
    directory = training_dataset(experiment)
    rows = load_dataset(directory, "train")
    count = min(count, len(rows))
    calibration = [rows[number] for number in range(count)]
    calibration.sort(key=lambda row: len(row["input_ids"]))  # for little padding; no result depends on the order
    left = range(count, len(rows))
    if any(shard["split"] == "test" for shard in read_manifest(directory)["shards"]):
        rows = load_dataset(directory, "test")
        left = range(len(rows))
    # Evenly over all of them: rows of the same prompt stand side by side.
    places = sorted({int(place) for place in np.linspace(0, len(left) - 1, _LOOKED_AT).round()}) if left else []
    return calibration, [rows[left[place]] for place in places]


def _stored_dtype(experiment: Experiment) -> Any:
    """The precision in the teacher's `config.json`; float32 if there is none."""
    import torch

    teacher = experiment.teacher
    return load_config(teacher.model, teacher.revision, teacher.trust_remote_code).dtype or torch.float32


def rounded(student: Any, dtype: Any) -> Any:
    """The student as it would be saved, in place: weights rounded to a precision, but stored in float32."""
    for parameter in student.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return student


def _how_near(near: dict[str, float], rows: int) -> str:
    after = f", {near['refitted']:.2f} after the refit" if "refitted" in near else ""
    return f"KL from the teacher {near['cut']:.2f} nats per token{after} ({rows} rows)"


def _indices(kept: Any, config: Any) -> dict[str, Any]:
    """The parts that were kept, for `run.json`."""
    found: dict[str, Any] = {"layers": kept.layers}
    for name, size, chosen in (
        ("neurons", config.intermediate_size, kept.neurons),
        ("key_value_heads", config.num_key_value_heads, kept.heads),
        ("hidden", config.hidden_size, [kept.hidden]),
    ):
        if len(chosen[0]) < size:
            found[name] = [part.tolist() for part in chosen]
    return found


def _what_went(settings: Prune, config: Any, kept: Any, importance: Any, removed: list[tuple[int, float]]) -> list[str]:
    """A line for every kind of part that was pruned, with the importance of the removed ones."""
    lines = []
    if len(kept.layers) < config.num_hidden_layers:
        gone = np.setdiff1d(np.arange(config.num_hidden_layers), kept.layers)
        why = "as listed" if isinstance(settings.layers, list) else "evenly spaced" if settings.by == "even" else ""
        if removed:
            steps = ", ".join(f"{layer} ({kl:.2f})" for layer, kl in removed)
            why = f"by KL after a refit, in nats per token: without {steps}"
        elif importance is not None:
            most, least = importance.layers[gone].max(), importance.layers[kept.layers].min()
            influence = f"block influence: up to {most:.3f} in removed layers, from {least:.3f} in kept ones"
            why = f"{why}; {influence}" if why else f"by {influence}"
        lines.append(f"keeps layers {', '.join(map(str, kept.layers))} of {config.num_hidden_layers}, {why}")
    for what, size, chosen, scores in (
        ("feed-forward neurons", config.intermediate_size, kept.neurons, "neurons"),
        ("key-value heads", config.num_key_value_heads, kept.heads, "heads"),
        ("channels", config.hidden_size, [kept.hidden], "hidden"),
    ):
        if len(chosen[0]) < size:
            values = np.asarray(getattr(importance, scores))
            values = values[None] if scores == "hidden" else values[kept.layers]
            share = sum(row[stay].sum() for row, stay in zip(values, chosen, strict=True)) / values.sum()
            lines.append(f"keeps {len(chosen[0]):,} of {size:,} {what}, with {share:.0%} of their total activation")
    return lines
