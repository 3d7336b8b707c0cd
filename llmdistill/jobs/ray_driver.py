"""What a Ray job runs: all stages in order; the teacher's shards by actors, each of which holds one engine.

    python -m llmdistill.jobs.ray_driver OUTPUT/jobs/ray.yaml

Shards are handed out one by one, so a slow worker makes fewer of them. What a worker that died had in hand goes to another.
"""

import os
import signal
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
from llmdistill.runs.pipeline import StageRun
from llmdistill.runs.progress import say
from llmdistill.runs.stage import run_stage
from llmdistill.stages.table import STAGES


class Queue:
    """Hands out the missing shards of one stage, in one process of the cluster."""

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
        """A worker has failed: what it has not finished waits again, unless it has failed too often.

        Returns:
            How many shards that were, and how many wait now.
        """
        lost = self._in_hand.pop(worker, set()) - indices(self.directory)
        self._failures.update(lost)
        self._waiting.extendleft(sorted(lost - set(self.failed()), reverse=True))
        return len(lost), len(self._waiting)

    def failed(self) -> list[int]:
        """The shards that are not tried again."""
        return sorted(index for index, failures in self._failures.items() if failures > self.retries)


class NoShards:
    """Makes no shard, but finds out which are missing in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0

    def part(self, count: int) -> range:
        """None of them."""
        self._count = count
        return range(0)

    def shards(self, name: str, directory: Path, count: int) -> list[int]:
        """None of them."""
        return []

    @property
    def missing(self) -> list[int]:
        """Those that are missing now; none of a stage that is done."""
        # Not read and hashed, as a worker does with its share: one process would read what a whole cluster has written.
        there = indices(self._directory)
        return [index for index in range(self._count) if index not in there]


class QueuedShards:
    """The shards that a worker is handed by the queue, each when it has room for more."""

    def __init__(self, queue: Any, worker: int) -> None:
        self.queue = queue
        self.worker = worker

    def part(self, count: int) -> range:
        """Any of them."""
        return range(count)

    def shards(self, name: str, directory: Path, count: int) -> Iterator[int]:
        """Ask the queue for one after the other."""
        while (index := ray.get(self.queue.take.remote(self.worker))) is not None:
            yield index


class Actor:
    """One engine on some node: writes or reads the shards that it is handed.

    Args:
        directory: that paths of the configuration begin in, which Ray does not start its processes in.
    """

    def __init__(self, directory: Path) -> None:
        os.chdir(directory)

    def make(self, stage: StageRun, queue: Any, number: int) -> None:
        """Run the stage until no shard is left."""
        _make(stage, QueuedShards(queue, number))


def _make(stage: StageRun, worker: Worker) -> None:
    run_stage(stage.experiment, stage.command, worker=worker)


def command_of(words: list[str], directory: Path) -> int:
    """Run a command in a directory on whatever machine this is; its exit status."""
    return subprocess.run(words, cwd=directory).returncode


def drive(file: Path) -> None:
    """Run all stages on the cluster that this process belongs to.

    Args:
        file: the configuration; those of the stages lie beside it.

    Raises:
        InputError: the configuration has no `jobs.ray`, or a stage finds its input wrong.
        BusyError: another process works in a stage's directory.
        RemoteError: a stage failed, or shards did, as often as is tried.
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
    """Keep as many actors at it as are asked for, until every shard is there or has failed too often."""
    directory = stage.experiment.directory("data")
    _make(stage, plan := NoShards(directory))  # what is wrong with the input is found out here
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
            say(stage.command, f"worker {number} failed: {said}; {lost:,} shards of it are not done, {waiting:,} wait")
            empty_handed += not lost
            if waiting and empty_handed <= settings.retries:
                start()
        ray.kill(worker)
    failed = ray.get(queue.failed.remote())
    _make(stage, again := NoShards(directory))
    if missing := again.missing:
        named = f": shards {', '.join(map(str, failed))} failed {settings.retries + 1} times" if failed else ""
        raise RemoteError(f"{directory} lacks {len(missing):,} shards{named}; the others are kept, submit it again to continue")


def _run(settings: Ray, stage: StageRun, commands: list[list[str]]) -> None:
    """A stage as one command on one node, or as many on any; those that fail are run again."""
    task = ray.remote(command_of).options(max_retries=settings.retries, **backend.resources(settings, stage))
    status_of: dict[int, int] = {}
    for _ in range(settings.retries + 1):
        again = [number for number in range(len(commands)) if status_of.get(number) not in (0, 2)]
        status_of |= dict(zip(again, ray.get([task.remote(commands[number], Path.cwd()) for number in again]), strict=True))
    if status := next(filter(None, status_of.values()), 0):
        raise (InputError if status == 2 else RemoteError)(f"{stage.name} ended with status {status}")


def main() -> NoReturn:
    """Take the configuration from the command line."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(143))  # the actors end with this process
    try:
        drive(Path(sys.argv[1]))
    except (BusyError, InputError, RemoteError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    sys.exit(0)


if __name__ == "__main__":
    main()
