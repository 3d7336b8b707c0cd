"""The losses against references in float64, written from the formulas on probabilities, never the code under test."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill import losses
from llmdistill.config import Train
from llmdistill.data.targets import Sampled, TopK
from llmdistill.losses import DIVERGENCES, Objective, fused

F_DIVERGENCES = sorted(set(DIVERGENCES) - {"adaptive_kl"})
WITH_BETA = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}


def kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def adaptive(p, q):
    found = []
    for p_row, q_row in zip(p, q, strict=True):
        head, mass = [], 0.0
        for outcome in sorted(range(len(p_row)), key=lambda j: -p_row[j]):
            if mass < 0.5:
                head.append(outcome)
            mass += float(p_row[outcome])
        gap = (p_row - q_row).detach().abs()
        share = gap[head].sum() / gap.sum()
        found.append(share * kl(p_row, q_row) + (1 - share) * kl(q_row, p_row))
    return torch.stack(found)


REFERENCES = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q, b=0.5: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
    "skew_kl": lambda p, q, b=0.1: kl(p, b * p + (1 - b) * q),
    "skew_reverse_kl": lambda p, q, b=0.1: kl(q, b * q + (1 - b) * p),
    "adaptive_kl": adaptive,
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "neg_log_acceptance": lambda p, q: -torch.minimum(p, q).sum(-1).log(),
}


def dense(name, teacher_NV, student_NV, temperature=1.0, *beta):
    """The textbook formula on two softmaxes with Hinton's factor."""
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (teacher_NV, student_NV))
    return REFERENCES[name](p, q, *beta) * temperature**2


def merged(probabilities_NV, ids_NK, temperature):
    """A distribution after everything outside the support is merged, each outcome to the power 1/T."""
    outside = torch.ones_like(probabilities_NV).scatter(1, ids_NK, 0.0)
    parts = [probabilities_NV.gather(1, ids_NK)]
    if ids_NK.shape[1] < probabilities_NV.shape[1]:
        parts.append((probabilities_NV * outside).sum(-1, keepdim=True))
    powered = torch.cat(parts, 1) ** (1 / temperature)
    return powered / powered.sum(-1, keepdim=True)


def bucketed(name, teacher_NV, student_NV, ids_NK, temperature=1.0, *beta):
    p, q = (merged(logits.double().softmax(-1), ids_NK, temperature) for logits in (teacher_NV, student_NV))
    return REFERENCES[name](p, q, *beta) * temperature**2


def topk(teacher_NV, k):
    logprobs_NV = teacher_NV.double().log_softmax(-1)
    top = logprobs_NV.topk(k)
    outside = torch.ones_like(logprobs_NV).scatter(1, top.indices, 0.0)
    return top.indices, top.values.float(), (logprobs_NV.exp() * outside).sum(-1).float()


def pair(seed, vocab, scale, rows=5):
    return torch.randn(2, rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


SEEDS, SCALES, TEMPERATURES = st.integers(0, 2**31), st.floats(0.1, 8), st.sampled_from([0.5, 1.0, 2.0, 4.0])


def test_there_is_a_reference_for_every_loss_that_can_be_configured():
    assert set(get_args(Train.model_fields["loss"].annotation)) == set(DIVERGENCES) == set(REFERENCES)


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, vocab=st.integers(2, 40), scale=SCALES, temperature=TEMPERATURES)
def test_at_k_equal_v_it_is_the_dense_divergence(name, seed, vocab, scale, temperature):
    teacher, student = pair(seed, vocab, scale)
    want = dense(name, teacher, student, temperature)
    stored = losses.topk_divergence(name, student, *topk(teacher, vocab), temperature)
    online = losses.divergence(name, teacher, student, temperature)
    torch.testing.assert_close(stored.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(online.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 20), scale=SCALES, temperature=TEMPERATURES)
def test_on_a_support_it_is_the_divergence_with_a_tail_bucket(name, seed, k, scale, temperature):
    teacher, student = pair(seed, 21, scale)
    ids, logprobs, tail = topk(teacher, k)
    got = losses.topk_divergence(name, student, ids, logprobs, tail, temperature).double()
    torch.testing.assert_close(got, bucketed(name, teacher, student, ids, temperature), rtol=1e-4, atol=1e-4)
    assert (got >= -1e-5).all()


@pytest.mark.parametrize("name", F_DIVERGENCES)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 20), scale=SCALES)
def test_merging_outcomes_never_makes_two_distributions_easier_to_tell_apart(name, seed, k, scale):
    """The data-processing inequality, also for a tail that storage has rounded to zero."""
    teacher, student = pair(seed, 21, scale)
    ids, logprobs, tail = topk(teacher, k)
    most = dense(name, teacher, student) * (1 + 1e-5) + 1e-5
    assert (losses.topk_divergence(name, student, ids, logprobs, tail).double() <= most).all()
    rounded = tail.where(tail > 2**-24, 0.0)
    if name == "neg_log_acceptance":  # the mass that rounding has taken from Σ min(p, q) may have been much of it
        most = -((-most).exp() - 2**-24).clamp(min=0).log()
    assert (losses.topk_divergence(name, student, ids, logprobs, rounded).double() <= most).all()


@pytest.mark.parametrize("name", sorted(WITH_BETA))
@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 0.9])
def test_beta_is_that_of_the_formula_and_bounds_the_skewed_ones(name, beta):
    teacher, student = pair(3, 30, 6.0)
    ids, logprobs, tail = topk(teacher, 8)
    got = losses.topk_divergence(name, student, ids, logprobs, tail, beta=beta).double()
    torch.testing.assert_close(got, bucketed(name, teacher, student, ids, 1.0, beta), rtol=1e-4, atol=2e-6)
    if name.startswith("skew"):
        assert (got <= -torch.tensor(beta).log() + 1e-6).all()


def test_the_ends_of_jsd_are_forward_and_reverse_kl():
    """The limits of Agarwal et al. 2024: JSD(β)/β and JSD(1 − β)/β as β goes to 0."""
    teacher, student = pair(4, 30, 2.0).double()
    for name, beta in (("forward_kl", 1e-6), ("reverse_kl", 1 - 1e-6)):
        limit = losses.divergence("jsd", teacher, student, beta=beta) / 1e-6
        torch.testing.assert_close(limit, dense(name, teacher, student), rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, 7, 32])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_against_float64_autograd(name, k, temperature):
    teacher, student = pair(1, 32, 3.0, rows=6)
    ids, logprobs, tail = topk(teacher, k)
    student = student.requires_grad_()
    losses.topk_divergence(name, student, ids, logprobs, tail, temperature).sum().backward()
    reference = student.detach().double().requires_grad_()
    bucketed(name, teacher, reference, ids, temperature).sum().backward()
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=2e-4, atol=5e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_is_at_distance_zero_from_itself(name, k, temperature):
    teacher = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 5
    ids, logprobs, tail = topk(teacher, k)
    assert losses.topk_divergence(name, teacher, ids, logprobs, tail, temperature).abs().max() < 1e-5
    assert losses.divergence(name, teacher, teacher, temperature).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIVERGENCES)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, k=st.sampled_from([1, 8, 64]), scale=st.sampled_from([1.0, 1e2, 1e4]), temperature=TEMPERATURES)
def test_finite_at_extreme_logits(dtype, name, seed, k, scale, temperature):
    """Logits of ±10,000, probabilities that underflow, tails of exactly 0 and of 1, a support of probability zero."""
    teacher, student = pair(seed, 64, 1.0, rows=8)
    teacher, student = teacher * scale, (student * scale).clamp(-1e4, 1e4).to(dtype)
    student[0] = torch.tensor([1e4, -1e4] * 32)
    ids, logprobs, tail = topk(teacher, k)
    tail[:2] = 0.0
    if k < 64:
        logprobs[2], tail[2] = -float("inf"), 1.0
        logprobs[3], tail[3] = -1e4, 1.0
    student.requires_grad_()
    loss = losses.topk_divergence(name, student, ids, logprobs, tail, temperature)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert (loss >= -1e-3).all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_online_teacher_may_mask_tokens(name):
    """Logits of −inf: a probability of zero for the teacher, whatever the student gives to it."""
    teacher, student = pair(5, 16, 2.0)
    teacher[:, 3] = -float("inf")
    student.requires_grad_()
    loss = losses.divergence(name, teacher, student)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    if name not in ("reverse_kl", "adaptive_kl"):  # infinite in the formula
        torch.testing.assert_close(loss.double(), dense(name, teacher, student), rtol=1e-4, atol=1e-5)


def test_a_sure_student_keeps_the_digits_of_what_is_outside():
    """1 − Σ_S q would be 0 in float32 here; the loss must still be r log(r / outside)."""
    student = torch.tensor([[40.0, 0.0, 0.0]])
    support = (torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5]))
    got = losses.topk_divergence("forward_kl", student, *support)
    outside = torch.tensor(2.0, dtype=torch.float64) / (torch.tensor(40.0, dtype=torch.float64).exp() + 2)
    want = 0.5 * torch.log(0.5 / (1 - outside)) + 0.5 * torch.log(0.5 / outside)
    torch.testing.assert_close(got[0].double(), want, rtol=1e-5, atol=0)


def test_the_acceptance_of_distributions_that_hardly_overlap_keeps_its_digits():
    """Each model gives exp(−60) to the other's choice; total variation is 1 there, and has no gradient."""
    teacher, student = torch.tensor([[60.0, 0.0]]), torch.tensor([[0.0, 60.0]], requires_grad=True)
    loss = losses.divergence("neg_log_acceptance", teacher, student)
    loss.sum().backward()
    exact = -torch.tensor(2.0, dtype=torch.float64).log() + 60
    torch.testing.assert_close(loss.detach().double(), exact[None], rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, torch.tensor([[-0.5, 0.5]]), rtol=1e-5, atol=1e-6)


def test_cross_entropy_is_in_float32_whatever_the_logits():
    logits = torch.randn(4, 10).bfloat16()
    labels = torch.tensor([1, 2, 3, 4])
    want = -logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(losses.cross_entropy(logits, labels).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_objective_mixes_cross_entropy_and_divergence(name, alpha):
    teacher, student = pair(6, 20, 2.0)
    labels = torch.tensor([3, 1, 4, 1, 5])
    ids, logprobs, tail = topk(teacher, 4)
    batch = {"target_kind": "topk", "target_ids": ids, "target_logprobs": logprobs, "target_tail": tail}
    student.requires_grad_()
    loss, sums = losses.distillation_loss(student, labels, batch, Objective(name, alpha, 2.0))
    loss.backward()
    reference = student.detach().double().requires_grad_()
    ce = F.cross_entropy(reference, labels, reduction="sum")
    part = bucketed(name, teacher, reference, ids, 2.0).sum()
    want = (1 - alpha) * ce + alpha * part
    want.backward()
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=2e-4, atol=5e-5)
    expected = {"ce": ce, "kl": bucketed("forward_kl", teacher, reference, ids, 2.0).sum()}
    expected |= {} if name == "forward_kl" else {name: part}
    expected["agreement"] = (student.argmax(-1) == teacher.argmax(-1)).sum()
    assert {key: value.item() for key, value in sums.items()} == pytest.approx(
        {key: value.item() for key, value in expected.items()}, rel=1e-4
    )
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, alpha=st.sampled_from([0.0, 0.4]), sequence_alpha=st.sampled_from([0.1, 0.6]))
def test_weights_and_the_sequence_level_kl_enter_as_the_formula_says(seed, alpha, sequence_alpha):
    teacher, student = pair(seed, 20, 2.0)
    labels, weights, importance = torch.tensor([3, 1, 4, 1, 5]), torch.rand(5), torch.rand(5) * 4
    ids, logprobs, tail = topk(teacher, 4)
    written = teacher.log_softmax(-1)[range(5), labels]
    batch = {"target_kind": "topk", "target_ids": ids, "target_logprobs": logprobs, "target_tail": tail}
    batch |= {"token_weights": weights, "token_importance": importance, "token_logprobs": written}
    loss, sums = losses.distillation_loss(student, labels, batch, Objective("jsd", alpha, sequence_alpha=sequence_alpha))
    log_q = student.double().log_softmax(-1)[range(5), labels]
    sequence = importance * (written - log_q)
    each = (1 - alpha - sequence_alpha) * -log_q + alpha * bucketed("jsd", teacher, student, ids) + sequence_alpha * sequence
    torch.testing.assert_close(loss.double(), (weights * each).sum(), rtol=1e-4, atol=1e-4)
    assert sums["sequence_kl"].item() == pytest.approx(sequence.sum().item(), rel=1e-4, abs=1e-4)
    assert sums["ce"].item() == pytest.approx(-log_q.sum().item(), rel=1e-4)


def test_the_sequence_level_kl_is_that_of_whole_texts():
    """Texts of two tokens over three, all nine of them, each as often as a tempered teacher writes it: KL(p(x) ‖ q(x))."""
    generator = torch.Generator().manual_seed(1)
    first_p, first_q = torch.randn(2, 3, generator=generator, dtype=torch.float64).softmax(-1)
    then_p, then_q = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64).softmax(-1)
    sampled = (first_p**2 / (first_p**2).sum())[:, None] * then_p**2 / (then_p**2).sum(1, keepdim=True)  # temperature 0.5
    exact, estimate = 0.0, 0.0
    for a in range(3):
        for b in range(3):
            p, q = first_p[a] * then_p[a, b], first_q[a] * then_q[a, b]
            exact += p * (p / q).log()
            ce = -torch.stack([first_q[a], then_q[a, b]]).log()
            written = torch.stack([first_p[a], then_p[a, b]]).log()
            importance = (p / sampled[a, b]).expand(2)
            estimate += sampled[a, b] * losses.sequence_kl(ce, written, importance).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-12)


def test_weights_that_leave_less_than_nothing_for_cross_entropy_are_refused():
    Objective(alpha=0.9, sequence_alpha=0.1)
    with pytest.raises(ValueError, match="add up to at most 1"):
        Objective(alpha=0.9, sequence_alpha=0.2)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_beta_is_taken_where_there_is_a_mixture_and_refused_elsewhere(name):
    if name in WITH_BETA:
        Objective(name, beta=0.3)
        Train(loss=name, beta=0.3)
        same = [losses.divergence(name, *pair(7, 9, 1.0), beta=beta) for beta in (None, WITH_BETA[name])]
        torch.testing.assert_close(*same)
        with pytest.raises(ValueError, match="above 0 and below 1"):
            Objective(name, beta=1.0)
    else:
        with pytest.raises(ValueError, match=f"{name} has no parameter beta"):
            Objective(name, beta=0.3)
        with pytest.raises(ValueError, match=f"{name} has no parameter beta"):
            Train(loss=name, beta=0.3)


def pps_targets(teacher_NV, n, seed):
    logprobs = teacher_NV.double().log_softmax(-1)
    uniform = torch.rand(len(logprobs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = Sampled.keep(logprobs, n, uniform[:, None])
    kept = Sampled.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
    return tuple(torch.from_numpy(part) for part in (kept.ids_NK, kept.logweights_NK, kept.entropy_N))


def test_sampled_kl_and_its_gradient_equal_the_dense_ones_in_expectation():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 1, 60, generator=generator) * 2
    draws = 6000
    leaf = student.expand(draws, -1).clone().requires_grad_()
    estimates = losses.sampled_kl(leaf, *pps_targets(teacher.expand(draws, -1), 10, seed=1)).double()
    estimates.sum().backward()
    reference = student.double().requires_grad_()
    exact = dense("forward_kl", teacher, reference)
    exact.sum().backward()
    error = estimates.std() / draws**0.5
    assert abs(estimates.mean() - exact[0]) < 4 * error + 1e-4
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


WITHOUT_A_TOKEN = {  # stored tokens of a vocabulary of five, the teacher's probabilities of them, and its tail
    "an end that an endpoint does not show": ([4, 4], [0.0, 0.0], 1.0),
    "the same with the label elsewhere": ([3, 3], [0.0, 0.0], 1.0),
    "a probability of zero": ([1, 4], [1.0, 0.0], 0.0),
    "a probability of zero, of the first": ([4, 1], [0.0, 0.75], 0.25),
    "a token that stands twice": ([1, 1], [0.5, 0.0], 0.5),
    "all tokens, with a tail of rounding": ([0, 1, 2, 3, 4], [0.1, 0.2, 0.3, 0.15, 0.25], 6e-8),
    "all tokens, one of them of zero": ([0, 1, 2, 3, 4], [0.1, 0.2, 0.3, 0.0, 0.4], 0.0),
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("loss", sorted(set(DIVERGENCES) - {"reverse_kl", "adaptive_kl"}))  # which take zero for 2^-24
@pytest.mark.parametrize("name", WITHOUT_A_TOKEN)
def test_what_has_no_probability_is_outside_the_support(name, loss, temperature):
    """By the definition, in float64: on the tokens that have one, and all others as one outcome; both forms of the loss alike."""
    ids, p, tail = WITHOUT_A_TOKEN[name]
    support = sorted({token for token, probability in zip(ids, p, strict=True) if probability})
    outcomes = [[token] for token in support] + [[token for token in range(5) if token not in support]]
    theirs = [max(probability for one, probability in zip(ids, p, strict=True) if one == token) for token in support] + [tail]
    if len(support) == 5:
        outcomes, theirs = outcomes[:5], theirs[:5]
    logits = torch.tensor([[0.3, -1.0, 0.8, 0.1, 1.7]], dtype=torch.float64, requires_grad=True)
    q = torch.stack([logits.softmax(1)[0, tokens].sum() for tokens in outcomes]) ** (1 / temperature)
    powers = torch.tensor(theirs, dtype=torch.float64) ** (1 / temperature)
    divergence = REFERENCES[loss]((powers / powers.sum())[None], (q / q.sum())[None])[0] * temperature**2
    want = 0.6 * divergence - 0.4 * logits.log_softmax(1)[0, 4]
    (gradient,) = torch.autograd.grad(want, logits)

    kept = TopK(np.array([ids]), torch.tensor([p]).log().numpy(), np.array([tail], dtype=np.float32))
    batch = {"target_kind": "topk", **{key: torch.from_numpy(values) for key, values in kept.batch().items()}}
    layer = torch.nn.Linear(5, 5, bias=False, dtype=torch.float64)
    torch.nn.init.eye_(layer.weight)
    objective, labels = Objective(loss, 0.6, temperature), torch.tensor([4])
    for value in (
        losses.distillation_loss(logits, labels, batch, objective)[0],
        fused.distillation_loss(logits, fused.Head(layer), labels, batch, objective)[0],
    ):
        torch.testing.assert_close(value, want.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(value, logits)[0], gradient, rtol=1e-3, atol=1e-5)
