"""A teacher behind Anthropic's API: takes conversations and returns text, without log-probabilities."""

from typing import Any

import anthropic
import httpx2
import numpy as np

from llmdistill.runs.progress import say
from llmdistill.teachers import Completion, EngineSpec, Request, Usage
from llmdistill.teachers.answers import FinalAnswerError
from llmdistill.teachers.anthropic_batches import AnthropicBatches
from llmdistill.teachers.endpoint import Body, EndpointEngine
from llmdistill.teachers.remote import Response, given_up

_CONNECT_SECONDS = 10.0
_REASONS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}
_REFUSED = {"refusal": "a refusal (stop_reason refusal)", "tool_use": "a tool call"}


class AnthropicEngine(EndpointEngine):
    """Its text is stored in the student's tokens."""

    faults = (httpx2.HTTPError, anthropic.AnthropicError)

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.client = anthropic.AsyncAnthropic(
            api_key=self.api_key or "none",
            base_url=self.teacher.endpoint,
            max_retries=0,
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
        )
        self.gives = {"logprobs": False}
        say("teacher", f"{self.teacher.model} at {self.teacher.endpoint}: returns text, no log-probabilities")
        self.batches = AnthropicBatches(self, spec.shared) if self.teacher.batch else None

    async def written(self, request: Request) -> Completion:
        """The endpoint's completion of a request."""
        if why := self.unfit(request):
            return given_up(request, why)
        body = self.body(request)
        return await self.paid(request, lambda: self._post(body), lambda answer: self.completion(request, answer))

    def unfit(self, request: Request) -> str | None:
        """Refuse tools, whose format differs there."""
        with_tools = request.tools or any(m["role"] == "tool" or m.get("tool_calls") for m in request.messages or [])
        return "a prompt with tools, which engine anthropic does not support" if with_tools else None

    def body(self, request: Request) -> Body:
        """The body of a request."""
        sampling, messages = self.sampling, request.messages or []
        system = "\n\n".join(str(message["content"]) for message in messages if message["role"] == "system")
        body: Body = {
            "model": self.teacher.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            **({"top_p": sampling.top_p} if sampling.top_p < 1 else {}),
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            **({"system": system} if system else {}),
            "messages": [message for message in messages if message["role"] != "system"],
        }
        return {name: value for name, value in {**body, **self.teacher.request_args}.items() if value is not None}

    async def _post(self, body: Body) -> Response:
        try:
            response: Response = await self.client.post("/v1/messages", body=body, cast_to=httpx2.Response)
            return response
        except anthropic.APIStatusError as error:
            return error.response

    def usage(self, answer: Any) -> Usage:
        """Token usage from the answer; there, tokens read from or written to the cache are not counted as input."""
        told = answer.get("usage") or {}
        read, written = (int(told.get(f"cache_{name}_input_tokens") or 0) for name in ("read", "creation"))
        return Usage(int(told.get("input_tokens") or 0) + read + written, int(told.get("output_tokens") or 0), read)

    def completion(self, request: Request, answer: Any) -> Completion:
        """The kept part of an answer.

        Raises:
            UnusableAnswerError: if it is unusable.
        """
        reason = answer["stop_reason"]
        if reason not in _REASONS:
            raise FinalAnswerError(_REFUSED.get(reason, "a finish reason other than end_turn or max_tokens"))
        traces = [part.get("thinking", "") for part in answer["content"] if part["type"] in ("thinking", "redacted_thinking")]
        trace = "".join(traces) if traces else None
        if trace is not None and self.sampling.thinking != "removed":
            raise FinalAnswerError("a reasoning trace separate from the answer (set generate.thinking to removed)")
        text = "".join(part["text"] for part in answer["content"] if part["type"] == "text")
        if not text:
            raise FinalAnswerError("no text")
        ids = np.array(self.encoded(request, text, _REASONS[reason]), dtype=np.int64)
        unknown = np.full(len(ids), np.nan, dtype=np.float32)
        return Completion(request.index, ids, _REASONS[reason], unknown, None, trace=trace)
