"""One stage in this process: alone or among its workers, watched, and with an object store if there is one."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.objectstore.copies import bring, keep
from llmdistill.runs import lock, record
from llmdistill.runs.progress import console, working
from llmdistill.runs.watch import watched
from llmdistill.stages.table import STAGES


def run_stage(experiment: Experiment, name: str, share: str | None = None, **options: Any) -> None:
    """Run a stage; what it reads and writes is brought from the object store and kept there.

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


def _locked(experiment: Experiment, name: str) -> AbstractContextManager[None]:
    """The lock of what a stage writes, which workers that make shards share, and processes that train together have once."""
    stage = STAGES[name]
    if os.environ.get("RANK", "0") != "0":
        return nullcontext()
    if stage.shared and stage.record is not None:
        directory = experiment.directory(stage.record)
        return lock.among_others(directory, name, lambda: record.forget_begun(directory))
    return lock.alone([experiment.directory(written) for written in stage.writes] or [Path(experiment.output) / name], name)
