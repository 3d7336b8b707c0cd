"""Prompts: lines of a JSONL file, turned into chat messages by a template."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import TypeAdapter, ValidationError

from llmdistill.config import Prompts, Section, explain, read_yaml
from llmdistill.errors import InputError

Messages = list[dict[str, str]]


class Message(Section):
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    """The text; in a template, with Jinja expressions."""


class Template(Section):
    """A prompt template: a YAML file whose message contents are Jinja."""

    name: str
    """Short name."""
    description: str
    """What it is for."""
    variables: list[str]
    """Fields that a line of the source must have."""
    messages: list[Message]
    """The conversation up to the turn that the teacher writes."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that the teacher is to continue, and where it came from."""

    messages: Messages
    origin: str
    metadata: dict[str, Any] = field(default_factory=dict)


_MESSAGES: TypeAdapter[list[Message]] = TypeAdapter(list[Message])


def load_prompts(section: Prompts) -> list[Prompt]:
    """Read and render every prompt; a conversation that is there twice is kept once.

    Raises:
        InputError: naming the file and the line or key.
    """
    source = Path(section.source)
    template = load_template(Path(section.template)) if section.template else None
    found: dict[str, Prompt] = {}
    for number, fields in read_jsonl(source):
        origin = f"{source} line {number}"
        messages = render(template, fields, origin) if template else _given_messages(fields, origin)
        if section.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": section.system}, *messages]
        used = template.variables if template else ()
        found.setdefault(json.dumps(messages), Prompt(messages, origin, metadata(fields, used)))
        if len(found) == section.limit:
            break
    if not found:
        raise InputError(f"{source}: holds no prompts")
    return list(found.values())


def load_template(file: Path) -> Template:
    """Read a template file.

    Raises:
        InputError: naming the file and the key.
    """
    try:
        return Template.model_validate(read_yaml(file))
    except ValidationError as error:
        raise InputError("\n".join(f"{file}: {explain(detail)}" for detail in error.errors())) from None


def read_jsonl(file: Path, key: str = "prompts.source") -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file one by one, each with its line number, counted from 1; blank lines are passed over.

    Raises:
        InputError: naming the file and the line.
    """
    try:
        # A line ends at a line feed only: the other separators that Python knows may stand inside a string.
        with file.open(encoding="utf-8", newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, _parse(line, f"{file} line {number}")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file ({key})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None


def _parse(line: str, origin: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{origin}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f'{origin}: must be a JSON object, such as {{"prompt": "…"}}')
    return fields


def render(template: Template, fields: dict[str, Any], origin: str) -> Messages:
    """The template's conversation with the fields in their places.

    Raises:
        InputError: a field is missing, or it cannot be rendered, beginning with `origin`.
    """
    missing = [name for name in template.variables if name not in fields]
    if missing:
        raise InputError(f"{origin}: the template {template.name} needs the field {missing[0]}; the line has {', '.join(fields)}")
    # Values are inserted as they are: braces in them are text, not template code.
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    try:
        return [
            {"role": message.role, "content": environment.from_string(message.content).render(fields).strip()}
            for message in template.messages
        ]
    except TemplateError as error:
        raise InputError(f"{origin}: the template {template.name} cannot be rendered: {error}") from None


def given_conversation(fields: dict[str, Any], origin: str) -> tuple[Messages, Messages]:
    """Prompt and completion of a line, from `messages` that end with the answer, or from `prompt` and `completion`.

    Raises:
        InputError: there are none, beginning with `origin`.
    """
    try:
        if "messages" in fields:
            messages = _as_messages(fields["messages"], "user")
            prompt, completion = messages[:-1], messages[-1:]
        else:
            prompt, completion = _as_messages(fields["prompt"], "user"), _as_messages(fields["completion"], "assistant")
    except (KeyError, ValidationError):
        prompt, completion = [], []
    if not prompt or prompt[-1]["role"] == "assistant" or [message["role"] for message in completion] != ["assistant"]:
        raise InputError(
            f"{origin}: must have `messages`, a list of {{role, content}} that ends with the assistant's answer, "
            "or `prompt` and `completion`"
        )
    return prompt, completion


def metadata(fields: dict[str, Any], used: Iterable[str] = ()) -> dict[str, Any]:
    """What a line says beside its conversation: an expected answer, a topic; kept with the row.

    Args:
        fields: of the line.
        used: those that a template has put into the conversation.
    """
    return {name: value for name, value in fields.items() if name not in ("messages", "prompt", "completion", *used)}


def _as_messages(value: Any, role: str) -> Messages:
    """A string is one message of the role."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [message.model_dump() for message in _MESSAGES.validate_python(value)]


def _given_messages(fields: dict[str, Any], origin: str) -> Messages:
    if isinstance(fields.get("prompt"), str):
        return [{"role": "user", "content": fields["prompt"]}]
    for key in ("messages", "prompt"):
        if key in fields:
            try:
                messages = _MESSAGES.validate_python(fields[key])
            except ValidationError:
                messages = []
            if messages and messages[-1].role != "assistant":
                return [message.model_dump() for message in messages]
            raise InputError(f"{origin}: {key} must be a list of {{role, content}} that ends before the assistant's turn")
    raise InputError(
        f"{origin}: has neither `messages` nor `prompt`; set prompts.template to use {', '.join(fields) or 'its fields'}"
    )
