"""Which messages a row holds, which of them are learned, and what cannot be used."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdistill.data.conversations import given_prompt, learned_turns
from llmdistill.data.tables import read_tables
from llmdistill.errors import InputError, UnusableError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def turns(messages, every=True, **fields):
    return list(learned_turns({"messages": messages, **fields}, "f line 1", every, True))


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"trainable": False}, {"loss": False}])
def test_a_turn_that_is_marked_is_in_the_prompt_and_is_not_learned(mark):
    made = turns([USER, {**ANSWER, **mark}, USER, {**ANSWER, "weight": 1}])
    (turn,) = made
    assert turn.prompt == [USER, ANSWER, USER], "the mark is no part of the conversation"
    assert turn.completion == [ANSWER]
    with pytest.raises(UnusableError, match="its answer is marked as not to be learned"):
        turns([USER, {**ANSWER, **mark}], every=False)


def test_another_weight_is_refused():
    with pytest.raises(InputError, match=r"f line 1: weight of message 2 must be 0 or 1, .*, not 0.5"):
        turns([USER, {**ANSWER, "weight": 0.5}])


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio"])
def test_what_is_not_text_is_not_dropped(name):
    with pytest.raises(UnusableError, match=f"f line 1: `{name}` cannot be passed to the teacher"):
        turns([USER, ANSWER], **{name: ["a/1.jpg"]})
    with pytest.raises(UnusableError, match=f"`{name}`"):
        given_prompt({"prompt": "q", name: {"bytes": "…"}}, "f line 1")
    assert turns([USER, ANSWER], **{name: []}), "a table gives every row the column"


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio"])
@pytest.mark.parametrize(
    "value",
    ["coco/1.jpg", "A B.WAV", '["a.png"]', "data:image/png;base64,iVBO", "https://example.org/1", "s3://b/1", "iVBO" * 30],
)
def test_a_text_that_leads_to_a_picture_is_not_dropped(name, value):
    with pytest.raises(UnusableError, match=f"f line 1: `{name}` cannot be passed to the teacher"):
        turns([USER, ANSWER], **{name: value})


@pytest.mark.parametrize("value", ["A bird on a roof.", "[]", " ", 3, ""])
def test_a_caption_is_a_users_field(value):
    assert turns([USER, ANSWER], image=value)
    assert turns([USER, ANSWER], image_url="https://example.org/1.jpg")
    tag = {"role": "user", "content": "How do I close an <image>?"}
    assert turns([tag, ANSWER], source="https://example.org/1.html")


@pytest.mark.parametrize("mark", ["<image>", "<video>", "<audio>"])
def test_what_a_mark_in_a_message_stands_for_is_not_dropped(mark):
    asked = {"role": "user", "content": f"{mark}\nWhat is it?"}
    with pytest.raises(UnusableError, match="`image` cannot be passed"):
        turns([asked, ANSWER], image=17)
    with pytest.raises(UnusableError, match="`video_path` cannot be passed"):
        given_prompt({"prompt": asked["content"], "video_path": "1"}, "f line 1")


def test_pictures_of_a_message_are_not_dropped():
    with pytest.raises(UnusableError, match="`images` cannot be passed"):
        turns([{**USER, "images": ["iVBO"]}, ANSWER])
    (turn,) = turns([{**USER, "images": [], "tool_calls": []}, {**ANSWER, "tool_calls": []}])
    assert (turn.prompt, turn.completion, turn.uses_tools) == ([USER], [ANSWER], False)


def test_parts_of_text_are_a_text_and_others_are_not():
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]
    (turn,) = turns([{"role": "user", "content": parts}, ANSWER])
    assert turn.prompt == [{"role": "user", "content": "Who is it?"}]
    with pytest.raises(UnusableError, match="a part of a content has type 'image_url'"):
        turns([{"role": "user", "content": [*parts, {"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER])


def test_fields_without_a_value_are_none():
    """A table has every message's fields in every message."""
    (turn,) = turns([{**USER, "tool_calls": None, "name": None}, {**ANSWER, "tool_calls": None, "name": None}])
    assert (turn.prompt, turn.completion, turn.uses_tools) == ([USER], [ANSWER], False)


@pytest.mark.parametrize("role", ["human", "gpt", None])
def test_roles_of_a_prompt_are_checked_as_those_of_an_answer(role):
    with pytest.raises(InputError, match="f line 1: message 1 must have a role, one of system, user, assistant, tool"):
        given_prompt({"messages": [{"role": role, "content": "q"}]}, "f line 1")


ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c ? \u00e9", "completion": "d"}]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "b.json", "lines.json", "c.jsonl.gz", "d.json.gz", "e.jsonl.zst", "f.parquet", "g.csv.gz"]
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_is_read_in_every_form(tmp_path, name, mark):
    file = tmp_path / name
    text = mark + (json.dumps(ROWS, indent=1) if name[0] in "bd" else as_lines(ROWS))
    if name.startswith("g"):
        text = mark + "prompt,completion\r\n" + "".join(f"{row['prompt']},{row['completion']}\r\n" for row in ROWS)
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(text.encode()))
    elif name.endswith(".zst"):
        with pa.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(text.encode())
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        file.write_text(text)
    assert [entry.fields for entry in read_tables(str(file), "score.source")] == ROWS


def test_what_could_not_be_stored_is_replaced_where_it_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "area \\ud83d", "score": NaN, "list": [Infinity, 1.5]}\n')
    (entry,) = read_tables(str(file), "score.source")
    assert entry.fields == {"prompt": "area ?", "score": None, "list": [None, 1.5]}


def test_a_document_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (entry,) = read_tables(str(tmp_path / "a.txt"), "score.source")
    assert entry.fields == {"text": "one\ntwo\n", "document": str(tmp_path / "a.txt")}
    (turn,) = learned_turns(entry.fields, entry.origin, every=False, tool_calls=True)
    assert (turn.plain, turn.completion[0]["content"]) == (True, "one\ntwo\n")
