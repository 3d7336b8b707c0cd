"""The commands in jobs, and those that hand jobs on: how a stage is started on many processes, what a run is called elsewhere."""

import hashlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

import yaml

from llmdistill.config import Experiment
from llmdistill.config.jobs import Kubernetes, Ray, SkyPilot, Slurm
from llmdistill.errors import InputError, RemoteError
from llmdistill.runs.pipeline import StageRun, stages
from llmdistill.stages.table import STAGES

PORT = 29500
SHARED = tuple(name for name, stage in STAGES.items() if stage.array)  # a job for each of several workers
Backend = TypeVar("Backend", Slurm, Ray, SkyPilot, Kubernetes)
Job = dict[str, str]  # its `stage`, what it is called as `job`, and what else its backend finds it by


def of_stage(settings: Backend, name: str) -> Backend:
    """The settings with what a stage asks for in the place of what is asked for in general."""
    own = settings.stages.get(name)  # type: ignore[call-overload]
    asked = own.model_dump(exclude_none=True) if own else {}
    if name in STAGES and not STAGES[name].uses_model:
        asked.setdefault("gpus", None)
    return settings.model_copy(update=asked)


def launched(accelerate: str | None, nodes: int, gpus: int, rank: str, first: str, identity: str, words: str) -> str:
    """The shell command that each node runs to train on several processes, which meet at the first node.

    Args:
        accelerate: a configuration of `accelerate launch`; torchrun if None.
        nodes: how many there are.
        gpus: processes on each, at least one.
        rank: what the shell knows the node's number by.
        first: what it knows the first node's address by.
        identity: what it knows this run of all nodes by.
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
    """What a run is called where names are short, plain and shared: the output's last part and a hash of all of it."""
    plain = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(output).name.lower()).strip("-")[:30].strip("-")
    return f"{plain or 'run'}-{hashlib.sha256(output.encode()).hexdigest()[:6]}"


def elsewhere(output: str, mount: str) -> str:
    """The path of an output below the mount that takes its place on other machines.

    Raises:
        InputError: it would not lie below.
    """
    path = PurePosixPath(output.lstrip("/"))
    if ".." in path.parts:
        raise InputError(f"output {output}: a path with .. would leave {mount}, where all output lies on the machines of the job")
    return str(PurePosixPath(mount) / path)


def stages_elsewhere(experiment: Experiment, mount: str, arguments: Sequence[str]) -> list[tuple[StageRun, list[str]]]:
    """The stages with the words of each, where all output lies below a mount.

    Raises:
        InputError: it would not lie below.
    """
    there = experiment.model_copy(update={"output": elsewhere(experiment.output, mount)})
    return [(stage, [*arguments, "--output", there.output, *stage.arguments]) for stage in stages(there)]


def completed(todo: list[tuple[StageRun, list[str]]], number: int, workers: int) -> str:
    """What a stage's shell command begins with where many workers made the dataset before it.

    Those that saw each other's last shards late have left it incomplete; the same command without a share completes it.
    """
    if number == 0 or workers == 1 or todo[number - 1][0].command not in SHARED:
        return ""
    stage, words = todo[number - 1]
    return f"llmdistill {shlex.join([stage.command, *words])} && "


def ask(command: Sequence[str], whose: str, wrong: type[Exception] = RemoteError) -> str:
    """What a command says.

    Args:
        command: it and its arguments.
        whose: who takes jobs by it.
        wrong: what is raised when it refuses.

    Raises:
        InputError: the command is not there.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError(f"{command[0]} is not there: this is no machine from which {whose} takes jobs") from None
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
        raise wrong(f"{command[0]}: {said}")
    return done.stdout


def below(file: str, directory: Path) -> str:
    """The path of the configuration in the copy of a directory.

    Raises:
        InputError: it lies elsewhere.
    """
    try:
        return str(Path(file).resolve().relative_to(directory.resolve()))
    except ValueError:
        raise InputError(f"{file}: does not lie below {directory}, which is what the machines of the job get") from None


class _Dumper(yaml.SafeDumper):
    """YAML as one writes it: text of many lines as a block, nothing named twice."""

    def ignore_aliases(self, data: object) -> bool:
        """Write what is there twice twice."""
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def documents(parts: Sequence[object]) -> str:
    """A YAML file of several documents."""
    return yaml.dump_all(parts, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
