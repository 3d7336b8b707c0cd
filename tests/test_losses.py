"""The losses against dense float64 references: `F.kl_div` over the whole vocabulary, never the code under test."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill import losses, pps, targets


def dense_kl(teacher_NV, student_NV, temperature=1.0):
    """The textbook formula with Hinton's factor, in float64."""
    log_p = (teacher_NV.double() / temperature).log_softmax(-1)
    log_q = (student_NV.double() / temperature).log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * temperature**2


def topk(teacher_NV, k):
    logprobs_NV = teacher_NV.double().log_softmax(-1)
    top = logprobs_NV.topk(k)
    outside = torch.ones_like(logprobs_NV).scatter(1, top.indices, 0.0)
    return top.indices, top.values.float(), (logprobs_NV.exp() * outside).sum(-1).float()


def bucketed_kl(teacher_NV, student_NV, ids_NK):
    """KL after merging everything outside the support into one outcome, in float64 by explicit sums."""
    total = torch.zeros(len(ids_NK), dtype=torch.float64)
    for n, ids in enumerate(ids_NK):
        p, q = teacher_NV[n].double().softmax(-1), student_NV[n].double().softmax(-1)
        rest = torch.ones_like(p, dtype=torch.bool)
        rest[ids] = False
        p = torch.cat([p[ids], p[rest].sum()[None]])
        q = torch.cat([q[ids], q[rest].sum()[None]])
        total[n] = (p * (p / q).log()).sum()
    return total


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(2, 40),
    scale=st.floats(0.1, 8),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
)
def test_forward_kl_at_k_equal_v_is_the_dense_kl(seed, vocab, scale, temperature):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 5, vocab, generator=generator) * scale
    ids, logprobs, tail = topk(teacher, vocab)
    got = losses.forward_kl(student, ids, logprobs, tail, temperature)
    torch.testing.assert_close(got.double(), dense_kl(teacher, student, temperature), rtol=1e-4, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 20), scale=st.floats(0.1, 8))
def test_forward_kl_on_a_support_is_the_kl_with_a_tail_bucket(seed, k, scale):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 5, 21, generator=generator) * scale
    ids, logprobs, tail = topk(teacher, k)
    got = losses.forward_kl(student, ids, logprobs, tail).double()
    torch.testing.assert_close(got, bucketed_kl(teacher, student, ids), rtol=1e-4, atol=2e-5)
    assert (got <= dense_kl(teacher, student) + 1e-4).all()  # data-processing inequality
    assert (got >= -1e-5).all()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 7, 32])
def test_gradient_against_float64_autograd(k, temperature):
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 6, 32, generator=generator) * 3
    ids, logprobs, tail = topk(teacher, k)
    student = student.requires_grad_()
    losses.forward_kl(student, ids, logprobs, tail, temperature).sum().backward()

    reference = student.detach().double().requires_grad_()
    outside = torch.ones(6, 32, dtype=torch.float64).scatter(1, ids, 0.0)
    q = reference.softmax(-1)
    parts_q, parts_p = [q.gather(1, ids)], [logprobs.double().exp()]
    if k < 32:
        parts_q.append((q * outside).sum(-1, keepdim=True))
        parts_p.append(tail.double()[:, None])
    log_q = (torch.cat(parts_q, 1).log() / temperature).log_softmax(-1)
    log_p = (torch.cat(parts_p, 1).log() / temperature).log_softmax(-1)
    (F.kl_div(log_q, log_p, log_target=True, reduction="sum") * temperature**2).backward()
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 8, 64])
def test_a_teacher_is_at_distance_zero_from_itself(k, temperature):
    teacher = torch.randn(16, 64) * 5
    ids, logprobs, tail = topk(teacher, k)
    assert losses.forward_kl(teacher, ids, logprobs, tail, temperature).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 8, 64])
def test_finite_at_extreme_logits(dtype, k):
    teacher = torch.randn(8, 64) * 100
    student = (torch.randn(8, 64) * 1000).to(dtype).requires_grad_()
    ids, logprobs, tail = topk(teacher, k)
    loss = losses.forward_kl(student, ids, logprobs, tail)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


def test_a_sure_student_keeps_the_digits_of_what_is_outside():
    """1 − Σ_S q would be 0 in float32 here; the loss must still be r log(r / outside)."""
    student = torch.tensor([[40.0, 0.0, 0.0]])
    got = losses.forward_kl(student, torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]))
    outside = torch.tensor(2.0, dtype=torch.float64) / (torch.tensor(40.0, dtype=torch.float64).exp() + 2)
    want = 0.5 * torch.log(0.5 / (1 - outside)) + 0.5 * torch.log(0.5 / outside)
    torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=0)


def test_cross_entropy_is_in_float32_whatever_the_logits():
    logits = torch.randn(4, 10).bfloat16()
    labels = torch.tensor([1, 2, 3, 4])
    want = -logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(losses.cross_entropy(logits, labels).double(), want, rtol=1e-5, atol=1e-5)


def pps_targets(teacher_NV, n, seed):
    logprobs = teacher_NV.double().log_softmax(-1)
    uniform = torch.rand(len(logprobs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = pps.sample(logprobs, n, uniform)
    kept = targets.sampled_from_logprobs(ids.numpy(), logprobs.gather(1, ids).numpy())
    return tuple(torch.from_numpy(part) for part in (kept.ids_NK, kept.logweights_NK, kept.entropy_N))


def test_sampled_kl_and_its_gradient_equal_the_dense_ones_in_expectation():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 1, 60, generator=generator) * 2
    draws = 6000
    leaf = student.expand(draws, -1).clone().requires_grad_()
    estimates = losses.sampled_kl(leaf, *pps_targets(teacher.expand(draws, -1), 10, seed=1)).double()
    estimates.sum().backward()
    reference = student.double().requires_grad_()
    dense = dense_kl(teacher, reference)
    dense.sum().backward()
    error = estimates.std() / draws**0.5
    assert abs(estimates.mean() - dense[0]) < 4 * error + 1e-4
    torch.testing.assert_close(leaf.grad.double().mean(0), reference.grad[0], atol=3e-3, rtol=0)


def test_every_sample_puts_the_teacher_at_distance_zero_from_itself():
    teacher = torch.randn(64, 200) * 4
    assert losses.sampled_kl(teacher, *pps_targets(teacher, 8, seed=0)).abs().max() < 2e-3
    assert losses.sampled_kl(teacher, *pps_targets(teacher, 8, seed=0)).mean().abs() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sampled_kl_is_finite_at_extreme_logits(dtype):
    student = (torch.randn(8, 64) * 1000).to(dtype).requires_grad_()
    loss = losses.sampled_kl(student, *pps_targets(torch.randn(8, 64) * 100, 8, seed=0))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
