import numpy as np
import scipy.stats

from llmdistill.bootstrap import draw_clusters, mean_interval


def test_the_mean_is_over_tokens_not_over_rows():
    interval = mean_interval(np.array([1.0, 30.0]), np.array([1, 10]), draw_clusters(2, 200, 0))
    assert interval.mean == 31 / 11
    assert (interval.low, interval.high) == (1.0, 3.0)


def test_agrees_with_scipy():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 60, size=80)
    sums = tokens * generator.gamma(2, 1, size=80)
    got = mean_interval(sums, tokens, draw_clusters(80, 20_000, 1))

    def ratio(s, t, axis):
        return s.sum(axis) / t.sum(axis)

    want = scipy.stats.bootstrap((sums, tokens), ratio, paired=True, n_resamples=20_000, method="percentile", rng=2)
    np.testing.assert_allclose([got.low, got.high], want.confidence_interval, rtol=0.01)


def test_coverage():
    """Nineteen in twenty intervals hold the true mean; fewer than 88 of 100 would have a chance below 1 in 1,000."""
    generator = np.random.default_rng(3)
    tokens = np.ones(60)
    held = 0
    for seed in range(100):
        interval = mean_interval(generator.normal(1.0, 2.0, size=60), tokens, draw_clusters(60, 500, seed))
        held += interval.low <= 1.0 <= interval.high
    assert held >= 88
