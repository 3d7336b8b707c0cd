"""What a user's script sees of the package: names, how fast they come, and the errors that it expects."""

import subprocess
import sys

import datasets
import pytest
import torch
import trl

import llmdistill
from llmdistill import DistillConfig, DistillTrainer, InputError, load_dataset, losses, push_to_hub


def test_its_names_are_shown():
    assert set(llmdistill.__all__) <= set(dir(llmdistill))
    assert all(getattr(llmdistill, name) is not None for name in llmdistill.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'DistilTrainer'"):
        llmdistill.DistilTrainer  # noqa: B018


def test_importing_it_brings_nothing_large():
    """So it takes a few hundredths of a second; a limit in seconds would depend on the machine's load."""
    program = (
        "import sys, llmdistill; print(*sorted({'torch', 'trl', 'transformers', 'datasets', 'vllm', 'numpy'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


def test_wrong_input_is_a_value_error(tmp_path):
    assert issubclass(InputError, ValueError)
    with pytest.raises(ValueError, match="no such dataset"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(TypeError):
        load_dataset(None)
    with pytest.raises(ValueError, match="no such directory"):
        push_to_hub(tmp_path / "nowhere", "me/it")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "klx"}, ValueError, "loss is 'klx', must be one of forward_kl"),
        ({"alpha": 2}, ValueError, r"alpha must be in \[0, 1\]"),
        ({"alhpa": 0.5}, TypeError, "alhpa"),
        ({"loss": "jsd", "beta": 1.0}, ValueError, "beta must be above 0 and below 1"),
        ({"hidden": {"weihgt": 1}}, TypeError, "weihgt"),
        ({"reduction": "row"}, ValueError, "reduction is 'row'"),
    ],
)
def test_a_wrong_config(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        DistillConfig(output_dir=str(tmp_path), **arguments)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("klx", {}, "loss is 'klx', must be one of forward_kl"),
        ("forward_kl", {"temperature": 0}, "temperature above 0"),
        ("forward_kl", {"beta": 0.5}, "forward_kl has no parameter beta"),
        ("jsd", {"beta": 1}, "beta must be above 0 and below 1"),
    ],
)
def test_a_wrong_divergence(name, options, message):
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        losses.divergence(name, logits, logits, **options)
    with pytest.raises(ValueError, match=message):
        losses.topk_divergence(name, logits, torch.zeros(2, 1, dtype=torch.int64), logits[:, :1], torch.ones(2), **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"args": trl.SFTConfig(use_cpu=True, bf16=False)}, TypeError, "args must be a DistillConfig, got SFTConfig"),
        ({"teacher": "Qwen/Qwen3-4B"}, TypeError, "teacher must be a loaded model, got str"),
        ({"train_dataset": [{"input_ids": [1]}]}, TypeError, r"must be a datasets.Dataset from load_dataset .*, got list"),
        (
            {"train_dataset": datasets.Dataset.from_dict({"prompt": ["a"], "completion": ["b"]})},
            ValueError,
            "no column input_ids, only prompt, completion; read it with load_dataset",
        ),
        ({"train_dataset": datasets.Dataset.from_dict({"input_ids": [[1]]})}, ValueError, "no column completion_start"),
    ],
)
def test_a_wrong_argument_of_the_trainer(tmp_path, text_rows, change, error, message):
    arguments = {"args": DistillConfig(output_dir=str(tmp_path), use_cpu=True, alpha=0), "train_dataset": load_dataset(text_rows)}
    with pytest.raises(error, match=message):
        DistillTrainer(model="nowhere", **{**arguments, **change})
