"""Tasks of a user's own through the stages: curated by one, evaluated on two, shown in the report, all without lm-eval."""

import json
import shutil
import sys

import pyarrow.parquet as pq
import pytest

from llmdistill.config import load_experiment
from llmdistill.stages.curate import curate
from llmdistill.stages.evaluate import evaluate
from llmdistill.stages.generate import generate
from llmdistill.stages.report import report
from llmdistill.stages.train import train
from tests.tasks.make import write_task


@pytest.mark.slow
def test_from_curate_to_the_report(experiment_file, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    wide = shutil.copytree(
        tiny, tmp_path / "wide"
    )  # the tiny model's context of 256 tokens is too short for a schema and an order
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    file = write_task(tmp_path, "classify", "test: labels.jsonl")
    lines = [{"input": f"Number {n}", "output": label} for n, label in enumerate(["good", "bad", "good"])]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_task(tmp_path, "generate")
    small = [("own_prompts", "0"), ("samples", "0"), ("sample_tokens", "2"), ("task_limit", "3")]
    tasks = ("eval.tasks", f"[configs/tasks/orders.yaml, {file}]")
    changes = [
        ("teacher.model", str(wide)),
        *((f"eval.{key}", value) for key, value in small),
        tasks,
        ("curate", f"[{{task: {{file: {text}}}}}]"),
    ]
    experiment = load_experiment(experiment_file, changes)
    evaluate(experiment, dry_run=True)
    for stage in (generate, curate, train, evaluate, report):
        stage(experiment)

    names = ["teacher", "student before", "student"]
    rows = pq.read_table(experiment.directory("eval") / "tasks.parquet").to_pylist()
    assert {(row["task"], row["model"], row["item"]) for row in rows} == {
        (task, model, item)
        for task, items in (("orders", [f"orders-{n}" for n in range(3)]), ("classify", "012"))
        for model in names
        for item in items
    }
    assert len(rows) == 2 * 3 * 3
    metrics = json.loads((experiment.directory("eval") / "metrics.json").read_text())["tasks"]
    orders, labels = metrics["tasks"]
    assert (orders["name"], orders["source"], orders["metric"]) == ("orders", "configs/tasks/orders.yaml", "exact_match")
    assert (labels["name"], labels["metric"], labels["items"], labels["chance"]) == ("classify", "accuracy", 3, None)
    for task in (orders, labels):
        for name in names:
            scores = [row["score"] for row in rows if (row["task"], row["model"]) == (task["name"], name)]
            assert task["models"][name]["mean"] == sum(scores) / 3
        assert list(task["valid"]) == names
    everything = orders["fields"]["student"][0]
    assert everything["true_positives"] + everything["false_negatives"] == 3 * 4, "four fields of three records"
    assert [sum(row) for row in labels["confusion"]["teacher"]["counts"]] == [2, 1]
    inputs = json.loads((experiment.directory("eval") / "run.json").read_text())["inputs"]
    assert {str(file), str(tmp_path / "labels.jsonl"), "configs/tasks/orders.schema.json", "configs/tasks/orders.jsonl"} <= set(
        inputs
    )
    assert str(text) in json.loads((experiment.directory("curated") / "run.json").read_text())["inputs"]
    page = (tmp_path / "run/report.html").read_text()
    assert "orders" in page
    assert "right label" in page
