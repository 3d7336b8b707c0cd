"""Stages as one managed SkyPilot job: a pipeline of tasks on their own machines, which are replaced if preempted."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.jobs import SkyPilot
from llmdistill.errors import InputError
from llmdistill.jobs.backend import Backend, Job
from llmdistill.jobs.commands import ask, completed, documents, launched, of_stage, run_name, words_of
from llmdistill.workflow.plan import StageRun

_FIRST = '$(echo "$SKYPILOT_NODE_IPS" | head -n 1)'
_CONFIGS = "~/llmdistill"  # on the machines


class _SkyPilot:
    over = frozenset(
        {"SUCCEEDED", "CANCELLED", "FAILED", "FAILED_SETUP", "FAILED_PRECHECKS", "FAILED_NO_RESOURCE", "FAILED_CONTROLLER"}
    )
    same_files = False

    def render(self, experiment: Experiment, settings: SkyPilot, stages: Sequence[StageRun]) -> dict[str, str]:
        """The pipeline: a header with its name, and one task per stage, which SkyPilot runs in sequence."""
        directory = Path(experiment.output).absolute() / "jobs"
        tasks = [_task(settings, stages, number, directory) for number in range(len(stages))]
        return {"skypilot.yaml": documents([{"name": run_name(experiment.output)}, *tasks])}

    def submit(
        self, experiment: Experiment, settings: SkyPilot, stages: Sequence[StageRun], files: Mapping[str, Path]
    ) -> Iterator[Job]:
        """Submit the pipeline with `sky jobs launch`."""
        name = run_name(experiment.output)
        secrets = [word for secret in settings.secrets for word in ("--secret", secret)]
        ask(["sky", "jobs", "launch", "-y", "-d", "-n", name, *secrets, str(files["skypilot.yaml"])], "SkyPilot", InputError)
        for stage in stages:
            yield {"stage": stage.name, "job": name}

    def states(self, jobs: Sequence[Job]) -> list[list[str]]:
        """The state of each task in the newest job of that name."""
        records = json.loads(ask(["sky", "jobs", "queue", "--all", "--output", "json"], "SkyPilot"))
        mine = [record for record in records if record["job_name"] == jobs[0]["job"]]
        newest = max((record["job_id"] for record in mine), default=None)
        state_of = {record["task_name"]: str(record["status"]) for record in mine if record["job_id"] == newest}
        return [[state_of[job["stage"]]] if job["stage"] in state_of else [] for job in jobs]

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel the job that contains these stages; the bucket is not changed."""
        ask(["sky", "jobs", "cancel", "-y", "-n", jobs[0]["job"]], "SkyPilot")


BACKEND: Backend[SkyPilot] = _SkyPilot()


def _task(settings: SkyPilot, stages: Sequence[StageRun], number: int, directory: Path) -> dict[str, Any]:
    """A task; the configurations that it reads are copied from a directory on this machine."""
    stage, before = stages[number], completed(stages, number, settings.workers, _CONFIGS)
    asked = of_stage(settings, stage.command)
    nodes = settings.workers if stage.shared else (asked.nodes or 1) if stage.command == "train" else 1
    resources = {
        "infra": asked.infra,
        "accelerators": f"{asked.accelerator}:{asked.gpus}" if asked.gpus else None,
        "cpus": f"{asked.cpus}+" if asked.cpus else None,
        "memory": f"{asked.memory.rstrip('G')}+" if asked.memory else None,
        "use_spot": asked.spot,
        "image_id": settings.image,
        # A stage that was told to stop exits with 143, which is not a failure.
        "job_recovery": {"max_restarts_on_errors": settings.retries, "recover_on_exit_codes": [143]},
    }
    task: dict[str, Any] = {
        "name": stage.name,
        "workdir": str(Path.cwd()),
        "num_nodes": nodes,
        "resources": {name: value for name, value in resources.items() if value is not None},
        "file_mounts": {
            settings.mount: {"source": settings.bucket, "mode": "MOUNT"},
            **{
                f"{_CONFIGS}/{read.name}.yaml": str(directory / f"{read.name}.yaml")
                for read in ([stages[number - 1], stage] if before else [stage])
            },
        },
    }
    if settings.secrets:
        task["secrets"] = dict.fromkeys(settings.secrets)
    if settings.setup:
        task["setup"] = _lines(settings.setup)
    task["run"] = _lines([*settings.environment, before + _command(settings, stage, nodes)])
    return task


def _command(settings: SkyPilot, stage: StageRun, nodes: int) -> str:
    """The command for every machine of a task."""
    words, gpus = " ".join(words_of(stage, _CONFIGS)), of_stage(settings, stage.command).gpus or 0
    if stage.command == "train" and (nodes > 1 or gpus > 1 or settings.accelerate):
        return launched(settings.accelerate, nodes, gpus, "$SKYPILOT_NODE_RANK", _FIRST, "$SKYPILOT_TASK_ID", words)
    if stage.shared and nodes > 1:
        return f'llmdistill {words} --shards "$((SKYPILOT_NODE_RANK + 1))/{nodes}"'
    return f"llmdistill {words}"


def _lines(lines: list[str]) -> str:
    return "\n".join([*lines, ""])
