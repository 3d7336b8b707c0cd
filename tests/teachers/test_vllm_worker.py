"""What runs inside vLLM's workers, as plain functions of tensors."""

import pytest
import torch

from llmdistill.teachers.vllm_worker import _log_sum, _logprobs


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("flatness", [0.0, 3.0, 40.0])
def test_the_normaliser_of_a_tempered_distribution(temperature, flatness):
    """Against float64; from a flat distribution to one of a single token."""
    logits = flatness * torch.randn(5, 50_000, generator=torch.Generator().manual_seed(0))
    exact = logits.double().log_softmax(-1)
    found = _log_sum(logits.log_softmax(-1), temperature)
    torch.testing.assert_close(found.double(), (exact / temperature).logsumexp(1, keepdim=True), rtol=1e-5, atol=1e-4)


def test_log_probabilities_are_those_of_vllm():
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(_logprobs(logits), logits.log_softmax(dim=-1, dtype=torch.float32))
