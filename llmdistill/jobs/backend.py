"""The interface of a backend for scheduled jobs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llmdistill.config import Experiment
from llmdistill.config.jobs import Scheduler
from llmdistill.workflow.plan import StageRun

Job = dict[str, str]  # its `stage`, its name as `job`, and whatever else its backend needs to find it
Settings = TypeVar("Settings", bound=Scheduler[Any], contravariant=True)


class Backend(Protocol[Settings]):
    """A scheduler that runs stages as jobs: `BACKEND` in the module of this package with the name of its key in `jobs`.

    Attributes:
        over: states of a job that has ended.
        same_files: whether jobs write where `submit` was called, so that their progress can be seen there.
    """

    over: frozenset[str]
    same_files: bool

    def render(self, experiment: Experiment, settings: Settings, stages: Sequence[StageRun]) -> dict[str, str]:
        """The job files, by their names in `OUTPUT/jobs`, as a person would have written them.

        Args:
            experiment: the configuration, as given to `submit`.
            settings: this backend's section of it.
            stages: the stages in order, on experiments as the jobs see them; each is in `OUTPUT/jobs/NAME.yaml`.
        """
        ...

    def submit(
        self, experiment: Experiment, settings: Settings, stages: Sequence[StageRun], files: Mapping[str, Path]
    ) -> Iterator[Job]:
        """Submit the files such that each stage runs once the previous one has succeeded; yields every job when it exists.

        Raises:
            InputError: if jobs cannot be submitted from this machine, or are refused.
        """
        ...

    def states(self, jobs: Sequence[Job]) -> list[list[str]]:
        """For each job, the states of its parts, such as PENDING or RUNNING; empty if the scheduler does not know it.

        Raises:
            RemoteError: if the scheduler does not answer.
        """
        ...

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Cancel waiting or running jobs; what they have finished is kept.

        Raises:
            RemoteError: if the scheduler does not answer.
        """
        ...
