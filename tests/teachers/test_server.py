"""The client of a teacher's server; tests/integration/test_server.py has a real one."""

import httpx
import pytest
from pydantic import ValidationError

from llmdistill.config import Generate, Targets, Teacher
from llmdistill.errors import InputError, RemoteError
from llmdistill.teachers import EngineSpec, Request, server


@pytest.mark.parametrize(
    ("status", "error", "times"), [(401, InputError, 1), (404, InputError, 1), (500, RemoteError, server._TRIES)]
)
def test_a_refusal_is_final_and_a_fault_is_not(monkeypatch, status, error, times):
    asked = []

    def answer(self, method, path, **options):
        asked.append(path)
        return httpx.Response(status, json={"error": {"message": "no"}}, request=httpx.Request(method, f"http://host{path}"))

    monkeypatch.setattr(httpx.Client, "request", answer)
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    teacher = Teacher(model="a/b", engine="server", url="http://host")
    with pytest.raises(error):
        server.ServerEngine(EngineSpec(teacher, Generate(), Targets(), [1], 64))
    assert len(asked) == times


def test_a_request_leaves_nothing_to_the_servers_defaults(monkeypatch):
    """A server takes what is not said from the model's generation configuration, such as Qwen's repetition penalty."""
    bodies = []

    def answer(self, method, path, json=None, **options):
        bodies.append(json)
        choice = {"token_ids": [5], "finish_reason": "stop", "prompt_token_ids": [3, 4]}
        choice["logprobs"] = {"top_logprobs": [{"token_id:5": -0.1}], "token_logprobs": [-0.1]}
        content = {"data": [{"id": "a/b"}]} if path == "/v1/models" else {"choices": [choice], "results": []}
        return httpx.Response(200, json=content, request=httpx.Request(method, f"http://host{path}"))

    monkeypatch.setattr(httpx.Client, "request", answer)
    teacher = Teacher(model="a/b", engine="server", url="http://host")
    engine = server.ServerEngine(EngineSpec(teacher, Generate(max_tokens=1), Targets(kind="topk", k=1), [5], 64))
    (made,) = engine.generate([[Request(0, [3, 4], 7)]])
    assert made.ids.tolist() == [5]
    asked = bodies[-1]
    said = {name: asked[name] for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_p")}
    assert said == {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["stop_token_ids"]) == (1.0, 1.0, 0, [5])


def test_speculative_decoding_is_refused():
    with pytest.raises(ValidationError, match="speculative_config: log-probabilities under speculative decoding"):
        Teacher(model="a/b", engine_args={"speculative_config": {"method": "ngram"}})
