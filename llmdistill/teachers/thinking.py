"""Reasoning traces: where one ends in the tokens, or in the text, of an answer."""

from typing import Any

from llmdistill.data.targets import Array


def answer_start(tokenizer: Any, ids: Array, end: str) -> int | None:
    """The index of the answer's first token: behind the first token with which the text holds `end`, and white space.

    A token that holds more than the last of `end` goes with the trace. None if the trace does not end, or nothing follows.
    """

    def holds(count: int) -> bool:
        return end in tokenizer.decode(ids[:count])  # special tokens are in it: `</think>` is one

    low, high = 0, len(ids)
    if not holds(high):
        return None
    while high - low > 1:  # the first `low` tokens do not hold it, the first `high` do
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    while high < len(ids) and not tokenizer.decode(ids[high : high + 1]).strip():
        high += 1
    return high if high < len(ids) else None


def answer_ids(tokenizer: Any, ids: Array, end: str) -> Array:
    """The tokens behind the reasoning trace; all of them where there is none, and none where it does not end."""
    start = answer_start(tokenizer, ids, end)
    if start is not None:
        return ids[start:]
    return ids if behind_trace(tokenizer.decode(ids), end) else ids[:0]


def behind_trace(text: str, end: str) -> str:
    """The text behind the reasoning trace; all of it where there is none, and nothing where it does not end.

    Args:
        text: what a model has written.
        end: the mark behind a trace, such as `</think>`; the one before it is the same without the slash.
    """
    _, ended, answer = text.partition(end)
    if ended:
        return answer.lstrip()
    return "" if "/" in end and text.lstrip().startswith(end.replace("/", "", 1)) else text
