"""What is shown of tasks."""

from collections.abc import Iterator
from typing import Any

from llmdistill.evaluation.plots import interval_plot
from llmdistill.evaluation.report.words import percent

Json = dict[str, Any]


def task_warnings(tasks: Json | None) -> list[str]:
    """What `eval` has said of single tasks; what it has said of all stands below their table."""
    return [f"{task['name']}: {task['warning']}" for task in (tasks or {"tasks": []})["tasks"] if task.get("warning")]


def task_plots(tasks: Json | None) -> Iterator[Json]:
    """The student's differences to the teacher or, without it, to itself before, and to the student of the text alone."""
    for rival in (rival_of(tasks), "student, text only") if tasks else ():
        rows = []
        for entry in [*tasks["tasks"], {"name": "all together", **tasks["together"]}] if tasks else []:
            rows += [(entry["name"], percent(found)) for found in entry["differences"] if found["against"] == rival]
        if plot := interval_plot(rows, with_zero=True):
            yield {"rival": rival, "plot": plot}


def rival_of(tasks: Json) -> str:
    """Whom the student is tested against on tasks."""
    return "teacher" if "teacher" in tasks["together"]["models"] else "student before"
