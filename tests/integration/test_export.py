"""A quantised copy of the real small teacher in the real vLLM, and GPTQ by the real llm-compressor."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmdistill.config import load_experiment
from llmdistill.evaluation.serving import Requests, Served, by_vllm
from llmdistill.evaluation.writing import answer_length
from llmdistill.models.loading import continue_prompts, load_model
from llmdistill.students.formats import FORMATS
from tests.conftest import ROOT, run_cli
from tests.factories import write_experiment, write_tiny_for_vllm

GPTQ = ROOT / ".llmcompressor"
ASK = """
import json
import sys
from llmdistill.config import Generate, Targets, Teacher
from llmdistill.models.loading import end_token_ids, load_config, load_tokenizer
from llmdistill.teachers import EngineSpec, Request
from llmdistill.teachers.vllm import VllmEngine

if __name__ == "__main__":
    model = sys.argv[1]
    tokenizer = load_tokenizer(model, None)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    ends = end_token_ids(model, None, load_config(model, None), tokenizer)
    sampling = Generate(temperature=0, max_tokens=16)
    engine = VllmEngine(EngineSpec(Teacher(model=model), sampling, Targets(kind="none"), ends, max_model_len=256))
    (answer,) = engine.generate([[Request(0, ids, 0)]])
    print("ANSWER", json.dumps([ids, answer.ids.tolist()]))
"""


@pytest.fixture(scope="module")
def experiment(whole_tiny, tmp_path_factory):
    """Up to the dataset; the tiny teacher has the tokenizer of the real one."""
    file = write_experiment(whole_tiny, tmp_path_factory.mktemp("export"))
    for stage in ("generate", "curate"):
        assert run_cli(stage, file).returncode == 0
    return file


@pytest.mark.engine
def test_a_quantised_model_answers_in_vllm(experiment, smollm2, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if platform.machine() == "x86_64" and "vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("without VNNI instructions oneDNN's 8-bit products saturate, and vLLM's answers are wrong (docs/export.md)")
    output = ["--output", tmp_path / "out", "--train.dataset", experiment.parent / "run/curated"]
    settings = ["--export.formats", "[w8a8]", "--export.rounding", "nearest", "--export.model", smollm2]
    result = run_cli("export", experiment, *output, *settings)
    assert result.returncode == 0, result.stderr
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    ask = [sys.executable, script, tmp_path / "out/export/w8a8"]
    result = subprocess.run(
        ask, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600
    )
    assert result.returncode == 0, result.stderr
    # Rounding decides between tokens that are almost equally likely, differently on every processor. So: each token that vLLM
    # chose is one of the likeliest of the same file in transformers.
    prompt, answer = json.loads(result.stdout.split("ANSWER")[1])
    with torch.inference_mode():
        logits_TV = FORMATS["w8a8"].load(str(tmp_path / "out/export/w8a8"), "float32")(torch.tensor([prompt + answer])).logits[0]
    logprobs_TV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
    chosen_T = logprobs_TV.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert len(answer) > 3
    assert (logprobs_TV.amax(-1) - chosen_T).max() < 0.5


@pytest.mark.engine
def test_what_a_model_costs_in_vllm(smollm2, tmp_path):
    """A model is timed; one that vLLM does not load is told apart, with its reason."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    tiny, broken = write_tiny_for_vllm(tmp_path / "tiny", smollm2), tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    prompts = [[1, 5, 6, 7], list(range(5, 205)), [9, 8]]
    requests = Requests(prompts, 12, [2])
    models = [Served("model", str(tiny)), Served("broken", str(broken))]
    found = by_vllm(models, 2, 8, {"t": {"model": requests, "broken": requests}})
    model, failed = found["models"]
    assert 0 < model["decode"]["low"] <= model["decode"]["median"] <= model["decode"]["high"]
    assert model["prefill"]["median"] > model["decode"]["median"]  # many tokens in one pass against one
    assert (tiny / "model.safetensors").stat().st_size < model["peak_bytes"] < 8 << 30
    figures, loaded = model["requests"]["t"], load_model(str(tiny), dtype="float32")
    assert figures["count"] == 3
    assert 0 < figures["p50_s"] <= figures["p95_s"]
    written = [answer_length(continue_prompts(loaded, [ids], 12, [2], do_sample=False)[0].tolist(), [2]) for ids in prompts]
    assert 3 * figures["tokens_per_s"] / figures["per_s"] == pytest.approx(sum(written), abs=6), "as long, but for precision"
    assert set(failed) == {"name", "failed"}
    assert found["version"]


@pytest.mark.skipif(not GPTQ.exists(), reason="`make test-gptq` installs llm-compressor")
@pytest.mark.parametrize("form", ["w4a16", "w8a8"])
def test_gptq_is_nearer_than_rounding_to_the_nearest(experiment, form, tmp_path):
    """On the layer inputs that it was calibrated on, as the paper has it; both are in the same format."""
    trained = load_experiment(experiment)
    costs = {}
    for rounding in ("gptq", "nearest"):
        where = [
            "--output",
            tmp_path / rounding,
            "--train.dataset",
            trained.dataset_directory,
            "--export.model",
            trained.teacher.model,
        ]
        result = run_cli(
            "export", experiment, *where, "--export.formats", f"[{form}]", "--export.rounding", rounding, PYTHONPATH=str(GPTQ)
        )
        assert result.returncode == 0, result.stderr
        (made,) = json.loads((tmp_path / rounding / "export/export.json").read_text())["formats"]
        assert "GPTQ" not in result.stderr + result.stdout.replace("rounded by GPTQ", "")
        config = json.loads((tmp_path / rounding / f"export/{form}/config.json").read_text())["quantization_config"]
        costs[rounding] = (made["kl"]["mean"], config["format"], config["ignore"])
    assert costs["gptq"][1:] == costs["nearest"][1:]
    if form == "w4a16":
        assert costs["gptq"][0] < costs["nearest"][0]
