"""Targets of kind `multinomial`: the codec, and that draws with replacement are unbiased."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.data.targets import Multinomial


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    n=st.integers(2, 60),
    vocab=st.sampled_from([13, 65536, 65537, 152064]),
    seed=st.integers(0, 2**31),
)
def test_multinomial_draws_come_back(lengths, n, vocab, seed):
    """Draw counts and the entropy of each position, whatever the positions of other rows hold."""
    generator = np.random.default_rng(seed)
    drawn = [vocab - 13 + generator.integers(0, 13, size=(length, n)) for length in lengths]
    logprobs = [-generator.random(ids.shape).astype(np.float32) for ids in drawn]
    sequences = [Multinomial.from_kept(*pair) for pair in zip(drawn, logprobs, strict=True)]
    columns = Multinomial.encode(sequences, vocab)
    rows = [{name: column[i].values.to_numpy() for name, column in columns.items()} for i in range(len(lengths))]
    got = Multinomial.of_rows(rows, lengths)
    for position, ids in enumerate(np.concatenate(drawn)):
        want = dict(zip(*np.unique(ids, return_counts=True), strict=True))
        held = got.counts_NK[position] > 0
        assert dict(zip(got.ids_NK[position][held], got.counts_NK[position][held], strict=True)) == want
        np.testing.assert_allclose(np.exp(got.logweights()[position]).sum(), 1, rtol=1e-5)
    entropies = -np.concatenate(logprobs).mean(axis=1)
    np.testing.assert_allclose(got.entropy_N, entropies, rtol=2**-11)


def test_draws_with_replacement_are_unbiased():
    """The mean weight of every token over many draws is its probability, within 4.5 standard errors."""
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    positions, n = 4000, 10
    uniform = torch.rand(positions, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = Multinomial.keep(p.log().expand(positions, -1), n, uniform)
    counts = torch.nn.functional.one_hot(ids, len(p)).sum(1).double() / n
    standard_error = (p * (1 - p) / n / positions) ** 0.5
    assert ((counts.mean(0) - p).abs() < 4.5 * standard_error).all()
    torch.testing.assert_close(counts.var(0), p * (1 - p) / n, rtol=0.15, atol=0)
