"""What a form is measured against, and what a server is told; the whole way is in tests/stages/test_own_tasks.py."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdistill.config import Experiment
from llmdistill.config.export import Export
from llmdistill.errors import InputError
from llmdistill.evaluation.cascade import cascade
from llmdistill.evaluation.exported_tasks import for_a_server, measured_tasks
from llmdistill.evaluation.statistics import Draws
from llmdistill.evaluation.tasks import SCHEMA
from llmdistill.runs.inputs import model_fingerprint, sha256
from tests.tasks.make import write_task


def rows_of(model, count):
    """Every third answer is another one than the target."""
    return [
        {
            "task": "classify",
            "item": str(n),
            "cluster": str(n),
            "model": model,
            "score": float(n % 3 > 0),
            "answer": "good" if n % 3 else "bad",
            "target": "good",
            "input": f"text {n}",
            "logprobs": [-0.5 - n],
            "agrees": None if model == "teacher" else True,
        }
        for n in range(count)
    ]


@pytest.fixture
def experiment(tmp_path):
    """A run whose `eval` is finished; a task of lm-eval stands beside the user's own."""
    file = write_task(tmp_path, "classify", "test: test.jsonl")
    lines = [json.dumps({"input": f"text {n}", "output": "good"}) for n in range(6)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    rows = [*rows_of("teacher", 6), *rows_of("student", 6), *rows_of("student before", 6)]
    others = [{**row, "task": "hellaswag", "input": None, "logprobs": None} for row in rows]
    directory = tmp_path / "eval"
    directory.mkdir()
    pq.write_table(pa.Table.from_pylist(rows + others, SCHEMA), directory / "tasks.parquet")
    described = {"models": [{"name": "teacher", "path": "m"}, {"name": "student", "path": str(tmp_path / "student")}]}
    (directory / "metrics.json").write_text(json.dumps(described))
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text("{}")
    inputs = {str(path): sha256(path) for path in (file, tmp_path / "test.jsonl")}
    inputs[str(tmp_path / "student")] = model_fingerprint(str(tmp_path / "student"), None)
    (directory / "run.json").write_text(json.dumps({"stage": "eval", "status": "done", "inputs": inputs}))
    tree = {"output": str(tmp_path), "teacher": {"model": "m"}, "eval": {"tasks": [str(file), "hellaswag"]}}
    return Experiment.model_validate(tree)


def test_the_teachers_and_the_students_answers_to_own_tasks_are_read(experiment):
    found = measured_tasks(experiment)
    assert found.references == {("classify", str(n)): "good" if n % 3 else "bad" for n in range(6)}
    assert set(found.rows["model"].to_pylist()) == {"teacher", "student, not exported"}
    assert set(found.rows["task"].to_pylist()) == {"classify"}
    assert found.rows.num_rows == 12


def test_what_was_not_evaluated_or_by_another_version_is_said(experiment, tmp_path, capsys):
    file = tmp_path / "eval/tasks.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["logprobs"]), file)
    with pytest.raises(InputError, match=r"tasks.parquet: its columns differ from those of this version; run `eval` again"):
        measured_tasks(experiment)
    pq.write_table(table, file)
    fewer = experiment.with_(eval=experiment.eval.with_(task_limit=5))
    with pytest.raises(InputError, match=r"the items of .*classify.yaml have changed; run `eval` again"):
        measured_tasks(fewer)
    (tmp_path / "eval/metrics.json").unlink()
    assert measured_tasks(experiment) is None
    assert "run `eval`, then `export` again" in " ".join(capsys.readouterr().out.split())
    assert measured_tasks(experiment.with_(eval=experiment.eval.with_(tasks=["hellaswag"]))) is None
    assert not capsys.readouterr().out


@pytest.mark.parametrize("changed", ["classify.yaml", "test.jsonl", "student/config.json"])
def test_what_has_changed_since_it_was_evaluated_is_not_compared(experiment, tmp_path, changed):
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    name = tmp_path / (changed if "student" not in changed else "student")
    with pytest.raises(InputError, match=rf"^{name}: changed since `eval` measured it .*; run `eval` again before `export`"):
        measured_tasks(experiment)


def test_another_model_than_the_student_is_not_compared_and_that_is_said(experiment, tmp_path, capsys):
    shutil.copytree(tmp_path / "student", tmp_path / "copy")
    assert measured_tasks(experiment.with_(export=Export(model=str(tmp_path / "copy")))) is not None
    (tmp_path / "copy/config.json").write_text('{"other": 1}')
    assert measured_tasks(experiment.with_(export=Export(model=str(tmp_path / "copy")))) is None
    assert "is not the student that `eval` has measured" in " ".join(capsys.readouterr().out.split())


def test_a_model_that_eval_has_measured_as_another_is_not_the_student(experiment, tmp_path):
    """The first round's student, which `eval` compares with that of the last, is called `student`, too."""
    first = tmp_path / "first/student"
    first.mkdir(parents=True)
    (first / "config.json").write_text('{"first": 1}')
    run = json.loads((tmp_path / "eval/run.json").read_text())
    run["inputs"][str(first)] = model_fingerprint(str(first), None)
    (tmp_path / "eval/run.json").write_text(json.dumps(run))
    assert measured_tasks(experiment.with_(export=Export(model=str(first)))) is None


def test_an_experiment_may_be_moved_between_eval_and_export(experiment, tmp_path):
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert measured_tasks(experiment.with_(output=str(tmp_path / "elsewhere"))) is not None


def test_a_server_is_told_how_to_ask_and_from_when_on_to_answer(experiment):
    """Of 60 answers the last two are other ones: 58 may be given for 95%, for 99% there are too few."""
    measured, clusters = measured_tasks(experiment), [str(n) for n in range(60)]
    scores = {name: np.ones(60) for name in ("student", "teacher")}
    tokens = [[-0.25 * n, -0.25] for n in range(60)]
    found = cascade(tokens, np.arange(60) < 58, scores, clusters, Draws.of(clusters, 100, 0), 0)
    entry = {"name": "classify", "items": 60, "clusters": 60, "max_tokens": {"student": 67}, "cascade": found}
    told = for_a_server(measured, {"tasks": [entry, {"name": "free text"}]}, "float32", {"enable_thinking": False})
    assert list(told["tasks"]) == ["classify"]
    task = told["tasks"]["classify"]
    assert task["system"] == "Do it.\n\nAnswer with one of these labels alone:\ngood\nbad"
    assert task["template_args"] == {"enable_thinking": False}
    assert (task["max_tokens"], task["measured"]) == (67, {"items": 60, "clusters": 60, "dtype": "float32"})
    by_target = {entry["target"]: entry for entry in task["thresholds"]}
    assert by_target[0.95]["threshold"] == -0.25 * 58
    assert by_target[0.95]["answered"]["mean"] == pytest.approx(58 / 60)
    assert (by_target[0.99]["shown"], by_target[0.99]["threshold"]) == (False, None)
    assert task["calibration"]["slope"] > 0
    json.dumps(told, allow_nan=False)
