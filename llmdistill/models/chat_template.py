"""A tokenizer with its chat template: the only way from a conversation to token ids, and from token ids to text.

Everything that `generate`, `score`, `convert`, `train` and `chat` tokenise goes through here, so a conversation always has the
same ids. Three rules hold:

- Text is text: the name of a special token in a message, or of any other token with which the template begins or ends turns,
  is encoded as plain text. Only the template writes such tokens.
- The prompt is the one that a server would get: the template with `add_generation_prompt`. An answer is what follows it, up to
  and including the token that ends the turn.
- Nothing that the template does not show is silently dropped: the conversation is refused, and the field is named.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from llmdistill.errors import InputError, UnusableError

Array = np.ndarray[Any, Any]
Conversation = Sequence[Mapping[str, Any]]

_NOT_SHOWN = ("role", "content", "tool_call_id")  # not searched for: only the text is, and identifiers do not matter
_OPEN_TRACE = re.compile(r"<think>\s*$")  # a prompt that opens the reasoning trace of the answer
_CLOSED_TRACE = "</think>"
_TRACE_MARKS = ("<think>", _CLOSED_TRACE, "[THINK]", "[/THINK]")  # used by assistants, even if they are special tokens
_TAG = re.compile(r"<.+>|\[.+\]")  # excluding white space, which a tokenizer may also add
_SHORT = 12  # characters; texts this short may occur in the template itself
_PLACEHOLDERS = 0x10FF00  # the first of the private use characters that replace the names of special tokens


class ChatTemplate:
    """Encodes conversations with the template of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers; without a chat template it only encodes text.
        end_ids: the tokens that end an answer.
        variables: more variables of the template, such as `enable_thinking`.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int], variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.variables = dict(variables or {})
        added = tokenizer.added_tokens_decoder
        self._added = {number: token.content for number, token in added.items()}
        self._special_ids = {number for number, token in added.items() if token.special}

    def prompt_ids(self, messages: Conversation, tools: Sequence[Any] | None = None) -> list[int]:
        """A conversation up to the start of the assistant's answer.

        Raises:
            UnusableError: if the template refuses it, or does not show all of it.
        """
        return self._encode(*self._rendered(messages, tools, True))

    def turn_ids(
        self, prompt: Conversation, answer: Mapping[str, Any], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """`prompt_ids`, and the tokens that the model would have generated for this answer, including the end token.

        Raises:
            UnusableError: if the template refuses it, does not show all of it, or does not begin it with its prompt.
        """
        if (reasoning := answer.get("reasoning_content")) and self._begins_trace(prompt, tools):
            whole = f"{reasoning.strip()}\n{_CLOSED_TRACE}\n\n{answer.get('content') or ''}"
            answer = {**{key: value for key, value in answer.items() if key != "reasoning_content"}, "content": whole}
        text, names = self._rendered([*prompt, answer], tools, False)
        before, _ = self._rendered(prompt, tools, True, names)
        before_ids, ids = self._encode(before, names), self._encode(text, names)
        if ids[: len(before_ids)] == before_ids:
            ids = ids[len(before_ids) :]
        else:
            rest = self._rest(before, text, self._plain(answer.get("content") or "", names, True))
            ids = self._encode(rest, names)
            # A boundary inside a token, as before a line feed: the answer is tokenised separately, as the model generates it.
            if self.decode(before_ids + ids, special=True) != self.decode(self._encode(before + rest, names), special=True):
                raise UnusableError("the tokens of the answer cannot be separated from those of the prompt")
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), len(ids) - 1)
        ids = ids[: end + 1]
        if not any(token not in self.end_ids for token in ids):
            raise UnusableError("the answer is empty")
        return before_ids, ids

    def around(self, mark: str, messages: Conversation) -> tuple[list[int], str]:
        """The token ids before a text that one of the messages contains, and those after it up to the answer.

        Raises:
            UnusableError: if the template refuses the messages, or does not show the text exactly once.
        """
        text, names = self._rendered(messages, None, True)
        before, *behind = text.split(mark)
        if len(behind) != 1:
            raise UnusableError("the chat template does not show the user's text exactly once")
        return self._encode(before, names), behind[0]

    @cached_property
    def begins_traces(self) -> bool:
        """Whether every prompt opens the reasoning trace of its answer."""
        return self._begins_trace([{"role": "user", "content": "question"}], None)

    def text_ids(self, text: str) -> list[int]:
        """Text without turns, begun as by the tokenizer; names of special tokens in it are special tokens.

        Raises:
            UnusableError: if it has fewer than two tokens, so that none of them is predicted.
        """
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if len(ids) < 2:
            raise UnusableError("the text has fewer than two tokens")
        return ids

    def decode(self, ids: Sequence[int] | Array, special: bool = False) -> str:
        """The text of token ids, including special tokens by name, or without them."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text

    def _begins_trace(self, prompt: Conversation, tools: Sequence[Any] | None) -> bool:
        return _OPEN_TRACE.search(self._rendered(prompt, tools, True)[0]) is not None

    def _rest(self, before: str, text: str, content: str) -> str:
        """The text after the prompt if the prompt's ids are not the beginning of the conversation's."""
        if text.startswith(before):
            return text[len(before) :]
        # A template may open a trace in every prompt but show none in an answer, like that of DeepSeek-R1.
        opened = _OPEN_TRACE.search(before)
        if opened and text.startswith(before[: opened.start()]):
            rest = text[opened.start() :]
            if rest.startswith("<think>"):  # it closes an empty trace, without the prompt's line feed
                return rest.removeprefix("<think>")
            if _CLOSED_TRACE not in content:
                return f"\n{_CLOSED_TRACE}\n\n{rest}"  # an empty trace
            trace, _, _ = content.rpartition(_CLOSED_TRACE)
            return trace.removeprefix("<think>").lstrip("\n") + _CLOSED_TRACE + rest
        raise UnusableError("in the chat template the conversation does not begin with its prompt")

    def _rendered(
        self, messages: Conversation, tools: Sequence[Any] | None, prompt: bool, names: dict[str, str] | None = None
    ) -> tuple[str, dict[str, str]]:
        """The rendered template, with a character instead of each name of a special token, and those names.

        Raises:
            UnusableError: if the template refuses it, or does not show all of it.
        """
        names = {} if names is None else names
        plain = [self._plain(self._filled(message), names, message.get("role") == "assistant") for message in messages]
        offered = self._plain(list(tools), names) if tools else None
        if names:
            given = json.dumps([list(messages), tools], ensure_ascii=False)
            if any(mark in given for mark in names):
                raise UnusableError("it contains the name of a special token and private use characters")
        text = self._render(plain, offered, prompt)
        self._check_shown(text, plain, offered, prompt)
        return text, names

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise InputError(f"the tokenizer of {self.tokenizer.name_or_path} has no chat template; use an instruction-tuned one")
        if self._takes_parts:
            messages = [_in_parts(message) for message in messages]
        forms = [messages]
        if any("tool_calls" in message for message in messages):
            forms.append([_written_calls(message) for message in messages])  # some templates expect arguments as text
        refused: list[Exception] = []
        for form in forms:
            try:
                return self._apply(form, tools, prompt)
            except Exception as error:  # templates may raise anything
                refused.append(error)
        raise UnusableError(f"the chat template refuses it: {refused[0]}")

    def _apply(self, messages: Conversation, tools: Sequence[Any] | None, prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=prompt, tokenize=False, **self.variables
        )
        return text

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template shows a content only if it is a list of parts, as those of some multimodal models do."""
        message = {"role": "user", "content": "question"}
        for form in (message, _in_parts(message)):
            with suppress(Exception):  # templates may raise anything
                if "question" in self._apply([form], None, True):
                    return form is not message
        return False

    def _check_shown(self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> None:
        """Check that the conversation renders differently without each of its parts."""

        def same(others: list[dict[str, Any]], offered: list[Any] | None, whole: Callable[[], str]) -> bool:
            try:
                return self._render(others, offered, prompt) == whole()
            except UnusableError:
                return False

        if tools and same(messages, None, lambda: text):
            raise UnusableError("the chat template does not show `tools`")
        for number, message in enumerate(messages):
            upto = messages[: number + 1]  # a trace is shown only in the last answer, if at all
            for name, value in message.items():
                if name in _NOT_SHOWN or not value:
                    continue
                others = [*upto[:-1], {key: other for key, other in message.items() if key != name}]
                if same(others, tools, lambda upto=upto: self._render(upto, tools, prompt)):  # type: ignore[misc]
                    raise UnusableError(f"the chat template does not show `{name}`")
            content = message.get("content")
            if isinstance(content, str) and content.strip() and (len(content) < _SHORT or content.strip() not in text):
                changed = {**message, "content": f"not {content} either"}
                if same([*upto[:-1], changed, *messages[number + 1 :]], tools, lambda: text):
                    raise UnusableError(f"the chat template does not show the {message['role']} message")

    @cached_property
    def _turn_marks(self) -> set[int]:
        """Added tokens that are not special and that the template writes around turns, such as DeepSeek's `<｜User｜>`."""
        turns = [{"role": role, "content": "words"} for role in ("user", "assistant", "user")]
        try:
            text = self._render(turns, None, True)
        except UnusableError:
            return set()
        return {
            number
            for number, name in self._added.items()
            if number not in self._special_ids and name not in _TRACE_MARKS and _TAG.fullmatch(name) and name in text
        }

    @cached_property
    def _words_of(self) -> dict[bool, re.Pattern[str]]:
        """The names that are plain text when written by a user or, if true, by the assistant."""
        names = [self._added[number] for number in self._special_ids | self._turn_marks]
        return {False: _any_of(names), True: _any_of(name for name in names if name not in _TRACE_MARKS)}

    @cached_property
    def _no_content(self) -> str | None:
        """The content of a message that only calls a tool: empty, or null if its call is shown only then."""
        call = {"id": "call00001", "type": "function", "function": {"name": "lookup", "arguments": {"name": "value"}}}
        for content in ("", None):
            with suppress(UnusableError):
                calling = {"role": "assistant", "content": content, "tool_calls": [call]}
                if "lookup" in self._render([{"role": "user", "content": "question"}, calling], None, False):
                    return content
        return ""

    def _filled(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message in the form that templates expect: arguments as objects, and a content."""
        message = _parsed_calls(message)
        return message if message.get("content") or not message.get("tool_calls") else {**message, "content": self._no_content}

    def _plain(self, value: Any, names: dict[str, str], answer: bool = False) -> Any:
        """The same with a private use character instead of each name of a special token; `names` records which is which."""

        def mark(found: re.Match[str]) -> str:
            known = next((mark for mark, name in names.items() if name == found[0]), chr(_PLACEHOLDERS + len(names)))
            names[known] = found[0]
            return known

        if isinstance(value, str):
            return self._words_of[answer].sub(mark, value)
        if isinstance(value, Mapping):
            return {key: self._plain(other, names, answer) for key, other in value.items()}
        return [self._plain(other, names, answer) for other in value] if isinstance(value, list) else value

    def _encode(self, text: str, names: dict[str, str]) -> list[int]:
        """Token ids of rendered text, with the names of special tokens that it contains as plain text.

        Raises:
            UnusableError: if this tokenizer does not encode part of a text as within the whole.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(names))
        ids: list[int] = encoded["input_ids"]
        if not names:
            return ids
        found: list[int] = []
        part: list[int] = []  # the positions of the tokens between two special ones

        def close() -> None:
            offsets = [encoded["offset_mapping"][place] for place in part]
            words = text[offsets[0][0] : offsets[-1][1]] if part else ""
            inside = [ids[place] for place in part]
            if not any(mark in words for mark in names):
                found.extend(inside)
                return
            if self._words(words) != inside:
                raise UnusableError("it contains the name of a special token, which this tokenizer cannot encode as text")
            for mark, name in names.items():
                words = words.replace(mark, name)
            found.extend(self._words(words))

        for place, token in enumerate(ids):
            if token in self._special_ids or token in self._turn_marks:
                close()
                part = []
                found.append(token)
            else:
                part.append(place)
        close()
        return found

    def _words(self, text: str) -> list[int]:
        """Token ids of text in which no name is a token; by itself, the tokenizer splits only those of special tokens."""
        marks = _any_of(self._added[number] for number in self._turn_marks)
        cuts = [0, *(found.start() + 1 for found in marks.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        ids = [
            token
            for part in parts
            for token in self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]
        if len(parts) > 1 and self.decode(ids, special=True) != text:
            raise UnusableError("it contains the name of a special token, which this tokenizer cannot encode as text")
        return ids


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]} if message.get("content") else dict(message)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds each of the names, longest first; matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _parsed_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Parse arguments given as JSON in a string, as in OpenAI's API, into the object that templates expect.

    Raises:
        UnusableError: if they are not an object.
    """
    return _with_arguments(message, _arguments)


def _arguments(value: Any) -> Mapping[str, Any]:
    try:
        value = json.loads(value.strip() or "{}") if isinstance(value, str) else {} if value is None else value
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, Mapping):
        raise UnusableError("the arguments of a tool call are not a JSON object")
    return value


def _written_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    return _with_arguments(message, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _with_arguments(message: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    def changed(call: Any) -> Any:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            return {**call, "function": changed(call["function"])}
        if not isinstance(call, Mapping) or "arguments" not in call:
            return call
        return {**call, "arguments": change(call["arguments"])}

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(call) for call in calls]} if isinstance(calls, list) else dict(message)
