"""The program of a Ray job: all stages in order; the teacher's shards by actors, each of which holds one engine.

    python -m llmdistill.jobs.ray_driver OUTPUT/jobs/ray.yaml

Shards are assigned one by one, so a slow worker makes fewer of them. The shards of a worker that died go to another one.
"""

import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import ray

from llmdistill.config import load_experiment
from llmdistill.config.jobs import Ray
from llmdistill.data.shards import Worker, indices
from llmdistill.errors import BusyError, InputError, RemoteError
from llmdistill.jobs import ray as backend
from llmdistill.jobs.commands import scheduled, words_of
from llmdistill.runs.progress import say
from llmdistill.runs.termination import exit_on_sigterm
from llmdistill.stages.table import STAGES
from llmdistill.workflow.plan import StageRun
from llmdistill.workflow.stage import run_stage


class Queue:
    """Assigns the missing shards of a stage, in one process of the cluster."""

    def __init__(self, directory: Path, missing: list[int], retries: int) -> None:
        self.directory = directory
        self.retries = retries
        self._waiting = deque(missing)
        self._in_hand: dict[int, set[int]] = {}
        self._failures: Counter[int] = Counter()

    def take(self, worker: int) -> int | None:
        """The next shard to make; None if there is none left."""
        if not self._waiting:
            return None
        self._in_hand.setdefault(worker, set()).add(self._waiting[0])
        return self._waiting.popleft()

    def give_back(self, worker: int) -> tuple[int, int]:
        """A worker has failed: its unfinished shards are queued again, unless they have failed too often.

        Returns:
            The number of those shards, and of all that wait.
        """
        lost = self._in_hand.pop(worker, set()) - indices(self.directory)
        self._failures.update(lost)
        self._waiting.extendleft(sorted(lost - set(self.failed()), reverse=True))
        return len(lost), len(self._waiting)

    def failed(self) -> list[int]:
        """The shards that are not retried."""
        return sorted(index for index, failures in self._failures.items() if failures > self.retries)


class NoShards:
    """Makes no shards, but finds those missing in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0

    def part(self, count: int) -> range:
        """No shards."""
        self._count = count
        return range(0)

    def shards(self, name: str, directory: Path, count: int) -> list[int]:
        """No shards."""
        return []

    @property
    def missing(self) -> list[int]:
        """The missing shards; none for a stage that is done."""
        # Not read and hashed, as a worker does with its share: one process would read the output of a whole cluster.
        there = indices(self._directory)
        return [index for index in range(self._count) if index not in there]


class QueuedShards:
    """The shards that the queue assigns to a worker, one whenever it has room."""

    def __init__(self, queue: Any, worker: int) -> None:
        self.queue = queue
        self.worker = worker

    def part(self, count: int) -> range:
        """Any shard."""
        return range(count)

    def shards(self, name: str, directory: Path, count: int) -> Iterator[int]:
        """Ask the queue for one shard after another."""
        while (index := ray.get(self.queue.take.remote(self.worker))) is not None:
            yield index


class Actor:
    """One engine on some node: generates or scores the shards assigned to it.

    Args:
        directory: base of the paths in the configuration; Ray starts its processes elsewhere.
    """

    def __init__(self, directory: Path) -> None:
        os.chdir(directory)

    def make(self, stage: StageRun, queue: Any, number: int) -> None:
        """Run the stage until no shard is left."""
        _make(stage, QueuedShards(queue, number))


def _make(stage: StageRun, worker: Worker) -> None:
    run_stage(stage.experiment, stage.command, worker=worker)


def command_of(words: list[str], directory: Path) -> int:
    """Run a command in a directory on any machine; returns its exit status."""
    return subprocess.run(words, cwd=directory).returncode


def drive(file: Path) -> None:
    """Run all stages on the cluster that this process belongs to.

    Args:
        file: the configuration; those of the stages are next to it.

    Raises:
        InputError: if the configuration has no `jobs.ray`, or the input of a stage is wrong.
        BusyError: if another process works in a stage's directory.
        RemoteError: if a stage or shards failed in all attempts.
    """
    experiment = load_experiment(file)
    settings = experiment.jobs and experiment.jobs.ray
    if not settings:
        raise InputError(f"{file}: the key jobs.ray is missing")
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True, configure_logging=False)
    for stage in scheduled(experiment, settings):
        command = [*backend.launcher(settings, stage), *words_of(stage, str(file.parent))]
        if stage.shared and STAGES[stage.command].record == "data":
            _make_shards(settings, stage)
        elif stage.shared:  # `prompts`, whose shards are known only step by step
            _run(settings, stage, [[*command, "--shards", f"{n}/{settings.workers}"] for n in range(1, settings.workers + 1)])
        else:
            _run(settings, stage, [command])


def _make_shards(settings: Ray, stage: StageRun) -> None:
    """Keep the requested number of actors working until every shard is finished or has failed too often."""
    directory = stage.experiment.directory("data")
    _make(stage, plan := NoShards(directory))  # errors in the input are found here
    missing = plan.missing
    if not missing:
        return
    queue: Any = ray.remote(Queue).options(num_cpus=0).remote(directory.absolute(), missing, settings.retries)
    actor: Any = ray.remote(Actor).options(**backend.resources(settings, stage))
    numbers, running = count(), dict[Any, tuple[int, Any]]()

    def start() -> None:
        worker, number = actor.remote(Path.cwd()), next(numbers)
        running[worker.make.remote(stage, queue, number)] = (number, worker)

    for _ in range(min(settings.workers, len(missing))):
        start()
    empty_handed = 0
    while running:
        (done,), _ = ray.wait(list(running))
        number, worker = running.pop(done)
        try:
            ray.get(done)
        except InputError as error:
            raise InputError(str(getattr(error, "cause", error))) from None
        except ray.exceptions.RayError as error:
            lost, waiting = ray.get(queue.give_back.remote(number))
            said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            say(stage.command, f"worker {number} failed: {said}; {lost:,} of its shards are unfinished, {waiting:,} waiting")
            empty_handed += not lost
            if waiting and empty_handed <= settings.retries:
                start()
        ray.kill(worker)
    failed = ray.get(queue.failed.remote())
    _make(stage, again := NoShards(directory))
    if missing := again.missing:
        named = f": shards {', '.join(map(str, failed))} failed {settings.retries + 1} times" if failed else ""
        raise RemoteError(f"{directory} lacks {len(missing):,} shards{named}; the others are kept; submit again to continue")


def _run(settings: Ray, stage: StageRun, commands: list[list[str]]) -> None:
    """Run a stage as one command on one node, or several on any; those that fail are retried."""
    task = ray.remote(command_of).options(max_retries=settings.retries, **backend.resources(settings, stage))
    status_of: dict[int, int] = {}
    for _ in range(settings.retries + 1):
        again = [number for number in range(len(commands)) if status_of.get(number) not in (0, 2)]
        status_of |= dict(zip(again, ray.get([task.remote(commands[number], Path.cwd()) for number in again]), strict=True))
    if status := next(filter(None, status_of.values()), 0):
        raise (InputError if status == 2 else RemoteError)(f"{stage.name} ended with status {status}")


def main() -> NoReturn:
    """Take the configuration from the command line."""
    exit_on_sigterm()  # the actors end with this process
    try:
        drive(Path(sys.argv[1]))
    except (BusyError, InputError, RemoteError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    sys.exit(0)


if __name__ == "__main__":
    main()
