import json

import pytest

from llmdistill.errors import InputError
from tests.tasks.make import items, make_task


@pytest.fixture
def task(tmp_path):
    return make_task(tmp_path, "extract")


def test_verdicts(task):
    verdict = task.rules.verdict
    assert verdict(task, 'So:\n```json\n{"name": "Ann", "age": 31.0}\n```') is None
    assert verdict(task, '{"age": 3}') == "$: 'name' is a required property"
    assert verdict(task, "Ann").startswith("not JSON: ")


def test_scores_worked_out_by_hand(task):
    """Of name, age and two tags: name right, age wrong (one too many, one missing), one tag right, one too many, one missing."""
    target = '{"name": "Ann", "age": 31, "tags": ["a", "b"]}'
    score = task.rules.score
    assert score(task, '{"tags": ["a", "b"], "age": 31.0, "name": "Ann"}', target) == {
        "exact_match": 1,
        "true_positives": 4,
        "false_positives": 0,
        "false_negatives": 0,
    }
    assert score(task, '{"name": "Ann", "age": 30, "tags": ["c", "a"]}', target) == {
        "exact_match": 0,
        "true_positives": 2,
        "false_positives": 2,
        "false_negatives": 2,
    }
    assert list(score(task, "no idea", target).values()) == [0, 0, 0, 4]
    assert score(task, '{"name": "Ann", "age": 31, "tags": ["b", "a"]}', target)["exact_match"] == 0  # a list has an order
    assert score(task, "null", target)["exact_match"] == 0


def test_fields_are_micro_averaged(task):
    """By hand: name right in 1 of 3; age right in 1, wrong in 1; what no target has is one field."""
    pairs = [
        ('{"name": "Ann", "age": 31}', '{"name": "Ann", "age": 31}'),
        ('{"name": "Bo", "age": 5, "x": 1, "y": 2}', '{"name": "Bob", "age": 6}'),
        ("?", '{"name": "Cat"}'),
    ]
    fields = {row.pop("field"): row for row in task.rules.tables(task, pairs)["fields"]}
    assert list(fields) == ["", "age", "name", "(others)"]
    assert list(fields["name"].values()) == [1, 1, 2, 1 / 2, 1 / 3, pytest.approx(2 / 5)]
    assert list(fields["age"].values()) == [1, 1, 1, 1 / 2, 1 / 2, 1 / 2]
    assert list(fields["(others)"].values()) == [0, 2, 0, 0, None, 0]
    precision, recall = 2 / 6, 2 / 5
    assert list(fields[""].values())[:3] == [2, 4, 3]
    assert fields[""]["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert sum(task.rules.score(task, *pair)["true_positives"] for pair in pairs) == 2


def test_outputs_are_checked_by_line(task, tmp_path):
    with pytest.raises(InputError, match=r"^test.jsonl line 2: output: \$: 'name' is a required property$"):
        task.rules.check_outputs(task, items({"name": "Ann"}, {}))
    (tmp_path / "person.json").write_text(json.dumps({"required": ["a"], "properties": {"a": {"enum": []}}}))
    from llmdistill.tasks.task import read_task

    broken = read_task(tmp_path / "extract.yaml", "eval.tasks")
    with pytest.raises(InputError, match=r"extract.yaml: schema: person.json cannot be satisfied: \$\.a: enum is empty"):
        broken.rules.check_outputs(broken, items({"a": 1}))
