import pytest

from llmdistill.config.curate import Task
from llmdistill.curation.task import inputs
from llmdistill.errors import InputError
from tests.curation.steps import apply_step, table
from tests.tasks.make import write_task


@pytest.mark.parametrize(
    ("kind", "accepted", "rejected", "why"),
    [
        ("extract", '{"name": "Ann"}', '{"age": 1}', "$: 'name' is a required property"),
        ("classify", "good", "It is good.", "not a label: It is good."),
        ("sql", "SELECT name FROM people", "DROP TABLE people", "does more than read the tables"),
        ("tools", '{"name": "now"}', '{"name": "never"}', "no such function: never"),
        ("generate", "Yes.", "…", "has no word"),
    ],
)
def test_what_a_task_cannot_accept_is_rejected(tmp_path, kind, accepted, rejected, why):
    file = write_task(tmp_path, kind)
    reasons, _ = apply_step(tmp_path, {"task": {"file": str(file)}}, table([accepted, rejected, accepted]))
    assert reasons == [None, why, None]


def test_its_files_are_inputs_but_not_its_test(tmp_path):
    file = write_task(tmp_path, "extract", "test: test.jsonl")
    assert set(inputs(Task(file=str(file)), "curate.0.task")) == {str(file), str(tmp_path / "person.json")}
    with pytest.raises(InputError, match=r"nowhere.yaml: no such file \(curate.0.task.file\)"):
        inputs(Task(file="nowhere.yaml"), "curate.0.task")
