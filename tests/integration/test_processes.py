"""Training by two processes is training by one: the same losses, step by step, and the same student."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from llmdistill.training.callbacks import last_checkpoint
from tests.conftest import ROOT, run_cli
from tests.factories import write_experiment
from tests.integration.processes import LAUNCHES, files, losses, rewind, start, weights

# 24 rows in batches of 10: the last has rows for one process alone, and each of them fewer than asked for.
WHOLE = {
    "num_train_epochs": 2, "max_steps": -1, "gradient_accumulation_steps": 2, "max_length": 52, "save_steps": 1,
    "save_total_limit": 4,
}  # fmt: skip
WHOLE = {f"train.args.{name}": value for name, value in WHOLE.items()}
# The teacher is beside the student; the best of the checkpoints is kept, by what is measured on 8 rows in batches of 6.
ADAPTERS = {
    "student.lora.r": 4, "targets.kind": "online", "train.validation": 0.3, "train.early_stopping.patience": 5,
    "train.args.max_steps": 4, "train.args.eval_steps": 2, "train.args.save_steps": 2, "train.args.learning_rate": 0.01,
    "train.args.gradient_checkpointing": "true",
}  # fmt: skip
# Hidden states of different sizes, with a projector, which DDP has to keep the same on both.
LAYERS = {
    "targets.kind": "online", "student.prune.hidden_size": 24, "train.hidden.loss": "mse", "train.attention.weight": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Start a run, each kind of run once; where its student is, and what it printed."""
    directory = tmp_path_factory.mktemp("processes")
    file = write_experiment(tiny, directory)
    assert run_cli("generate", file, "--generate.max_tokens", 24, "--teacher.batch_size", 8).returncode == 0
    done = {}

    def run(launch, settings, output=None):
        key = output or f"{launch} {sorted(settings.items())}"
        if key not in done or output:
            student = (output or directory / str(len(done))) / "student"
            batch = 10 if launch == "one process" else 5
            fixed = {"train.dataset": directory / "run/data", "output": student.parent}
            sizes = {f"train.args.per_device_{kind}_batch_size": size for kind, size in (("train", batch), ("eval", batch - 2))}
            overrides = [word for name, value in {**fixed, **sizes, **settings}.items() for word in (f"--{name}", value)]
            result = start(launch, file, *overrides)
            assert result.returncode == 0, result.stdout + result.stderr
            done[key] = student, result.stdout
        return done[key]

    run.experiment = file, directory / "run/data"
    return run


@pytest.mark.parametrize(
    ("launch", "settings"),
    [("ddp", WHOLE), ("fsdp2", WHOLE), ("fsdp2", ADAPTERS), ("torchrun", LAYERS)],
    ids=["ddp", "fsdp2", "fsdp2, adapters", "torchrun, layers"],
)
def test_two_processes_train_as_one(trained, launch, settings):
    (one, _), (two, printed) = trained("one process", settings), trained(launch, settings)
    assert len(losses(one)) == len(losses(two)) >= 3
    for mine, theirs in zip(losses(one), losses(two), strict=True):
        assert theirs == pytest.approx(mine, rel=2e-4)
    assert files(two) == files(one)
    mine, theirs = weights(one), weights(two)
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert printed.count("done in") == 1, "one of the processes speaks for both"


def test_fsdp2_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(trained):
    student, _ = trained("fsdp2", WHOLE)
    before, saved = losses(student), weights(student)
    rewind(student, 1)  # inside the first epoch, whose last batch is filled up
    trained("fsdp2", WHOLE, student.parent)
    assert losses(student) == before
    again = weights(student)
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())


def test_bad_input_ends_both_processes_with_one_message(tiny, tmp_path):
    file = write_experiment(tiny, tmp_path)
    result = start("torchrun", file, "--train.aplha", 0.5)
    assert result.stderr.count("no such key train.aplha; did you mean train.alpha?") == 1
    assert result.returncode != 0
    assert "exitcode  : 2" in result.stderr, "torchrun says with which status each ended"
    assert not (tmp_path / "run").exists()


def test_two_processes_that_are_told_to_stop_keep_the_same_step(trained, tmp_path):
    """SIGTERM to torchrun, as from a scheduler: a checkpoint of the step at which both have heard of it, and on from there."""
    output = tmp_path / "run"
    settings = {**WHOLE, "train.args.max_steps": 40, "train.args.save_steps": 4, "train.args.save_total_limit": 50}
    overrides = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    experiment, dataset = trained.experiment
    command = [str(experiment), "--train.dataset", str(dataset), "--output", str(output), *overrides]
    words = [sys.executable, *LAUNCHES["torchrun"], "train", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    checkpoints = output / "student/checkpoints"
    end = time.monotonic() + 200
    while not (checkpoints / "checkpoint-4/trainer_state.json").exists():
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    step = int(re.search(r"terminated; run the same command to continue from step (\d+)", said)[1])
    assert 4 <= step < 40
    assert last_checkpoint(checkpoints) == str(checkpoints / f"checkpoint-{step}")
    result = start("torchrun", *command)
    assert result.returncode == 0, result.stderr
    assert len(losses(output / "student")) == 40
