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
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

PRELOADED = ["llmdistill.cli", "trl", "peft", "llmdistill.training.trainer", "llmdistill.teachers.transformers"]
PRELOADED += ["llmdistill.teachers.openai", "llmdistill.teachers.anthropic"]
PRELOADED += [
    f"llmdistill.stages.{name}"
    for name in ("generate", "score", "curate", "prune", "train", "rounds", "evaluate", "export", "report")
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)

_READ_ONCE = ("PYTHON", "HF_", "OMP_")  # variables that the interpreter or a library reads when it is started
_SET_AGAIN = ("HF_TOKEN", "PYTHONWARNINGS")  # read when they are needed, or set by the command itself
_AT_START = dict(os.environ)


def can_fork(environment: Mapping[str, str]) -> bool:
    """Whether a forked process sees these variables as one that is started with them."""
    names = [name for name in {*environment, *_AT_START} if name.startswith(_READ_ONCE) and name not in _SET_AGAIN]
    return all(environment.get(name) == _AT_START.get(name) for name in names)


def run_forked(words: Sequence[str], directory: Path, environment: Mapping[str, str], timeout: float) -> CompletedProcess[str]:
    """Run a program by its name and arguments: `llmdistill`, or the path of a script.

    Raises:
        TimeoutError: it takes longer; it is killed.
    """
    with tempfile.TemporaryDirectory() as made:
        out, err = Path(made, "out"), Path(made, "err")
        process = start_forked(words, directory, environment, out, err)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words} takes more than {timeout} s: {err.read_text()}")
        return CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def start_forked(
    words: Sequence[str], directory: Path, environment: Mapping[str, str], out: Path, err: Path
) -> ForkServerProcess:
    """As `run_forked`, without waiting for its end; what it says goes to two files."""
    process = context.Process(target=_program, args=(list(words), str(directory), dict(environment), str(out), str(err)))
    process.start()
    return process


def _program(words: list[str], directory: str, environment: dict[str, str], out: str, err: str) -> None:
    from llmdistill.__main__ import run
    from llmdistill.workflow import pipeline

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
    if words[0] != "llmdistill":
        _script(words)
        return
    sys.argv = words
    pipeline.subprocess = SimpleNamespace(Popen=lambda command: nullcontext(Stage(command)))
    run()


def _script(words: list[str]) -> None:
    """A benchmark by its path and arguments."""
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    import race

    race.subprocess = SimpleNamespace(Popen=_Racer, PIPE=None)
    runpy.run_path(words[0], run_name="__main__")


class _Racer:
    """What a benchmark starts its workers by: a fork of the process that has done the imports."""

    def __init__(self, command: list[str], **_: object) -> None:
        its_input, told = context.Pipe(duplex=False)
        answers, its_output = context.Pipe(duplex=False)
        self.process = context.Process(target=_race, args=(command[1:], str(Path.cwd()), its_input, its_output))
        self.process.start()
        self.stdin, self.stdout = os.fdopen(os.dup(told.fileno()), "w"), os.fdopen(os.dup(answers.fileno()))
        for end in (its_input, told, answers, its_output):
            end.close()
        self.wait, self.kill = self.process.join, self.process.kill


def _race(words: list[str], directory: str, its_input: Connection, its_output: Connection) -> None:
    os.chdir(directory)
    os.dup2(its_input.fileno(), 0)
    os.dup2(its_output.fileno(), 1)
    its_output.close()
    sys.stdin = os.fdopen(0)
    _script(words)
