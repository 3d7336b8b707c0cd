"""The real vLLM with the real small teacher."""

import numpy as np
import pytest
import torch

from llmdistill import load_dataset
from llmdistill.collator import DistillCollator, completion_logits
from llmdistill.models import load_model
from tests.conftest import run_cli

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine
K = 40


@pytest.fixture(scope="module")
def generated(smollm2, tmp_path_factory):
    """Ten prompts, sampled at temperature 0.7, by vLLM."""
    directory = tmp_path_factory.mktemp("vllm")
    file = directory / "experiment.yaml"
    file.write_text(
        f"""
output: {directory}/run
teacher: {{model: {smollm2}, engine: vllm}}
prompts: {{source: prompts/seeds/general.jsonl, template: prompts/instruct.yaml, limit: 10}}
generate: {{max_tokens: 40, temperature: 0.7, rows_per_shard: 4}}
targets: {{kind: topk, k: {K}}}
"""
    )
    result = run_cli("generate", file)
    assert result.returncode == 0, result.stderr
    return directory / "run/data", load_dataset(directory / "run/data")


def test_every_prompt_has_its_row(generated):
    _, rows = generated
    assert len(rows) == 10
    assert len(set(rows["id"])) == 10
    for row in rows:
        length = len(row["input_ids"]) - int(row["completion_start"])
        assert len(row["target_ids"]) == K * length
        assert (row["finish_reason"] == "stop") == (row["input_ids"][-1] == 2)
        assert length == 40 or row["finish_reason"] == "stop"


def test_both_engines_agree_on_the_same_ids(generated, smollm2):
    """vLLM's stored distribution against a forward pass of transformers over the same ids, both in bfloat16.

    bfloat16 keeps 8 bits: logits near 20 are off by up to 0.06 in either engine. A row that stood one token off, or
    was tempered by the sampling temperature, would be off by nats.
    """
    _, rows = generated
    model = load_model(str(smollm2))
    batch = DistillCollator(0)([rows[n] for n in range(len(rows))])
    with torch.inference_mode():
        logprobs_NV = completion_logits(model, batch).float().log_softmax(-1)
    stored = batch["target_logprobs"]
    difference = (logprobs_NV.gather(1, batch["target_ids"]) - stored).abs()
    weight = stored.exp()
    assert (difference * weight).sum() / weight.sum() < 0.03
    assert difference.max() < 0.6
    labels = batch["labels"][batch["labels"] != -100]
    written = np.concatenate([row["token_logprobs"] for row in rows])
    assert np.abs(logprobs_NV.gather(1, labels[:, None])[:, 0].numpy() - written).mean() < 0.05
    outside = 1 - logprobs_NV.gather(1, batch["target_ids"]).exp().sum(1)
    assert (outside - batch["target_tail"]).abs().max() < 0.05
    assert ((logprobs_NV.argmax(1) == batch["target_ids"][:, 0]).float().mean()) > 0.95


def test_resuming_makes_only_the_missing_shard(generated, smollm2):
    directory, rows = generated
    kept = sorted(directory.glob("train-*.parquet"))
    lost = kept.pop(1)
    times = {path: path.stat().st_mtime_ns for path in kept}
    lost.unlink()
    (directory / "dataset.json").unlink()
    run = directory / "run.json"
    run.write_text(run.read_text().replace('"status": "done"', '"status": "unfinished"'))
    result = run_cli("generate", directory.parent.parent / "experiment.yaml")
    assert result.returncode == 0, result.stderr
    again = load_dataset(directory)
    assert list(again["id"]) == list(rows["id"])
    assert {path: path.stat().st_mtime_ns for path in kept} == times
