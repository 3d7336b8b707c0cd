"""Stages as scheduled jobs: `llmdistill submit`, `status` and `cancel`.

The section `jobs` of the configuration defines the backends; each is in the module of its name.
"""

import importlib
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment, dump_experiment
from llmdistill.config.jobs import Jobs, Scheduler
from llmdistill.data.shards import count_shards
from llmdistill.errors import InputError, RemoteError
from llmdistill.jobs.backend import Backend, Job
from llmdistill.jobs.commands import check_gpus, scheduled
from llmdistill.runs.files import check_shape, read_json, write_json, write_text
from llmdistill.runs.progress import console, counted, say
from llmdistill.stages.table import STAGES
from llmdistill.workflow.checks import check_held_out, check_inputs, check_stale, missing_stages
from llmdistill.workflow.plan import stages
from llmdistill.workflow.status import how_far, known

BACKENDS = tuple(Jobs.model_fields)
WHOLE = "run"  # the `stage` of a job that runs all of them
_FILE = "jobs.json"


def backend_of(name: str) -> Backend[Any]:
    """The backend of that name."""
    found: Backend[Any] = importlib.import_module(f"llmdistill.jobs.{name}").BACKEND
    return found


def submit(experiment: Experiment, dry_run: bool = False) -> None:
    """Submit all stages, each to run after the previous one; those already done by then end immediately.

    Args:
        experiment: the configuration.
        dry_run: print the files and submit nothing.

    Raises:
        InputError: if there is no section `jobs`, the input of a stage is unusable, jobs of an earlier submission are still
            waiting or running, or the jobs are refused.
        RemoteError: if the scheduler cannot be reached.
    """
    chosen = experiment.jobs and experiment.jobs.chosen
    if not chosen:
        raise InputError(f"the key jobs.{' or jobs.'.join(BACKENDS)} is missing: `submit` needs a scheduler")
    name, settings = chosen
    backend, directory = backend_of(name), Path(experiment.output) / "jobs"
    if backend.same_files:
        check_inputs(experiment, here=False)
        _check_first(experiment, settings)
    stages = scheduled(experiment, settings)
    check_gpus(name, settings, stages)
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
    was_there = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in (texts | configurations).items():
        write_text(directory / file, text)
    submitted: list[Job] = []
    try:
        for job in backend.submit(experiment, settings, stages, {file: directory / file for file in texts}):
            submitted.append(job)
            write_json(directory / _FILE, {"backend": name, "jobs": submitted})
            say("submit", f"{job['stage']} is job {job['job']}")
    except (InputError, RemoteError):
        if submitted:
            backend.cancel(submitted)  # half a pipeline is useless
        elif not was_there:
            shutil.rmtree(directory)
            with suppress(OSError):  # other files are in it
                directory.parent.rmdir()
        raise
    say("submit", f"the job files are in {directory}; `llmdistill status {experiment.output}` shows the progress")


def _check_first(experiment: Experiment, settings: Scheduler[Any]) -> None:
    """Check the input of the first stage and the launcher, that no split will be empty, and the settings of existing work.

    Raises:
        InputError: names the file and the key.
    """
    for one in (settings, *settings.stages.values()):
        file = getattr(one, "accelerate", None)
        if file and not Path(file).is_file():
            raise InputError(f"{file}: no such file (accelerate)")
    check_stale(experiment)
    first = stages(experiment)[0]
    STAGES[first.command].claims(first.experiment)
    if experiment.prompts is not None:
        missing = missing_stages(experiment)
        prepared = check_held_out(experiment, missing)
        if prepared is not None and any(stage.command == "generate" for stage in missing):
            _warn_of_idle_workers(experiment, settings.workers, len(prepared.prompts))


def _warn_of_idle_workers(experiment: Experiment, workers: int, prompts: int) -> None:
    """Warn if `generate` has fewer shards than workers; with several teachers it may have a few more than counted here."""
    shards = count_shards(experiment, [prompts * experiment.generate.samples])
    if shards < workers:
        say(
            "warning",
            f"generate has {counted(shards, 'shard')} for {workers:,} workers, so some will be idle; lower "
            "generate.rows_per_shard or workers, or add prompts",
        )


def status(output: Path) -> None:
    """Print for each stage what is done, waiting, running or failed, even if stages were started by hand.

    Raises:
        InputError: if nothing was submitted there, and nothing has started.
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
    """Cancel waiting and running jobs.

    Raises:
        InputError: if nothing was submitted there.
    """
    backend, _ = _jobs(output / "jobs")
    alive = _alive(output / "jobs")
    if alive:
        backend.cancel(alive)
    said = ", ".join(f"{job['stage']} ({job['job']})" for job in alive) or "nothing to cancel, all jobs have ended"
    say("cancel", said)


def _jobs(directory: Path) -> tuple[Backend[Any], list[Job]]:
    found: dict[str, Any] | None = read_json(directory / _FILE)
    if found is None:
        raise InputError(f"{directory / _FILE} does not exist: no job was submitted with this output")
    found = check_shape(directory / _FILE, found, {"backend": str, "jobs": list})
    for number, job in enumerate(found["jobs"]):
        check_shape(directory / _FILE, job, {"stage": str, "job": str}, f"jobs.{number}")
    return backend_of(found["backend"]), list(found["jobs"])


def _alive(directory: Path) -> list[Job]:
    if not (directory / _FILE).exists():
        return []
    backend, jobs = _jobs(directory)
    return [
        job for job, states in zip(jobs, backend.states(jobs), strict=True) if any(state not in backend.over for state in states)
    ]
