"""Fidelity with several teachers: each row is measured against its own, and the rows of each teacher separately."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmdistill.config import Experiment
from llmdistill.data.rows import metadata_and_provenance
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.metrics import METRICS, Sums
from llmdistill.evaluation.statistics import Array, Draws, check_clusters, interval_text
from llmdistill.models.loading import load_model
from llmdistill.models.root_classes import RootClasses

_TOLD = ("kl", "top1", "bits_per_byte")  # metrics shown for every teacher's rows


def shared(classes: RootClasses, sums: Mapping[str, Array]) -> dict[str, Any]:
    """The share of a text that is compared if the vocabularies differ: positions, and the teacher's entropy there."""
    return {
        "count": classes.count,
        "positions": float(sums["tokens"].sum() / max(sums["positions"].sum(), 1)),
        "entropy": float(sums["class_entropy"].sum() / max(sums["entropy"].sum(), 1e-12)),
    }


def teachers_of_rows(experiment: Experiment, metadata: Sequence[str]) -> list[str]:
    """The name of each row's teacher, from its column `metadata`; rows from elsewhere belong to the main one."""
    named = (metadata_and_provenance(str(text))[1].get("teacher") for text in metadata)
    return [name if name in experiment.routed else experiment.main for name in named]


def fidelity_to_own(
    experiment: Experiment,
    models: Mapping[str, Any],
    rows: Any,
    names: Sequence[str],
    dtype: str,
    classes: Mapping[str, RootClasses] | None,
    **arguments: Any,
) -> dict[str, Array]:
    """The sums of `fidelity`, in the order of the rows, each against the teacher that it names.

    Args:
        experiment: the configuration.
        models: the models by name; `teacher` is the main one, the others are loaded in turn.
        rows: a sequence of rows.
        names: name of each row's teacher.
        dtype: precision in which models are loaded.
        classes: classes of each teacher's vocabulary and the student's, if they differ.
        arguments: further arguments of `fidelity`.
    """
    parts, order = [], []
    for name, teacher in experiment.routed.items():
        numbers = [number for number, its in enumerate(names) if its == name]
        if not numbers:
            continue
        own = models["teacher"]
        if name != experiment.main:
            how = (teacher.model, teacher.revision, dtype, teacher.trust_remote_code)
            own = load_model(*how, f"teachers.{name}.model", spread=True)
        held = rows.select(numbers) if hasattr(rows, "select") else [rows[number] for number in numbers]
        compared = classes[name] if classes else None
        parts.append(fidelity({**models, "teacher": own}, held, classes=compared, **arguments))
        order += numbers
    back = np.argsort(order)
    return {key: np.concatenate([part[key] for part in parts])[back] for key in parts[0]}


def by_teacher(
    experiment: Experiment,
    subjects: Sequence[str],
    measured: dict[str, Array],
    names: Sequence[str],
    prompts: Sequence[str],
    text_bytes: Array,
    classes: Mapping[str, RootClasses] | None = None,
) -> list[dict[str, Any]]:
    """The entries of every teacher's rows in `metrics.json`: the measures of each other model against that teacher."""
    found = []
    for name, teacher in experiment.teachers.items():
        numbers = np.array([number for number, its in enumerate(names) if its == name], dtype=np.int64)
        held = [prompts[number] for number in numbers]
        entry: dict[str, Any] = {"name": name, "path": teacher.model, "rows": len(numbers), "prompts": len(set(held))}
        if entry["prompts"] < 2:
            entry["warning"] = f"{entry['prompts']} held-out prompts of {name}, too few for an interval; raise eval.held_out"
        else:
            sums = {key: values[numbers] for key, values in measured.items()}
            draws = Draws.of(held, experiment.eval.resamples, experiment.seed)
            entry["warning"] = check_clusters(entry["prompts"], f"held-out prompts of {name}", "raise eval.held_out")
            entry["tokens"] = int(sums["tokens"].sum())
            others = [subject for subject in subjects if subject != "teacher"]
            if classes:
                entry["classes"] = shared(classes[name], sums)
            entry["models"] = [{"name": subject, **_of(Sums(subject, sums, draws, text_bytes[numbers]))} for subject in others]
        found.append(entry)
    return found


def _of(sums: Sums) -> dict[str, Any]:
    values = {metric.name: metric.compute(sums) for metric in METRICS if metric.name in _TOLD}
    return {name: value for name, value in values.items() if value is not None}


def lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A line for the rows of every teacher."""
    said = []
    for entry in entries:
        if "models" not in entry:
            continue
        models = {model["name"]: model for model in entry["models"]}
        (kl, ends), (before, its_ends) = (interval_text(models[name]["kl"], ".2f") for name in ("student", "student before"))
        top, its = interval_text(models["student"]["top1"], ".0f", 100)
        said.append(
            f"{entry['name']}: student {kl} nats from its teacher ({ends}), before {before} ({its_ends}); "
            f"{top}% of its next-token choices ({its}), on {entry['rows']:,} rows" + _compared(entry, models["student"])
        )
    return said


def _compared(entry: dict[str, Any], student: dict[str, Any]) -> str:
    """The share of a text that is compared if the vocabularies differ, and the cost of all of it."""
    if "classes" not in entry:
        return ""
    bits, ends = interval_text(student["bits_per_byte"], ".3f")
    count, share = entry["classes"]["count"], entry["classes"]["positions"]
    return f", at {share:.1%} of positions over {count:,} classes; {bits} bits per byte ({ends})"
