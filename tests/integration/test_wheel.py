"""The package by itself: built, installed into an environment of its own, and used where there is no repository."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

USER = """
from llmdistill import DistillConfig, DistillTrainer, InputError, load_dataset, losses, push_to_hub

args = DistillConfig(output_dir="out", loss="forward_kl", alpha=0.9)
reveal_type(args.alpha)
reveal_type(args.learning_rate)
reveal_type(push_to_hub)
reveal_type(losses.Objective)
reveal_type(InputError)
trainer = DistillTrainer(model="m", args=args, train_dataset=load_dataset("d"))
reveal_type(trainer)
DistillConfig(output_dir="out", alhpa=0.9)
DistillConfig(output_dir="out", alpha="0.9")
load_dataset("d", split="validation")
from llmdistill import DistilTrainer
"""
SEEN = """
5: float
6: float
7: def (directory: str | pathlib.Path, repo_id: str, private: bool =, revision: str | None =) -> str
8: def (loss: str =, alpha: float =, temperature: float =, beta: float | None =, sequence_alpha: float =) -> Objective
9: def (*args: object) -> InputError
11: DistillTrainer
12: call-arg
13: arg-type
14: arg-type
15: attr-defined
"""
# Of torch and transformers only what a trainer's arguments are made of is read, so that it takes seconds.
MYPY = """
[mypy]
follow_imports = skip
[mypy-llmdistill.*,trl.*,transformers,transformers.training_args]
follow_imports = normal
"""


def run(*command, cwd=ROOT, **environment):
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def make_wheel(source, out):
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (wheel,) = out.glob("llmdistill-*.whl")
    return wheel


def content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return make_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment with the wheel, and with the pinned libraries of this one but not its llmdistill."""
    directory = tmp_path_factory.mktemp("bare")
    venv.create(directory, with_pip=False)
    python = directory / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = run(python, "-c", "import llmdistill; print(llmdistill.__file__)", cwd=directory, PYTHONPATH="")
    assert Path(found.strip()).is_relative_to(packages)
    return python


def test_it_carries_what_stands_at_the_top_of_the_repository(wheel):
    carried = {name: data for name, data in content(wheel).items() if name.startswith("llmdistill/shipped/")}
    files = [
        *ROOT.glob("prompts/**/*.*"),
        *ROOT.glob("configs/**/*.yaml"),
        *ROOT.glob("configs/**/*.jsonl"),
        *ROOT.glob("configs/**/*.json"),
        *ROOT.glob("docs/**/*.md"),
    ]
    assert carried == {f"llmdistill/shipped/{file.relative_to(ROOT)}": file.read_bytes() for file in files}


def test_an_sdist_makes_the_same_wheel(wheel, tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path)
    (sdist,) = tmp_path.glob("llmdistill-*.tar.gz")
    assert content(make_wheel(sdist, tmp_path)) == content(wheel)


def test_the_first_experiment_needs_no_repository_and_its_dry_run_no_torch(python, tiny, tmp_path):
    command = python.parent / "llmdistill"
    (tmp_path / "without").mkdir()
    (tmp_path / "without/torch.py").write_text("raise ImportError")
    options = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "without"), "COLUMNS": "200"}
    (shipped,) = re.findall(r"Documentation, prompts and configurations: (.+)", run(command, "--help", **options))
    assert {path.name for path in Path(shipped).iterdir()} == {"docs", "prompts", "configs"}
    assert "--prompts FILE" in run(command, "init", "--help", **options)
    said = run(command, "init", "first", "--no-gpu", "--teacher", tiny, "--student", tiny, **options)
    assert "wrote first/experiment.yaml" in said
    options["cwd"] = tmp_path / "first"
    plan = run(command, "run", "experiment.yaml", "--dry-run", **options)
    assert "240 prompts = 240 rows" in plan
    assert "would write runs/first/report.html" in plan
    # The template of `judge` is a default that names a file of the package.
    run(command, "curate", "experiment.yaml", "--dry-run", "--curate", f"[judge: {{teacher: {{model: {tiny}}}}}]", **options)


def test_the_demo_needs_no_repository(python, smollm2, tmp_path):
    options = {"cwd": tmp_path, "PYTHONPATH": ""}
    command = python.parent / "llmdistill"
    assert "python -m llmdistill.models.demo_teacher models/SmolLM2-135M-Instruct" in run(command, "init", "--demo", **options)
    run(python, "-m", "llmdistill.models.demo_teacher", "--help", **options)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/SmolLM2-135M-Instruct").symlink_to(smollm2)
    assert "128 prompts = 128 rows" in run(command, "generate", "demo.yaml", "--dry-run", **options)


def test_a_type_checker_sees_its_signatures(python, tmp_path):
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", tmp_path / "cache", "user.py"]
    environment = {**os.environ, "PYTHONPATH": "", "MYPYPATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    lines = re.findall(r'^user\.py:(\d+): (?:note: Revealed type is "(.*)"|error: .*\[(.*)\])$', result.stdout, flags=re.M)
    seen = "\n".join(f"{number}: {re.sub(r'llmdistill[.a-z_]*[.]', '', revealed) or error}" for number, revealed, error in lines)
    assert seen == SEEN.strip(), result.stdout
