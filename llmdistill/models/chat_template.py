"""A tokenizer with its chat template: the one way from a conversation to token ids, and from token ids to text.

What `generate`, `score`, `convert`, `train` and `chat` tokenise goes through here, so a conversation has the same ids
wherever it is read. Three rules hold:

- Words are words: the name of a special token in a message is encoded as plain text. Only the template writes special tokens.
- The prompt is the one that a server would be given: the template with `add_generation_prompt`. An answer is what follows it,
  up to and with the token that ends the turn.
- What the template does not show is never dropped in silence: the conversation is refused, and the field is named.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from llmdistill.errors import InputError, UnusableError

Array = np.ndarray[Any, Any]
Conversation = Sequence[Mapping[str, Any]]

_NOT_SHOWN = ("role", "content", "tool_call_id")  # not looked for by itself: the text is, and an identifier says nothing
_OPEN_TRACE = re.compile(r"<think>\s*$")  # a prompt that begins the reasoning trace of the answer
_CLOSED_TRACE = "</think>"
_TRACE_MARKS = ("<think>", _CLOSED_TRACE, "[THINK]", "[/THINK]")  # an assistant's, also where they are special tokens
_SHORT = 12  # characters; so few may stand in a template's own words
_PLACEHOLDERS = 0x10FF00  # the first of the private use characters that stand for the names of special tokens


class ChatTemplate:
    """Encodes conversations by the template of a tokenizer.

    Args:
        tokenizer: a fast one of transformers; without a chat template it encodes text alone.
        end_ids: the tokens that end an answer.
        variables: more variables of the template, such as `enable_thinking`.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int], variables: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.variables = dict(variables or {})
        added = tokenizer.added_tokens_decoder
        self._special_ids = {number for number, token in added.items() if token.special}
        self._special = _any_of(token.content for token in added.values() if token.special)
        self._special_but_marks = _any_of(
            token.content for token in added.values() if token.special and token.content not in _TRACE_MARKS
        )

    def prompt_ids(self, messages: Conversation, tools: Sequence[Any] | None = None) -> list[int]:
        """A conversation up to where the assistant's answer begins.

        Raises:
            UnusableError: the template refuses it, or does not show all of it.
        """
        return self._encode(*self._rendered(messages, tools, True))

    def turn_ids(
        self, prompt: Conversation, answer: Mapping[str, Any], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """`prompt_ids`, and what the model would have written after them for this answer, with the token that ends it.

        Raises:
            UnusableError: the template refuses it, does not show all of it, or does not begin it with its prompt.
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
            # A boundary inside a token, as before a line feed: the answer's tokens are its own, as the model writes them.
            if self.decode(before_ids + ids, special=True) != self.decode(self._encode(before + rest, names), special=True):
                raise UnusableError("the tokens of the answer cannot be told from those of the prompt")
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), len(ids) - 1)
        ids = ids[: end + 1]
        if not any(token not in self.end_ids for token in ids):
            raise UnusableError("the answer is empty")
        return before_ids, ids

    def around(self, mark: str, messages: Conversation) -> tuple[list[int], str]:
        """The token ids of what stands before a text that is in one of the messages, and what follows it up to the answer.

        Raises:
            UnusableError: the template refuses the messages, or shows that text not once.
        """
        text, names = self._rendered(messages, None, True)
        before, *behind = text.split(mark)
        if len(behind) != 1:
            raise UnusableError("the chat template does not show what the user says, or not once")
        return self._encode(before, names), behind[0]

    @cached_property
    def begins_traces(self) -> bool:
        """Whether every prompt begins the reasoning trace of its answer."""
        return self._begins_trace([{"role": "user", "content": "question"}], None)

    def text_ids(self, text: str) -> list[int]:
        """Text without turns, as the tokenizer begins it; the names of special tokens in it are special tokens.

        Raises:
            UnusableError: it has fewer than two tokens, so that nothing foretells any of them.
        """
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if len(ids) < 2:
            raise UnusableError("the text has fewer than two tokens")
        return ids

    def decode(self, ids: Sequence[int] | Array, special: bool = False) -> str:
        """The text of token ids, as it stands in them; with special tokens by their names, or without them."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text

    def _begins_trace(self, prompt: Conversation, tools: Sequence[Any] | None) -> bool:
        return _OPEN_TRACE.search(self._rendered(prompt, tools, True)[0]) is not None

    def _rest(self, before: str, text: str, content: str) -> str:
        """What stands behind the prompt, where its ids are no beginning of the conversation's."""
        if text.startswith(before):
            return text[len(before) :]
        # A template may begin a trace in every prompt and show none in an answer, as that of DeepSeek-R1 does.
        opened = _OPEN_TRACE.search(before)
        if opened and text.startswith(before[: opened.start()]):
            rest = text[opened.start() :]
            if rest.startswith("<think>"):  # it closes an empty trace itself, without the prompt's line feed
                return rest.removeprefix("<think>")
            if _CLOSED_TRACE not in content:
                return f"\n{_CLOSED_TRACE}\n\n{rest}"  # an empty trace
            trace, _, _ = content.rpartition(_CLOSED_TRACE)
            return trace.removeprefix("<think>").lstrip("\n") + _CLOSED_TRACE + rest
        raise UnusableError("in the chat template the conversation does not begin with its prompt")

    def _rendered(
        self, messages: Conversation, tools: Sequence[Any] | None, prompt: bool, names: dict[str, str] | None = None
    ) -> tuple[str, dict[str, str]]:
        """The text of the template, with a character in the place of each name of a special token, and those names.

        Raises:
            UnusableError: the template refuses it, or does not show all of it.
        """
        names = {} if names is None else names
        plain = [self._plain(_parsed_calls(message), names, message.get("role") == "assistant") for message in messages]
        offered = self._plain(list(tools), names) if tools else None
        if names:
            given = json.dumps([list(messages), tools], ensure_ascii=False)
            if any(mark in given for mark in names):
                raise UnusableError("it holds the name of a special token and private use characters")
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
            except Exception as error:  # templates raise whatever they like
                refused.append(error)
        raise UnusableError(f"the chat template refuses it: {refused[0]}")

    def _apply(self, messages: Conversation, tools: Sequence[Any] | None, prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=prompt, tokenize=False, **self.variables
        )
        return text

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template shows a content only where it is a list of parts, as those of some multimodal models do."""
        message = {"role": "user", "content": "question"}
        for form in (message, _in_parts(message)):
            with suppress(Exception):  # templates raise whatever they like
                if "question" in self._apply([form], None, True):
                    return form is not message
        return False

    def _check_shown(self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None, prompt: bool) -> None:
        """The same conversation without a part of it has to read otherwise."""

        def same(others: list[dict[str, Any]], offered: list[Any] | None, whole: Callable[[], str]) -> bool:
            try:
                return self._render(others, offered, prompt) == whole()
            except UnusableError:
                return False

        if tools and same(messages, None, lambda: text):
            raise UnusableError("the chat template does not show `tools`")
        for number, message in enumerate(messages):
            upto = messages[: number + 1]  # a trace is shown in the last answer, if anywhere
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

    def _plain(self, value: Any, names: dict[str, str], answer: bool = False) -> Any:
        """The same with a private use character for each name of a special token; `names` learns which stands for which."""

        def mark(found: re.Match[str]) -> str:
            known = next((mark for mark, name in names.items() if name == found[0]), chr(_PLACEHOLDERS + len(names)))
            names[known] = found[0]
            return known

        if isinstance(value, str):
            return (self._special_but_marks if answer else self._special).sub(mark, value)
        if isinstance(value, Mapping):
            return {key: self._plain(other, names, answer) for key, other in value.items()}
        return [self._plain(other, names, answer) for other in value] if isinstance(value, list) else value

    def _encode(self, text: str, names: dict[str, str]) -> list[int]:
        """Token ids of rendered text; the names of special tokens that stand in it as plain text.

        Raises:
            UnusableError: this tokenizer does not encode a part of a text as it does inside the whole.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(names))
        ids: list[int] = encoded["input_ids"]
        if not names:
            return ids
        found: list[int] = []
        part: list[int] = []  # the places of the tokens between two special ones

        def close() -> None:
            offsets = [encoded["offset_mapping"][place] for place in part]
            words = text[offsets[0][0] : offsets[-1][1]] if part else ""
            inside = [ids[place] for place in part]
            if not any(mark in words for mark in names):
                found.extend(inside)
                return
            if self._words(words) != inside:
                raise UnusableError("it holds the name of a special token, which this tokenizer cannot encode as text")
            for mark, name in names.items():
                words = words.replace(mark, name)
            found.extend(self._words(words))

        for place, token in enumerate(ids):
            if token in self._special_ids:
                close()
                part = []
                found.append(token)
            else:
                part.append(place)
        close()
        return found

    def _words(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]} if message.get("content") else dict(message)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds each of the names, the longest first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _parsed_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are JSON in a string, as OpenAI's API gives them, as the object that templates expect."""
    return _with_arguments(message, lambda value: json.loads(value) if isinstance(value, str) else value)


def _written_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    return _with_arguments(message, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _with_arguments(message: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    def changed(call: Any) -> Any:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            return {**call, "function": changed(call["function"])}
        if not isinstance(call, Mapping) or "arguments" not in call:
            return call
        try:
            return {**call, "arguments": change(call["arguments"])}
        except ValueError:
            return call  # text that is no JSON stays what it is

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(call) for call in calls]} if isinstance(calls, list) else dict(message)
