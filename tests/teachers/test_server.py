"""The client of a teacher's server; tests/integration/test_server.py has a real one."""

import asyncio
import time
from json import dumps

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from llmdistill.config import Generate, Targets, Teacher
from llmdistill.errors import InputError, RemoteError
from llmdistill.teachers import EngineSpec, Request, remote, server
from tests.factories import VOCAB


@pytest.mark.parametrize(
    ("status", "error", "times"), [(401, InputError, 1), (404, InputError, 1), (500, RemoteError, remote.TRIES)]
)
def test_a_refusal_is_final_and_a_fault_is_not(monkeypatch, status, error, times):
    asked = []

    async def answer(self, method, path, **options):
        asked.append(path)
        return httpx.Response(status, json={"error": {"message": "no"}}, request=httpx.Request(method, f"http://host{path}"))

    monkeypatch.setattr(httpx.AsyncClient, "request", answer)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.0)
    teacher = Teacher(model="a/b", engine="server", url="http://host")
    with pytest.raises(error):
        server.ServerEngine(EngineSpec(teacher, Generate(), Targets(), [1], 64))
    assert len(asked) == times


def test_a_request_leaves_nothing_to_the_servers_defaults(monkeypatch):
    """A server takes what is not said from the model's generation configuration, such as Qwen's repetition penalty."""
    bodies = []

    async def answer(self, method, path, json=None, **options):
        bodies.append(json)
        choice = {"token_ids": [5], "finish_reason": "stop", "prompt_token_ids": [3, 4]}
        choice["logprobs"] = {"top_logprobs": [{"token_id:5": -0.1}], "token_logprobs": [-0.1]}
        content = {"data": [{"id": "a/b"}]} if path == "/v1/models" else {"choices": [choice], "results": []}
        return httpx.Response(200, json=content, request=httpx.Request(method, f"http://host{path}"))

    monkeypatch.setattr(httpx.AsyncClient, "request", answer)
    teacher = Teacher(model="a/b", engine="server", url="http://host")
    engine = server.ServerEngine(EngineSpec(teacher, Generate(max_tokens=1), Targets(kind="topk", k=1), [5], 64))
    (made,) = engine.generate([[Request(0, [3, 4], 7)]])
    assert made.ids.tolist() == [5]
    asked = bodies[-1]
    said = {name: asked[name] for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_p")}
    assert said == {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["stop_token_ids"]) == (1.0, 1.0, 0, [5])


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_log_probabilities_after_top_p_are_refused(monkeypatch, mode):
    """As `vllm serve --logprobs-mode processed_logprobs` gives them: −∞ is -9999.0 there."""

    async def answer(self, method, path, json=None, **options):
        cut = mode == "processed_logprobs" and json and json.get("top_p", 1) < 0.9
        top = {"token_id:5": 0.0, "token_id:6": -9999.0} if cut else {"token_id:5": -0.05, "token_id:6": -3.1}
        choice = {"prompt_token_ids": json and json.get("prompt"), "logprobs": {"top_logprobs": [top]}}
        content = {"data": [{"id": "a/b"}]} if path == "/v1/models" else {"choices": [choice], "results": []}
        return httpx.Response(200, json=content, request=httpx.Request(method, f"http://host{path}"))

    monkeypatch.setattr(httpx.AsyncClient, "request", answer)
    teacher = Teacher(model="a/b", engine="server", url="http://host")
    spec = EngineSpec(teacher, Generate(top_p=0.95), Targets(kind="topk", k=2), [5], 64)
    if mode == "raw_logprobs":
        assert server.ServerEngine(spec).model == "a/b"
        return
    with pytest.raises(InputError, match=r"generate\.top_p is 0\.95, .* http://host depend on it; .* set generate\.top_p to 1"):
        server.ServerEngine(spec)


def test_a_server_that_cannot_draw_samples_is_quoted(monkeypatch):
    said = "targets.kind sampled: this vLLM's model runner has no Sampler.compute_logprobs"

    async def answer(self, method, path, json=None, **options):
        request = httpx.Request(method, f"http://host{path}")
        if path == "/collective_rpc":
            return httpx.Response(500, json={"error": {"message": said}}, request=request)
        return httpx.Response(200, json={"data": [{"id": "a/b"}]}, request=request)

    monkeypatch.setattr(httpx.AsyncClient, "request", answer)
    teacher = Teacher(model="a/b", engine="server", url="http://host")
    with pytest.raises(InputError, match=rf"{said}.* VLLM_USE_V2_MODEL_RUNNER=0 vllm serve a/b --max-logprobs 4 "):
        server.ServerEngine(EngineSpec(teacher, Generate(), Targets(kind="sampled", n=4), [5], 64))


GOOD = {"token_ids": [5, 6], "finish_reason": "stop"}
GOOD["logprobs"] = {"top_logprobs": [{"token_id:5": -0.1}, {"token_id:7": -0.2, "token_id:6": -3}], "token_logprobs": [-0.1, -3]}


def changed(**changes):
    logprobs = {name: changes.pop(name) for name in ("top_logprobs", "token_logprobs") if name in changes}
    return {**GOOD, "logprobs": {**GOOD["logprobs"], **logprobs}, **changes}


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        (changed(token_ids=[5, 65541]), "token ids outside the vocabulary"),
        (changed(token_ids=[5, -1]), "token ids outside the vocabulary"),
        (changed(token_ids=[5, 10**30]), "token ids outside the vocabulary"),
        (changed(token_ids=[5, 6.0]), "token ids that are not integers"),
        (changed(token_ids=[5, True]), "token ids that are not integers"),
        (changed(token_ids=[]), "no tokens"),
        (changed(token_ids=[5] * 300, token_logprobs=[-1.0] * 300), "more tokens than requested"),
        (changed(finish_reason="abort"), "a finish reason other than stop or length"),
        (changed(token_logprobs=[-0.1, 0.5]), "invalid log-probabilities"),
        (changed(token_logprobs=[-0.1, float("nan")]), "invalid log-probabilities"),
        (changed(token_logprobs=[-0.1, -float("inf")]), "invalid log-probabilities"),
        (changed(token_logprobs=[-0.1, None]), "invalid log-probabilities"),
        (changed(token_logprobs=[-0.1]), "not one log-probability per token"),
        (changed(token_logprobs=[-0.1] * 3), "not one log-probability per token"),
        (changed(top_logprobs=[{"token_id:5": -0.1}]), "not one distribution per token"),
        (changed(top_logprobs=[{"token_id:5": -0.1}] * 3), "not one distribution per token"),
        (changed(top_logprobs=[{"token_id:5": -0.1}, {}]), "not as many log-probabilities per token"),
        (changed(top_logprobs=[{"token_id:5": -0.1}, {"token_id:5": -1, "token_id:7": -2}]), "not as many log-prob"),
        (changed(top_logprobs=[{"token_id:5": -0.1}, {"token_id:4096": -1}]), "token ids outside the vocabulary"),
        (changed(top_logprobs=[{"token_id:5": 0.7}, {"token_id:6": -1}]), "invalid log-probabilities"),
        (changed(logprobs=None), "an answer in an unexpected format"),
        ({"text": "hello"}, "an answer in an unexpected format"),
    ],
)
def test_an_answer_that_cannot_be_right_is_asked_for_again_and_given_up(monkeypatch, choice, reason):
    """No shape, range or sum that is wrong is stored; the other rows are."""
    asked = []

    async def answer(self, method, path, json=None, **options):
        wrong = path == "/v1/completions" and json["prompt"] == [3, 4]
        asked.extend([path] * wrong)
        given = {**(choice if wrong else GOOD), "prompt_token_ids": json and json.get("prompt")}
        content = {"data": [{"id": "a/b"}]} if path == "/v1/models" else {"choices": [given], "results": []}
        return httpx.Response(200, json=None, content=dumps(content), request=httpx.Request(method, f"http://host{path}"))

    monkeypatch.setattr(httpx.AsyncClient, "request", answer)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.0)
    teacher = Teacher(model="a/b", engine="server", url="http://host")
    spec = EngineSpec(teacher, Generate(max_tokens=6), Targets(kind="topk", k=1), [5], 64, vocab_size=VOCAB)
    found = {made.index: made for made in server.ServerEngine(spec).generate([[Request(0, [3, 4], 7), Request(1, [3], 8)]])}
    assert found[0].failed.startswith(reason)
    assert found[1].failed is None
    assert found[1].ids.tolist() == [5, 6]
    assert found[1].targets.ids_NK.tolist() == [[5], [7]]
    assert len(asked) == (remote.TRIES if "format" in reason else remote.UNUSABLE_TRIES)


def test_probabilities_of_more_than_one_are_no_distribution():
    engine = object.__new__(server.ServerEngine)
    engine.kept, engine.known_ids, engine._vocab_size = Targets(kind="topk", k=2), None, 100
    with pytest.raises(ValueError, match="add up to more than one"):
        engine._targets(np.array([5]), [{5: -0.1, 6: -0.2}])


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for(monkeypatch):
    """`teacher.timeout` is of the whole answer."""

    async def answer(self, method, path, **options):
        for _ in range(100):
            await asyncio.sleep(0.05)

    monkeypatch.setattr(httpx.AsyncClient, "request", answer)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.0)
    teacher = Teacher(model="a/b", engine="server", url="http://host", timeout=0.1)
    with pytest.raises(RemoteError, match=r"no complete answer within 0\.1 seconds \(teacher\.timeout\)"):
        server.ServerEngine(EngineSpec(teacher, Generate(), Targets(), [1], 64))


def test_a_stop_does_not_wait_for_answers(monkeypatch):
    async def answer(self, method, path, json=None, **options):
        if path == "/v1/completions" and json["prompt"] != [1]:
            await asyncio.sleep(3600)
        given = {**GOOD, "prompt_token_ids": json and json.get("prompt")}
        content = {"data": [{"id": "a/b"}]} if path == "/v1/models" else {"choices": [given], "results": []}
        return httpx.Response(200, json=content, request=httpx.Request(method, f"http://host{path}"))

    monkeypatch.setattr(httpx.AsyncClient, "request", answer)
    teacher = Teacher(model="a/b", engine="server", url="http://host")
    engine = server.ServerEngine(EngineSpec(teacher, Generate(max_tokens=6), Targets(kind="topk", k=1), [5], 64))
    answers = engine.generate([[Request(number, [number], 7) for number in range(1, 9)]])
    assert next(answers).index == 1
    started = time.monotonic()
    answers.close()
    assert time.monotonic() - started < 5


def test_speculative_decoding_is_refused():
    with pytest.raises(ValidationError, match="speculative_config: log-probabilities under speculative decoding"):
        Teacher(model="a/b", engine_args={"speculative_config": {"method": "ngram"}})
    for name, instead in (("logprobs_mode", "remove it"), ("model", r"set teacher\.model"), ("dtype", r"set teacher\.dtype")):
        with pytest.raises(ValueError, match=rf"engine_args\.{name}: llmdistill sets this argument itself; {instead}"):
            Teacher(model="a/b", engine_args={name: "x"})


def test_data_parallelism_inside_one_process_is_refused():
    """`vllm.LLM` refuses it, after the models and the prompts have been read."""
    with pytest.raises(ValidationError, match=r"engine_args\.data_parallel_size: .* one process per copy, with `--shards i/n`"):
        Teacher(model="a/b", engine_args={"data_parallel_size": 2})
    assert Teacher(model="a/b", engine_args={"data_parallel_size": 1}).engine_args
