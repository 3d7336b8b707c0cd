"""Answers to held-out examples of a task, scored by its rules."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from llmdistill.data.inspect import inspect
from llmdistill.errors import InputError
from tests.factories import make_row, write_rows


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text("kind: classify\ndescription: Say it.\nlabels: [a, b, '[red]c']\ntest: test.jsonl\n")
    examples = [{"input": "a", "output": "a"}, {"input": "b", "output": "[red]c"}, {"input": "c", "output": "[red]c"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return Path("task.yaml")


def answered(directory, *texts):
    """A dataset in which every prompt is answered with itself."""
    write_rows(directory, [make_row(text, [5], [6]) for text in texts], "none", 10)
    return directory


def test_answers_to_held_out_examples_are_scored_and_the_wrong_ones_shown(task, tmp_path, capsys):
    inspect(answered(tmp_path / "data", "a", "b", "no example"), task=task)
    said = capsys.readouterr().out
    assert re.search(r"ended +100% stop", said)
    assert "1 of 2 answers to held-out examples are right · score 0.50" in said
    assert "test.jsonl line 2 · score 0.00" in said
    assert "right  [red]c" in said
    assert "line 1" not in said


def test_a_reasoning_trace_is_no_part_of_the_answer(task, tmp_path, capsys):
    completion = [{"role": "assistant", "content": "<think>\nb, or not?\n</think>\n\na"}]
    rows = [replace(make_row("a", [5], [6]), completion=completion)]
    inspect(write_rows(tmp_path / "data", rows, "none", 10), task=task)
    assert "1 of 1 answer to held-out examples are right · score 1.00" in capsys.readouterr().out


def test_a_right_answer_that_is_none_is_named(task, tmp_path):
    dataset = answered(tmp_path / "data", "a", "b", "no example")
    with Path("test.jsonl").open("a") as file:
        file.write('{"input": "more", "output": "no label"}\n')
    with pytest.raises(InputError, match=r"test.jsonl line \d+: output: not a label: no label"):
        inspect(dataset, task=task)


def test_a_dataset_without_them_is_refused(task, tmp_path):
    with pytest.raises(InputError, match=r"data: no prompt is an example of test\.jsonl, the test of task\.yaml \(--task\)"):
        inspect(answered(tmp_path / "data", "x"), task=task)
