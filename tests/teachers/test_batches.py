"""Batch files against a double of an endpoint over HTTP, which counts what it bills."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmdistill import load_dataset
from llmdistill.data.manifest import read_manifest
from tests.conftest import ROOT
from tests.forked import context
from tests.teachers.endpoint import Endpoint, new_message_batch, serving, write_numbers

pytest.importorskip("openai", reason="the extra `api` is not installed")
NO_ANTHROPIC = "the extra `anthropic` is not installed; `make .anthropic` puts it beside the environment"
ROWS, SHARD = 12, 4
# A batch of somebody else's, with as many requests as a shard.
OTHERS = [{"custom_id": f"other-{n}", "params": {"messages": [{"content": "Hello"}], "max_tokens": 9}} for n in "abcd"]


@pytest.fixture
def endpoint(smollm2):
    return Endpoint(AutoTokenizer.from_pretrained(smollm2))


@pytest.fixture
def openai(smollm2, tmp_path):
    return written(tmp_path, smollm2, "openai")


@pytest.fixture
def anthropic(smollm2, tmp_path):
    pytest.importorskip("anthropic", reason=NO_ANTHROPIC)
    return written(tmp_path, smollm2, "anthropic")


@pytest.fixture(params=["openai", "anthropic"])
def experiment(request, smollm2, tmp_path):
    pytest.importorskip(request.param, reason=NO_ANTHROPIC)
    return written(tmp_path, smollm2, request.param)


def written(directory, smollm2, engine):
    prompts, file = write_numbers(directory, ROWS), directory / "experiment.yaml"
    of_openai = f"tokenizer: {smollm2}, " if engine == "openai" else ""
    targets = "kind: topk, k: 4" if engine == "openai" else "kind: none"
    file.write_text(
        f"""
output: {directory}/run
teacher: {{model: large, engine: {engine}, url: URL, {of_openai}licence: mit, batch: true,
          price: {{input: 1000, output: 2000}}}}
prompts: {{source: {prompts}}}
generate: {{max_tokens: 40, rows_per_shard: {SHARD}}}
targets: {{{targets}}}
student: {{model: {smollm2}}}
"""
    )
    return file


def words(file, url, *more):
    """What is behind the name of the command; Anthropic's client adds the version itself."""
    address = url.removesuffix("/v1") if "engine: anthropic" in file.read_text() else url
    return ["generate", str(file), "--teacher.url", address, *more]


def ended(file, url, *more):
    """The exit status of the command in a process that has done the imports, and what it has said."""
    log = file.parent / "log"
    process = context.Process(target=forked, args=(words(file, url, *more), str(log)))
    process.start()
    process.join(300)
    return process.exitcode, log.read_text()


def forked(words, log):
    """The command with short pauses, as those of the double are; what it says goes to a file."""
    from llmdistill import cli
    from llmdistill.teachers import batches

    batches.POLL, batches.SETTLES = 0.1, 0.5
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(ROOT)
    with Path(log).open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        cli.main(words)


def run(file, url, *more):
    status, told = ended(file, url, *more)
    assert status == 0, told
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


def test_a_shard_whose_batches_have_all_died_is_asked_for_again_by_the_next_run(experiment, endpoint):
    """Nothing of those was billed, and what they say is read once more and costs no try."""
    endpoint.lost = lambda name: int(name) < SHARD
    with serving(endpoint) as url:
        status, told = ended(experiment, url)
        assert (status, f"{SHARD} of {SHARD} answers had" in told) == (1, True), told
        endpoint.lost = lambda name: False
        rows = run(experiment, url)
    assert [said(row) for row in rows] == [f"You said “Number {n}.” — naïve 🦙." for n in range(ROWS)]
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}


def test_a_row_that_never_has_an_answer_is_counted(experiment, endpoint):
    endpoint.lost = lambda name: name == "5"
    with serving(endpoint) as url:
        rows = run(experiment, url)
    assert len(rows) == ROWS - 1
    error = "api_error" if "engine: anthropic" in experiment.read_text() else "server_error"
    assert read_manifest(experiment.parent / "run/data")["failed"] == {f"an error in the batch ({error})": 1}


def test_requests_without_an_answer_are_asked_again_whatever_has_become_of_them(anthropic, endpoint):
    kinds = {"1": True, "2": "expired", "7": "canceled"}
    endpoint.lost = lambda name: len(endpoint.batches) <= ROWS // SHARD and kinds.get(name, False)
    with serving(endpoint) as url:
        rows = run(anthropic, url)
    assert [said(row) for row in rows] == [f"You said “Number {n}.” — naïve 🦙." for n in range(ROWS)]
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}
    assert [len(batch["requests"]) for batch in endpoint.batches.values()][-2:] in ([2, 1], [1, 2])


def unwritten(file, directory):
    """Make the dataset of its claims again, as if one had been killed before it wrote down the id of its batch."""
    shutil.rmtree(directory / "data")
    claim = directory / ".data.batches" / file
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "id": None}))


def test_a_batch_whose_id_was_not_written_is_waited_for_and_told_by_its_results(anthropic, endpoint):
    """Among one of another dataset with as many requests, which has ended, and one that has not."""
    with serving(endpoint) as url:
        run(anthropic, url)
        for delay in (0, 1e9):
            new_message_batch(endpoint, OTHERS, delay)
        unwritten("00000004-1.json", anthropic.parent / "run")
        rows = run(anthropic, url)
    assert [said(row) for row in rows] == [f"You said “Number {n}.” — naïve 🦙." for n in range(ROWS)]
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}


def test_a_batch_that_may_be_ours_is_waited_for_before_another_is_paid(anthropic, endpoint):
    """Nothing was created for the claim, which is known only once the other batch has ended."""
    with serving(endpoint) as url:
        run(anthropic, url)
        endpoint.batches.pop("msgbatch_2")
        endpoint.billed.subtract(["8", "9", "10", "11"])
        _, other = new_message_batch(endpoint, OTHERS, 1e9)
        made, looks = len(endpoint.batches), []

        def end(number, path):
            looks.extend([path] if path == "/messages/batches" else [])
            endpoint.batches[other["id"]]["delay"] = 1e9 if len(looks) < 20 else 0

        endpoint.fault = end
        unwritten("00000008-1.json", anthropic.parent / "run")
        status, told = ended(anthropic, url)
    assert status == 0, told
    assert "waiting for a batch to end" in told
    assert len(endpoint.batches) == made + 1
    assert len(looks) > 20
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}


def test_results_that_are_no_longer_kept_are_not_paid_again_by_themselves(anthropic, endpoint):
    with serving(endpoint) as url:
        run(anthropic, url)
        unwritten("00000004-1.json", anthropic.parent / "run")
        for batch in endpoint.batches.values():
            batch["archived_at"] = "2020-01-01T00:00:00Z"
        status, told = ended(anthropic, url)
    assert status == 2
    assert "no longer keeps the results of the batch" in told
    assert "Traceback" not in told
    assert len(endpoint.batches) == ROWS // SHARD


@pytest.mark.parametrize("fault", ["cut", "reset", (529, {}, {"error": {"type": "overloaded_error", "message": "Overloaded"}})])
def test_creating_is_not_tried_again_before_it_is_known_whether_it_was_heard(anthropic, endpoint, fault):
    """A cut answer is one of a batch that is there."""
    created = []

    def spoil(number, path):
        if path != "/messages/batches" or created:
            return None
        created.append(number)
        return fault

    endpoint.fault = spoil
    with serving(endpoint) as url:
        rows = run(anthropic, url)
    assert len(rows) == ROWS
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}
    assert len(endpoint.batches) == ROWS // SHARD


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "calls"),
    [("openai", [0, 1, 2, 3, 1, 2]), ("anthropic", [0, 0, 1, 2, 0, 1])],  # the last two look at the batch and read it
    indirect=["experiment"],
)
def test_a_kill_between_a_call_and_its_answer_pays_nothing_twice_and_loses_no_row(experiment, endpoint, calls):
    """Each try is killed at another of its calls; it goes on where the one before was."""
    whole, log, kills = ["--generate.rows_per_shard", str(ROWS)], experiment.parent / "log", 0
    endpoint.delay = 0.15
    with serving(endpoint) as url:
        for call in calls:
            begun = len(endpoint.times)
            process = context.Process(target=forked, args=(words(experiment, url, *whole), str(log)))
            endpoint.headers = lambda number, at=begun + call, process=process: process.kill() if number == at else None
            process.start()
            process.join(120)
            assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
            kills += process.exitcode != 0
        endpoint.headers = lambda number: {}
        rows = run(experiment, url, *whole)
    assert kills > 3
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}
    assert len(endpoint.batches) == 1
    assert [said(row) for row in rows] == [f"You said “Number {n}.” — naïve 🦙." for n in range(ROWS)]


@pytest.mark.slow
def test_twenty_kills_pay_nothing_twice_and_lose_no_row(openai, endpoint):
    """At random moments of what comes after the imports; the double goes on with what it has been sent.

    A try that has finished before it was killed is followed by one that makes the dataset anew, of the batches that are there.
    """
    generator, kills, log = random.Random(0), 0, openai.parent / "log"
    with serving(endpoint) as url:
        while kills < 20:
            endpoint.delay = 1e9 if kills < 8 else 0.0  # no batch ends before the eighth kill
            calls = len(endpoint.times)
            process = context.Process(target=forked, args=(words(openai, url), str(log)))
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
                shutil.rmtree(openai.parent / "run/data")
        rows = run(openai, url)
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}
    assert [said(row) for row in rows] == [f"You said “Number {n}.” — naïve 🦙." for n in range(ROWS)]


def test_a_batch_that_is_refused_says_why(experiment, endpoint):
    endpoint.fault = lambda number, path: (
        (400, {}, {"error": {"message": "too many batches"}}) if path.endswith("/batches") else None
    )
    with serving(endpoint) as url:
        status, told = ended(experiment, url)
    assert status == 2
    assert "refuses: too many batches" in told


def test_an_answer_without_a_choice_is_a_failed_row(openai, endpoint):
    def change(answer, body):
        return {**answer, "choices": []} if body["messages"][-1]["content"] == "Number 5." else answer

    endpoint.change = change
    with serving(endpoint) as url:
        rows = run(openai, url)
    assert len(rows) == ROWS - 1
    assert read_manifest(openai.parent / "run/data")["failed"] == {"no choice": 1}


@pytest.mark.parametrize(("code", "status"), [("token_limit_exceeded", 0), ("invalid_json_line", 2)])
def test_a_batch_that_fails_as_a_whole_can_be_made_again(openai, endpoint, code, status):
    """The first one does: where there are too many it is made again by itself, else by the next run."""
    whole, new = [0], endpoint.batches.__class__

    class Batches(new):
        def __setitem__(self, name, batch):
            whole[0] += 1
            if whole[0] == 1:
                batch |= {"status": "failed", "errors": {"object": "list", "data": [{"code": code, "message": "Not this one"}]}}
                endpoint.lost = lambda custom_id: True  # nothing of it is billed
            else:
                endpoint.lost = lambda custom_id: False
            super().__setitem__(name, batch)

    endpoint.batches = Batches()
    with serving(endpoint) as url:
        found, told = ended(openai, url)
        assert found == status, told
        assert "refuses the batch batch-0: Not this one" in told
        rows = run(openai, url)
    assert [said(row) for row in rows] == [f"You said “Number {n}.” — naïve 🦙." for n in range(ROWS)]
    assert rows_billed(endpoint) == {str(n): 1 for n in range(ROWS)}


def test_a_call_without_an_answer_is_made_again(openai, endpoint):
    """The first look at a batch is not answered; without `teacher.timeout` it would be waited for."""
    looks = []

    def fault(number, path):
        if re.fullmatch(r"/batches/.+", path):
            looks.append(path)
            if len(looks) == 1:
                time.sleep(3)

    endpoint.fault = fault
    begun = time.monotonic()
    with serving(endpoint) as url:
        rows = run(openai, url, "--teacher.timeout", "0.5")
    assert len(rows) == ROWS
    assert len(looks) > ROWS // SHARD
    assert time.monotonic() - begun < 60
