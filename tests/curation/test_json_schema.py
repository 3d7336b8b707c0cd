import json

import pytest

from llmdistill.errors import InputError
from tests.curation.steps import apply_step, table


def test_json_schema(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(
        json.dumps(
            {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}
        )
    )
    answers = [
        '{"age": 3}',
        'Here it is:\n```json\n{"age": 3}\n```\nDone.',
        '{"age": "3"}',
        '{"years": 3}',
        "three",
        '{"age": NaN}',
        "[" * 100_000,
        '```\n{"age": 1}\n```\nor\n```\n{"age": 2}\n```',
    ]
    reasons, _ = apply_step(tmp_path, {"json_schema": {"file": str(file)}}, table(answers))
    assert reasons[:2] == [None, None]
    assert reasons[2] == "$.age: '3' is not of type 'integer'"
    assert reasons[3].startswith("$: ")
    assert all(reason.startswith("not JSON: ") for reason in reasons[4:])


def test_a_schema_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object"}', encoding="utf-8-sig")
    assert apply_step(tmp_path, {"json_schema": {"file": str(file)}}, table(["{}"]))[0] == [None]


def test_a_shipped_schema_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = {"json_schema": {"file": "configs/tasks/orders.schema.json"}}
    assert apply_step(tmp_path, shipped, table(["3"]))[0] == ["$: 3 is not of type 'object'"]


def test_a_schema_is_checked_and_fetches_nothing(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "objekt"}')
    with pytest.raises(InputError, match=r"schema\.json: not a valid JSON schema: 'objekt' is not valid"):
        apply_step(tmp_path, {"json_schema": {"file": str(file)}}, table(["{}"]))
    file.write_text("3")
    with pytest.raises(InputError, match=r"schema\.json: not a JSON schema: it must be an object"):
        apply_step(tmp_path, {"json_schema": {"file": str(file)}}, table(["{}"]))
    file.write_text('{"$ref": "http://127.0.0.1:9/schema.json"}')
    with pytest.raises(InputError, match=r"refers to http://127.0.0.1:9/schema.json, which is not in the file"):
        apply_step(tmp_path, {"json_schema": {"file": str(file)}}, table(["{}"]))
