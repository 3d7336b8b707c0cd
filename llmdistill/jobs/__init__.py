"""Stages as scheduled jobs: `llmdistill submit`, `status` and `cancel`.

Which backends there are is said by the section `jobs` of the configuration; each is in the module of its name.
"""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment, dump_experiment
from llmdistill.config.jobs import Jobs
from llmdistill.errors import InputError
from llmdistill.jobs.backend import Backend, Job
from llmdistill.jobs.commands import scheduled
from llmdistill.runs import record
from llmdistill.runs.progress import console, say
from llmdistill.runs.status import how_far, known

BACKENDS = tuple(Jobs.model_fields)
WHOLE = "run"  # the `stage` of a job that is all of them
_FILE = "jobs.json"


def backend_of(name: str) -> Backend[Any]:
    """The backend of that name."""
    found: Backend[Any] = importlib.import_module(f"llmdistill.jobs.{name}").BACKEND
    return found


def submit(experiment: Experiment, dry_run: bool = False) -> None:
    """Submit all stages, each to run after the one before it; what is done by then ends at once.

    Args:
        experiment: the configuration.
        dry_run: print the files and submit nothing.

    Raises:
        InputError: there is no section `jobs`, or jobs of an earlier submission still wait or run.
    """
    chosen = experiment.jobs and experiment.jobs.chosen
    if not chosen:
        raise InputError(f"the key jobs.{' or jobs.'.join(BACKENDS)} is missing: `submit` needs a scheduler")
    name, settings = chosen
    backend, directory = backend_of(name), Path(experiment.output) / "jobs"
    stages = scheduled(experiment, settings)
    texts = backend.render(experiment, settings, stages)
    configurations = {f"{stage.name}.yaml": dump_experiment(stage.experiment) for stage in stages}
    if dry_run:
        for file, text in (texts | configurations).items():
            console.print(f"── {directory / file}", markup=False)
            print(text)
        return
    if alive := [job["stage"] for job in _alive(directory)]:
        raise InputError(
            f"{directory}: {', '.join(alive)} of an earlier submission are still queued or running; `cancel` them first"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in (texts | configurations).items():
        record.write_text(directory / file, text)
    submitted: list[Job] = []
    try:
        for job in backend.submit(experiment, settings, stages, {file: directory / file for file in texts}):
            submitted.append(job)
            record.write_json(directory / _FILE, {"backend": name, "jobs": submitted})
            say("submit", f"{job['stage']} is job {job['job']}")
    except InputError:
        if submitted:
            backend.cancel(submitted)  # half a pipeline is of no use
        raise
    say("submit", f"the job files are in {directory}; `llmdistill status {experiment.output}` shows the progress")


def status(output: Path) -> None:
    """Print for each stage what is done, waiting, running or failed, also where stages were started by hand.

    Raises:
        InputError: nothing was submitted there, and nothing has begun.
    """
    if not (output / "jobs" / _FILE).exists() and (names := known(output)):
        return _say_stages(output, names)
    backend, jobs = _jobs(output / "jobs")
    for job, states in zip(jobs, backend.states(jobs), strict=True):
        counts = ", ".join(f"{number} {state.lower()}" for state, number in sorted(Counter(states).items()))
        if backend.same_files:
            left = how_far(output, job["stage"]) if job["stage"] != WHOLE else ""
        else:
            left = "" if counts else "unknown to the scheduler"
        say(job["stage"], f"job {job['job']}: {'; '.join(part for part in (counts, left) if part)}")
    if any(job["stage"] == WHOLE for job in jobs) and backend.same_files:
        _say_stages(output, known(output))
    return None


def _say_stages(output: Path, names: list[str]) -> None:
    for name in names:
        say(name, how_far(output, name))


def cancel(output: Path) -> None:
    """End what waits or runs.

    Raises:
        InputError: nothing was submitted there.
    """
    backend, _ = _jobs(output / "jobs")
    alive = _alive(output / "jobs")
    if alive:
        backend.cancel(alive)
    said = ", ".join(f"{job['stage']} ({job['job']})" for job in alive) or "nothing to cancel, all jobs have ended"
    say("cancel", said)


def _jobs(directory: Path) -> tuple[Backend[Any], list[Job]]:
    found: dict[str, Any] | None = record.read_json(directory / _FILE)
    if found is None:
        raise InputError(f"{directory / _FILE} does not exist: no job was submitted and no stage was started with this output")
    found = record.check_shape(directory / _FILE, found, {"backend": str, "jobs": list})
    for number, job in enumerate(found["jobs"]):
        record.check_shape(directory / _FILE, job, {"stage": str, "job": str}, f"jobs.{number}")
    return backend_of(found["backend"]), list(found["jobs"])


def _alive(directory: Path) -> list[Job]:
    if not (directory / _FILE).exists():
        return []
    backend, jobs = _jobs(directory)
    return [
        job for job, states in zip(jobs, backend.states(jobs), strict=True) if any(state not in backend.over for state in states)
    ]
