"""Where the student comes from: the training, the rows, and the record of every stage."""

import math
from itertools import groupby
from typing import Any

from llmdistill.config import Experiment
from llmdistill.data.budget import money
from llmdistill.data.cards import describe_targets
from llmdistill.data.manifest import MANIFEST
from llmdistill.evaluation.plots import Point, loss_plot
from llmdistill.runs.files import read_json
from llmdistill.runs.record import read_run
from llmdistill.students.sides import training_dataset

Json = dict[str, Any]


def training(experiment: Experiment) -> Json:
    """Loss curves of the trained students, and the missing logs."""
    curves: dict[str, list[Json]] = {}
    for name, directory in (
        ("student", experiment.directory("student")),
        ("student, text only", experiment.directory("student-text-only")),
        ("student, examples only", experiment.directory("student-examples")),
    ):
        state = read_json(directory / "trainer_state.json")
        if state is not None:
            curves[name] = [entry for entry in state["log_history"] if "step" in entry and "ce" in entry]
    return {
        "missing": None if "student" in curves else str(experiment.directory("student") / "trainer_state.json"),
        "steps": {name: int(entries[-1]["step"]) for name, entries in curves.items() if entries},
        "last": {name: {key: entries[-1].get(key) for key in ("kl", "ce")} for name, entries in curves.items() if entries},
        "plots": {key: loss_plot({name: _points(entries, key) for name, entries in curves.items()}) for key in ("kl", "ce")},
        "not_finite": sum(
            not math.isfinite(entry[key])
            for entries in curves.values()
            for entry in entries
            for key in ("kl", "ce")
            if key in entry
        ),
    }


def _points(entries: list[Json], key: str) -> list[Point]:
    return [(entry["step"], entry[key]) for entry in entries if key in entry and math.isfinite(entry[key])]


def data_of(experiment: Experiment) -> Json:
    """From the rows that the teacher wrote, or scored if there is a `text_from`, to those trained on, as a waterfall."""
    file = training_dataset(experiment) / MANIFEST
    manifest = read_json(file)
    if manifest is None:
        return {"missing": str(file), "text_from": None}
    splits = {
        split: {key: sum(shard[key] for shard in manifest["shards"] if shard["split"] == split) for key in ("rows", "tokens")}
        for split in ("train", "test")
    }
    rows_in = manifest.get("rows_in", splits["train"]["rows"] + splits["test"]["rows"])
    by = "scored" if manifest.get("text_from") else "written"
    steps = [{"label": f"{by} by the teacher", "kind": "in", "rows": rows_in, "from": 0}]
    for step in manifest.get("steps", []):
        name, rejected, failed = step["name"].replace("_", " "), step["rejected"], step["failed"]
        steps.append({"label": f"rejected by {name}", "kind": "out", "rows": rejected, "from": step["kept"] + failed})
        if failed:
            steps.append({"label": f"failed in {name}", "kind": "out", "rows": failed, "from": step["kept"]})
    steps.append({"label": "trained on", "kind": "train", "from": 0, **splits["train"]})
    steps.append({"label": "held out", "kind": "test", "from": splits["train"]["rows"], **splits["test"]})
    for step in steps:
        step["left_percent"], step["width_percent"] = (round(100 * step[key] / (rows_in or 1), 2) for key in ("from", "rows"))
        step["rest_percent"] = step["left_percent"] if step["kind"] == "out" else 0
    described = {
        "teacher": manifest["teacher"],
        "text_from": manifest.get("text_from"),
        "sampling": manifest["sampling"],
        "targets": describe_targets(manifest),
    }
    described["cost"] = cost_text(manifest.get("cost", {}), splits["train"]["rows"] + splits["test"]["rows"])
    made = manifest.get("prompts", [])
    return {"missing": None, "steps": steps, "prompts": made if len(made) > 1 else [], **described}


def cost_text(cost: Json, kept: int) -> str | None:
    """The amount paid for the teacher's endpoint, in words; None if it is not billed."""
    if not cost:
        return None
    tokens = f"{cost['input_tokens']:,} tokens in, {cost['output_tokens']:,} out"
    if "paid" not in cost:
        return tokens
    return f"{money(cost['paid'])} for {tokens}: {money(cost['paid'] / max(kept, 1))} a kept row"


def lineage(experiment: Experiment) -> Json:
    """Each stage's `run.json`, and the versions, listed once if all stages agree."""
    stages: list[Json] = []
    for directory in dict.fromkeys(
        (
            experiment.directory("prompts"),
            experiment.directory("data"),
            experiment.dataset_directory,
            training_dataset(experiment),
            experiment.directory("student"),
            experiment.directory("student-text-only"),
            experiment.directory("student-examples"),
            experiment.directory("eval"),
            experiment.directory("export"),
        )
    ):
        run = read_run(directory)
        if run is not None or directory.name not in ("prompts", "student-text-only", "student-examples", "export"):
            stages.append({"directory": str(directory), "name": directory.name, "run": run})
    found = sorted(
        {
            (package, version, stage["name"])
            for stage in stages
            if stage["run"]
            for made in (stage["run"], *stage["run"].get("earlier", []))
            for package, version in made["versions"].items()
        }
    )
    versions: dict[str, Json] = {}
    for (package, version), uses in groupby(found, key=lambda use: use[:2]):
        versions.setdefault(package, {})[version] = [directory for _, _, directory in uses]
    return {"stages": stages, "versions": versions}
