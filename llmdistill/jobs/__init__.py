"""Stages as scheduled jobs: `llmdistill submit`, `status` and `cancel`."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from llmdistill import stage
from llmdistill.config import Experiment
from llmdistill.errors import InputError
from llmdistill.jobs import slurm
from llmdistill.pipeline import stages
from llmdistill.progress import console, say

_FILE = "jobs.json"
_OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
_DIRECTORIES = {"generate": "data", "score": "data", "curate": "curated", "prune": "student-before", "train": "student"}


def submit(experiment: Experiment, arguments: list[str], dry_run: bool = False) -> None:
    """Submit all stages that are not done, each to run after the one before it.

    Args:
        experiment: the configuration.
        arguments: the configuration file and the overrides, as they were typed.
        dry_run: print the scripts and submit nothing.

    Raises:
        InputError: there is no section `jobs`, or jobs of an earlier submission still wait or run.
    """
    if experiment.jobs is None or experiment.jobs.slurm is None:
        raise InputError("the key jobs.slurm is missing: `submit` needs to know where")
    settings, directory = experiment.jobs.slurm, Path(experiment.output) / "jobs"
    scripts = {stage.name: slurm.script(experiment, settings, stage, arguments, Path.cwd()) for stage in stages(experiment)}
    if dry_run:
        for name, text in scripts.items():
            console.print(f"── {directory / name}.sh", markup=False)
            print(text)
        return
    if alive := [entry["stage"] for entry in _alive(directory)]:
        raise InputError(f"{directory}: {', '.join(alive)} of an earlier submission still wait or run; `cancel` them first")
    directory.mkdir(parents=True, exist_ok=True)
    submitted: list[dict[str, str]] = []
    for name, text in scripts.items():
        file = directory / f"{name}.sh"
        stage.write_text(file, text)
        try:
            job = slurm.submit(file, [entry["job"] for entry in submitted[-1:]])
        except InputError:
            if submitted:
                slurm.cancel([entry["job"] for entry in submitted])  # half a pipeline is of no use
            raise
        submitted.append({"stage": name, "job": job})
        stage.write_json(directory / _FILE, {"backend": "slurm", "jobs": submitted})
        say("submit", f"{name} is job {job}")
    say("submit", f"scripts and logs are in {directory}; `llmdistill status {experiment.output}` says how it goes")


def status(output: Path) -> None:
    """Print for each stage what is done, waiting, running or failed.

    Raises:
        InputError: nothing was submitted there.
    """
    jobs = _jobs(output / "jobs")
    states = slurm.states([entry["job"] for entry in jobs])
    for entry in jobs:
        say(entry["stage"], f"job {entry['job']}: {_describe(output, entry['stage'], states[entry['job']])}")


def cancel(output: Path) -> None:
    """End what waits or runs.

    Raises:
        InputError: nothing was submitted there.
    """
    _jobs(output / "jobs")
    alive = _alive(output / "jobs")
    if alive:
        slurm.cancel([entry["job"] for entry in alive])
    said = ", ".join(f"{entry['stage']} ({entry['job']})" for entry in alive) or "nothing, all jobs are over"
    say("cancel", said)


def _jobs(directory: Path) -> list[dict[str, str]]:
    found: dict[str, Any] | None = stage.read_json(directory / _FILE)
    if found is None:
        raise InputError(f"{directory / _FILE} is not there: nothing was submitted from this output")
    return list(found["jobs"])


def _alive(directory: Path) -> list[dict[str, str]]:
    if not (directory / _FILE).exists():
        return []
    jobs = _jobs(directory)
    states = slurm.states([entry["job"] for entry in jobs])
    return [entry for entry in jobs if any(state not in _OVER for state in states[entry["job"]])]


def _describe(output: Path, name: str, states: list[str]) -> str:
    """What Slurm says of its parts, else what the stage has left behind."""
    if round_of := re.fullmatch(r"round-(\d+)-(\w+)", name):
        number, name = round_of.groups()
        written = "/written" if name == "generate" else ""
        output = output / f"rounds/{number}{written}"
    directory = output / _DIRECTORIES.get(name, name)
    run = stage.read_json(directory / stage.RUN_FILE)
    counts = ", ".join(f"{number} {state.lower()}" for state, number in sorted(Counter(states).items()))
    left = "done" if run and run["status"] == "done" else "not done"
    if name == "report":
        left = "done" if (output / "report.html").exists() else "not done"
    return f"{counts}; {left}" if counts else left
