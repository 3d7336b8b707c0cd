"""What the kinds share: entropies of samples, over classes and without some tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.data.targets import Multinomial, Sampled
from llmdistill.data.targets.columns import entropy_within, entropy_without, merged

P = np.array([0.1, 0.2, 0.3, 0.4])


@settings(max_examples=50, deadline=None)
@given(k=st.integers(1, 12), classes=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_what_of_the_entropy_is_inside_of_classes(k, classes, seed):
    """Against the sum over pairs of a token and its class."""
    generator = np.random.default_rng(seed)
    weights_NK = generator.dirichlet(np.ones(k), 5) * (generator.random((5, k)) < 0.8)
    class_NK = generator.integers(0, classes, (5, k))
    same_NKK = class_NK[:, :, None] == class_NK[:, None, :]
    of_class_NK = (same_NKK * weights_NK[:, None, :]).sum(axis=2)
    ratio_NK = np.divide(of_class_NK, weights_NK, out=np.ones_like(weights_NK), where=weights_NK > 0)
    _, sums_NK = merged(class_NK, weights_NK)
    np.testing.assert_allclose(entropy_within(weights_NK, sums_NK), (weights_NK * np.log(ratio_NK)).sum(axis=1), atol=1e-14)


def test_the_entropy_of_what_is_left_by_hand():
    """Exact tokens are taken out exactly, drawn ones with the mean of all that were drawn."""
    weights_NK, log_p = np.array([[0.4, 0.3, 0.15, 0.15]]), np.log(np.array([0.4, 0.3, 0.14, 0.1]))
    entropy_N = -(weights_NK * log_p).sum(axis=1)
    found = entropy_without(entropy_N, weights_NK, np.array([[True, False, True, True]]), np.array([2]))
    left = [0.4, 0.15, 0.15]
    want = -sum(w / 0.7 * (of - np.log(0.7)) for w, of in zip(left, log_p[[0, 2, 3]], strict=True))
    np.testing.assert_allclose(found, want)
    found = entropy_without(entropy_N, weights_NK, np.array([[True, True, True, False]]), np.array([2]))
    mean = (log_p[2] + log_p[3]) / 2
    want = -sum(w / 0.85 * (of - np.log(0.85)) for w, of in zip([0.4, 0.3, 0.15], [*log_p[:2], mean], strict=True))
    np.testing.assert_allclose(found, want)
    for left_NK, want in ((np.ones((1, 4), dtype=bool), entropy_N), (np.zeros((1, 4), dtype=bool), [0.0])):
        np.testing.assert_allclose(entropy_without(entropy_N, weights_NK, left_NK, np.array([2])), want)


@pytest.mark.parametrize("by", ["within", "of_classes"])
@pytest.mark.parametrize(("kind", "p"), [(Sampled, P), (Multinomial, np.full(4, 0.25))])
def test_a_student_that_is_the_teacher_without_a_token_is_at_no_distance(kind, p, by):
    """The weights of the others are renormalised, and so is the distribution whose entropy is taken off."""
    logprobs = torch.from_numpy(np.log(np.append(p, [1e-30] * 2)))[None]
    uniform = torch.arange(8, dtype=torch.float64)[None] / 8 + 1 / 16
    ids = kind.keep(logprobs, 8 if kind is Multinomial else 5, uniform)
    kept = kind.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
    left = kept.within(3) if by == "within" else kept.of_classes(np.array([0, 1, 2, 3, 3, 3]), dropped=3)
    q = p[:3] / p[:3].sum()
    weights_NK = np.exp(left.logweights().astype(np.float64))
    kl = -(weights_NK * np.log(q)[left.ids_NK]).sum(axis=1) - left.entropy_N
    np.testing.assert_allclose(kl, 0, atol=1e-3)
