"""Lines of request logs become the conversations in them; nothing else of a line goes anywhere."""

import json

import pytest
from pydantic import ValidationError

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.config.prompts import Prompts
from llmdistill.config.rows import RowReading
from llmdistill.data.batches import read_batches
from llmdistill.data.conversations import given_prompt, learned_turns
from llmdistill.data.row_formats import FORMS, read_row
from llmdistill.data.rows import metadata_and_provenance
from llmdistill.data.subjects import conversation_keys, is_held_out
from llmdistill.data.tables import read_answered
from llmdistill.data.traffic import is_recorded, read_recorded
from llmdistill.errors import InputError, UnreadableError, UnusableError
from llmdistill.prompting.sources import read_source
from llmdistill.stages.generate import generate
from llmdistill.stages.prompts import load_prompts, prepared_prompts
from llmdistill.stages.score import score
from tests.conftest import ROOT

Q, A = "What is 2 + 2?", "It is 4."
ASKED, ANSWER = [{"role": "user", "content": Q}], {"role": "assistant", "content": A}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
REQUEST = {"model": "m", "messages": ASKED, "temperature": 0.3, "metadata": {"session_id": "s1"}}
CHOICES = {"id": "c", "choices": [{"index": 0, "message": {**ANSWER, "refusal": None}, "finish_reason": "stop"}]}
KEY = "sk-SECRET"
LINES = {
    "a stored completion": {"object": "chat.completion", "model": "m", "messages": ASKED, **CHOICES, "api_key": KEY},
    "request and response": {"headers": {"Authorization": KEY}, "request": REQUEST, "response": CHOICES},
    "with bodies": {"request": {"headers": {"x": KEY}, "body": REQUEST}, "response": {"status": 200, "body": CHOICES}},
    "a batch": {"custom_id": "1", "body": REQUEST, "response": {"status_code": 200, "body": CHOICES}},
    "a run": {"inputs": {"messages": ASKED}, "outputs": CHOICES, "extra": {"key": KEY}},
    "input and output": {"input": {"messages": ASKED}, "output": A},
    "an input of messages": {"input": ASKED, "output": ANSWER, "id": "x"},
    "a gateway": {"call_type": "completion", "messages": ASKED, "response": CHOICES, "metadata": {"user_api_key": KEY}},
    "JSON in text": {"request_body": json.dumps(REQUEST), "response_body": json.dumps(CHOICES), "key": KEY},
    "a request alone": {**REQUEST, "api_key": KEY},
}


def write(file, lines):
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(file)


@pytest.mark.parametrize("name", LINES)
def test_every_form_of_log_is_the_conversation_in_it(name):
    line = LINES[name]
    assert is_recorded(line)
    taken = read_recorded(line, RowReading(), "a line")
    fields, label = read_row(taken, RowReading(), "a line")
    assert label == FORMS["requests"].label
    assert read_row(taken, RowReading(format="requests"), "a line") == (fields, label)
    assert given_prompt(fields, "a line") == ASKED, "the teacher answers what was asked, not what was answered"
    if name == "a request alone":
        assert (fields, taken.unanswered) == ({"messages": ASKED}, "has no answer in its response")
    else:
        assert (fields, taken.unanswered) == ({"messages": [*ASKED, ANSWER]}, None)
        (turn,) = learned_turns(fields, "a line", every=False, tool_calls=True)
        assert (turn.prompt, turn.completion) == (ASKED, [ANSWER])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASKED, ANSWER], "model": "m", "source": "x"},
        {"input": "2 + 2", "output": "4"},
        {"messages": ASKED, "response": "text"},
        {"prompt": Q, "response": A},
        {"text": "[1, 2]"},
    ],
)
def test_what_is_no_log_is_none(row):
    assert not is_recorded(row)


def test_a_request_and_a_response_as_anthropic_has_them():
    asked = {"model": "m", "max_tokens": 99, "system": [{"type": "text", "text": "Be brief."}], "messages": ASKED}
    answer = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": A}], "stop_reason": "end_turn"}
    taken = read_recorded({"request": asked, "response": answer}, RowReading(), "a line")
    (turn,) = learned_turns(taken, "a line", every=False, tool_calls=True)
    assert (turn.prompt, turn.completion) == ([{"role": "system", "content": "Be brief."}, *ASKED], [ANSWER])
    assert read_recorded({**asked, "system": "Be brief."}, RowReading(), "a line")["messages"] == turn.prompt


@pytest.mark.parametrize(
    "trace", [{"reasoning": "so"}, {"reasoning_content": "so"}, {"reasoning": "so", "reasoning_content": None}]
)
def test_the_trace_of_an_answer_comes_along(trace):
    line = {"request": REQUEST, "response": {"choices": [{"message": {**ANSWER, **trace}, "finish_reason": "stop"}]}}
    assert read_recorded(line, RowReading(), "a line")["messages"][-1] == {**ANSWER, "reasoning_content": "so"}


def test_pictures_of_a_request_are_not_dropped():
    """As Ollama's requests have them."""
    line = {"request": {"messages": [{**ASKED[0], "images": ["iVBO"]}]}, "response": CHOICES}
    with pytest.raises(UnusableError, match="`images` cannot be passed"):
        given_prompt(read_recorded(line, RowReading(), "a line"), "a line")


def test_tools_and_calls_come_along():
    call = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    message = {"role": "assistant", "content": None, "tool_calls": call, "annotations": [], "audio": None}
    line = {"request": {"messages": ASKED, "tools": TOOLS}, "response": {"choices": [{"message": message}]}}
    taken = read_recorded(line, RowReading(), "a line")
    assert taken == {"messages": [*ASKED, {"role": "assistant", "tool_calls": call}], "tools": TOOLS}


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (None, "has no answer"),
        ({"error": {"message": "overloaded"}}, "has no answer"),
        ({"choices": []}, "has no answer"),
        ({"choices": [None]}, "has no answer"),
        ({"choices": {"a": 1}}, "has no answer"),
        ({"choices": ["text"]}, "has no answer"),
        ({"choices": [{"message": {"role": "assistant", "content": None, "refusal": "no"}}]}, "has no answer"),
        ({"choices": [{"message": ANSWER, "finish_reason": "length"}]}, "its answer was cut off (length)"),
        ({"type": "message", **ANSWER, "stop_reason": "max_tokens"}, "its answer was cut off (max_tokens)"),
    ],
)
def test_what_has_no_whole_answer_is_a_prompt_and_nothing_to_score(response, reason, tmp_path):
    lines = [{"request": REQUEST, "response": response}, LINES["a batch"]]
    source = write(tmp_path / "log.jsonl", lines)
    assert len(load_prompts(Prompts(source=source))) == 1, "both ask the same"
    first, second = read_answered(source, RowReading(max_bad_rows=0), "score.source")
    assert reason in first.refused
    assert (second.refused, second.fields["messages"][-1]) == (None, ANSWER)


def test_only_what_is_named_stays_of_a_line():
    line = {**LINES["with bodies"], "user": "u"}
    settings = RowReading(metadata=["user", "request.body.model", "request.body.metadata.topic"])
    assert read_recorded(line, settings, "a line") == {"messages": [*ASKED, ANSWER], "user": "u", "request.body.model": "m"}
    with pytest.raises(UnreadableError, match=r"a line: request\.headers \(metadata\) has several values"):
        read_recorded(line, RowReading(metadata=["request.headers"]), "a line")


def test_a_name_that_no_line_has_is_a_slip(tmp_path):
    source = write(tmp_path / "log.jsonl", [LINES["a batch"]] * 3)
    with pytest.raises(InputError, match=r"prompts\.metadata: no recorded request has the field topik"):
        list(read_source(Prompts(source=source, metadata=["topik", "body.model"])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metadata": ["headers.Authorization"]}, r"headers\.Authorization looks like a secret"),
        ({"metadata": ["messages"]}, "messages is part of the conversation"),
        ({"format": "requests", "columns": {"messages": "m"}}, "the fields of recorded requests are fixed"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        RowReading(**settings)


def chat(session, number, turns):
    """The requests of a session, one for each of its turns, which repeat those before."""
    messages, lines = [{"role": "system", "content": f"It is {number} o'clock."}], []
    for turn in range(turns):
        messages = [*messages, {"role": "user", "content": f"question {turn} of {session}"}]
        answer = {"role": "assistant", "content": f"answer {turn}"}
        request = {"messages": messages, "user": session}
        lines.append({"request": request, "response": {"choices": [{"message": answer}]}})
        messages = [*messages, answer]
    return lines


@pytest.mark.parametrize("key", [None, "request.user"])
def test_a_session_is_on_one_side_of_the_split(key, tmp_path, experiment_file):
    """By what was asked first, or by the field that names it; requests of one session have different prompts."""
    lines = [line for number in range(8) for line in chat(f"s{number}", number, 3)]
    source = write(tmp_path / "log.jsonl", sorted(lines, key=lambda line: len(line["request"]["messages"])))
    chosen = [("prompts.source", source), *([("prompts.session", key)] if key else [])]
    experiment = load_experiment(experiment_file, chosen)
    generate(experiment)
    rows = next(read_batches(sorted(experiment.directory("data").glob("train-00000*.parquet"))))
    table = [row for batch in read_batches(sorted(experiment.directory("data").glob("*.parquet"))) for row in batch.to_pylist()]
    assert len(table) == 24, "every request is a prompt"
    keys = {}
    for row in table:
        _, ours = metadata_and_provenance(row["metadata"])
        keys.setdefault(row["prompt"][1]["content"].split()[-1], set()).add(ours["conversation"])
    assert len(keys) == 8
    assert all(len(names) == 1 for names in keys.values())
    assert len(set().union(*keys.values())) == 8
    assert len({is_held_out(key, 0, 0.5) for key in conversation_keys(rows)}) == 2


def test_a_session_whose_first_turns_differ_is_one_by_its_name(tmp_path):
    line = {"messages": ASKED, "response": CHOICES, "sid": "x"}
    other = {"messages": [{"role": "user", "content": "another"}], "response": CHOICES, "sid": "x"}
    source = write(tmp_path / "log.jsonl", [line, other, {"prompt": "no log", "sid": "x"}])
    assert len({entry.conversation for entry in read_source(Prompts(source=source, session="sid"))}) == 1
    assert len({entry.conversation for entry in read_source(Prompts(source=source))}) == 3


def test_bad_lines_are_counted_and_named_and_no_secret_is_stored(tmp_path, experiment_file):
    """Of lines that cannot be read either."""
    lines = [line for number in range(9) for line in chat(f"s{number}", number, 2)]
    for line in lines:
        line["headers"] = {"authorization": KEY}
    error = {"headers": {"authorization": KEY}, "error": "overloaded"}
    bad = {"request": {"messages": [{"role": "alien", "content": "x"}]}, "api_key": KEY}
    source = write(tmp_path / "log.jsonl", [*lines, error, bad, "no JSON"])
    chosen = [("score.source", source), ("score.max_bad_rows", "0.2"), ("score.metadata", "[request.user]")]
    experiment = load_experiment(experiment_file, chosen)
    score(experiment)
    manifest = json.loads((experiment.directory("data") / "dataset.json").read_text())
    assert sum(manifest["left_out"].values()) == 3
    rejected = next(read_batches([experiment.directory("data") / "rejected.parquet"])).to_pylist()
    assert sorted(row["place"].rpartition(" line ")[2] for row in rejected) == ["19", "20", "21"]
    rows = load_dataset(experiment.directory("data"))
    assert len(rows) == 18
    metadata, ours = metadata_and_provenance(str(rows[0]["metadata"]))
    assert (metadata, set(ours)) == ({"request.user": "s0"}, {"conversation"})
    experiment = load_experiment(
        experiment_file, [("prompts.source", source), ("prompts.max_bad_rows", "0.2"), ("output", f"{tmp_path}/b")]
    )
    generate(experiment)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix == ".parquet":
            assert KEY not in str(next(read_batches([file])).to_pylist())
        elif file.is_file() and file != tmp_path / "log.jsonl":
            assert KEY not in file.read_text(errors="replace")


def test_prompts_that_are_known_are_so_whatever_their_session(tmp_path, experiment_file):
    source = write(tmp_path / "log.jsonl", chat("s0", 0, 2))
    generate(load_experiment(experiment_file, [("prompts.source", source)]))
    write(tmp_path / "log.jsonl", chat("s0", 0, 4))
    known = f"[{tmp_path}/run/data]"
    experiment = load_experiment(experiment_file, [("prompts.source", source), ("prompts.known", known)])
    assert len(prepared_prompts(experiment).prompts) == 2


def test_the_shipped_experiment_reads_its_log(monkeypatch):
    monkeypatch.chdir(ROOT)
    section = load_experiment(ROOT / "configs/traffic.yaml").prompts
    prompts = load_prompts(section)
    assert len(prompts) == 41
    assert len({prompt.lineage["source"]["conversation"] for prompt in prompts}) == 36
    assert prompts[0].metadata == {"request.model": "big-model", "request.metadata.topic": "support"}


def test_a_line_without_the_session_is_left_out(tmp_path):
    lines = [{**LINES["a batch"], "sid": "x"}, LINES["a batch"], {**LINES["a batch"], "sid": None}]
    first, second, third = read_source(Prompts(source=write(tmp_path / "log.jsonl", lines), session="sid"))
    assert (second.unreadable, second.refused) == (True, "has no field sid (session)")
    assert first.conversation != third.conversation
