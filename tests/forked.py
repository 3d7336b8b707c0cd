"""Programs in processes that have done the imports, which take seconds, and can be killed at any moment of what comes after.

There is one forkserver for all tests of a process: it is started once, with one list of modules.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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
        import race

        race.subprocess = SimpleNamespace(Popen=_Racer, PIPE=None)
        runpy.run_path(words[0], run_name="__main__")
        return
    pipeline.subprocess = SimpleNamespace(Popen=lambda command: nullcontext(Stage(command)))
    run()


class _Racer:
    """What a benchmark starts its workers by: a fork of itself, in place of a process that does the imports again."""

    def __init__(self, command: list[str], **_: object) -> None:
        its_input, told = os.pipe()
        answers, its_output = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(its_input, 0)
            os.dup2(its_output, 1)
            os.close(told)
            sys.argv = command[1:]
            try:
                runpy.run_path(command[1], run_name="__main__")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(its_input)
        os.close(its_output)
        self.stdin, self.stdout = os.fdopen(told, "w"), os.fdopen(answers)

    def wait(self) -> None:
        if self.pid:
            os.waitpid(self.pid, 0)
            self.pid = 0

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
