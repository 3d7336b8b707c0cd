"""Two processes under DeepSpeed train as one. `make test-deepspeed` installs it; its first run compiles a part of it."""

import os

import pytest
import torch

from tests.conftest import ROOT, run_cli
from tests.factories import write_experiment
from tests.integration.processes import files, losses, rewind, start, weights

DEEPSPEED = ROOT / ".deepspeed"
pytestmark = pytest.mark.skipif(not DEEPSPEED.exists(), reason="`make test-deepspeed` installs DeepSpeed")
# DeepSpeed asks for an accelerator unless it is told of none.
NO_ACCELERATOR = ["--train.args.use_cpu", "false", "--train.args.ddp_backend", "gloo"]
PYTHONPATH = os.pathsep.join([str(DEEPSPEED), *filter(None, [os.environ.get("PYTHONPATH")])])
STEPS = {"num_train_epochs": 2, "max_steps": -1, "gradient_accumulation_steps": 2, "max_length": 52, "save_steps": 2}
STEPS = [word for name, value in STEPS.items() for word in (f"--train.args.{name}", value)]
ADAPTERS = ["--student.lora.r", 4, "--targets.kind", "online"]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Start a run in a directory of its name; where its student is. One process runs once."""
    directory = tmp_path_factory.mktemp("deepspeed")
    file = write_experiment(tiny, directory)
    assert run_cli("generate", file, "--generate.max_tokens", 24, "--teacher.batch_size", 8).returncode == 0

    def run(launch, more):
        student = directory / f"{launch}-{len(more)}" / "student"
        alone = launch == "one process"
        if not (alone and student.exists()):
            fixed = ["--train.dataset", directory / "run/data", "--output", student.parent, *STEPS, *more]
            here = [] if alone else NO_ACCELERATOR
            batch = ["--train.args.per_device_train_batch_size", 10 if alone else 5]
            result = start(launch, file, *fixed, *here, *batch, PYTHONPATH=PYTHONPATH, DS_ACCELERATOR="cpu")
            assert result.returncode == 0, result.stdout + result.stderr
        return student

    return run


@pytest.mark.parametrize("more", [[], ADAPTERS], ids=["whole", "adapters"])
@pytest.mark.parametrize("launch", ["deepspeed_zero2", "deepspeed_zero3"])
def test_two_processes_train_as_one_and_go_on_from_a_checkpoint(trained, launch, more):
    one, two = trained("one process", more), trained(launch, more)
    assert len(losses(one)) == len(losses(two)) == 4
    for mine, theirs in zip(losses(one), losses(two), strict=True):
        assert theirs == pytest.approx(mine, rel=2e-4)
    assert files(two) == files(one)
    before, saved = losses(two), weights(two)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4)

    rewind(two, 2)
    trained(launch, more)
    assert losses(two) == before
    again = weights(two)
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
