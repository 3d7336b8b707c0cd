import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.errors import InputError
from llmdistill.tasks.answers import canonical, contradiction, problem, read_answer, unfenced, validator_of

SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


def backwards(value):
    """The same value with every object's keys the other way round, and its whole numbers as floats where they are exact."""
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [backwards(inner) for inner in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    return value


def same(one, other):
    """Equality as JSON schema has it, written out: numbers by value, true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, str) == isinstance(other, str) and one == other


@given(JSON)
def test_canonical_json_ignores_order_and_the_form_of_numbers(value):
    assert canonical(value) == canonical(backwards(value))
    assert same(json.loads(canonical(value)), value)


@given(JSON, JSON)
def test_canonical_json_tells_apart_what_differs(one, other):
    assert (canonical(one) == canonical(other)) == same(one, other)


def test_true_is_not_one():
    assert len({canonical(value) for value in (True, 1, "1", None, False, 0, "", [], {}, [1])}) == 10
    assert canonical(1.0) == canonical(1) == "1"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("So:\n```json\n[1]\n```\nDone.", "[1]\n"),
        ("~~~\n```\nx\n```\n~~~", "```\nx\n```\n"),
        ("````\n```\n````  ", "```\n"),
        ("```a\n```b\nx\n`````", "```b\nx\n"),
        ("```\n1\n```\n```\n2\n```", None),
        ("```\nleft open", None),
        ("``` inline", None),
    ],
)
def test_the_one_fenced_block_is_the_answer(answer, found):
    assert unfenced(answer) == (answer if found is None else found)


def test_fences_are_read_in_linear_time():
    begun = time.perf_counter()
    assert unfenced(text := "```a\n" * 100_000) == text
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize(
    ("text", "why"),
    [("NaN", "NaN is not a JSON number"), ("1e999", "too large"), ("[" * 102 + "]" * 102, "nested"), ("[" * 100_000, "nested")],
)
def test_what_is_no_json(text, why):
    with pytest.raises(ValueError, match=why):
        read_answer(text)


@pytest.mark.parametrize("number", ["19.99", "4.35", "0.29", "8.2", "-0.07", "0", "3", "1e22", "9" * 400])
def test_multiples_are_of_the_numbers_as_they_are_written(number):
    """In floating point 19.99 / 0.01 is 1998.9999999999998, and of 400 digits there is none."""
    validator = validator_of({"multipleOf": 0.01}, "x")
    assert problem(validator, read_answer(number), "x") is None
    assert problem(validator, read_answer("19.995"), "x") == "$: 19.995 is not a multiple of 0.01"
    old = validator_of({"$schema": "http://json-schema.org/draft-03/schema#", "divisibleBy": 7}, "x")
    assert problem(old, 10**400, "x").endswith("is not a multiple of 7")


@pytest.mark.parametrize(
    "schema",
    [
        {"$schema": 5},
        {"$schema": []},
        {"properties": {"a": {"$ref": "#/required/x"}}, "required": ["a"]},
        {"title": "x", "$ref": "#/title"},
        {"properties": {"a": {"$ref": "#/x"}}, "x": {"multipleOf": 0}},
        {"$ref": "elsewhere.json"},
    ],
)
def test_what_is_no_schema_or_leads_to_none_is_an_error_of_the_file(schema):
    with pytest.raises(InputError, match=r"^order.json: "):
        problem(validator_of(schema, "order.json"), {"a": 1}, "order.json")


def test_one_fenced_block_is_the_answer():
    assert unfenced("Here:\n```json\n{}\n```\nDone.") == "{}\n"
    assert unfenced("```\na\n```\n```\nb\n```") == "```\na\n```\n```\nb\n```"
    assert read_answer("[" * 101 + "]" * 101)


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        (False, "$: false allows nothing"),
        ({"properties": {"a": {"minimum": 3, "maximum": 2}}}, "$.a: minimum is 3, more than maximum, 2"),
        ({"items": {"minLength": 3, "maxLength": 2}}, "$[]: minLength is 3, more than maxLength, 2"),
        ({"required": ["b"], "properties": {"a": {}}, "additionalProperties": False}, "$: b is required, but not allowed"),
        ({"required": ["a"], "properties": {"a": False}}, "$: a is required, but not allowed"),
        ({"exclusiveMinimum": 2, "maximum": 2}, "$: exclusiveMinimum is 2, not less than maximum, 2"),
        ({"minimum": 2, "exclusiveMaximum": 2}, "$: minimum is 2, not less than exclusiveMaximum, 2"),
        ({"exclusiveMinimum": 3, "exclusiveMaximum": 2}, "$: exclusiveMinimum is 3, not less than exclusiveMaximum, 2"),
        ({"allOf": [{}, {"minProperties": 2, "maxProperties": 1}]}, "$: minProperties is 2, more than maxProperties, 1"),
        ({"const": 3, "enum": [1, 2]}, "$: const is not in enum"),
        ({"const": 1, "enum": [1, 2], "exclusiveMinimum": 0, "maximum": 1}, None),
        ({"minimum": 3, "exclusiveMinimum": True, "maximum": 3, "exclusiveMaximum": False}, None),  # draft 4, where it is a flag
        ({"properties": {"a": {"required": True}}}, None),  # draft 3
        ({"required": ["a"], "properties": {"a": {"minimum": 1, "maximum": 1}, "b": False}}, None),
        (True, None),
    ],
)
def test_contradictions(schema, found):
    assert contradiction(schema) == found


@pytest.mark.timeout(60)
def test_a_pattern_that_takes_for_ever_is_a_reason():
    """Exponential backtracking, on a value and on the name of a property; other values are judged as before."""
    slow = r"^((?:a|aa)+)$"
    schema = {
        "properties": {"q": {"pattern": slow}},
        "patternProperties": {"^x": {"type": "integer"}},
        "additionalProperties": {"type": "null"},
    }
    validator = validator_of(schema, "f")
    assert problem(validator, {"q": "a" * 80 + "!"}, "f") == "$: a pattern of the schema took more than 1 s"
    assert problem(validator, {"q": "aaa", "x1": 1, "y": None}, "f") is None
    assert problem(validator, {"q": "b"}, "f") == f"$.q: 'b' does not match {slow!r}"
    assert problem(validator, {"x1": "1"}, "f").startswith("$.x1: ")
    assert problem(validator, {"y": 1}, "f").startswith("$.y: ")
    names = validator_of({"patternProperties": {slow: {}}, "additionalProperties": False}, "f")
    assert problem(names, {"a" * 80 + "!": 1}, "f") == "$: a pattern of the schema took more than 1 s"
    assert problem(names, {"aa": 1}, "f") is None
    assert problem(names, {"b": 1}, "f") == "$: additional properties are not allowed: 'b'"
