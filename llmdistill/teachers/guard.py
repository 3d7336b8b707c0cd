"""A process that outlives another one, to stop what that one started. Run by its path; it imports nothing from the package.

Processes of vLLM do not notice if the process that they work for is killed outright: they would continue, and keep the GPU's
memory from the next attempt. This one watches from the start, since loading a model takes minutes.
"""

import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path

_SECONDS = 0.25  # between checks


def main(parent: int) -> None:
    """Wait until a pipe on stdin, which only `parent` holds open, is closed; then kill everything it started."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal sends them to all; the pipe decides when to exit
        signal.signal(name, signal.SIG_IGN)
    found: set[tuple[int, str]] = set()
    while True:
        ready, _, _ = select.select([0], [], [], _SECONDS)
        if ready and not os.read(0, 1):
            break
        found = {process for process in found if _started(process[0]) == process[1]} | _descendants(parent)
    for pid, started in found:
        if _started(pid) == started:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _descendants(parent: int) -> set[tuple[int, str]]:
    """All descendants of a process except this one; each with its start time, as pids are reused."""
    found: set[tuple[int, str]] = set()
    waiting = [parent]
    while waiting:
        for file in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with suppress(OSError):
                pids = [int(pid) for pid in file.read_text().split() if int(pid) != os.getpid()]
                found |= {(pid, _started(pid)) for pid in pids}
                waiting += pids
    return found


def _started(pid: int) -> str:
    """When a process started, by the kernel's clock; empty if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


if __name__ == "__main__":
    main(int(sys.argv[1]))
