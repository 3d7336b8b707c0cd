"""The one exception for bad input."""


class InputError(Exception):
    """The user's input is wrong: the message names the file and the key, and says what would be right.

    The command line prints the message alone and exits with status 2.
    """
