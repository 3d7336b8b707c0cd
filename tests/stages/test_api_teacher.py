"""`generate` with a teacher behind an address, from the command line: cost, budget, cards, and what is refused at once."""

import json

import pytest
from transformers import AutoTokenizer

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.data.manifest import read_manifest
from llmdistill.stages.prompts import token_starts
from tests.conftest import run_cli
from tests.teachers.endpoint import Endpoint, serving, write_numbers

pytest.importorskip("openai", reason="the extra `api` is not installed")
ROWS, SHARD, MOST = 12, 4, 40
PRICE = {"input": 1000.0, "output": 2000.0}


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
teacher: {{model: large, engine: openai, url: "http://127.0.0.1:9/v1", tokenizer: {smollm2}, licence: "https://example.org/terms",
          price: {PRICE}, concurrency: 4}}
prompts: {{source: {prompts}}}
generate: {{max_tokens: {MOST}, rows_per_shard: {SHARD}}}
targets: {{kind: topk, k: 4}}
curate: [{{finish_reason: }}]
student: {{model: {smollm2}}}
eval: {{held_out: 0}}
"""
    )
    return file


def generate(file, url, *more):
    return run_cli("generate", file, "--teacher.url", url, *more)


def test_the_cost_is_in_the_dataset_and_the_card(experiment, endpoint):
    with serving(endpoint) as url:
        assert generate(experiment, url).returncode == 0
        rows = load_dataset(experiment.parent / "run/data")
        curated = run_cli("curate", experiment)
    written = sum(len(row["input_ids"]) - int(row["completion_start"]) - 1 for row in rows)  # the end token is ours
    manifest = read_manifest(experiment.parent / "run/data")
    assert manifest["cost"]["output_tokens"] == written
    assert manifest["cost"]["input_tokens"] == 10 * ROWS
    total = (10 * ROWS * PRICE["input"] + written * PRICE["output"]) / 1e6
    assert manifest["cost"]["total"] == pytest.approx(total)
    assert manifest["cost"]["paid"] == pytest.approx(total + (10 * PRICE["input"] + PRICE["output"]) / 1e6)  # and the probe
    assert manifest["gives"]["top_logprobs"] == 5
    assert "license_link: https://example.org/terms" in (experiment.parent / "run/data/README.md").read_text()
    assert curated.returncode == 0, curated.stderr
    assert f"cost per kept row: {manifest['cost']['paid'] / ROWS:.2g}" in curated.stdout + curated.stderr
    assert read_manifest(experiment.parent / "run/curated")["cost"] == manifest["cost"]


def test_a_budget_stops_between_shards_and_more_money_goes_on(experiment, endpoint, smollm2):
    """A shard is estimated by its longest answers, and costs what it costs: one fits at first, a second one after it."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = len(
        tokenizer.apply_chat_template([{"role": "user", "content": "Number 1."}], add_generation_prompt=True)["input_ids"]
    )
    most = SHARD * (prompt * PRICE["input"] + MOST * PRICE["output"]) / 1e6
    with serving(endpoint) as url:
        little = generate(experiment, url, "--teacher.budget", 0.5 * most)
        assert little.returncode == 2
        assert f"one shard of {SHARD} rows may cost up to" in little.stderr
        assert not endpoint.billed
        assert not (experiment.parent / "run").exists()
        stopped = generate(experiment, url, "--teacher.budget", 1.5 * most)
        assert stopped.returncode == 1
        assert "all finished shards are kept; raise teacher.budget and run the same command to continue" in stopped.stderr
        there = len(list((experiment.parent / "run/data").glob("train-*.parquet")))
        assert 1 <= there < ROWS // SHARD
        done = generate(experiment, url, "--teacher.budget", 10 * most)
        assert done.returncode == 0, done.stderr
    rows = {name: count for name, count in endpoint.billed.items() if "Number" in name}
    assert len(rows) == ROWS
    assert set(rows.values()) == {1}
    assert len(load_dataset(experiment.parent / "run/data")) == ROWS


def test_a_dry_run_asks_nobody_and_says_the_cost(experiment, smollm2):
    done = run_cli("run", experiment, "--dry-run", "--teacher.budget", 3, "--eval.held_out", 0.25)
    assert done.returncode == 0, done.stderr
    assert "costs at most about" in done.stdout + done.stderr
    assert "the budget is 3\n" in done.stdout + done.stderr
    said = [line.split()[0] for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert {"eval", "report"} <= set(said)
    little = run_cli("generate", experiment, "--dry-run", "--teacher.budget", 1e-6)
    assert "the budget is 1e-06, which may not be enough" in little.stdout + little.stderr


def test_a_teacher_that_is_refused_leaves_nothing_that_binds(experiment, endpoint):
    def at_most_five(answer, body):
        for entry in answer["choices"][0]["logprobs"]["content"]:
            del entry["top_logprobs"][5:]
        return answer

    endpoint.change = at_most_five
    with serving(endpoint) as url:
        refused = generate(experiment, url, "--targets.k", 9)
        assert refused.returncode == 2, refused.stderr
        assert "lower targets.k" in refused.stderr
        assert not (experiment.parent / "run/data").exists()
        advised = generate(experiment, url, "--targets.k", 5)
    assert advised.returncode == 0, advised.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--teacher.licence", "null"], "licence is missing"),
        (["--teacher.price", "null", "--teacher.budget", "3"], "budget needs price"),
        (["--targets.kind", "sampled"], "returns only the most likely tokens"),
        (["--targets.kind", "online"], "targets.kind online needs the teacher's weights"),
        (["--teacher.tokenizer", "null"], "needs teacher.tokenizer"),
        (["--teacher.tokenizer", "null", "--targets.kind", "none", "--student.model", "null"],
         "set teacher.tokenizer or student.model"),
        (["--generate.json_schema", "{type: object}"], "json_schema with targets.kind topk needs a teacher that scores its text"),
        (["--rounds", "{n: 1}"], "rounds needs a teacher that scores given text"),
        (["--teacher.engine", "anthropic"], "teacher: tokenizer is for engine openai"),
        (["--teacher.engine", "anthropic", "--teacher.tokenizer", "null", "--targets.kind", "none", "--generate.min_tokens", "5"],
         "generate.min_tokens: engine anthropic has no such parameter"),
        (["--teacher.request_args", "{n: 2}"], "request_args.n: llmdistill sets this field itself"),
        (["--teacher.request_args", "{stream: true}"], "request_args.stream: llmdistill sets this field itself"),
        (["--teacher.request_args", "{temperature: 0.5}"], "request_args.temperature: set generate.temperature"),
        (["--teacher.request_args", "{max_completion_tokens: many}"], "must be a number of tokens"),
        (["--teacher.engine", "transformers"], "has no url; engines server, openai and anthropic have one"),
        (["--teacher.engine", "transformers", "--teacher.url", "null"], "tokenizer is for engines openai and anthropic"),
    ],
)  # fmt: skip
def test_what_an_endpoint_cannot_do_is_refused_at_once(experiment, overrides, said):
    done = run_cli("generate", experiment, *overrides)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_refused_rows_are_counted_and_paid(experiment, endpoint):
    def change(answer, body):
        if body["messages"][-1]["content"] == "Number 3.":
            answer["choices"][0]["message"]["refusal"] = "No."
        return answer

    endpoint.change = change
    with serving(endpoint) as url:
        done = generate(experiment, url)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(experiment.parent / "run/data")
    assert manifest["failed"] == {"a refusal (message.refusal)": 1}
    assert manifest["rows"] == ROWS - 1
    assert manifest["cost"]["input_tokens"] == 10 * ROWS


def test_a_budget_counts_the_longest_answer_that_is_asked_for(experiment, endpoint):
    """Ten times `generate.max_tokens` may come, hidden reasoning included."""
    most = SHARD * (40 * PRICE["input"] + MOST * PRICE["output"]) / 1e6
    longer = f"{{max_tokens: null, max_completion_tokens: {10 * MOST}}}"
    with serving(endpoint) as url:
        done = generate(experiment, url, "--teacher.budget", 1.1 * most, "--teacher.request_args", longer)
    assert done.returncode == 2
    assert f"one shard of {SHARD} rows may cost up to" in done.stderr


def test_a_small_shard_of_refusals_does_not_end_the_stage(experiment, endpoint):
    """Two of three rows tell nothing of the endpoint; a shard of nothing would be no file that others read."""

    def change(answer, body):
        if body["messages"][-1]["content"] in ("Number 10.", "Number 11."):
            answer["choices"][0]["message"]["refusal"] = "No."
        return answer

    endpoint.change = change
    with serving(endpoint) as url:
        done = generate(experiment, url, "--generate.rows_per_shard", 3)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(experiment.parent / "run/data")
    assert manifest["failed"] == {"a refusal (message.refusal)": 2}
    assert manifest["rows"] == ROWS - 2 == len(load_dataset(experiment.parent / "run/data"))


def test_a_shard_of_refusals_alone_is_not_stored(experiment, endpoint):
    endpoint.change = lambda answer, body: (answer["choices"][0]["message"].update(refusal="No."), answer)[1]
    with serving(endpoint) as url:
        done = generate(experiment, url)
    assert done.returncode == 1
    assert f"{SHARD} of {SHARD} answers had a refusal (message.refusal); not stored" in done.stderr


@pytest.mark.parametrize("apart", [True, False])
def test_a_trace_apart_from_the_answer_is_stored_beside_it(experiment, endpoint, apart):
    """What an endpoint gives as the answer is the answer, whole, and also where the model has not reasoned."""

    def change(answer, body):
        if apart:
            answer["choices"][0]["message"]["reasoning_content"] = "Two and two."
        return answer

    endpoint.change = change
    with serving(endpoint) as url:
        done = generate(experiment, url, "--targets", "{kind: none}", "--generate.thinking", "removed")
    assert done.returncode == 0, done.stderr
    for number, row in enumerate(load_dataset(experiment.parent / "run/data")):
        assert row["completion"][0]["content"] == f"You said “Number {number}.” — naïve 🦙."
        assert str(row["finish_reason"]) == "stop"
        assert json.loads(str(row["metadata"]))["llmdistill"]["thinking"] == ("Two and two." if apart else "")


def test_passages_are_measured_in_the_tokens_that_text_is_stored_in(experiment, smollm2):
    measured = load_experiment(experiment, [("prompts.passages", "{unit: tokens, size: 20, min_size: 5}")])
    text = "Three short words."
    assert len(token_starts(measured)(text)) == len(AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"])
