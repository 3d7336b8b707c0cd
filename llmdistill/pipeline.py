"""`llmdistill run`: every stage in order, each in a process of its own, as a scheduler would start them."""

import subprocess
import sys

ORDER = ("generate", "curate", "train", "eval", "report")


def run_pipeline(arguments: list[str]) -> None:
    """Run the stages; the first that fails ends the run with its exit status. A finished stage says so and is skipped.

    Args:
        arguments: the configuration file and the overrides, as they were typed.
    """
    for stage in ORDER:
        with subprocess.Popen([sys.executable, "-m", "llmdistill", stage, *arguments]) as process:
            try:
                status = process.wait()
            except BaseException:  # Ctrl-C or SIGTERM: the stage gets it too and keeps what it has finished
                process.terminate()
                process.wait()
                raise
        if status:
            sys.exit(status if status > 0 else 1)
