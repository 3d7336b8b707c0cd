"""Comparison for each of the user's own tasks, from the teacher to the served formats, by score, speed and cost."""

from typing import Any

from llmdistill.evaluation.report.words import LABELS

Json = dict[str, Any]

_ORDER = ("teacher", "student before", "student, examples only", "student, text only", "student, first round", "student")


def worth(tasks: Json | None, models: dict[str, Json], exports: list[Json], price: float | None) -> dict[str, Json]:
    """The tables by task: `rows`, and the number of `timed` requests, 0 if none.

    Args:
        tasks: from `metrics.json`.
        models: the models by name, with their speeds.
        exports: from `export.json`, each with its cost in vLLM if it was `served`.
        price: price of the machine per hour.
    """
    found: dict[str, Json] = {}
    for task in (tasks or {"tasks": []})["tasks"]:
        if "valid" not in task:
            continue
        rows = [_of_model(task, models[name], price) for name in _ORDER if name in task["models"]]
        rows += [row for made in exports if (row := _of_export(task["name"], made, price))]
        timed = next((row["requests"]["count"] for row in rows if row["requests"]), 0)
        found[task["name"]] = {"rows": rows, "timed": timed, "priced": bool(timed) and price is not None}
    return found


def _of_model(task: Json, model: Json, price: float | None) -> Json:
    name = model["name"]
    figures = model.get("requests", {}).get(task["name"])
    return {
        "label": LABELS.get(name, name),
        "chosen": name == "student",
        "score": task["models"][name],
        "kept": (task.get("kept_by_model") or {}).get(name),
        "bytes": model["bytes"],
        **_costs(figures, price),
    }


def _of_export(task: str, made: Json, price: float | None) -> Json | None:
    """None for a format that has not been evaluated on the task."""
    entry = next((entry for entry in made.get("tasks", {"tasks": []})["tasks"] if entry["name"] == task), None)
    if entry is None:
        return None
    figures = (made["served"] or {}).get("requests", {}).get(task)
    return {
        "label": f"exported as {made['name']}",
        "chosen": False,
        "score": entry["models"]["student"],
        "kept": entry["kept"],
        "bytes": made["bytes"],
        **_costs(figures, price),
    }


def _costs(figures: Json | None, price: float | None) -> Json:
    """Add the price of a million requests on a machine that is never idle."""
    cost = price / 3600 * 1e6 / figures["per_s"] if figures and price is not None else None
    return {"requests": figures, "cost": cost}
