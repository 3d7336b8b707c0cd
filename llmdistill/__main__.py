"""`python -m llmdistill`, and the command `llmdistill`."""

import atexit
import os
import sys
from typing import NoReturn

from llmdistill.cli import main


def run() -> NoReturn:
    """`main`, and then an end of the process that does not take the interpreter down.

    A native thread that asks for the interpreter's lock while Python 3.11 is being taken down, as Arrow's readers do,
    aborts the process after all its work is done (apache/arrow#34314). What libraries do at exit is done.
    """
    status = 1  # of what `main` does not catch; the traceback is printed by then

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)  # the first that is registered is the last that is called
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        raise


if __name__ == "__main__":
    run()
