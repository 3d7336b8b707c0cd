"""Ends the process when it is told to, whatever it is doing at that moment."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

_AGAIN = 0.05  # seconds
_SIGNALS = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}  # by the exception that each raises


def exit_on_sigterm(then: Callable[[], None] = lambda: None) -> None:
    """Make SIGTERM end this process with status 143, which tells a scheduler to restart the job.

    Python drops an exception that a signal handler raises inside `__del__` or a callback of a C library. The signal, SIGTERM or
    SIGINT, is then sent again.

    Args:
        then: called once, when the first signal arrives.
    """
    seen = False

    def end(signum: int, frame: Any) -> NoReturn:
        nonlocal seen
        if not seen:
            seen = True
            then()
        sys.exit(128 + signum)

    def dropped(error: "sys.UnraisableHookArgs") -> None:
        signum = _SIGNALS.get(error.exc_type)
        if signum is None or sys.is_finalizing():
            before(error)
        else:
            threading.Timer(_AGAIN, os.kill, (os.getpid(), signum)).start()

    before, sys.unraisablehook = sys.unraisablehook, dropped
    signal.signal(signal.SIGTERM, end)
