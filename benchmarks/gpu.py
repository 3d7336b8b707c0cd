"""Measurements on one GPU, in minutes: precision, compiling, packing, and the cost of a step.

    python benchmarks/gpu.py --json gpu.json                 # everything, in at most eight minutes
    python benchmarks/gpu.py --sections loss,step            # some of it
    python benchmarks/gpu.py --smoke                         # tiny sizes, on any machine: does it run?

It needs no download and, but for `rounds`, no vLLM: models have random weights, rows have random targets. Each section runs in
its own process and prints what it lacks; a failure does not stop the others. The exit status is 1 if any failed.

- **loss**: the fused loss in every precision, for every divergence and kind of target, and for a plain, tied, soft-capped and
  LoRA-adapted output layer: the relative error of the loss and of every gradient against the plain form in float64, beside
  that of the plain form in the same precision.
- **step**: a step of `DistillTrainer` beside one of `trl.SFTTrainer`, as it comes and with Liger's layers where that is
  installed: the same model, rows, optimiser and precision, processes that take turns; median time and peak memory.
- **layer**: the output layer and its loss alone, beside TRL's fused cross-entropy and beside the three matrix products that
  neither can do without; and what collating the batch takes on the CPU.
- **showcase**: the training of `configs/showcase.yaml` on random rows, as it is and with other ways of batching: tokens a
  second and the share of the device's peak (`mfu`, as the trainer logs it).
- **packing**: whether packed rows are isolated from each other, by attention implementation: the gradient against that of the
  padded rows; and the trainer's `padding_free` and `packing` against its padded batches.
- **compile**: the trainer's step with `torch_compile` beside the one without.
- **engine**: positions per second that the engine `transformers` scores, and tokens per second that it generates.
- **rounds**: whole rounds beside micro-rounds (docs/rounds.md): the tokens that the student writes, per second of writing,
  scoring, training and starting. It needs vLLM.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gpu_loss
import gpu_rounds
import gpu_training
import synthetic
from found import Found
from race import train_in_turns

TRAINING = ("accelerate", "datasets", "peft", "pydantic", "trl")


def main() -> None:
    """Run the sections, print the aims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated sections to run")
    parser.add_argument(
        "--seconds", type=float, default=480, help="time limit: after it no section starts, and the running one is stopped"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, all in this process")
    parser.add_argument("--json", type=Path, help="also write the figures here, after every row")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        train_in_turns(gpu_training.make_trainer(arguments.one))
        return
    if arguments.part:
        found = Found(Path(arguments.part[1]))
        attempt(arguments.part[0], False, found)
        return
    names = arguments.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--sections: there is no {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    found = Found(arguments.json)
    describe(found)
    deadline = time.monotonic() + arguments.seconds
    for name in names:
        begin(name, arguments.smoke, deadline, found)
    for name, value in found.all["aims"].items():
        print(f"aim {name} {value:.4g}")
    print(f"{len(found.all['failures'])} failed, {len(found.all['skipped'])} skipped", flush=True)
    sys.exit(bool(found.all["failures"]))


def describe(found: Found) -> None:
    """The device and the versions."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    names = ("transformers", "trl", "peft", "triton", "liger_kernel")
    versions = {"torch": torch.__version__} | {name: version(name) for name in names}
    found.all |= {"device": device, "versions": versions, "flash_attn": is_flash_attn_2_available()}
    print(f"{device}; {', '.join(f'{name} {number}' for name, number in versions.items())}", flush=True)


def version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(name)
    except PackageNotFoundError:
        return "none"


def begin(name: str, smoke: bool, deadline: float, found: Found) -> None:
    """Run a section, unless something that it needs is not there."""
    import torch

    _, needs, needs_gpu = SECTIONS[name]
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    left, started = deadline - time.monotonic(), time.monotonic()
    if missing:
        found.skipped(f"{name}: needs {', '.join(missing)}")
    elif needs_gpu and not torch.cuda.is_available():
        found.skipped(f"{name}: needs a GPU")
    elif left < 10:
        found.skipped(f"{name}: the time is over (--seconds)")
    else:
        print(f"\n## {name}", flush=True)
        if smoke:
            attempt(name, True, found)
        else:
            apart(name, left, found)
        print(f"\n{name}: {time.monotonic() - started:.0f} s", flush=True)


def apart(name: str, seconds: float, found: Found) -> None:
    """Run a section in a process of its own: a CUDA error leaves a process of no use."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "found.json"
        ended = None
        try:
            ended = subprocess.run([sys.executable, __file__, "--part", name, str(file)], timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            found.failed(f"{name}: not done in the {seconds:.0f} s that were left")
        if file.exists():
            found.add(json.loads(file.read_text()))
        if ended:
            found.failed(f"{name}: its process ended with status {ended}")


def attempt(name: str, small: bool, found: Found) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        SECTIONS[name][0](small, found)
    except Exception as error:
        found.raised(name, error)
    found.write()


def engine(small: bool, found: Found) -> None:
    """Requests of random ids, 16 sampled targets a position; what is measured includes drawing and encoding them."""
    import numpy as np

    from llmdistill.config import Generate, Targets, Teacher
    from llmdistill.teachers import EngineSpec, Request
    from llmdistill.teachers.transformers import TransformersEngine

    vocab, count, prompt, length, written = (512, 4, 8, 16, 8) if small else (49_152, 128, 64, 512, 128)
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, vocab, prompt + length).tolist() for _ in range(count)]
    with tempfile.TemporaryDirectory() as directory:
        synthetic.llama("tiny" if small else "teacher", vocab, "bfloat16").save_pretrained(directory)
        teacher = Teacher(model=directory, engine="transformers", batch_size=min(32, count))
        for kept in (Targets(kind="sampled", n=16), Targets(kind="topk", k=64)):
            reads = TransformersEngine(EngineSpec(teacher, Generate(max_tokens=written), kept, [2], prompt + written))
            requests = [Request(number, row[:prompt], number, row[prompt:]) for number, row in enumerate(ids)]
            whole = [Request(number, row[:prompt], number) for number, row in enumerate(ids)]
            speeds = {}
            for what, work in (("score", lambda: reads.score([requests])), ("generate", lambda: reads.generate([whole[:32]]))):  # noqa: B023
                for _ in range(1 if small else 2):  # the first round warms up
                    start = time.perf_counter()
                    positions = sum(len(completion.ids) for completion in work())
                    speeds[what] = positions / (time.perf_counter() - start)
            found.row(
                "engine", targets=kept.kind, kept=kept.kept, **{f"{what} tokens/s": speed for what, speed in speeds.items()}
            )
            if kept.kind == "sampled":
                for what, speed in speeds.items():
                    found.aim(f"gpu_{what}_tokens_per_s", speed)


# By name, in the order of what matters most: the section, what it needs, and whether it needs a GPU.
SECTIONS: dict[str, tuple[Callable[[bool, Found], None], tuple[str, ...], bool]] = {
    "loss": (gpu_loss.loss, ("peft", "pyarrow"), False),
    "step": (gpu_training.step, TRAINING, False),
    "layer": (gpu_loss.layer, ("trl", "datasets", "pydantic"), False),
    "showcase": (gpu_training.showcase, TRAINING, False),
    "packing": (gpu_training.packing, TRAINING, False),
    "compile": (gpu_training.compiled, TRAINING, True),
    "engine": (engine, ("pydantic",), False),
    "rounds": (gpu_rounds.rounds, TRAINING, False),
}

if __name__ == "__main__":
    main()
