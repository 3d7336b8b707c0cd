"""The one exception for bad input, and the one for a service that fails."""


class InputError(Exception):
    """The user's input is wrong: the message names the file and the key, and says what would be right.

    The command line prints the message alone and exits with status 2.
    """


class RemoteError(Exception):
    """The Hugging Face Hub or a teacher's server, or the way to it, failed: the same call may work later.

    The command line prints the message alone and exits with status 1.
    """
