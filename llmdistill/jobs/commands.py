"""The commands in jobs, and those that submit jobs: which jobs there are, and how a stage is started on many processes."""

import hashlib
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

import yaml

from llmdistill.config import Experiment
from llmdistill.config.jobs import Mounted, Scheduler
from llmdistill.errors import InputError, RemoteError
from llmdistill.stages.table import STAGES
from llmdistill.workflow.plan import StageRun, stages

PORT = 29500
# Messages of sbatch, kubectl and sky for faults that are not in their input.
_UNREACHABLE = re.compile(
    r"unable to co(ntact|nnect)|could not establish|connection (to the server .*)?(was )?refused|connection error|\btimed out\b"
    r"|(i/o|handshake) timeout|deadline exceeded|no such host|temporarily unavailable",
    re.IGNORECASE,
)
Settings = TypeVar("Settings", bound=Scheduler[Any])


def scheduled(experiment: Experiment, settings: Scheduler[Any]) -> list[StageRun]:
    """The stages as jobs, each with the experiment as it is where the job runs.

    Raises:
        InputError: if the output would not be below the mount point that replaces it there.
    """
    if isinstance(settings, Mounted):
        experiment = experiment.with_(output=elsewhere(experiment.output, settings.mount))
    return [part for stage in stages(experiment) for part in _parts(stage, settings.workers)]


def engine_gpus(stage: StageRun) -> int:
    """GPUs over which the largest engine of a stage is split; its engines run one after the other."""
    experiment = stage.experiment
    teachers = list(experiment.routed.values()) if stage.shared else []
    if stage.command == "eval" and experiment.eval.win_rate:
        teachers.append(experiment.eval.win_rate.judge)
    sizes = [teacher.tensor_parallel_size for teacher in teachers if teacher.engine == "vllm"]
    if stage.command == "eval" and experiment.eval.speed == "vllm":
        sizes.append(experiment.teacher.tensor_parallel_size)
    return max(sizes, default=1)


def check_gpus(name: str, settings: Scheduler[Any], stages: Sequence[StageRun]) -> None:
    """Refuse stages with fewer GPUs than one of their engines is split over.

    Args:
        name: name of the backend.
        settings: its section.
        stages: all stages.

    Raises:
        InputError: names the key.
    """
    for stage in stages:
        asked: Any = of_stage(settings, stage.command)
        needed = engine_gpus(stage)
        if asked.gpus and asked.gpus < needed:  # without any, it is not GPUs that an engine is split over
            own = settings.stages.get(stage.command)
            key = f"stages.{stage.command}.gpus" if own and own.gpus is not None else "gpus"
            raise InputError(
                f"jobs.{name}.{key}: {asked.gpus}, but {stage.command} runs a model that vLLM splits over {needed} GPUs "
                "(tensor_parallel_size)"
            )


def _parts(stage: StageRun, workers: int) -> Iterator[StageRun]:
    """A stage, repeated as often as its workers are started.

    The questions of a step of `prompts` depend on all answers to the previous step. A worker that lacks the answers of others
    exits, since it might wait for one that only starts after it has ended; so all are started again for the next step.
    """
    section = stage.experiment.prompts
    passes = section.passes if stage.command == "prompts" and section and workers > 1 else 1
    return (replace(stage, part=number) for number in range(1, max(passes, 1) + 1))


def words_of(stage: StageRun, directory: str) -> list[str]:
    """A stage and its configuration, which is in a directory under the stage's name."""
    return [stage.command, f"{directory}/{stage.name}.yaml"]


def of_stage(settings: Settings, name: str) -> Settings:
    """The settings with the requests of a stage replacing the general ones."""
    own = settings.stages.get(name)
    asked = own.model_dump(exclude_none=True) if own else {}
    if name in STAGES and not STAGES[name].uses_model:
        asked.setdefault("gpus", None)
    return settings.model_copy(update=asked)


def launched(accelerate: str | None, nodes: int, gpus: int, rank: str, first: str, identity: str, words: str) -> str:
    """The shell command that each node runs to train on several processes, which connect to the first node.

    Args:
        accelerate: a configuration of `accelerate launch`; torchrun if None.
        nodes: number of nodes.
        gpus: processes per node, at least one.
        rank: shell expression for the number of the node.
        first: shell expression for the address of the first node.
        identity: shell expression that identifies this run on all nodes.
        words: the stage and its arguments, quoted.
    """
    if accelerate:
        return (
            f"accelerate launch --config_file {shlex.quote(accelerate)} --num_machines {nodes} "
            f'--num_processes {nodes * max(gpus, 1)} --machine_rank "{rank}" --main_process_ip "{first}" '
            f"--main_process_port {PORT} -m llmdistill {words}"
        )
    return (
        f'torchrun --nnodes {nodes} --nproc-per-node {max(gpus, 1)} --rdzv-id "{identity}" --rdzv-backend c10d '
        f'--rdzv-endpoint "{first}:{PORT}" -m llmdistill {words}'
    )


def run_name(output: str) -> str:
    """The name of a run where names are short, plain and shared: the output's last part and a hash of all of it."""
    plain = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(output).name.lower()).strip("-")[:30].strip("-")
    return f"{plain or 'run'}-{hashlib.sha256(output.encode()).hexdigest()[:6]}"


def elsewhere(output: str, mount: str) -> str:
    """The path of an output below the mount point that replaces it on other machines.

    Raises:
        InputError: if it would not be below.
    """
    path = PurePosixPath(output.lstrip("/"))
    if ".." in path.parts:
        raise InputError(
            f"output {output}: a path with .. would leave {mount}, the directory for all output on the machines of the job"
        )
    return str(PurePosixPath(mount) / path)


def completed(stages: Sequence[StageRun], number: int, workers: int, directory: str) -> str:
    """The beginning of a stage's shell command if many workers made its input.

    Workers that saw each other's last shards too late have left it incomplete; the same command without a share completes it.

    Args:
        stages: all stages.
        number: number of this one, from 0.
        workers: number of workers.
        directory: directory of the configurations.
    """
    before = stages[number - 1] if number and workers > 1 else None
    if before is None or not before.shared or stages[number].part > 1:
        return ""
    return f"llmdistill {' '.join(words_of(before, directory))} && "


def ask(command: Sequence[str], whose: str, wrong: type[Exception] = RemoteError) -> str:
    """The output of a command.

    Args:
        command: the command and its arguments.
        whose: the scheduler that it belongs to.
        wrong: exception to raise if it refuses.

    Raises:
        InputError: if the command does not exist.
        RemoteError: if the scheduler cannot be reached.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError(f"{command[0]} not found: this machine cannot submit jobs to {whose}") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
        if _UNREACHABLE.search(said):
            raise RemoteError(f"{command[0]}: {said}")
        raise wrong(f"{command[0]}: {said}")
    return done.stdout


class _Dumper(yaml.SafeDumper):
    """Writes YAML as a person would: multi-line text as a block, and no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        """Write repeated values in full."""
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def documents(parts: Sequence[object]) -> str:
    """A YAML file of several documents."""
    return yaml.dump_all(parts, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
