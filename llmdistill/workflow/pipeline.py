"""`llmdistill run`: every stage in order, each in a separate process, as a scheduler would start them."""

import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from llmdistill.config import Experiment, dump_experiment
from llmdistill.runs import lock
from llmdistill.runs.files import write_text
from llmdistill.runs.progress import say
from llmdistill.stages.table import STAGES
from llmdistill.teachers import shared_file
from llmdistill.workflow.checks import check_inputs, check_plan, check_stale
from llmdistill.workflow.plan import CONFIGS, StageRun, stages


def run_pipeline(experiment: Experiment, remake: bool = False) -> None:
    """Run the stages; the first that fails ends the run with its exit status. Finished stages are skipped with a message.

    Args:
        experiment: the configuration.
        remake: remove the work of other settings first, which is refused otherwise.

    Raises:
        InputError: what the last stages read is not usable, or there is work of other settings, which is better known
            before the first.
    """
    check_inputs(experiment)
    stale = check_stale(experiment, remake)
    with lock.alone(stale, "run"):
        for directory, why in stale.items():
            say("run", f"removes {directory}: {why}")
            shutil.rmtree(directory.resolve())
            if directory.is_symlink():
                directory.unlink()
            shared_file(directory).unlink(missing_ok=True)  # what was spent on it counts no more
    check_plan(experiment)
    run_stages(stages(experiment))


def dry_run(experiment: Experiment, remake: bool = False) -> None:
    """Print what every stage would do, and about how long it would take.

    Args:
        experiment: the configuration.
        remake: as for `run_pipeline`; nothing is removed.

    Raises:
        InputError: a stage could not run with this configuration.
    """
    check_inputs(experiment)
    if stale := check_stale(experiment, remake):
        for directory, why in stale.items():
            say("run", f"would delete {directory} and make it again: {why}")
        return
    for stage in stages(experiment):
        if stage.round:  # Its models are those that earlier stages make: there is nothing to check them by yet.
            written = [stage.experiment.directory(name) for name in STAGES[stage.command].writes if name != "student-before"]
            say(f"round {stage.round}", f"{stage.command} would write {written[0]}")
        else:
            STAGES[stage.command].function(stage.experiment, dry_run=True)
    check_plan(experiment)


def run_stages(stages: list[StageRun]) -> None:
    """Run stages one after another; the first that fails ends this process with its exit status."""
    for stage in stages:
        if stage.round and stage.command == "generate":
            say(f"round {stage.round}", "the student writes, the teacher scores the text, and the student trains on it")
        status = _run(stage)
        if status:
            sys.exit(status if status > 0 else 1)


def _run(stage: StageRun) -> int:
    """Run a stage in a separate process, on a configuration saved next to its output; returns its exit status."""
    file = Path(stage.experiment.output) / CONFIGS / f"{stage.command}.yaml"
    text, was_there = dump_experiment(stage.experiment), file.exists()
    if not was_there or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    with subprocess.Popen([sys.executable, "-m", "llmdistill", stage.command, str(file)]) as process:
        try:
            status = process.wait()
        except BaseException:  # Ctrl-C or SIGTERM: the stage gets it too and keeps what it has finished
            process.terminate()
            process.wait()
            raise
    if status == 2 and not was_there:  # wrong input leaves nothing behind
        file.unlink()
        with suppress(OSError):
            file.parent.rmdir()
            file.parent.parent.rmdir()
    return status
