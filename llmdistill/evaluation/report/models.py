"""Figures of the models: the headline cards, their measures, exported forms, and the student as a draft model."""

from collections.abc import Iterator, Sequence
from typing import Any

from llmdistill.config import Experiment
from llmdistill.evaluation import drafts
from llmdistill.evaluation.metrics import OWN_TEXT_METRICS, Metric, metrics_of
from llmdistill.evaluation.plots import group_plot, size_plot
from llmdistill.evaluation.report.words import megabytes, parameters, percent, tokens_per_second
from llmdistill.evaluation.statistics import interval_text, share_interval_text, share_text, times_text
from llmdistill.runs.files import read_json

Json = dict[str, Any]


def cards(models: dict[str, Json], tasks: Json | None) -> list[Json]:
    """The headline figures, each with its source; results on the user's own tasks come first."""
    student = models["student"]
    if "teacher" not in models:
        return _cards_of_text(models["student before"], student, tasks)
    teacher = models["teacher"]
    saved = 1 - student["parameters"] / teacher["parameters"]
    speed = student["decode_tokens_per_s"] / teacher["decode_tokens_per_s"]
    times = times_text(speed)
    size = f"{parameters(teacher['parameters'])} → {parameters(student['parameters'])} parameters"
    rate = f"{tokens_per_second(teacher)} → {tokens_per_second(student)} tokens/s"
    kept = [_kept_card(tasks["together"]["kept"], "of its task score kept")] if tasks and tasks["together"]["kept"] else []
    own = [task for task in (tasks or {"tasks": []})["tasks"] if "valid" in task]
    return [
        *(kept if own else []),
        {"figure": share_text(abs(saved)), "label": "smaller" if saved >= 0 else "larger", "note": size},
        {
            "figure": times,
            "label": "as fast" if times == "1.0×" else "faster" if speed > 1 else "the teacher’s speed",
            "note": rate,
        },
        _kept_card(student["top1"], "of the teacher’s next-token choices kept"),
        *([] if own else kept),
    ]


def _cards_of_text(before: Json, student: Json, tasks: Json | None) -> list[Json]:
    """The headline figures that do not need the teacher's weights."""
    (bits, ends), (untrained, _) = (interval_text(model["bits_per_byte"], ".2f") for model in (student, before))
    length = {
        "figure": bits,
        "label": "bits per byte of the teacher’s text",
        "note": f"95% CI {ends}; {untrained} before training",
    }
    size = f"{megabytes(student['bytes'])}, {tokens_per_second(student)} tokens/s"
    return [
        length,
        _kept_card(student["written"], "of the teacher’s tokens are its first choice"),
        *([_kept_card(tasks["together"]["models"]["student"], "on the tasks")] if tasks else []),
        {"figure": parameters(student["parameters"]), "label": "parameters", "note": size},
    ]


def _kept_card(share: Json, label: str) -> Json:
    mean, ends = share_interval_text(share)
    return {"figure": f"{mean}%", "label": label, "note": f"95% CI {ends}"}


def exports(experiment: Experiment) -> list[Json]:
    """The formats that `export` has written, each with its loss of fidelity and, if it was served, its cost."""
    found = read_json(experiment.directory("export") / "export.json")
    if not found:
        return []
    served = {entry["name"]: entry for entry in (found.get("serving") or {}).get("models", [])}
    return [{**made, "served": served.get(made["name"])} for made in found["formats"]]


_DRAFTS = {
    "sampled": "sampled drafts",
    "greedy": "greedy drafts",
    "temperature_0": "temperature 0",
    "unweighted": "sampled drafts, q not kept",
}


def draft_of(experiment: Experiment, teacher: str, student: Json) -> Json | None:
    """The student as a draft model in speculative decoding, and how to serve it where that is faster."""
    draft = student.get("draft")
    if draft is None:
        return None
    best, modes = drafts.best_cycles(draft), [draft[mode] for mode in _DRAFTS]
    faster = next((cycle for cycle in best if cycle["speed_up"]["low"] > 1), None)
    revision = experiment.teacher.revision
    return {
        "labels": list(_DRAFTS.values()),
        "cycles": list(zip(*(mode["cycles"] for mode in modes[:3]), strict=True)),  # vLLM supports these
        "acceptance": [mode["acceptance"] for mode in modes],
        "by_position": list(zip(*(mode["by_position"] for mode in modes), strict=True)),
        "cost": draft.get("cost"),
        "advice": [drafts.advice(cycle) for cycle in best],
        "command": faster and drafts.serve_command(teacher, revision, student["path"], faster),
    }


def profiles(models: dict[str, Json]) -> Json:
    """KL by position and by the teacher's entropy, for every model but the teacher, as figures."""
    found = {}
    for by in ("position", "entropy"):
        begins = sorted({group["from"] for model in models.values() for group in model.get(f"kl_by_{by}", [])})
        names = [f"{begin:g}–" for begin in begins]
        curves = {
            name: [{"group": begins.index(group["from"]), **group} for group in model.get(f"kl_by_{by}", [])]
            for name, model in models.items()
            if name != "teacher"
        }
        found[by] = group_plot(curves, names) if begins else None
    return found


def sizes(models: dict[str, Json]) -> Json | None:
    """Size against agreement with the teacher, as a figure."""
    return size_plot([(name, (model["bytes"] or 0) / 1e6, percent(model["top1"])) for name, model in models.items()])


def measures(models: list[Json], shown: Sequence[Metric] = ()) -> Iterator[Json]:
    """A row for each further metric, with each model's interval, if any model has it."""
    rows = [(metric, [model.get(metric.name) for model in models]) for metric in metrics_of("measures") if metric not in shown]
    rows += [(metric, [(model.get("own_text") or {}).get(metric.name) for model in models]) for metric in OWN_TEXT_METRICS]
    for metric, values in rows:
        if any(values):
            yield {"name": metric.label, "unit": metric.heading, "factor": metric.factor, "values": values}
