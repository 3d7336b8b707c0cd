"""Stages as jobs of Slurm: the scripts, as one would have written them by hand, and what sbatch, squeue and scancel say."""

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from llmdistill.config import Experiment
from llmdistill.config_jobs import Resources, Slurm
from llmdistill.errors import InputError, RemoteError
from llmdistill.pipeline import Stage

_ARRAYS = ("generate", "score")
_WITHOUT_MODELS = ("curate", "report")  # they get GPUs only where `stages` says so
_OPTIONS = {"partition": "partition", "gpus": "gpus-per-node", "cpus": "cpus-per-task", "memory": "mem", "time": "time"}
_PORT = 29500


def script(experiment: Experiment, settings: Slurm, stage: Stage, arguments: Sequence[str], directory: Path) -> str:
    """The batch script of a stage.

    Args:
        experiment: the configuration.
        settings: its `jobs.slurm`.
        stage: which one.
        arguments: the configuration file and the overrides, as they were typed.
        directory: where the command is run, and where the logs are relative to.
    """
    resources = settings.of(stage.command)
    if stage.command in _WITHOUT_MODELS and stage.command not in settings.stages:
        resources = resources.model_copy(update={"gpus": None})
    array = settings.workers > 1 and stage.command in _ARRAYS
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


def _command(settings: Slurm, stage: str, resources: Resources, arguments: Sequence[str], array: bool) -> str:
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
    if settings.accelerate:
        launcher = (
            f"accelerate launch --config_file {shlex.quote(settings.accelerate)} --num_machines {nodes} "
            f'--num_processes {nodes * max(gpus, 1)} --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER" '
            f"--main_process_port {_PORT} -m llmdistill {words}"
        )
    else:
        launcher = (
            f'torchrun --nnodes {nodes} --nproc-per-node {max(gpus, 1)} --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d '
            f'--rdzv-endpoint "$MASTER:{_PORT}" -m llmdistill {words}'
        )
    srun = shlex.join([*(container or ["srun"]), "--kill-on-bad-exit=1", "--ntasks-per-node=1", "bash", "-c"])
    return f"MASTER={host} {srun} {shlex.quote(launcher)}"


def submit(file: Path, after: Sequence[str]) -> str:
    """Hand a script to sbatch, to run when other jobs have ended well; the number of the job.

    Raises:
        InputError: there is no sbatch, or it refuses.
    """
    dependency = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return _ask(["sbatch", "--parsable", *dependency, str(file)]).strip().split(";")[0]


def states(jobs: Sequence[str]) -> dict[str, list[str]]:
    """For each job the states of its parts that Slurm still knows, such as PENDING or RUNNING; none for one that is over."""
    found: dict[str, list[str]] = {job: [] for job in jobs}
    for line in _ask(["squeue", "--noheader", "--array", "--states=all", "--format=%A %F %T"]).splitlines():
        number, array, state = line.split()
        for job in {number, array} & found.keys():
            found[job].append(state)
    return found


def cancel(jobs: Sequence[str]) -> None:
    """End jobs that wait or run; what they have finished stays."""
    _ask(["scancel", *jobs])


def _ask(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError(f"{command[0]} is not there: this is no machine from which Slurm takes jobs") from None
    if done.returncode:
        said = done.stderr.strip() or f"status {done.returncode}"
        raise (InputError if command[0] == "sbatch" else RemoteError)(f"{command[0]}: {said}")
    return done.stdout


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name) or "run"
