"""Recorded traffic: lines of request logs of OpenAI's chat API as conversations.

Only the messages, the tools and the fields named in the configuration are used from a line: a log may contain keys and
headers, and what is not taken here is not stored anywhere.
"""

import json
from typing import Any

from llmdistill.config.rows import RowReading
from llmdistill.config.section import is_secret
from llmdistill.data.conversations import MEDIA
from llmdistill.data.ids import stable_id
from llmdistill.data.jsonl import Fields
from llmdistill.data.subjects import conversation_of
from llmdistill.errors import UnreadableError

_REQUESTS = ("request", "body", "request_body", "requestBody", "input", "inputs")
_RESPONSES = ("response", "response_body", "responseBody", "output", "outputs")
# What a request says beside `model` and `messages`, and no published dataset.
_PARAMETERS = (
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "stream", "tool_choice", "response_format", "headers",
    "extra_headers", "reasoning_effort",
)  # fmt: skip
_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", *MEDIA)
_CUT_OFF = ("length", "content_filter", "max_tokens", "model_context_window_exceeded", "refusal")  # why an answer ended


class Recorded(dict[str, Any]):
    """The fields used from a recorded request: `messages`, with the answer if there is one, and others that are requested.

    Attributes:
        conversation: the name of the session that it belongs to.
        unanswered: why it has no answer to learn from, if it has none.
    """

    conversation: str
    unanswered: str | None = None


def is_recorded(fields: Fields) -> bool:
    """Whether a line is a recorded request: a chat inside an envelope, or one with a response or parameters next to it."""
    if _request(fields) is None:
        return False
    messages = _parsed(fields.get("messages"))
    if not _is_chat(messages):
        return True
    if messages[-1]["role"] == "assistant" and "choices" not in fields:  # a whole conversation, whatever stands beside it
        return False
    answered = "choices" in fields or any(isinstance(_parsed(fields.get(name)), dict) for name in _RESPONSES)
    return answered or any(name in _PARAMETERS or is_secret(name) for name in fields)


def read_recorded(fields: Fields, settings: RowReading, origin: str) -> Recorded:
    """What is used from a line.

    Args:
        fields: of the line.
        settings: what says which fields name its session and are kept.
        origin: of the line.

    Raises:
        UnreadableError: there is no conversation in it, or not what the settings name.
    """
    request = _request(fields)
    if request is None:
        raise UnreadableError(f"contains no request with messages, only {', '.join(map(str, fields)) or 'no fields'}", origin)
    messages = [_message(message) for message in request["messages"]]
    if request.get("system") and messages[0]["role"] not in ("system", "developer"):  # Anthropic's
        messages = [{"role": "system", "content": request["system"]}, *messages]
    answer, unanswered = _answer(fields)
    tools = _parsed(request.get("tools"))
    recorded = Recorded(messages=[*messages, answer] if answer else messages, **({"tools": tools} if tools else {}))
    recorded.unanswered = unanswered
    recorded.conversation = session_of(fields, settings, origin) or opening(messages)
    for name in settings.metadata:
        value = _at(fields, name)
        if isinstance(value, dict | list):
            raise UnreadableError(f"{name} (metadata) has several values; name one of them, such as {name}.NAME", origin)
        if value is not _MISSING:
            recorded[name] = value
    return recorded


def session_of(fields: Fields, settings: RowReading, origin: str) -> str | None:
    """The session that a row belongs to; None if the configuration names no field for it, or it is empty.

    Raises:
        UnreadableError: there is no such field, or it holds more than one value.
    """
    if settings.session is None:
        return None
    value = _at(fields, settings.session)
    if value is _MISSING or isinstance(value, dict | list):
        what = "has no field" if value is _MISSING else "has more than one value in"
        raise UnreadableError(f"{what} {settings.session} (session)", origin)
    return None if value in (None, "") else stable_id("session", str(value))


_MISSING: Any = object()


def _at(fields: Fields, path: str) -> Any:
    """The value at a path such as `metadata.session_id`; `_MISSING` if there is none."""
    if path in fields:
        return fields[path]
    head, _, rest = path.partition(".")
    inner = _parsed(fields.get(head))
    return _at(inner, rest) if rest and isinstance(inner, dict) else _MISSING


def _parsed(value: Any) -> Any:
    """The value, parsed if it is JSON: logs exported from a database contain objects as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


def _request(fields: Fields) -> Fields | None:
    """The request body of a line: a dictionary with a list of `messages`."""
    for outer in (fields, *(_parsed(fields.get(name)) for name in _REQUESTS)):
        for body in (outer, _parsed(outer.get("body")) if isinstance(outer, dict) else None):
            if isinstance(body, dict) and _is_chat(messages := _parsed(body.get("messages"))):
                return {**body, "messages": messages}
            if body is not fields and _is_chat(body):
                return {"messages": body}
    return None


def _answer(fields: Fields) -> tuple[dict[str, Any] | None, str | None]:
    """The message of the response, or why it cannot be learned from."""
    bodies = (fields if "choices" in fields else None, *(_parsed(fields.get(name)) for name in _RESPONSES))
    body = next((found for found in bodies if found), None)
    body = _parsed(body["body"]) if isinstance(body, dict) and "body" in body else body
    finish_reason = body.get("stop_reason") if isinstance(body, dict) else None  # Anthropic's
    if isinstance(body, dict) and (choices := _parsed(body.get("choices"))):
        choice = choices[0] if isinstance(choices, list) and isinstance(choices[0], dict) else {}
        finish_reason, body = choice.get("finish_reason"), choice.get("message")
    if isinstance(body, list) and _is_chat(body):
        body = body[-1]
    if isinstance(body, str) and body.strip():
        body = {"role": "assistant", "content": body}
    if not isinstance(body, dict) or not (body.get("content") or body.get("tool_calls")):
        return None, "has no answer in its response"
    if finish_reason in _CUT_OFF:
        return None, f"its answer was cut off ({finish_reason})"
    return {**_message(body), "role": "assistant"}, None


def _message(message: dict[str, Any]) -> dict[str, Any]:
    named = {**message, "reasoning_content": message.get("reasoning_content") or message.get("reasoning")}  # vLLM, OpenRouter
    return {name: named[name] for name in _MESSAGE if named.get(name) is not None}


def opening(messages: list[dict[str, Any]]) -> str:
    """The id of a session by its first question, which every later turn or request repeats."""
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    turns = [{"role": str(message["role"]), "content": _text(message.get("content"))} for message in messages[:first]]
    return stable_id("opening", conversation_of([turn for turn in turns if turn["role"] != "developer"] or turns))


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
    return str(content or "")
