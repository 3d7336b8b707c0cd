"""Magpie (2406.08464): a teacher that sees only what comes before the user's turn writes that turn itself."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from llmdistill.data.dataset import Messages
from llmdistill.data.targets import Array
from llmdistill.errors import InputError
from llmdistill.prompting.asking import Answer
from llmdistill.teachers.prompt_encoding import PromptEncoder

_SENTINEL = "MAGPIE0PIE0TURN"  # what no template holds, and none trims or escapes


class PreQueryFormat:
    """The user's turn in a conversation, after the system message if there is one.

    Raises:
        InputError: the chat template does not show where a user's turn stands.
    """

    def __init__(self, chat: PromptEncoder) -> None:
        teacher = chat.experiment.teacher
        if teacher.abilities.api and teacher.api == "chat":
            raise InputError(
                f"teacher.engine {teacher.engine} sends conversations, and magpie has none: set teacher.api to completions, or "
                "remove the step"
            )
        self.tokenizer = chat.tokenizer
        self._special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        _, after = around_user_turn(self.tokenizer, [])
        self._end = next((line.strip() for line in after.splitlines() if line.strip()), "")

    def ids(self, messages: Messages, origin: str) -> Sequence[int]:
        """What the chat template puts before the user's turn."""
        before, _ = around_user_turn(self.tokenizer, messages)
        ids: list[int] = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        return ids

    def messages(self, messages: Messages) -> None:
        """It is no conversation."""

    def answer(self, ids: Array, finish_reason: str) -> Answer:
        """What was written up to a special token, or to what the template puts after a user's turn.

        A template may end the turn by words, which the engine does not stop at: then the teacher has gone on to answer.
        """
        turn = list(takewhile(lambda token: token not in self._special, ids.tolist()))
        text, end, _ = self.tokenizer.decode(turn).partition(self._end or "\0")
        return Answer(text.strip(), "stop" if end or len(turn) < len(ids) else finish_reason)


def around_user_turn(tokenizer: Any, system: Messages) -> tuple[str, str]:
    """What a chat template writes before a user's first message, and after it up to the teacher's turn.

    Args:
        tokenizer: the teacher's.
        system: no message or one, that comes first.

    Raises:
        InputError: the template fails, or the message is not in what it writes, or not once.
    """
    conversation = [*system, {"role": "user", "content": _SENTINEL}]
    try:
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise whatever they like
        raise InputError(f"teacher.model: its chat template refuses a conversation with a user's turn: {error}") from None
    before, *rest = text.split(_SENTINEL)
    if len(rest) != 1:
        raise InputError(
            "teacher.model: its chat template has no user's turn that a teacher could write, so magpie cannot be used with it"
        )
    return before, rest[0]
