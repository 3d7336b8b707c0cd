"""The formats of conversations in files, and how each becomes `messages`, `prompt` and `completion`, or `text`.

A row is recognised by the names of its fields. What a form does not use of a row stays, as the row's metadata.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmdistill.config.rows import FORMATS, RowReading
from llmdistill.data.conversations import LEARNED, MEDIA
from llmdistill.data.jsonl import Fields
from llmdistill.data.rows import OURS
from llmdistill.data.traffic import Recorded
from llmdistill.errors import UnreadableError
from llmdistill.runs.progress import say

# Who speaks in ShareGPT's `from`, and in other files that have it.
_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "bard", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
    "function_call": "assistant",
}
_ANSWERS = ("output", "response", "completion", "solution", "answer", "target")  # a solution says more than its answer
_CONTEXTS = ("input", "context")
_QUESTIONS = ("question", "query", "problem")
_SYSTEM = ("system", "system_prompt")
_OF_TURNS = (*LEARNED, *MEDIA, "reasoning_content")  # fields of a turn besides speaker and text, without scores
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_MESSAGE = ("role", "content")


class RowReader:
    """Reads the rows of a source, and counts their detected formats.

    Args:
        settings: how rows are to be read.
    """

    def __init__(self, settings: RowReading) -> None:
        self.settings = settings
        self.forms: Counter[str] = Counter()

    def read(self, fields: Fields, origin: str) -> Fields:
        """`read_row`, counted."""
        found, label = read_row(fields, self.settings, origin)
        self.forms[label] += 1
        return found

    def close(self, stage: str, source: str) -> None:
        """Report the formats of the rows."""
        if self.forms:
            said = ", ".join(label if len(self.forms) == 1 else f"{n:,} {label}" for label, n in self.forms.most_common())
            say(stage, f"{source} is read as {said}")


@dataclass(frozen=True)
class Form:
    """A format of rows.

    Attributes:
        label: what it is called, for people.
        fits: whether a row is of it, by its fields.
        read: the fields in our names, and the names of those that went into them, but for the system message and the tools.
    """

    label: str
    fits: Callable[[Fields], bool]
    read: Callable[[Fields, Mapping[str, str]], tuple[Fields, tuple[str, ...]]]


def read_row(fields: Fields, settings: RowReading, origin: str) -> tuple[Fields, str]:
    """A row with its conversation under standard names, and the label of its format.

    Args:
        fields: of the row.
        settings: how rows are to be read.
        origin: of the row.

    Raises:
        UnreadableError: it is of no form that is known, or not of the one that it should be of.
    """
    check_reserved(fields, origin)
    for ours, theirs in settings.columns.items():
        if theirs not in fields:
            raise UnreadableError(f"has no field {theirs} (columns.{ours}), only {_listed(fields)}", origin)
    renamed = {theirs: ours for ours, theirs in settings.columns.items()}
    if renamed:
        kept = {name: value for name, value in fields.items() if name in renamed or name not in settings.columns}
        fields = {renamed.get(name, name): value for name, value in kept.items()}
    name = settings.format if settings.format != "auto" else next((key for key, form in FORMS.items() if form.fits(fields)), None)
    if name is None:
        raise UnreadableError(
            f"has no conversation in a known format, only {_listed(fields)}; set `columns` or `template`, or `format` to one of "
            + ", ".join(FORMATS),
            origin,
        )
    form = FORMS[name]
    if not form.fits(fields):
        raise UnreadableError(f"is not of format {name} ({form.label}), but has {_listed(fields)}", origin)
    try:
        found, used = form.read(fields, settings.roles)
        if name != "text":
            found, used = {**found, **_tools(fields)}, (*used, "tools")
        if name not in ("text", "requests"):
            found, used = _with_system(found, fields, used)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableError(f"cannot be read as {form.label}: {error}", origin) from None
    return {**{key: value for key, value in fields.items() if key not in used}, **found}, form.label


def check_reserved(fields: Fields, origin: str) -> None:
    """Refuse a row with the field that records how a stored row was made.

    Raises:
        UnreadableError: it has it.
    """
    if OURS in fields:
        raise UnreadableError(f"has a field {OURS}, which is reserved; give it another name", origin)


def _listed(fields: Fields) -> str:
    return ", ".join(map(str, fields)) or "no fields"


def _is_list_of(value: Any, *names: str) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and set(names) <= item.keys() for item in value)


def _turns_field(fields: Fields, *names: str) -> str | None:
    """The field that holds a list of such turns."""
    there = ("messages", "conversations", "conversation", "dialog", "turns")
    return next((name for name in there if _is_list_of(fields.get(name), *names)), None)


def _messages(fields: Fields, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    """OpenAI: `messages` with role and content."""
    name = _turns_field(fields, "role") or "messages"
    return {"messages": _in_our_roles(fields[name], roles)}, (name,)


def _in_our_roles(messages: Any, roles: Mapping[str, str]) -> Any:
    """Messages by speaker; a text is a message of a known role."""
    if not isinstance(messages, list):
        return messages
    known = {"developer": "system", **roles}
    has_role = [isinstance(message, dict) and "role" in message for message in messages]
    return [
        {**message, "role": known.get(message["role"], message["role"])} if has else message
        for message, has in zip(messages, has_role, strict=True)
    ]


def _sharegpt(fields: Fields, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    name = _turns_field(fields, "from", "value") or "conversations"
    messages = []
    for number, turn in enumerate(fields[name], start=1):
        role = roles.get(turn["from"]) or _SPEAKERS.get(str(turn["from"]).lower())
        if role is None:
            raise ValueError(f"turn {number} is from {turn['from']!r}; assign a role to it in `roles`")
        if turn["from"] == "function_call":
            called = json.loads(turn["value"])
            call = {"type": "function", "function": {"name": called["name"], "arguments": called.get("arguments", {})}}
            message = {"role": role, "content": None, "tool_calls": [call]}
        else:
            message = {"role": role, "content": turn["value"]}
        messages.append(message | {key: value for key, value in turn.items() if key in _OF_TURNS and value is not None})
    return {"messages": messages}, (name,)


def _with_system(found: Fields, fields: Fields, used: tuple[str, ...]) -> tuple[Fields, tuple[str, ...]]:
    """The conversation with the system message given next to it, unless it begins with one."""
    key = "messages" if "messages" in found else "prompt"
    messages = [{"role": "user", "content": found[key]}] if isinstance(found[key], str) else found[key]
    has_one = isinstance(messages, list) and messages and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    name = next((name for name in _SYSTEM if isinstance(fields.get(name), str) and fields[name].strip()), None)
    if name is None or has_one or not isinstance(messages, list):
        return found, used
    return {**found, key: [{"role": "system", "content": fields[name]}, *messages]}, (*used, name)


def _tools(fields: Fields) -> Fields:
    tools = fields.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else None
    if tools and not isinstance(tools, list):
        raise ValueError("`tools` must be a list")
    return {"tools": tools} if tools else {}


def _first(fields: Fields, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(fields.get(name), str)), None)


def _asked(fields: Fields, name: str, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    """One question, its context, and its answer if there is one; with the earlier turns in Alpaca's `history`."""
    context, answer = _first(fields, tuple(key for key in _CONTEXTS if key != name)), _first(fields, _ANSWERS)
    asked = [fields[name], fields[context].strip() if context else ""]
    messages: list[Any] = []
    for question, reply in fields.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    messages.append({"role": "user", "content": "\n\n".join(text for text in asked if text.strip())})
    used = tuple(key for key in (name, context, "history") if key)
    return ({"prompt": messages, "completion": fields[answer]}, (*used, answer)) if answer else ({"prompt": messages}, used)


def _asked_by(names: tuple[str, ...]) -> Callable[[Fields, Mapping[str, str]], tuple[Fields, tuple[str, ...]]]:
    return lambda fields, roles: _asked(fields, _first(fields, names) or names[0], roles)


def _preference(fields: Fields, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    """DPO: the chosen text is the answer; both may be whole conversations, with or without the prompt."""
    chosen, prompt = fields["chosen"], next((name for name in ("prompt", *_QUESTIONS) if fields.get(name)), None)
    before = fields[prompt] if prompt else []
    before = [{"role": "user", "content": before}] if isinstance(before, str) else _in_our_roles(before, roles)
    used = ("chosen", "prompt", *_QUESTIONS)
    if isinstance(chosen, dict):
        chosen = [chosen]
    if isinstance(chosen, str):
        return {"prompt": before, "completion": chosen}, used
    read = (
        _sharegpt({"conversations": chosen}, roles)
        if _is_list_of(chosen, "from", "value")
        else _messages({"messages": chosen}, roles)
    )
    messages = read[0]["messages"]
    return {"messages": messages if len(messages) > 1 else [*before, *messages]}, used


def _hh_rlhf(fields: Fields, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    """Anthropic's HH-RLHF: `chosen` is a transcript of Human and Assistant."""
    parts = _TURN.split(fields["chosen"])
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return {"messages": [{"role": _SPEAKERS[who.lower()], "content": text} for who, text in pairs]}, ("chosen",)


def _kto(fields: Fields, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    """KTO: an answer and whether it is desirable."""
    answer = {"role": "assistant", "content": fields["completion"], "weight": int(bool(fields["label"]))}
    given = fields["completion"]
    completion = [{**given[0], "weight": int(bool(fields["label"]))}] if isinstance(given, list) else [answer]
    asked, used = _as_it_is({"prompt": fields["prompt"], "completion": completion}, roles)
    return asked, (*used, "label")


def _oasst(fields: Fields, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    """A tree of OpenAssistant: from the root along the highest-ranked replies."""
    messages, node = [], fields["prompt"]
    while node:
        messages.append({"role": _SPEAKERS[node["role"]], "content": node["text"]})
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        node = min(replies, key=_rank, default=None)
    while len(messages) > 1 and messages[-1]["role"] != "assistant":
        messages.pop()
    return {"messages": messages}, ("prompt",)


def _rank(reply: Fields) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else rank


def _mt_bench(fields: Fields, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    """MT-bench: only the user's turns, of which the first is used."""
    return {"prompt": fields["turns"][0]}, ("turns",)


def _as_it_is(fields: Fields, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    there = ("prompt", "completion") if "completion" in fields else ("prompt",)
    return {name: _in_our_roles(fields[name], roles) for name in there}, there


def _text(fields: Fields, roles: Mapping[str, str]) -> tuple[Fields, tuple[str, ...]]:
    name = "text" if isinstance(fields.get("text"), str) else "content"
    return {"text": fields[name]}, (name,)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and not _is_list_of(value, "from", "value"))


# In the order in which they are tried.
FORMS: dict[str, Form] = {
    "requests": Form("recorded requests", lambda row: isinstance(row, Recorded), _messages),
    "messages": Form(
        "OpenAI chat (messages)",
        lambda row: isinstance(row.get("messages"), list) and not _turns_field(row, "from", "value"),
        _messages,
    ),
    "sharegpt": Form("ShareGPT (conversations)", lambda row: _turns_field(row, "from", "value") is not None, _sharegpt),
    "conversations": Form("conversations of role and content", lambda row: _turns_field(row, *_MESSAGE) is not None, _messages),
    "hh-rlhf": Form(
        "HH-RLHF (chosen, a transcript)",
        lambda row: isinstance(row.get("chosen"), str) and row["chosen"].startswith("\n\nHuman:"),
        _hh_rlhf,
    ),
    "preference": Form("preference pairs (chosen, rejected)", lambda row: isinstance(row.get("chosen"), str | list), _preference),
    "oasst": Form(
        "OpenAssistant trees (prompt with replies)",
        lambda row: isinstance(row.get("prompt"), dict) and "text" in row["prompt"],
        _oasst,
    ),
    "kto": Form(
        "KTO (prompt, completion, label)",
        lambda row: {"prompt", "completion"} <= row.keys() and isinstance(row.get("label"), bool),
        _kto,
    ),
    "completion": Form("prompt and completion", lambda row: {"prompt", "completion"} <= row.keys(), _as_it_is),
    "mt-bench": Form(
        "MT-bench (turns)",
        lambda row: isinstance(row.get("turns"), list) and bool(row["turns"]) and isinstance(row["turns"][0], str),
        _mt_bench,
    ),
    "alpaca": Form(
        "Alpaca or Dolly (instruction)", lambda row: isinstance(row.get("instruction"), str), _asked_by(("instruction",))
    ),
    "question": Form("questions and answers", lambda row: _first(row, _QUESTIONS) is not None, _asked_by(_QUESTIONS)),
    "prompt": Form(
        "prompts and their answers",
        lambda row: isinstance(row.get("prompt"), str) and _first(row, _ANSWERS) is not None,
        _asked_by(("prompt",)),
    ),
    "prompts": Form("prompts", lambda row: _is_prompt(row.get("prompt")), _as_it_is),
    "input": Form(
        "inputs and outputs",
        lambda row: isinstance(row.get("input"), str) and _first(row, _ANSWERS) is not None,
        _asked_by(("input",)),
    ),
    "text": Form("text", lambda row: isinstance(row.get("text"), str) or isinstance(row.get("content"), str), _text),
}
assert set(FORMS) == set(FORMATS)
