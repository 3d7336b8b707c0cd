"""The pipeline as one Ray job: what is submitted, and its state in the cluster. `ray_driver` is what runs there."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment, dump_experiment
from llmdistill.config.jobs import Ray
from llmdistill.errors import InputError, RemoteError, not_installed
from llmdistill.jobs.backend import Backend, Job
from llmdistill.jobs.commands import engine_gpus, of_stage
from llmdistill.stages.table import STAGES
from llmdistill.workflow.plan import StageRun

_FILE = "ray.yaml"


class _Ray:
    over = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})
    same_files = True

    def render(self, experiment: Experiment, settings: Ray, stages: Sequence[StageRun]) -> dict[str, str]:
        """The command of the job, for a shell on the cluster's head, and the configuration; its nodes share this directory."""
        command = shlex.join(["python", "-m", "llmdistill.jobs.ray_driver", f"{experiment.output}/jobs/{_FILE}"])
        return {"ray.sh": f"cd {shlex.quote(str(Path.cwd()))} && exec {command}\n", _FILE: dump_experiment(experiment)}

    def submit(
        self, experiment: Experiment, settings: Ray, stages: Sequence[StageRun], files: Mapping[str, Path]
    ) -> Iterator[Job]:
        """Submit the job to the cluster."""
        job = str(_asked(settings.address, "submit_job", entrypoint=files["ray.sh"].read_text().strip()))
        yield {"stage": "run", "job": job, "address": settings.address or ""}

    def states(self, jobs: Sequence[Job]) -> list[list[str]]:
        """The state of each job: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        return [[str(state.value)] if (state := _of(job, "get_job_status")) else [] for job in jobs]

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Stop the job."""
        for job in jobs:
            _of(job, "stop_job")


BACKEND: Backend[Ray] = _Ray()


def resources(settings: Ray, stage: StageRun) -> dict[str, float]:
    """The resources of an actor or a task of a stage, as Ray options."""
    asked = of_stage(settings, stage.command)
    gpus = asked.gpus
    if gpus is None:
        gpus = engine_gpus(stage) if STAGES[stage.command].uses_model else 0
    return {"num_gpus": gpus, "num_cpus": 1 if asked.cpus is None else asked.cpus}


def launcher(settings: Ray, stage: StageRun) -> list[str]:
    """The launcher of a stage: torchrun for training on more than one GPU."""
    gpus = int(resources(settings, stage)["num_gpus"])
    if stage.command == "train" and gpus > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m", "llmdistill"]
    return [sys.executable, "-m", "llmdistill"]


def _client(address: str | None) -> Any:
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise not_installed("jobs.ray", "Ray", "ray") from None
    try:
        return JobSubmissionClient(address or None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        said = f"jobs.ray.address: no Ray cluster accepts jobs at {address or 'RAY_API_SERVER_ADDRESS'}: {error}"
        raise (RemoteError if isinstance(error, ConnectionError) else InputError)(said) from None


def _of(job: Job, what: str) -> Any:
    """The answer of the cluster about a job; None if it does not know the job."""
    try:
        return _asked(job["address"], what, job["job"])
    except RemoteError as error:
        if "does not exist" in str(error):  # the cluster has been restarted
            return None
        raise


def _asked(address: str | None, what: str, *args: str, **kwargs: str) -> Any:
    """What a method of the cluster's client returns.

    Raises:
        RemoteError: the cluster refuses, or does not answer any more.
    """
    try:
        return getattr(_client(address), what)(*args, **kwargs)
    except (RuntimeError, OSError) as error:
        raise RemoteError(f"Ray: {error}") from None
