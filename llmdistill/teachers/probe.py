"""What an endpoint gives: one request at the start finds out, and what the configuration asks for beyond it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmdistill.errors import InputError
from llmdistill.teachers import Request
from llmdistill.teachers.answers import message, only_choice, reading
from llmdistill.teachers.token_matching import bytes_of, entries_of, id_of

if TYPE_CHECKING:
    from llmdistill.teachers.openai import OpenAIEngine

_QUESTION = [{"role": "user", "content": "Say yes."}]
_SAME = 0.1  # nats by which two numbers of the same distribution may differ


@dataclass(frozen=True)
class Gives:
    """What an endpoint gives.

    Attributes:
        logprobs: whether it gives log-probabilities.
        top_logprobs: of how many tokens at each position it is asked for them, beside the written one; None if for none.
        token_ids: whether it names tokens by their ids.
        bytes: whether it gives the bytes of tokens.
        scores: whether it gives the log-probabilities of a given text.
        taken: parameters beyond OpenAI's that it knows.
    """

    logprobs: bool
    top_logprobs: int | None
    token_ids: bool
    bytes: bool
    scores: bool
    taken: list[str]

    def __str__(self) -> str:
        if not self.logprobs:
            return "gives text, no log-probabilities"
        named = "token ids" if self.token_ids else "bytes of tokens" if self.bytes else "no bytes of tokens"
        most = f" of the {self.top_logprobs} most likely tokens" if self.top_logprobs else ""
        return f"gives text, log-probabilities{most}, {named}{', and scores given text' if self.scores else ''}"


async def probe(engine: OpenAIEngine, reads: bool) -> Gives:
    """Ask for one token, and see what comes with it.

    Args:
        engine: whose endpoint is asked.
        reads: whether given text is to be scored.

    Raises:
        InputError: the endpoint refuses it, or does not give what the configuration asks for.
    """
    teacher, kept = engine.teacher, engine.kept
    ids = engine.template.prompt_ids(_QUESTION)
    request = Request(0, ids, 0, messages=_QUESTION)
    body, answer, taken, top = await _accepted(engine, request, kept.kept)
    with reading():
        choice = only_choice(answer)
        entries = entries_of(choice.get("logprobs"))
    given = len(entries[0].get("top_logprobs") or []) if entries else 0
    by_id = bool(entries) and all(id_of(entry) is not None for entry in [entries[0], *(entries[0].get("top_logprobs") or [])])
    with_bytes = bool(entries) and bytes_of(entries[0]) is not None
    scores = reads and await _echoes(engine, body)
    found = Gives(bool(entries), top if entries else None, by_id, with_bytes, scores, taken)
    _check(engine, found, given)
    seen = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
    if engine.matcher is not None and seen and seen != ids:
        raise InputError(
            f"teacher.tokenizer: {teacher.endpoint} sees other token ids than {teacher.tokenizer} with its chat template makes"
        )
    if kept.kept and body.get("temperature", 1) != 1:
        await _check_temperature(engine, body)
    return found


async def _accepted(engine: OpenAIEngine, request: Request, kept: int) -> tuple[dict[str, Any], Any, list[str], int | None]:
    """The first body that the endpoint accepts and its answer; what was taken out of it is not known to the endpoint.

    One token more than are kept is asked for: some endpoints count the written one among them.
    """
    from llmdistill.teachers.openai import IDS, NEUTRAL

    taken = [*NEUTRAL, *(IDS if engine.matcher else ()), "seed"]
    tops: list[int | None] = [kept + 1, kept] if kept else [0, None]
    while True:
        body = one_token(engine.body(request, tops[0], taken))
        refused: list[str] = []

        async def send(body: dict[str, Any] = body, refused: list[str] = refused) -> Any:
            response = await engine.post(body)
            if response.status_code in (400, 422):
                refused.append(message(response))
            return response

        try:
            answer = await engine.call(send, lambda answer: (answer["choices"], answer)[1])
            engine.limits.spend(engine.usage(answer))
            return body, answer, taken, tops[0]
        except InputError:
            if not refused:
                raise
            named = [name for name in taken if name in refused[0]]
            if named:
                taken = [name for name in taken if name not in named]
            elif len(tops) > 1:
                tops = tops[1:]
            elif taken:
                taken = []
            else:
                raise


def one_token(body: dict[str, Any]) -> dict[str, Any]:
    """The body for an answer of one token.

    `max_completion_tokens` stays: it counts hidden reasoning, and models that reason refuse to answer where it has no room.
    """
    body = {name: value for name, value in body.items() if name != "min_tokens"}
    return body | ({"max_tokens": 1} if "max_completion_tokens" not in body else {})


def _check(engine: OpenAIEngine, found: Gives, given: int) -> None:
    """Refuse what is asked for and not given."""
    teacher, kept = engine.teacher, engine.kept
    soft, where = kept.kept, f"{teacher.endpoint} ({teacher.model})"
    if soft and not found.logprobs:
        raise InputError(f"targets.kind {kept.kind}: {where} gives no log-probabilities; set targets.kind to none")
    if soft and not (found.token_ids or found.bytes):
        raise InputError(
            f"targets.kind {kept.kind}: {where} gives neither the ids nor the bytes of tokens, so that they cannot be told; "
            "set targets.kind to none"
        )
    if kept.stored.of_text and not found.bytes:
        raise InputError(
            f"targets.kind {kept.kind}: {where} gives no log-probabilities with the bytes of tokens; set targets.kind to none"
        )
    if soft and given < soft:
        raise InputError(f"targets.k is {soft}, but {where} gives the {given} most likely tokens; lower targets.k")


async def _echoes(engine: OpenAIEngine, body: dict[str, Any]) -> bool:
    """Whether a prompt comes back with log-probabilities.

    Raises:
        InputError: it does not.
    """
    asked = {**body, "echo": True}

    def understand(answer: Any) -> bool:
        engine.limits.spend(engine.usage(answer))
        entries = entries_of(answer["choices"][0].get("logprobs"))[1 : len(body["prompt"])]
        return len(entries) == len(body["prompt"]) - 1 and all(entry["logprob"] is not None for entry in entries)

    if not await engine.call(lambda: engine.post(asked), understand):
        raise InputError(f"{engine.teacher.endpoint} cannot score given text: it gives no log-probabilities of an echoed prompt")
    return True


async def _check_temperature(engine: OpenAIEngine, body: dict[str, Any]) -> None:
    """Refuse log-probabilities that depend on the temperature of the sampling: those of temperature 1 are stored."""

    async def top(temperature: float) -> dict[str, float]:
        asked = {**body, "temperature": temperature}

        def understand(answer: Any) -> dict[str, float]:
            engine.limits.spend(engine.usage(answer))
            first = entries_of(answer["choices"][0]["logprobs"])[0]["top_logprobs"]
            return {entry["token"]: entry["logprob"] for entry in first[:3]}

        return await engine.call(lambda: engine.post(asked), understand)

    at_one, as_asked = await top(1.0), await top(engine.sampling.temperature)
    both = at_one.keys() & as_asked.keys()
    if not both or max(abs(at_one[token] - as_asked[token]) for token in both) > _SAME:
        raise InputError(
            f"generate.temperature is {engine.sampling.temperature:g}, and the log-probabilities of {engine.teacher.endpoint} "
            "depend on it; soft targets are of temperature 1: set generate.temperature to 1"
        )
