"""Results on tasks."""

from collections.abc import Iterator
from typing import Any

from llmdistill.evaluation.plots import interval_plot, share_plot
from llmdistill.evaluation.report.words import percent
from llmdistill.evaluation.statistics import interval_text
from llmdistill.evaluation.summary import task_verdict

Json = dict[str, Any]


def task_verdicts(tasks: Json | None) -> list[Json]:
    """For each of the user's own tasks, the share of the teacher's score; `worse` links to the items that are worse."""
    own = [task for task in (tasks or {"tasks": []})["tasks"] if "valid" in task]
    return [
        {
            "text": f"The student {task_verdict(task)}.",
            "worse": f"worse-{number}" if task.get("apart", {"worse": 0})["worse"] else None,
        }
        for number, task in enumerate(own, start=1)
    ]


def task_warnings(tasks: Json | None) -> list[str]:
    """Warnings of `eval` about single tasks; those about all tasks are below their table."""
    return [f"{task['name']}: {task['warning']}" for task in (tasks or {"tasks": []})["tasks"] if task.get("warning")]


def task_plots(tasks: Json | None) -> Iterator[Json]:
    """Differences of the student from the teacher or, without it, from itself before, and from the student of the text only."""
    for rival in (rival_of(tasks), "student, text only") if tasks else ():
        rows = []
        for entry in [*tasks["tasks"], {"name": "all together", **tasks["together"]}] if tasks else []:
            rows += [(entry["name"], percent(found)) for found in entry["differences"] if found["against"] == rival]
        if plot := interval_plot(rows, with_zero=True):
            yield {"rival": rival, "plot": plot}


def rival_of(tasks: Json) -> str:
    """The model that the student is tested against on tasks."""
    return "teacher" if "teacher" in tasks["together"]["models"] else "student before"


def cascades(tasks: Json | None) -> dict[str, Json]:
    """When to ask the teacher, by the name of the task: a description and a figure."""
    found = {task["name"]: task["cascade"] for task in (tasks or {"tasks": []})["tasks"] if "cascade" in task}
    return {name: {**cascade, "said": _said(cascade), "plot": _curves(cascade)} for name, cascade in found.items()}


def _said(cascade: Json) -> list[str]:
    """The highest agreement that was shown, and those for which there are too few items."""
    share, ends = interval_text(cascade["agreement"], ".1f", 100)
    said = [f"Alone, the student gives the teacher’s answer on {share}% of the items (95% CI {ends})."]
    shown = [entry for entry in cascade["thresholds"] if entry["shown"]]
    if shown:
        best = shown[-1]
        share, ends = interval_text(best["answered"], ".0f", 100)
        said.append(
            "If the teacher is asked wherever the student’s confidence is below the threshold, "
            f"the student answers {share}% of the requests (95% CI {ends}), and the answers are the teacher’s on at least "
            f"{best['target']:.0%} of all requests ({best['level']:.0%} confidence; {best['agreement']:.1%} on these items)."
        )
    missing = [entry for entry in cascade["thresholds"] if not entry["shown"]]
    if missing:
        sizes = f", of up to {cascade['largest_cluster']} rows each," if cascade["largest_cluster"] > 1 else ""
        few = ", ".join(f"{entry['target']:.0%} takes {entry['items_needed'] or 'far more'}" for entry in missing)
        said.append(
            f"{cascade['clusters']} independent items{sizes} are too few to show a higher agreement, "
            f"even without one disagreement: {few}."
        )
    return said


def _curves(cascade: Json) -> Json:
    """Agreement and score by the share that the student answers, starting from none, where the teacher answers all."""
    points = [cascade["none"], *cascade["curve"]]
    curves = {
        name: [(100 * point["answered"], 100 * point[key]) for point in points]
        for name, key in (("the teacher’s answers", "agreement"), ("right answers", "score"))
    }
    marks = [
        (100 * entry["answered"]["mean"], f"{entry['target']:.0%}")
        for entry in cascade["thresholds"]
        if entry["threshold"] is not None
    ]
    near = [min(points, key=lambda point: abs(point["answered"] - share / 4)) for share in range(1, 5)]
    told = "; ".join(f"{p['answered']:.0%}: {p['agreement']:.1%} and {p['score']:.1%}" for p in near)
    return {**share_plot(curves, marks), "told": told}
