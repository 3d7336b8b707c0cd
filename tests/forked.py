"""Programs in processes that have done the imports, which take seconds, and can be killed at any moment of what comes after.

There is one forkserver for all tests of a process: it is started once, with one list of modules.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

PRELOADED = ["trl", "peft", "llmdistill.cli", "llmdistill.training.trainer", "llmdistill.teachers.transformers"]
PRELOADED += ["llmdistill.teachers.openai", "llmdistill.teachers.anthropic"]
PRELOADED += [
    f"llmdistill.stages.{name}"
    for name in ("generate", "score", "curate", "prune", "train", "rounds", "evaluate", "export", "report")
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)

_READ_ONCE = ("PYTHON", "HF_", "OMP_")  # variables that the interpreter or a library reads when it is started
_AT_START = dict(os.environ)


def can_fork(environment: Mapping[str, str]) -> bool:
    """Whether a forked process sees these variables as one that is started with them."""
    names = [name for name in {*environment, *_AT_START} if name.startswith(_READ_ONCE) and name != "HF_TOKEN"]
    return all(environment.get(name) == _AT_START.get(name) for name in names)


def run_forked(words: Sequence[str], directory: Path, environment: Mapping[str, str], timeout: float) -> CompletedProcess[str]:
    """Run a program by its name and arguments: `llmdistill`, or the path of a script.

    Raises:
        TimeoutError: it takes longer; it is killed.
    """
    with tempfile.TemporaryDirectory() as made:
        out, err = Path(made, "out"), Path(made, "err")
        process = context.Process(target=_program, args=(list(words), str(directory), dict(environment), str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words} takes more than {timeout} s: {err.read_text()}")
        return CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _program(words: list[str], directory: str, environment: dict[str, str], out: str, err: str) -> None:
    from llmdistill.__main__ import run
    from llmdistill.runs import pipeline

    class Stage:
        """What `llmdistill run` starts a stage by: a fork of the process that has done the imports, not of its own."""

        def __init__(self, command: list[str]) -> None:
            words = ["llmdistill", *command[3:]]
            self.process = context.Process(target=_program, args=(words, directory, environment, out, err))
            self.process.start()
            self.terminate = self.process.terminate

        def wait(self) -> int:
            self.process.join()
            assert self.process.exitcode is not None
            return self.process.exitcode

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = words
    if words[0] != "llmdistill":
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
        return
    pipeline.subprocess = SimpleNamespace(Popen=lambda command: nullcontext(Stage(command)))
    run()
