import json

import pytest

from llmdistill.config import Prompts
from llmdistill.errors import InputError
from llmdistill.prompts import load_prompts


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


TEMPLATE = """
name: capital
description: Ask for a capital.
variables: [country]
messages:
  - {role: system, content: Be short.}
  - {role: user, content: "What is the capital of {{ country }}?"}
"""


def test_prompts_messages_and_repeats(write):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lines = [{"prompt": "one"}, {"messages": turns}, {"prompt": "one"}, {"prompt": [{"role": "user", "content": "two"}]}]
    source = write("p.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    prompts = load_prompts(Prompts(source=source, system="S"))
    system = {"role": "system", "content": "S"}
    assert [prompt.messages for prompt in prompts] == [
        [system, {"role": "user", "content": "one"}],
        [system, *turns],
        [system, {"role": "user", "content": "two"}],
    ]
    assert prompts[1].origin.endswith("p.jsonl line 2")
    assert len(load_prompts(Prompts(source=source, limit=2))) == 2


def test_what_a_line_says_beside_the_conversation_is_kept(write):
    source = write("p.jsonl", json.dumps({"country": "Peru", "answer": "Lima", "topic": {"of": ["geography"]}}))
    (prompt,) = load_prompts(Prompts(source=source, template=write("t.yaml", TEMPLATE)))
    assert prompt.metadata == {"answer": "Lima", "topic": {"of": ["geography"]}}
    (prompt,) = load_prompts(Prompts(source=write("q.jsonl", '{"prompt": "a", "answer": 1}')))
    assert prompt.metadata == {"answer": 1}


@pytest.mark.parametrize("value", ["{{ 7 * 7 }}", r"$\frac{a}{b}$", '{"json": [1, {}]}', "{% raw %}", "ü – 漢字"])
def test_what_stands_in_a_variable_survives(write, value):
    source = write("p.jsonl", json.dumps({"country": value}))
    (prompt,) = load_prompts(Prompts(source=source, template=write("t.yaml", TEMPLATE)))
    assert prompt.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": f"What is the capital of {value}?"},
    ]


@pytest.mark.parametrize(
    ("source", "template", "message"),
    [
        ("", None, "holds no prompts"),
        ("\n\n", None, "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', None, "p.jsonl line 2: not valid JSON"),
        ('{"prompt": "a"}\n[1]\n', None, "p.jsonl line 2: must be a JSON object"),
        ('{"instruction": "a"}', None, "line 1: has neither `messages` nor `prompt`"),
        ('{"messages": []}', None, "messages must be a list"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', None, "ends before the assistant"),
        ('{"country": "x"}\n{"city": "y"}', TEMPLATE, "line 2: the template capital needs the field country"),
        ('{"country": "x"}', TEMPLATE.replace("country }}", "land }}"), "cannot be rendered"),
        ('{"country": "x"}', TEMPLATE.replace("country }}", "country.__class__.__mro__ }}"), "cannot be rendered"),
        ('{"country": "x"}', TEMPLATE.replace("variables", "variable"), "no such key variable"),
    ],
)
def test_bad_input_names_file_and_line(write, source, template, message):
    section = Prompts(source=write("p.jsonl", source), template=template and write("t.yaml", template))
    with pytest.raises(InputError, match=message):
        load_prompts(section)


def test_a_missing_file():
    with pytest.raises(InputError, match=r"nowhere.jsonl: no such file"):
        load_prompts(Prompts(source="nowhere.jsonl"))


def test_the_seed_list_is_what_it_says():
    prompts = load_prompts(Prompts(source="prompts/seeds/general.jsonl", template="prompts/instruct.yaml"))
    assert len(prompts) == 240
