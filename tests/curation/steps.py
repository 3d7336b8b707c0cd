"""Rows without a teacher, and one step of `curate` on them."""

import json
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill.config import Experiment
from llmdistill.curation.steps import StepContext, step_inputs, step_named


def table(texts, prompts=None, ids=None, reasons=None, fields=None, logprobs=None):
    """Rows with these answers; `ids` are prompt and completion, of which the first one is the prompt."""
    count = len(texts)
    prompts = prompts or [f"question {n // 2}" for n in range(count)]
    messages = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    return pa.table(
        {
            "id": [f"row{n}" for n in range(count)],
            "prompt": messages,
            "completion": [[{"role": "assistant", "content": text}] for text in texts],
            "input_ids": pa.array(ids or [[9, 1, 2, 3]] * count, pa.list_(pa.int32())),
            "completion_start": pa.array([1] * count, pa.int32()),
            "finish_reason": reasons or ["stop"] * count,
            "metadata": [json.dumps(one) for one in fields or [{}] * count],
            "token_logprobs": pa.array(logprobs or [[-1.0]] * count, pa.list_(pa.float32())),
        }
    )


def make_experiment(steps, output="o", held_out=0.1):
    return Experiment.model_validate(
        {"output": str(output), "teacher": {"model": "t"}, "curate": list(steps), "eval": {"held_out": held_out}}
    )


def apply_step(tmp_path: Path, step, rows, group=1000, manifest=None):
    """What one step says of each row, in groups of so many; and its facts."""
    experiment = make_experiment([step], tmp_path)
    (entry,) = experiment.curate
    step_inputs(experiment.curate)
    pq.write_table(rows, tmp_path / "rows.parquet")
    manifest = manifest or {"tokenizer": {"special_token_ids": [0]}}
    with ExitStack() as closing:
        key = f"curate.0.{entry.name}"
        context = StepContext(experiment, manifest, [tmp_path / "rows.parquet"], key, tmp_path, tmp_path / "log.jsonl", closing)
        check = step_named(entry.name).start(entry.settings, context)
        reasons = [reason for start in range(0, len(rows), group) for reason in check(rows.slice(start, group))]
    assert len(reasons) == len(rows)
    return reasons, context.facts
