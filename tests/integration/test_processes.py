"""Training by two processes is training by one: the same losses, step by step."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, run_cli


def losses(directory):
    history = json.loads((directory / "student/trainer_state.json").read_text())["log_history"]
    names = ("loss", "ce", "kl", "hidden", "attention", "grad_norm")
    return [{name: entry[name] for name in names if name in entry} for entry in history if "ce" in entry]


def train(file, output, data, processes, *overrides):
    """As a user starts it: `torchrun` where there are several processes."""
    arguments = ["train", file, "--output", output, "--train.dataset", data, *overrides]
    if processes == 1:
        result = run_cli(*arguments)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "llmdistill", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    return losses(output)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_have_the_losses_of_one(experiment_file, tmp_path, accumulation):
    """Rows differ in length, so each process has another number of tokens: the sum is divided by that of all of them."""
    lengths = ["--generate.max_tokens", 24, "--teacher.batch_size", 8]
    assert run_cli("generate", experiment_file, *lengths).returncode == 0
    data = tmp_path / "run/data"
    steps = ["--train.args.max_steps", 4, "--train.args.gradient_accumulation_steps", accumulation]
    cut = ["--train.args.max_length", 40]  # uneven: some rows lose the end of their completion
    one = train(experiment_file, tmp_path / "one", data, 1, *steps, *cut, "--train.args.per_device_train_batch_size", 4)
    two = train(experiment_file, tmp_path / "two", data, 2, *steps, *cut, "--train.args.per_device_train_batch_size", 2)
    assert len(one) == len(two) == 4
    for mine, theirs in zip(one, two, strict=True):
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=2e-4), name


def test_layers_of_a_teacher_are_compared_by_two_processes_as_by_one(experiment_file, tmp_path):
    """With a projector, which DDP has to keep the same on both."""
    assert run_cli("generate", experiment_file, "--generate.max_tokens", 16).returncode == 0
    data, online = tmp_path / "run/data", ["--targets.kind", "online", "--train.args.max_steps", 3]
    online += ["--student.prune.hidden_size", 24, "--train.hidden.loss", "mse", "--train.attention.weight", 0.5]
    one = train(experiment_file, tmp_path / "one", data, 1, *online, "--train.args.per_device_train_batch_size", 4)
    two = train(experiment_file, tmp_path / "two", data, 2, *online, "--train.args.per_device_train_batch_size", 2)
    assert len(one) == len(two) == 3
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() >= {"hidden", "attention"}
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=2e-4), name
