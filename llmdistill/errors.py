"""The one exception for bad input, and the one for a service that fails."""

import difflib
from collections.abc import Collection


class InputError(ValueError):
    """The user's input is wrong: the message names the file and the key, and says what would be right.

    A `ValueError`, as a library's user expects. The command line prints the message alone and exits with status 2.
    """


class RemoteError(Exception):
    """The Hugging Face Hub or a teacher's server, or the way to it, failed: the same call may work later.

    The command line prints the message alone and exits with status 1.
    """


def no_such_key(section: str, name: str, known: Collection[str], why: str) -> InputError:
    """The error for a key under `section` that another library does not know, with the nearest that it does."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {section}.{near[0]}?" if near else ""
    return InputError(f"no such key {section}.{name}: {why}{hint}")
