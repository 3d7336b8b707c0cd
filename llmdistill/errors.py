"""The exceptions whose message is all that the command line prints."""

import difflib
from collections.abc import Collection


class InputError(ValueError):
    """Invalid input. The message names the file and the key, and says what is valid.

    The command line prints only the message and exits with status 2.
    """


class UnusableError(InputError):
    """A row that cannot be used, as it is too long or the chat template refuses it.

    Stages that read many rows leave it out and count the reason, which is in the same words for all rows of its kind.
    """

    def __init__(self, reason: str, origin: str | None = None) -> None:
        super().__init__(f"{origin}: {reason}" if origin else reason)
        self.reason = reason

    def at(self, origin: str) -> "UnusableError":
        """The same, saying where the row stands."""
        return UnusableError(self.reason, origin)


class UnreadableError(UnusableError):
    """A row that cannot be read: it is not valid, or holds no conversation. A share of such rows is no file of ours."""

    def at(self, origin: str) -> "UnreadableError":
        """The same, saying where the row stands."""
        return UnreadableError(self.reason, origin)


class RemoteError(Exception):
    """A remote service (the Hugging Face Hub, an object store, a teacher's server) failed; a retry may succeed.

    The command line prints only the message and exits with status 1.
    """


class BudgetError(Exception):
    """What is left of `teacher.budget` is not enough for the next shard; finished work is kept.

    The command line prints only the message and exits with status 1.
    """


class BusyError(Exception):
    """Another process works in the same directory; a retry may succeed.

    The command line prints only the message and exits with status 1.
    """


class NonFiniteError(ArithmeticError):
    """A loss, a gradient, a weight or a log-probability is infinite or not a number.

    The command line prints only the message and exits with status 1.
    """


def not_installed(
    user: str, library: str, extra: str | None = None, install: str | None = None, instead: str | None = None
) -> InputError:
    """The error for a library that is missing.

    Args:
        user: what needs it, by its key in the configuration.
        library: its name.
        extra: of this package, that it is in.
        install: what `pip install` takes where it is in none; the library's name if that is what it takes.
        instead: what to do without it.
    """
    wanted = f"'llmdistill[{extra}]'" if extra else install or library
    return InputError(
        f"{user} needs {library}, which is not installed: pip install {wanted}" + (f", or {instead}" if instead else "")
    )


def no_such_key(section: str, name: str, known: Collection[str], why: str) -> InputError:
    """The error for a key under `section` that another library does not know, with the nearest that it does."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {section}.{near[0]}?" if near else ""
    return InputError(f"no such key {section}.{name}: {why}{hint}")
