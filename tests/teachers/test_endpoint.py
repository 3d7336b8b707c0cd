"""The engine `openai` against a double of an endpoint over HTTP; tests/integration/test_server.py has a real server."""

import json
import math
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmdistill.config import Generate, Teacher
from llmdistill.config.teacher import Price
from llmdistill.errors import InputError, RemoteError
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.models.loading import end_token_ids
from llmdistill.teachers import EngineSpec, Request, Usage, limits, open_engine, remote
from tests.factories import sized
from tests.teachers.endpoint import END, Endpoint, distribution, serving

pytest.importorskip("openai", reason="the extra `api` is not installed")
K = 5


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def endpoint(tokenizer, monkeypatch):
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return Endpoint(tokenizer)


def opened(url, smollm2, tokenizer, kind="topk", k=K, shared=None, sampling=None, told=False, **teacher):
    known = {} if kind in ("none", "chunks") and not told else {"tokenizer": str(smollm2)}
    settings = Teacher(model="large", engine="openai", url=url, licence="mit", **known, **teacher)
    ends = end_token_ids(str(smollm2), None, None, tokenizer)
    spec = EngineSpec(
        settings, sampling or Generate(max_tokens=80), sized(kind, k), ends, 512,
        template=ChatTemplate(tokenizer, ends), shared=shared, vocab_size=49152,
    )  # fmt: skip
    return open_engine(spec)


def asked(tokenizer, *texts):
    messages = [[{"role": "user", "content": text}] for text in texts]
    template = ChatTemplate(tokenizer, [END])
    return [Request(n, template.prompt_ids(said), n << 40, messages=said) for n, said in enumerate(messages)]


def answers(engine, tokenizer, *texts):
    found = {made.index: made for made in engine.generate([asked(tokenizer, *texts)])}
    return [found[number] for number in range(len(texts))]


@pytest.mark.parametrize("with_end", [False, True])
def test_bytes_become_ids_and_distributions_stay_what_they_are(endpoint, smollm2, tokenizer, with_end):
    """Characters of several tokens, too: “, ï and 🦙 are; each of their tokens is no text by itself."""
    endpoint.with_end = with_end
    with serving(endpoint) as url:
        (made,) = answers(opened(url, smollm2, tokenizer), tokenizer, "hello")
    ids = [*tokenizer.encode("You said “hello” — naïve 🦙.", add_special_tokens=False), END]
    assert made.failed is None
    assert made.ids.tolist() == ids
    assert made.finish_reason == "stop"
    told = ids if with_end else ids[:-1]
    for place, token in enumerate(told):
        expected = distribution(token, place, K)
        assert made.targets.ids_NK[place].tolist() == [other for other, _ in expected]
        assert np.allclose(made.targets.logprobs_NK[place], [value for _, value in expected])
        mass = sum(math.exp(value) for _, value in expected)
        assert made.targets.tail_N[place] == pytest.approx(1 - mass, abs=1e-6)
    assert np.allclose(made.token_logprobs[: len(told)], math.log(0.5))
    if not with_end:  # of the end token nothing is known: all probability is in the tail
        assert np.isnan(made.token_logprobs[-1])
        assert made.targets.tail_N[-1] == 1
        assert np.isneginf(made.targets.logprobs_NK[-1]).all()
    assert made.usage == Usage(10, len(ids) - 1)


def test_an_unknown_end_adds_nothing_to_a_divergence(endpoint, smollm2, tokenizer):
    import torch

    from llmdistill.data.targets import TopK
    from llmdistill.losses import Objective
    from llmdistill.losses.divergences import picked_logits

    with serving(endpoint) as url:
        (made,) = answers(opened(url, smollm2, tokenizer), tokenizer, "hello")
    batch = {name: torch.from_numpy(value) for name, value in made.targets.batch().items()}
    logits_NV = torch.randn(len(made.ids), 49152, generator=torch.Generator().manual_seed(0))
    of_student = TopK.present(*picked_logits(logits_NV, batch["target_ids"], apart=True), batch)
    for loss in ("forward_kl", "reverse_kl", "jsd"):
        parts = TopK.loss_parts(*of_student, batch, Objective(loss=loss))
        assert all(abs(part[-1].item()) < 1e-6 for part in parts.values())
        assert all(part[0].item() > 0.01 for part in parts.values())


@pytest.mark.parametrize("with_end", [False, True])
@pytest.mark.parametrize("kind", ["none", "chunks"])
def test_text_is_stored_in_the_students_tokens_with_the_chunks_of_both(endpoint, smollm2, tokenizer, kind, with_end):
    endpoint.with_end = with_end
    with serving(endpoint) as url:
        (made,) = answers(opened(url, smollm2, tokenizer, kind=kind), tokenizer, "hello")
    text = "You said “hello” — naïve 🦙."
    assert made.failed is None
    assert made.ids.tolist() == [*tokenizer.encode(text, add_special_tokens=False), END]
    assert np.isnan(made.token_logprobs).all()
    if kind == "none":
        assert made.targets is None
        return
    assert made.targets.sizes_N.sum() == len(made.ids) - (not with_end)  # the end is a chunk of its own where it is shown
    # The endpoint says one half of every token: a chunk of n of its tokens has n · log ½.
    halves = made.targets.logprobs_N[made.targets.sizes_N > 0] / math.log(0.5)
    assert np.allclose(halves, halves.round())
    assert (halves > 0.99).all()


@pytest.mark.parametrize(
    ("said", "reason"),
    [("eos", "stop"), ("eos_token", "stop"), ("end_turn", "stop"), ("max_tokens", "length"), ("model_length", "length")],
)
def test_other_names_of_an_end_are_those_of_openai(endpoint, smollm2, tokenizer, said, reason):
    """Together says `eos`, TGI `eos_token`."""
    endpoint.change = lambda answer, body: (answer["choices"][0].update(finish_reason=said), answer)[1]
    with serving(endpoint) as url:
        (made,) = answers(opened(url, smollm2, tokenizer), tokenizer, "hello")
    assert (made.failed, made.finish_reason) == (None, reason)
    assert (made.ids[-1] == END) == (reason == "stop")


@pytest.mark.parametrize("limit", [3, 80])
def test_a_cut_answer_has_no_end_token(endpoint, smollm2, tokenizer, limit):
    with serving(endpoint) as url:
        engine = opened(url, smollm2, tokenizer, kind="none", sampling=Generate(max_tokens=limit))
        (made,) = answers(engine, tokenizer, "hello")
    assert (made.ids[-1] == END) == (limit == 80)
    assert made.finish_reason == ("length" if limit == 3 else "stop")


def test_what_an_endpoint_does_not_know_is_not_sent(endpoint, smollm2, tokenizer):
    endpoint.unknown = {"top_k", "min_p", "repetition_penalty", "return_token_ids", "return_tokens_as_token_ids"}
    endpoint.most = K
    with serving(endpoint) as url:
        engine = opened(url, smollm2, tokenizer)
        (made,) = answers(engine, tokenizer, "hello")
    assert made.failed is None
    assert engine.gives["top_logprobs"] == K
    assert engine.gives["taken"] == ["presence_penalty", "frequency_penalty", "seed"]
    assert not endpoint.unknown & endpoint.bodies[-1].keys()
    assert endpoint.bodies[-1]["top_logprobs"] == K


def no_bytes(answer, body):
    for choice in answer["choices"]:
        for entry in (choice["logprobs"] or {"content": []})["content"]:
            entry["bytes"] = None
    return answer


def dependent(answer, body):
    for entry in answer["choices"][0]["logprobs"]["content"]:
        for other in entry["top_logprobs"]:
            other["logprob"] /= body["temperature"]
    return answer


def processed(answer, body):
    """As `vllm serve --logprobs-mode processed_logprobs`: log-probabilities after top-p and top-k."""
    cut = body["top_p"] < 0.5 or body.get("top_k") == 1
    for entry in answer["choices"][0]["logprobs"]["content"] if cut else []:
        entry["top_logprobs"][0]["logprob"] = 0.0
        for other in entry["top_logprobs"][1:]:
            other["logprob"] = -9999.0
    return answer


@pytest.mark.parametrize(
    ("set_up", "settings", "said"),
    [
        ({"logprobs": False}, {}, "refuses: logprobs are not supported with this model"),
        ({"change": lambda answer, body: (answer["choices"][0].update(logprobs=None), answer)[1]}, {},
         r"targets.kind topk: .* returns no log-probabilities; set targets.kind to none"),
        ({"most": K - 1}, {}, "refuses: Invalid value for 'top_logprobs': must be less than or equal to 4"),
        ({"change": no_bytes}, {}, "returns neither the ids nor the bytes of tokens"),
        ({"change": dependent}, {"sampling": Generate(max_tokens=80, temperature=0.5)}, "set generate.temperature to 1"),
        ({"change": processed}, {"sampling": Generate(max_tokens=80, top_p=0.9)},
         r"generate.top_p is 0.9, .* set generate.top_p to 1"),
        ({"change": processed}, {"sampling": Generate(max_tokens=80, top_k=50)}, "set generate.top_k to 0"),
        ({"change": lambda answer, body: answer.pop("usage") and answer}, {"price": Price(input=1, output=1), "kind": "none"},
         r"teacher.price: .* does not say how many tokens it bills \(usage.prompt_tokens\)"),
        ({"keys": {"another"}}, {}, "Incorrect API key provided; OPENAI_API_KEY is not set in the environment"),
        ({"fault": lambda number, path: (404, {}, {"error": {"message": "no model"}})}, {}, "no model; check teacher.model"),
        ({"fault": lambda number, path: (429, {}, {"error": {"message": "no money", "code": "insufficient_quota"}})}, {},
         "refuses: no money"),
    ],
)  # fmt: skip
def test_what_is_not_given_is_refused_before_anything_is_paid(endpoint, smollm2, tokenizer, set_up, settings, said):
    for name, value in set_up.items():
        setattr(endpoint, name, value)
    with serving(endpoint) as url, pytest.raises(InputError, match=said):
        opened(url, smollm2, tokenizer, **settings)
    assert all(body["max_tokens"] == 1 for body in endpoint.bodies)


def test_log_probabilities_that_are_the_models_own_go_with_any_sampling(endpoint, smollm2, tokenizer):
    """Also where the endpoint takes no zero for top-k."""
    refused = endpoint.refusal
    endpoint.refusal = lambda body: "top_k must be positive" if body.get("top_k") == 0 else refused(body)
    sampling = Generate(max_tokens=80, temperature=0.7, top_p=0.9, top_k=20)
    with serving(endpoint) as url:
        (made,) = answers(opened(url, smollm2, tokenizer, sampling=sampling), tokenizer, "hello")
    assert made.failed is None
    assert (endpoint.bodies[-1]["top_k"], endpoint.bodies[-1]["top_p"]) == (20, 0.9)


def spoiled(**changes):
    """The changes to the one answer whose question is "bad", by the place of what is changed."""

    def change(answer, body):
        choice = answer["choices"][0]
        if body["messages"][-1]["content"] == "bad":
            for name, value in changes.items():
                place = {
                    "message": choice["message"],
                    "choice": choice,
                    "answer": answer,
                    "entry": (choice["logprobs"] or {"content": [{}]})["content"][0],
                }
                target, _, key = name.partition("__")
                place[target][key] = value
        return answer

    return change


OTHERS = [{"token": "a", "bytes": [97], "logprob": -1.0}] * 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"message__refusal": "No."}, "a refusal (message.refusal)"),
        ({"choice__finish_reason": "content_filter"}, "an answer truncated by the content filter (finish_reason content_filter)"),
        ({"choice__finish_reason": "tool_calls"}, "a finish reason other than stop or length"),
        ({"message__tool_calls": [{}]}, "a tool call"),
        ({"message__content": None}, "no text"),
        ({"message__reasoning_content": "Hm."}, "a reasoning trace separate from the answer"),
        ({"entry__bytes": None, "entry__token": "You"}, "a token without bytes"),
        ({"entry__bytes": [1, 2, 300]}, "invalid bytes"),
        ({"entry__bytes": list(b"Youhave")}, "tokens that teacher.tokenizer does not have"),
        ({"entry__bytes": list("�".encode())}, "tokens that teacher.tokenizer does not have"),
        ({"entry__logprob": None}, "invalid log-probabilities"),
        ({"entry__logprob": 0.7}, "invalid log-probabilities"),
        ({"entry__top_logprobs": []}, "fewer log-probabilities per token than requested"),
        ({"entry__top_logprobs": OTHERS}, "the same token twice at one position"),
        ({"choice__logprobs": None}, "tokens that do not match the text of the answer"),
        ({"choice__message": None}, "no text"),
        ({"answer__choices": []}, "no choice"),
        ({"answer__choices": None}, "an answer in an unexpected format"),
        ({"answer__usage": {"completion_tokens": "many"}}, "an answer in an unexpected format"),
    ],
)  # fmt: skip
def test_an_answer_of_no_use_is_a_failed_row_that_is_paid_once(endpoint, smollm2, tokenizer, changes, reason):
    endpoint.change = spoiled(**changes)
    with serving(endpoint) as url:
        good, bad = answers(opened(url, smollm2, tokenizer), tokenizer, "good", "bad")
    assert good.failed is None
    assert bad.failed.startswith(reason)
    assert bad.usage.output > 0 or "answer__usage" in changes
    assert endpoint.billed[json.dumps([{"role": "user", "content": "bad"}])] == 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("The response was filtered due to the prompt triggering content management policy", "content management policy"),
        ("This model's maximum context length is 512 tokens", "maximum context length"),
    ],
)
def test_a_prompt_that_is_refused_is_a_failed_row(endpoint, smollm2, tokenizer, said, reason):
    """What is wrong with every request ends the stage; this is not."""
    endpoint.refusal = lambda body: said if body["messages"][-1]["content"] == "bad" else None
    with serving(endpoint) as url:
        good, bad = answers(opened(url, smollm2, tokenizer), tokenizer, "good", "bad")
        for wrong in ("Unknown model", "max_tokens is too large: the maximum context length is 512 tokens"):
            endpoint.refusal = lambda body, said=wrong: said
            with pytest.raises(InputError, match=f"refuses: {wrong}"):
                answers(opened(url, smollm2, tokenizer), tokenizer, "good")
    assert good.failed is None
    assert bad.failed == f"a refusal of the prompt ({reason})"
    assert bad.usage == Usage()


def test_tokens_of_a_trace_apart_from_the_answer_are_not_those_of_the_answer(endpoint, smollm2, tokenizer):
    """As vLLM with a reasoning parser gives both."""
    endpoint.change = spoiled(message__content="Four.", message__reasoning_content="Two and two.")
    sampling = Generate(max_tokens=80, thinking="removed")
    with serving(endpoint) as url:
        _, made = answers(opened(url, smollm2, tokenizer, "none", sampling=sampling, told=True), tokenizer, "good", "bad")
    assert (made.failed, made.trace, made.finish_reason) == (None, "Two and two.", "stop")
    assert tokenizer.decode(made.ids, skip_special_tokens=True) == "Four."
    assert made.ids[-1] == END
    assert np.isnan(made.token_logprobs).all()


def test_outside_of_the_most_likely_tokens_is_said_by_a_number_that_is_none(endpoint, smollm2, tokenizer):
    """OpenAI gives -9999.0 for a written token outside, and pads alternatives with it."""

    def change(answer, body):
        first = answer["choices"][0]["logprobs"]["content"][0]
        first["logprob"] = -9999.0
        for other in first["top_logprobs"][3:]:
            other["logprob"] = -9999.0
        return answer

    endpoint.change = change
    with serving(endpoint) as url:
        (made,) = answers(opened(url, smollm2, tokenizer), tokenizer, "hello")
    assert np.isnan(made.token_logprobs[0])
    known = distribution(int(made.ids[0]), 0, 3)
    assert np.allclose(made.targets.logprobs_NK[0][:3], [value for _, value in known])
    assert np.isneginf(made.targets.logprobs_NK[0][3:]).all()
    assert made.targets.tail_N[0] == pytest.approx(1 - sum(math.exp(value) for _, value in known), abs=1e-6)


def test_faults_cost_time_and_no_rows(endpoint, smollm2, tokenizer):
    faults = [(500, {}, {"error": {"message": "oops"}}), "cut", "reset", (503, {}, "busy"), (429, {"Retry-After": "0"}, {})]
    endpoint.fault = lambda number, path: faults[number % 6] if number % 6 < 5 else None
    with serving(endpoint) as url:
        made = answers(opened(url, smollm2, tokenizer, concurrency=1), tokenizer, "one", "two", "three")
    assert [row.failed for row in made] == [None] * 3


def test_an_error_with_a_status_of_success_is_a_fault(endpoint, smollm2, tokenizer):
    """As OpenRouter sends those of the provider behind it; nothing is billed for it."""
    error = (200, {}, {"error": {"message": "Provider returned error", "code": 502}})
    with serving(endpoint) as url:
        engine = opened(url, smollm2, tokenizer, concurrency=1)
        calls = len(endpoint.times)
        endpoint.fault = lambda number, path: error if number < calls + 2 else None
        (made,) = answers(engine, tokenizer, "one")
        assert made.failed is None
        assert len(endpoint.times) == calls + 3
        endpoint.fault = lambda number, path: error
        with pytest.raises(RemoteError, match="Provider returned error"):
            opened(url, smollm2, tokenizer)


def test_an_endpoint_that_gives_nothing_at_the_start_is_named(endpoint, smollm2, tokenizer):
    endpoint.change = lambda answer, body: {**answer, "choices": []}
    with serving(endpoint) as url, pytest.raises(InputError, match=r"127.0.0.1.*\(large\) gives no choice"):
        opened(url, smollm2, tokenizer)


def test_an_endpoint_that_wants_fewer_requests_at_a_time_is_no_fault(endpoint, smollm2, tokenizer, monkeypatch):
    """Three requests in each window of a third of a second, and every fourth is told to wait: all are answered in the end."""
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.3)  # as long as a window, however fast this machine is
    window = {"begin": 0.0, "count": 0}

    def fault(number, path):
        if (now := time.monotonic()) > window["begin"] + 0.3:
            window.update(begin=now, count=0)
        window["count"] += 1
        return (429, {"Retry-After": "0"}, {"error": {"message": "slow"}}) if window["count"] > 3 else None

    with serving(endpoint) as url:
        engine = opened(url, smollm2, tokenizer, concurrency=40)
        endpoint.fault = fault
        made = answers(engine, tokenizer, *(str(number) for number in range(40)))
    assert [row.failed for row in made] == [None] * 40


def test_a_pause_of_nothing_is_no_reason_to_hurry(endpoint, smollm2, tokenizer, monkeypatch):
    """The pauses grow all the same: 0.5, 1, 2 … seconds, in twentieths here and each between half and one and a half of it."""
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.2)
    endpoint.fault = lambda number, path: (503, {"Retry-After": "0"}, "busy")
    with serving(endpoint) as url, pytest.raises(RemoteError, match="failed 9 times"):
        opened(url, smollm2, tokenizer)
    assert endpoint.times[-1] - endpoint.times[0] > 8 * 0.1


def test_a_clock_that_is_ahead_stops_nobody_else(tmp_path):
    ahead = {"until": time.time() + 7200, "requests": [0, time.time() + 7200]}
    (tmp_path / "shared").write_text(json.dumps(ahead))
    assert limits.Limits(tmp_path / "shared", None).pause(10) == 0


def test_the_length_of_reasoning_models_is_theirs(endpoint, smollm2, tokenizer):
    """One token is no room for reasoning, and what an answer may take is what the request says."""
    endpoint.change = lambda answer, body: answer
    endpoint.answer = lambda body: Endpoint.answer(endpoint, {"max_tokens": body["max_completion_tokens"], **body})
    arguments = {"max_tokens": None, "max_completion_tokens": 200}
    long = " ".join(["word"] * 90)
    with serving(endpoint) as url:
        engine = opened(url, smollm2, tokenizer, sampling=Generate(max_tokens=20, min_tokens=3), request_args=arguments)
        assert [(body["max_completion_tokens"], "min_tokens" in body) for body in endpoint.bodies] == [(200, False)]
        (made,) = answers(engine, tokenizer, long)
    assert made.failed is None
    assert 80 < len(made.ids) <= 200
    assert endpoint.bodies[-1]["min_tokens"] == 3


def test_more_tokens_of_the_student_than_of_the_teacher_are_no_fault(endpoint, smollm2, tokenizer):
    endpoint.text = lambda body: "안녕하세요 세계" * 3
    endpoint.answer = lambda body: {
        "choices": [{"index": 0, "message": {"content": endpoint.text(body)}, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 10},
    }
    with serving(endpoint) as url:
        (made,) = answers(opened(url, smollm2, tokenizer, kind="none", sampling=Generate(max_tokens=12)), tokenizer, "hello")
    assert made.failed is None
    assert len(made.ids) > 25


def test_what_fails_on_and_on_ends_with_the_last_error(endpoint, smollm2, tokenizer):
    endpoint.fault = lambda number, path: (500, {}, {"error": {"message": "out of order"}})
    with serving(endpoint) as url, pytest.raises(RemoteError, match=r"failed 9 times; last error: .*500 out of order"):
        opened(url, smollm2, tokenizer)
    assert len(endpoint.times) == remote.TRIES


def test_retry_after_is_waited_for_by_all_workers(endpoint, smollm2, tokenizer, tmp_path):
    endpoint.fault = lambda number, path: (429, {"Retry-After": "1"}, {"error": {"message": "slow"}}) if number == 1 else None
    with serving(endpoint) as url:
        first, second = (opened(url, smollm2, tokenizer, shared=tmp_path / "shared", concurrency=1) for _ in range(2))
        endpoint.times.clear()
        endpoint.fault = lambda number, path: (429, {"Retry-After": "1"}, {"error": {"message": "slow"}}) if number == 0 else None
        (made,) = first.generate([asked(tokenizer, "one")])
        assert made.failed is None
        assert endpoint.times[1] - endpoint.times[0] > 0.9
        endpoint.times.clear()
        started = limits.Limits(tmp_path / "shared", None)
        started.learn({"retry-after": "1"}, 429)
        begun = time.monotonic()
        list(second.generate([asked(tokenizer, "two")]))
    assert endpoint.times[0] - begun > 0.8


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-ratelimit-remaining-requests": "2", "x-ratelimit-reset-requests": "800ms"}, 0.8),
        ({"x-ratelimit-remaining-requests": "2", "x-ratelimit-reset-requests": "1m30s"}, 90),
        ({"x-ratelimit-remaining-tokens": "250", "x-ratelimit-reset-tokens": "20"}, 20),
        ({"x-ratelimit-remaining-tokens": "250", "x-ratelimit-reset-tokens": "a while"}, None),
    ],
)
def test_workers_share_what_is_left(tmp_path, headers, seconds):
    """Two requests of 100 tokens are left to three workers; or 250 tokens."""
    workers = [limits.Limits(tmp_path / "shared", None) for _ in range(3)]
    workers[0].learn(headers, 200)
    pauses = [worker.pause(100) for worker in workers]
    assert pauses[:2] == [0, 0]
    assert pauses[2] == (pytest.approx(seconds, abs=0.5) if seconds else 0)


def test_limits_of_anthropic_are_dates(tmp_path):
    from datetime import UTC, datetime, timedelta

    resets = (datetime.now(UTC) + timedelta(seconds=30)).isoformat().replace("+00:00", "Z")
    worker = limits.Limits(tmp_path / "shared", None)
    worker.learn({"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": resets}, 200)
    assert worker.pause(1) == pytest.approx(30, abs=1)


def test_what_is_spent_counts_also_where_it_was_in_vain(endpoint, smollm2, tokenizer, tmp_path):
    endpoint.change = spoiled(message__refusal="No.")
    price = Price(input=1, output=2)
    with serving(endpoint) as url:
        made = answers(opened(url, smollm2, tokenizer, shared=tmp_path / "s", price=price), tokenizer, "good", "bad")
    probe = (10 * 1 + 1 * 2) / 1e6
    each = [(10 * 1 + row.usage.output * 2) / 1e6 for row in made]
    assert limits.spent(tmp_path / "s") == pytest.approx(probe + sum(each))


def test_an_answer_that_does_not_say_what_it_bills_counts_as_the_most_that_it_may(endpoint, smollm2, tokenizer, tmp_path):
    """Without a price nothing is made up."""
    endpoint.change = spoiled(answer__usage=None)
    price = Price(input=1, output=2)
    with serving(endpoint) as url:
        good, bad = answers(opened(url, smollm2, tokenizer, shared=tmp_path / "s", price=price), tokenizer, "good", "bad")
        _, free = answers(opened(url, smollm2, tokenizer), tokenizer, "good", "bad")
    prompt = len(asked(tokenizer, "bad")[0].prompt_ids)
    assert bad.failed is None
    assert bad.usage == Usage(prompt, 80)
    assert limits.spent(tmp_path / "s") == pytest.approx(sum(u.cost(price) for u in (Usage(10, 1), good.usage, bad.usage)))
    assert free.usage == Usage()


def test_cached_input_and_batches_have_prices_of_their_own():
    price = Price(input=10, output=40, cached_input=2.5)
    usage = Usage(input=1_000_000, output=500_000, cached=400_000)
    assert usage.cost(price) == pytest.approx(0.6 * 10 + 0.4 * 2.5 + 0.5 * 40)
    assert usage.cost(price, batch=True) == pytest.approx(usage.cost(price) / 2)
    assert usage.cost(None) is None
