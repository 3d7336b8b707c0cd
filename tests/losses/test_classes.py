"""The loss over root classes: against its formula in float64, and against the loss of one vocabulary."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmdistill import losses
from llmdistill.data.targets import KINDS, Multinomial, Sampled, TopK
from llmdistill.losses import DIVERGENCES, Objective, fused
from llmdistill.losses.classes import ClassTable, segment_logsumexp
from llmdistill.models.root_classes import RootClasses, Vocabulary, root_classes
from tests.losses.forms import assert_both_forms

N, D, V, T, K, C = 11, 8, 30, 24, 6, 9


def targets_of(kind, teacher_NV, seed=0):
    """Stored targets of full distributions."""
    logprobs = teacher_NV.log_softmax(-1).float()
    uniform = torch.rand(len(logprobs), KINDS[kind].uniforms(K), generator=torch.Generator().manual_seed(seed))
    ids = KINDS[kind].keep(logprobs, K, uniform)
    return KINDS[kind].from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())


def batch_of(kind, teacher_NV, classes, soft_N):
    soft = targets_of(kind, teacher_NV)
    batch = {"target_kind": kind, **(soft.of_classes(classes.teacher_V) if classes else soft).batch()}
    batch = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}
    batch["token_weights"] = torch.ones(len(teacher_NV))
    if classes:
        batch |= {"target_soft": soft_N, "target_table": ClassTable.of(classes)}
    return soft, batch


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    layer = torch.nn.Linear(D, V, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(V, D, generator=generator))
    labels = torch.randint(0, V, (N,), generator=generator)
    teacher = torch.randn(N, T, generator=generator) * 2
    soft = torch.rand(N, generator=generator) < 0.7
    rng = np.random.default_rng(seed)
    student_V, teacher_V = (np.concatenate([np.arange(C), rng.integers(0, C, size - C)]) for size in (V, T))
    return hidden, layer, labels, teacher, soft, RootClasses(rng.permutation(teacher_V), rng.permutation(student_V))


def by_the_formula(logits, labels, stored, classes, soft, kind, loss, alpha):
    """Position by position, class by class, in float64."""
    total = 0.0
    for n in range(len(labels)):
        q = logits[n].softmax(-1)
        of_class = torch.from_numpy(classes.student_V)
        big_q = torch.stack([q[of_class == c].sum() for c in range(classes.count)])
        ce = -q[labels[n]].log()
        part = ce
        if soft[n]:
            weights = torch.zeros(classes.count, dtype=torch.float64)
            there = np.exp(stored.logweights()[n].astype(np.float64))
            for token, weight in zip(stored.ids_NK[n], there, strict=True):
                weights[classes.teacher_V[token]] += float(weight)
            if kind == "topk":
                p = torch.cat([weights[weights > 0], torch.tensor([float(stored.tail_N[n])], dtype=torch.float64)])
                rest = big_q[weights == 0].sum() if (weights == 0).any() else torch.zeros((), dtype=torch.float64)
                q_outcomes = torch.cat([big_q[weights > 0], rest[None].clamp(min=1e-30)])
                part = DIVERGENCES[loss]((p / p.sum()).log()[None], q_outcomes.log()[None])[0]
            else:
                within = sum(
                    float(w) * np.log(float(weights[classes.teacher_V[t]]) / float(w))
                    for t, w in zip(stored.ids_NK[n], there, strict=True)
                    if w > 0
                )
                part = -(weights * big_q.log()).sum() - (float(stored.entropy_N[n]) - within)
            part = part - (q[labels[n]] / big_q[of_class[labels[n]]]).log()
        total = total + (1 - alpha) * ce + alpha * part
    return total


CASES = [("sampled", "forward_kl"), ("multinomial", "forward_kl"), *(("topk", name) for name in DIVERGENCES)]


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize(("kind", "loss"), CASES)
def test_values_and_gradients_are_those_of_the_formula(kind, loss, rows):
    hidden, layer, labels, teacher, soft, classes = problem()
    stored, batch = batch_of(kind, teacher, classes, soft)
    assert_both_forms(
        hidden, layer, labels, batch, Objective(loss, alpha=0.7),
        lambda logits: by_the_formula(logits, labels, stored, classes, soft, kind, loss, 0.7), rows, (1e-5, 1e-5), (2e-4, 2e-5),
    )  # fmt: skip


def test_both_forms_give_the_same_parts():
    hidden, layer, labels, teacher, soft, classes = problem(1)
    for kind in ("sampled", "topk"):
        _, batch = batch_of(kind, teacher, classes, soft)
        objective = Objective("forward_kl", alpha=0.5)
        _, plain = losses.distillation_loss(hidden @ layer.weight.T, labels, batch, objective)
        _, got = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective, chunk_bytes=4 * 4 * V)
        assert got.keys() == plain.keys() == {"ce", "kl", "agreement"}
        assert {name: float(value) for name, value in got.items()} == pytest.approx(
            {name: float(value) for name, value in plain.items()}, rel=1e-5
        )


@pytest.mark.parametrize("form", ["plain", "fused"])
@pytest.mark.parametrize(("kind", "loss"), [*CASES, *(("online", name) for name in DIVERGENCES)])
def test_one_vocabulary_gives_the_loss_of_one_vocabulary(kind, loss, form):
    hidden, layer, labels, *_ = problem(2)
    teacher = torch.randn(N, V, generator=torch.Generator().manual_seed(5)) * 2
    classes = RootClasses(np.arange(V), np.arange(V))
    if kind == "online":
        batch = {"teacher_logits": teacher, "token_weights": torch.ones(N)}
        by_class = batch | {"target_soft": torch.ones(N, dtype=torch.bool), "target_table": ClassTable.of(classes)}
    else:
        _, batch = batch_of(kind, teacher, None, None)
        _, by_class = batch_of(kind, teacher, classes, torch.ones(N, dtype=torch.bool))
    objective = Objective(loss, alpha=0.8)

    def loss_of(targets):
        if form == "plain":
            return losses.distillation_loss(hidden @ layer.weight.T, labels, targets, objective)
        return fused.distillation_loss(hidden, fused.Head(layer), labels, targets, objective, chunk_bytes=5 * 4 * V)

    (ours, parts), (today, parts_today) = loss_of(by_class), loss_of(batch)
    torch.testing.assert_close(ours, today, rtol=1e-6, atol=1e-6)
    for name, value in parts_today.items():
        torch.testing.assert_close(parts[name].float(), value.float(), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(value, (hidden, layer.weight), retain_graph=True) for value in (ours, today)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_an_online_teacher_is_compared_class_by_class(loss):
    hidden, layer, labels, teacher, soft, classes = problem(3)
    batch = {
        "teacher_logits": teacher,
        "token_weights": torch.ones(N),
        "target_soft": soft,
        "target_table": ClassTable.of(classes),
    }
    found, _ = fused.distillation_loss(
        hidden, fused.Head(layer), labels, batch, Objective(loss, alpha=1.0), chunk_bytes=4 * 4 * V
    )
    logits = (hidden @ layer.weight.T).double()
    q, p = logits.softmax(-1), teacher.double().softmax(-1)
    q_C, p_C = (
        torch.zeros(N, classes.count, dtype=torch.float64).index_add(1, torch.from_numpy(of), values)
        for of, values in ((classes.student_V, q), (classes.teacher_V, p))
    )
    ce = F.cross_entropy(logits, labels, reduction="none")
    own = q_C.gather(1, torch.from_numpy(classes.student_V)[labels][:, None])[:, 0].log()
    want = torch.where(soft, DIVERGENCES[loss](p_C.log(), q_C.log()) + own + ce, ce).sum()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


def greedy(vocabulary):
    """The longest token first, as a tokenizer of a toy vocabulary."""
    return lambda strings: [max((t for t in vocabulary if s.startswith(t)), key=len, default=b"") for s in strings]


def toy():
    theirs, own = [b"a", b"b", b"ab"], [b"a", b"b", b"ba"]
    sides = [Vocabulary([*strings, None], [3], 4, greedy(strings)) for strings in (theirs, own)]
    return root_classes(*sides)


def test_roots_of_the_toy_vocabularies():
    classes = toy()
    assert classes.teacher_V.tolist() == [0, 1, 0, 2]  # a, b, ab → a, the end
    assert classes.student_V.tolist() == [0, 1, 1, 2]  # a, b, ba → b, the end


def test_the_gradient_is_zero_at_the_teachers_distribution_over_classes():
    """Whatever the student does within a class: there the label alone teaches, and its mean gradient is zero at the truth."""
    classes, p = toy(), torch.tensor([0.2, 0.3, 0.4, 0.1], dtype=torch.float64)  # over a, b, ab, end
    # A student with Q_a = 0.6, Q_b = 0.3, Q_end = 0.1, that writes b and ba with 0.1 and 0.2.
    q = torch.tensor([0.6, 0.1, 0.2, 0.1], dtype=torch.float64)
    logits = q.log().clone().requires_grad_()
    teacher = p.log()[None]
    total = 0.0
    for label in range(4):  # the text: a label as often as the student's own distribution says, given its class
        batch = {"target_soft": torch.ones(1, dtype=torch.bool), "target_table": ClassTable.of(classes)}
        batch |= {"teacher_logits": teacher, "token_weights": torch.ones(1)}
        loss, _ = losses.distillation_loss(logits[None], torch.tensor([label]), batch, Objective(alpha=1.0))
        total = total + q[label] * loss
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_sampled_targets_are_unbiased_over_classes():
    hidden, layer, labels, teacher, _, classes = problem(4)
    soft, table = torch.ones(N, dtype=torch.bool), ClassTable.of(classes)
    logits = (hidden @ layer.weight.T).detach().requires_grad_()
    objective = Objective(alpha=1.0)
    dense = {"teacher_logits": teacher, "token_weights": torch.ones(N), "target_soft": soft, "target_table": table}
    loss, _ = losses.distillation_loss(logits, labels, dense, objective)
    (want,) = torch.autograd.grad(loss, logits)
    draws = []
    for seed in range(600):
        sampled = targets_of("sampled", teacher, seed).of_classes(classes.teacher_V).batch()
        batch = {name: torch.from_numpy(value) for name, value in sampled.items()} | {"target_kind": "sampled"}
        batch |= {"token_weights": torch.ones(N), "target_soft": soft, "target_table": table}
        loss, _ = losses.distillation_loss(logits, labels, batch, objective)
        draws.append(torch.autograd.grad(loss, logits)[0])
    found = torch.stack(draws).double()
    rounding = 1e-3  # of stored log-probabilities to float16, which is the same in every draw
    z = (found.mean(0) - want.double()).abs().sub(rounding).clamp(min=0) / (found.std(0) / len(draws) ** 0.5 + 1e-6)
    # 330 values: of so many normal ones the largest is below 4.5 but for 2 in 1,000 times, and the square's mean is about one.
    assert z.abs().max() < 4.5
    assert z.square().mean() < 1.6


def test_a_class_that_the_student_does_not_have_is_dropped():
    classes = RootClasses(np.array([0, 1, 2, 2]), np.array([0, 1, 1]))
    assert classes.dropped == 2
    logprobs = np.log(np.array([[0.5, 0.2, 0.2, 0.1]], dtype=np.float32))
    ids = np.array([[0, 1, 2, 3]])
    top = TopK.from_kept(ids, logprobs).of_classes(classes.teacher_V, classes.dropped)
    assert top.outcomes()[0] == pytest.approx([0.5, 0.2, 0, 0, 0.3])
    sampled = Sampled(ids, logprobs, np.array([4]), np.array([1.0], dtype=np.float32)).of_classes(classes.teacher_V, 2)
    assert sampled.outcomes()[0] == pytest.approx([0.5 / 0.7, 0.2 / 0.7, 0, 0])
    drawn = Multinomial(ids, np.array([[5, 2, 2, 1]]), np.array([1.0])).of_classes(classes.teacher_V, 2)
    assert drawn.outcomes()[0] == pytest.approx([5 / 7, 2 / 7, 0, 0])


def test_a_token_is_of_one_class_and_classes_cover_both_vocabularies():
    classes = toy()
    order, starts = classes.members
    assert sorted(order.tolist()) == list(range(4))
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        assert (classes.student_V[order[start:end]] == number).all()


def test_segment_logsumexp_keeps_what_is_far_below():
    values = torch.tensor([-200.0, -201.0, 5.0], requires_grad=True)
    found = segment_logsumexp(values, torch.tensor([0, 0, 2]), 3)
    assert found.tolist() == pytest.approx([-200 + np.log1p(np.exp(-1)), losses.SMALLEST, 5.0])
    (gradient,) = torch.autograd.grad(found[0], values)
    assert gradient.tolist() == pytest.approx([1 / (1 + np.exp(-1)), np.exp(-1) / (1 + np.exp(-1)), 0])


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_a_class_that_only_one_side_has_is_no_outcome_of_an_online_teacher(loss):
    """Four classes: the third is the student's alone, the fourth, of tokens without a root, the teacher's alone."""
    classes = RootClasses(np.array([0, 1, 3]), np.array([0, 1, 2]))
    teacher = torch.tensor([[0.69, 0.3, 0.01]], dtype=torch.float64).log()
    student = torch.tensor([[0.69, 0.3, 0.0]], dtype=torch.float64).log().clamp(min=-1e4).requires_grad_()
    targets = {"target_table": ClassTable.of(classes), "target_soft": torch.tensor([True]), "teacher_logits": teacher}
    labels = torch.tensor([0])
    same = losses.classes.online_parts(student, labels, targets, Objective(loss=loss))
    assert same["kl"].item() == pytest.approx(0, abs=1e-9)
    assert same[loss if loss != "forward_kl" else "kl"].item() == pytest.approx(0, abs=1e-9)
    (gradient,) = torch.autograd.grad(same[loss if loss != "forward_kl" else "kl"].sum(), student)
    assert gradient.abs().max() < 1e-9
    beside = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
    p, q = torch.tensor([[0.69, 0.3, 0.0]], dtype=torch.float64), torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    want = DIVERGENCES[loss]((p / p.sum()).log(), q.log())
    found = losses.classes.online_parts(beside, labels, targets, Objective(loss=loss))
    assert found[loss if loss != "forward_kl" else "kl"].item() == pytest.approx(want.item(), abs=1e-9)
