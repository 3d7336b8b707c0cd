"""What is left of a process that is killed outright: nothing that it had started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmdistill.teachers import guard

PARENT = f"""
import os, subprocess, sys, time
command = [sys.executable, "-I", "-S", {guard.__file__!r}, str(os.getpid())]
guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
child = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True)
print(guard.pid, child.pid, child.stdout.readline().decode(), flush=True)
time.sleep(600)
"""


def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="there is no /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_process_that_is_killed(end):
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    assert all(map(is_there, pids))
    time.sleep(2 * guard._SECONDS + 1)
    os.kill(process.pid, end)
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(is_there, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_there, pids))
