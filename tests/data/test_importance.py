"""Importance weights against the mean that they are to give, and against numbers by hand."""

import numpy as np
import pytest

from llmdistill.data.importance import effective_sample_size, importance


def test_a_mean_under_another_distribution():
    """Draws from s = p^2 / Σ p^2, weighted back to p."""
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(6))
    s = p**2 / (p**2).sum()
    value = generator.normal(size=6)
    drawn = generator.choice(6, size=400_000, p=s)
    weights = importance(np.log(p / s)[drawn])
    assert (weights * value[drawn]).mean() == pytest.approx(p @ value, abs=0.01)
    assert abs(value[drawn].mean() - p @ value) > 0.05, "without weights it is another mean"
    assert weights.mean() == pytest.approx(1)


def test_a_weight_is_cut_at_the_square_root_of_their_number():
    """Of 16, one stands for nearly everything: it counts 4 times the mean, before the mean is one again."""
    weights = importance(np.array([0.0] * 15 + [50.0]))
    assert weights[-1] == pytest.approx(16)
    weights = importance(np.array([0.0] * 15 + [np.log(100.0)]))
    mean = (15 + 100) / 16
    parts = np.array([1 / mean] * 15 + [4.0])
    np.testing.assert_allclose(weights, parts / parts.mean())


def test_equal_weights_are_one_and_huge_logarithms_do_not_overflow():
    np.testing.assert_allclose(importance(np.full(5, 1e4)), 1)
    assert np.isfinite(importance(np.array([-1e5, 0.0, 1e5]))).all()


def test_effective_sample_size():
    assert effective_sample_size(np.ones(10)) == pytest.approx(10)
    assert effective_sample_size(np.array([1.0, 0, 0])) == pytest.approx(1)
    assert effective_sample_size(np.array([1.0, 3.0])) == pytest.approx(16 / 10)
