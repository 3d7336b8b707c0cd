"""Steps that look at what was answered look behind the reasoning trace; the trace itself is kept."""

import json

import pytest

from tests.curation.steps import apply_step, table

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("step", "good", "bad"),
    [
        ({"refusals": None}, "It is four.", "I'm sorry, but I can't help with that."),
        ({"json_schema": {"file": "schema.json"}}, '{"a": 1}', '{"a": "x"}'),
        ({"python": None}, "```python\nx = 1\n```", "```python\nx = = 1\n```"),
    ],
)
def test_the_answer_behind_the_trace_counts(tmp_path, monkeypatch, step, good, bad):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    traces = ["", "<think>\n\n</think>\n\n", "As an AI, I wonder {\n</think>\n"]
    rows = table([trace + answer for answer in (good, bad) for trace in traces])
    reasons, _ = apply_step(tmp_path, step, rows)
    assert [reason is None for reason in reasons] == [True] * 3 + [False] * 3
