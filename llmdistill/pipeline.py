"""`llmdistill run`: every stage in order, each in a process of its own, as a scheduler would start them."""

import subprocess
import sys

from llmdistill.config import Experiment
from llmdistill.tasks import read_tasks


def stages(experiment: Experiment) -> list[str]:
    """The stages in order: the dataset is written by the teacher, or, where `score` is given, read by it."""
    made = [] if experiment.prompts is None or not experiment.prompts.steps else ["prompts"]
    first = ["score"] if experiment.score else [*made, "generate"]
    cut, exported = ["prune"] if experiment.student.prune else [], ["export"] if experiment.export else []
    return [*first, "curate", *cut, "train", "eval", *exported, "report"]


def run_pipeline(experiment: Experiment, arguments: list[str]) -> None:
    """Run the stages; the first that fails ends the run with its exit status. A finished stage says so and is skipped.

    Args:
        experiment: the configuration.
        arguments: the configuration file and the overrides, as they were typed.

    Raises:
        InputError: the tasks of the last stages are not usable, which is better known before the first.
    """
    read_tasks(experiment.eval.tasks)
    for stage in stages(experiment):
        with subprocess.Popen([sys.executable, "-m", "llmdistill", stage, *arguments]) as process:
            try:
                status = process.wait()
            except BaseException:  # Ctrl-C or SIGTERM: the stage gets it too and keeps what it has finished
                process.terminate()
                process.wait()
                raise
        if status:
            sys.exit(status if status > 0 else 1)
