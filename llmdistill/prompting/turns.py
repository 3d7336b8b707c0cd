"""Finished conversations, and which of their turns are learned."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmdistill.data.dataset import Messages
from llmdistill.errors import InputError
from llmdistill.prompting.template import Fields

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Turn:
    """An answer of the assistant and what stands before it; both as the chat template takes them.

    `tools` are those that the conversation offers; `plain` says that it is text without turns, and `prompt` is empty.
    """

    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    tools: list[Any] | None = None
    plain: bool = False

    @property
    def uses_tools(self) -> bool:
        """Whether there is more to it than roles and contents."""
        return bool(self.tools) or any(message.keys() - {"role", "content"} for message in (*self.prompt, *self.completion))


def learned_turns(fields: Fields, origin: str, every: bool, tool_calls: bool) -> Iterator[Turn]:
    """The turns of a line that are learned.

    Args:
        fields: of the line: `messages`, with `tools` if they are called; `prompt` and `completion`; or `text`.
        origin: of the line.
        every: each of the assistant's turns, not the last alone.
        tool_calls: those too that call a tool.

    Raises:
        InputError: there are none, beginning with `origin`.
    """
    if "messages" in fields:
        messages = _checked(fields["messages"], "user", origin)
    elif "prompt" in fields and "completion" in fields:
        prompt, completion = _checked(fields["prompt"], "user", origin), _checked(fields["completion"], "assistant", origin)
        messages = [*prompt, *completion] if prompt and len(completion) == 1 else []
    elif isinstance(fields.get("text"), str):
        yield Turn([], [{"role": "assistant", "content": fields["text"]}], plain=True)
        return
    else:
        messages = []
    if not messages or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{origin}: must have `messages`, a list of {{role, content}} that ends with the assistant's answer, "
            "or `prompt` and `completion`, or `text`"
        )
    ends = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    for place in ends if every else ends[-1:]:
        if not place or messages[place - 1]["role"] == "assistant":
            raise InputError(f"{origin}: the assistant's turn {ends.index(place) + 1} has none before it to answer")
        if tool_calls or not messages[place].get("tool_calls"):
            yield Turn(messages[:place], messages[place : place + 1], fields.get("tools"))


def as_columns(messages: list[dict[str, Any]]) -> Messages:
    """Roles and contents alone; a call without a content is its JSON."""
    return [
        {"role": message["role"], "content": message.get("content") or json.dumps(message.get("tool_calls"), ensure_ascii=False)}
        for message in messages
    ]


def _checked(value: Any, role: str, origin: str) -> list[dict[str, Any]]:
    """Messages; a string is one of the role, and anything but a list holds none."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    for number, message in enumerate(value if isinstance(value, list) else []):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise InputError(f"{origin}: message {number + 1} must have a role, one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str) and not (message.get("content") is None and message.get("tool_calls")):
            raise InputError(f"{origin}: message {number + 1} must have a content, a string")
    return list(value) if isinstance(value, list) else []
