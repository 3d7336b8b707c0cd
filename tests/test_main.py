"""The end of the process: its status, what libraries do at exit, and nothing after that."""

import subprocess
import sys

import pytest

# A module's own objects die when the interpreter is taken down, which is where native threads abort it.
PROGRAM = """
import atexit, sys
from llmdistill import __main__ as command

class Last:
    def __del__(self):
        print("taken down")

last = Last()

def main():
    atexit.register(print, "at exit")
    print("worked")
    {end}

command.main = main
command.run()
"""


@pytest.mark.parametrize(
    ("end", "status"), [("sys.exit(0)", 0), ("sys.exit(2)", 2), ("sys.exit(143)", 143), ("raise ValueError('a fault')", 1)]
)
def test_the_process_ends_with_its_status_and_is_not_taken_down(end, status):
    result = subprocess.run([sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True, timeout=60)
    assert result.returncode == status, result.stderr
    assert result.stdout == "worked\nat exit\n"
    assert ("a fault" in result.stderr) == ("a fault" in end)


def test_a_reader_that_goes_away_is_no_fault_of_exit(tmp_path):
    """`llmdistill --help | head -1`."""
    command = f"{sys.executable} -m llmdistill --help | head -n 1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "usage" in result.stdout


def test_a_reader_of_a_dry_run_may_go_away(experiment_file):
    """The configuration is longer than what a pipe holds for nobody, or is written after `head` has ended."""
    command = f"{sys.executable} -m llmdistill generate {experiment_file} --dry-run | true"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
