"""Prompt templates: a YAML file with a header and Jinja messages; its variables, and how answers are parsed."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jsonschema
import regex
from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError, model_validator

from llmdistill.config import explain, read_yaml
from llmdistill.config.section import Section, check_schema
from llmdistill.data.jsonl import Fields
from llmdistill.data.rows import Messages
from llmdistill.errors import InputError, UnreadableError
from llmdistill.tasks.answers import bounded

# Values are inserted as they are: braces in them are text, not template code.
_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ITEM = re.compile(r"\s*(?:[-*+•]|\(?\d{1,3}[.):]|(?:Q|Question|Task)\s*\d*\s*[.:])\s+(?=\S)", re.IGNORECASE)
_SECONDS = 1.0  # for a template's pattern on one text or line
_QUOTES = {'"': '"', "“": "”", "'": "'", "`": "`", "**": "**"}


class Message(Section):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """The text; in a template, with Jinja expressions."""


class AnswerFormat(Section):
    """How a step of `prompts.steps` parses the teacher's answer."""

    field: str
    """The field that what was read becomes."""
    form: Literal["text", "lines", "json"] = "text"
    """`text`: the whole answer. `lines`: a list, each entry an item of its own. `json`: an object, whose keys become fields
    too, or a list of such."""
    pattern: str | None = None
    """A regular expression, tried on the text or on each line: its first group, where it matches last, is what is read."""
    stop: list[str] = []
    """The answer ends before the first of these."""
    without: list[str] = []
    """What holds one of these words or phrases, in whatever case, is rejected: those of the template itself, for instance."""
    json_schema: dict[str, Any] | None = None
    """What an object must be like (form json)."""

    @property
    def names(self) -> set[str]:
        """The fields that every item has."""
        return {self.field, *(self.json_schema or {}).get("required", [])}

    @model_validator(mode="after")
    def _is_usable(self) -> "AnswerFormat":
        try:
            groups = regex.compile(self.pattern or "()").groups
        except regex.error as error:
            raise ValueError(f"pattern is not a valid regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"pattern must have one group, it has {groups}")
        if (self.json_schema is not None or self.pattern is not None) and (self.form == "json") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to form json, pattern to the others")
        check_schema(self.json_schema)
        return self


class Head(Section):
    """A template file."""

    name: str
    """Short name."""
    description: str
    """What it is for."""
    variables: list[str]
    """Fields that an item must have."""
    defaults: dict[str, Any] = {}
    """Fields that an item may have, with their values where it has not."""
    answer: AnswerFormat | None = None
    """How a step reads what the teacher answers."""
    messages: list[Message]
    """The conversation up to the turn that the teacher writes."""

    @model_validator(mode="after")
    def _ends_before_the_teacher(self) -> "Head":
        if not self.messages or self.messages[-1].role == "assistant":
            raise ValueError("messages must contain at least one turn and end before the assistant's")
        return self


@dataclass(frozen=True)
class Reading:
    """The contents of an answer: fields of new items, rejected parts, and unreadable parts, with reasons."""

    items: list[Fields]
    rejected: list[tuple[str, str]]
    failed: list[tuple[str, str]]


class PromptTemplate:
    """A compiled template file; `key` is the key of the configuration that names it.

    Raises:
        InputError: names the file and the key, or the variable that its head does not declare.
    """

    def __init__(self, file: Path, key: str) -> None:
        try:
            self.head = Head.model_validate(read_yaml(file, key))
        except ValidationError as error:
            raise InputError("\n".join(f"{file}: {explain(detail)}" for detail in error.errors())) from None
        self.file = file
        declared = {*self.head.variables, *self.head.defaults}
        self._messages: list[tuple[str, Text]] = []
        for number, message in enumerate(self.head.messages):
            text = compile_text(message.content, f"{file}: messages.{number}.content")
            for name in sorted(text.variables - declared):
                raise InputError(f"{file}: messages.{number}.content uses {name}, which is in neither `variables` nor `defaults`")
            self._messages.append((message.role, text))

    @property
    def variables(self) -> list[str]:
        """Fields that an item must have."""
        return self.head.variables

    @property
    def answer(self) -> AnswerFormat:
        """How to parse the answer.

        Raises:
            InputError: the file does not say.
        """
        if self.head.answer is None:
            raise InputError(f"{self.file}: the key answer is missing; a step needs it to parse the teacher's answer")
        return self.head.answer

    def check(self, fields: Fields, origin: str) -> None:
        """Refuse an item that lacks a variable.

        Raises:
            InputError: names the item's origin and the variable.
        """
        for name in self.variables:
            check_field(fields, name, origin, f"the template {self.head.name}")

    def render(self, fields: Fields, origin: str) -> Messages:
        """The conversation about an item.

        Raises:
            UnreadableError: names the item's origin, and what is missing or wrong.
        """
        self.check(fields, origin)
        values = {**self.head.defaults, **{name: value for name, value in fields.items() if value is not None}}
        what = f"the template {self.head.name}"
        return [{"role": role, "content": render_text(text, values, what, origin)} for role, text in self._messages]


def check_field(fields: Fields, name: str, origin: str, what: str) -> None:
    """Refuse fields that lack one, or in which it is null.

    Raises:
        UnreadableError: names their origin, and what needs it.
    """
    if fields.get(name) is None:
        there = f"has an empty {name}" if name in fields else f"has {', '.join(fields) or 'nothing'}"
        raise UnreadableError(f"{what} needs the field {name}; the line {there}", origin)


@dataclass(frozen=True)
class Text:
    """A compiled Jinja template, and the variables that it uses."""

    jinja: Template
    variables: frozenset[str]


def compile_text(text: str, where: str) -> Text:
    """Jinja in a sandbox.

    Raises:
        InputError: it is none, beginning with `where`.
    """
    try:
        return Text(_JINJA.from_string(text), frozenset(meta.find_undeclared_variables(_JINJA.parse(text)) - set(_JINJA.globals)))
    except TemplateSyntaxError as error:
        raise InputError(f"{where}: line {error.lineno} is not valid Jinja: {error.message}") from None


def render_text(text: Text, fields: Fields, what: str, origin: str) -> str:
    """The text with the fields of an item inserted.

    Raises:
        UnreadableError: names the item's origin, and `what` cannot be rendered.
    """
    try:
        return text.jinja.render(fields).strip()
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # a filter raises what it likes
        raise UnreadableError(f"{what} cannot be rendered: {error}", origin) from None


def read_answer(answer: AnswerFormat, text: str, ended: bool) -> Reading:
    """Parse an answer.

    Args:
        answer: how to read it.
        text: what the teacher wrote.
        ended: whether it ended by itself; of what was cut, the last part is not whole.
    """
    stops = [place for place in (text.find(stop) for stop in answer.stop) if place >= 0]
    text, ended = (text[: min(stops)], True) if stops else (text, ended)
    try:
        if answer.form == "json":
            reading = _read_json(answer, text, ended)
        elif answer.form == "lines":
            reading = _read_parts(answer, *list_entries(text, ended))
        else:
            reading = _read_parts(answer, [text] if ended else [], "" if ended else text)
    except TimeoutError:
        reading = Reading([], [], [(text, f"the pattern took more than {_SECONDS:g} s")])
    if not (reading.items or reading.rejected or reading.failed):
        reading.failed.append((text, "empty"))
    items = []
    for fields in reading.items:
        plain = "\n".join(str(value) for value in fields.values())
        repeated = next((words for words in answer.without if _holds(plain, words)), None)
        if repeated is None:
            items.append(fields)
        else:
            reading.rejected.append((plain, f"holds “{repeated}”"))
    return Reading(items, reading.rejected, reading.failed)


def _holds(text: str, words: str) -> bool:
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE))


def list_entries(text: str, ended: bool) -> tuple[list[str], str]:
    """The entries of a list, numbered or with bullets, or else its lines; and the part of the last one that was cut off.

    Text before, between and after the entries of a marked list is not an entry; a line directly below one continues it.
    """
    lines = text.rstrip().splitlines()
    marked = any(_ITEM.match(line) for line in lines)
    entries: list[str] = []
    inside = False  # right below an entry
    depth: int | None = None  # of the first marker; a list inside of an entry stands deeper, and belongs to it
    for line in lines:
        marker = _ITEM.match(line) if marked else re.match(r"\s*(?=\S)", line)
        indent = len(line.expandtabs()) - len(line.expandtabs().lstrip())
        if marker and marked and depth is not None and indent > depth + 1:
            entries[-1] += f" {line.strip()}"
        elif marker:
            depth = indent if depth is None else min(depth, indent)
            entries.append(line[marker.end() :].strip())
        elif inside and line.strip():
            entries[-1] += f" {line.strip()}"
        inside = marked and (bool(marker) or (inside and bool(line.strip())))
    was_cut = not ended and entries and (inside or not marked)
    return (entries[:-1], entries[-1]) if was_cut else (entries, "")


def _read_parts(answer: AnswerFormat, parts: list[str], cut_off: str) -> Reading:
    values = [(part, _value(answer, part)) for part in parts]
    return Reading(
        [{answer.field: value} for _, value in values if value],
        [(part, "no match") for part, value in values if not value and part.strip()],
        [(cut_off, "cut at max_tokens")] if cut_off else [],
    )


def _value(answer: AnswerFormat, text: str) -> str:
    """The relevant part of a text or a line; empty if there is none."""
    if answer.pattern is not None:
        matches = [match for match in regex.findall(answer.pattern, text, timeout=_SECONDS) if match.strip()]
        text = matches[-1] if matches else ""
    text = text.strip()
    for opening, closing in _QUOTES.items():
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and len(text) > 2 * len(opening) and opening not in inner:
            text = inner.strip()
    return text


def _read_json(answer: AnswerFormat, text: str, ended: bool) -> Reading:
    """The first JSON object, or list of objects, in a text with other content; for a truncated list, the complete objects."""
    for place in _openings(text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, place)
            entries, rest = value if isinstance(value, list) else [value], ""
        except (ValueError, RecursionError):
            entries, rest = _whole_entries(text, place)
        if not any(isinstance(entry, dict | str) for entry in entries):
            continue  # such as the number of a footnote
        reading = Reading([], [], [(rest, "not JSON" if ended else "cut at max_tokens")] if rest else [])
        for entry in entries:
            reason = _against(answer, entry)
            if reason:
                reading.rejected.append((json.dumps(entry, ensure_ascii=False), reason))
            else:
                reading.items.append(entry if isinstance(entry, dict) else {answer.field: entry})
        if reading.items or reading.rejected:
            return reading
    return Reading([], [], [(text, "not JSON")])


def _whole_entries(text: str, place: int) -> tuple[list[Any], str]:
    """The readable part of a list that does not end, and the rest of it."""
    entries: list[Any] = []
    between = re.compile(r"\s*,?\s*")
    place = between.match(text, place + 1).end() if text[place] == "[" else len(text)  # type: ignore[union-attr]
    while place < len(text):
        try:
            value, end = json.JSONDecoder().raw_decode(text, place)
        except (ValueError, RecursionError):
            break
        entries.append(value)
        place = between.match(text, end).end()  # type: ignore[union-attr]
    return entries, text[place:]


def _can_show(answer: AnswerFormat, value: Any) -> bool:
    """Whether a template can show it: text or a number; with a schema, which restricts it, anything but null."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None if answer.json_schema else isinstance(value, int | float)


def _openings(text: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"[\[{]", text))


def _against(answer: AnswerFormat, entry: Any) -> str | None:
    """Why an entry is not as requested."""
    if answer.json_schema is not None:
        error = next(bounded(jsonschema.Draft202012Validator)(answer.json_schema).iter_errors(entry), None)
        if error:
            return f"against the schema: {error.json_path} {error.validator}"
    if isinstance(entry, dict):
        return next((f"has no {name}" for name in sorted(answer.names) if not _can_show(answer, entry.get(name))), None)
    return None if isinstance(entry, str) and entry.strip() else "no object"
