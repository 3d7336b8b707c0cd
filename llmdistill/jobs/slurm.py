"""Stages as jobs of Slurm: the scripts, as one would have written them by hand, and what sbatch, squeue and scancel say."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmdistill.config import Experiment
from llmdistill.config.jobs import Slurm
from llmdistill.errors import InputError
from llmdistill.jobs.commands import SHARED, Job, ask, launched, of_stage
from llmdistill.runs.pipeline import StageRun, stages

_OPTIONS = {"partition": "partition", "gpus": "gpus-per-node", "cpus": "cpus-per-task", "memory": "mem", "time": "time"}
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
SAME_FILES = True  # the jobs see the output directory that `submit` sees


def render(experiment: Experiment, settings: Slurm, arguments: Sequence[str]) -> dict[str, str]:
    """The batch script of every stage.

    Args:
        experiment: the configuration.
        settings: its `jobs.slurm`.
        arguments: the configuration file and the overrides, as they were typed.
    """
    return {f"{stage.name}.sh": script(experiment, settings, stage, arguments, Path.cwd()) for stage in stages(experiment)}


def script(experiment: Experiment, settings: Slurm, stage: StageRun, arguments: Sequence[str], directory: Path) -> str:
    """The batch script of a stage.

    Args:
        experiment: the configuration.
        settings: its `jobs.slurm`.
        stage: which one.
        arguments: the configuration file and the overrides, as they were typed.
        directory: where the command is run, and where the logs are relative to.
    """
    resources = of_stage(settings, stage.command)
    array = settings.workers > 1 and stage.command in SHARED
    logs = f"{experiment.output}/jobs/{stage.name}-{'%A_%a' if array else '%j'}.log"
    options = {
        "job-name": f"{_plain(Path(experiment.output).name)}-{stage.name}",
        "output": f'"{logs}"',
        "open-mode": "append",
        "signal": f"B:USR1@{settings.grace}",
        "nodes": str((resources.nodes or 1) if stage.command == "train" else 1),
        "ntasks-per-node": "1",
        **({"array": f"0-{settings.workers - 1}"} if array else {}),
        **({"account": settings.account} if settings.account else {}),
        **{option: str(getattr(resources, name)) for name, option in _OPTIONS.items() if getattr(resources, name) is not None},
        **settings.options,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    command = _command(settings, stage.command, resources, [*arguments, *stage.arguments], array)
    return "\n".join([
        "#!/bin/bash", *lines, "#SBATCH --requeue", "",
        f"cd {shlex.quote(str(directory))} || exit 1", *settings.environment, "",
        _RUN.format(command=command, retries=settings.retries),
    ])  # fmt: skip


# The command runs beside the shell, which waits and passes signals on. It ends with 143 when it was told to stop, torchrun in
# its place with 1. One element of an array is named by both numbers: with the first alone Slurm would queue all of them again.
_RUN = """\
{command} &
child=$!
near_the_limit= told=
trap 'near_the_limit=yes; kill -TERM "$child" 2>/dev/null' USR1
trap 'told=yes; kill -TERM "$child" 2>/dev/null' TERM
while :; do
  wait "$child"
  status=$?
  kill -0 "$child" 2>/dev/null || break
done
me=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}}}
again() {{ echo "$1: queued again"; scontrol requeue "${{me:-$SLURM_JOB_ID}}" && sleep 60; }}
if [ "$status" = 0 ] || [ "$status" = 2 ] || [ -n "$told" ]; then
  exit "$status"
elif [ -n "$near_the_limit" ]; then
  again "stopped before the end of its time"
elif [ "$status" != 143 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; then
  again "failed with status $status"
fi
exit "$status"
"""


def _command(settings: Slurm, stage: str, resources: Slurm, arguments: Sequence[str], array: bool) -> str:
    """The command of a stage, with its launcher."""
    words = shlex.join([stage, *arguments])
    nodes, gpus = resources.nodes or 1, resources.gpus or 0
    container = ["srun", f"--container-image={settings.container}"] if settings.container else []
    if stage == "train" and (nodes > 1 or gpus > 1 or settings.accelerate):
        return _launched(settings, words, nodes, gpus, container)
    share = f' --shards "$((SLURM_ARRAY_TASK_ID + 1))/{settings.workers}"' if array else ""
    return shlex.join([*container, "llmdistill"]) + f" {words}{share}"


def _launched(settings: Slurm, words: str, nodes: int, gpus: int, container: list[str]) -> str:
    """Training on several processes: one launcher a node, which meet at the first node."""
    host = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    launcher = launched(settings.accelerate, nodes, gpus, "$SLURM_NODEID", "$MASTER", "$SLURM_JOB_ID", words)
    srun = shlex.join([*(container or ["srun"]), "--kill-on-bad-exit=1", "--ntasks-per-node=1", "bash", "-c"])
    return f"MASTER={host} {srun} {shlex.quote(launcher)}"


def submit(experiment: Experiment, settings: Slurm, files: dict[str, Path]) -> Iterator[Job]:
    """Hand the scripts to sbatch, each to run when the one before it has ended well.

    Raises:
        InputError: there is no sbatch, or it refuses.
    """
    after: list[str] = []
    for name, file in files.items():
        number = ask(["sbatch", "--parsable", *after, str(file)], "Slurm", InputError).strip().split(";")[0]
        after = [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]
        yield {"stage": Path(name).stem, "job": number}


def states(jobs: Sequence[Job]) -> list[list[str]]:
    """For each job the states of its parts that Slurm still knows, such as PENDING or RUNNING; none for one that is over."""
    found: dict[str, list[str]] = {job["job"]: [] for job in jobs}
    for line in ask(["squeue", "--noheader", "--array", "--states=all", "--format=%A %F %T"], "Slurm").splitlines():
        number, array, state = line.split()
        for job in {number, array} & found.keys():
            found[job].append(state)
    return list(found.values())


def cancel(jobs: Sequence[Job]) -> None:
    """End jobs that wait or run; what they have finished stays."""
    ask(["scancel", *(job["job"] for job in jobs)], "Slurm")


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name) or "run"
