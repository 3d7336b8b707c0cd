"""The benchmarks of training run, in their smallest form, and what they compare agrees."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
    )


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_gpu(tmp_path):
    """Every section but those for a GPU; both forms of the loss and all ways of packing give the same."""
    done = run("gpu.py", "--smoke", "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failures"] == []
    if found["device"] == "CPU":
        assert found["skipped"] == ["compile: needs a GPU"]
    assert {"loss", "step", "layer", "showcase", "packing", "engine"} <= found["rows"].keys()
    assert found["aims"]["gpu_packing_gradient_difference"] < 1e-5
    assert found["aims"]["gpu_packing_trainer_difference"] < 1e-5
    errors = {row["dtype"]: row["fused weight"] for row in found["rows"]["loss"] if row["head"] == "plain"}
    for dtype, digits in {"float32": 20, "float16": 9, "bfloat16": 6}.items():  # of 24, 11 and 8
        assert errors[dtype] < 2.0**-digits
    printed = [line.split() for line in done.stdout.splitlines() if line.startswith("aim ")]
    assert {name: pytest.approx(float(value), rel=1e-3) for _, name, value in printed} == found["aims"]


def test_train_step(tmp_path):
    """The two fine-tunings have one loss, and so have the two ways of computing ours."""
    done = run("train_step.py", "--smoke", "--json", tmp_path / "step.json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "step.json").read_text())
    (row,) = found["steps"]
    assert row["llmdistill"]["loss"] == pytest.approx(row["dense distillation"]["loss"], rel=1e-3)
    assert row["TRL SFT"]["loss"] == pytest.approx(row["transformers SFT"]["loss"], rel=1e-3)
    assert row["llmdistill"]["parts"]["ce"] == pytest.approx(row["TRL SFT"]["loss"], rel=1e-3)
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
