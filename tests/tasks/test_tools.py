import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.errors import InputError
from llmdistill.tasks.answers import canonical
from llmdistill.tasks.tools import with_defaults
from tests.tasks.make import TOOLS, items, make_task

BOOK = TOOLS[0]["function"]["parameters"]


@pytest.fixture
def task(tmp_path):
    return make_task(tmp_path, "tools")


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def test_verdicts(task):
    verdict = task.rules.verdict
    assert verdict(task, call("book", city="Rome")) is None
    assert verdict(task, '{"name": "now"}') is None
    written = {"type": "function", "function": {"name": "book", "arguments": '{"city": "Rome"}'}}
    assert verdict(task, json.dumps(written)) is None
    assert verdict(task, call("book", nights=2)) == "$: 'city' is a required property"
    assert verdict(task, call("book", city="Rome", nights="two")) == "$.nights: 'two' is not of type 'integer'"
    assert verdict(task, call("fly", city="Rome")) == "no such function: fly"
    assert verdict(task, call("\ud800")) == "no such function: ?", "a reason can be stored"
    assert verdict(task, json.dumps([{"name": "now"}])).startswith("no call: ")
    assert verdict(task, '{"name": "now", "arguments": "soon"}').startswith("no call: ")
    assert verdict(task, '{"name": "now", "arguments": [1]}') == "$: [1] is not of type 'object'"
    assert verdict(task, "I would book it.").startswith("no call: ")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (call("book", city="Rome", nights=1, room={"beds": 2}), 1),
        (call("book", room={}, nights=1.0, city="Rome"), 1),
        (call("book", city="Rome", room={"beds": 2.0}), 1),
        (call("book", city="Rome"), 0),  # no default says that there is a room
        (call("book", city="Rome", room={"beds": 1}), 0),
        (call("book", city="rome", room={}), 0),
        (call("now"), 0),
        ("book it", 0),
    ],
)
def test_scores_by_hand(task, answer, right):
    assert task.rules.score(task, answer, call("book", city="Rome", room={})) == {"call_match": right}


NUMBERS = st.integers(-(10**9), 10**9)
ARGUMENTS = st.fixed_dictionaries(
    {"city": st.text()}, optional={"nights": NUMBERS, "room": st.fixed_dictionaries({}, optional={"beds": NUMBERS})}
)


@given(ARGUMENTS)
def test_arguments_with_and_without_their_defaults_are_one(arguments):
    """The defaults put in by hand; and normalising twice changes nothing."""
    full = {**arguments, "nights": float(arguments.get("nights", 1))}
    if "room" in full:
        full["room"] = {"beds": float(full["room"].get("beds", 2))}
    normalised = with_defaults(BOOK, arguments)
    assert canonical(normalised) == canonical(dict(reversed(full.items())))
    assert with_defaults(BOOK, normalised) == normalised


UNIT = {"properties": {"u": {"default": "C"}}}
CHAIN = {"a": {"$ref": "#/$defs/b"}, "b": {"properties": {"o": {"$ref": "#/$defs/o"}}}, "o": UNIT}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"o": UNIT}},
        {"properties": {"o": {"$ref": "#/$defs/O~1a%25"}}, "$defs": {"O/a%": UNIT}},
        {"allOf": [{"properties": {"o": {"allOf": [UNIT, {"required": ["u"]}]}}}]},
        {"$ref": "#/$defs/a", "$defs": CHAIN},
        {"properties": {"o": {"$ref": "#/$defs/o"}}, "$defs": {"o": {"$ref": "#/$defs/o", **UNIT}}},
    ],
    ids=["inline", "reference", "allOf", "references in turn", "a reference to itself"],
)
def test_defaults_behind_references_and_combinations(schema):
    assert with_defaults(schema, {"o": {}}) == {"o": {"u": "C"}}
    assert with_defaults(schema, {"o": {"u": "F"}}) == {"o": {"u": "F"}}
    nearest = {"properties": {"u": {"$ref": "#/$defs/u", "default": "here"}}, "$defs": {"u": {"default": "there"}}}
    assert with_defaults(nearest, {}) == {"u": "here"}


def test_a_default_that_would_hold_itself_is_put_in_once():
    schema = {"properties": {"child": {"$ref": "#", "default": {}}, "n": {"default": 1}}}
    assert with_defaults(schema, {}) == {"child": {"n": 1}, "n": 1}
    assert with_defaults(schema, {"child": {"child": {}}}) == {"child": {"child": {"child": {"n": 1}, "n": 1}, "n": 1}, "n": 1}


def test_outputs_are_checked_by_line(task, tmp_path):
    with pytest.raises(InputError, match=r"^test.jsonl line 2: output: no such function: fly$"):
        task.rules.check_outputs(task, items({"name": "now"}, {"name": "fly"}))
    task.schemas["book"]["properties"]["nights"] |= {"minimum": 2, "maximum": 1}
    with pytest.raises(InputError, match=r"tools.yaml: tools: book cannot be called: \$.nights: minimum is 2"):
        task.rules.check_outputs(task, items({"name": "now"}))
