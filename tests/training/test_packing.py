"""Packs hold every row once, none too many tokens, and waste little."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from llmdistill.models.loading import load_model
from llmdistill.training.packing import check_apart, pack


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80), capacity=st.integers(1, 50))
def test_every_row_is_in_one_pack_that_is_not_too_long(lengths, capacity):
    packs = pack(lengths, capacity)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    for rows in packs:
        assert len(rows) == 1 or sum(lengths[row] for row in rows) <= capacity
    # Best fit leaves no two packs that would fit into one; so less than half of all room is empty.
    used = sorted(min(sum(lengths[row] for row in rows), capacity) for rows in packs)
    assert len(packs) == 1 or used[0] + used[1] > capacity


def test_by_hand():
    assert pack([5, 3, 7, 2, 3], 10) == [[2, 1], [0, 4, 3]]


def test_real_lengths_fill_their_packs():
    """Lengths of a heavy-tailed kind, a hundred times as many rows as fit in a pack: over 99% of the room is used."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(int) + 1, 2048)
    packs = pack(lengths, 2048)
    assert lengths.sum() / (2048 * len(packs)) > 0.99


def test_weights_that_are_elsewhere_are_not_tried(tiny):
    """Under FSDP one process has them and tries; under ZeRO-3 none has all of them."""
    model = load_model(str(tiny))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    check_apart(model)
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="use FSDP2 or ZeRO-2"):
        check_apart(model)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MAMBA = {f"mamba_{name}": size for name, size in {"d_ssm": 32, "n_heads": 4, "d_head": 8, "d_state": 8, "chunk_size": 8}.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("falcon_h1", {**MAMBA, "mamba_n_groups": 1}),
        ("jamba", {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "use_mamba_kernels": False}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
        ("mpt", {"n_layers": 2, "n_heads": 4, "d_model": 32}),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_models_that_mix_rows_are_refused_whatever_the_size_of_their_weights(family, settings, scale):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    with pytest.raises(ValueError, match="packing and padding_free"):
        check_apart(model)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite", "gpt_neox", "gpt2"],
)
def test_models_that_keep_rows_apart_pass(family, attention):
    torch.manual_seed(0)
    sliding = {"sliding_window": 4} if family in ("mistral", "gemma2", "gemma3_text") else {}
    config = AutoConfig.for_model(family, **{**SMALL, **sliding, "pad_token_id": 0})
    check_apart(AutoModelForCausalLM.from_config(config, attn_implementation=attention))
