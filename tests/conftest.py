"""A tiny real model with the demo teacher's architecture, and the demo teacher itself where it has been written."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.factories import make_row, write_experiment, write_rows, write_tiny
from tests.forked import can_fork, run_forked

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, so that two processes end together."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.fixture(scope="session", autouse=True)
def _float32():
    """What is computed in this process is compared with references in float32, on whatever machine the tests run."""
    from llmdistill.config import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_torch_precision", lambda: machine.Precision("float32", "as the tests want it"))
        patch.setattr(machine, "cpu_precision", lambda: machine.Precision("float32", "as the tests want it"))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo teacher: a real language model of 135M parameters."""
    directory = ROOT / "models/SmolLM2-135M-Instruct"
    if not (directory / "config.json").exists():
        subprocess.run([sys.executable, "-m", "llmdistill.models.demo_teacher", directory], check=True)
    return directory


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, with the first tokens of the demo teacher's vocabulary."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny", smollm2)


@pytest.fixture(scope="session")
def whole_tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with the demo teacher's whole vocabulary, for what depends on it; a file's own `tiny` says why."""
    return write_tiny(tmp_path_factory.mktemp("models") / "whole", smollm2, 49152)


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of eight rows of uneven length without soft targets."""
    import numpy as np

    directory = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(8):
        prompt, completion = generator.integers(3, 2000, 3 + number % 3), generator.integers(3, 2000, 1 + 2 * number)
        rows.append(make_row(str(number), prompt, completion))
    return write_rows(directory, rows, kind="none")


def run_cli(*arguments: object, timeout: int = 600, **environment: str) -> CompletedProcess[str]:
    """The command as a user runs it, as a fork of a process that has done the imports where that is the same."""
    words = [str(argument) for argument in arguments]
    environment = {**os.environ, **environment}
    if can_fork(environment):
        return run_forked(["llmdistill", *words], ROOT, environment, timeout)
    command = [sys.executable, "-m", "llmdistill", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment)


@pytest.fixture
def sigterm():
    """Keeps what SIGTERM does over a call of `cli.main`."""
    before, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    yield
    signal.signal(signal.SIGTERM, before)
    sys.unraisablehook = hook


@pytest.fixture
def experiment_file(tiny: Path, tmp_path: Path) -> Path:
    """The small experiment in a directory of the test's own."""
    return write_experiment(tiny, tmp_path)
