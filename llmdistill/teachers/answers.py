"""Checks of any server's answers: nothing is stored before it is checked."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from llmdistill.data.targets import Array
from llmdistill.errors import InputError

ROUNDING = 1e-3  # tolerance for log-probabilities above zero and probabilities that sum to more than one


# How endpoints say that they refuse this particular prompt: by a code or type, in words, or with what was flagged in it.
_CODES = {
    "content_filter", "content_policy_violation", "data_inspection_failed", "invalid_prompt",
    "context_length_exceeded", "exceed_context_size_error", "string_above_max_length",
}  # fmt: skip
_OF_THE_PROMPT = re.compile(
    r"content management policy|content filtering policy|content exists risk|inappropriate content"
    r"|maximum context length|exceeds the available context size|prompt is too long",
    re.IGNORECASE,
)
_FLAGGED = {"reasons", "flagged_input"}


class UnusableAnswerError(ValueError):
    """An answer that cannot be right; the message says why."""


class FinalAnswerError(UnusableAnswerError):
    """An answer that is unusable and would be the same again, such as a refusal."""


@contextmanager
def reading() -> Iterator[None]:
    """While an answer is read, turn missing or misplaced values into an unusable answer.

    Raises:
        UnusableAnswerError: if it has an unexpected format.
    """
    try:
        yield
    except (InputError, UnusableAnswerError):
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UnusableAnswerError(f"an answer in an unexpected format ({type(error).__name__}: {error})") from None


def only_choice(answer: Any) -> Any:
    """The choice of an answer, from either of OpenAI's APIs.

    Raises:
        FinalAnswerError: if there is none, as after some endpoints' filters, or more than the one requested.
    """
    choices = answer["choices"]
    if len(choices) != 1:
        raise FinalAnswerError(f"{len(choices)} choices" if choices else "no choice")
    return choices[0]


def check_logprobs(values: Iterable[Any]) -> None:
    """Refuse invalid log-probabilities.

    Raises:
        UnusableAnswerError: if one is not a finite number, or is above zero.
    """
    for value in values:
        if type(value) not in (int, float) or not -math.inf < value <= ROUNDING:
            raise UnusableAnswerError("invalid log-probabilities")


def check_sums(logprobs_NK: Array) -> None:
    """Refuse probabilities that add up to more than one.

    Raises:
        UnusableAnswerError: if those of a position do.
    """
    if (np.exp(logprobs_NK.astype(np.float64)).sum(axis=1) > 1 + ROUNDING).any():
        raise UnusableAnswerError("probabilities that add up to more than one")


def token_ids(given: Any, vocab_size: int | None) -> Array:
    """Token ids of the vocabulary, at least one.

    Raises:
        UnusableAnswerError: if they are invalid.
    """
    if not isinstance(given, list) or not all(type(token) is int for token in given):
        raise UnusableAnswerError("token ids that are not integers")
    ids = np.array(given, dtype=object)
    if not given or min(given) < 0 or (vocab_size is not None and max(given) >= vocab_size):
        raise UnusableAnswerError("token ids outside the vocabulary" if given else "no tokens")
    return ids.astype(np.int64)


def is_error(answer: Any) -> bool:
    """Whether the body of an answer with a success status is an error, as some routers send it."""
    return isinstance(answer, dict) and bool(answer.get("error")) and not (answer.get("choices") or answer.get("content"))


def _error(response: Any) -> Any:
    """The entry `error` of a response's body, or all of it."""
    content = response.json()
    content = content[0] if isinstance(content, list) and content else content  # Gemini's endpoint wraps them
    return content.get("error", content)


def message(response: Any) -> str:
    """The server's own message, from an error response."""
    try:
        error = _error(response)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return f"{response.status_code} {response.text[:200]}"


def refused_prompt(response: Any) -> str | None:
    """Why a prompt is refused, if an error response says so; another prompt might be answered."""
    said = message(response)
    if response.status_code not in (400, 403, 413, 422) or "max_tokens" in said or "max_completion_tokens" in said:
        return None
    try:
        error = _error(response)
    except (ValueError, AttributeError):
        error = None
    fields = error if isinstance(error, dict) else {}
    if response.status_code == 403:  # otherwise it is about the key
        metadata = fields.get("metadata")
        why = "moderation" if isinstance(metadata, dict) and _FLAGGED & metadata.keys() else None
    else:
        named = [str(fields.get(name)) for name in ("code", "type")]
        found = _OF_THE_PROMPT.search(said)
        why = next((name for name in named if name in _CODES), found[0].lower() if found else None)
    return f"a refusal of the prompt ({why})" if why else None
