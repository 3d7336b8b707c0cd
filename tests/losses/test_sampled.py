"""Divergences from samples against the dense formulas in float64, value and gradient, over many draws."""

import numpy as np
import pytest
import torch

from llmdistill.data.targets import SampledByStudent, SampledLogprobs
from llmdistill.losses import DIVERGENCES, Objective, sampled_divergence
from tests.losses.forms import assert_both_forms

V, K, DRAWS = 40, 8, 20_000
BY_STUDENT = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation")
BY_TEACHER = ("forward_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation")
CASES = [(SampledByStudent, name) for name in BY_STUDENT] + [(SampledLogprobs, name) for name in BY_TEACHER]


def distributions(seed=0):
    """Log-probabilities (1, V) of a teacher, of the student that wrote the text, and of what it has become since.

    Between a few tokens with a quarter of the mass each and many with a thousandth, which come often enough to be counted.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher, apart, step = 4 * torch.rand(3, 1, V, generator=generator, dtype=torch.float64) - 2
    teacher[:, :2] += 3
    writer = teacher + 0.6 * apart
    return (logits.log_softmax(-1) for logits in (teacher, writer, writer + 0.3 * step))


def terms_of(name, p, q):
    """F(p, q), written out again and not by the code under test."""
    m, skew, skew_reverse = (p + q) / 2, 0.1 * p + 0.9 * q, 0.1 * q + 0.9 * p
    return {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": (p * (p / m).log() + q * (q / m).log()) / 2,
        "skew_kl": p * (p / skew).log(),
        "skew_reverse_kl": q * (q / skew_reverse).log(),
        "total_variation": (p - q).abs() / 2,
    }[name]


def dense(name, log_p, logits):
    """Σ f(p, q) over the vocabulary, (N,)."""
    return terms_of(name, log_p.exp(), logits.softmax(-1)).sum(-1)


def drawn(kind, teacher, writer, draws=DRAWS, seed=1):
    """As many samples of the same position: the targets' arrays as tensors in float64."""
    uniform = torch.rand(draws, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    source = (writer if kind is SampledByStudent else teacher).expand(draws, -1)
    ids = SampledLogprobs.keep(source, K, uniform)
    soft = SampledLogprobs.from_kept(ids.numpy(), source.gather(1, ids).numpy())
    if kind is SampledByStudent:
        told = np.take_along_axis(teacher.expand(draws, -1).numpy(), soft.ids_NK, axis=1)
        soft = SampledByStudent.of_sample(soft, told)
    batch = {name: torch.from_numpy(np.asarray(values)) for name, values in soft.batch().items()}
    return {name: values.double() if values.is_floating_point() else values for name, values in batch.items()}


def estimates(name, batch, logits, **changed):
    """The estimate of each draw, and its gradient with respect to the logits."""
    leaf = logits.detach().expand(len(batch["target_ids"]), -1).clone().requires_grad_()
    log_q = leaf.log_softmax(-1).gather(1, batch["target_ids"])
    batch = {**batch, **changed}
    value = sampled_divergence(name, log_q, batch["target_logprobs"], batch["target_logdesign"], batch.get("target_logratio"))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def z_scores(name, teacher, student, value, gradient):
    """By how many standard errors the mean value and every component of the mean gradient miss the dense ones."""
    exact = student.detach().clone().requires_grad_()
    want = dense(name, teacher, exact)
    (wanted,) = torch.autograd.grad(want.sum(), exact)
    found = torch.cat([value[:, None], gradient], dim=1)
    missed = found.mean(0) - torch.cat([want.detach()[:, None], wanted], dim=1)[0]
    return missed / (found.std(0) / len(found) ** 0.5).clamp(min=1e-8)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "name", value))
def test_value_and_gradient_are_unbiased_after_the_student_has_moved(kind, name):
    teacher, writer, student = distributions()
    batch = drawn(kind, teacher, writer)
    assert z_scores(name, teacher, student, *estimates(name, batch, student)).abs().max() < 4


def test_the_test_sees_the_bias_of_a_control_from_the_sample_itself():
    """Which the mean log ratio of its own drawn tokens is, and so is dividing by the sum of the weights."""
    teacher, writer, student = distributions()
    batch = drawn(SampledByStudent, teacher, writer)
    is_drawn = batch["target_logdesign"] > 0
    log_q = student.expand(DRAWS, -1).gather(1, batch["target_ids"])
    own = ((log_q - batch["target_logprobs"]) * is_drawn).sum(1) / is_drawn.sum(1)
    found = z_scores("reverse_kl", teacher, student, *estimates("reverse_kl", batch, student, target_logratio=own))
    assert found[1:].abs().max() > 6
    total = (batch["target_logdesign"] + log_q).logsumexp(1, keepdim=True)
    shared = batch["target_logdesign"] - total
    found = z_scores("reverse_kl", teacher, student, *estimates("reverse_kl", batch, student, target_logdesign=shared))
    assert found.abs().max() > 6


def test_the_control_variate_takes_variance_away():
    """Against c = 0, and nearly as well as the best constant, the true mean log ratio of what was drawn."""
    teacher, writer, student = distributions()
    batch = drawn(SampledByStudent, teacher, writer)

    def spread(**changed):
        _, gradient = estimates("reverse_kl", batch, student, **changed)
        return gradient.var(0).sum()

    none = torch.full((DRAWS,), -1.0, dtype=torch.float64)  # ∂f/∂q = log(q/p) + 1
    assert spread() < 0.75 * spread(target_logratio=none)
    assert spread() < 1.1 * min(spread(target_logratio=none + 1 + value / 4) for value in range(-8, 9))


def test_the_control_variate_of_a_position_knows_nothing_of_its_own_sample():
    teacher, writer, _ = distributions()
    one, other = (drawn(SampledByStudent, teacher, writer, 5, seed)["target_logratio"] for seed in (1, 2))
    assert not torch.equal(one, other)
    ids = SampledLogprobs.keep(writer.expand(5, -1), K, torch.tensor([[0.1], [0.3], [0.5], [0.7], [0.9]]))
    again = ids.clone()
    again[2] = SampledLogprobs.keep(writer, K, torch.tensor([[0.95]]))
    ratios = []
    for kept in (ids, again):
        soft = SampledLogprobs.from_kept(kept.numpy(), writer.expand(5, -1).gather(1, kept).numpy())
        told = np.take_along_axis(teacher.expand(5, -1).numpy(), soft.ids_NK, axis=1)
        ratios.append(SampledByStudent.of_sample(soft, told).logratio_N)
    assert ratios[0][2] == pytest.approx(ratios[1][2], abs=1e-12)
    assert np.abs(ratios[0] - ratios[1]).max() > 1e-3


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: getattr(value, "name", value))
def test_both_forms_are_the_formula_on_the_sample(kind, name):
    """The plain and the fused loss, of hidden states, with cross-entropy beside; the formula is written out in float64."""
    rows, width = 11, 6
    teacher, writer, _ = distributions(3)
    batch = drawn(kind, teacher, writer, rows)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    layer = torch.nn.Linear(width, V, bias=False)
    labels = torch.randint(0, V, (rows,), generator=generator)
    batch |= {"target_kind": kind.name, "token_weights": torch.rand(rows, generator=generator)}

    def formula(logits):
        log_q = logits.log_softmax(-1)
        ids, p, design = batch["target_ids"], batch["target_logprobs"].exp(), batch["target_logdesign"].exp()
        q = log_q.exp().gather(1, ids)
        c, d = plane(name, batch.get("target_logratio"), rows)
        each = terms_of(name, p, q) - c[:, None] * q - d[:, None] * p
        soft = (each * design).sum(1) + c + d
        ce = -log_q.gather(1, labels[:, None])[:, 0]
        return ((0.7 * soft + 0.3 * ce) * batch["token_weights"]).sum()

    assert_both_forms(hidden, layer, labels, batch, Objective(name, 0.7), formula, 4, (1e-4, 1e-4), (1e-3, 1e-4))


def plane(name, logratio, rows):
    """What c and d are to be, by hand: from the teacher f(0, 1) and 0; from the student ∂f/∂q at the ratio and f(1, 0)."""
    log2, one = np.log(2), torch.ones(rows, dtype=torch.float64)
    if logratio is None:
        c = {"forward_kl": 0, "jsd": log2 / 2, "skew_kl": 0, "skew_reverse_kl": np.log(10), "total_variation": 0.5}[name]
        return c * one, 0 * one
    r = logratio.exp()  # q/p
    c = {
        "reverse_kl": r.log() + 1,
        "jsd": (2 * r / (1 + r)).log() / 2,
        "skew_kl": -0.9 / (0.1 + 0.9 * r),
        "skew_reverse_kl": (r / (0.1 * r + 0.9)).log() + 1 - 0.1 * r / (0.1 * r + 0.9),
        "total_variation": (r - 1).sign() / 2,
    }[name]
    d = {"reverse_kl": 0, "jsd": log2 / 2, "skew_kl": np.log(10), "skew_reverse_kl": 0, "total_variation": 0.5}[name]
    return c, d * one


@pytest.mark.parametrize("kind", [SampledLogprobs, SampledByStudent], ids=lambda kind: kind.name)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(kind):
    """Sample by sample, the gradient of every divergence is zero where p = q on all of the sample."""
    teacher, _, _ = distributions()
    batch = drawn(kind, teacher, teacher, 50)
    for name in BY_STUDENT if kind is SampledByStudent else BY_TEACHER:
        if name != "total_variation":  # which has no derivative there
            value, gradient = estimates(name, batch, teacher)
            if kind is SampledByStudent:
                assert gradient.abs().max() < 1e-6
            assert value.mean().abs() < 0.02


@pytest.mark.parametrize("kind", [SampledLogprobs, SampledByStudent], ids=lambda kind: kind.name)
def test_finite_at_extreme_logits(kind):
    generator = torch.Generator().manual_seed(0)
    teacher, writer = (torch.randn(1, V, generator=generator, dtype=torch.float64).mul(size).log_softmax(-1) for size in (60, 40))
    batch = drawn(kind, teacher, writer, 16)
    for name in BY_STUDENT if kind is SampledByStudent else BY_TEACHER:
        student = (torch.randn(1, V, generator=generator, dtype=torch.float64) * 50).float()
        value, gradient = estimates(name, {key: v.float() if v.is_floating_point() else v for key, v in batch.items()}, student)
        assert value.isfinite().all(), name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("name", DIVERGENCES)
def test_what_a_sample_cannot_tell_is_refused(name):
    for kind, able in ((SampledByStudent, BY_STUDENT), (SampledLogprobs, BY_TEACHER)):
        assert (kind.refuses(name, 1.0) is None) == (name in able)
        assert kind.refuses(name, 2.0) is not None
