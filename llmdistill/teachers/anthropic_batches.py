"""Message batches of Anthropic's API, which carry nothing but their requests: the name is in the `custom_id` of each.

A batch reveals them only after it has ended. A batch whose id was not recorded is therefore searched for among those that may
be it: with as many requests, created since, and of no other claim. Each of them is waited for, and its results then show
whose it is.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from llmdistill.errors import InputError
from llmdistill.runs.files import read_json
from llmdistill.teachers import Request
from llmdistill.teachers.batches import Batches, Claim, Result, lines

if TYPE_CHECKING:
    from llmdistill.teachers.anthropic import AnthropicEngine

_CLOCKS = 86400.0  # seconds by which the endpoint's clock may lag
_NO_ANSWER = {"expired": "no answer within the batch's day", "canceled": "a batch that was cancelled"}


class AnthropicBatches(Batches):
    """Requests are part of the call that creates the batch, and all results come in one answer."""

    engine: "AnthropicEngine"

    def __init__(self, engine: "AnthropicEngine", shared: Path | None) -> None:
        super().__init__(engine, shared)
        self._names: dict[str, str] = {}  # names of inspected batches, by their ids

    def line(self, request: Request) -> bytes:
        """The index and body of a request."""
        return json.dumps([request.index, self.engine.body(request)], ensure_ascii=False, sort_keys=True).encode() + b"\n"

    async def create(self, claim: Claim, requests: Sequence[Request]) -> str:
        """Send all requests, which is billed."""
        asked = [{"custom_id": f"{claim.name}-{request.index}", "params": self.engine.body(request)} for request in requests]
        batch = await self.once(self.engine.client.messages.batches.create(requests=asked))
        return str(batch.id)

    async def find(self, claim: Claim, requests: Sequence[Request]) -> tuple[str | None, bool]:
        """Find it by the results of all batches that may be it, if they have ended."""
        claims = [read_json(file) or {} for file in self.directory.glob("*.json")]
        others = {held.get("id") for held in claims}
        candidates = [batch for batch in await self._since(claim.since - _CLOCKS) if batch.id not in others]
        candidates = [batch for batch in candidates if _count(batch) == len(requests)]
        for batch in candidates:
            if batch.processing_status == "ended" and await self._name(claim, batch) == claim.name:
                return str(batch.id), False
        return None, any(batch.processing_status != "ended" for batch in candidates)

    async def ended(self, claim: Claim) -> Any:
        """The batch once it is complete, else None."""
        batch = await self.patient(lambda: self.engine.client.messages.batches.retrieve(claim.id))
        return batch if batch.processing_status == "ended" else None

    async def results(self, claim: Claim, batch: Any) -> list[Result]:
        """The result of every request, with or without an answer."""
        entries = [(*str(entry.get("custom_id")).rpartition("-"), entry) for entry in await self._entries(claim, batch)]
        return [_result(index, entry) for name, _, index, entry in entries if name == claim.name]

    async def _since(self, begin: float) -> list[Any]:
        """The batches created since a given time; the newest are listed first."""

        async def listed() -> list[Any]:
            found = []
            async for batch in self.engine.client.messages.batches.list(limit=100):
                if batch.created_at.timestamp() < begin:
                    break
                found.append(batch)
            return found

        return await self.patient(listed)

    async def _name(self, claim: Claim, batch: Any) -> str:
        """The name that a batch carries; something else for a batch that is not ours."""
        if batch.id not in self._names:
            entries = await self._entries(claim, batch)
            self._names[batch.id] = str(entries[0].get("custom_id")).rpartition("-")[0] if entries else ""
        return self._names[batch.id]

    async def _entries(self, claim: Claim, batch: Any) -> list[Any]:
        """The lines of a batch's results.

        Raises:
            InputError: if they are no longer available.
        """
        if batch.archived_at is not None:
            raise InputError(
                f"{self.engine.teacher.endpoint} no longer keeps the results of the batch {batch.id}, which is or may be that of "
                f"{claim.file}; remove that file to ask, and pay, for its rows again"
            )

        async def read() -> list[Any]:
            # Not from `results_url`: an answer must not determine where the key is sent.
            response = await self.engine.client.get(f"/v1/messages/batches/{batch.id}/results", cast_to=httpx2.Response)
            found = lines(response.text)
            if len(found) != _count(batch):
                raise ValueError(f"{len(found)} results of the {_count(batch)} requests of the batch {batch.id}")
            return found

        return await self.patient(read)


def _count(batch: Any) -> int:
    """Number of requests in a batch, whatever their state."""
    counts = batch.request_counts
    return int(counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired)


def _result(index: str, entry: Any) -> Result:
    result = entry.get("result") or {}
    kind = str(result.get("type"))
    if kind == "succeeded":
        return Result(index, result.get("message"), "no message in the batch")
    error = (result.get("error") or {}).get("error") or {}
    return Result(index, None, _NO_ANSWER.get(kind) or f"an error in the batch ({error.get('type') or kind})")
