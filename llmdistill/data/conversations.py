"""Conversations in files: their messages, which of them are learned, and their token ids."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmdistill.data.jsonl import Fields
from llmdistill.data.rows import Messages, whole_conversation
from llmdistill.errors import UnreadableError, UnusableError
from llmdistill.models.chat_template import ChatTemplate

CONVERSATION = ("messages", "prompt", "completion", "tools")  # fields that hold one
_ROLES = ("system", "user", "assistant", "tool")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # fields of a row or of a message
_NAMES_MEDIA = re.compile(r"(image|video|audio)s?(_|$)")  # those, and such as image_path
_MARK = re.compile(r"<(image|video|audio)>")  # in a message, for what another field holds
# A text that is no caption: a path, an address, the data itself, or a list of them as JSON.
_LEADS_TO_MEDIA = re.compile(
    r"\s*(data:|[a-z0-9]+://|[a-z0-9+/]{100}|[\[{]\s*[^\s\]}]|.*\.(jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|mp4|webm|mov|avi|mkv"
    r"|wav|mp3|flac|ogg|opus|m4a)\s*$)",
    re.IGNORECASE,
)
_MAY_BE_EMPTY = ("tool_calls", *MEDIA)  # fields of a message, which then say nothing
# What other trainers' files say of a message that is not learned: OpenAI's `weight: 0`, axolotl's `train: false`, and so on.
LEARNED = ("weight", "train", "training", "trainable", "loss")


@dataclass(frozen=True)
class Turn:
    """An answer of the assistant and what precedes it; both as the chat template takes them.

    `tools` are those that the conversation offers; `plain` says that it is text without turns, and `prompt` is empty.
    """

    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    tools: list[Any] | None = None
    plain: bool = False

    @property
    def uses_tools(self) -> bool:
        """Whether it has more than roles and contents."""
        return more_than_text([*self.prompt, *self.completion], self.tools)

    def token_ids(self, chat: ChatTemplate) -> tuple[list[int], list[int]]:
        """The prompt and the answer; for plain text the first token, which has no predecessor, and the others.

        Raises:
            UnusableError: the template refuses it, or there is nothing to learn.
        """
        (answer,) = self.completion
        if self.plain:
            ids = chat.text_ids(answer["content"])
            return ids[:1], ids[1:]
        return chat.turn_ids(self.prompt, answer, self.tools)

    @property
    def fields(self) -> tuple[str, ...]:
        """The turn that a row is read from."""
        return ("text",) if self.plain else CONVERSATION

    @property
    def provenance(self) -> dict[str, Any]:
        """What is stored besides roles and contents, if there is more."""
        return {"messages": [*self.prompt, *self.completion], "tools": self.tools} if self.uses_tools else {}


def learned_turns(fields: Fields, origin: str, every: bool, tool_calls: bool) -> Iterator[Turn]:
    """The turns of a row that are learned.

    Args:
        fields: of the row: `messages`, with `tools` if they are called; `prompt` and `completion`; or `text`.
        origin: of the row.
        every: each of the assistant's turns, not the last alone.
        tool_calls: those too that call a tool.

    Raises:
        UnreadableError: it is no conversation that ends with an answer.
        UnusableError: it is one that text alone does not tell, or nothing of it is to be learned.
    """
    _check_media(fields, origin)
    if isinstance(fields.get("messages"), list):
        messages, learned = _checked(fields["messages"], "user", origin)
    elif "prompt" in fields and "completion" in fields:
        prompt, _ = _checked(fields["prompt"], "user", origin)
        completion, learned = _checked(fields["completion"], "assistant", origin)
        messages = [*prompt, *completion] if prompt and len(completion) == 1 else []
        learned = [False] * len(prompt) + learned
    elif isinstance(fields.get("text"), str):
        if not fields["text"].strip():
            raise UnusableError("its text is empty", origin)
        yield Turn([], [{"role": "assistant", "content": fields["text"]}], plain=True)
        return
    else:
        messages = []
    if not messages or messages[-1]["role"] != "assistant":
        raise UnreadableError(
            "must have `messages`, a list of {role, content} that ends with the assistant's answer, "
            "or `prompt` and `completion`, or `text`",
            origin,
        )
    ends = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    asked = ends if every else ends[-1:]
    wanted = [place for place in asked if learned[place]]
    if not wanted:
        raise UnusableError("its answer is marked as not to be learned", origin)
    for place in wanted:
        if not place or messages[place - 1]["role"] == "assistant":
            raise UnreadableError(f"the assistant's turn {ends.index(place) + 1} does not follow a turn to answer", origin)
        if tool_calls or not messages[place].get("tool_calls"):
            yield Turn(messages[:place], messages[place : place + 1], fields.get("tools"))


def stored_ids(row: Mapping[str, Any], chat: ChatTemplate, before: str = "") -> tuple[list[int], list[int]]:
    """The prompt and the answer of a stored row in the tokens of a different tokenizer.

    An answer that was cut off has no token that ends it, nor the character that it was cut inside of: U+FFFD, once or more.

    Args:
        row: with `prompt`, `completion`, `finish_reason` and `metadata`.
        chat: the template of the other tokenizer.
        before: text that the answer begins with, beside what is stored.

    Raises:
        UnusableError: the template refuses it.
    """
    (*prompt, answer), tools = whole_conversation(row)
    cut = row["finish_reason"] != "stop"
    if cut and answer.get("content"):
        answer = {**answer, "content": answer["content"].rstrip("\ufffd")}
    if before:
        answer = {**answer, "content": before + (answer.get("content") or "")}
    prompt_ids, ids = Turn(prompt, [answer], tools, plain=not prompt).token_ids(chat)
    if cut and len(ids) > 1 and ids[-1] in chat.end_ids:
        ids = ids[:-1]
    return prompt_ids, ids


def given_prompt(fields: Fields, origin: str) -> list[dict[str, Any]]:
    """The conversation of a row that is to be continued, from `prompt` or `messages`, as the chat template takes it.

    Raises:
        UnreadableError: there is none.
        UnusableError: text alone does not tell it.
    """
    _check_media(fields, origin)
    for key in ("messages", "prompt"):
        if isinstance(fields.get(key), list | str):
            messages, _ = _checked(fields[key], "user", origin)
            if messages and messages[-1]["role"] == "assistant":  # the answer that it has is not the teacher's
                messages.pop()
            if not messages or messages[-1]["role"] not in ("user", "tool"):
                raise UnreadableError(
                    f"{key} must be a list of {{role, content}} with a turn for the assistant to answer", origin
                )
            return messages
    raise UnreadableError(
        f"has neither `messages` nor `prompt`; set prompts.template to use {', '.join(fields) or 'its fields'}", origin
    )


def _check_media(fields: Fields, origin: str) -> None:
    """Refuse a row with images, video or audio: the models only take text.

    A text of that name may be a caption, unless a message has a mark for what it leads to.

    Raises:
        UnusableError: names the field.
    """
    named = {name: value for name, value in fields.items() if value and _NAMES_MEDIA.match(name)}
    is_marked = bool(named) and _MARK.search(str([fields.get(name) for name in (*CONVERSATION, "text")])) is not None
    for name, value in named.items():
        if is_marked or (name in MEDIA and _is_media(value)):
            raise UnusableError(_no_media(name), origin)


def _is_media(value: Any) -> bool:
    if isinstance(value, str):
        return _LEADS_TO_MEDIA.match(value) is not None
    return bool(value) and not isinstance(value, int | float)


def _no_media(name: str) -> str:
    return f"`{name}` cannot be passed to the teacher, which only takes text"


def metadata(fields: Fields, used: Collection[str] = CONVERSATION) -> Fields:
    """The fields of a line other than its conversation, such as an expected answer or a topic; kept with the row.

    Args:
        fields: of the line.
        used: those that are in the conversation.
    """
    return {name: value for name, value in fields.items() if name not in used}


def as_columns(messages: Sequence[dict[str, Any]]) -> Messages:
    """Only roles and contents; a call without a content becomes its JSON."""

    def content(message: dict[str, Any]) -> str:
        calls = message.get("tool_calls")
        return message.get("content") or (json.dumps(calls, ensure_ascii=False) if calls else "")

    return [{"role": message["role"], "content": content(message)} for message in messages]


def more_than_text(messages: Sequence[dict[str, Any]], tools: Any) -> bool:
    """Whether a conversation has more than roles and contents."""
    return bool(tools) or any(message.keys() - {"role", "content"} for message in messages)


def _checked(value: Any, role: str, origin: str) -> tuple[list[dict[str, Any]], list[bool]]:
    """Messages and which of them may be learned; a string is a message of the role, anything but a list has none.

    Fields without a value are left out: tables give every message those that one of them has. So is an empty list of calls.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}], [True]
    messages, learned = [], []
    for number, given in enumerate(value if isinstance(value, list) else [], start=1):
        if not isinstance(given, dict) or given.get("role") not in _ROLES:
            raise UnreadableError(f"message {number} must have a role, one of {', '.join(_ROLES)}", origin)
        message = {name: other for name, other in given.items() if other is not None and (other or name not in _MAY_BE_EMPTY)}
        if media := next((name for name in MEDIA if _is_media(message.get(name))), None):
            raise UnusableError(_no_media(media), origin)
        if isinstance(message.get("content"), list):
            message["content"] = _joined(message["content"], origin)
        if not isinstance(message.get("content"), str) and not ("content" not in message and message.get("tool_calls")):
            raise UnreadableError(f"message {number} must have a content, a string", origin)
        marks = [_is_learned(message.pop(name, 1), name, number, origin) for name in LEARNED]
        learned.append(all(marks))
        messages.append({"role": message.pop("role"), "content": message.pop("content", None), **message})
    return messages, learned


def _is_learned(value: Any, name: str, number: int, origin: str) -> bool:
    if value not in (0, 1):
        raise UnreadableError(f"{name} of message {number} must be 0 or 1, true or false, not {value!r}", origin)
    return bool(value)


def _joined(parts: list[Any], origin: str) -> str:
    """The text of a content in parts, as in OpenAI's API."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UnusableError(f"a part of a content has type {kind!r}, but the teacher only takes text", origin)
        texts.append(part["text"])
    return "".join(texts)
