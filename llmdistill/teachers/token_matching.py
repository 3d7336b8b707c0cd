"""Mapping from the tokens that an endpoint names, by ids or bytes, to the ids of a tokenizer.

An entry is what OpenAI's API returns for a token: `token`, `bytes`, `logprob` and, for a written one, `top_logprobs`, a list
of the same for the most likely tokens. Three values are placeholders: a log-probability of -9999.0 means "outside the most
likely tokens", null `bytes` that the token is not text, and empty ones that the server does not show it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmdistill.config import Targets
from llmdistill.data.alignment import Side, told_chunks
from llmdistill.data.targets import Array, Chunks, SoftTargets
from llmdistill.models.token_bytes import token_bytes
from llmdistill.teachers.answers import FinalAnswerError, check_logprobs, check_sums, token_ids

OUTSIDE = -9999.0
_BY_ID = "token_id:"
_REPLACEMENT = "\ufffd".encode()
Entry = dict[str, Any]


@dataclass(frozen=True)
class Matched:
    """Written tokens: ids (N,), the log-probability of each, NaN if unknown, and the targets."""

    ids: Array
    logprobs: Array
    targets: SoftTargets | None


class TokenMatcher:
    """Knows a tokenizer's tokens by their bytes, and its special tokens by their names.

    Args:
        tokenizer: the tokenizer of the endpoint's model.
        end_id: the token that ends its turn.
        kept: the targets to keep.
    """

    def __init__(self, tokenizer: Any, end_id: int, kept: Targets) -> None:
        self.tokenizer, self.end_id, self.kept = tokenizer, end_id, kept
        self._special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._by_bytes: dict[bytes, list[int]] = {}
        for number, content in enumerate(token_bytes(tokenizer, "teacher.tokenizer")):
            if content:
                self._by_bytes.setdefault(content, []).append(number)
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    def match(self, entries: Sequence[Entry], stopped: bool) -> Matched:
        """The ids, log-probabilities and targets of written tokens, including the end token if the model stopped.

        Endpoints that do not show the end token return no distribution for it. At such a position only the token is known: all
        probability is in the tail, where it adds nothing to a divergence, and the log-probability is NaN.

        Raises:
            FinalAnswerError: if a token is not in the tokenizer, or the distributions are invalid.
        """
        k, ids, rows = self.kept.kept, [], []
        for place, entry in enumerate(entries):
            token = self.find(entry)
            if token is None:
                if not (stopped and place + 1 == len(entries)):
                    raise FinalAnswerError("a written token that the endpoint does not show")
                token = self.end_id
            ids.append(token)
            rows.append(self._alternatives(entry, token, k))
        logprobs = [_known(entry["logprob"]) for entry in entries]
        if stopped and (not ids or ids[-1] not in self._special.values()):
            ids.append(self.end_id)
            logprobs.append(np.nan)
            rows.append(([self.end_id] * k, [-np.inf] * k))
        found = token_ids(ids, self.vocab_size)
        ids_NK = np.array([row[0] for row in rows], dtype=np.int64).reshape(len(ids), k)
        logprobs_NK = np.array([row[1] for row in rows], dtype=np.float32).reshape(len(ids), k)
        check_sums(logprobs_NK)
        return Matched(found, np.array(logprobs, dtype=np.float32), self.kept.stored.from_kept(ids_NK, logprobs_NK))

    def find(self, entry: Entry) -> int | None:
        """The id of a token; None if the endpoint hides it.

        Raises:
            FinalAnswerError: if it is not a token of the tokenizer.
        """
        token, given = str(entry["token"]), entry.get("bytes")
        if (number := id_of(entry)) is not None:
            return int(token_ids([number], self.vocab_size)[0])
        if token in self._special:
            return self._special[token]
        content = bytes_of(entry)
        if content is None:
            raise FinalAnswerError("a token without bytes" if given is None else "invalid bytes")
        if not content:
            return None
        found = self._by_bytes.get(content, [])
        if not found or content == _REPLACEMENT:
            raise FinalAnswerError("tokens that teacher.tokenizer does not have")
        return found[0] if len(found) == 1 else self._as_encoded(content, found)

    def _as_encoded(self, content: bytes, found: list[int]) -> int:
        """Of several tokens with the same bytes, the one that the tokenizer uses for them."""
        text = content.decode("utf-8", errors="replace")
        for encoded in (self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.encode(text)):
            if len(encoded) == 1 and encoded[0] in found:
                return int(encoded[0])
        raise FinalAnswerError("bytes shared by several tokens")

    def _alternatives(self, entry: Entry, written: int, k: int) -> tuple[list[int], list[float]]:
        """The k most likely tokens, most likely first; tokens without a probability or name are in the tail."""
        if not k:
            return [], []
        given = entry.get("top_logprobs") or []
        if len(given) < k:
            raise FinalAnswerError("fewer log-probabilities per token than requested")
        shown = [other for other in given if other["logprob"] != OUTSIDE]
        check_logprobs(other["logprob"] for other in shown)
        shown = sorted(shown, key=lambda other: -other["logprob"])[:k]
        named = [(token, other["logprob"]) for other in shown if (token := self.find(other)) is not None]
        if len({token for token, _ in named}) < len(named):
            raise FinalAnswerError("the same token twice at one position")
        lacking = k - len(named)
        filler = named[0][0] if named else written  # a placeholder, as its weight is zero
        return [token for token, _ in named] + [filler] * lacking, [value for _, value in named] + [-np.inf] * lacking


def id_of(entry: Entry) -> int | None:
    """An endpoint's id for a token: as `id` (llama.cpp), as `token_id` (Fireworks), or in its name (vLLM)."""
    given = entry.get("id", entry.get("token_id"))
    if type(given) is int:
        return given
    name = str(entry["token"]).partition(_BY_ID)
    return int(name[2]) if name[1] and not name[0] and name[2].isdecimal() else None


def bytes_of(entry: Entry) -> bytes | None:
    """The bytes of a token; None if there are none."""
    given = entry.get("bytes")
    if not isinstance(given, list) or not all(type(value) is int and 0 <= value < 256 for value in given):
        return None
    return bytes(given)


def entries_of(logprobs: Any) -> list[Entry]:
    """The entries of a choice's `logprobs`, from either API; empty if it is null."""
    if not logprobs:
        return []
    if logprobs.get("content") is not None:
        return list(logprobs["content"])
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    entries = []
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True):
        others = [{"token": other, "logprob": likely} for other, likely in (top or {}).items()]
        entries.append({"token": token, "logprob": value, "top_logprobs": others})
    return entries


def chunks_of(entries: Sequence[Entry], text: str, side: Side, ids: Array, stopped: bool) -> Chunks:
    """The chunks of a text whose tokens an endpoint names by their bytes, in the tokens of a different tokenizer.

    Args:
        entries: entries of the written tokens.
        text: the text that they spell; endpoints that show the end token have one more entry.
        side: how the tokens of the other tokenizer are spelled.
        ids: its tokens for the text.
        stopped: whether the model ended its turn.

    Raises:
        FinalAnswerError: if the tokens do not match the text.
    """
    contents = [bytes_of(entry) or b"" for entry in entries]
    ended = stopped and bool(contents) and b"".join(contents[:-1]) == text.encode()
    if ended:
        contents[-1] = b""
    if b"".join(contents) != text.encode():
        raise FinalAnswerError("tokens that do not match the text of the answer")
    values_N = np.array([_known(entry["logprob"]) for entry in entries])
    return Chunks(np.empty((len(ids), 0), dtype=np.int64), *told_chunks(contents, values_N, side, ids, ended))


def _known(value: Any) -> float:
    if value == OUTSIDE:
        return float("nan")
    check_logprobs([value])
    return float(value)
