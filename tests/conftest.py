"""A tiny real model with the demo teacher's architecture, and the demo teacher itself where it has been written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _float32():
    """What is computed in this process is compared with references in float32, on whatever machine the tests run."""
    from llmdistill.config import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_torch_precision", lambda: machine.Precision("float32", "as the tests want it"))
        patch.setattr(machine, "cpu_precision", lambda: machine.Precision("float32", "as the tests want it"))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo teacher: a real language model of 135M parameters."""
    directory = ROOT / "models/SmolLM2-135M-Instruct"
    if not (directory / "config.json").exists():
        subprocess.run([sys.executable, "-m", "llmdistill.models.demo_teacher", directory], check=True)
    return directory


def write_tiny(directory: Path, smollm2: Path, vocab_size: int = 49152) -> Path:
    """A random llama with the demo teacher's tokenizer: 4 layers, hidden size 32, in float32; starts in a second."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, with the demo teacher's whole vocabulary."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny", smollm2)


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of eight rows of uneven length without soft targets."""
    import numpy as np

    from llmdistill.data.dataset import Row, finished_shards, rows_to_table, write_manifest, write_shard

    directory = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(8):
        prompt, completion = generator.integers(3, 2000, 3 + number % 3), generator.integers(3, 2000, 1 + 2 * number)
        message = [{"role": "user", "content": str(number)}]
        rows.append(Row(str(number), message, message, list(prompt), completion, "stop", np.zeros(len(completion)), None))
    write_shard(directory, "train", 0, 1, rows_to_table(rows, 49152))
    about = {"teacher": {"model": "t", "engine": "x"}, "sampling": {}, "targets": {"kind": "none"}}
    write_manifest(directory, finished_shards(directory, "train"), about)
    return directory


def run_cli(*arguments: object, timeout: int = 600, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "llmdistill", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def write_experiment(tiny: Path, directory: Path) -> Path:
    """A complete small experiment on the tiny model with the exact engine."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {number} in words."}}\n' for number in range(24)))
    file = directory / "experiment.yaml"
    file.write_text(f"""
output: {directory}/run
teacher: {{model: {tiny}, engine: transformers, dtype: float32, batch_size: 4}}
prompts: {{source: {prompts}}}
generate: {{max_tokens: 8, rows_per_shard: 6}}
targets: {{kind: topk, k: 8}}
student: {{prune: {{layers: 2}}}}
train:
  args: {{max_steps: 3, per_device_train_batch_size: 2, learning_rate: 1.0e-3, gradient_checkpointing: false, bf16: false}}
eval: {{held_out: 0.25, resamples: 200, samples: 1, sample_tokens: 4}}
""")
    return file


@pytest.fixture
def experiment_file(tiny: Path, tmp_path: Path) -> Path:
    """The small experiment in a directory of the test's own."""
    return write_experiment(tiny, tmp_path)


def write_cut_experiment(smollm2: Path, directory: Path) -> Path:
    """Six prompts for the real vLLM, whose answers are all cut, so that `curate` finds nothing to train on and ends the run."""
    file = directory / "experiment.yaml"
    file.write_text(f"""
output: {directory}/run
teacher: {{model: {smollm2}, engine: vllm}}
prompts: {{source: prompts/seeds/general.jsonl, template: prompts/instruct.yaml, limit: 6}}
generate: {{max_tokens: 4, rows_per_shard: 2}}
curate: [{{finish_reason: }}]
""")
    return file
