"""Targets of the mean of several teachers, from what each of them kept: against the mean over the whole vocabulary."""

import numpy as np
import pytest
import torch

from llmdistill.data.targets import KINDS, MemberTokens, Multinomial, Sampled, TopK
from llmdistill.losses import weighted_kl

V, WEIGHTS = 40, np.array([0.5, 0.3, 0.2])


@pytest.fixture(scope="module")
def logprobs_MV():
    """Three teachers that agree on some tokens and not on others; one has no mass on a few."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(3, V, generator=generator, dtype=torch.float64) + 2 * torch.randn(
        V, generator=generator, dtype=torch.float64
    )
    logits[1, :4] = -torch.inf
    return logits.log_softmax(-1)


def kept_by_members(kind, logprobs_MV, n, draws, seed=0):
    """What each member keeps, `draws` times, with random numbers of its own."""
    generator, size = torch.Generator().manual_seed(seed), KINDS[kind].of_member(n)
    dense = [logprobs[None].expand(draws, -1) for logprobs in logprobs_MV]
    uniforms = [torch.rand(draws, KINDS[kind].uniforms(size), generator=generator, dtype=torch.float64) for _ in dense]
    ids = [KINDS[kind].keep(dense_NV, size, uniform).numpy() for dense_NV, uniform in zip(dense, uniforms, strict=True)]
    said = [[logprobs.numpy()[kept] for kept in ids] for logprobs in logprobs_MV]
    uniform_NU = torch.rand(draws, KINDS[kind].uniforms(n), generator=generator, dtype=torch.float64).numpy()
    return MemberTokens(np.stack(ids), np.array(said), np.log(WEIGHTS)), uniform_NU


def mean_of(logprobs_MV):
    return torch.from_numpy(WEIGHTS) @ logprobs_MV.exp()


@pytest.mark.parametrize(("kind", "n"), [("sampled", 3), ("sampled", 6), ("sampled", 12), ("multinomial", 6)])
def test_the_mean_over_many_draws_is_the_mean_of_the_teachers(logprobs_MV, kind, n):
    """Of every token's weight, and of the entropy; within three standard errors of it, but for rounding to float16."""
    draws = 40_000
    members, uniform_NU = kept_by_members(kind, logprobs_MV, n, draws)
    mixed = KINDS[kind].mix(members, n, uniform_NU)
    weights_NV = np.zeros((draws, V))
    np.add.at(weights_NV, (np.arange(draws)[:, None], mixed.ids_NK), np.exp(mixed.logweights().astype(np.float64)))
    np.testing.assert_allclose(weights_NV.sum(1), 1, atol=1e-5)
    p_V = mean_of(logprobs_MV)
    rounding_V = (-p_V * p_V.log()).numpy() * 2**-11  # of a log-probability to float16
    error_V = np.abs(weights_NV.mean(0) - p_V.numpy()) - rounding_V
    standard_error_V = weights_NV.std(0) / draws**0.5
    assert (error_V < 3.5 * standard_error_V).all()
    assert np.mean(error_V < 2 * standard_error_V) > 0.85
    entropy = float(-(p_V * p_V.log()).sum())
    assert abs(mixed.entropy_N.mean() - entropy) < 3.5 * mixed.entropy_N.std() / draws**0.5 + 2e-3


def test_the_sample_of_samples_is_nearly_as_good_as_one_of_the_whole(logprobs_MV):
    """Its variance is at most one half above that of a sample of as many tokens from the mean itself, and below that of draws."""
    draws, n = 20_000, 8
    members, uniform_NU = kept_by_members("sampled", logprobs_MV, n, draws)
    mean_NV = mean_of(logprobs_MV).log()[None].expand(draws, -1)
    ids = Sampled.keep(mean_NV, n, torch.from_numpy(uniform_NU))
    whole = Sampled.from_kept(ids.numpy(), mean_NV.gather(1, ids).numpy())
    several, uniform_several = kept_by_members("multinomial", logprobs_MV, n, draws)

    def variance(targets):
        weights_NV = np.zeros((draws, V))
        np.add.at(weights_NV, (np.arange(draws)[:, None], targets.ids_NK), np.exp(targets.logweights()))
        return weights_NV.var(0).sum()

    mixed = variance(Sampled.mix(members, n, uniform_NU))
    assert variance(whole) < mixed < 1.5 * variance(whole)
    assert mixed < 0.5 * variance(Multinomial.mix(several, n, uniform_several))


def test_every_outcome_of_two_draws_enumerated():
    """Two teachers of three tokens; all random numbers on a grid: the mean is exact, not but for noise."""
    logprobs_MV = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64).log()
    grid = (np.arange(60) + 0.5) / 60
    first, second, third = (values.ravel() for values in np.meshgrid(grid, grid, grid, indexing="ij"))
    ids = [
        Sampled.keep(logprobs[None].expand(len(first), -1), 2, torch.from_numpy(uniform)[:, None]).numpy()
        for logprobs, uniform in zip(logprobs_MV, (first, second), strict=True)
    ]
    said = np.array([[logprobs.numpy()[kept] for kept in ids] for logprobs in logprobs_MV])
    mixed = Sampled.mix(MemberTokens(np.stack(ids), said, np.log([0.6, 0.4])), 2, third[:, None])
    weights_NV = np.zeros((len(first), 3))
    np.add.at(weights_NV, (np.arange(len(first))[:, None], mixed.ids_NK), np.exp(mixed.logweights().astype(np.float64)))
    np.testing.assert_allclose(weights_NV.mean(0), 0.6 * np.array([0.5, 0.3, 0.2]) + 0.4 * np.array([0.1, 0.2, 0.7]), atol=5e-3)


def test_the_loss_is_unbiased(logprobs_MV):
    """The mean of the KL over many draws is that of the mean teacher and the student over the whole vocabulary."""
    draws, n = 40_000, 6
    members, uniform_NU = kept_by_members("sampled", logprobs_MV, n, draws)
    mixed = Sampled.mix(members, n, uniform_NU)
    student_V = torch.randn(V, generator=torch.Generator().manual_seed(5), dtype=torch.float64).log_softmax(-1)
    p_V = mean_of(logprobs_MV)
    batch = mixed.batch()
    picked_NK = student_V[torch.from_numpy(batch["target_ids"])]
    each_N = weighted_kl(picked_NK, torch.from_numpy(batch["target_logweights"]), torch.from_numpy(batch["target_entropy"]))
    exact = float((p_V * (p_V.log() - student_V)).sum())
    assert abs(float(each_N.mean()) - exact) < 3.5 * float(each_N.std()) / draws**0.5 + 2e-3


def test_what_is_most_likely_has_its_exact_probability(logprobs_MV):
    members, uniform_NU = kept_by_members("topk", logprobs_MV, 10, 2)
    mixed = TopK.mix(members, 10, uniform_NU)
    p_V = mean_of(logprobs_MV).numpy()
    for position in range(2):
        assert mixed.ids_NK[position].tolist() == np.argsort(-p_V, kind="stable")[:10].tolist()
    np.testing.assert_allclose(np.exp(mixed.logprobs_NK[0]), np.sort(p_V)[::-1][:10], rtol=1e-6)
    np.testing.assert_allclose(mixed.tail_N, 1 - np.sort(p_V)[::-1][:10].sum(), atol=1e-6)


def test_a_mean_of_one_is_the_one(logprobs_MV):
    members, uniform_NU = kept_by_members("topk", logprobs_MV[:1], 5, 1)
    alone = MemberTokens(members.ids_MNK, members.logprobs_LMNK, np.zeros(1))
    np.testing.assert_array_equal(TopK.mix(alone, 5, uniform_NU).logprobs_NK[0], logprobs_MV[0].topk(5).values.float())
