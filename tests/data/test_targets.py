"""The codec of soft targets."""

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.data import pps, targets


def random_topk(generator, positions, k, vocab, scale=4.0):
    logits = generator.normal(size=(positions, vocab)) * scale
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return targets.topk_from_dense(logprobs, k), logprobs


def test_topk_by_hand():
    logprobs = np.log(np.array([[0.1, 0.6, 0.05, 0.25]]))
    kept = targets.topk_from_dense(logprobs, 2)
    assert kept.ids_NK.tolist() == [[1, 3]]
    np.testing.assert_allclose(np.exp(kept.logprobs_NK), [[0.6, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(kept.tail_N, [0.15], rtol=1e-6)


def test_rounding_above_one_gives_an_empty_tail_not_a_negative_one():
    kept = targets.topk_from_logprobs(np.array([[0, 1]]), np.array([[np.log(0.7), np.log(0.3000001)]], dtype=np.float32))
    assert kept.tail_N[0] == 0


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    k=st.integers(1, 12),
    vocab=st.sampled_from([12, 49152, 65536, 65537, 152064]),
    seed=st.integers(0, 2**31),
    scale=st.floats(0.1, 10),
)
def test_what_is_stored_comes_back(lengths, k, vocab, seed, scale):
    generator = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        kept, _ = random_topk(generator, length, k, 12, scale)
        shift = vocab - 12  # so that the largest ids of the vocabulary occur
        sequences.append(targets.TopK(kept.ids_NK + shift, kept.logprobs_NK, kept.tail_N))
    columns = targets.encode(sequences, vocab)
    assert columns["target_ids"].type.value_type == (pa.uint16() if vocab <= 65536 else pa.uint32())
    for number, sequence in enumerate(sequences):
        got = targets.decode({name: column[number].values.to_numpy() for name, column in columns.items()})
        assert (got.ids_NK == sequence.ids_NK).all()
        total = np.exp(got.logprobs_NK.astype(np.float64)).sum(1) + got.tail_N
        np.testing.assert_allclose(total, 1, atol=1e-5)
        # The stated error: one part in 2,048 of a log-probability, and the same for the sum that it is divided by.
        bound = np.abs(sequence.logprobs_NK).max() / 2048 * 2 + 1e-5
        assert np.abs(got.logprobs_NK - sequence.logprobs_NK).max() <= bound


def test_decoding_several_sequences_at_once_equals_one_by_one():
    generator = np.random.default_rng(0)
    sequences = [random_topk(generator, length, 3, 20)[0] for length in (2, 5, 1)]
    columns = targets.encode(sequences, 20)
    together = targets.decode({name: column.flatten().to_numpy() for name, column in columns.items()})
    apart = [targets.decode({name: column[i].values.to_numpy() for name, column in columns.items()}) for i in range(3)]
    assert (together.ids_NK == np.concatenate([part.ids_NK for part in apart])).all()
    assert (together.logprobs_NK == np.concatenate([part.logprobs_NK for part in apart])).all()


def random_sampled(generator, positions, n, vocab, scale=4.0):
    logits = torch.from_numpy(generator.normal(size=(positions, vocab)) * scale)
    logprobs = logits.log_softmax(-1)
    ids = pps.sample(logprobs, n, torch.from_numpy(generator.random(positions)))
    return targets.sampled_from_logprobs(ids.numpy(), logprobs.gather(1, ids).numpy()), ids, logprobs


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
        sequences.append(targets.Sampled(kept.ids_NK + vocab - 13, kept.logweights_NK, kept.exact_N, kept.entropy_N))
    table = pa.table(targets.encode(sequences, vocab))
    assert targets.kind_of(table.column_names) == "sampled"
    for row, want in zip(table.to_pylist(), sequences, strict=True):
        got = targets.decode(targets.cut({name: np.array(value) for name, value in row.items()}, "sampled", len(want)))
        assert (got.ids_NK == want.ids_NK).all()
        np.testing.assert_allclose(got.logweights_NK, want.logweights_NK, atol=1e-6)
        np.testing.assert_allclose(got.entropy_N.sum(), want.entropy_N.sum(), rtol=1e-4, atol=1e-5)
        shorter = targets.decode(targets.cut({name: np.array(value) for name, value in row.items()}, "sampled", len(want) - 1))
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
    ids = pps.sample(logprobs.expand(4000, -1), 8, torch.from_numpy(generator.random(4000)))
    kept = targets.sampled_from_logprobs(ids.numpy(), logprobs.expand(4000, -1).gather(1, ids).numpy())
    weights = np.zeros((4000, 50))
    np.put_along_axis(weights, kept.ids_NK, np.exp(kept.logweights_NK), axis=1)
    p = logprobs.exp().numpy()[0]
    np.testing.assert_allclose(weights.mean(0), p, atol=5e-3)
    assert weights.var(0).sum() < 0.5 * (p * (1 - p) / 8).sum()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    n=st.integers(2, 60),
    vocab=st.sampled_from([13, 65536, 65537, 152064]),
    seed=st.integers(0, 2**31),
)
def test_multinomial_draws_come_back(lengths, n, vocab, seed):
    """Draw counts and the mean entropy of a row, whatever the positions of other rows hold."""
    generator = np.random.default_rng(seed)
    drawn = [vocab - 13 + generator.integers(0, 13, size=(length, n)) for length in lengths]
    logprobs = [-generator.random(ids.shape).astype(np.float32) for ids in drawn]
    sequences = [targets.multinomial_from_logprobs(*pair) for pair in zip(drawn, logprobs, strict=True)]
    columns = targets.encode(sequences, vocab)
    rows = [
        {name: column[i].as_py() if name == "target_entropy" else column[i].values.to_numpy() for name, column in columns.items()}
        for i in range(len(lengths))
    ]
    parts = [targets.cut(row, "multinomial", length) for row, length in zip(rows, lengths, strict=True)]
    got = targets.decode({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    for position, ids in enumerate(np.concatenate(drawn)):
        want = dict(zip(*np.unique(ids, return_counts=True), strict=True))
        held = got.counts_NK[position] > 0
        assert dict(zip(got.ids_NK[position][held], got.counts_NK[position][held], strict=True)) == want
        np.testing.assert_allclose(np.exp(got.logweights_NK[position]).sum(), 1, rtol=1e-5)
    entropies = np.repeat([-lp.mean() for lp in logprobs], lengths)
    np.testing.assert_allclose(got.entropy_N, entropies, rtol=1e-5)


def test_draws_with_replacement_are_unbiased():
    """The mean weight of every token over many draws is its probability, within 4.5 standard errors."""
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    positions, n = 4000, 10
    uniform = torch.rand(positions, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = pps.keep("multinomial", p.log().expand(positions, -1), n, uniform)
    counts = torch.nn.functional.one_hot(ids, len(p)).sum(1).double() / n
    standard_error = (p * (1 - p) / n / positions) ** 0.5
    assert ((counts.mean(0) - p).abs() < 4.5 * standard_error).all()
    torch.testing.assert_close(counts.var(0), p * (1 - p) / n, rtol=0.15, atol=0)


@given(st.integers(1, 12), st.sampled_from([640, 1000, 1024, 4096]), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_looking_at_blocks_first_finds_the_same_tokens(n, vocabulary, seed):
    """The most likely ones; and of a sample those above the threshold always, none twice, at the place of the random number."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = (torch.randn(3, vocabulary, generator=generator) * 3).log_softmax(-1)
    assert torch.equal(pps.most_likely(logprobs, n), logprobs.topk(n).indices)
    uniform = torch.rand(3, generator=generator, dtype=torch.float64)
    for row, ids in enumerate(pps.sample(logprobs, n, uniform)):
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
