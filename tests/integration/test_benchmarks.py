"""Every benchmark runs in its smallest form, and what those of training compare agrees."""

import importlib.util
import json
import math
import os
import sys

import pytest

from llmdistill.config import load_experiment
from tests.conftest import ROOT
from tests.forked import run_forked

OTHERS = sorted(
    file.name
    for file in (ROOT / "benchmarks").glob("*.py")
    if "__main__" in file.read_text() and file.name not in ("gpu.py", "train_step.py")  # which have tests of their own
)


def run(script, *arguments):
    """It, in a process forked from one that has done the imports."""
    return run_forked([str(ROOT / "benchmarks" / script), *map(str, arguments)], ROOT, os.environ, 500)


def found_by(done, file):
    """What a benchmark wrote, after a look at whether it ended well, printed the same aims, and found numbers only."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    printed = [line.split() for line in done.stdout.splitlines() if line.startswith("aim ")]
    assert {name: pytest.approx(float(value), rel=1e-3) for _, name, value in printed} == found["aims"]
    numbers = list(numbers_in(found))
    assert numbers
    assert all(map(math.isfinite, numbers))
    return found


def numbers_in(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(part)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize("script", OTHERS)
def test_every_other(script, tmp_path):
    """The whole way, with a tiny model, few rows and one seed."""
    if script == "quantisation.py" and importlib.util.find_spec("torchao") is None:
        pytest.skip("training through rounded weights needs torchao")
    done = run(script, "--smoke", "--json", tmp_path / "found.json")
    found = found_by(done, tmp_path / "found.json")
    assert "| --- |" in done.stdout or "| ---: |" in done.stdout
    assert found["aims"] or script == "recipe.py"  # which only compares


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_gpu(tmp_path):
    """Every section but those for a GPU; both forms of the loss and all ways of packing give the same."""
    done = run("gpu.py", "--smoke", "--json", tmp_path / "gpu.json")
    found = found_by(done, tmp_path / "gpu.json")
    assert found["failures"] == []
    if found["device"] == "CPU":
        assert found["skipped"] == ["compile: needs a GPU"]
    assert {"loss", "step", "layer", "showcase", "packing", "engine", "rounds"} <= found["rows"].keys()
    assert found["aims"]["gpu_packing_gradient_difference"] < 1e-5
    assert found["aims"]["gpu_packing_trainer_difference"] < 1e-5
    errors = {row["dtype"]: row["fused weight"] for row in found["rows"]["loss"] if row["head"] == "plain"}
    for dtype, digits in {"float32": 20, "float16": 9, "bfloat16": 6}.items():  # of 24, 11 and 8
        assert errors[dtype] < 2.0**-digits


def test_the_parts_of_a_step_are_timed_on_the_accelerator_to_their_end(experiment_file, monkeypatch, capsys):
    """Where a call returns before its work is done."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import generate
    import torch

    waited, made, randn = [], [], torch.randn
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu", 0))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(1))
    monkeypatch.setattr(torch, "randn", lambda *sizes, device: made.append(device) or randn(*sizes))
    shares = generate.parts(load_experiment(experiment_file, [("targets", "{kind: sampled, n: 8}")]), 2, 0.5)
    assert made == [torch.device("cpu", 0)]
    assert len(waited) == 51 * len(shares)


def test_train_step(tmp_path):
    """The two fine-tunings have one loss, and so have the two ways of computing ours, and the two with a teacher beside."""
    done = run("train_step.py", "--smoke", "--json", tmp_path / "step.json")
    found = found_by(done, tmp_path / "step.json")
    (row,) = found["steps"]
    assert row["llmdistill"]["loss"] == pytest.approx(row["dense distillation"]["loss"], rel=1e-3)
    assert row["TRL SFT"]["loss"] == pytest.approx(row["transformers SFT"]["loss"], rel=1e-3)
    assert row["llmdistill"]["parts"]["ce"] == pytest.approx(row["TRL SFT"]["loss"], rel=1e-3)
    assert row["llmdistill, online"]["parts"]["kl"] == pytest.approx(row["TRL distillation"]["loss"], rel=1e-3)
    assert len(found["layer"]) == 1


def test_a_section_that_fails_or_lacks_something_ends_no_other(gpu, tmp_path, monkeypatch, capsys):
    def fails(small, found):
        found.row("fails", seen=1)
        raise ValueError("no such luck")

    monkeypatch.setattr(
        gpu, "SECTIONS",
        {"fails": (fails, (), False), "lacks": (fails, ("no_such_module",), False), "works": (lambda *_: None, (), False)},
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--json", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failures"] == ["fails: ValueError: no such luck"]
    assert found["skipped"] == ["lacks: needs no_such_module"]
    assert found["rows"] == {"fails": [{"seen": 1}]}
    assert "## works" in capsys.readouterr().out


def test_a_section_that_takes_too_long_is_ended_with_what_it_found(tmp_path):
    """In a process of its own, as on a GPU; its sizes are such that a CPU is not done with them."""
    done = run("gpu.py", "--sections", "loss,engine", "--seconds", 25, "--json", tmp_path / "gpu.json")
    assert done.returncode == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [entry.split(":")[0] for entry in found["failures"]] == ["loss"]
    assert found["skipped"] == ["engine: the time is over (--seconds)"]
