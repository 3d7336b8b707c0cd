"""A quantised copy of the real small teacher in the real vLLM, and GPTQ by the real llm-compressor."""

import sys

import pytest

from tests.conftest import ROOT, run_cli, write_experiment

ASK = """
import sys
from llmdistill.config import Generate, Targets, Teacher
from llmdistill.models import end_token_ids, load_config, load_tokenizer
from llmdistill.teachers import Request
from llmdistill.teachers.vllm import VllmEngine

if __name__ == "__main__":
    model = sys.argv[1]
    tokenizer = load_tokenizer(model, None)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    ends = end_token_ids(model, None, load_config(model, None), tokenizer)
    engine = VllmEngine(Teacher(model=model), Generate(temperature=0, max_tokens=16), Targets(kind="none"), 256, ends, 0)
    (answer,) = engine.generate([[Request(0, ids, 0)]])
    print("ANSWER", tokenizer.decode(answer.ids))
"""


@pytest.fixture(scope="module")
def experiment(tiny, tmp_path_factory):
    """Up to the dataset; the tiny teacher has the tokenizer of the real one."""
    file = write_experiment(tiny, tmp_path_factory.mktemp("export"))
    for stage in ("generate", "curate"):
        assert run_cli(stage, file).returncode == 0
    return file


@pytest.mark.engine
def test_a_quantised_model_answers_in_vllm(experiment, smollm2, tmp_path):
    import subprocess

    pytest.importorskip("vllm", reason="vLLM is not installed")
    settings = ["--export.formats", "[w8a8, w4a16]", "--export.rounding", "nearest", "--export.model", smollm2]
    result = run_cli("export", experiment, *settings)
    assert result.returncode == 0, result.stderr
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    exported = experiment.parent / "run/export/w8a8"
    result = subprocess.run(
        [sys.executable, script, exported], capture_output=True, text=True, cwd=ROOT, env=None, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout.split("ANSWER")[1]
