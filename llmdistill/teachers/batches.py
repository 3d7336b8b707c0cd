"""Batch files of OpenAI's API: a shard is one batch, whose answers cost half and come within a day.

What is paid is paid once. Before a batch is created, its random name is on the disk, and the batch carries it as metadata: a
worker that was killed in between finds the batch again by listing those that are there. The results of a finished batch can
be read as often as one likes. A claim also holds the hash of what was asked, so that answers to other questions are never
taken.
"""

import asyncio
import hashlib
import json
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai

from llmdistill.errors import InputError, RemoteError
from llmdistill.runs import lock, record
from llmdistill.teachers import Completion, Request, Usage, remote
from llmdistill.teachers.answers import UnusableAnswerError
from llmdistill.teachers.remote import given_up

if TYPE_CHECKING:
    from llmdistill.teachers.openai import OpenAIEngine

ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
LABEL = "llmdistill"  # the key of a batch's metadata that has its name
POLL = 30.0  # seconds between two looks at a batch
SETTLES = 60.0  # seconds after which a batch that was created stands in the list of all
_WAITING = 8  # batches of one worker that are unfinished at a time
_TRIES = 3  # batches for the rows of one shard: those without an answer are asked for again
_ENDED = ("completed", "failed", "expired", "cancelled")


class Batches:
    """Makes shards by batches.

    Args:
        engine: whose client, bodies and checks are used.
        shared: the file beside the dataset, beside which the claims are kept.
    """

    def __init__(self, engine: "OpenAIEngine", shared: Path | None) -> None:
        if shared is None:
            raise InputError("teacher.batch is for `generate`: other stages wait for every answer")
        self.engine = engine
        self.directory = shared.with_suffix(".batches")
        self._turn = asyncio.Lock()

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
        found: dict[int, Completion] = {}
        reasons: dict[int, str] = {}
        for attempt in range(_TRIES):
            left = [request for request in requests if request.index not in found]
            if not left:
                break
            claim = self.directory / f"{requests[0].index:08d}-{attempt + 1}.json"
            batch = await self._ended(await self._id(claim, left))
            answered, failed = await self._results(batch, left)
            found |= answered
            reasons |= failed
        return [found.get(request.index) or given_up(request, _reason(reasons, request)) for request in requests]

    async def _id(self, claim: Path, requests: list[Request]) -> str:
        """The batch of a claim: the one that is there, or a new one."""
        content = b"".join(self._line(request) for request in requests)
        digest = hashlib.sha256(content).hexdigest()
        self.directory.mkdir(parents=True, exist_ok=True)
        async with self._turn:
            with lock.in_turn(claim):
                held = record.read_json(claim)
                if held is None or held.get("asked") != digest:
                    held = {"asked": digest, "name": secrets.token_hex(16), "since": time.time(), "id": None}
                    record.write_json(claim, held)
                    fresh = True
                else:
                    fresh = False
                if held["id"] is None:
                    found = None if fresh else await self._listed(held)
                    held["id"] = found or await self._create(content, held["name"])
                    record.write_json(claim, held)
        return str(held["id"])

    def _line(self, request: Request) -> bytes:
        engine = self.engine
        body = engine.body(request, engine.found.top_logprobs, engine.found.taken)
        line = {"custom_id": str(request.index), "method": "POST", "url": ENDPOINTS[engine.teacher.api], "body": body}
        return json.dumps(line, ensure_ascii=False, sort_keys=True).encode() + b"\n"

    async def _create(self, content: bytes, name: str) -> str:
        """Upload what is asked, which costs nothing, and create the batch under its name, which does.

        Creating is not tried again by itself: whether the first try was heard is known by the list of all batches alone.
        """
        client, url = self.engine.client, self.engine.teacher.endpoint
        file = await self._patient(lambda: client.files.create(file=(f"{name}.jsonl", content), purpose="batch"))
        for _ in range(remote.TRIES):
            try:
                batch = await client.batches.create(
                    input_file_id=file.id,
                    endpoint=ENDPOINTS[self.engine.teacher.api],  # type: ignore[arg-type]
                    completion_window="24h",
                    metadata={LABEL: name},
                )
                return str(batch.id)
            except openai.OpenAIError as error:
                reason = str(error)
                if isinstance(error, openai.APIStatusError) and self.engine.is_final(error.response):
                    raise InputError(f"{url} refuses: {self.engine.refusal(error.response)}") from None
            if found := await self._listed({"name": name, "since": time.time()}):
                return found
        raise RemoteError(f"{url}: failed {remote.TRIES} times; last error: {reason}")

    async def _listed(self, held: dict[str, Any]) -> str | None:
        """The batch with a name, if it was created; looked for until it would be there."""
        while True:
            late = time.time() > held["since"] + SETTLES
            async for batch in await self._patient(self._all):
                if (batch.metadata or {}).get(LABEL) == held["name"]:
                    return str(batch.id)
            if late:
                return None
            await asyncio.sleep(min(POLL, SETTLES / 4))

    async def _all(self) -> Any:
        return await self.engine.client.batches.list(limit=100)

    async def _ended(self, identity: str) -> Any:
        """The batch, once nothing more comes.

        Raises:
            InputError: the endpoint refuses what is in it.
        """
        client = self.engine.client
        while True:
            batch = await self._patient(lambda: client.batches.retrieve(identity))
            if batch.status in _ENDED:
                break
            await asyncio.sleep(POLL)
        if batch.status == "failed":
            errors = batch.errors.data if batch.errors and batch.errors.data else []
            said = errors[0].message if errors else "the batch has failed"
            raise InputError(f"{self.engine.teacher.endpoint} refuses the batch {identity}: {said}")
        return batch

    async def _results(self, batch: Any, requests: list[Request]) -> tuple[dict[int, Completion], dict[int, str]]:
        """The answers of a batch that has ended, by index, in whatever order they are in; and why others have none."""
        by_index = {str(request.index): request for request in requests}
        found: dict[int, Completion] = {}
        reasons: dict[int, str] = {}
        for name in (batch.output_file_id, batch.error_file_id):
            text = await self._content(name) if name else ""
            for line in filter(None, text.split("\n")):
                entry = json.loads(line)
                request = by_index.get(str(entry.get("custom_id")))
                if request is None or request.index in found:
                    continue
                response = entry.get("response") or {}
                if response.get("status_code") == 200:
                    found[request.index] = self._completion(request, response["body"])
                    continue
                error = entry.get("error") or (response.get("body") or {}).get("error") or {}
                reasons[request.index] = f"an error in the batch ({error.get('code') or response.get('status_code')})"
        return found, reasons

    def _completion(self, request: Request, answer: Any) -> Completion:
        usage = Usage()
        try:
            usage = self.engine.usage(answer)
            made = self.engine.completion(request, answer)
        except UnusableAnswerError as error:
            return given_up(request, str(error), usage)
        except (LookupError, TypeError, AttributeError) as error:
            return given_up(request, f"an answer of another shape ({type(error).__name__})", usage)
        return Completion(**{**vars(made), "usage": usage})

    async def _content(self, name: str) -> str:
        async def read() -> str:
            content = await self.engine.client.files.content(name)
            text = content.text
            for line in filter(None, text.split("\n")):
                json.loads(line)  # cut off in the middle is a fault of the network
            return text

        return await self._patient(read)

    async def _patient(self, call: Any) -> Any:
        """A call that costs nothing, again and again while the fault is the endpoint's or the network's."""
        reason = ""
        for attempt in range(remote.TRIES):
            try:
                return await call()
            except openai.APIStatusError as error:
                if self.engine.is_final(error.response):
                    raise InputError(f"{self.engine.teacher.endpoint} refuses: {self.engine.refusal(error.response)}") from None
                reason = str(error)
            except (*self.engine.faults, ValueError) as error:
                reason = str(error)
            await asyncio.sleep(min(0.5 * 2**attempt, remote.LONGEST_PAUSE))
        raise RemoteError(f"{self.engine.teacher.endpoint}: failed {remote.TRIES} times; last error: {reason}")


def _reason(reasons: dict[int, str], request: Request) -> str:
    return reasons.get(request.index, "no answer in the batch's results")
