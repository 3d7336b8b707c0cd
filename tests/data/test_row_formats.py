"""Rows as published datasets have them become the conversations that they are."""

import json

import pytest

from llmdistill.config.rows import FORMATS, RowReading
from llmdistill.data.conversations import given_prompt, learned_turns
from llmdistill.data.row_formats import FORMS, read_row
from llmdistill.data.traffic import is_recorded
from llmdistill.errors import UnreadableError, UnusableError

Q, A = "What is 2 + 2?", "It is 4."
ASKED, ANSWERED = [{"role": "user", "content": Q}], [{"role": "assistant", "content": A}]
BRIEF = {"role": "system", "content": "Be brief."}
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TREE = {
    "role": "prompter", "text": Q, "replies": [
        {"role": "assistant", "text": "worse", "rank": 1, "replies": []},
        {"role": "assistant", "text": A, "rank": 0, "replies": [
            {"role": "prompter", "text": "And 3 + 3?", "rank": None, "replies": []},
        ]},
        {"role": "assistant", "text": "gone", "rank": None, "deleted": True, "replies": []},
    ],
}  # fmt: skip
# The name of the form, a row, and the conversation in it.
ROWS = {
    "OpenAI": ("messages", {"messages": [*ASKED, *ANSWERED]}, [*ASKED, *ANSWERED]),
    "OpenAI with a developer": (
        "messages",
        {"messages": [{**BRIEF, "role": "developer"}, *ASKED, *ANSWERED]},
        [BRIEF, *ASKED, *ANSWERED],
    ),
    "OpenAI with parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}, *ANSWERED]},
        [*ASKED, *ANSWERED],
    ),
    "OpenAI from Parquet": (
        "messages",
        {
            "messages": [{**ASKED[0], "tool_calls": None, "name": None}, {**ANSWERED[0], "tool_calls": None, "name": None}],
            "tools": None,
        },
        [*ASKED, *ANSWERED],
    ),
    "ShareGPT": (
        "sharegpt",
        {"id": "x", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        [*ASKED, *ANSWERED],
    ),
    "ShareGPT with a system message": (
        "sharegpt",
        {"system": "Be brief.", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        [BRIEF, *ASKED, *ANSWERED],
    ),
    "ShareGPT under messages": (
        "sharegpt",
        {"messages": [{"from": "user", "value": Q}, {"from": "assistant", "value": A}]},
        [*ASKED, *ANSWERED],
    ),
    "ShareGPT with tools": (
        "sharegpt",
        {
            "tools": json.dumps(TOOLS),
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": A},
            ],
        },
        [
            *ASKED,
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "4"},
            *ANSWERED,
        ],
    ),
    "conversations of roles": ("conversations", {"conversation": [*ASKED, *ANSWERED]}, [*ASKED, *ANSWERED]),
    "Alpaca": ("alpaca", {"instruction": Q, "input": "", "output": A}, [*ASKED, *ANSWERED]),
    "Alpaca with an input": (
        "alpaca",
        {"instruction": "Add.", "input": "2, 2", "output": A},
        [{"role": "user", "content": "Add.\n\n2, 2"}, *ANSWERED],
    ),
    "Alpaca with a history": (
        "alpaca",
        {"instruction": Q, "input": None, "output": A, "system": "Be brief.", "history": [["Hi", "Hello"]]},
        [BRIEF, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *ASKED, *ANSWERED],
    ),
    "Dolly": (
        "alpaca",
        {"instruction": "Add.", "context": "2, 2", "response": A, "category": "qa"},
        [{"role": "user", "content": "Add.\n\n2, 2"}, *ANSWERED],
    ),
    "GSM8K": ("question", {"question": Q, "answer": A}, [*ASKED, *ANSWERED]),
    "problems and solutions": ("question", {"problem": Q, "solution": A, "level": "1"}, [*ASKED, *ANSWERED]),
    "ShareGPT with a reasoning trace": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": Q, "score": 1},
                {"from": "gpt", "value": A, "reasoning_content": "2 and 2", "score": 1},
            ]
        },
        [*ASKED, {**ANSWERED[0], "reasoning_content": "2 and 2"}],
    ),
    "OpenOrca with a system message": (
        "question",
        {"id": "x", "system_prompt": "Be brief.", "question": Q, "response": A},
        [BRIEF, *ASKED, *ANSWERED],
    ),
    "prompt and completion with a system message": (
        "completion",
        {"system": "Be brief.", "prompt": Q, "completion": A},
        [BRIEF, *ASKED, *ANSWERED],
    ),
    "prompt and completion of a developer": (
        "completion",
        {"prompt": [{**BRIEF, "role": "developer"}, *ASKED], "completion": ANSWERED},
        [BRIEF, *ASKED, *ANSWERED],
    ),
    "KTO with a system message": (
        "kto",
        {"system": "Be brief.", "prompt": Q, "completion": A, "label": True},
        [BRIEF, *ASKED, *ANSWERED],
    ),
    "Alpaca without an instruction": ("alpaca", {"instruction": "", "input": Q, "output": A}, [*ASKED, *ANSWERED]),
    "OpenOrca": ("question", {"id": "x", "system_prompt": "", "question": Q, "response": A}, [*ASKED, *ANSWERED]),
    "prompt and response": ("prompt", {"prompt": Q, "response": A}, [*ASKED, *ANSWERED]),
    "prompt and completion": ("completion", {"prompt": Q, "completion": A}, [*ASKED, *ANSWERED]),
    "prompt and completion as messages": ("completion", {"prompt": ASKED, "completion": ANSWERED}, [*ASKED, *ANSWERED]),
    "input and output": ("input", {"input": Q, "output": A}, [*ASKED, *ANSWERED]),
    "DPO": ("preference", {"prompt": Q, "chosen": A, "rejected": "5"}, [*ASKED, *ANSWERED]),
    "DPO as messages": (
        "preference",
        {"prompt": ASKED, "chosen": ANSWERED, "rejected": [{"role": "assistant", "content": "5"}]},
        [*ASKED, *ANSWERED],
    ),
    "DPO with the prompt inside": (
        "preference",
        {"prompt": Q, "chosen": [*ASKED, *ANSWERED], "rejected": [*ASKED, {"role": "assistant", "content": "5"}]},
        [*ASKED, *ANSWERED],
    ),
    "DPO of ShareGPT": (
        "preference",
        {"conversations": None, "chosen": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "rejected": []},
        [*ASKED, *ANSWERED],
    ),
    "HH-RLHF": (
        "hh-rlhf",
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: 5"},
        [*ASKED, *ANSWERED],
    ),
    "KTO": ("kto", {"prompt": ASKED, "completion": ANSWERED, "label": True}, [*ASKED, *ANSWERED]),
    "OpenAssistant": ("oasst", {"message_tree_id": "x", "tree_state": "ready", "prompt": TREE}, [*ASKED, *ANSWERED]),
}


def conversation(fields):
    (turn,) = learned_turns(fields, "a row", every=False, tool_calls=True)
    return [*turn.prompt, *turn.completion]


@pytest.mark.parametrize("name", ROWS)
def test_what_is_published_is_read_as_it_is(name):
    form, row, messages = ROWS[name]
    fields, label = read_row(row, RowReading(), "a row")
    assert label == FORMS[form].label
    assert conversation(fields) == messages
    prompt = [message for message in messages if message is not messages[-1]]
    assert given_prompt(fields, "a row") == prompt, "the teacher answers what was asked, not what was answered"
    assert read_row(row, RowReading(format=form), "a row") == (fields, label)


def test_prompts_without_answers():
    for row in (
        {"prompt": Q},
        {"prompt": ASKED},
        {"messages": ASKED},
        {"question": Q},
        {"instruction": Q, "input": ""},
        {"turns": [Q, "And?"]},
        {"prompt": ASKED, "system": " "},
    ):
        fields, _ = read_row(row, RowReading(), "a row")
        assert given_prompt(fields, "a row") == ASKED
        with pytest.raises(UnreadableError, match="must have `messages`"):
            conversation(fields)


def test_text():
    for row in ({"text": A}, {"content": A, "url": "x"}):
        fields, label = read_row(row, RowReading(), "a row")
        assert (fields["text"], label) == (A, "text")


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (
            {"prompt": Q, "completion": A, "messages": None, "chosen": None, "label": None},
            "completion",
        ),  # columns of several files
        ({"prompt": Q, "completion": A, "messages": 3}, "completion"),
        ({"prompt": Q, "completion": A, "label": 0}, "completion"),  # a class
        ({"prompt": Q, "completion": A, "label": False}, "kto"),
        ({"messages": [*ASKED, *ANSWERED], "temperature": 0.3, "response": {"quality": 5}}, "messages"),
    ],
)
def test_a_form_is_told_by_values_and_not_by_names_alone(row, form):
    fields, label = read_row(row, RowReading(), "a row")
    assert label == FORMS[form].label
    assert not is_recorded(row)
    if form != "kto":
        assert conversation(fields) == [*ASKED, *ANSWERED]


def test_what_a_form_does_not_use_stays():
    fields, _ = read_row({"question": Q, "answer": A, "level": 3}, RowReading(), "a row")
    assert fields == {"level": 3, "prompt": ASKED, "completion": A}
    fields, _ = read_row({"chosen": ANSWERED, "prompt": Q, "rejected": "5", "score": 1}, RowReading(), "a row")
    assert fields.keys() == {"messages", "rejected", "score"}


def test_the_system_message_beside_a_whole_conversation_is_part_of_it():
    row = {"system": "You are a pirate.", "prompt": Q, "chosen": [*ASKED, *ANSWERED], "rejected": []}
    fields, _ = read_row(row, RowReading(), "a row")
    assert fields["messages"] == [{"role": "system", "content": "You are a pirate."}, *ASKED, *ANSWERED]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "completion": A},
        {"prompt": ASKED},
        {"prompt": Q, "completion": A, "label": True},
        {"instruction": Q, "output": A},
        {"messages": [*ASKED, *ANSWERED]},
        {"prompt": Q, "chosen": A, "rejected": "5"},
    ],
)
def test_tools_are_a_list_in_every_form(row):
    for tools in (TOOLS, json.dumps(TOOLS)):
        assert read_row({**row, "tools": tools}, RowReading(), "a row")[0]["tools"] == TOOLS
    for tools in ("hammer, saw", {"name": "add"}):
        with pytest.raises(UnreadableError, match="a row: cannot be read as"):
            read_row({**row, "tools": tools}, RowReading(), "a row")


def test_a_field_that_is_no_system_message_stays():
    whole = {"messages": [BRIEF, *ASKED, *ANSWERED], "system": "linux"}
    assert read_row(whole, RowReading(), "a row")[0] == whole
    assert read_row({"text": A, "system": "linux"}, RowReading(), "a row")[0] == {"text": A, "system": "linux"}


@pytest.mark.parametrize("turn", [{"images": ["a.jpg"]}, {"image": "a.jpg"}])
def test_pictures_of_a_turn_are_not_dropped(turn):
    row = {"conversations": [{"from": "human", "value": Q, **turn}, {"from": "gpt", "value": A}]}
    fields, _ = read_row(row, RowReading(), "a row")
    with pytest.raises(UnusableError, match=f"`{next(iter(turn))}` cannot be passed"):
        conversation(fields)


def test_a_caption_beside_a_mark_is_a_picture():
    row = {"image": "coco/1", "conversations": [{"from": "human", "value": f"<image>\n{Q}"}, {"from": "gpt", "value": A}]}
    with pytest.raises(UnusableError, match="`image` cannot be passed"):
        conversation(read_row(row, RowReading(), "a row")[0])


def test_an_unwanted_answer_is_not_learned():
    fields, _ = read_row({"prompt": Q, "completion": A, "label": False}, RowReading(), "a row")
    with pytest.raises(Exception, match="marked as not to be learned"):
        conversation(fields)


def test_other_names_by_keys():
    settings = RowReading(columns={"prompt": "ask", "completion": "best"})
    fields, label = read_row({"ask": Q, "best": A, "n": 1}, settings, "a row")
    assert (fields, label) == ({"prompt": Q, "completion": A, "n": 1}, "prompt and completion")
    turns = [{"from": "customer", "value": Q}, {"from": "agent", "value": A}]
    settings = RowReading(columns={"conversations": "talk"}, roles={"customer": "user", "agent": "assistant"})
    assert conversation(read_row({"talk": turns}, settings, "a row")[0]) == [*ASKED, *ANSWERED]
    settings = RowReading(roles={"human": "user", "gpt": "assistant"})
    asked, said = [{"role": "human", "content": Q}], [{"role": "gpt", "content": A}]
    for told in ({"messages": [*asked, *said]}, {"prompt": asked, "completion": said}, {"prompt": asked, "chosen": said}):
        assert conversation(read_row(told, settings, "a row")[0]) == [*ASKED, *ANSWERED]
    assert given_prompt(read_row({"prompt": asked}, settings, "a row")[0], "a row") == ASKED


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"a": 1, "b": 2}, {}, "a row: has no conversation in a known format, only a, b; set `columns`"),
        ({}, {}, "only no fields"),
        ({"prompt": Q}, {"columns": {"prompt": "ask"}}, r"a row: has no field ask \(columns\.prompt\), only prompt"),
        ({"prompt": Q}, {"format": "sharegpt"}, r"is not of format sharegpt \(ShareGPT"),
        ({"conversations": [{"from": "alien", "value": Q}]}, {}, "turn 1 is from 'alien'; assign a role to it in `roles`"),
        ({"conversations": [{"from": "function_call", "value": "no JSON"}]}, {}, "cannot be read as ShareGPT"),
    ],
)
def test_what_cannot_be_read_says_why(row, settings, message):
    with pytest.raises(UnreadableError, match=message):
        read_row(row, RowReading(**settings), "a row")


def test_every_form_has_a_name_in_the_configuration():
    assert list(FORMS) == list(FORMATS)
