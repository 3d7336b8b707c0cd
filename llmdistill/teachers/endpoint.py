"""Shared parts of the engines for endpoints that bill per token: limits, spending, and reading an answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from llmdistill.errors import InputError, UnusableError
from llmdistill.models.loading import end_of_turn
from llmdistill.teachers import Completion, EngineSpec, Request, Usage, longest_answer, most_billed
from llmdistill.teachers.answers import FinalAnswerError, UnusableAnswerError, message, reading
from llmdistill.teachers.batches import Batches
from llmdistill.teachers.limits import Limits
from llmdistill.teachers.remote import RemoteEngine, Response, given_up, key_of

Body = dict[str, Any]
_PAID_TRIES = 1  # attempts at an unusable answer: each is billed
NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached")  # a 429 that waiting does not resolve


class EndpointEngine(RemoteEngine):
    """Sends conversations within the limits that the endpoint and other workers leave."""

    batches: Batches | None = None
    """Class that makes shards by batches, with `teacher.batch`."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec.teacher)
        assert spec.template is not None
        self.sampling, self.kept, self.template = spec.sampling, spec.kept, spec.template
        self.variable = spec.teacher.abilities.key or ""
        self.api_key = key_of(self.variable)
        self.limits = Limits(spec.shared, spec.teacher.price)
        tokenizer = self.template.tokenizer
        end = end_of_turn(tokenizer)
        self.end_id: int = tokenizer.eos_token_id if end is None else end

    def generate(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Continue every request, individually or with one batch per shard."""
        return self.batches.generate(batches) if self.batches else self.answers(batches, self.written)

    def score(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Refuse to score given text; engines that can override this."""
        raise InputError(f"{self.teacher.endpoint} cannot score given text")

    async def written(self, request: Request) -> Completion:
        """The endpoint's completion of a request."""
        raise NotImplementedError

    def unfit(self, request: Request) -> str | None:
        """Why a request is not sent because it would be refused; None if it is sent."""
        return None

    async def paid(
        self, request: Request, send: Callable[[], Awaitable[Response]], read: Callable[[Any], Completion]
    ) -> Completion:
        """One answer with its cost, even if it is unusable.

        Args:
            request: the request.
            send: sends it.
            read: reads the JSON of the answer.
        """
        usage = Usage()

        def understand(answer: Any) -> Completion:
            nonlocal usage
            with reading():
                found = self.billed(request, answer)
                usage += found
                self.limits.spend(found)
                return read(answer)

        async def allowed() -> None:
            while wait := self.limits.pause(len(request.prompt_ids) + longest_answer(self.teacher, self.sampling)):
                await asyncio.sleep(wait)

        try:
            completion = await self.call(send, understand, unusable_tries=_PAID_TRIES, before=allowed, of_a_row=True)
        except UnusableAnswerError as error:
            return given_up(request, str(error), usage)
        return replace(completion, usage=usage)

    def billed(self, request: Request, answer: Any) -> Usage:
        """The tokens that an answer bills; the maximum if it does not report them and they have a price."""
        told = self.usage(answer)
        return told if told.input or self.teacher.price is None else most_billed(request, self.teacher, self.sampling)

    def usage(self, answer: Any) -> Usage:
        """The tokens that an answer reports as billed."""
        raise NotImplementedError

    def completion(self, request: Request, answer: Any) -> Completion:
        """The kept part of an answer.

        Raises:
            UnusableAnswerError: if it is unusable.
        """
        raise NotImplementedError

    def encoded(self, request: Request, text: str, finish_reason: str) -> list[int]:
        """The token ids of an answer that is given as text, including its end token if the model stopped.

        Raises:
            FinalAnswerError: if the chat template refuses it.
        """
        try:
            _, ids = self.template.turn_ids(request.messages or [], {"role": "assistant", "content": text}, request.tools)
        except UnusableError as error:
            raise FinalAnswerError(error.reason) from None
        ends = ids[-1] in self.template.end_ids
        if finish_reason == "stop":
            return ids if ends else [*ids, self.end_id]
        return ids[:-1] if ends else ids

    def refusal(self, response: Response) -> str:
        """Add a likely cause."""
        said = message(response)
        if response.status_code == 401 and not self.api_key:
            return f"{said}; {self.variable} is not set in the environment"
        if response.status_code == 404:
            return f"{said}; check teacher.model and teacher.url, which usually ends in /v1"
        return said

    def after(self, response: Response) -> float | None:
        """Record the limits that it reports."""
        return self.limits.learn(response.headers, response.status_code)

    def is_final(self, response: Response) -> bool:
        """Also true if no money is left."""
        return super().is_final(response) or (response.status_code == 429 and any(name in response.text for name in NO_QUOTA))
