"""The choice of tokens from a distribution."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llmdistill.config import Generate
from llmdistill.data.targets import draw
from llmdistill.teachers.transformers import sample


@given(st.integers(1, 12), st.sampled_from([640, 1000, 1024, 4096]), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_looking_at_blocks_first_finds_the_same_tokens(n, vocabulary, seed):
    """The most likely ones; and of a sample those above the threshold always, none twice, at the place of the random number."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = (torch.randn(3, vocabulary, generator=generator) * 3).log_softmax(-1)
    assert torch.equal(draw.most_likely(logprobs, n), logprobs.topk(n).indices)
    uniform = torch.rand(3, generator=generator, dtype=torch.float64)
    for row, ids in enumerate(draw.sample(logprobs, n, uniform)):
        p = logprobs[row].double().exp()
        order = p.argsort(descending=True)
        tau = [((1 - p[order[:c]].sum()) / (n - c)).item() for c in range(n)]
        exact = next(c for c in range(n) if p[order[c]] <= tau[c] + 1e-12 or c == n - 1)
        assert ids.unique().numel() == n
        assert set(order[:exact].tolist()) <= set(ids.tolist())
        rest = p.clone()
        rest[order[:exact]] = 0
        points = (uniform[row] + torch.arange(n - exact)) / (n - exact)
        want = torch.searchsorted(rest.cumsum(0) / rest.sum(), points, right=True)
        assert (want == ids[exact:]).double().mean() > 0.99 or (n - exact < 100 and (want != ids[exact:]).sum() <= 1)


def test_a_large_batch_is_drawn_from_row_by_row():
    """What is worked on at a time (42 rows of this vocabulary) changes nothing."""
    generator = torch.Generator().manual_seed(0)
    logprobs = (3 * torch.randn(100, 100_000, generator=generator)).log_softmax(-1)
    uniform = torch.rand(100, 5, generator=generator, dtype=torch.float64)
    rows = range(100)
    alone = [draw.sample(logprobs[row : row + 1], 5, uniform[row : row + 1, 0]) for row in rows]
    assert torch.equal(draw.sample(logprobs, 5, uniform[:, 0]), torch.cat(alone))
    alone = [draw.sample_with_replacement(logprobs[row : row + 1], uniform[row : row + 1]) for row in rows]
    assert torch.equal(draw.sample_with_replacement(logprobs, uniform), torch.cat(alone))


class NoFloat64(TorchDispatchMode):
    """As on an Apple GPU: whatever makes a tensor in float64 fails."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        assert not (isinstance(made, torch.Tensor) and made.dtype == torch.float64), function
        return made


def test_without_float64_almost_all_draws_are_the_same(monkeypatch):
    """No id is outside of the vocabulary or of no probability, also where the random number is nearly one."""
    generator = torch.Generator().manual_seed(0)
    logprobs = (3 * torch.randn(200, 5000, generator=generator)).log_softmax(-1)
    logprobs[:, 4000:] = -torch.inf
    uniform = torch.rand(200, generator=generator)
    uniform[:50] = 1 - 2**-24
    wanted = draw.sample(logprobs, 16, uniform), sample(logprobs, Generate(temperature=0.7), uniform)
    monkeypatch.setattr(draw, "widest", lambda _: torch.float32)
    with NoFloat64():
        found = draw.sample(logprobs, 16, uniform), sample(logprobs, Generate(temperature=0.7), uniform)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.max() < 4000
        assert (ours[50:] == theirs[50:]).float().mean() > 0.99
