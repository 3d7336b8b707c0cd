"""A `metrics.json` in a few lines: its headline, and the last output of `eval`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.evaluation import drafts
from llmdistill.evaluation.metrics import has_teacher
from llmdistill.evaluation.routes import lines
from llmdistill.evaluation.statistics import interval_text, nats_text, share_interval_text, share_text, times_text

Json = dict[str, Any]


def exported_model(experiment: Experiment) -> str:
    """The model whose forms `export` writes and compares: the run's student, or the model of `export.model`."""
    model = experiment.export.model if experiment.export else None
    return "the student" if model is None or Path(model) == experiment.directory("student") else model


def headline(models: list[Json], engine: str, tasks: Json | None = None) -> str:
    """One line: how much smaller and faster the student is, and what it keeps, or how it predicts the teacher's text."""
    if not has_teacher(models):
        return _headline_of_text(models, tasks)
    by_name = {model["name"]: model for model in models}
    teacher, student = by_name["teacher"], by_name["student"]
    smaller = 1 - student["parameters"] / teacher["parameters"]
    faster = student["decode_tokens_per_s"] / teacher["decode_tokens_per_s"]
    where = " in vLLM" if engine == "vllm" else ""
    size = f"{share_text(abs(smaller))} {'smaller' if smaller > 0 else 'larger'}" if smaller else "same size"
    speed = times_text(faster)
    speed += " as fast" if speed == "1.0×" else " faster" if faster > 1 else " the speed"
    keeps = "keeps " + _share(student["top1"], "the teacher's next-token choices")
    if tasks and tasks["together"]["kept"]:
        keeps += f" and {_share(tasks['together']['kept'], 'its task score')}"
    return f"{size} · {speed}{where} · {keeps}"


def task_verdict(task: Json) -> str:
    """What a student keeps of the teacher on one of the user's own tasks, or its score if there is no such share."""
    worse = ""
    if apart := task.get("apart"):
        worse = f"; {apart['worse']:,} of {task['items']:,} items are worse, {apart['better']:,} better"
    if task["kept"]:
        mean, ends = interval_text(task["kept"], ".1f", 100)
        return f"keeps {mean}% (95% CI {ends}) of the teacher on {task['name']}{worse}"
    mean, ends = interval_text(task["models"]["student"], ".1f", 100)
    return f"scores {mean}% (95% CI {ends}) on {task['name']}{worse}"


def task_lines(tasks: Json) -> Iterator[str]:
    """A line for each of the user's own tasks: the share of the teacher's score, and when the student may answer."""
    for task in tasks["tasks"]:
        if "valid" not in task:
            continue
        said = task_verdict(task)
        shown = [entry for entry in task.get("cascade", {"thresholds": []})["thresholds"] if entry["shown"]]
        if shown:
            mean, ends = interval_text(shown[-1]["answered"], ".0f", 100)
            said += f"; at {shown[-1]['target']:.0%} agreement it answers {mean}% of requests itself (95% CI {ends})"
        yield said


def _headline_of_text(models: list[Json], tasks: Json | None) -> str:
    by_name = {model["name"]: model for model in models}
    (bits, ends), (before, _) = (interval_text(by_name[name]["bits_per_byte"], ".2f") for name in ("student", "student before"))
    said = [f"{bits} bits per byte of the teacher's text (95% CI {ends}), {before} before training"]
    said.append(_share(by_name["student"]["written"], "its tokens are the student's first choice"))
    if tasks:
        mean, ends = share_interval_text(tasks["together"]["models"]["student"])
        said.append(f"{mean}% on the tasks (95% CI {ends})")
    return " · ".join(said)


def _share(kept: dict[str, float], of: str) -> str:
    mean, ends = share_interval_text(kept)
    return f"{mean}% of {of} (95% CI {ends})"


def final_lines(metrics: Json) -> Iterator[tuple[str, str]]:
    """The last output, each line with its label; the report has all of it."""
    yield "eval", _summary(metrics)
    yield from (("eval", line) for line in lines(metrics.get("teachers", [])))
    student = next(model for model in metrics["models"] if model["name"] == "student")
    if "draft" in student:
        yield from (("eval", drafts.advice(best)) for best in drafts.best_cycles(student["draft"]))
    judged = metrics.get("win_rate", {"win_rate": None, "warnings": []})
    if judged["win_rate"]:
        yield "eval", f"the judge prefers the student to the {judged['against']} on {_share(judged['win_rate'], 'prompts')}"
    tasks = metrics.get("tasks", {"tasks": [], "warnings": []})
    warnings = [*metrics["warnings"], *tasks["warnings"]]
    warnings += [entry["warning"] for entry in metrics.get("teachers", []) if entry.get("warning")]
    warnings += [f"{task['name']}: {task['warning']}" for task in tasks["tasks"] if task["warning"]]
    yield from (("warning", text) for text in [*warnings, *judged["warnings"]])
    yield from (("eval", f"the student {line}") for line in task_lines(tasks))


def _summary(metrics: Json) -> str:
    metric, unit = ("kl", "nats from the teacher") if has_teacher(metrics["models"]) else ("nll", "nats per token of its text")
    found = {model["name"]: nats_text(model[metric]) for model in metrics["models"]}
    (student, ends), (untrained, its_ends) = found["student"], found["student before"]
    said = f"student {student} {unit} ({ends}), before {untrained} ({its_ends})"
    if "student, text only" in found:
        text_only, its_ends = found["student, text only"]
        said += f", same steps without soft targets {text_only} ({its_ends})"
    return said
