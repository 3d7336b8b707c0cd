"""Templates: what stands in a variable survives, what is wrong in a file is named, and answers are read with tolerance."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.errors import InputError
from llmdistill.prompting.template import AnswerFormat, PromptTemplate, read_answer
from tests.conftest import ROOT

SHIPPED = sorted(ROOT.glob("prompts/*.yaml"))
HEAD = {
    "name": "capital",
    "description": "Ask for a capital.",
    "variables": ["country"],
    "messages": [{"role": "user", "content": "The capital of {{ country }}?"}],
}
AWKWARD = st.one_of(
    st.text(min_size=1),
    st.sampled_from(["{{ 7 * 7 }}", "{% raw %}", r"$\frac{a}{b}$", '{"json": [1, {}]}', "{#", "}}", "ü – 漢字", "<user>&amp;"]),
).filter(lambda text: text.strip() == text)


@pytest.fixture
def template(tmp_path):
    def make(**changes):
        file = tmp_path / "template.yaml"
        file.write_text(yaml.safe_dump({**HEAD, **changes}, allow_unicode=True), encoding="utf-8")
        return PromptTemplate(file, "a.key")

    return make


@pytest.mark.slow
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
@given(data=st.data())
def test_what_stands_in_a_variable_survives_every_shipped_template(file, data):
    """Braces, LaTeX and JSON too: each value is in what the teacher is asked, letter by letter."""
    shipped = PromptTemplate(file, "a.key")
    values = {name: data.draw(AWKWARD) for name in shipped.head.variables}
    fields = {name: [value] if name == "examples" else value for name, value in values.items()}
    text = "\n".join(message["content"] for message in shipped.render(fields, "here"))
    for value in values.values():
        assert value in text


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_template_says_what_it_is_for(file):
    head = PromptTemplate(file, "a.key").head
    assert head.name == file.stem
    assert head.description.endswith(".")


def test_a_value_of_the_item_goes_before_the_default(template):
    with_default = template(
        variables=["text"],
        defaults={"labels": ["a", "b"]},
        messages=[{"role": "user", "content": "{{ labels | join('/') }}: {{ text }}"}],
    )
    assert with_default.render({"text": "x"}, "here")[0]["content"] == "a/b: x"
    assert with_default.render({"text": "x", "labels": ["c"]}, "here")[0]["content"] == "c: x"


@pytest.mark.parametrize(
    "content",
    ["{{ country.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ country.append(1) }}", "{{ country / 0 }}"],
)
def test_a_template_cannot_leave_its_sandbox(template, content):
    with pytest.raises(InputError, match="here: the template capital cannot be rendered"):
        template(messages=[{"role": "user", "content": content}]).render({"country": "Peru"}, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": [{"role": "user", "content": "{{ land }}"}]}, "messages.0.content uses land, which is in neither"),
        ({"messages": [{"role": "user", "content": "a\n{{ country"}]}, "messages.0.content: line 2 is not valid Jinja"),
        ({"messages": [{"role": "user", "content": "{{ country | nonsense }}"}]}, "is not valid Jinja: No filter"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages must contain at least one turn and end before"),
        ({"messages": []}, "messages must contain at least one turn"),
        ({"variable": ["country"]}, "no such key variable"),
        ({"description": None}, "description should be a valid string"),
        ({"answer": {"form": "text"}}, "the key answer.field is missing"),
        ({"answer": {"field": "x", "form": "list"}}, "answer.form should be 'text', 'lines' or 'json', got 'list'"),
        ({"answer": {"field": "x", "pattern": "(a"}}, "answer: pattern is not a valid regular expression"),
        ({"answer": {"field": "x", "pattern": "a"}}, "answer: pattern must have one group, it has 0"),
        ({"answer": {"field": "x", "json_schema": {}}}, "json_schema belongs to form json"),
        ({"answer": {"field": "x", "form": "json", "json_schema": {"type": "obj"}}}, "json_schema is not a valid JSON schema"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(template, changes, message):
    with pytest.raises(InputError, match=r"template\.yaml: ") as error:
        template(**changes)
    assert message in str(error.value)


def test_a_broken_head(tmp_path):
    (tmp_path / "t.yaml").write_text("name: [a\nmessages: {")
    with pytest.raises(InputError, match=r"t\.yaml: not valid YAML"):
        PromptTemplate(tmp_path / "t.yaml", "a.key")
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file \(a\.key\)"):
        PromptTemplate(Path("nowhere.yaml"), "a.key")


@pytest.mark.parametrize(
    ("fields", "message"), [({"city": "Lima"}, "the line has city"), ({"country": None}, "the line has an empty country")]
)
def test_a_missing_variable_names_the_line(template, fields, message):
    with pytest.raises(InputError, match=f"a.jsonl line 3: the template capital needs the field country; {message}"):
        template().render(fields, "a.jsonl line 3")


LINES = AnswerFormat(field="q", form="lines")
QUESTIONS = AnswerFormat(field="q", form="lines", pattern=r"(\w.*\?)", without=["the text"])
OBJECTS = AnswerFormat(
    field="q",
    form="json",
    json_schema={"type": "object", "required": ["q"], "properties": {"q": {"type": "string"}, "n": {"type": "integer"}}},
)


@pytest.mark.parametrize(
    ("answer", "text", "ended", "items", "rejected", "failed"),
    [
        # A list, with chatter around it, an entry over two lines, bold and quotes.
        (LINES, 'Sure!\n\n1. One?\n2) "Two"\n  goes on\n- **Three**\n\nHope it helps.', True, ["One?", 'Two"\n'], [], []),
        (LINES, "One\n\n  Two  \n", True, ["One", "Two"], [], []),
        (LINES, "Q1: Why?\nQuestion 2: How?", True, ["Why?", "How?"], [], []),
        (LINES, "1. whole\n2. cut in the mid", False, ["whole"], [], [("cut in the mid", "cut at max_tokens")]),
        (LINES, "1. whole\n2. whole too\n\nLet me know if", False, ["whole", "whole too"], [], []),
        (LINES, "  1. One\n  2. Two\n 10. Ten", True, ["One", "Two", "Ten"], [], []),
        (
            LINES,
            "1. A story with:\n   - a dragon\n   - a lantern\n2. Two",
            True,
            ["A story with: - a dragon - a lantern", "Two"],
            [],
            [],
        ),
        (LINES, "", True, [], [], [("", "empty")]),
        (QUESTIONS, "1. A?\n2. No question.\n3. What does the text say?\n4. The texture?", True, ["A?", "The texture?"], 2, []),
        (AnswerFormat(field="q"), "  “Say it.” ", True, ["Say it."], [], []),
        (AnswerFormat(field="q"), "Say", False, [], [], [("Say", "cut at max_tokens")]),
        (AnswerFormat(field="q", stop=["\n\n"]), "Say it.\n\nAnd more", False, ["Say it."], [], []),
        (AnswerFormat(field="q", pattern=r"Score: (\d)"), "Score: 2 or rather\nScore: 4", True, ["4"], [], []),
        (AnswerFormat(field="q", pattern=r"Score: (\d)"), "It is good.", True, [], [("It is good.", "no match")], []),
        (OBJECTS, 'Here [is]:\n```json\n[{"q": "a", "n": 1}, {"q": "b"}]\n```', True, None, None, None),
        (OBJECTS, 'Well {"q": "a"} {"q": "b"}', False, ["a"], [], []),
        (OBJECTS, '{"q": "a", "n": "one"}', True, [], [('{"q": "a", "n": "one"}', "against the schema: $.n type")], []),
        (OBJECTS, '{"q": "a', False, [], [], [('{"q": "a', "not JSON")]),
        (OBJECTS, '[{"q": "a"}, {"q": "b"}, {"q": "c', False, ["a", "b"], [], [('{"q": "c', "cut at max_tokens")]),
        (OBJECTS, '[{"q": "a"}; {"q": "b"}]', True, ["a"], [], [('; {"q": "b"}]', "not JSON")]),
        (AnswerFormat(field="q", form="json"), '["a", "b", 3]', True, ["a", "b"], [("3", "no object")], []),
        (AnswerFormat(field="q", form="json"), 'See [1]: {"q": "why?"}', True, ["why?"], [], []),
        (AnswerFormat(field="q", form="json"), '[{"q": null}, {"q": ["a"]}]', True, [], 2, []),
        (AnswerFormat(field="q", form="json"), "[1, 2]", True, [], [], [("[1, 2]", "not JSON")]),
    ],
)
def test_what_is_read_in_an_answer(answer, text, ended, items, rejected, failed):
    reading = read_answer(answer, text, ended)
    if items is None:  # the first list in the text, `[is]`, is none that JSON knows
        assert reading.items == [{"q": "a", "n": 1}, {"q": "b"}]
        return
    if items and items[-1].endswith("\n"):
        items = ["One?", '"Two" goes on', "Three"]
    assert [fields["q"] for fields in reading.items] == items
    assert len(reading.rejected) == rejected if isinstance(rejected, int) else reading.rejected == rejected
    assert reading.failed == failed


def test_a_null_is_what_the_row_has_not(template):
    made = template(
        variables=["country"], defaults={"count": 3}, messages=[{"role": "user", "content": "{{ country }} {{ count }}"}]
    )
    assert made.render({"country": "Peru", "count": None}, "here")[0]["content"] == "Peru 3"


def test_nobody_else_speaks_in_a_template(template):
    with pytest.raises(InputError, match=r"messages\.0\.role"):
        template(messages=[{"role": "human", "content": "{{ country }}"}])


@given(st.lists(st.from_regex(r"[a-zA-Z][a-z ,]{0,20}[a-z]\?", fullmatch=True), min_size=1, max_size=8), st.sampled_from("123"))
def test_every_entry_of_a_list_is_read_as_it_is(entries, style):
    marks = {"1": "{n}. ", "2": "({n}) ", "3": "* "}[style]
    text = "\n".join(marks.format(n=number) + entry for number, entry in enumerate(entries, start=1))
    assert [fields["q"] for fields in read_answer(LINES, f"Here they are:\n\n{text}\n", True).items] == entries


@given(
    st.lists(st.dictionaries(st.text(), st.integers() | st.text()).map(lambda d: {**d, "q": "x"}), min_size=1), st.text("ab \n")
)
def test_json_is_found_in_what_stands_around_it(objects, around):
    reading = read_answer(AnswerFormat(field="q", form="json"), f"{around}{json.dumps(objects)}{around}", True)
    assert reading.items == objects


@given(st.sampled_from([LINES, QUESTIONS, OBJECTS, AnswerFormat(field="q")]), st.text() | st.text('[]{}",:1 \n-.'), st.booleans())
def test_whatever_the_teacher_writes_is_accounted_for(answer, text, ended):
    reading = read_answer(answer, text, ended)
    assert reading.items or reading.rejected or reading.failed


@pytest.mark.timeout(60)
def test_a_pattern_that_takes_for_ever_has_failed():
    answer = AnswerFormat(form="text", field="q", pattern=r"^((?:a|aa)+)$")
    reading = read_answer(answer, "a" * 80 + "!", ended=True)
    assert reading.failed == [("a" * 80 + "!", "the pattern took more than 1 s")]
