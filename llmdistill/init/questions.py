"""Questions that `init` asks on a terminal."""

import sys

from llmdistill.errors import InputError


def answer(question: str, default: str, choices: list[str] | None = None) -> str:
    """The typed answer on a terminal; otherwise the default.

    Raises:
        InputError: the input has ended.
    """
    if not sys.stdin.isatty():
        return default
    from rich.prompt import Prompt

    try:
        return str(Prompt.ask(question, choices=choices, default=default, show_default=bool(default)))
    except EOFError:
        raise InputError("no answer; nothing was written") from None
