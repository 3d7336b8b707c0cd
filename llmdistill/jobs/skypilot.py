"""Stages as one managed job of SkyPilot: a pipeline of tasks on machines of their own, found again when they are taken away."""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.jobs import SkyPilot
from llmdistill.errors import InputError
from llmdistill.jobs.commands import SHARED, Job, ask, below, completed, documents, launched, of_stage, run_name, stages_elsewhere
from llmdistill.runs.pipeline import StageRun, stages

OVER = {"SUCCEEDED", "CANCELLED", "FAILED", "FAILED_SETUP", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE", "FAILED_CONTROLLER"}
SAME_FILES = False
_FIRST = '$(echo "$SKYPILOT_NODE_IPS" | head -n 1)'


def render(experiment: Experiment, settings: SkyPilot, arguments: Sequence[str]) -> dict[str, str]:
    """The pipeline: a head with its name, and a task a stage, which SkyPilot runs one after the other.

    Args:
        experiment: the configuration.
        settings: its `jobs.skypilot`.
        arguments: the configuration file and the overrides, as they were typed.

    Raises:
        InputError: the configuration does not lie below the working directory, which the machines get a copy of.
    """
    there = Path.cwd()
    todo = stages_elsewhere(experiment, settings.mount, [below(arguments[0], there), *arguments[1:]])
    tasks = [_task(settings, todo, number, there) for number in range(len(todo))]
    return {"skypilot.yaml": documents([{"name": run_name(experiment.output)}, *tasks])}


def _task(settings: SkyPilot, todo: list[tuple[StageRun, list[str]]], number: int, there: Path) -> dict[str, Any]:
    stage = todo[number][0]
    asked = of_stage(settings, stage.command)
    nodes = settings.workers if stage.command in SHARED else (asked.nodes or 1) if stage.command == "train" else 1
    resources = {
        "infra": asked.infra,
        "accelerators": f"{asked.accelerator}:{asked.gpus}" if asked.gpus else None,
        "cpus": f"{asked.cpus}+" if asked.cpus else None,
        "memory": f"{asked.memory.rstrip('G')}+" if asked.memory else None,
        "use_spot": asked.spot,
        "image_id": settings.image,
        # 143 is what a stage ends with when it was told to stop: that is no fault of it.
        "job_recovery": {"max_restarts_on_errors": settings.retries, "recover_on_exit_codes": [143]},
    }
    task: dict[str, Any] = {
        "name": stage.name,
        "workdir": str(there),
        "num_nodes": nodes,
        "resources": {name: value for name, value in resources.items() if value is not None},
        "file_mounts": {settings.mount: {"source": settings.bucket, "mode": "MOUNT"}},
    }
    if settings.secrets:
        task["secrets"] = dict.fromkeys(settings.secrets)
    if settings.setup:
        task["setup"] = _lines(settings.setup)
    task["run"] = _lines(
        [*settings.environment, completed(todo, number, settings.workers) + _command(settings, *todo[number], nodes)]
    )
    return task


def _command(settings: SkyPilot, stage: StageRun, words: list[str], nodes: int) -> str:
    """What every machine of a task runs."""
    quoted, gpus = shlex.join([stage.command, *words]), of_stage(settings, stage.command).gpus or 0
    if stage.command == "train" and (nodes > 1 or gpus > 1 or settings.accelerate):
        return launched(settings.accelerate, nodes, gpus, "$SKYPILOT_NODE_RANK", _FIRST, "$SKYPILOT_TASK_ID", quoted)
    if stage.command in SHARED and nodes > 1:
        return f'llmdistill {quoted} --shards "$((SKYPILOT_NODE_RANK + 1))/{nodes}"'
    return f"llmdistill {quoted}"


def _lines(lines: list[str]) -> str:
    return "\n".join([*lines, ""])


def submit(experiment: Experiment, settings: SkyPilot, files: dict[str, Path]) -> Iterator[Job]:
    """Hand the pipeline to `sky jobs launch`.

    Raises:
        InputError: there is no sky, or it refuses.
    """
    name = run_name(experiment.output)
    (file,) = files.values()
    secrets = [word for secret in settings.secrets for word in ("--secret", secret)]
    ask(["sky", "jobs", "launch", "-y", "-d", "-n", name, *secrets, str(file)], "SkyPilot", InputError)
    for stage in stages(experiment):
        yield {"stage": stage.name, "job": name}


def states(jobs: Sequence[Job]) -> list[list[str]]:
    """For each stage the state of its task, as the newest job of that name has it; none where SkyPilot knows no such job."""
    records = json.loads(ask(["sky", "jobs", "queue", "--all", "--output", "json"], "SkyPilot"))
    mine = [record for record in records if record["job_name"] == jobs[0]["job"]]
    newest = max((record["job_id"] for record in mine), default=None)
    state_of = {record["task_name"]: str(record["status"]) for record in mine if record["job_id"] == newest}
    return [[state_of[job["stage"]]] if job["stage"] in state_of else [] for job in jobs]


def cancel(jobs: Sequence[Job]) -> None:
    """End the job that these are stages of; what is in the bucket stays."""
    ask(["sky", "jobs", "cancel", "-y", "-n", jobs[0]["job"]], "SkyPilot")
