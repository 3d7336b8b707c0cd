"""`llmdistill prune`: the student is cut out of the teacher; what goes, why, and how large the rest is."""

from typing import Any

import numpy as np

from llmdistill import stage
from llmdistill.config import Experiment
from llmdistill.config.student import Prune
from llmdistill.dataset import MANIFEST, load_dataset, read_manifest
from llmdistill.errors import InputError
from llmdistill.models import check_model_exists, load_model, load_tokenizer
from llmdistill.progress import say, working


def prune(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/student-before`, the student before training.

    Raises:
        InputError: there is nothing to prune, the teacher or the dataset are not usable, or more is to stay than there is.
    """
    if experiment.student.prune is None:
        raise InputError("the key student.prune is missing: `prune` needs to know what is to stay")
    directory = experiment.directory("student-before")
    if dry_run:
        say("prune", f"would write {directory}")
    elif not ensure_pruned(experiment):
        say("prune", f"{directory} is finished")


def ensure_pruned(experiment: Experiment) -> bool:
    """Make the pruned teacher if it is not there; whether it had to be made."""
    from llmdistill.training.cut import choose, cut, measure

    settings, teacher = experiment.student.prune, experiment.teacher
    assert settings is not None
    directory = experiment.directory("student-before")
    check_model_exists(teacher.model, "teacher.model")
    inputs = {teacher.model: stage.model_fingerprint(teacher.model, teacher.revision)}
    if settings.measured:
        read_manifest(experiment.dataset_directory)
        inputs[str(experiment.dataset_directory / MANIFEST)] = stage.sha256(experiment.dataset_directory / MANIFEST)
    claimed = {
        "teacher": teacher.model_dump(mode="json", include={"model", "revision"}),
        "student": {"prune": settings.model_dump(mode="json")},
    }
    if stage.claim(directory, "prune", claimed, inputs) == "done":
        return False
    with working("prune", "measuring the teacher"):
        model = load_model(teacher.model, teacher.revision, "auto", teacher.trust_remote_code)
        tokenizer = load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code)
        importance = None
        if settings.measured:
            rows = load_dataset(experiment.dataset_directory, "train")
            importance = measure(model, [rows[number] for number in range(min(settings.calibration_rows, len(rows)))])
        config = model.config.get_text_config()
        kept = choose(settings, config, importance)
        student = cut(model, kept)
    stage.begin(directory, "prune", claimed, inputs, experiment.seed)
    student.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (model, student)]
    stage.finish(directory, {"parameters_before": sizes[0], "parameters": sizes[1], **_indices(kept, config)})
    for line in _what_went(settings, config, kept, importance):
        say("prune", line)
    smaller = f"{1 - sizes[1] / sizes[0]:.0%} smaller"
    say("prune", f"{sizes[0] / 1e6:,.1f}M parameters become {sizes[1] / 1e6:,.1f}M ({smaller}) in {directory}")
    return True


def _indices(kept: Any, config: Any) -> dict[str, Any]:
    """What stays where something went, for `run.json`."""
    found: dict[str, Any] = {"layers": kept.layers}
    for name, size, chosen in (
        ("neurons", config.intermediate_size, kept.neurons),
        ("key_value_heads", config.num_key_value_heads, kept.heads),
        ("hidden", config.hidden_size, [kept.hidden]),
    ):
        if len(chosen[0]) < size:
            found[name] = [part.tolist() for part in chosen]
    return found


def _what_went(settings: Prune, config: Any, kept: Any, importance: Any) -> list[str]:
    """A line for every kind of part that lost some, with what the removed ones did."""
    lines = []
    if len(kept.layers) < config.num_hidden_layers:
        gone = np.setdiff1d(np.arange(config.num_hidden_layers), kept.layers)
        why = "as listed" if isinstance(settings.layers, list) else "evenly spaced" if settings.by == "even" else ""
        if importance is not None:
            most, least = importance.layers[gone].max(), importance.layers[kept.layers].min()
            influence = f"block influence: up to {most:.3f} in those that go, from {least:.3f} in those that stay"
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
            lines.append(f"keeps {len(chosen[0]):,} of {size:,} {what}, with {share:.0%} of their activation")
    return lines
