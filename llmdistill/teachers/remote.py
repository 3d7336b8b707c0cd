"""Shared parts of engines behind an address: requests in an event loop, retried while the fault is not ours.

A request that fails because of the server or the network is sent again after a while, with the row's seed, so it costs time
but no row. A permanent refusal (4xx) ends the stage with the server's own message. A row whose prompt the server does not
accept is given up with the reason (`Completion.failed`), and so is one whose answer is repeatedly unusable.
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
UNUSABLE_TRIES = 3  # attempts at an unusable answer
LONGEST_PAUSE = 60.0  # seconds; pauses double from half a second, so that a server may take two minutes to recover
AGAIN = {408, 409, 425, 429}  # and all 5xx

T = TypeVar("T")


class Response(Protocol):
    """The common interface of the clients' responses."""

    @property
    def status_code(self) -> int:
        """HTTP status code."""
        ...

    @property
    def headers(self) -> Any:
        """Headers, by case-insensitive name."""
        ...

    @property
    def text(self) -> str:
        """The body."""
        ...

    def json(self) -> Any:
        """The body as JSON."""
        ...


class RemoteEngine(Engine):
    """Sends `teacher.concurrency` requests at a time; answers come in any order.

    The requests run in an event loop in a separate thread, where they can be cancelled at any time.
    """

    faults: tuple[type[Exception], ...] = (httpx.HTTPError,)
    """Exceptions that the client raises if a request has no answer."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._places = asyncio.Semaphore(teacher.concurrency)
        self._answered = 0  # requests answered so far
        self.tokens = 0

    def close(self) -> None:
        """Nothing is held here."""

    def start(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run something in the event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run something in the event loop until it finishes."""
        future = self.start(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()

    def answers(
        self, batches: Iterable[Sequence[Request]], answer: Callable[[Request], Coroutine[Any, Any, Completion]]
    ) -> Iterator[Completion]:
        """The answers to all requests, each as soon as it is available."""
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
        """The answer to a request, or the reason why there is no usable one."""
        async with self._places:
            try:
                return await answer(request)
            except UnusableAnswerError as error:
                return given_up(request, str(error))

    def after(self, response: Response) -> float | None:
        """Called with every response; returns the seconds that the server wants to wait before the next attempt, if any."""
        return None

    def refusal(self, response: Response) -> str:
        """What the user is told about a permanent error: the server's own message."""
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
        """One call, retried while the fault is the server's or the network's.

        Args:
            send: sends the request.
            understand: reads the JSON of the answer.
            tries: number of attempts.
            unusable_tries: number of them after which an unusable answer is given up.
            before: waits, before every attempt, until it may be sent.
            of_a_row: whether it is the prompt of a row, which may be refused by itself.

        Raises:
            InputError: if the server refuses it.
            RemoteError: if the last attempt fails.
            UnusableAnswerError: if the server's answer is unusable.
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
                async with asyncio.timeout(self.teacher.timeout):  # for the complete answer, which may come byte by byte
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
                reason = f"no complete answer within {self.teacher.timeout:g} seconds (teacher.timeout)"
            except Exception as error:
                if not isinstance(error, (*faults, *((LookupError, TypeError, AttributeError) if answered else ()))):
                    raise
                reason = f"{type(error).__name__}: {str(error) or 'no answer'}".splitlines()[0]
            if asked is not None and self._answered > others:
                attempt -= 1  # the server only wants fewer concurrent requests, and answers those
            others = self._answered
            if attempt < tries:
                await asyncio.sleep((asked or 0) + pause_after(attempt))
        if answered:
            raise UnusableAnswerError(f"an answer in an unexpected format ({reason})")
        raise RemoteError(f"{url}: failed {tries} times; last error: {reason}")


def pause_after(attempt: int) -> float:
    """Seconds to wait after this many failed attempts, with jitter."""
    return min(0.5 * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.5)  # noqa: S311


def given_up(request: Request, reason: str, usage: Usage | None = None) -> Completion:
    """The completion for a request without a usable answer."""
    nothing = np.empty(0, dtype=np.int64)
    return Completion(request.index, nothing, "failed", np.empty(0, dtype=np.float32), None, failed=reason, usage=usage)


def key_of(variable: str) -> str:
    """An API key from the environment; empty if there is none.

    Raises:
        InputError: if it cannot be sent.
    """
    key = os.environ.get(variable, "").strip()  # a secret mounted as a file ends with a newline
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{variable} contains characters that are not allowed in a header")
    return key
