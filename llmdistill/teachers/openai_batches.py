"""Batch files of OpenAI's API: a batch carries its name as metadata."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmdistill.teachers import Request
from llmdistill.teachers.batches import Batches, Claim, RefusedBatchError, Result, lines

if TYPE_CHECKING:
    from llmdistill.teachers.openai import OpenAIEngine

ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
LABEL = "llmdistill"  # the key of a batch's metadata with its name
_CROWDED = "token_limit_exceeded"  # the code of too many tokens in unfinished batches
_ENDED = ("completed", "failed", "expired", "cancelled")


class OpenAIBatches(Batches):
    """Requests are uploaded as a file, and results come as files; those without an answer are in a separate file."""

    engine: "OpenAIEngine"

    def line(self, request: Request) -> bytes:
        """A request as a line of a batch file."""
        engine = self.engine
        body = engine.body(request, engine.found.top_logprobs, engine.found.taken)
        line = {"custom_id": str(request.index), "method": "POST", "url": ENDPOINTS[engine.teacher.api], "body": body}
        return json.dumps(line, ensure_ascii=False, sort_keys=True).encode() + b"\n"

    async def create(self, claim: Claim, requests: Sequence[Request]) -> str:
        """Upload the requests, which is free, and create the batch, which is billed."""
        client, content = self.engine.client, b"".join(self.line(request) for request in requests)
        file = await self.patient(lambda: client.files.create(file=(f"{claim.name}.jsonl", content), purpose="batch"))
        batch = await self.once(
            client.batches.create(
                input_file_id=file.id,
                endpoint=ENDPOINTS[self.engine.teacher.api],  # type: ignore[arg-type]
                completion_window="24h",
                metadata={LABEL: claim.name},
            )
        )
        return str(batch.id)

    async def find(self, claim: Claim, requests: Sequence[Request]) -> tuple[str | None, bool]:
        """Find it by its metadata."""

        async def listed() -> str | None:
            async for batch in self.engine.client.batches.list(limit=100):
                if (batch.metadata or {}).get(LABEL) == claim.name:
                    return str(batch.id)
            return None

        return await self.patient(listed), False

    async def ended(self, claim: Claim) -> Any:
        """The batch once it is complete, else None."""
        batch = await self.patient(lambda: self.engine.client.batches.retrieve(str(claim.id)))
        if batch.status == "failed":
            errors = batch.errors.data if batch.errors and batch.errors.data else []
            said = errors[0].message if errors else "the batch has failed"
            crowded = any(error.code == _CROWDED for error in errors)
            raise RefusedBatchError(f"{self.engine.teacher.endpoint} refuses the batch {claim.id}: {said}", crowded)
        return batch if batch.status in _ENDED else None

    async def results(self, claim: Claim, batch: Any) -> list[Result]:
        """Results with an answer, followed by those without."""
        names = [name for name in (batch.output_file_id, batch.error_file_id) if name]
        return [_result(entry) for name in names for entry in await self._content(name)]

    async def _content(self, name: str) -> list[Any]:
        async def read() -> list[Any]:
            return lines((await self.engine.client.files.content(name)).text)

        return await self.patient(read)


def _result(entry: Any) -> Result:
    response, index = entry.get("response") or {}, str(entry.get("custom_id"))
    if response.get("status_code") == 200 and response.get("body"):
        return Result(index, response["body"])
    error = entry.get("error") or (response.get("body") or {}).get("error") or {}
    return Result(index, None, f"an error in the batch ({error.get('code') or response.get('status_code')})")
