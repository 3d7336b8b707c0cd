"""The engine `anthropic` against a double of its API over HTTP, by the real client."""

import http.server
import json
import threading

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmdistill.config import Generate, Targets, Teacher
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.models.loading import end_token_ids
from llmdistill.teachers import EngineSpec, Request, Usage, open_engine

pytest.importorskip(
    "anthropic", reason="the extra `anthropic` is not installed; `make .anthropic` puts it beside the environment"
)
TEXT = "Say “yes” — naïve 🦙."


@pytest.fixture
def asked(smollm2, monkeypatch):
    """Asks a double that gives the answers of a list; what it was sent, and what became of it."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ends = end_token_ids(str(smollm2), None, None, tokenizer)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "no-secret")
    sent, given = [], []

    class Double(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent.append({**body, "key": self.headers["Authorization"], "path": self.path})
            content = json.dumps(given.pop(0)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    def ask(*answers, tools=None, **sampling):
        given.extend(answers)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Double) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            teacher = Teacher(model="large", engine="anthropic", url=url, licence="terms", concurrency=1)
            spec = EngineSpec(
                teacher,
                Generate(max_tokens=64, **sampling),
                Targets(kind="none"),
                ends,
                512,
                template=ChatTemplate(tokenizer, ends),
            )
            messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
            requests = [Request(n, [1, 2], 0, messages=messages, tools=tools) for n in range(len(answers))]
            made = list(open_engine(spec).generate([requests]))
            server.shutdown()
        return sent, made

    return ask, tokenizer


def answer(**changes):
    usage = {"input_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 2, "output_tokens": 9}
    return {"content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn", "usage": usage, **changes}


def test_a_prompt_with_tools_is_not_sent(asked):
    """OpenAI's form of them, which is ours, is refused there, and nothing of it would be paid or learnt."""
    ask, _ = asked
    sent, (made,) = ask(answer(), tools=[{"type": "function", "function": {"name": "f"}}])
    assert (sent, made.failed) == ([], "a prompt with tools, which engine anthropic does not support")


def test_text_is_stored_in_the_students_tokens(asked):
    ask, tokenizer = asked
    sent, (made,) = ask(answer())
    assert sent[0]["path"] == "/v1/messages"
    assert sent[0]["key"] == "Bearer no-secret"
    assert sent[0]["system"] == "Be short."
    assert sent[0]["messages"] == [{"role": "user", "content": "hello"}]
    assert made.ids.tolist() == [*tokenizer.encode(TEXT, add_special_tokens=False), 2]
    assert np.isnan(made.token_logprobs).all()
    assert made.targets is None
    assert made.usage == Usage(input=14, output=9, cached=7)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stop_reason": "refusal"}, "a refusal (stop_reason refusal)"),
        ({"stop_reason": "tool_use"}, "a tool call"),
        ({"stop_reason": "pause_turn"}, "a finish reason other than"),
        ({"content": []}, "no text"),
        ({"content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "yes"}]}, "a reasoning trace separate"),
        ({"content": None}, "an answer in an unexpected format"),
    ],
)
def test_an_answer_of_no_use_is_a_failed_row_that_is_paid_once(asked, changes, reason):
    ask, _ = asked
    sent, (made,) = ask(answer(**changes))
    assert made.failed.startswith(reason)
    assert made.usage.output == 9
    assert len(sent) == 1


def test_a_trace_is_beside_the_answer(asked):
    ask, tokenizer = asked
    content = [
        {"type": "thinking", "thinking": "Hm. "},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": TEXT},
    ]
    _, (made,) = ask(answer(content=content), thinking="removed")
    assert made.failed is None
    assert made.trace == "Hm. "
    assert made.ids.tolist() == [*tokenizer.encode(TEXT, add_special_tokens=False), 2]


def test_a_cut_answer_has_no_end_token(asked):
    ask, tokenizer = asked
    _, (made,) = ask(answer(stop_reason="max_tokens"))
    assert made.finish_reason == "length"
    assert made.ids.tolist() == tokenizer.encode(TEXT, add_special_tokens=False)
