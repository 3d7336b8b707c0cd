"""One stage in this process: alone or as one of several workers, monitored, and with an object store if there is one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.objectstore.copies import bring, keep
from llmdistill.runs import lock, record
from llmdistill.runs.progress import console, working
from llmdistill.runs.watch import is_first_process, watched
from llmdistill.stages.table import STAGES


def run_stage(experiment: Experiment, name: str, share: str | None = None, **options: Any) -> None:
    """Run a stage; its inputs are fetched from the object store, and its outputs are uploaded.

    Args:
        experiment: the configuration.
        name: of the stage.
        share: which part of the shards this process makes, for those who watch it.
        options: further arguments of the stage's function.

    Raises:
        BusyError: another process works in what it writes.
        InputError: as the stage; or the store cannot be used.
    """
    console.quiet = console.quiet or experiment.watch.log == "json"  # what is not a line of a stage
    with _locked(experiment, name), watched(name, experiment.output, experiment.watch, share), working(name, "working"):
        if experiment.store is not None:
            bring(experiment, name)
        STAGES[name].function(experiment, **options)
        if experiment.store is not None:
            keep(experiment, name)


@contextmanager
def _locked(experiment: Experiment, name: str) -> Iterator[None]:
    """Hold the lock of a stage's output, which workers that make shards share, and processes that train together take once.

    What was only begun there, and what is begun here and then refused, is forgotten.
    """
    stage = STAGES[name]
    written = [experiment.directory(directory) for directory in stage.writes]
    if not is_first_process():
        yield
    elif stage.shared and stage.record is not None:
        directory = experiment.directory(stage.record)
        with lock.among_others(directory, name, partial(record.forget_begun, directory)):
            yield
    else:
        with lock.alone(written or [Path(experiment.output) / name], name), record.nothing_begun(written):
            yield
