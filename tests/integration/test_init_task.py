"""`init --task` with real models on the CPU: from twelve examples to the report, whatever the teacher makes of them."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdistill import cli
from llmdistill.config import load_experiment
from llmdistill.stages.curate import curate
from llmdistill.stages.evaluate import evaluate
from llmdistill.stages.generate import generate
from llmdistill.stages.prompts import prompts
from llmdistill.stages.report import report
from llmdistill.stages.train import train
from llmdistill.tasks.task import read_items, read_task
from tests.conftest import ROOT

LINES = ["The shop opens at nine.", "Rain falls on the old town.", "My cat sleeps under the table.", "Two trains leave at noon."]
SMALL = [  # what the experiment asks for, made little; an answer may be cut
    ("teacher.dtype", "float32"),
    ("prompts.steps.0.self_instruct.rounds", "1"),
    ("prompts.steps.0.self_instruct.samples", "8"),
    ("prompts.sampling.max_tokens", "64"),
    ("generate.max_tokens", "8"),
    ("curate.0.finish_reason.keep", "[stop, length]"),
    ("train.args", "{max_steps: 2, per_device_train_batch_size: 2, gradient_checkpointing: false}"),
    ("eval", "{held_out: 0.4, own_prompts: 0, samples: 0, sample_tokens: 2, resamples: 200, tasks: [task.yaml], task_limit: 3}"),
]


@pytest.fixture
def begin(whole_tiny, tmp_path, monkeypatch):
    """Twelve examples, and the experiment that `init` makes of them, small, as the working directory."""

    def begin(teacher):
        monkeypatch.chdir(tmp_path)
        rows = [{"input": f"{line} {n}", "output": f"It is {n}."} for n, line in enumerate(LINES * 3)]
        Path("examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = ["--task", "generate", "--examples", "examples.jsonl", "--description", "Repeat it in other words."]
        with pytest.raises(SystemExit) as ended:
            cli.main(["init", "mine", *task, "--teacher", str(teacher), "--student", str(whole_tiny), "--no-gpu"])
        assert ended.value.code == 0
        monkeypatch.chdir(tmp_path / "mine")
        return lambda *changes: load_experiment(Path("experiment.yaml"), [*SMALL, *changes])

    return begin


def rows_of(experiment, pattern):
    return [row for file in experiment.directory("curated").glob(pattern) for row in pq.read_table(file).to_pylist()]


@pytest.mark.slow
def test_from_examples_to_the_report(begin, smollm2, sigterm):
    experiment = begin(smollm2)()
    for stage in (prompts, generate, curate, train, evaluate, report):
        stage(experiment)

    task, held_out = read_task("task.yaml", "eval.tasks"), read_items(Path("test.jsonl"))
    made = pq.read_table(experiment.directory("prompts") / "prompts.parquet")["prompt"].to_pylist()
    examples = {item.input for item in [*held_out, *read_items(Path("seeds.jsonl"))]}
    assert not examples & {messages[-1]["content"] for messages in made}
    kept = rows_of(experiment, "t*.parquet")
    assert kept
    assert len(kept) + len(rows_of(experiment, "rejected.parquet")) == len(made)
    for row in kept:
        assert row["prompt"] == task.prompt(row["prompt"][-1]["content"])
        assert task.rules.verdict(task, row["completion"][0]["content"]) is None
    answered = pq.read_table(experiment.directory("eval") / "tasks.parquet").to_pylist()
    assert {(row["task"], row["item"]) for row in answered} == {("task", item.id) for item in held_out[:3]}
    assert "task.yaml" in Path("runs/first/report.html").read_text()


def test_a_held_out_example_among_the_rows_is_left_out_and_said(begin, whole_tiny, sigterm):
    """Also where the user's own prompts bring it in, in another case."""
    load = begin(whole_tiny)
    held_out = [item.input for item in read_items(Path("test.jsonl"))]
    inputs = [*(text.upper() for text in held_out), *(f"Nothing of this kind, {n}." for n in range(12))]
    Path("inputs.jsonl").write_text("".join(json.dumps({"input": text}) + "\n" for text in inputs))
    experiment = load(("prompts", "{source: inputs.jsonl, task: task.yaml}"))
    for stage in (generate, curate):
        stage(experiment)
    assert {row["prompt"][-1]["content"] for row in rows_of(experiment, "t*.parquet")} <= set(inputs[len(held_out) :])
    rejected = rows_of(experiment, "rejected.parquet")
    why = {row["prompt"][-1]["content"]: row["detail"] for row in rejected if row["reason"] == "contamination"}
    assert why
    for text, detail in why.items():
        place = held_out.index(next(one for one in held_out if one.upper() == text)) + 1
        assert detail == f"test.jsonl line {place} input: {text.lower()}"


def test_the_python_of_the_page_runs(begin, whole_tiny, sigterm, capsys):
    begin(whole_tiny)
    capsys.readouterr()
    page = (ROOT / "docs/your-task.md").read_text()
    look, ask = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    exec(ask, names := {})
    assert names["messages"] == read_task("task.yaml", "eval.tasks").prompt("Where is my parcel?")
    made = [{"prompt": names["messages"]}]
    Path("runs/first/prompts").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(made), "runs/first/prompts/prompts.parquet")
    exec(look, {})
    assert capsys.readouterr().out == "Where is my parcel?\n"
