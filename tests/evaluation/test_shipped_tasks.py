"""The shipped tasks: what their files hold."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from llmdistill.evaluation.tasks import read_tasks
from tests.conftest import ROOT

TASKS = ROOT / "configs/tasks"
OWN = ["orders"]  # the form of a user's own task
NAMES = sorted(file.stem for file in TASKS.glob("*.yaml") if file.stem not in OWN)


def items(name):
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]


def test_the_script_writes_the_files_that_are_here(tmp_path):
    subprocess.run([sys.executable, TASKS / "make.py", "--out", tmp_path], check=True)
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted([*NAMES, *OWN])
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (TASKS / file.name).read_bytes(), file.name


def test_there_are_enough_items():
    assert {"arithmetic", "copying", "facts", "format", "reading"} == set(NAMES)
    assert sum(len(items(name)) for name in NAMES) >= 500
    assert all(len(items(name)) >= 100 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_item_is_there_once_and_has_one_answer(name):
    rows = items(name)
    assert len({row["id"] for row in rows}) == len({(row.get("passage"), row["question"]) for row in rows}) == len(rows)
    for row in rows:
        if "choices" in row:
            assert len(set(row["choices"])) == 4
            assert 0 <= row["answer"] < 4
        else:
            assert row["question"].endswith(row["answer"])


@pytest.mark.parametrize("name", NAMES)
def test_a_task_file_names_its_own_data(name):
    task = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    assert task["task"] == name
    assert task["dataset_kwargs"]["data_files"] == {"test": f"{name}.jsonl"}


def test_the_task_in_the_form_of_ones_own_can_be_learned_from():
    """Every output meets the schema, and stands in its input."""
    (own,) = read_tasks(["configs/tasks/orders.yaml"])
    own.task.rules.check_outputs(own.task, own.items)
    assert len(own.items) == len({item.input for item in own.items}) == 20
    assert set(own.files) == {f"configs/tasks/orders{end}" for end in (".yaml", ".schema.json", ".jsonl")}
    for row in items("orders"):
        order = row["output"]
        assert re.search(rf"\b{order['count']} {order['colour'] + ' ' if order['colour'] else ''}{order['item']}\b", row["input"])
        assert order["customer"] in row["input"]


def test_sums_are_right():
    checked = 0
    operations = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}
    operations |= {"plus": operations["+"], "minus": operations["-"], "times": operations["×"]}
    for row in items("arithmetic"):
        if found := re.search(r"(\d+) (\+|-|×|plus|minus|times) (\d+)", row["question"]):
            a, operation, b = found.groups()
            assert row["choices"][row["answer"]] == str(operations[operation](int(a), int(b))), row
            checked += 1
    assert checked == 110


def test_word_problems_are_right():
    results = {"gets": int.__add__, "together": int.__add__, "gives": int.__sub__, "boxes": lambda b, a: a * b}
    rows = [row for row in items("arithmetic") if not row["question"].startswith(("What is", "Calculate"))]
    assert len(rows) == 40
    for row in rows:
        a, b = map(int, re.findall(r"\d+", row["question"]))
        (result,) = {word: operation(a, b) for word, operation in results.items() if word in row["question"]}.values()
        assert row["choices"][row["answer"]] == str(result), row


def test_the_answers_to_made_up_passages_stand_in_them():
    """Told again from the passage: whose thing of which colour is where."""
    checked = 0
    for row in items("reading"):
        if not row["cluster"].startswith("things"):
            continue
        known = re.findall(r"(\w+) has a (\w+) (\w+)\. It is in the (\w+)\.", row["passage"])
        turned = re.findall(r"In the (\w+) there is a (\w+) (\w+)\. It belongs to (\w+)\.", row["passage"])
        known += [(person, colour, thing, place) for place, colour, thing, person in turned]
        assert len(known) == 4
        thing = re.search(r"What colour is the (\w+)|Whose is the (\w+)|Where is the (\w+)", row["question"])
        ((person, colour, _, place),) = [entry for entry in known if entry[2] in thing.groups()]
        expected = {"What": colour, "Whos": f"{person}'s", "Wher": f"in the {place}"}[row["question"][:4]]
        assert row["choices"][row["answer"]] == expected
        checked += 1
    assert checked == 72
