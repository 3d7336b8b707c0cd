"""Targets of kind `sampled`: the codec, and what the weights of a sample are."""

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.data.targets import Sampled, kind_of


def random_sampled(generator, positions, n, vocab, scale=4.0):
    logits = torch.from_numpy(generator.normal(size=(positions, vocab)) * scale)
    logprobs = logits.log_softmax(-1)
    ids = Sampled.keep(logprobs, n, torch.from_numpy(generator.random((positions, 1))))
    return Sampled.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy()), ids, logprobs


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    n=st.integers(2, 12),
    vocab=st.sampled_from([13, 65536, 65537, 152064]),
    seed=st.integers(0, 2**31),
    scale=st.floats(0.01, 30),
)
def test_sampled_targets_come_back(lengths, n, vocab, seed, scale):
    generator = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        kept, _, _ = random_sampled(generator, length, n, 13, scale)
        sequences.append(Sampled(kept.ids_NK + vocab - 13, kept.logweights_NK, kept.exact_N, kept.entropy_N))
    table = pa.table(Sampled.encode(sequences, vocab))
    assert kind_of(table.column_names) is Sampled
    for row, want in zip(table.to_pylist(), sequences, strict=True):
        row = {name: np.array(value) for name, value in row.items()}
        got = Sampled.of_rows([row], [len(want)])
        assert (got.ids_NK == want.ids_NK).all()
        np.testing.assert_allclose(got.logweights_NK, want.logweights_NK, atol=1e-6)
        np.testing.assert_allclose(got.entropy_N, want.entropy_N, rtol=2**-11, atol=1e-6)
        shorter = Sampled.of_rows([row], [len(want) - 1])
        assert shorter.ids_NK.tolist() == want.ids_NK[:-1].tolist()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 12), seed=st.integers(0, 2**31), scale=st.floats(0.01, 30))
def test_what_a_sample_is(n, seed, scale):
    """The likely tokens are all there with their own probability; the others share the rest; all add up to one."""
    kept, ids, logprobs = random_sampled(np.random.default_rng(seed), 4, n, 40, scale)
    weights = np.exp(kept.logweights_NK.astype(np.float64))
    # float16 keeps 11 bits of each stored log-probability.
    np.testing.assert_allclose(weights.sum(1), 1, atol=3e-3)
    for position in range(4):
        c, p = int(kept.exact_N[position]), np.exp(logprobs[position].numpy())
        tau = weights[position, -1]
        assert set(np.flatnonzero(p > tau * 1.01 + 1e-3)) <= set(kept.ids_NK[position, :c])
        true = logprobs[position].numpy()[kept.ids_NK[position, :c]]
        assert (np.abs(kept.logweights_NK[position, :c] - true) <= np.abs(true) / 2048 + 1e-6).all()
        np.testing.assert_allclose(weights[position, c:], tau)
        assert sorted(ids[position].tolist()) == sorted(kept.ids_NK[position])
        assert sorted(kept.ids_NK[position, c:]) == list(kept.ids_NK[position, c:])


def test_the_sample_is_unbiased_and_much_nearer_than_independent_draws():
    """Over 4,000 draws, the mean weight is the probability; the spread is below that of n independent draws."""
    generator = np.random.default_rng(0)
    logprobs = torch.from_numpy(generator.normal(size=(1, 50)) * 2).log_softmax(-1)
    ids = Sampled.keep(logprobs.expand(4000, -1), 8, torch.from_numpy(generator.random((4000, 1))))
    kept = Sampled.from_kept(ids.numpy(), logprobs.expand(4000, -1).gather(1, ids).numpy())
    weights = np.zeros((4000, 50))
    np.put_along_axis(weights, kept.ids_NK, np.exp(kept.logweights_NK), axis=1)
    p = logprobs.exp().numpy()[0]
    np.testing.assert_allclose(weights.mean(0), p, atol=5e-3)
    assert weights.var(0).sum() < 0.5 * (p * (1 - p) / 8).sum()
