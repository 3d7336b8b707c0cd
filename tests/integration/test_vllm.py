"""The real vLLM with the real small teacher."""

import json
import os
import shutil
import subprocess
import sys
import time

import jsonschema
import numpy as np
import psutil
import pytest
import torch

from llmdistill import load_dataset
from llmdistill.data.collator import DistillCollator
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import load_model, load_tokenizer
from tests.conftest import ROOT, run_cli
from tests.factories import write_noisy

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
    """vLLM's stored distribution is as near to the float32 truth as transformers' own in the same bfloat16.

    In bfloat16 a logit near 20 moves in steps of 0.125, so neither engine is exact. A row that stood one token off, or
    was tempered by the sampling temperature of 0.7, would be off by nats.
    """
    _, rows = generated
    batch = DistillCollator(0)([rows[n] for n in range(len(rows))])
    labels = batch["labels"][batch["labels"] != -100][:, None]
    written = torch.from_numpy(np.concatenate([row["token_logprobs"] for row in rows]))
    found = {"vllm": (batch["target_logprobs"], batch["target_tail"], written)}
    for dtype in ("float32", "bfloat16"):
        with torch.inference_mode():
            logprobs_NV = completion_logits(load_model(str(smollm2), dtype=dtype), batch).float().log_softmax(-1)
        kept = logprobs_NV.gather(1, batch["target_ids"])
        found[dtype] = (kept, 1 - kept.exp().sum(1), logprobs_NV.gather(1, labels)[:, 0])
    truth, weight = found["float32"], found["float32"][0].exp()

    def errors(engine):
        kept, tail, chosen = (mine - true for mine, true in zip(found[engine], truth, strict=True))
        return (kept.abs() * weight).sum() / weight.sum(), tail.abs().mean(), chosen.abs().mean()

    for ours, reference in zip(errors("vllm"), errors("bfloat16"), strict=True):
        assert ours <= 1.25 * reference + 0.002
    assert errors("bfloat16")[0] < 0.05


def test_the_probability_of_having_sampled_a_text_is_that_at_the_temperature(generated, smollm2):
    """Of each whole text at temperature 0.7, against transformers in float32; at temperature 1 it would be far from it."""
    _, rows = generated
    batch = DistillCollator(0)([rows[n] for n in range(len(rows))])
    labels = batch["labels"][batch["labels"] != -100][:, None]
    with torch.inference_mode():
        logits_NV = completion_logits(load_model(str(smollm2), dtype="float32"), batch).double()
    row_N = torch.repeat_interleave(torch.arange(len(rows)), batch["lengths"] - torch.tensor(rows["completion_start"]))
    for temperature, near in ((0.7, True), (1.0, False)):
        each_N = (logits_NV / temperature).log_softmax(-1).gather(1, labels)[:, 0]
        want = torch.zeros(len(rows), dtype=torch.float64).index_add(0, row_N, each_N)
        off = (torch.tensor(np.array(rows["sampling_logprob"])) - want).abs().max()
        assert off < 1 if near else off > 5, (temperature, off)


def test_resuming_makes_only_the_missing_shard(generated, tmp_path):
    original, rows = generated
    directory = shutil.copytree(original, tmp_path / "data", copy_function=shutil.copy2)
    kept = sorted(directory.glob("train-*.parquet"))
    lost = kept.pop(1)
    times = {path: path.stat().st_mtime_ns for path in kept}
    lost.unlink()
    (directory / "dataset.json").unlink()
    run = directory / "run.json"
    run.write_text(run.read_text().replace('"status": "done"', '"status": "unfinished"'))
    result = run_cli("generate", original.parent.parent / "experiment.yaml", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    again = load_dataset(directory)
    assert list(again["id"]) == list(rows["id"])
    assert {path: path.stat().st_mtime_ns for path in kept} == times


def test_a_kill_leaves_no_process_and_loses_no_row(generated, smollm2):
    """kill −9 after the first shard: vLLM's processes end too, and the same command goes on to the same rows."""
    directory, rows = generated
    file, output = directory.parent.parent / "experiment.yaml", directory.parent.parent / "killed"
    arguments = [
        "generate",
        file,
        "--output",
        output,
        "--generate.rows_per_shard",
        2,
        "--teacher.engine_args",
        "{max_num_seqs: 2}",
    ]
    apart = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # on few cores it would have no processes
    process = subprocess.Popen([sys.executable, "-m", "llmdistill", *map(str, arguments)], cwd=ROOT, env=apart)
    deadline = time.monotonic() + 240
    while not list(output.glob("data/train-*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    engine = [child for child in psutil.Process(process.pid).children(recursive=True) if "VLLM" in " ".join(child.cmdline())]
    assert engine
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(engine, timeout=20)
    assert not alive
    assert len(list(output.glob("data/train-*.parquet"))) < 5
    assert run_cli(*arguments).returncode == 0
    again = load_dataset(output / "data")
    assert list(again["id"]) == list(rows["id"])


@pytest.mark.parametrize("kind", ["{kind: sampled, n: 12}", "{kind: multinomial, n: 30}"])
def test_the_sample_is_drawn_inside_vllm_from_the_full_distribution(smollm2, tmp_path, kind):
    """The weighted sums of random functions against those over the full distribution, as transformers gives it."""
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"""
output: {tmp_path}/run
teacher: {{model: {smollm2}, engine: vllm}}
prompts: {{source: prompts/seeds/general.jsonl, template: prompts/instruct.yaml, limit: 24}}
generate: {{max_tokens: 48}}
targets: {kind}
"""
    )
    result = run_cli("generate", file)
    assert result.returncode == 0, result.stderr
    rows = load_dataset(tmp_path / "run/data")
    batch = DistillCollator(0)([rows[n] for n in range(len(rows))])
    weights = batch["target_logweights"].double().exp()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]), atol=3e-3, rtol=0)
    with torch.inference_mode():
        p_NV = completion_logits(load_model(str(smollm2)), batch).float().softmax(-1)
    f_VF = torch.randn(p_NV.shape[1], 20, generator=torch.Generator().manual_seed(0))
    difference = (weights[..., None] * f_VF[batch["target_ids"]]).sum(1) - p_NV @ f_VF
    standard_error = difference.std(0) / len(difference) ** 0.5
    assert len(difference) > 500
    at_temperature_one = [row["token_logprobs"].sum() for row in rows]
    np.testing.assert_allclose(rows["sampling_logprob"], at_temperature_one, rtol=1e-5)
    assert (difference.mean(0).abs() < 4.5 * standard_error).all()
    outside_top_256 = ~(batch["target_ids"][..., None] == p_NV.topk(256).indices[:, None, :]).any(-1)
    assert (outside_top_256 & (weights > 0)).any(), (
        "nothing beyond the top 256 was ever drawn: the sample is not from the full distribution"
    )


def test_vllm_serves_the_trained_student(generated, tmp_path):
    """Half of the teacher, trained for a step on what it wrote, continues prompts in vLLM."""
    directory, _ = generated
    file = directory.parent.parent / "experiment.yaml"
    overrides = ["--output", tmp_path, "--train.dataset", directory, "--student.prune.layers", 15]
    arguments = [
        "--train.args.max_steps",
        1,
        "--train.args.per_device_train_batch_size",
        2,
        "--train.args.gradient_checkpointing",
        "false",
    ]
    trained = run_cli("train", file, *overrides, *arguments)
    assert trained.returncode == 0, trained.stderr
    served = run_cli(
        "generate", file, "--output", tmp_path / "served", "--teacher.model", tmp_path / "student", "--prompts.limit", 2
    )
    assert served.returncode == 0, served.stderr
    assert len(load_dataset(tmp_path / "served/data")) == 2


def test_text_that_vllm_reads_has_the_distributions_of_transformers(generated, smollm2, tmp_path):
    """The rows that vLLM wrote, read by it again in float32 with the 256 most likely tokens, against one plain pass."""
    directory, rows = generated
    file = directory.parent.parent / "experiment.yaml"
    arguments = ["--output", tmp_path, "--score.source", directory, "--teacher.dtype", "float32", "--targets.k", 256]
    result = run_cli("score", file, *arguments)
    assert result.returncode == 0, result.stderr
    read = load_dataset(tmp_path / "data")
    assert list(read["id"]) == list(rows["id"])
    assert list(read["finish_reason"]) == list(rows["finish_reason"])
    for mine, theirs in zip(read, rows, strict=True):
        assert mine["input_ids"].tolist() == theirs["input_ids"].tolist()
    batch = DistillCollator(0)([read[n] for n in range(len(read))])
    with torch.inference_mode():
        logprobs_NV = completion_logits(load_model(str(smollm2), dtype="float32"), batch).log_softmax(-1)
    torch.testing.assert_close(batch["target_logprobs"], logprobs_NV.gather(1, batch["target_ids"]), atol=0.02, rtol=1e-3)
    assert (batch["target_ids"][:, :1] == logprobs_NV.topk(1).indices).float().mean() > 0.99
    written = torch.from_numpy(np.concatenate([row["token_logprobs"] for row in read]))
    labels = batch["labels"][batch["labels"] != -100]
    torch.testing.assert_close(written, logprobs_NV.gather(1, labels[:, None])[:, 0], atol=2e-3, rtol=1e-3)


def test_ids_that_pad_the_output_layer_are_never_written_or_kept(smollm2, tmp_path):
    """The padding is likelier than any token; what vLLM writes and reads has the distribution over the tokens alone."""
    padded = tmp_path / "padded"
    model, vocab_size = load_model(str(smollm2)), 49152
    model.resize_token_embeddings(vocab_size + 256, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[vocab_size:] = 4 * model.get_output_embeddings().weight[:256]
    model.save_pretrained(padded)
    load_tokenizer(str(smollm2), None).save_pretrained(padded)
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"""
output: {tmp_path}/run
teacher: {{model: {padded}, engine: vllm, dtype: float32}}
prompts: {{source: prompts/seeds/general.jsonl, template: prompts/instruct.yaml, limit: 4}}
generate: {{max_tokens: 12}}
targets: {{kind: topk, k: {K}}}
"""
    )
    for stage, arguments in (
        ("generate", ()),
        ("score", ("--score.source", tmp_path / "run/data", "--output", tmp_path / "read")),
    ):
        result = run_cli(stage, file, *arguments)
        assert result.returncode == 0, result.stderr
    plain = load_model(str(smollm2), dtype="float32")
    for directory in (tmp_path / "run/data", tmp_path / "read/data"):
        rows = load_dataset(directory)
        batch = DistillCollator(0)([rows[n] for n in range(len(rows))])
        assert batch["input_ids"].max() < vocab_size
        assert batch["target_ids"].max() < vocab_size
        with torch.inference_mode():
            assert (completion_logits(model, batch).argmax(-1) >= vocab_size).all(), "the padding is likelier than any token"
            logprobs_NV = completion_logits(plain, batch).log_softmax(-1)
        torch.testing.assert_close(batch["target_logprobs"], logprobs_NV.gather(1, batch["target_ids"]), atol=0.02, rtol=1e-3)
        written = torch.from_numpy(np.concatenate([row["token_logprobs"] for row in rows]))
        labels = batch["labels"][batch["labels"] != -100]
        torch.testing.assert_close(written, logprobs_NV.gather(1, labels[:, None])[:, 0], atol=2e-3, rtol=1e-3)


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["question", "order"]}, "words": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "words"],
    "additionalProperties": False,
}


def test_text_by_a_json_schema_has_the_distribution_that_no_grammar_has_touched(generated, smollm2, tmp_path):
    """vLLM's grammar sets what it forbids to zero before the log-probabilities are taken, so those that it returns are wrong."""
    directory, _ = generated
    file = directory.parent.parent / "experiment.yaml"
    arguments = ["--output", tmp_path, "--prompts.limit", 4, "--teacher.dtype", "float32", "--generate.temperature", 0]
    result = run_cli("generate", file, *arguments, "--generate.json_schema", json.dumps(SCHEMA))
    assert result.returncode == 0, result.stderr
    rows = load_dataset(tmp_path / "data")
    ended = [row for row in rows if row["finish_reason"] == "stop"]
    assert ended
    for row in ended:
        jsonschema.validate(json.loads(row["completion"][0]["content"]), SCHEMA)
    batch = DistillCollator(0)([rows[n] for n in range(len(rows))])
    with torch.inference_mode():
        logprobs_NV = completion_logits(load_model(str(smollm2), dtype="float32"), batch).log_softmax(-1)
    labels = batch["labels"][batch["labels"] != -100]
    written = torch.from_numpy(np.concatenate([row["token_logprobs"] for row in rows]))
    torch.testing.assert_close(written, logprobs_NV.gather(1, labels[:, None])[:, 0], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(batch["target_logprobs"], logprobs_NV.gather(1, batch["target_ids"]), atol=0.02, rtol=1e-3)
    # The grammar left one token at many places: masked, its probability would be one.
    assert written.mean() < -1


def test_the_mean_of_two_teachers_that_vllm_loads_one_after_the_other(smollm2, tmp_path):
    """What vLLM's first teacher writes and both read, against transformers' mean over the whole vocabulary in float32."""
    other = write_noisy(smollm2, tmp_path / "other", 0, noise=0.01)
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"""
output: {tmp_path}/run
teacher: {{model: {smollm2}, engine: vllm, dtype: float32, weight: 2, ensemble: [{{model: {other}, weight: 1}}]}}
prompts: {{source: prompts/seeds/general.jsonl, template: prompts/instruct.yaml, limit: 12}}
generate: {{max_tokens: 32, rows_per_shard: 5}}
targets: {{kind: sampled, n: 12}}
"""
    )
    result = run_cli("generate", file)
    assert result.returncode == 0, result.stderr
    assert "pass 3 of 3" in result.stdout
    topk = ["--score.source", tmp_path / "run/data", "--output", tmp_path / "read", "--targets", "{kind: topk, k: 20}"]
    result = run_cli("score", file, *topk)
    assert result.returncode == 0, result.stderr

    rows = load_dataset(tmp_path / "run/data")
    assert not list((tmp_path / "run/data").glob(".ensemble*"))
    batch = DistillCollator(0)([rows[n] for n in range(len(rows))])
    with torch.inference_mode():
        each = [completion_logits(load_model(str(model), dtype="float32"), batch).softmax(-1) for model in (smollm2, other)]
    assert (each[0] - each[1]).abs().sum(1).mean() > 0.2, "two teachers that say the same would show nothing"
    p_NV = (2 * each[0] + each[1]) / 3
    labels = batch["labels"][batch["labels"] != -100][:, None]
    written = torch.from_numpy(np.concatenate([row["token_logprobs"] for row in rows]))
    torch.testing.assert_close(written, p_NV.gather(1, labels)[:, 0].log(), atol=2e-3, rtol=1e-3)

    weights = batch["target_logweights"].double().exp()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]), atol=3e-3, rtol=0)
    f_VF = torch.randn(p_NV.shape[1], 20, generator=torch.Generator().manual_seed(0))
    difference = (weights[..., None] * f_VF[batch["target_ids"]]).sum(1) - p_NV @ f_VF
    assert (difference.mean(0).abs() < 4 * difference.std(0) / len(difference) ** 0.5).all()
    entropy_N = -(weights * p_NV.gather(1, batch["target_ids"]).log()).sum(1)
    torch.testing.assert_close(batch["target_entropy"].double(), entropy_N, atol=0.02, rtol=2e-3)
    exact = (p_NV * -p_NV.log()).nan_to_num().sum(1)
    off = batch["target_entropy"] - exact
    assert off.mean().abs() < 4 * off.std() / len(off) ** 0.5

    read = DistillCollator(0)(list(load_dataset(tmp_path / "read/data")))
    assert read["input_ids"].tolist() == batch["input_ids"].tolist()
    torch.testing.assert_close(read["target_logprobs"].exp(), p_NV.gather(1, read["target_ids"]), atol=2e-3, rtol=5e-3)
    torch.testing.assert_close(read["target_tail"], 1 - p_NV.gather(1, read["target_ids"]).sum(1), atol=3e-3, rtol=0)
    assert (read["target_ids"][:, :3] == p_NV.topk(3).indices).float().mean() > 0.99


def test_what_a_student_draws_in_vllm_the_teacher_tells_in_vllm(smollm2, tmp_path):
    """The sample is by the student's distribution, its log-probabilities are the teacher's, as transformers has both."""
    student = write_noisy(smollm2, tmp_path / "student", 0, noise=0.01)
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"""
output: {tmp_path}/run
teacher: {{model: {student}, engine: vllm, dtype: float32}}
prompts: {{source: prompts/seeds/general.jsonl, template: prompts/instruct.yaml, limit: 6}}
generate: {{max_tokens: 24, rows_per_shard: 6}}
targets: {{kind: sampled_logprobs, n: 12}}
"""
    )
    result = run_cli("generate", file)
    assert result.returncode == 0, result.stderr
    own = ["--targets", "{kind: sampled_by_student, n: 12}", "--train.loss", "reverse_kl", "--teacher.model", smollm2]
    result = run_cli("score", file, *own, "--score.source", tmp_path / "run/data", "--output", tmp_path / "read")
    assert result.returncode == 0, result.stderr

    rows = load_dataset(tmp_path / "read/data")
    batch = DistillCollator(0)([rows[n] for n in range(len(rows))])
    assert batch["target_kind"] == "sampled_by_student"
    with torch.inference_mode():
        log_p, log_q = (
            completion_logits(load_model(str(model), dtype="float32"), batch).log_softmax(-1) for model in (smollm2, student)
        )
    ids = batch["target_ids"]
    assert (log_p - log_q).gather(1, ids).abs().mean() > 0.1, "two models that say the same would show nothing"
    torch.testing.assert_close(batch["target_logprobs"], log_p.gather(1, ids), atol=0.02, rtol=1e-3)
    # The design weights give back the student's distribution: exact tokens weigh what they are, the others share the rest.
    exact = batch["target_logdesign"] == 0
    weights = (log_q.gather(1, ids) + batch["target_logdesign"]).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(ids)), atol=0.02, rtol=0)
    shares = weights.masked_fill(exact, 0)
    torch.testing.assert_close(shares.amax(1), shares.sum(1) / (~exact).sum(1), atol=0.01, rtol=0.05)
