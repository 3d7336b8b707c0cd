"""Processes that check answers with a program, for the steps `math` and `python`, and for queries of tasks.

What a model wrote can keep such a program busy for ever, fill the memory or crash it. It runs in processes of its own,
which get no part of the environment, and are killed when a row takes too long; that row has failed, no other.
"""

import json
import math
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from llmdistill.config.machine import count_cores
from llmdistill.curation.steps import Failed, StepContext, excerpt

_START_SECONDS = 60.0  # for a process to be there and to have done its imports
Request = dict[str, Any]


class Workers:
    """As many processes as there are available cores, each with one request at a time."""

    def __init__(self, timeout_s: float, first: Request, context: StepContext) -> None:
        count = count_cores()
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for _ in range(count):
            worker = Worker(timeout_s, first)
            context.closing.callback(worker.kill)
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(count)
        context.closing.callback(self._threads.shutdown, wait=False, cancel_futures=True)  # before the processes are killed

    def ask(self, requests: Iterator[Request]) -> Iterator[str | None]:
        """The verdicts, in the order of the requests."""
        return self._threads.map(self._ask, requests)

    def _ask(self, request: Request) -> str | None:
        worker = self._free.get()
        try:
            return worker.ask(request)
        finally:
            self._free.put(worker)


class Worker:
    """One process, started when it is needed; `first` is a request on which nothing depends, to do the imports."""

    def __init__(self, timeout_s: float, first: Request) -> None:
        self.timeout_s = timeout_s
        self.first = first
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Request) -> str | None:
        """The verdict, or that there is none."""
        if self._process is None:
            seconds = math.ceil(self.timeout_s + _START_SECONDS)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmdistill.curation.verify_worker", str(seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
            )
            if self._exchange(self._process, self.first, _START_SECONDS) != b"null\n":
                raise RuntimeError("the verification process (llmdistill.curation.verify_worker) failed to start")
        line = self._exchange(self._process, request, self.timeout_s)
        if not line:
            self.kill()
            return Failed(f"killed after {self.timeout_s:g} s" if line is None else "the verification process crashed")
        verdict = json.loads(line) or {}
        if "failed" in verdict:
            return Failed(excerpt(verdict["failed"], 200))
        return excerpt(verdict["rejected"], 200) if "rejected" in verdict else None

    def kill(self) -> None:
        """Stop the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    @staticmethod
    def _exchange(process: "subprocess.Popen[bytes]", request: Request, timeout_s: float) -> bytes | None:
        """The answer line; empty if the process has exited, None if time is up."""
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        return process.stdout.readline() if ready else None
