"""Batches: a shard is one batch, whose answers cost half and come within a day.

Nothing is paid for twice. Before a batch is created, its random name is written to disk, and the batch carries it, so that a
worker that was killed in between can find it again. The results of a finished batch can be read any number of times. A claim
also holds the hash of the requests, so that answers to other requests are never used.
"""

import asyncio
import hashlib
import json
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmdistill.errors import InputError, RemoteError
from llmdistill.runs import lock
from llmdistill.runs.files import read_json, write_json
from llmdistill.runs.progress import say
from llmdistill.teachers import Completion, Request, Usage, remote
from llmdistill.teachers.answers import UnusableAnswerError, reading
from llmdistill.teachers.remote import given_up

if TYPE_CHECKING:
    from llmdistill.teachers.endpoint import EndpointEngine

POLL = 30.0  # seconds between polls of a batch
SETTLES = 60.0  # seconds after which a created batch appears in the list
_WAITING = 8  # maximum number of unfinished batches of a worker
_TRIES = 3  # batches for the rows of one shard; those without an answer are requested again

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """The record of a batch on disk.

    Attributes:
        file: path of the record.
        asked: hash of the batch's requests.
        name: random name that the batch carries.
        since: time at which its creation started.
        id: the API's id of the batch; None if not known yet.
    """

    file: Path
    asked: str
    name: str
    since: float
    id: str | None

    def write(self) -> None:
        """Write it atomically."""
        write_json(self.file, {"asked": self.asked, "name": self.name, "since": self.since, "id": self.id})


@dataclass(frozen=True)
class Result:
    """The result of a request in a batch.

    Attributes:
        index: index of the request, as written in the batch.
        answer: body of the answer; None if there is none.
        reason: why there is none.
    """

    index: str
    answer: Any
    reason: str = ""


class RefusedBatchError(Exception):
    """The endpoint accepted a batch and then refused it as a whole, unbilled.

    Attributes:
        crowded: whether because of existing batches.
    """

    def __init__(self, said: str, crowded: bool) -> None:
        super().__init__(said)
        self.crowded = crowded


class Batches:
    """Makes shards by batches; how an API creates, lists and reads them is in subclasses.

    Args:
        engine: the engine whose client, bodies and checks are used.
        shared: the file next to the dataset; the claims are kept beside it.
    """

    def __init__(self, engine: "EndpointEngine", shared: Path | None) -> None:
        if shared is None:
            raise InputError("teacher.batch is for `generate`: other stages wait for every answer")
        self.engine = engine
        self.directory = shared.with_suffix(".batches")
        self._turn = asyncio.Lock()

    def line(self, request: Request) -> bytes:
        """A request as a canonical line of JSON."""
        raise NotImplementedError

    async def create(self, claim: Claim, requests: Sequence[Request]) -> str:
        """Try once to create a batch that carries the claim's name; returns the API's id."""
        raise NotImplementedError

    async def find(self, claim: Claim, requests: Sequence[Request]) -> tuple[str | None, bool]:
        """The API's id of the batch that carries the claim's name.

        Returns:
            The id, or None if no batch is known to carry it; and whether a listed one may still turn out to.
        """
        raise NotImplementedError

    async def ended(self, claim: Claim) -> Any:
        """The batch once it is complete, else None.

        Raises:
            RefusedBatchError: if the endpoint has refused it.
        """
        raise NotImplementedError

    async def results(self, claim: Claim, batch: Any) -> list[Result]:
        """The results of a finished batch, in any order."""
        raise NotImplementedError

    def generate(self, shards: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """The answers of each shard, as soon as its batch has ended; several shards wait at a time."""
        running: deque[Future[list[Completion]]] = deque()
        waiting = iter(shards)
        more = True
        try:
            while more or running:
                while more and len(running) < _WAITING:
                    requests = next(waiting, None)
                    more = requests is not None
                    if requests:
                        running.append(self.engine.start(self._shard(list(requests))))
                if not running:
                    return
                for completion in running.popleft().result():
                    self.engine.tokens += len(completion.ids)
                    yield completion
        finally:
            for future in running:
                future.cancel()

    async def _shard(self, requests: list[Request]) -> list[Completion]:
        """All rows of a shard; those that a batch leaves without an answer go into another one."""
        found = {request.index: given_up(request, why) for request in requests if (why := self.engine.unfit(request))}
        reasons: dict[int, str] = {}
        attempt = tries = 0
        while (left := [request for request in requests if request.index not in found]) and tries < _TRIES:
            attempt += 1
            claim, batch, is_new = await self._ended(self.directory / f"{requests[0].index:08d}-{attempt}.json", left)
            tries += is_new  # those of earlier processes are read again, at no cost
            by_index = {str(request.index): request for request in left}
            for result in await self.results(claim, batch):
                request = by_index.get(result.index)
                if request is None or request.index in found:
                    continue
                if result.answer is None:
                    reasons[request.index] = result.reason
                else:
                    found[request.index] = self._completion(request, result.answer)
        return [found.get(request.index) or given_up(request, _reason(reasons, request)) for request in requests]

    async def _ended(self, file: Path, requests: list[Request]) -> tuple[Claim, Any, bool]:
        """A complete batch, its claim, and whether it was created here; delayed if there are too many batches."""
        told = is_new = False
        while True:
            claim, fresh = await self._claim(file, requests)
            is_new |= fresh
            try:
                if (batch := await self.ended(claim)) is not None:
                    return claim, batch, is_new
            except RefusedBatchError as error:
                file.unlink()  # nothing of it is billed, and the next attempt may succeed
                if not error.crowded:
                    raise InputError(str(error)) from None
                if not told:
                    say("teacher", f"{error}; retrying until others have ended")
                told = True
            await asyncio.sleep(POLL)

    async def _claim(self, file: Path, requests: list[Request]) -> tuple[Claim, bool]:
        """The claim of an existing batch, a found one or a new one, and whether it is new."""
        digest = hashlib.sha256(b"".join(self.line(request) for request in requests)).hexdigest()
        self.directory.mkdir(parents=True, exist_ok=True)
        async with self._turn:
            with lock.in_turn(file):
                held = read_json(file)
                fresh = held is None or held.get("asked") != digest
                if fresh:
                    held = {"asked": digest, "name": secrets.token_hex(16), "since": time.time(), "id": None}
                claim = Claim(file, **held)
                if fresh:
                    claim.write()
                if claim.id is None:
                    found = None if fresh else await self._found(claim, requests)
                    claim = replace(claim, id=found or await self._created(claim, requests))
                    claim.write()
        return claim, fresh

    async def _created(self, claim: Claim, requests: list[Request]) -> str:
        """The API's id of a new batch.

        Creation is not simply retried: only the list of all batches shows whether the first attempt arrived.
        """
        url, reason = self.engine.teacher.endpoint, ""
        faults: tuple[type[Exception], ...] = (*self.engine.faults, TimeoutError)
        for _ in range(remote.TRIES):
            try:
                return await self.create(claim, requests)
            except faults as error:
                self._check(error)
                reason = _said(error)
            if found := await self._found(replace(claim, since=time.time()), requests):
                return found
        raise RemoteError(f"{url}: failed {remote.TRIES} times; last error: {reason}")

    async def _found(self, claim: Claim, requests: list[Request]) -> str | None:
        """The API's id of a claim's batch, if it was created; searched for until that is certain."""
        told = False
        while True:
            late = time.time() > claim.since + SETTLES
            found, open_question = await self.find(claim, requests)
            if found or (late and not open_question):
                return found
            if open_question and not told:
                say(
                    "teacher",
                    f"waiting for a batch to end, to see whether it belongs to {claim.file}, so that none is paid for twice",
                )
                told = True
            await asyncio.sleep(min(POLL, SETTLES / 4))

    def _completion(self, request: Request, answer: Any) -> Completion:
        usage = Usage()
        try:
            with reading():
                usage = self.engine.billed(request, answer)
                made = self.engine.completion(request, answer)
        except UnusableAnswerError as error:
            return given_up(request, str(error), usage)
        return replace(made, usage=usage)

    async def once(self, call: Awaitable[T]) -> T:
        """The answer to a call that may take a long time.

        Raises:
            TimeoutError: if it takes too long.
        """
        async with asyncio.timeout(self.engine.teacher.timeout):
            return await call

    async def patient(self, call: Callable[[], Awaitable[T]]) -> T:
        """An unbilled call, retried while the fault is the endpoint's or the network's."""
        reason = ""
        faults: tuple[type[Exception], ...] = (*self.engine.faults, ValueError, TimeoutError)
        for attempt in range(1, remote.TRIES + 1):
            try:
                return await self.once(call())
            except faults as error:
                asked = self._check(error)
                reason = _said(error)
            await asyncio.sleep((asked or 0) + remote.pause_after(attempt))
        raise RemoteError(f"{self.engine.teacher.endpoint}: failed {remote.TRIES} times; last error: {reason}")

    def _check(self, error: Exception) -> float | None:
        """Refuse a response that would be the same again; returns the seconds to wait before a retry."""
        response = getattr(error, "response", None)
        if response is None:
            return None
        if self.engine.is_final(response):
            raise InputError(f"{self.engine.teacher.endpoint} refuses: {self.engine.refusal(response)}") from None
        return self.engine.after(response)


def lines(text: str) -> list[Any]:
    """The objects in a text with one per line.

    Raises:
        ValueError: if it has anything else, such as a line cut off by a network error.
    """
    found = [json.loads(line) for line in text.split("\n") if line]
    if not all(isinstance(entry, dict) for entry in found):
        raise ValueError("a line that is not a JSON object")
    return found


def _said(error: Exception) -> str:
    return "no complete answer in time (teacher.timeout)" if isinstance(error, TimeoutError) else str(error)


def _reason(reasons: dict[int, str], request: Request) -> str:
    return reasons.get(request.index, "no answer in the batch's results")
