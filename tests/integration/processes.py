"""Training runs as a user starts them, by one process or by two, and what is compared of them."""

import json
import os
import shutil
import subprocess
import sys

from safetensors.torch import load_file

from tests.conftest import ROOT


def accelerate(name: str, module: str) -> list[str]:
    """A shipped configuration with two processes, which need no accelerator."""
    file = ROOT / f"configs/accelerate/{name}.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes=2", "--main_process_port=0"]
    return [*launch, "-m", module]


LAUNCHES = {
    "one process": ["-m", "llmdistill"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "llmdistill"],
    "ddp": accelerate("ddp", "llmdistill"),
    "fsdp2": accelerate("fsdp2", "tests.integration.fsdp_on_cpu"),
    "deepspeed_zero2": accelerate("deepspeed_zero2", "llmdistill"),
    "deepspeed_zero3": accelerate("deepspeed_zero3", "llmdistill"),
}


def start(launch, *arguments, **environment):
    """`llmdistill train` with these arguments."""
    return subprocess.run(
        [sys.executable, *LAUNCHES[launch], "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def losses(student):
    """What was logged of every step."""
    history = json.loads((student / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "ce", "kl", "hidden", "attention", "grad_norm", "learning_rate", "eval_kl")
    return [{name: entry[name] for name in names if name in entry} for entry in history if "ce" in entry or "eval_ce" in entry]


def weights(student):
    """The saved tensors."""
    return load_file(student / "model.safetensors")


def files(student):
    """What there is beside the checkpoints, whose form is each engine's own."""
    return sorted(str(path.relative_to(student)) for path in student.rglob("*") if "checkpoints" not in path.parts)


def rewind(student, step):
    """Make of a finished run one that was stopped after a step."""
    for path in [*student.iterdir(), *(student / "checkpoints").iterdir()]:
        if path.name not in ("checkpoints", "run.json", f"checkpoint-{step}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = json.loads((student / "run.json").read_text())
    (student / "run.json").write_text(json.dumps({**run, "status": "unfinished"}))
