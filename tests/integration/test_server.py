"""A real `vllm serve` as the teacher, and a network before it that fails."""

import http.server
import itertools
import socket
import struct
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch

from llmdistill import load_dataset
from llmdistill.config.machine import inference_precision
from llmdistill.data.collator import DistillCollator
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import load_model
from tests.conftest import run_cli
from tests.integration.servers import vllm_server

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine
PROMPTS, K, LIMIT = 12, 20, 21
KEY = "a-key-that-is-no-secret"


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """`vllm serve` as the documentation starts it for samples; its address."""
    options = ["--dtype", inference_precision(runtime="vllm").dtype]
    options += ["--max-logprobs", LIMIT, "--max-model-len", 512, "--no-enable-chunked-prefill", "--no-enable-prefix-caching"]
    options += ["--max-num-batched-tokens", 2048, "--served-model-name", "small", "--api-key", KEY]
    options += ["--worker-extension-cls", "llmdistill.teachers.vllm_worker.SampleTargets"]
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(log, smollm2, *options, VLLM_SERVER_DEV_MODE="1", VLLM_USE_V2_MODEL_RUNNER="0") as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def experiment(smollm2, server, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"""
output: {tmp_path}/run
teacher: {{model: {smollm2}, engine: server, url: {server}, served_model_name: small, concurrency: 8}}
prompts: {{source: prompts/seeds/general.jsonl, template: prompts/instruct.yaml, limit: {PROMPTS}}}
generate: {{max_tokens: 24, rows_per_shard: 4}}
targets: {{kind: topk, k: {K}}}
"""
    )
    return file


def generate(file, *overrides):
    result = run_cli("generate", file, *overrides, VLLM_API_KEY=KEY)
    assert result.returncode == 0, result.stderr
    assert KEY not in result.stdout + result.stderr + (file.parent / "run/data/run.json").read_text()
    return load_dataset(file.parent / "run/data")


def test_its_distributions_are_the_models(experiment, smollm2, tmp_path):
    rows = generate(experiment)
    assert len(rows) == PROMPTS
    batch = DistillCollator(0)([rows[n] for n in range(PROMPTS)])
    labels = batch["labels"][batch["labels"] != -100]
    with torch.inference_mode():
        logprobs = {
            dtype: completion_logits(load_model(str(smollm2), dtype=dtype), batch).float().log_softmax(-1)
            for dtype in ("float32", "bfloat16")
        }
    truth = logprobs["float32"].gather(1, batch["target_ids"])
    weight = truth.exp()
    mine = ((batch["target_logprobs"] - truth).abs() * weight).sum() / weight.sum()
    theirs = ((logprobs["bfloat16"].gather(1, batch["target_ids"]) - truth).abs() * weight).sum() / weight.sum()
    assert mine <= 1.25 * theirs + 0.002, "no farther from the truth than transformers in the same precision"
    written = torch.from_numpy(np.concatenate([row["token_logprobs"] for row in rows]))
    assert (written - logprobs["float32"].gather(1, labels[:, None])[:, 0]).abs().mean() < 0.05

    scored = run_cli(
        "score", experiment, "--output", tmp_path / "scored", "--score.source", tmp_path / "run/data", VLLM_API_KEY=KEY
    )
    assert scored.returncode == 0, scored.stderr
    read = load_dataset(tmp_path / "scored/data")
    assert list(read["id"]) == list(rows["id"])
    for row, before in zip(read, rows, strict=True):
        assert row["input_ids"].tolist() == before["input_ids"].tolist()
        assert np.abs(row["token_logprobs"] - before["token_logprobs"]).mean() < 0.1
        assert row["finish_reason"] == before["finish_reason"]


def test_samples_are_drawn_inside_and_top_k_comes_back_after_them(experiment, smollm2, tmp_path):
    rows = generate(experiment, "--targets.kind", "sampled", "--targets.n", 12)
    batch = DistillCollator(0)([rows[n] for n in range(PROMPTS)])
    weights = batch["target_logweights"].double().exp()
    with torch.inference_mode():
        p_NV = completion_logits(load_model(str(smollm2)), batch).float().softmax(-1)
    outside = ~(batch["target_ids"][..., None] == p_NV.topk(K).indices[:, None, :]).any(-1)
    assert (outside & (weights > 0)).any(), "nothing beyond the top was ever drawn"
    f_VF = torch.randn(p_NV.shape[1], 20, generator=torch.Generator().manual_seed(0))
    difference = (weights[..., None] * f_VF[batch["target_ids"]]).sum(1) - p_NV @ f_VF
    assert (difference.mean(0).abs() < 4.5 * difference.std(0) / len(difference) ** 0.5).all()

    again = run_cli("generate", experiment, "--output", tmp_path / "top", VLLM_API_KEY=KEY)
    assert again.returncode == 0, again.stderr
    top = DistillCollator(0)(list(load_dataset(tmp_path / "top/data")))
    assert top["target_tail"].mean() < 0.25, "the most likely tokens again, not the sample"


@contextmanager
def failing(server, patience):
    """A proxy that spoils every fourth call: by an error, a reset, a stall, or JSON that ends in the middle, in turn.

    A stall takes longer than `patience` seconds.
    """
    calls, lock, spoiled = itertools.count(), threading.Lock(), []
    client = httpx.Client(base_url=server, timeout=20 * patience)

    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                turn, place = divmod(next(calls), 4)
                fault = ("error", "reset", "stall", "broken")[turn % 4] if place == 3 else None
                spoiled.append(fault)
            if fault == "stall":
                time.sleep(1.5 * patience)
            if fault in ("reset", "stall"):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return
            headers = {"Authorization": self.headers.get("Authorization", ""), "Content-Type": "application/json"}
            answer = client.request(self.command, self.path, content=body, headers=headers)
            status, content = (503, b"busy") if fault == "error" else (answer.status_code, answer.content)
            if fault == "broken":
                content = content[: len(content) // 2]
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = forward

        def log_message(self, *args):
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}", spoiled
    finally:
        proxy.shutdown()


def test_faults_cost_time_and_no_rows(experiment, server, tmp_path):
    begun = time.monotonic()
    whole = generate(experiment)
    patience = max(round(time.monotonic() - begun), 8)  # no request takes as long as all of them on this machine
    with failing(server, patience) as (address, spoiled):
        result = run_cli(
            "generate", experiment, "--output", tmp_path / "faulty", "--teacher.url", address, "--teacher.timeout", patience,
            VLLM_API_KEY=KEY,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert set(spoiled) == {None, "error", "reset", "stall", "broken"}
    rows = load_dataset(tmp_path / "faulty/data")
    assert list(rows["id"]) == list(whole["id"])
    for row in rows:
        assert len(row["token_logprobs"]) == len(row["input_ids"]) - int(row["completion_start"])
        assert np.isfinite(row["token_logprobs"]).all()


def test_what_the_server_refuses_is_said_in_its_own_words(experiment, server):
    other = run_cli("generate", experiment, "--teacher.served_model_name", "large", VLLM_API_KEY=KEY)
    assert other.returncode == 2
    assert "serves small, not large" in other.stderr
    key = run_cli("generate", experiment, VLLM_API_KEY="another")
    assert key.returncode == 2
    assert f"{server} refuses: Unauthorized" in key.stderr
    much = run_cli("generate", experiment, "--targets.k", LIMIT + 1, VLLM_API_KEY=KEY)
    assert much.returncode == 2
    assert str(LIMIT) in much.stderr


@pytest.fixture
def endpoint(experiment, smollm2, server):
    """The same server as an endpoint with OpenAI's API; one request at a time, so that sums are not batched otherwise.

    What the engine `server` has told its workers stays, so they are told to return the most likely tokens.
    """
    told = {"method": "sample_targets", "args": ["topk", str(LIMIT), "0"]}
    httpx.post(f"{server}/collective_rpc", json=told, headers={"Authorization": f"Bearer {KEY}"}, timeout=60).raise_for_status()
    text = experiment.read_text().replace("engine: server", "engine: openai").replace(f"{server},", f"{server}/v1,")
    text = text.replace(f"model: {smollm2}", "model: small").replace("served_model_name: small, ", "")
    text = text.replace("concurrency: 8", f"concurrency: 1, tokenizer: {smollm2}, licence: apache-2.0")
    experiment.write_text(text.replace("max_tokens: 24", "max_tokens: 24, temperature: 0") + f"student: {{model: {smollm2}}}\n")
    return experiment


def positions(rows):
    """Each position's top tokens with their log-probabilities, and the ids that were written."""
    found = []
    for row in rows:
        start, tail = int(row["completion_start"]), row["target_tail"]
        tops = zip(row["target_ids"].reshape(len(tail), -1), row["target_logprobs"].reshape(len(tail), -1), strict=True)
        found += [
            (written, dict(zip(ids.tolist(), values.tolist(), strict=True)))
            for written, (ids, values) in zip(row["input_ids"][start:].tolist(), tops, strict=True)
        ]
    return found


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_as_an_endpoint_it_gives_what_the_engine_in_process_gives(endpoint, smollm2, tmp_path, api):
    result = run_cli("generate", endpoint, "--teacher.api", api, "--prompts.limit", 4, OPENAI_API_KEY=KEY)
    assert result.returncode == 0, result.stderr
    assert "log-probabilities of the 21 most likely tokens, token ids" in result.stdout + result.stderr
    through = load_dataset(endpoint.parent / "run/data")
    precision = inference_precision(runtime="vllm").dtype  # the server's
    own = run_cli(
        "generate", endpoint, "--output", tmp_path / "own", "--prompts.limit", 4, "--teacher",
        f"{{model: {smollm2}, engine: vllm, max_model_len: 512, dtype: {precision}, "
        "engine_args: {max_num_seqs: 1, enable_prefix_caching: false}}",
    )  # fmt: skip
    assert own.returncode == 0, own.stderr
    inside = load_dataset(tmp_path / "own/data")
    assert [row["input_ids"].tolist() for row in through] == [row["input_ids"].tolist() for row in inside]
    for (written, mine), (same, theirs) in zip(positions(through), positions(inside), strict=True):
        assert written == same
        assert len(mine.keys() & theirs.keys()) >= K - 1  # two may be equally likely at the end of the list
        assert max(abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys()) < 1e-3


def test_as_an_endpoint_it_reads_given_text_by_its_echo(endpoint, tmp_path):
    result = run_cli("generate", endpoint, "--teacher.api", "completions", "--prompts.limit", 4, OPENAI_API_KEY=KEY)
    assert result.returncode == 0, result.stderr
    read = run_cli(
        "score", endpoint, "--teacher.api", "completions", "--output", tmp_path / "read",
        "--score.source", endpoint.parent / "run/data", OPENAI_API_KEY=KEY,
    )  # fmt: skip
    assert read.returncode == 0, read.stderr
    for row, before in zip(load_dataset(tmp_path / "read/data"), load_dataset(endpoint.parent / "run/data"), strict=True):
        assert row["input_ids"].tolist() == before["input_ids"].tolist()
        assert np.abs(row["token_logprobs"] - before["token_logprobs"]).mean() < 0.1


def test_as_an_endpoint_it_says_what_it_does_not_give(endpoint, tmp_path):
    for overrides, said in [
        (["--targets.kind", "sampled"], "returns only the most likely tokens"),
        (["--targets.k", LIMIT + 1], str(LIMIT)),
        (["--teacher.tokenizer", "null"], "targets.kind topk needs teacher.tokenizer"),
        (["--teacher.licence", "null"], "licence is missing"),
        (["--score.source", str(tmp_path)], "score needs a teacher that scores given text"),
    ]:
        result = run_cli("generate", endpoint, *overrides, OPENAI_API_KEY=KEY)
        assert result.returncode == 2, result.stderr
        assert said in result.stderr
    without = run_cli("generate", endpoint, OPENAI_API_KEY="")
    assert without.returncode == 2
    assert "OPENAI_API_KEY is not set in the environment" in without.stderr
