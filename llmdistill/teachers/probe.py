"""What an endpoint returns: one request at the start finds out, and whatever the configuration needs beyond it is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmdistill.config import Generate
from llmdistill.errors import InputError
from llmdistill.teachers import Request
from llmdistill.teachers.answers import message, only_choice, reading
from llmdistill.teachers.token_matching import OUTSIDE, bytes_of, entries_of, id_of

if TYPE_CHECKING:
    from llmdistill.teachers.openai import OpenAIEngine

_QUESTION = [{"role": "user", "content": "Say yes."}]
_SAME = 0.1  # tolerance between two values of the same distribution, in nats
_COMPARED = 3  # number of the most likely tokens to compare
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
# In the place of the values that are asked for: where it is nearly certain what comes, a weaker cut would change nothing.
_STRONGEST = {"top_p": 0.01, "top_k": 1}


@dataclass(frozen=True)
class Gives:
    """What an endpoint returns.

    Attributes:
        logprobs: whether it returns log-probabilities.
        top_logprobs: number of most likely tokens at each position to ask for, besides the written one; None if none.
        token_ids: whether it names tokens by their ids.
        bytes: whether it returns the bytes of tokens.
        scores: whether it returns the log-probabilities of a given text.
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
            return "returns text, no log-probabilities"
        named = "token ids" if self.token_ids else "bytes of tokens" if self.bytes else "no bytes of tokens"
        most = f" of the {self.top_logprobs} most likely tokens" if self.top_logprobs else ""
        return f"returns text, log-probabilities{most}, {named}{', and scores given text' if self.scores else ''}"


async def probe(engine: OpenAIEngine, reads: bool) -> Gives:
    """Ask for one token, and see what comes with it.

    Args:
        engine: the engine whose endpoint is asked.
        reads: whether given text is to be scored.

    Raises:
        InputError: if the endpoint refuses it, or does not return what the configuration needs.
    """
    teacher, kept = engine.teacher, engine.kept
    ids = engine.template.prompt_ids(_QUESTION)
    request = Request(0, ids, 0, messages=_QUESTION)
    body, answer, taken, top = await _accepted(engine, request, kept.kept)
    if teacher.price is not None and not engine.usage(answer).input:
        raise InputError(
            f"teacher.price: {teacher.endpoint} does not say how many tokens it bills (usage.prompt_tokens), so spending "
            "cannot be tracked; remove teacher.price and teacher.budget"
        )
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
            f"teacher.tokenizer: {teacher.endpoint} sees other token ids than {teacher.tokenizer} and its chat template produce"
        )
    if kept.kept and not reads:
        await _check_dependence(engine, body)
    return found


async def _accepted(engine: OpenAIEngine, request: Request, kept: int) -> tuple[dict[str, Any], Any, list[str], int | None]:
    """The first body that the endpoint accepts, with its answer; parameters removed from it are unknown to the endpoint.

    One token more than are kept is requested: some endpoints count the written one among them.
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
    """The body of a request for one token.

    `max_completion_tokens` is kept: it counts hidden reasoning, and reasoning models refuse to answer without room for it.
    """
    body = {name: value for name, value in body.items() if name != "min_tokens"}
    return body | ({"max_tokens": 1} if "max_completion_tokens" not in body else {})


def _check(engine: OpenAIEngine, found: Gives, given: int) -> None:
    """Refuse what is needed and not returned."""
    teacher, kept = engine.teacher, engine.kept
    soft, where = kept.kept, f"{teacher.endpoint} ({teacher.model})"
    if soft and not found.logprobs:
        raise InputError(f"targets.kind {kept.kind}: {where} returns no log-probabilities; set targets.kind to none")
    if soft and not (found.token_ids or found.bytes):
        raise InputError(
            f"targets.kind {kept.kind}: {where} returns neither the ids nor the bytes of tokens, which identify them; "
            "set targets.kind to none"
        )
    if kept.stored.of_text and not found.bytes:
        raise InputError(
            f"targets.kind {kept.kind}: {where} returns no log-probabilities with the bytes of tokens; set targets.kind to none"
        )
    if soft and given < soft:
        raise InputError(f"targets.k is {soft}, but {where} returns only the {given} most likely tokens; lower targets.k")


async def _echoes(engine: OpenAIEngine, body: dict[str, Any]) -> bool:
    """Check whether a prompt is echoed with log-probabilities.

    Raises:
        InputError: if it is not.
    """
    asked = {**body, "echo": True}

    def understand(answer: Any) -> bool:
        engine.limits.spend(engine.usage(answer))
        entries = entries_of(answer["choices"][0].get("logprobs"))[1 : len(body["prompt"])]
        return len(entries) == len(body["prompt"]) - 1 and all(entry["logprob"] is not None for entry in entries)

    if not await engine.call(lambda: engine.post(asked), understand):
        raise InputError(f"{engine.teacher.endpoint} cannot score given text: it echoes no log-probabilities of a prompt")
    return True


async def _check_dependence(engine: OpenAIEngine, body: dict[str, Any]) -> None:
    """Refuse log-probabilities that depend on the sampling."""

    async def top(changes: Mapping[str, float]) -> dict[str, float]:
        asked = {name: value for name, value in {**body, **changes}.items() if name in body}
        if engine.sampling.top_k and not changes["top_k"]:
            asked.pop("top_k", None)  # not every endpoint accepts zero

        def understand(answer: Any) -> dict[str, float]:
            engine.limits.spend(engine.usage(answer))
            first = entries_of(answer["choices"][0]["logprobs"])[0]["top_logprobs"]
            return {entry["token"]: entry["logprob"] for entry in first}

        return await engine.call(lambda: engine.post(asked), understand)

    await check_dependence(engine.sampling, engine.teacher.endpoint, engine.kept.kept, top)


async def check_dependence(
    sampling: Generate,
    where: str,
    kept: int,
    top: Callable[[Mapping[str, float]], Awaitable[Mapping[str, float]]],
    drawn: bool = False,
) -> None:
    """Refuse log-probabilities that depend on temperature, top-p or top-k: those of the model itself are stored.

    Args:
        sampling: the configured sampling parameters.
        where: whose log-probabilities they are.
        kept: number of tokens whose log-probabilities are stored.
        top: returns the possible first tokens and their log-probabilities, sampled with these parameters.
        drawn: whether these tokens are drawn, so that two answers may have none in common and prove nothing.

    Raises:
        InputError: if they do.
    """
    changed = {name: value for name, neutral in _NEUTRAL.items() if (value := getattr(sampling, name)) != neutral}
    if not changed:
        return

    async def likely(changes: Mapping[str, float]) -> dict[str, float]:
        shown = [(token, value) for token, value in (await top(changes)).items() if value != OUTSIDE]
        return dict(sorted(shown, key=lambda item: -item[1])[: min(kept, _COMPARED)])

    own = await likely(_NEUTRAL)
    found = await likely({**_NEUTRAL, **changed, **{name: _STRONGEST[name] for name in changed if name in _STRONGEST}})
    both = own.keys() & found.keys()
    if drawn and not both:
        return
    if both and len(found) >= len(own) and max(abs(own[token] - found[token]) for token in both) <= _SAME:
        return
    raise InputError(
        f"{' and '.join(f'generate.{name} is {value:g}' for name, value in changed.items())}, and the log-probabilities of "
        f"{where} depend on it; soft targets need the model's own distribution: set "
        f"{' and '.join(f'generate.{name} to {_NEUTRAL[name]:g}' for name in changed)}"
    )
