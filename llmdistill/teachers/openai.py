"""A teacher behind any endpoint with OpenAI's API: OpenAI, vLLM, SGLang, llama.cpp, Ollama, OpenRouter and others.

Such endpoints differ in what they return. One request at the start finds out (see `probe`), and whatever the configuration
needs but does not get is refused before anything else is billed. docs/api-teachers.md has the table.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import httpx2
import numpy as np
import openai

from llmdistill.data.alignment import Side
from llmdistill.errors import InputError
from llmdistill.models.token_bytes import token_bytes
from llmdistill.runs.progress import say
from llmdistill.teachers import Completion, EngineSpec, Request, Usage, longest_answer
from llmdistill.teachers.answers import FinalAnswerError, UnusableAnswerError, only_choice
from llmdistill.teachers.endpoint import Body, EndpointEngine
from llmdistill.teachers.openai_batches import OpenAIBatches
from llmdistill.teachers.probe import Gives, one_token, probe
from llmdistill.teachers.remote import Response
from llmdistill.teachers.token_matching import Matched, TokenMatcher, chunks_of, entries_of

_CONNECT_SECONDS = 10.0
# OpenAI's two fields, and other endpoints' names for them.
_REASONS = dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence", "end_turn"), "stop")
_REASONS |= dict.fromkeys(("length", "max_tokens", "model_length"), "length")
_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
# Parameters for which servers of open models use the model's generation configuration or their own defaults if not sent; and
# those that make vLLM name tokens by their ids. They are not sent to endpoints that do not know them; see `probe`.
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}


class OpenAIEngine(EndpointEngine):
    """Takes conversations or token ids; returns text, with tokens, ids and log-probabilities as far as they are available."""

    faults = (httpx2.HTTPError, openai.OpenAIError)

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.client = openai.AsyncOpenAI(
            api_key=self.api_key or "none",  # self-hosted servers need none
            base_url=self.teacher.endpoint,
            max_retries=0,
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
        )
        known = self.teacher.tokenizer is not None
        self.matcher = TokenMatcher(self.template.tokenizer, self.end_id, self.kept) if known else None
        self.side = self._side() if self.kept.stored.of_text else None
        try:
            self.found: Gives = self.wait(probe(self, reads=spec.reads_with is not None))
        except UnusableAnswerError as error:
            raise InputError(f"{self.teacher.endpoint} ({self.teacher.model}) gives {error}") from None
        self.gives = asdict(self.found)
        say("teacher", f"{self.teacher.model} at {self.teacher.endpoint}: {self.found}")
        self.batches = OpenAIBatches(self, spec.shared) if self.teacher.batch else None

    def score(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Score every request's text, as the echo of a prompt."""
        return self.answers(batches, self._read)

    async def written(self, request: Request) -> Completion:
        """The endpoint's completion of a request."""
        body = self.body(request, self.found.top_logprobs, self.found.taken)
        return await self.paid(request, lambda: self.post(body), lambda answer: self.completion(request, answer))

    def body(self, request: Request, top: int | None, taken: Sequence[str]) -> Body:
        """The body of a request.

        Args:
            request: the request.
            top: number of log-probabilities to ask for at each token; None for none.
            taken: the names of `NEUTRAL` and `IDS` that the endpoint knows.
        """
        sampling = self.sampling
        extra = {**NEUTRAL, **IDS, "seed": request.seed >> 32}  # 31 bits: some endpoints do not accept more
        body: Body = {
            "model": self.teacher.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **{name: value for name, value in extra.items() if name in taken},
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            **({"min_tokens": sampling.min_tokens} if sampling.min_tokens else {}),
        }
        if sampling.json_schema is not None:
            schema = {"name": "answer", "schema": sampling.json_schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.teacher.api == "completions":
            body |= {"prompt": list(request.prompt_ids), **({} if top is None else {"logprobs": top})}
        else:
            body |= {"messages": list(request.messages or []), **({"tools": list(request.tools)} if request.tools else {})}
            if self.teacher.template_args and "return_token_ids" in taken:
                body["chat_template_kwargs"] = self.teacher.template_args
            if top is not None:
                body |= {"logprobs": True, **({"top_logprobs": top} if top else {})}
        return {name: value for name, value in {**body, **self.teacher.request_args}.items() if value is not None}

    async def post(self, body: Body) -> Response:
        """The response to a body, whatever its status."""
        try:
            response: Response = await self.client.post(_PATHS[self.teacher.api], body=body, cast_to=httpx2.Response)
            return response
        except openai.APIStatusError as error:
            return error.response

    def usage(self, answer: Any) -> Usage:
        """Token usage from the answer; None if it does not report it."""
        told = answer.get("usage") or {}
        cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Usage(int(told.get("prompt_tokens") or 0), int(told.get("completion_tokens") or 0), int(cached))

    def completion(self, request: Request, answer: Any) -> Completion:
        """The kept part of an answer.

        Raises:
            UnusableAnswerError: if it is unusable.
        """
        choice = only_choice(answer)
        text, reason = self._text(choice), _REASONS[choice["finish_reason"]]
        matched = self._matched(choice, text, reason == "stop")
        if matched is None:
            ids = np.array(self.encoded(request, text, reason), dtype=np.int64)
            entries = entries_of(choice["logprobs"]) if self.side else []
            chunks = chunks_of(entries, text, self.side, ids, reason == "stop") if self.side else None
            matched = Matched(ids, np.full(len(ids), np.nan, dtype=np.float32), chunks)
        elif len(matched.ids) > 2 * longest_answer(self.teacher, self.sampling) + 1:
            raise FinalAnswerError("more tokens than requested")
        if not len(matched.ids):
            raise FinalAnswerError("no tokens")
        trace = _trace_apart(choice)
        return Completion(request.index, matched.ids, reason, matched.logprobs, matched.targets, trace=trace)

    def _side(self) -> Side:
        """How the tokens read that text is stored in."""
        ends = frozenset([*self.template.end_ids, self.end_id])
        return Side(token_bytes(self.template.tokenizer, "student.model"), np.empty(0), ends)

    def _text(self, choice: Any) -> str:
        """The text of an answer.

        Raises:
            FinalAnswerError: if there is none, with the reason.
        """
        message, reason = choice.get("message") or {}, choice["finish_reason"]
        if message.get("refusal"):
            raise FinalAnswerError("a refusal (message.refusal)")
        if reason == "content_filter":
            raise FinalAnswerError("an answer truncated by the content filter (finish_reason content_filter)")
        if message.get("tool_calls"):
            raise FinalAnswerError("a tool call")
        if reason not in _REASONS:
            raise FinalAnswerError("a finish reason other than stop or length")
        if _trace_apart(choice) and self.sampling.thinking != "removed":
            raise FinalAnswerError("a reasoning trace separate from the answer (set generate.thinking to removed)")
        text = choice["text"] if self.teacher.api == "completions" else message.get("content")
        if not isinstance(text, str) or not text:
            raise FinalAnswerError("no text")
        return text

    def _matched(self, choice: Any, text: str, stopped: bool) -> Matched | None:
        """The tokens that the endpoint names, in the tokenizer's ids; None if it names none, or the tokenizer is unknown."""
        if self.matcher is None:
            return None
        if not self.found.logprobs or not (self.found.token_ids or self.found.bytes):
            return None
        matched = self.matcher.match(entries_of(choice["logprobs"]), stopped)
        if self.template.decode(matched.ids).strip() != text.strip():
            if _trace_apart(choice):
                return None  # they include the trace, on which all others depend
            raise FinalAnswerError("tokens that do not match the text of the answer")
        return matched

    async def _read(self, request: Request) -> Completion:
        """Score by the echo of a prompt; the extra token that the endpoint insists on generating is dropped."""
        start, ids = len(request.prompt_ids), list(request.completion_ids)
        asked = Request(request.index, [*request.prompt_ids, *ids], request.seed)
        body = one_token(self.body(asked, self.found.top_logprobs, self.found.taken)) | {"echo": True, "temperature": 0}

        def read(answer: Any) -> Completion:
            assert self.matcher is not None
            entries = entries_of(only_choice(answer)["logprobs"])[start : start + len(ids)]
            matched = self.matcher.match(entries, stopped=False)
            if matched.ids.tolist() != ids:
                raise UnusableAnswerError("an echo of different tokens than those sent")
            reason = "stop" if ids[-1] in self.template.end_ids else "length"
            return Completion(request.index, matched.ids, reason, matched.logprobs, matched.targets)

        return await self.paid(request, lambda: self.post(body), read)


def _trace_apart(choice: Any) -> str | None:
    """The reasoning trace that an endpoint returns separately from the answer, if any."""
    message = choice.get("message") or {}
    return message.get("reasoning_content") or message.get("reasoning") or None
