"""What engines behind an address share: requests in an event loop, tried again while the fault is not ours.

A request that fails by the server's or the network's fault is sent again, after a while; the row's seed goes with it, so
it costs time and no row. What the server refuses for good (4xx) ends the stage with the server's own words. A row whose prompt it
does not take is given up with the reason (`Completion.failed`), and so is one whose answer cannot be right, again and again.
"""

import asyncio
import os
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol, TypeVar

import httpx
import numpy as np

from llmdistill.config import Teacher
from llmdistill.errors import InputError, RemoteError
from llmdistill.teachers import Completion, Engine, Request, Usage
from llmdistill.teachers.answers import FinalAnswerError, UnusableAnswerError, is_error, message, refused_prompt

TRIES = 9
UNUSABLE_TRIES = 3  # of an answer that cannot be right
LONGEST_PAUSE = 60.0  # seconds; the pauses double from half a second, so that a server may take two minutes to come back
AGAIN = {408, 409, 425, 429}  # and all 5xx

T = TypeVar("T")


class Response(Protocol):
    """What the clients' responses have in common."""

    @property
    def status_code(self) -> int:
        """Of HTTP."""
        ...

    @property
    def headers(self) -> Any:
        """By their names, in any case."""
        ...

    @property
    def text(self) -> str:
        """The body."""
        ...

    def json(self) -> Any:
        """The body as JSON."""
        ...


class RemoteEngine(Engine):
    """Sends `teacher.concurrency` requests at a time; every request has its own answer, so they come back in any order.

    The requests run in an event loop of a thread of their own, where they can be ended at any moment.
    """

    faults: tuple[type[Exception], ...] = (httpx.HTTPError,)
    """What the client raises when a request has no answer."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._places = asyncio.Semaphore(teacher.concurrency)
        self._answered = 0  # requests so far
        self.tokens = 0

    def close(self) -> None:
        """Nothing is held here."""

    def start(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run something in the event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run something in the event loop to its end."""
        future = self.start(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()

    def answers(
        self, batches: Iterable[Sequence[Request]], answer: Callable[[Request], Coroutine[Any, Any, Completion]]
    ) -> Iterator[Completion]:
        """The answers to all requests, each as soon as it is there."""
        waiting = (request for batch in batches for request in batch)
        running: set[Future[Completion]] = set()
        try:
            while True:
                while len(running) < 2 * self.teacher.concurrency and (request := next(waiting, None)) is not None:
                    running.add(self.start(self._in_turn(answer, request)))
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
            except UnusableAnswerError as error:
                return given_up(request, str(error))

    def after(self, response: Response) -> float | None:
        """Called with every response; the seconds that the server wants the next try to wait, if it says so."""
        return None

    def refusal(self, response: Response) -> str:
        """What the user is told of a response that would be the same again: the server's own words."""
        return message(response)

    def is_final(self, response: Response) -> bool:
        """Whether a response with an error status would be the same again."""
        return 400 <= response.status_code < 500 and response.status_code not in AGAIN

    async def call(
        self,
        send: Callable[[], Awaitable[Response]],
        understand: Callable[[Any], T],
        tries: int | None = None,
        unusable_tries: int | None = None,
        before: Callable[[], Awaitable[None]] | None = None,
        of_a_row: bool = False,
    ) -> T:
        """One call, again and again while the fault is the server's or the network's.

        Args:
            send: sends the request.
            understand: what is made of the JSON of the answer.
            tries: until it is given up.
            unusable_tries: of them until an answer that cannot be right is given up.
            before: waits, before every try, until it may be sent.
            of_a_row: whether it asks for the answer to a prompt of the user's, which may be refused for itself.

        Raises:
            InputError: the server refuses it.
            RemoteError: it still fails after the last try.
            UnusableAnswerError: the server answers, but what it says cannot be right.
        """
        tries = tries or TRIES
        url, unusable, answered, attempt, others = self.teacher.endpoint, 0, False, 0, self._answered
        faults: tuple[type[Exception], ...] = (*self.faults, ValueError)
        while attempt < tries:
            answered, asked = False, None
            attempt += 1
            try:
                if before:
                    await before()
                async with asyncio.timeout(self.teacher.timeout):  # of the whole answer, which may come byte by byte
                    response = await send()
                asked = self.after(response)
                if of_a_row and (why := refused_prompt(response)):
                    raise FinalAnswerError(why)
                if self.is_final(response):
                    raise InputError(f"{url} refuses: {self.refusal(response)}")
                if response.status_code >= 400:
                    raise ValueError(f"{response.status_code} {message(response)}")
                answer = response.json()
                if is_error(answer):
                    raise ValueError(message(response))
                answered = True
                self._answered += 1
                return understand(answer)
            except InputError:
                raise
            except FinalAnswerError:
                raise
            except UnusableAnswerError:
                unusable += 1
                if unusable == min(unusable_tries or UNUSABLE_TRIES, tries):
                    raise
            except TimeoutError:
                reason = f"no whole answer within {self.teacher.timeout:g} seconds (teacher.timeout)"
            except Exception as error:
                if not isinstance(error, (*faults, *((LookupError, TypeError, AttributeError) if answered else ()))):
                    raise
                reason = f"{type(error).__name__}: {str(error) or 'no answer'}".splitlines()[0]
            if asked is not None and self._answered > others:
                attempt -= 1  # the server only wants fewer requests at a time, and answers those
            others = self._answered
            if attempt < tries:
                await asyncio.sleep((asked or 0) + pause_after(attempt))
        if answered:
            raise UnusableAnswerError(f"an answer of another shape ({reason})")
        raise RemoteError(f"{url}: failed {tries} times; last error: {reason}")


def pause_after(attempt: int) -> float:
    """The seconds to wait after so many tries that failed, not the same for all who wait."""
    return min(0.5 * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.5)  # noqa: S311


def given_up(request: Request, reason: str, usage: Usage | None = None) -> Completion:
    """What stands for the answer to a request that has none of use."""
    nothing = np.empty(0, dtype=np.int64)
    return Completion(request.index, nothing, "failed", np.empty(0, dtype=np.float32), None, failed=reason, usage=usage)


def key_of(variable: str) -> str:
    """An API key from the environment; empty if there is none.

    Raises:
        InputError: it cannot be sent.
    """
    key = os.environ.get(variable, "").strip()  # a secret that is mounted as a file ends in a line break
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{variable} has characters that a header cannot have")
    return key
