"""What runs inside vLLM's workers, as plain functions of tensors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmdistill.teachers.vllm_worker import ASKED, LogSoftmax, _asked_ids, _know_what_is_read, _log_sum


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("flatness", [0.0, 3.0, 40.0])
def test_the_normaliser_of_a_tempered_distribution(temperature, flatness):
    """Against float64; from a flat distribution to one of a single token."""
    logits = flatness * torch.randn(5, 50_000, generator=torch.Generator().manual_seed(0))
    exact = logits.double().log_softmax(-1)
    found = _log_sum(logits.log_softmax(-1), temperature)
    torch.testing.assert_close(found.double(), (exact / temperature).logsumexp(1, keepdim=True), rtol=1e-5, atol=1e-4)


def test_log_probabilities_are_those_of_vllm():
    """For one batch after the other, the larger and the smaller, also of more rows than are worked on at a time."""
    log_softmax, generator = LogSoftmax(), torch.Generator().manual_seed(0)
    for shape in ((3, 1000), (30, 300_000), (2, 1000)):
        logits = torch.randn(shape, generator=generator).bfloat16()
        assert torch.equal(log_softmax(logits), logits.log_softmax(dim=-1, dtype=torch.float32))


def test_what_a_text_asks_for_comes_in_the_rows_that_are_computed():
    """A prompt of four tokens and a text of three, in two pieces: the row of a token is the one before it."""
    ids = np.array([[5, 6], [7, 8], [9, 10]], dtype=np.int32)
    sampling = SimpleNamespace(extra_args={ASKED: {"first_row": 3, "ids": ids.tobytes()}})
    first = _asked_ids(SimpleNamespace(sampling_params=sampling, num_computed_tokens=0), 4, 2)
    assert first.tolist() == [[0, 0], [0, 0], [0, 0], [5, 6]]
    second = _asked_ids(SimpleNamespace(sampling_params=sampling, num_computed_tokens=4), 3, 2)
    assert second.tolist() == [[7, 8], [9, 10], [0, 0]]


def test_the_table_of_what_is_read_knows_where_the_runner_is():
    runner = SimpleNamespace(num_prompt_logprobs={"a": 1})
    reading = _know_what_is_read(runner)
    runner.num_prompt_logprobs["b"] = 2
    assert [(key, value, reading.current) for key, value in runner.num_prompt_logprobs.items()] == [("a", 1, "a"), ("b", 2, "b")]
    with pytest.raises(RuntimeError, match="num_prompt_logprobs; use engine transformers"):
        _know_what_is_read(SimpleNamespace())
