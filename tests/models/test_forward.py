"""A model is probed as it trains, and afterwards is as it was."""

import pytest
import torch

from llmdistill.losses.fused import find_head
from llmdistill.models.forward import at_work
from llmdistill.models.loading import load_model
from llmdistill.training.packing import check_apart


@pytest.mark.parametrize("training", [False, True])
def test_attention_that_a_cpu_does_not_have_is_replaced_while_it_lasts(tiny, training):
    model = load_model(str(tiny), device="cpu").train(training)
    model.config._attn_implementation = "flex_attention"
    with at_work(model):
        assert not model.training
        assert model.config._attn_implementation == "sdpa"
    assert model.training is training
    assert model.config._attn_implementation == "flex_attention"


def test_probes_run_under_the_autocast_of_the_training(tiny):
    """FlashAttention fails on float32."""
    model = load_model(str(tiny), device="cpu", dtype="float32")
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert find_head(model) is not None
        check_apart(model)
    assert set(seen) == {torch.bfloat16}
