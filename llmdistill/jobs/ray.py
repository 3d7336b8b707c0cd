"""The pipeline as one job of Ray: what is submitted, and what the cluster says of it. `ray_driver` is what runs there."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.jobs import Ray
from llmdistill.errors import InputError, RemoteError
from llmdistill.jobs.commands import SHARED, Job, of_stage
from llmdistill.stages.table import STAGES

OVER = {"STOPPED", "SUCCEEDED", "FAILED"}
SAME_FILES = True


def resources(settings: Ray, command: str, experiment: Experiment | None) -> dict[str, float]:
    """What an actor or a task of a stage asks for, as options of Ray."""
    asked = of_stage(settings, command)
    gpus = asked.gpus
    if gpus is None:
        gpus = experiment.teacher.tensor_parallel_size if experiment and command in SHARED else 1
        if command in STAGES and not STAGES[command].uses_model:
            gpus = 0
    return {"num_gpus": gpus, "num_cpus": 1 if asked.cpus is None else asked.cpus}


def launcher(settings: Ray, command: str) -> list[str]:
    """What starts a stage: training on more than one GPU by torchrun."""
    gpus = int(resources(settings, command, None)["num_gpus"])
    if command == "train" and gpus > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m", "llmdistill"]
    return [sys.executable, "-m", "llmdistill"]


def render(experiment: Experiment, settings: Ray, arguments: Sequence[str]) -> dict[str, str]:
    """The command of the job, for a shell on the cluster's head; its nodes see this directory, too.

    Args:
        experiment: the configuration.
        settings: its `jobs.ray`.
        arguments: the configuration file and the overrides, as they were typed.
    """
    command = f"python -m llmdistill.jobs.ray_driver {shlex.join(arguments)}"
    return {"ray.sh": f"cd {shlex.quote(str(Path.cwd()))} && exec {command}\n"}


def submit(experiment: Experiment, settings: Ray, files: dict[str, Path]) -> Iterator[Job]:
    """Hand the job to the cluster.

    Raises:
        InputError: Ray is not installed, or there is no cluster.
    """
    (file,) = files.values()
    job = str(_client(settings.address).submit_job(entrypoint=file.read_text().strip()))
    yield {"stage": "run", "job": job, "address": settings.address or ""}


def states(jobs: Sequence[Job]) -> list[list[str]]:
    """What the cluster says of each job: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; none of one that it does not know."""
    return [[str(state.value)] if (state := _of(job, "get_job_status")) else [] for job in jobs]


def cancel(jobs: Sequence[Job]) -> None:
    """End a job; what it has finished stays."""
    for job in jobs:
        _of(job, "stop_job")


def _client(address: str | None) -> Any:
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise InputError("jobs.ray needs Ray: pip install 'llmdistill[ray]'") from None
    try:
        return JobSubmissionClient(address or None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"jobs.ray.address: no Ray takes jobs at {address or 'RAY_API_SERVER_ADDRESS'}: {error}") from None


def _of(job: Job, what: str) -> Any:
    try:
        return getattr(_client(job["address"]), what)(job["job"])
    except RuntimeError as error:
        if "does not exist" in str(error):  # the cluster was started anew
            return None
        raise RemoteError(f"Ray: {error}") from None
