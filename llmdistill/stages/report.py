"""`llmdistill report`: one page with what was made, from what, and how good it is, for readers."""

from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.errors import InputError
from llmdistill.evaluation.metrics import first_table
from llmdistill.evaluation.picture import picture
from llmdistill.evaluation.plots import interval_plot
from llmdistill.evaluation.report.findings import (
    MISSING,
    NEARNESS,
    cautions,
    classes_text,
    findings,
    of_sampling,
    of_teachers,
    verdict_of,
)
from llmdistill.evaluation.report.models import cards, draft_of, exports, measures, profiles, sizes
from llmdistill.evaluation.report.provenance import data_of, lineage, training
from llmdistill.evaluation.report.tasks import cascades, rival_of, task_plots, task_verdicts, task_warnings
from llmdistill.evaluation.report.texts import largest_change, view_of_tokens
from llmdistill.evaluation.report.words import LABELS, template_environment
from llmdistill.evaluation.report.worth import worth
from llmdistill.evaluation.summary import exported_model
from llmdistill.runs.files import check_shape, read_json, write_bytes, write_text
from llmdistill.runs.progress import console, say

SCHEMA_VERSION = 2
Json = dict[str, Any]


def report(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/report.html`, `report.md` and `report.png`, always anew, as it takes no time and no model.

    Raises:
        InputError: there is no evaluation, or it is of another schema.
    """
    page, text, shared = (Path(experiment.output) / f"report.{form}" for form in ("html", "md", "png"))
    if dry_run:
        return say("report", f"would write {page}, {text} and {shared}")
    view = _view(experiment)
    environment = template_environment()
    for file in (page, text):
        write_text(file, environment.get_template(f"{file.name}.j2").render(view))
    write_bytes(shared, picture(view, LABELS))
    say("report", str(page))
    console.print()
    for line in (view["headline"], *(verdict["text"] for verdict in view["task_verdicts"])):
        console.print(line, markup=False)
    return None


def _name(model: Path) -> str:
    """The title of a model; for a student of another run, that of the run."""
    return model.parent.name if model.name == "student" and model.parent.name else model.name


def _view(experiment: Experiment) -> Json:
    """Everything that the templates show."""
    metrics = read_metrics(experiment.directory("eval") / "metrics.json")
    models: dict[str, Json] = {model["name"]: model for model in metrics["models"]}
    columns, teacher = first_table(metrics), models.get("teacher")
    path = teacher["path"] if teacher else experiment.teacher.model
    forms = exports(experiment)
    near, data = NEARNESS["kl" if teacher else "nll"], data_of(experiment)
    said = [*of_teachers(metrics.get("teachers", [])), *cautions(metrics, models), *([] if teacher else of_sampling(data))]
    return {
        "headline": metrics["headline"],
        "output": experiment.output,
        "models": list(models.values()),
        "teacher": path,
        "teacher_name": _name(Path(path)),
        "missing": None if teacher else MISSING,
        "near": near,
        "held_out": metrics["held_out"],
        "classes": classes_text(metrics["held_out"].get("classes")),
        "decoding": metrics["decoding"],
        "warnings": [*metrics.get("warnings", []), *task_warnings(metrics.get("tasks"))],
        "samples": metrics["samples"],
        "cards": cards(models, metrics.get("tasks")),
        "tasks": metrics.get("tasks"),
        "task_rival": rival_of(metrics["tasks"]) if metrics.get("tasks") else None,
        "task_plots": list(task_plots(metrics.get("tasks"))),
        "task_verdicts": task_verdicts(metrics.get("tasks")),
        "cascades": cascades(metrics.get("tasks")),
        "price": experiment.eval.price_per_hour,
        "worth": worth(metrics.get("tasks"), models, forms, experiment.eval.price_per_hour),
        "change": largest_change(metrics["samples"]),
        "judged": metrics.get("win_rate"),
        "exports": forms,
        "exported": exported_model(experiment),
        "draft": draft_of(experiment, path, models["student"]),
        "profiles": profiles(models),
        "columns": columns,
        "measures": list(measures(metrics["models"], [] if teacher else columns)),
        "own_text": metrics.get("own_text"),
        "sizes": sizes(models) if teacher else None,
        "views": [view_of_tokens(view) for view in metrics["views"]],
        "examples": metrics["examples"],
        "intervals": interval_plot((name, model[near["metric"]]) for name, model in models.items() if name != "teacher"),
        "findings": findings(metrics["differences"]),
        "verdict": verdict_of(metrics["differences"]),
        "cautions": said,
        "training": training(experiment),
        "data": data,
        "lineage": lineage(experiment),
    }


def read_metrics(file: Path) -> Json:
    """The content of a `metrics.json`.

    Raises:
        InputError: it is not there, or of another schema.
    """
    metrics: Json | None = read_json(file)
    if metrics is None:
        raise InputError(f"{file} is missing; run `eval` first")
    check_shape(file, metrics, {})
    if metrics.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{file}: schema_version is {metrics.get('schema_version')!r}, this version reads {SCHEMA_VERSION}")
    return metrics
