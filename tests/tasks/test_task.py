import json

import pytest

from llmdistill.errors import InputError
from llmdistill.tasks.task import items_file, read_items, read_task
from tests.tasks.make import KINDS, SCHEMA, TOOLS, items, make_task, write_task


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_and_asks_with_what_it_needs(tmp_path, kind):
    task = make_task(tmp_path, kind)
    assert (task.name, task.settings.kind) == (kind, kind)
    assert set(task.files) == {str(tmp_path / name) for name in (f"{kind}.yaml", *KINDS[kind][1])}
    system, user = task.prompt("What?")
    assert user == {"role": "user", "content": "What?"}
    assert system["role"] == "system"
    assert system["content"].startswith("Do it.")
    shown = {
        "extract": json.dumps(SCHEMA),
        "classify": "\ngood\nbad",
        "sql": "CREATE TABLE people (name TEXT, age INTEGER, height REAL)",
        "tools": json.dumps(TOOLS),
        "generate": "Do it.",
    }
    assert system["content"].endswith(shown[kind])
    short = tmp_path / "short.yaml"
    short.write_text(task.file.read_text() + "describe_answers: false\n")
    assert read_task(short, "task").told == "Do it."


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("extract", ("kind: extract", "kind: excerpt"), "extract.yaml: kind should be 'extract'"),
        ("extract", ("schema: person.json", ""), "extract.yaml: the key schema is missing, which kind extract needs"),
        ("extract", ("schema: person.json", "schema:"), "extract.yaml: the key schema is missing, which kind extract needs"),
        ("extract", ("person.json", "nobody.json"), "extract.yaml: schema: nobody.json does not exist"),
        ("extract", ("schema:", "labels: [a, b]\nschema:"), "extract.yaml: labels is not a key of kind extract"),
        ("extract", ("description: Do it.", ""), "extract.yaml: the key description is missing"),
        (
            "extract",
            ("schema:", "shema: x\nschema:"),
            "extract.yaml: no such key shema; a task has kind, description, describe_answers, schema",
        ),
        ("extract", ("kind: extract", "kind: !!python/name:os.system"), "extract.yaml: not valid YAML"),
        ("classify", ("[good, bad]", "[good]"), "classify.yaml: labels"),
        ("classify", ("[good, bad]", "[good, good]"), "classify.yaml: labels: 'good' is listed twice"),
        ("classify", ("[good, bad]", "[good, 'bad ']"), "classify.yaml: labels: 'bad ' is empty, or has leading or"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, kind, change, message):
    file = write_task(tmp_path, kind)
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(InputError) as error:
        read_task(file, "eval.tasks")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("extract", "person.json", '{"type": "objekt"}', "person.json: not a valid JSON schema"),
        ("extract", "person.json", "{", "person.json: cannot be read as JSON"),
        ("sql", "people.sql", "CREATE TABEL x (a);", "people.sql: cannot be run by SQLite"),
        ("sql", "people.sql", "SELECT 1;", "people.sql: creates no table"),
        ("sql", "people.sql", "ATTACH '{}/other' AS other; CREATE TABLE x (a);", "people.sql: cannot be run by SQLite: not auth"),
        ("tools", "tools.json", "{}", "tools.json: must be a list of function schemas"),
        ("tools", "tools.json", '[{"name": "f"}]', 'tools.json: entry 0 is not {"type": "function"'),
        ("tools", "tools.json", json.dumps([TOOLS[1], TOOLS[1]]), "tools.json: entry 1: the function now is defined twice"),
        (
            "tools",
            "tools.json",
            '[{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]',
            "tools.json: f: not a valid JSON schema",
        ),
    ],
)
def test_what_it_names_is_checked(tmp_path, kind, name, content, message):
    file = write_task(tmp_path, kind)
    (tmp_path / name).write_text(content.replace("{}/other", f"{tmp_path}/other"))
    with pytest.raises(InputError) as error:
        read_task(file, "eval.tasks")
    assert message in str(error.value)
    assert not (tmp_path / "other").exists()


def test_items(tmp_path):
    file = write_task(tmp_path, "extract", "test: test.jsonl")
    lines = [
        {"input": "Ann, 31", "output": {"name": "Änn", "age": 31}, "id": "a", "cluster": "x"},
        {"input": "Bob", "output": '{"name": "Bob"}', "note": 1},
    ]
    (tmp_path / "test.jsonl").write_text(json.dumps(lines[0]) + "\n\n" + json.dumps(lines[1]) + "\n")
    name, found = items_file(read_task(file, "eval.tasks"))
    assert name == str(found) == str(tmp_path / "test.jsonl")
    first, second = read_items(found)
    assert (first.id, first.cluster, first.input, first.output) == ("a", "x", "Ann, 31", '{"name": "Änn", "age": 31}')
    assert (second.id, second.cluster, second.output, second.origin) == ("2", "item 2", '{"name": "Bob"}', f"{found} line 3")


def test_what_is_null_is_not_told(tmp_path):
    """As tables write it; and an item alone has not the cluster that another one calls by its number."""
    lines = [{"id": None, "cluster": None}, {"cluster": None}, {"id": "b", "cluster": 0}, {"id": "c", "cluster": 0}]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"input": "x", "output": "y", **line}) for line in lines))
    found = read_items(tmp_path / "test.jsonl")
    assert [(item.id, item.cluster) for item in found] == [("0", "item 0"), ("1", "item 1"), ("b", "0"), ("c", "0")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: n(ot valid JSON|ested)"),
        ("[]", "line 2: must be a JSON object"),
        ('{"input": " ", "output": "x"}', "line 2: input must be text"),
        ('{"input": "x"}', "line 2: output is missing"),
        ('{"input": "x", "output": ""}', "line 2: output is missing"),
        ('{"input": "x", "output": null}', "line 2: output is missing"),
        ('{"input": "x", "output": "y", "id": "a"}', "line 2: the id a is also that of .*line 1"),
    ],
)
def test_lines_that_are_no_items_are_named(tmp_path, line, message):
    file = tmp_path / "test.jsonl"
    file.write_text('{"input": "x", "output": "y", "id": "a"}\n' + line)
    with pytest.raises(InputError, match=message):
        read_items(file)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_items(tmp_path, encoding):
    (tmp_path / "test.jsonl").write_text('{"input": "é", "output": "y"}\r\n', encoding=encoding)
    assert [(item.input, item.output) for item in read_items(tmp_path / "test.jsonl")] == [("é", "y")]


def test_an_empty_test_file_and_a_missing_one(tmp_path):
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"test.jsonl: contains no items"):
        read_items(tmp_path / "test.jsonl")
    with pytest.raises(InputError, match=r"generate.yaml: the key test is missing"):
        items_file(make_task(tmp_path, "generate"))
    with pytest.raises(InputError, match=r"generate.yaml: test: nothing.jsonl does not exist"):
        items_file(read_task(write_task(tmp_path, "generate", "test: nothing.jsonl"), "eval.tasks"))


def test_ten_bad_outputs_are_named_and_the_rest_counted(tmp_path):
    task = make_task(tmp_path, "extract")
    with pytest.raises(InputError) as error:
        task.rules.check_outputs(task, items(*[{"age": "old"}] * 12, {"name": "Ann"}))
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines[:10]] == [f"test.jsonl line {n}" for n in range(1, 11)]
    assert lines[10:] == ["… and 2 more"]
