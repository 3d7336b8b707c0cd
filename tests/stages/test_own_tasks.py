"""Tasks of a user's own through the stages: curated by one, evaluated on two, shown in the report, all without lm-eval."""

import json
import shutil
import sys

import pyarrow.parquet as pq
import pytest
import torch

from llmdistill.config import load_experiment
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.stages.curate import curate
from llmdistill.stages.evaluate import evaluate
from llmdistill.stages.export import export
from llmdistill.stages.generate import generate
from llmdistill.stages.report import report
from llmdistill.stages.train import train
from llmdistill.tasks.task import read_task
from tests.tasks.make import write_task


@pytest.mark.slow
def test_from_curate_to_the_report(experiment_file, tiny, tmp_path, monkeypatch, capsys):
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
    examples = [{"input": f"Example {n}", "output": label} for n, label in enumerate(["good", "bad"] * 4)]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in examples))
    small = [("own_prompts", "0"), ("samples", "0"), ("sample_tokens", "2"), ("task_limit", "3"), ("timed_requests", "2")]
    tasks = ("eval.tasks", f"[configs/tasks/orders.yaml, {file}]")
    changes = [
        ("teacher.model", str(wide)),
        *((f"eval.{key}", value) for key, value in small),
        tasks,
        ("train.compare_examples", f"{{task: {file}, file: {tmp_path}/examples.jsonl}}"),
        ("curate", f"[{{task: {{file: {text}}}}}]"),
    ]
    experiment = load_experiment(experiment_file, changes)
    evaluate(experiment, dry_run=True)
    for stage in (generate, curate, train, export):
        stage(experiment)
    assert "the tasks, which have not been evaluated; run `eval`, then" in " ".join(capsys.readouterr().out.split())
    for stage in (evaluate, export, report):
        stage(experiment)
    screen = capsys.readouterr().out

    names = ["teacher", "student before", "student", "student, examples only"]
    rows = pq.read_table(experiment.directory("eval") / "tasks.parquet").to_pylist()
    assert {(row["task"], row["model"], row["item"]) for row in rows} == {
        (task, model, item)
        for task, items in (("orders", [f"orders-{n}" for n in range(3)]), ("classify", "012"))
        for model in names
        for item in items
    }
    assert len(rows) == 2 * 4 * 3
    check_examples(experiment, tmp_path)
    metrics = json.loads((experiment.directory("eval") / "metrics.json").read_text())["tasks"]
    orders, labels = metrics["tasks"]
    assert (orders["name"], orders["source"], orders["metric"]) == ("orders", "configs/tasks/orders.yaml", "exact_match")
    assert (labels["name"], labels["metric"], labels["items"], labels["chance"]) == ("classify", "accuracy", 3, 0.5)
    for task in (orders, labels):
        for name in names:
            scores = [row["score"] for row in rows if (row["task"], row["model"]) == (task["name"], name)]
            assert task["models"][name]["mean"] == sum(scores) / 3
        assert list(task["valid"]) == names
    whole = json.loads((experiment.directory("eval") / "metrics.json").read_text())
    for model in whole["models"]:
        assert {name: figures["count"] for name, figures in model["requests"].items()} == {"orders": 2, "classify": 2}
    repriced = experiment.with_(eval=experiment.eval.with_(price_per_hour=2.0))
    evaluate(repriced)  # is finished: nothing that was measured depends on the price
    report(repriced)
    assert "a million requests cost" in (tmp_path / "run/report.md").read_text()
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
    check_export(experiment, rows, screen)


def check_examples(experiment, directory):
    """As many steps as the student, from the same weights, on other text."""
    states, cards = {}, {}
    for name in ("student", "student-examples"):
        states[name] = json.loads((experiment.directory(name) / "trainer_state.json").read_text())
        cards[name] = (experiment.directory(name) / "README.md").read_text()
    assert states["student-examples"]["global_step"] == states["student"]["global_step"] > 1
    weights = [load_model(str(experiment.directory(name)), device="cpu").state_dict() for name in states]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert f"the examples in {directory}/examples.jsonl" in cards["student-examples"]
    assert "the examples in" not in cards["student"]
    inputs = json.loads((experiment.directory("student-examples") / "run.json").read_text())["inputs"]
    assert {f"{directory}/{name}" for name in ("classify.yaml", "examples.jsonl", "labels.jsonl")} <= set(inputs)
    assert "| student trained on the examples only |" in (directory / "run/report.md").read_text()


def check_export(experiment, rows, screen):
    """The whole student, exported as it is, answers as the student does; what a server needs is beside its weights."""
    directory = experiment.directory("export")
    (made,) = json.loads((directory / "export.json").read_text())["formats"]
    told = json.loads((directory / "safetensors/cascade.json").read_text())["tasks"]
    assert list(told) == ["orders", "classify"]
    for entry in made["tasks"]["tasks"]:
        name = entry["name"]
        by_model = {
            model: [row for row in rows if (row["task"], row["model"]) == (name, model)] for model in ("teacher", "student")
        }
        mean = sum(row["score"] for row in by_model["student"]) / 3
        assert entry["models"]["student"]["mean"] == entry["models"]["student, not exported"]["mean"] == mean
        agreeing = [row["agrees"] for row in by_model["student"]]
        assert agreeing == [one["answer"] == two["answer"] for one, two in zip(*by_model.values(), strict=True)], (
            "no two are alike"
        )
        assert entry["cascade"]["agreement"]["mean"] == sum(agreeing) / 3
        task = read_task(entry["source"], "")
        assert [{"role": "system", "content": told[name]["system"]}, {"role": "user", "content": "x"}] == task.prompt("x")
        assert told[name]["max_tokens"] == entry["max_tokens"]["student"]
        assert told[name]["measured"] == {"items": 3, "clusters": 3, "dtype": "float32"}
        assert [(t["target"], t["items_needed"], t["threshold"]) for t in told[name]["thresholds"]] == [
            (0.9, 29, None),
            (0.95, 59, None),
            (0.99, 299, None),
        ]
    assert "on orders; " in (directory / "safetensors/README.md").read_text()
    lines = [line for line in screen.splitlines() if line.startswith("eval ")]
    assert "on classify; " in lines[-1], "the last that eval says is what is kept"
    export(experiment)
    shorter = experiment.with_(eval=experiment.eval.with_(task_limit=2))
    with pytest.raises(InputError, match=r"the items of configs/tasks/orders\.yaml have changed"):
        export(shorter)
