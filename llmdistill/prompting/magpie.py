"""Magpie (2406.08464): a teacher that sees only what precedes the user's turn writes that turn itself."""

from collections.abc import Sequence
from itertools import takewhile

from llmdistill.data.rows import Messages
from llmdistill.data.targets import Array
from llmdistill.errors import InputError, UnusableError
from llmdistill.prompting.asking import Answer
from llmdistill.teachers.prompt_encoding import PromptEncoder

_SENTINEL = "MAGPIE0PIE0TURN"  # what no template holds, and none trims or escapes


class PreQueryFormat:
    """The user's turn in a conversation, after the system message if there is one.

    Args:
        chat: of the teacher.
        with_system: whether there will be a system message.

    Raises:
        InputError: the chat template does not show where a user's turn stands, or no system message.
    """

    def __init__(self, chat: PromptEncoder, with_system: bool = False) -> None:
        teacher = chat.experiment.teacher
        if teacher.abilities.api and teacher.api == "chat":
            raise InputError(
                f"magpie needs raw prompts, but engine {teacher.engine} sends conversations; set teacher.api to completions, or "
                "remove the step"
            )
        self.template = chat.template
        self._special = {number for number, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
        try:
            _, after = self._around([{"role": "system", "content": "system"}] if with_system else [])
        except UnusableError as error:
            raise InputError(f"teacher.model: magpie cannot be used with it: {error}") from None
        self._end = next((line.strip() for line in after.splitlines() if line.strip()), "")

    def ids(self, messages: Messages, origin: str) -> Sequence[int]:
        """The text that the chat template puts before the user's turn."""
        return self._around(messages)[0]

    def messages(self, messages: Messages) -> None:
        """None: it is not a conversation."""

    def answer(self, ids: Array, finish_reason: str) -> Answer:
        """The text up to a special token, or to what the template puts after a user's turn.

        A template may end the turn by words, which the engine does not stop at: then the teacher has gone on to answer.
        """
        turn = list(takewhile(lambda token: token not in self._special, ids.tolist()))
        text, end, _ = self.template.decode(turn, special=True).partition(self._end or "\0")
        return Answer(text.strip(), "stop" if end or len(turn) < len(ids) else finish_reason)

    def _around(self, system: Messages) -> tuple[list[int], str]:
        return self.template.around(_SENTINEL, [*system, {"role": "user", "content": _SENTINEL}])
