"""What a backend of scheduled jobs has to do."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llmdistill.config import Experiment
from llmdistill.config.jobs import Scheduler
from llmdistill.runs.pipeline import StageRun

Job = dict[str, str]  # its `stage`, what it is called as `job`, and what else its backend finds it by
Settings = TypeVar("Settings", bound=Scheduler[Any], contravariant=True)


class Backend(Protocol[Settings]):
    """Where stages run as jobs. A module of this package, named as its key in the section `jobs`, has one as `BACKEND`.

    Attributes:
        over: states of a job that has ended.
        same_files: whether jobs write where `submit` was called, so that it can be seen there how far they are.
    """

    over: frozenset[str]
    same_files: bool

    def render(self, experiment: Experiment, settings: Settings, stages: Sequence[StageRun]) -> dict[str, str]:
        """The files that a person would have written, by their names in `OUTPUT/jobs`.

        Args:
            experiment: the configuration, as it was given to `submit`.
            settings: its section of this backend.
            stages: in their order, on experiments as the jobs see them; `OUTPUT/jobs/NAME.yaml` holds each.
        """
        ...

    def submit(
        self, experiment: Experiment, settings: Settings, stages: Sequence[StageRun], files: Mapping[str, Path]
    ) -> Iterator[Job]:
        """Hand the files on, each stage to run when the one before it has ended well; every job as soon as there is one.

        Raises:
            InputError: this machine is none that the jobs can be handed on from, or they are refused.
        """
        ...

    def states(self, jobs: Sequence[Job]) -> list[list[str]]:
        """For each job the states of its parts, such as PENDING or RUNNING; none for one that is unknown to the scheduler.

        Raises:
            RemoteError: there is no answer.
        """
        ...

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs that wait or run; what they have finished stays.

        Raises:
            RemoteError: there is no answer.
        """
        ...
