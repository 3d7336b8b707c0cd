import subprocess
import sys

import pytest

ENDED = """
import os, signal, sys, time
from llmdistill.runs.termination import exit_on_sigterm

def send():
    os.kill(os.getpid(), signal.{name})
    time.sleep(10)

class Freed:
    def __del__(self):
        send()

exit_on_sigterm(lambda: print("told", flush=True))
try:
    {moment}
    time.sleep(10)
except KeyboardInterrupt:
    sys.exit(1)
print("went on")
"""


@pytest.mark.parametrize("moment", ["Freed()", "send()"], ids=["finalizer", "code"])
@pytest.mark.parametrize(("name", "status", "said"), [("SIGTERM", 143, "told\n"), ("SIGINT", 1, "")])
def test_a_signal_ends_the_process_wherever_it_arrives(moment, name, status, said):
    """Python drops what a handler raises in a finalizer: here the signal arrives in one, and in ordinary code."""
    script = ENDED.format(name=name, moment=moment)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == status
    assert ended.stdout == said
    assert "ignored" not in ended.stderr


def test_other_errors_of_finalizers_are_shown():
    script = """
from llmdistill.runs.termination import exit_on_sigterm

class Broken:
    def __del__(self):
        raise ValueError("broken")

exit_on_sigterm()
Broken()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert "ValueError: broken" in ended.stderr
