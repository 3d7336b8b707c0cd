"""A teacher behind `vllm serve`, over its OpenAI-compatible API: token ids go in, token ids and log-probabilities come out.

A request that fails by the server's or the network's fault is sent again, after a while; the row's seed goes with it, so
it costs time and no row. What the server refuses for good (4xx) ends the stage with the server's own words. An answer that
cannot be right is asked for again, and then the row is given up with the reason (`Completion.failed`).
"""

import asyncio
import json
import math
import os
import random
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

import httpx
import numpy as np

from llmdistill.data.targets import Array, SoftTargets
from llmdistill.errors import InputError, RemoteError
from llmdistill.teachers import Completion, Engine, EngineSpec, Request

_TRIES = 9
_UNUSABLE_TRIES = 3  # of an answer that cannot be right
_LONGEST_PAUSE = 60.0  # seconds; the pauses double from half a second, so that a server may take two minutes to come back
_AGAIN = {408, 409, 425, 429}  # and all 5xx
_CONNECT_SECONDS = 10.0
# What a server takes from the model's generation configuration where a request does not say it.
_NO_DEFAULTS = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
_EXTENSION = "llmdistill.teachers.vllm_worker.SampleTargets"
_ROUNDING = 1e-3  # by which a log-probability may be above zero, and probabilities add up to more than one

T = TypeVar("T")


class _UnusableAnswerError(ValueError):
    """An answer that cannot be right; the message says why."""


class ServerEngine(Engine):
    """Sends `teacher.concurrency` requests at a time; every request has its own answer, so they come back in any order.

    The requests run in an event loop of a thread of their own, where they can be ended at any moment.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.teacher, self.sampling, self.kept, self.end_ids = spec.teacher, spec.sampling, spec.kept, spec.end_ids
        teacher = spec.teacher
        assert teacher.url is not None
        key = os.environ.get("VLLM_API_KEY", "").strip()  # a secret that is mounted as a file ends in a line break
        if not (key.isascii() and key.isprintable()):
            raise InputError("VLLM_API_KEY has characters that a header cannot have")
        self.client = httpx.AsyncClient(
            base_url=teacher.url.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=teacher.concurrency, max_keepalive_connections=teacher.concurrency),
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._places = asyncio.Semaphore(teacher.concurrency)
        self.tokens = 0
        self.model = self._wait(self._served_model())
        self.known_ids, self._vocab_size = spec.known_ids, spec.vocab_size
        self._wait(self._set_targets(spec.seed))

    def generate(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Continue every request."""
        return self._answers(batches, self._continue)

    def score(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Read every request's text."""
        return self._answers(batches, self._read)

    def close(self) -> None:
        """Nothing is held here."""

    def _start(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = self._start(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()

    def _answers(
        self, batches: Iterable[Sequence[Request]], answer: Callable[[Request], Coroutine[Any, Any, Completion]]
    ) -> Iterator[Completion]:
        waiting = (request for batch in batches for request in batch)
        running: set[Future[Completion]] = set()
        try:
            while True:
                while len(running) < 2 * self.teacher.concurrency and (request := next(waiting, None)) is not None:
                    running.add(self._start(self._in_turn(answer, request)))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    completion = future.result()
                    self.tokens += len(completion.ids)
                    yield completion
        finally:
            for future in running:
                future.cancel()

    async def _in_turn(self, answer: Callable[[Request], Coroutine[Any, Any, Completion]], request: Request) -> Completion:
        """The answer to a request, or why there is none that could be right."""
        async with self._places:
            try:
                return await answer(request)
            except _UnusableAnswerError as error:
                nothing = np.empty(0, dtype=np.int64)
                return Completion(request.index, nothing, "failed", np.empty(0, dtype=np.float32), None, failed=str(error))

    async def _continue(self, request: Request) -> Completion:
        body = {
            "prompt": list(request.prompt_ids),
            "max_tokens": self.sampling.max_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            **_NO_DEFAULTS,
            "seed": request.seed,
            "stop_token_ids": list(self.end_ids),
            **({"min_tokens": self.sampling.min_tokens} if self.sampling.min_tokens else {}),
            **({"structured_outputs": {"json": self.sampling.json_schema}} if self.sampling.json_schema is not None else {}),
            "logprobs": self.kept.kept,
            "return_tokens_as_token_ids": True,
        }

        def read(choice: Any) -> Completion:
            ids = self._token_ids(choice["token_ids"])
            if len(ids) > self.sampling.max_tokens:
                raise _UnusableAnswerError("more tokens than were asked for")
            if choice["finish_reason"] not in ("stop", "length"):
                raise _UnusableAnswerError("a finish reason other than stop or length")
            tops = [
                {int(token.removeprefix("token_id:")): value for token, value in top.items()}
                for top in choice["logprobs"]["top_logprobs"]
            ]
            written = self._logprobs(ids, choice["logprobs"]["token_logprobs"])
            known = self.sampling.shows_everything and self.sampling.temperature == 1
            return Completion(
                request.index,
                ids,
                choice["finish_reason"],
                written,
                self._targets(ids, tops),
                float(written.sum(dtype=np.float64)) if known else None,
            )

        return await self._ask(body, read)

    async def _read(self, request: Request) -> Completion:
        """Score in one prefill; the token that the server insists on writing after it is dropped."""
        start = len(request.prompt_ids)
        body = {
            "prompt": [*request.prompt_ids, *request.completion_ids],
            "max_tokens": 1,
            "temperature": 0,
            **_NO_DEFAULTS,
            "prompt_logprobs": self.kept.kept,
        }

        def read(choice: Any) -> Completion:
            ids = np.asarray(request.completion_ids, dtype=np.int64)
            # The first token of a prompt has no distribution: entry 1 is that of the second token.
            tops = [{int(token): entry["logprob"] for token, entry in top.items()} for top in choice["prompt_logprobs"][start:]]
            written = self._logprobs(ids, [top.get(token) for top, token in zip(tops, ids.tolist(), strict=False)])
            reason = "stop" if ids[-1] in self.end_ids else "length"
            return Completion(request.index, ids, reason, written, self._targets(ids, tops))

        return await self._ask(body, read)

    def _token_ids(self, given: Any) -> Array:
        """Token ids of the vocabulary, at least one."""
        if not isinstance(given, list) or not all(type(token) is int for token in given):
            raise _UnusableAnswerError("token ids that are no whole numbers")
        ids = np.array(given, dtype=object)
        if not given or min(given) < 0 or (self._vocab_size is not None and max(given) >= self._vocab_size):
            raise _UnusableAnswerError("token ids outside the vocabulary" if given else "no tokens")
        return ids.astype(np.int64)

    def _logprobs(self, ids: Array, given: Any) -> Array:
        """A log-probability a token."""
        if not isinstance(given, list) or len(given) != len(ids):
            raise _UnusableAnswerError("not one log-probability a token")
        _check_logprobs(given)
        return np.array(given, dtype=np.float32)

    def _targets(self, ids: Array, tops: Sequence[Mapping[int, Any]]) -> SoftTargets | None:
        """The server gives the kept tokens at every position, and the written one beside them if it is not one of them."""
        if len(tops) != len(ids):
            raise _UnusableAnswerError("not one distribution a token")
        kept = self.kept.kept
        ids_NK, logprobs_NK = np.zeros((len(ids), kept), dtype=np.int64), np.zeros((len(ids), kept), dtype=np.float32)
        for position, (token, top) in enumerate(zip(ids.tolist(), tops, strict=True)):
            found = {other: value for other, value in top.items() if len(top) == kept or other != token}
            if len(found) != kept:
                raise _UnusableAnswerError("another number of log-probabilities a token than were asked for")
            _check_logprobs(found.values())
            if kept:
                self._token_ids(list(found))
            ordered = sorted(found.items(), key=lambda item: -item[1])
            ids_NK[position] = [other for other, _ in ordered]
            logprobs_NK[position] = [value for _, value in ordered]
        if (np.exp(logprobs_NK.astype(np.float64)).sum(axis=1) > 1 + _ROUNDING).any():
            raise _UnusableAnswerError("probabilities that add up to more than one")
        made = self.kept.stored.from_kept(ids_NK, logprobs_NK)
        return made if made is None or self.known_ids is None else made.within(self.known_ids)

    async def _ask(self, body: dict[str, Any], read: Callable[[Any], Completion]) -> Completion:
        """What `read` makes of the one choice that the server returns."""
        body = {**body, "model": self.model, "add_special_tokens": False, "return_token_ids": True}

        def understand(answer: Any) -> Completion:
            (choice,) = answer["choices"]
            if choice["prompt_token_ids"] != body["prompt"]:
                raise InputError(f"{self.teacher.url}: the server saw other token ids than those that were sent")
            return read(choice)

        return await self._call("POST", "/v1/completions", understand, body)

    async def _call(self, method: str, path: str, understand: Callable[[Any], T], body: Any = None, tries: int = _TRIES) -> T:
        """One call, again and again while the fault is the server's or the network's.

        Raises:
            InputError: the server refuses it.
            RemoteError: it still fails after the last try.
            _UnusableAnswerError: the server answers, but what it says cannot be right.
        """
        unusable, answered = 0, False
        for attempt in range(tries):
            answered = False
            try:
                async with asyncio.timeout(self.teacher.timeout):  # of the whole answer, which may come byte by byte
                    response = await self.client.request(method, path, json=body)
                if 400 <= response.status_code < 500 and response.status_code not in _AGAIN:
                    raise InputError(f"{self.teacher.url} refuses: {_message(response)}")
                response.raise_for_status()
                answer = response.json()
                answered = True
                return understand(answer)
            except InputError:
                raise
            except _UnusableAnswerError:
                unusable += 1
                if unusable == min(_UNUSABLE_TRIES, tries):
                    raise
            except TimeoutError:
                reason = f"no whole answer within {self.teacher.timeout:g} seconds (teacher.timeout)"
            except (httpx.HTTPError, LookupError, TypeError, ValueError, AttributeError) as error:
                reason = f"{type(error).__name__}: {str(error) or 'no answer'}".splitlines()[0]
            if attempt + 1 < tries:
                pause = min(0.5 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.5)  # noqa: S311
                await asyncio.sleep(pause)
        if answered:
            raise _UnusableAnswerError(f"an answer of another shape ({reason})")
        raise RemoteError(f"{self.teacher.url}: failed {tries} times; last error: {reason}")

    async def _served_model(self) -> str:
        """The name under which the server has the teacher."""

        def understand(answer: Any) -> list[tuple[str, str]]:
            return [(str(model["id"]), str(model.get("root"))) for model in answer["data"]]

        models = await self._call("GET", "/v1/models", understand)
        wanted = self.teacher.served_model_name or self.teacher.model
        for name, root in models:
            if wanted in (name, root):
                return str(name)
        raise InputError(
            f"teacher.model: {self.teacher.url} serves {', '.join(name for name, _ in models)}, not {wanted}; if it is the same "
            "model under another name, give teacher.served_model_name"
        )

    async def _set_targets(self, seed: int) -> None:
        """Tell the server's workers which tokens to return, so that samples are drawn inside, as the engine vllm does.

        A server without the extension always returns the most likely tokens; one that has it may have been told otherwise.

        Raises:
            InputError: samples are wanted, and the server was not started for it.
        """
        arguments = [self.kept.stored.name, str(self.kept.kept), str(seed)]
        body: dict[str, Any] = {"method": "sample_targets", "args": arguments}
        if self.known_ids is not None:
            body["kwargs"] = {"known_ids": str(self.known_ids)}
        try:
            await self._call("POST", "/collective_rpc", lambda answer: answer["results"], body, tries=4)
        except (InputError, RemoteError, _UnusableAnswerError):
            if self.kept.stored.most_likely:
                return
            raise InputError(
                f"targets.kind {self.kept.kind}: {self.teacher.url} cannot draw samples. Start it with "
                f"`VLLM_SERVER_DEV_MODE=1 vllm serve {self.teacher.model} --max-logprobs {self.kept.kept} "
                f"--worker-extension-cls {_EXTENSION}`, where nobody else uses it, or set targets.kind to topk"
            ) from None


def _check_logprobs(values: Iterable[Any]) -> None:
    for value in values:
        if type(value) not in (int, float) or not -math.inf < value <= _ROUNDING:
            raise _UnusableAnswerError("log-probabilities that are none")


def _message(response: httpx.Response) -> str:
    """The server's own words."""
    try:
        content = response.json()
        error = content.get("error", content)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (json.JSONDecodeError, AttributeError):
        return f"{response.status_code} {response.text[:200]}"
