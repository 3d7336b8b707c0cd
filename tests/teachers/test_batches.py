"""Batch files against a double of an endpoint over HTTP, which counts what it bills."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmdistill import load_dataset
from llmdistill.data.dataset import read_manifest
from tests.conftest import ROOT, run_cli
from tests.forked import context
from tests.teachers.endpoint import Endpoint, serving, write_numbers

pytest.importorskip("openai", reason="the extra `api` is not installed")
ROWS, SHARD = 12, 4
# The command with short pauses, as those of the double are.
FAST = """
import sys
from llmdistill import cli
from llmdistill.teachers import batches
batches.POLL, batches.SETTLES = 0.1, 0.5
cli.main(sys.argv[1:])
"""


@pytest.fixture
def endpoint(smollm2):
    return Endpoint(AutoTokenizer.from_pretrained(smollm2))


@pytest.fixture
def experiment(smollm2, tmp_path):
    prompts = write_numbers(tmp_path, ROWS)
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"""
output: {tmp_path}/run
teacher: {{model: large, engine: openai, url: URL, tokenizer: {smollm2}, licence: mit, batch: true,
          price: {{input: 1000, output: 2000}}}}
prompts: {{source: {prompts}}}
generate: {{max_tokens: 40, rows_per_shard: {SHARD}}}
targets: {{kind: topk, k: 4}}
student: {{model: {smollm2}}}
"""
    )
    return file


def command(file, url, *more):
    return [sys.executable, "-c", FAST, "generate", str(file), "--teacher.url", url, *more]


def run(file, url, *more):
    done = subprocess.run(command(file, url, *more), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_dataset(file.parent / "run/data")


def said(row):
    return row["completion"][0]["content"]


def rows_billed(endpoint):
    return {name: count for name, count in endpoint.billed.items() if name.isdecimal()}


def test_a_shard_is_a_batch_whose_results_come_in_any_order(experiment, endpoint):
    with serving(endpoint) as url:
        rows = run(experiment, url)
    assert [said(row) for row in rows] == [f"You said “Number {n}.” — naïve 🦙." for n in range(ROWS)]
    assert len(endpoint.batches) == ROWS // SHARD
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}
    cost = read_manifest(experiment.parent / "run/data")["cost"]
    assert cost["total"] == pytest.approx((cost["input_tokens"] * 1000 + cost["output_tokens"] * 2000) / 1e6 / 2)
    assert cost["input_tokens"] == 10 * ROWS


def test_rows_without_an_answer_are_asked_for_in_another_batch(experiment, endpoint):
    endpoint.lost = lambda name: name == "5" and len(endpoint.batches) <= ROWS // SHARD  # in the first round
    with serving(endpoint) as url:
        rows = run(experiment, url)
    assert [said(row) for row in rows] == [f"You said “Number {n}.” — naïve 🦙." for n in range(ROWS)]
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}
    assert len(endpoint.batches) == ROWS // SHARD + 1


def test_a_row_that_never_has_an_answer_is_counted(experiment, endpoint):
    endpoint.lost = lambda name: name == "5"
    with serving(endpoint) as url:
        rows = run(experiment, url)
    assert len(rows) == ROWS - 1
    assert read_manifest(experiment.parent / "run/data")["failed"] == {"an error in the batch (server_error)": 1}


def forked(words, log):
    """The command in a process that has done the imports, with short pauses; what it says goes to a file."""
    from llmdistill import cli
    from llmdistill.teachers import batches

    batches.POLL, batches.SETTLES = 0.1, 0.5
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(ROOT)
    with Path(log).open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        cli.main(words)


@pytest.mark.slow
def test_twenty_kills_pay_nothing_twice_and_lose_no_row(experiment, endpoint):
    """At random moments of what comes after the imports; the double goes on with what it has been sent.

    A try that has finished before it was killed is followed by one that makes the dataset anew, of the batches that are there.
    """
    generator, kills, log = random.Random(0), 0, experiment.parent / "log"
    with serving(endpoint) as url:
        while kills < 20:
            endpoint.delay = 1e9 if kills < 8 else 0.0  # no batch ends before the eighth kill
            calls = len(endpoint.times)
            words = ["generate", str(experiment), "--teacher.url", url]
            process = context.Process(target=forked, args=(words, str(log)))
            process.start()
            while len(endpoint.times) == calls and process.is_alive():
                time.sleep(0.01)
            process.join(generator.uniform(0, 0.8))
            finished = not process.is_alive()
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
            kills += not finished
            if finished:
                shutil.rmtree(experiment.parent / "run/data")
        rows = run(experiment, url)
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}
    assert [said(row) for row in rows] == [f"You said “Number {n}.” — naïve 🦙." for n in range(ROWS)]


def test_a_batch_that_is_refused_says_why(experiment, endpoint):
    endpoint.fault = lambda number, path: (400, {}, {"error": {"message": "too many batches"}}) if path == "/batches" else None
    with serving(endpoint) as url:
        done = run_cli("generate", experiment, "--teacher.url", url)
    assert done.returncode == 2
    assert "refuses: too many batches" in done.stderr
