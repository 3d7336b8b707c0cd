"""Targets of kinds `sampled_logprobs` and `sampled_by_student`: the codec, and what the design weights are."""

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.data.collator import DistillCollator, completion_labels
from llmdistill.data.convert.exports import export_dataset
from llmdistill.data.targets import Sampled, SampledByStudent, SampledLogprobs, kind_of
from llmdistill.errors import InputError
from llmdistill.losses import Objective, distillation_loss
from llmdistill.stages.retokenize import check_kind
from tests.factories import make_row, write_rows


def random_samples(generator, positions, n, vocab, scale):
    """A sample drawn from one distribution, and by the same tokens the one that another model speaks of."""
    own, other = (torch.from_numpy(generator.normal(size=(positions, vocab)) * scale).log_softmax(-1) for _ in range(2))
    ids = SampledLogprobs.keep(own, n, torch.from_numpy(generator.random((positions, 1))))
    drawn = SampledLogprobs.from_kept(ids.numpy(), own.gather(1, ids).numpy())
    told = np.take_along_axis(other.numpy(), drawn.ids_NK, axis=1)
    return drawn, SampledByStudent.of_sample(drawn, told), own


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([SampledLogprobs, SampledByStudent]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    n=st.integers(2, 12),
    vocab=st.sampled_from([13, 65536, 65537, 152064]),
    seed=st.integers(0, 2**31),
    scale=st.floats(0.01, 30),
)
def test_they_come_back(kind, lengths, n, vocab, seed, scale):
    """To the bits of float16; the design weights of a sample drawn from p follow from log p, the others are stored."""
    generator = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        made = random_samples(generator, length, n, 13, scale)[kind is SampledByStudent]
        sequences.append(replace(made, ids_NK=made.ids_NK + vocab - 13))
    table = pa.table(kind.encode(sequences, vocab))
    assert kind_of(table.column_names) is kind
    for row, want in zip(table.to_pylist(), sequences, strict=True):
        row = {name: np.array(value) for name, value in row.items()}
        got = kind.of_rows([row], [len(want)])
        assert (got.ids_NK == want.ids_NK).all()
        assert (got.exact_N == want.exact_N).all()
        np.testing.assert_allclose(got.logprobs_NK, want.logprobs_NK, rtol=2**-11, atol=1e-6)
        assert (got.logdesign_NK >= 0).all()
        if kind is SampledByStudent:
            np.testing.assert_allclose(got.logdesign_NK, want.logdesign_NK, rtol=2**-11, atol=1e-6)
            np.testing.assert_allclose(got.logratio_N, want.logratio_N, rtol=2**-11, atol=1e-6)
        assert kind.of_rows([row], [len(want) - 1]).ids_NK.tolist() == want.ids_NK[:-1].tolist()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 12), seed=st.integers(0, 2**31), scale=st.floats(0.01, 10))
def test_the_design_weights_are_those_of_the_definition(n, seed, scale):
    """π = min(1, p/τ) with Σ π = n over the vocabulary, τ found by bisection; and p/π adds up to one over the sample.

    Where less than 1e-11 is left beside the exact tokens, π cannot be told from them, and counts for no more than that.
    """
    drawn, by_student, own = random_samples(np.random.default_rng(seed), 4, n, 40, scale)
    np.testing.assert_allclose(np.exp(drawn.logprobs_NK + drawn.logdesign_NK).sum(1), 1, rtol=1e-5)
    for position in range(4):
        p = own[position].exp().numpy()
        low, high = 0.0, 1.0
        for _ in range(200):
            tau = (low + high) / 2
            low, high = (tau, high) if np.minimum(1, p / tau).sum() > n else (low, tau)
        pi = np.minimum(1, p / tau)[drawn.ids_NK[position]]
        if p[p < tau].sum() < 1e-11:
            assert (drawn.logdesign_NK[position, : drawn.exact_N[position]] == 0).all()
            continue
        np.testing.assert_allclose(np.exp(-drawn.logdesign_NK[position]), pi, rtol=2e-4, atol=1e-9)
        assert (by_student.logdesign_NK[position] == drawn.logdesign_NK[position]).all()


def test_the_control_is_the_mean_log_ratio_of_the_drawn_tokens_elsewhere():
    """In the sum over the other positions a drawn token counts with the probability that it stands for."""
    drawn, by_student, own = random_samples(np.random.default_rng(5), 3, 6, 40, 1.0)
    for position in range(3):
        total = mass = 0.0
        for other in {0, 1, 2} - {position}:
            c = int(drawn.exact_N[other])
            left = 1 - own[other].exp().numpy()[drawn.ids_NK[other, :c]].sum()
            ratios = drawn.logprobs_NK[other, c:] - by_student.logprobs_NK[other, c:]
            total, mass = total + left * ratios.mean(), mass + left
        assert by_student.logratio_N[position] == pytest.approx(total / mass, rel=1e-4)
    alone = random_samples(np.random.default_rng(5), 1, 6, 40, 1.0)[1]
    assert alone.logratio_N.tolist() == [0]


def test_tokens_that_the_student_lacks_weigh_nothing():
    drawn, _, _ = random_samples(np.random.default_rng(0), 6, 9, 40, 1.0)
    left = drawn.within(30)
    gone = drawn.ids_NK >= 30
    assert gone.any()
    assert left.ids_NK.max() < 30
    assert np.isneginf(left.logdesign_NK[gone]).all()
    np.testing.assert_allclose(np.exp(left.logprobs_NK + left.logdesign_NK).sum(1), 1, rtol=1e-5)


def test_a_token_that_the_student_lacks_changes_nothing_else_of_its_sample():
    """Of the student's rows the terms of the others stay as they are; of the teacher's, beside them, the weights add up to 1."""
    generator = np.random.default_rng(0)
    _, own, _ = random_samples(generator, 6, 9, 40, 1.0)
    logprobs = torch.from_numpy(generator.normal(size=(4, 40))).log_softmax(-1)
    ids = Sampled.keep(logprobs, 9, torch.from_numpy(generator.random((4, 1))))
    its = SampledByStudent.of_teachers(Sampled.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy()))
    both = SampledByStudent(*(np.concatenate([getattr(part, field.name) for part in (own, its)]) for field in fields(own)))
    left, gone = both.within(30), both.ids_NK >= 30
    assert gone[:6].any()
    assert gone[6:].any()
    np.testing.assert_array_equal(left.logprobs_NK, both.logprobs_NK)
    assert np.isneginf(left.logdesign_NK[gone]).all()
    np.testing.assert_array_equal(left.logdesign_NK[:6][~gone[:6]], both.logdesign_NK[:6][~gone[:6]])
    np.testing.assert_allclose(np.exp(left.logdesign_NK[6:]).sum(1), 1, rtol=1e-5)
    assert both.within(40) is both


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd"])
def test_beside_the_teachers_text_each_row_learns_from_its_own_sample(loss):
    """Rows of both kinds in one batch: the student's by the loss, the teacher's by forward KL, as in batches of their own."""
    generator = np.random.default_rng(0)
    _, own, _ = random_samples(generator, 5, 6, 40, 1.0)
    logprobs = torch.from_numpy(generator.normal(size=(4, 40))).log_softmax(-1)
    ids = Sampled.keep(logprobs, 6, torch.from_numpy(generator.random((4, 1))))
    its = Sampled.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
    rows = []
    for soft, empty in ((own, ["target_entropy"]), (its, ["target_logdesign", "target_logratio"])):
        text = {"input_ids": np.arange(len(soft) + 2), "completion_start": 2}
        (row,) = pa.table(type(soft).encode([soft], 40)).to_pylist()
        row = {name: np.array(values) for name, values in row.items()}
        rows.append((text | row, text | row | {name: np.empty(0, np.float32) for name in empty}))
    logits = torch.from_numpy(generator.normal(size=(9, 40)))
    objective = Objective(loss, 0.8)

    def learnt(batch, logits):
        leaf = logits.clone().requires_grad_()
        value, sums = distillation_loss(leaf, completion_labels(batch), batch, objective)
        return torch.autograd.grad(value, leaf)[0], sums

    mixed = DistillCollator(0)([row for _, row in rows])
    assert mixed["target_kind"] == "sampled_by_student"
    gradient, sums = learnt(mixed, logits)
    alone, own_sums = learnt(DistillCollator(0)([rows[0][0]]), logits[:5])
    torch.testing.assert_close(gradient[:5], alone)
    batch = DistillCollator(0)([rows[1][0]])
    assert batch["target_kind"] == "sampled"
    objective = Objective("forward_kl", 0.8)
    theirs, their_sums = learnt(batch, logits[5:])
    torch.testing.assert_close(gradient[5:], theirs)
    assert sums[loss].item() == pytest.approx((own_sums[loss] + their_sums["kl"]).item(), rel=1e-5)
    assert sums["agreement"] == own_sums["agreement"] + their_sums["agreement"]


def test_what_cannot_be_told_over_classes_or_exported_is_refused(tmp_path):
    """A sum of f over the tokens of a class is not f of their sums; and a sample of another model is no distribution."""
    with pytest.raises(InputError, match="here: targets of kind sampled_by_student cannot be converted to classes, which"):
        check_kind("sampled_by_student", "here")
    check_kind("sampled", "here")
    _, own, _ = random_samples(np.random.default_rng(0), 4, 6, 40, 1.0)
    source = write_rows(tmp_path / "own", [make_row("x", [1], np.arange(4), soft=own)], "sampled_by_student", n=6)
    for form in ("axolotl", "distillkit"):
        with pytest.raises(InputError, match=f"{form} does not support targets of kind sampled_by_student"):
            export_dataset(source, tmp_path / "out", form)
