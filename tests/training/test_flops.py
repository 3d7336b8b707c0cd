"""The arithmetic of a training step, by hand; it never stops a run."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmdistill.training.flops import _peak_of, training_flops

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}


def flops_of(family, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **settings}))
    return training_flops(model, model.get_output_embeddings())


def test_a_mixture_counts_the_experts_that_work_on_a_token():
    """Of eight experts two; attention has four square matrices a layer, an expert three of 32 × 48, and the router one."""
    settings = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48}
    found = flops_of("mixtral", **settings)
    layer = 4 * 32 * 32 + 2 * 3 * 32 * 48
    router = 8 * 32
    assert 6 * 2 * layer <= found.body <= 6 * 2 * (layer + router)
    assert found.head == 6 * 32 * 64
    assert found.attention == 6 * 2 * 4 * 8


def test_gpt2_has_linear_layers_of_its_own_kind():
    found = flops_of("gpt2")
    assert found.body == 6 * 2 * (4 + 8) * 32 * 32
    assert found.head == 6 * 32 * 64


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mamba", {"state_size": 8}),
        ("rwkv", {"attention_hidden_size": 32}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("gemma3_text", {"head_dim": 8}),
        ("qwen3_next", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_no_architecture_stops_a_run(family, settings):
    found = flops_of(family, **settings)
    assert found.body > 0
    assert found.attention >= 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name, peak):
    assert _peak_of(name) == peak
