"""A teacher behind `vllm serve`, over its OpenAI-compatible API: takes token ids, returns token ids and log-probabilities."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import httpx
import numpy as np

from llmdistill.data.targets import Array, SoftTargets
from llmdistill.errors import InputError
from llmdistill.teachers import Completion, EngineSpec, Request
from llmdistill.teachers.answers import UnusableAnswerError, check_logprobs, check_sums, token_ids
from llmdistill.teachers.probe import check_dependence
from llmdistill.teachers.remote import RemoteEngine, Response, key_of

_CONNECT_SECONDS = 10.0
# Parameters that a server takes from the model's generation configuration if a request does not set them.
_NO_DEFAULTS = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
_TELL = "/collective_rpc"
_EXTENSION = "llmdistill.teachers.vllm_worker.SampleTargets"

T = TypeVar("T")


class ServerEngine(RemoteEngine):
    """An exact engine: the token ids that the server saw are checked, and samples can be drawn inside it."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec.teacher)
        self.sampling, self.kept, self.end_ids = spec.sampling, spec.kept, spec.end_ids
        teacher, key = spec.teacher, key_of("VLLM_API_KEY")
        self.client = httpx.AsyncClient(
            base_url=teacher.endpoint.removesuffix("/v1"),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=teacher.concurrency, max_keepalive_connections=teacher.concurrency),
        )
        self.model = self.wait(self._served_model())
        self.known_ids, self._vocab_size = spec.known_ids, spec.vocab_size
        self.wait(self._set_targets(spec.seed))
        if self.kept.kept and spec.reads_with is None:
            drawn = not self.kept.stored.most_likely
            self.wait(check_dependence(self.sampling, teacher.endpoint, self.kept.kept, self._first_tokens, drawn))

    def generate(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Continue every request."""
        return self.answers(batches, self._continue)

    def score(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Score every request's text."""
        return self.answers(batches, self._read)

    async def _continue(self, request: Request) -> Completion:
        body = {
            "prompt": list(request.prompt_ids),
            "max_tokens": self.sampling.max_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            **_NO_DEFAULTS,
            "seed": request.seed,
            "stop_token_ids": list(self.end_ids),
            **({"min_tokens": self.sampling.min_tokens} if self.sampling.min_tokens else {}),
            **({"structured_outputs": {"json": self.sampling.json_schema}} if self.sampling.json_schema is not None else {}),
            "logprobs": self.kept.kept,
            "return_tokens_as_token_ids": True,
        }

        def read(choice: Any) -> Completion:
            ids = token_ids(choice["token_ids"], self._vocab_size)
            if len(ids) > self.sampling.max_tokens:
                raise UnusableAnswerError("more tokens than requested")
            if choice["finish_reason"] not in ("stop", "length"):
                raise UnusableAnswerError("a finish reason other than stop or length")
            tops = [
                {int(token.removeprefix("token_id:")): value for token, value in top.items()}
                for top in choice["logprobs"]["top_logprobs"]
            ]
            written = self._logprobs(ids, choice["logprobs"]["token_logprobs"])
            known = self.sampling.shows_everything and self.sampling.temperature == 1
            return Completion(
                request.index,
                ids,
                choice["finish_reason"],
                written,
                self._targets(ids, tops),
                float(written.sum(dtype=np.float64)) if known else None,
            )

        return await self._ask(body, read)

    async def _read(self, request: Request) -> Completion:
        """Score in one prefill; the extra token that the server insists on generating is dropped."""
        start = len(request.prompt_ids)
        body = {
            "prompt": [*request.prompt_ids, *request.completion_ids],
            "max_tokens": 1,
            "temperature": 0,
            **_NO_DEFAULTS,
            "prompt_logprobs": self.kept.kept,
        }

        def read(choice: Any) -> Completion:
            ids = np.asarray(request.completion_ids, dtype=np.int64)
            # The first token of a prompt has no distribution: entry 1 is that of the second token.
            tops = [{int(token): entry["logprob"] for token, entry in top.items()} for top in choice["prompt_logprobs"][start:]]
            written = self._logprobs(ids, [top.get(token) for top, token in zip(tops, ids.tolist(), strict=False)])
            reason = "stop" if ids[-1] in self.end_ids else "length"
            return Completion(request.index, ids, reason, written, self._targets(ids, tops))

        return await self._ask(body, read)

    def _logprobs(self, ids: Array, given: Any) -> Array:
        """One log-probability per token."""
        if not isinstance(given, list) or len(given) != len(ids):
            raise UnusableAnswerError("not one log-probability per token")
        check_logprobs(given)
        return np.array(given, dtype=np.float32)

    def _targets(self, ids: Array, tops: Sequence[Mapping[int, Any]]) -> SoftTargets | None:
        """The server gives the kept tokens at every position, and plus the written one if it is not among them."""
        if len(tops) != len(ids):
            raise UnusableAnswerError("not one distribution per token")
        kept = self.kept.kept
        ids_NK, logprobs_NK = np.zeros((len(ids), kept), dtype=np.int64), np.zeros((len(ids), kept), dtype=np.float32)
        for position, (token, top) in enumerate(zip(ids.tolist(), tops, strict=True)):
            found = {other: value for other, value in top.items() if len(top) == kept or other != token}
            if len(found) != kept:
                raise UnusableAnswerError("not as many log-probabilities per token as requested")
            check_logprobs(found.values())
            if kept:
                token_ids(list(found), self._vocab_size)
            ordered = sorted(found.items(), key=lambda item: -item[1])
            ids_NK[position] = [other for other, _ in ordered]
            logprobs_NK[position] = [value for _, value in ordered]
        check_sums(logprobs_NK)
        made = self.kept.stored.from_kept(ids_NK, logprobs_NK)
        return made if made is None or self.known_ids is None else made.within(self.known_ids)

    async def _first_tokens(self, changes: Mapping[str, float]) -> dict[str, float]:
        """Possible tokens after an end token, sampled with these parameters, and their log-probabilities."""
        body = {
            "prompt": list(self.end_ids)[:1],
            "max_tokens": 1,
            **changes,
            **_NO_DEFAULTS,
            "seed": 0,
            "logprobs": self.kept.kept,
            "return_tokens_as_token_ids": True,
        }
        return await self._ask(body, lambda choice: dict(choice["logprobs"]["top_logprobs"][0]))

    async def _ask(self, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """The result of `read` for the one choice that the server returns."""
        body = {**body, "model": self.model, "add_special_tokens": False, "return_token_ids": True}

        def understand(answer: Any) -> T:
            (choice,) = answer["choices"]
            if choice["prompt_token_ids"] != body["prompt"]:
                raise InputError(f"{self.teacher.url}: the server saw different token ids than those sent")
            return read(choice)

        return await self._call("POST", "/v1/completions", understand, body)

    def is_final(self, response: Any) -> bool:
        """Whether a response with an error status would be the same again, like an error raised by a worker."""
        return super().is_final(response) or (response.status_code == 500 and response.url.path.endswith(_TELL))

    async def _call(
        self, method: str, path: str, understand: Callable[[Any], T], body: Any = None, tries: int | None = None
    ) -> T:
        """One call; see `RemoteEngine.call`."""

        async def send() -> Response:
            return await self.client.request(method, path, json=body)

        return await self.call(send, understand, tries)

    async def _served_model(self) -> str:
        """The name of the teacher on the server."""

        def understand(answer: Any) -> list[tuple[str, str]]:
            return [(str(model["id"]), str(model.get("root"))) for model in answer["data"]]

        models = await self._call("GET", "/v1/models", understand)
        wanted = self.teacher.served_model_name or self.teacher.model
        for name, root in models:
            if wanted in (name, root):
                return str(name)
        raise InputError(
            f"teacher.model: {self.teacher.url} serves {', '.join(name for name, _ in models)}, not {wanted}; if it is the same "
            "model under another name, give teacher.served_model_name"
        )

    async def _set_targets(self, seed: int) -> None:
        """Configure which tokens the server's workers return, so that samples are drawn inside, as with engine vllm.

        A server without the extension always returns the most likely tokens; one that has it may have been told otherwise.

        Raises:
            InputError: samples are wanted, and the server was not started for it.
        """
        arguments = [self.kept.stored.name, str(self.kept.kept), str(seed)]
        body: dict[str, Any] = {"method": "sample_targets", "args": arguments}
        if self.known_ids is not None:
            body["kwargs"] = {"known_ids": str(self.known_ids)}
        try:
            await self._call("POST", _TELL, lambda answer: answer["results"], body, tries=4)
        except InputError as error:
            if self.kept.stored.most_likely:
                return
            raise InputError(
                f"targets.kind {self.kept.kind}: {error}. To draw samples in it, start it with "
                f"`VLLM_SERVER_DEV_MODE=1 VLLM_USE_V2_MODEL_RUNNER=0 vllm serve {self.teacher.model} "
                f"--max-logprobs {self.kept.kept} --worker-extension-cls {_EXTENSION}`, where nobody else uses it, or set "
                "targets.kind to topk"
            ) from None
