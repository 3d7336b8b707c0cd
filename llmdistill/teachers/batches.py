"""Batches: a shard is one batch, whose answers cost half and come within a day.

What is paid is paid once. Before a batch is created, its random name is on the disk, and the batch carries it: a worker that was
killed in between finds the batch again among all that are there. The results of a finished batch can be read as often as one
likes. A claim also holds the hash of what was asked, so that answers to other questions are never taken.
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
from llmdistill.runs import lock, record
from llmdistill.runs.progress import say
from llmdistill.teachers import Completion, Request, Usage, remote
from llmdistill.teachers.answers import UnusableAnswerError, reading
from llmdistill.teachers.remote import given_up

if TYPE_CHECKING:
    from llmdistill.teachers.endpoint import EndpointEngine

POLL = 30.0  # seconds between two looks at a batch
SETTLES = 60.0  # seconds after which a batch that was created stands in the list of all
_WAITING = 8  # batches of one worker that are unfinished at a time
_TRIES = 3  # batches for the rows of one shard: those without an answer are asked for again

T = TypeVar("T")


@dataclass(frozen=True)
class Claim:
    """What is on the disk of a batch.

    Attributes:
        file: where it is.
        asked: the hash of what the batch asks.
        name: a random one, which the batch carries.
        since: the time at which it was to be created.
        id: what the API calls the batch; None while that is not known.
    """

    file: Path
    asked: str
    name: str
    since: float
    id: str | None

    def write(self) -> None:
        """So that it is there as a whole or not at all."""
        record.write_json(self.file, {"asked": self.asked, "name": self.name, "since": self.since, "id": self.id})


@dataclass(frozen=True)
class Result:
    """What a batch has for a request.

    Attributes:
        index: of the request, as the batch spells it.
        answer: the body of the answer; None if there is none.
        reason: why there is none.
    """

    index: str
    answer: Any
    reason: str = ""


class RefusedBatchError(Exception):
    """The endpoint has taken a batch and then refused it as a whole, unbilled.

    Attributes:
        crowded: whether that is for the batches that are there already.
    """

    def __init__(self, said: str, crowded: bool) -> None:
        super().__init__(said)
        self.crowded = crowded


class Batches:
    """Makes shards by batches; how an API creates, lists and reads them is in a class of its own.

    Args:
        engine: whose client, bodies and checks are used.
        shared: the file beside the dataset, beside which the claims are kept.
    """

    def __init__(self, engine: "EndpointEngine", shared: Path | None) -> None:
        if shared is None:
            raise InputError("teacher.batch is for `generate`: other stages wait for every answer")
        self.engine = engine
        self.directory = shared.with_suffix(".batches")
        self._turn = asyncio.Lock()

    def line(self, request: Request) -> bytes:
        """What a request asks, as a line of JSON that is always the same."""
        raise NotImplementedError

    async def create(self, claim: Claim, requests: Sequence[Request]) -> str:
        """Try once to create a batch that carries the claim's name; what the API calls it."""
        raise NotImplementedError

    async def find(self, claim: Claim, requests: Sequence[Request]) -> tuple[str | None, bool]:
        """What the API calls the batch that carries the claim's name.

        Returns:
            None if no batch is known to carry it; and whether one that is listed may yet turn out to.
        """
        raise NotImplementedError

    async def ended(self, claim: Claim) -> Any:
        """The batch if nothing more comes, else None.

        Raises:
            RefusedBatchError: the endpoint has not begun with it.
        """
        raise NotImplementedError

    async def results(self, claim: Claim, batch: Any) -> list[Result]:
        """What a batch that has ended has for its requests, in any order."""
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
            tries += is_new  # those of earlier processes are read once more, and cost nothing
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
        """A batch that nothing more comes of, its claim, and whether it was created here, later if there are too many now."""
        told = is_new = False
        while True:
            claim, fresh = await self._claim(file, requests)
            is_new |= fresh
            try:
                if (batch := await self.ended(claim)) is not None:
                    return claim, batch, is_new
            except RefusedBatchError as error:
                file.unlink()  # nothing of it is billed, and the next try may be taken
                if not error.crowded:
                    raise InputError(str(error)) from None
                if not told:
                    say("teacher", f"{error}; it is asked for again until others have ended")
                told = True
            await asyncio.sleep(POLL)

    async def _claim(self, file: Path, requests: list[Request]) -> tuple[Claim, bool]:
        """The claim of a batch that is there, a found one or a new one, and whether it is new."""
        digest = hashlib.sha256(b"".join(self.line(request) for request in requests)).hexdigest()
        self.directory.mkdir(parents=True, exist_ok=True)
        async with self._turn:
            with lock.in_turn(file):
                held = record.read_json(file)
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
        """What the API calls a new batch.

        Creating is not tried again by itself: whether the first try was heard is known by the list of all batches alone.
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
        """What the API calls the batch of a claim, if it was created; looked for until that is certain."""
        told = False
        while True:
            late = time.time() > claim.since + SETTLES
            found, open_question = await self.find(claim, requests)
            if found or (late and not open_question):
                return found
            if open_question and not told:
                say(
                    "teacher",
                    f"waiting for a batch to end, to see whether it is that of {claim.file}, so that none is paid twice",
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
        """The answer to a call, which may take as long as any.

        Raises:
            TimeoutError: it takes longer.
        """
        async with asyncio.timeout(self.engine.teacher.timeout):
            return await call

    async def patient(self, call: Callable[[], Awaitable[T]]) -> T:
        """A call that costs nothing, again and again while the fault is the endpoint's or the network's."""
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
        """Refuse a response that would be the same again; the seconds that another wants the next try to wait."""
        response = getattr(error, "response", None)
        if response is None:
            return None
        if self.engine.is_final(response):
            raise InputError(f"{self.engine.teacher.endpoint} refuses: {self.engine.refusal(response)}") from None
        return self.engine.after(response)


def lines(text: str) -> list[Any]:
    """The objects in a text that has one a line.

    Raises:
        ValueError: it has something else, such as a line that a fault of the network has cut off.
    """
    found = [json.loads(line) for line in text.split("\n") if line]
    if not all(isinstance(entry, dict) for entry in found):
        raise ValueError("a line that is no JSON object")
    return found


def _said(error: Exception) -> str:
    return "no whole answer in time (teacher.timeout)" if isinstance(error, TimeoutError) else str(error)


def _reason(reasons: dict[int, str], request: Request) -> str:
    return reasons.get(request.index, "no answer in the batch's results")
