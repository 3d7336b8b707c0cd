"""Targets of kind `topk`: by hand, and through the codec."""

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.data.targets import TopK
from tests.factories import most_likely


def random_topk(generator, positions, k, vocab, scale=4.0):
    logits = generator.normal(size=(positions, vocab)) * scale
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return most_likely(logprobs, k), logprobs


def test_topk_by_hand():
    logprobs = np.log(np.array([[0.1, 0.6, 0.05, 0.25]]))
    kept = most_likely(logprobs, 2)
    assert kept.ids_NK.tolist() == [[1, 3]]
    np.testing.assert_allclose(np.exp(kept.logprobs_NK), [[0.6, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(kept.tail_N, [0.15], rtol=1e-6)


def test_rounding_above_one_gives_an_empty_tail_not_a_negative_one():
    kept = TopK.from_kept(np.array([[0, 1]]), np.array([[np.log(0.7), np.log(0.3000001)]], dtype=np.float32))
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
        sequences.append(TopK(kept.ids_NK + shift, kept.logprobs_NK, kept.tail_N))
    columns = TopK.encode(sequences, vocab)
    assert columns["target_ids"].type.value_type == (pa.uint16() if vocab <= 65536 else pa.uint32())
    for number, sequence in enumerate(sequences):
        got = TopK.decode({name: column[number].values.to_numpy() for name, column in columns.items()})
        assert (got.ids_NK == sequence.ids_NK).all()
        total = np.exp(got.logprobs_NK.astype(np.float64)).sum(1) + got.tail_N
        np.testing.assert_allclose(total, 1, atol=1e-5)
        # The stated error: one part in 2,048 of a log-probability, and the same for the sum that it is divided by.
        bound = np.abs(sequence.logprobs_NK).max() / 2048 * 2 + 1e-5
        assert np.abs(got.logprobs_NK - sequence.logprobs_NK).max() <= bound


def test_decoding_several_sequences_at_once_equals_one_by_one():
    generator = np.random.default_rng(0)
    sequences = [random_topk(generator, length, 3, 20)[0] for length in (2, 5, 1)]
    columns = TopK.encode(sequences, 20)
    together = TopK.decode({name: column.flatten().to_numpy() for name, column in columns.items()})
    apart = [TopK.decode({name: column[i].values.to_numpy() for name, column in columns.items()}) for i in range(3)]
    assert (together.ids_NK == np.concatenate([part.ids_NK for part in apart])).all()
    assert (together.logprobs_NK == np.concatenate([part.logprobs_NK for part in apart])).all()
