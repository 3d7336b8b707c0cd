"""Whole rounds beside micro-rounds: tokens that the student writes and is trained on, per second of everything around it."""

import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic
from found import Found

ROUNDS, STEPS, BATCH, WRITTEN = 4, 16, 32, 256


def rounds(small: bool, found: Found) -> None:
    """The same rounds both ways, with teacher and student of random weights; `small` is with the engine `transformers`."""
    if not small and importlib.util.find_spec("vllm") is None:
        found.skipped("rounds: needs vllm")
        return
    with tempfile.TemporaryDirectory() as directory:
        file = experiment(Path(directory), small)
        speeds = {}
        for name, every in (("whole rounds", None), ("micro-rounds", 1 if small else STEPS)):
            tokens, seconds, stages = timed(file, name, every, small)
            speeds[name] = tokens / seconds
            found.row("rounds", rounds=name, tokens=tokens, seconds=seconds, **{"tokens/s": speeds[name]}, stages=stages)
    found.aim("micro_rounds_speed", speeds["micro-rounds"] / speeds["whole rounds"])


def experiment(directory: Path, small: bool) -> Path:
    """A configuration, with the models and the prompts that it names."""
    for name, shape in (("teacher", "teacher"), ("student", "showcase")):
        model = synthetic.llama("tiny" if small else shape, synthetic.TINY_VOCAB, "bfloat16")
        model.save_pretrained(directory / name)
        synthetic.tokenizer().save_pretrained(directory / name)
    lines = (json.dumps({"prompt": f"Say {number} in words."}) for number in range(40 if small else 4 * STEPS * BATCH))
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    arguments = {"per_device_train_batch_size": 2 if small else BATCH, "gradient_checkpointing": False, "max_steps": 1}
    engine = {"engine": "transformers"} if small else {"engine": "vllm", "engine_args": {"gpu_memory_utilization": 0.4}}
    written = 8 if small else WRITTEN
    settings = {
        "output": str(directory / "run"),
        "teacher": {"model": str(directory / "teacher"), **engine},
        "prompts": {"source": str(directory / "prompts.jsonl")},
        "generate": {"max_tokens": written, "min_tokens": written, "temperature": 1.0},
        "targets": {"kind": "topk", "k": 16},
        "student": {"model": str(directory / "student")},
        "train": {"args": arguments},
        "eval": {"held_out": 0.1},
    }
    file = directory / "experiment.yaml"
    file.write_text(json.dumps(settings))
    return file


def timed(file: Path, name: str, every: int | None, small: bool) -> tuple[int, float, int]:
    """Tokens written by the student in all rounds, seconds, and how many stages that took."""
    from llmdistill.config import load_experiment
    from llmdistill.data.manifest import read_manifest
    from llmdistill.workflow.plan import stages

    steps = 1 if small else STEPS
    settings: dict[str, Any] = {"n": 2 if small else ROUNDS, "loss": "reverse_kl"}
    batch = 2 if small else BATCH
    settings |= {"every": every, "args": {"save_steps": 1000}} if every else {"args": {"max_steps": steps, "save_steps": 1000}}
    changes = [("rounds", json.dumps({**settings, "limit": steps * batch})), ("output", str(file.parent / name.split("-")[0]))]
    made = stages(load_experiment(file, changes))
    first = [stage.command for stage in made].index("train") + 1
    last = [stage.command for stage in made].index("eval")
    work(made[:first], small)
    start = time.perf_counter()
    work(made[first:last], small)
    seconds = time.perf_counter() - start
    output = Path(made[0].experiment.output) / "rounds"
    written = [read_manifest(file.parent) for file in output.glob("*/written/data/dataset.json")]
    assert len(written) == settings["n"]
    return sum(entry["tokens"] for one in written for entry in one["shards"]), seconds, last - first


def work(made: list[Any], small: bool) -> None:
    """Run stages, each in a process of its own as `run` does; the small ones in this one."""
    from llmdistill.stages.table import STAGES
    from llmdistill.workflow.pipeline import run_stages

    if not small:
        return run_stages(made)
    for stage in made:
        STAGES[stage.command].function(stage.experiment)
    return None
