"""Stages as Slurm jobs: the scripts as one would write them by hand, and the output of sbatch, squeue and scancel."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llmdistill.config import Experiment
from llmdistill.config.jobs import Slurm
from llmdistill.errors import InputError
from llmdistill.jobs.backend import Backend, Job
from llmdistill.jobs.commands import ask, launched, of_stage, words_of
from llmdistill.workflow.plan import StageRun

_OPTIONS = {"partition": "partition", "gpus": "gpus-per-node", "cpus": "cpus-per-task", "memory": "mem", "time": "time"}


class _Slurm:
    over = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"})
    same_files = True

    def render(self, experiment: Experiment, settings: Slurm, stages: Sequence[StageRun]) -> dict[str, str]:
        """The batch script of every stage."""
        return {f"{stage.name}.sh": _script(experiment, settings, stage) for stage in stages}

    def submit(
        self, experiment: Experiment, settings: Slurm, stages: Sequence[StageRun], files: Mapping[str, Path]
    ) -> Iterator[Job]:
        """Submit the scripts with sbatch."""
        after: list[str] = []
        for stage in stages:
            command = ["sbatch", "--parsable", *after, str(files[f"{stage.name}.sh"])]
            number = ask(command, "Slurm", InputError).strip().split(";")[0]
            after = [f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"]
            yield {"stage": stage.name, "job": number}

    def states(self, jobs: Sequence[Job]) -> list[list[str]]:
        """The states in squeue; Slurm forgets a job some time after its end."""
        found: dict[str, list[str]] = {job["job"]: [] for job in jobs}
        for line in ask(["squeue", "--noheader", "--array", "--states=all", "--format=%A %F %T"], "Slurm").splitlines():
            number, array, state = line.split()
            for job in {number, array} & found.keys():
                found[job].append(state)
        return list(found.values())

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel with scancel."""
        ask(["scancel", *(job["job"] for job in jobs)], "Slurm")


BACKEND: Backend[Slurm] = _Slurm()


def _script(experiment: Experiment, settings: Slurm, stage: StageRun) -> str:
    """The batch script of a stage, which runs where `submit` was called."""
    resources = of_stage(settings, stage.command)
    array = settings.workers > 1 and stage.shared
    directory = f"{experiment.output}/jobs"
    logs = f"{directory.replace('%', '%%')}/{stage.name}-{'%A_%a' if array else '%j'}.log"
    options = {
        "job-name": f"{_plain(Path(experiment.output).name)}-{stage.name}",
        "output": logs,
        "open-mode": "append",
        "signal": f"B:USR1@{settings.grace}",
        "nodes": str((resources.nodes or 1) if stage.command == "train" else 1),
        "ntasks-per-node": "1",
        **({"array": f"0-{settings.workers - 1}"} if array else {}),
        **({"account": settings.account} if settings.account else {}),
        **{option: str(getattr(resources, name)) for name, option in _OPTIONS.items() if getattr(resources, name) is not None},
        **settings.options,
    }
    lines = [f"#SBATCH --{name}={_option(name, value)}" for name, value in options.items()]
    # Since 22.05, srun does not inherit the number of processors.
    told = ['export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'] if "cpus-per-task" in options else []
    command = _command(settings, stage, resources, directory, array)
    return "\n".join([
        "#!/bin/bash", *lines, "#SBATCH --requeue", "",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1", *told, *settings.environment, "",
        _RUN.format(command=command, retries=settings.retries, failures=shlex.quote(f"{directory}/failures-")),
    ])  # fmt: skip


def _option(name: str, value: str) -> str:
    """A value in the header of a script, which has its own syntax; a line break would end the header.

    Raises:
        InputError: if the name or the value cannot be written.
    """
    key = "output" if name == "output" else f"jobs.slurm.{name}"
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise InputError(f"{key}: is not the name of an option of sbatch")
    if not value.isprintable() or "\\" in value:  # Slurm removes backslashes from file names
        raise InputError(f"{key}: {value!r} has a backslash or a control character, which Slurm does not accept")
    return value if re.fullmatch(r"[\w./:=,@%+*\[\]-]*", value) else '"' + value.replace('"', '\\"') + '"'


# The command runs next to the shell, which waits and passes signals on. When terminated it exits with 143, torchrun with 1.
# An array element is identified by both numbers: with only the first, Slurm would requeue all of them. Failures are counted in
# a file, as Slurm's own count of restarts includes preemptions.
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
me=${{me:-$SLURM_JOB_ID}}
failures={failures}$me
again() {{ echo "$1: queued again"; scontrol requeue "$me" && sleep 60; }}
if [ "$status" = 0 ] || [ "$status" = 2 ] || [ -n "$told" ]; then
  exit "$status"
elif [ -n "$near_the_limit" ]; then
  again "stopped before the end of its time"
elif [ "$status" != 143 ] && [ "$(cat "$failures" 2>/dev/null | wc -l)" -lt {retries} ]; then
  echo "$status" >> "$failures"
  again "failed with status $status"
fi
exit "$status"
"""


def _command(settings: Slurm, stage: StageRun, resources: Slurm, directory: str, array: bool) -> str:
    """The command of a stage, with its launcher."""
    words = shlex.join(words_of(stage, directory))
    nodes, gpus = resources.nodes or 1, resources.gpus or 0
    container = ["srun", f"--container-image={settings.container}"] if settings.container else []
    if stage.command == "train" and (nodes > 1 or gpus > 1 or settings.accelerate):
        return _launched(settings, words, nodes, gpus, container)
    share = f' --shards "$((SLURM_ARRAY_TASK_ID + 1))/{settings.workers}"' if array else ""
    return shlex.join([*container, "llmdistill"]) + f" {words}{share}"


def _launched(settings: Slurm, words: str, nodes: int, gpus: int, container: list[str]) -> str:
    """Training on several processes: one launcher per node, which connect to the first node."""
    host = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    launcher = launched(settings.accelerate, nodes, gpus, "$SLURM_NODEID", "$MASTER", "$SLURM_JOB_ID", words)
    srun = shlex.join([*(container or ["srun"]), "--kill-on-bad-exit=1", "--ntasks-per-node=1", "bash", "-c"])
    return f"MASTER={host} {srun} {shlex.quote(launcher)}"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name) or "run"
