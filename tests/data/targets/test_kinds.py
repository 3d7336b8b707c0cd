"""What holds for every kind of targets, and that a new one needs nothing but its class."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llmdistill import losses
from llmdistill.data.collator import DistillCollator
from llmdistill.data.rows import Row, rows_to_table
from llmdistill.data.targets import KINDS, SampledLogprobs, SoftTargets, TextOnly, kind_of, list_array
from llmdistill.losses import DIVERGENCES, Objective, fused

V, D, K = 30, 6, 4


@dataclass(frozen=True)
class Renormalised(SoftTargets):
    """The K most likely tokens as if there were no others, for teacher and student alike."""

    scores_NK: np.ndarray

    name = "renormalised"
    summary = "the k most likely, renormalised"
    size = "k"
    columns = ("target_ids", "target_scores")
    most_likely = True

    @classmethod
    def keep(cls, logprobs_NV, n, uniform_NU):
        return logprobs_NV.topk(n).indices

    @classmethod
    def from_kept(cls, ids_NK, logprobs_NK):
        return cls(ids_NK, logprobs_NK.astype(np.float32))

    @classmethod
    def encode(cls, sequences, vocab_size):
        lengths = np.array([sequence.ids_NK.size for sequence in sequences])
        ids, scores = (np.concatenate([getattr(s, f).ravel() for s in sequences]) for f in ("ids_NK", "scores_NK"))
        return {"target_ids": list_array(ids.astype(np.int32), lengths), "target_scores": list_array(scores, lengths)}

    @classmethod
    def truncate(cls, row, positions):
        return {name: np.asarray(row[name])[: positions * K] for name in cls.columns}

    @classmethod
    def decode(cls, columns):
        return cls(columns["target_ids"].astype(np.int64).reshape(-1, K), columns["target_scores"].reshape(-1, K))

    def logweights(self):
        return self.scores_NK - np.log(np.exp(self.scores_NK).sum(1, keepdims=True))

    @classmethod
    def sentence(cls, described):
        return f"the {described['k']} most likely tokens"

    def batch(self):
        return {"target_ids": self.ids_NK, "target_scores": self.scores_NK}

    @classmethod
    def loss_parts(cls, picked_NK, rest_N1, batch, objective):
        return objective.divergences(batch["target_scores"], picked_NK)

    @classmethod
    def choice(cls, batch):
        return batch["target_scores"].argmax(dim=1, keepdim=True)


@pytest.fixture
def renormalised(monkeypatch):
    monkeypatch.setitem(KINDS, Renormalised.name, Renormalised)


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_new_kind_goes_from_rows_to_the_gradient(renormalised, is_fused):
    """Two rows, one of them cut, through columns, collator and both forms of the loss, against the formula in float64."""
    generator = torch.Generator().manual_seed(0)
    rows, teachers = [], []
    for number, length in enumerate((3, 5)):
        logprobs = (torch.randn(length, V, generator=generator) * 2).log_softmax(-1)
        ids = Renormalised.keep(logprobs, K, torch.empty(length, 0))
        soft = Renormalised.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
        message = [{"role": "user", "content": "x"}]
        rows.append(Row(str(number), message, message, [1, 2], np.arange(3, 3 + length), "stop", np.zeros(length), soft))
        teachers.append(logprobs[:4])
    table = rows_to_table(rows, V)
    assert kind_of(table.column_names) is Renormalised
    batch = DistillCollator(0, max_length=6)(table.to_pylist())
    labels = batch["labels"][batch["labels"] != -100]
    hidden = torch.randn(len(labels), D, generator=generator, requires_grad=True)
    layer = torch.nn.Linear(D, V, bias=False)
    objective = Objective("reverse_kl", 0.6)
    if is_fused:
        loss, sums = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective, chunk_bytes=3 * 4 * V)
    else:
        loss, sums = losses.distillation_loss(layer(hidden), labels, batch, objective)
    got = torch.autograd.grad(loss, (hidden, layer.weight))

    exact, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, layer.weight))
    logits, teacher = exact @ weight.T, torch.cat(teachers).double()
    ids = teacher.topk(K).indices
    p, q = (values.gather(1, ids).softmax(-1) for values in (teacher, logits))
    reverse, ce = (q * (q / p).log()).sum(), F.cross_entropy(logits, labels, reduction="sum")
    want = torch.autograd.grad(0.6 * reverse + 0.4 * ce, (exact, weight))
    assert sums["reverse_kl"].item() == pytest.approx(reverse.item(), rel=1e-4)
    assert sums["kl"].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
    assert sums["agreement"].item() == (logits.argmax(1) == teacher.argmax(1)).sum().item()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_loss_is_refused_where_it_would_be_biased(kind, name):
    """Of the weights of a sample, only what is linear in the teacher has an unbiased estimate: forward KL at temperature 1."""
    if issubclass(kind, SampledLogprobs):
        return  # test_what_a_sample_cannot_tell_is_refused
    if kind.unbiased and name != "forward_kl":
        assert "unbiased estimate of forward_kl only" in kind.refuses(name, 1.0)
    else:
        assert kind.refuses(name, 1.0) is None
    assert (kind.refuses(name, 2.0) is None) == (not kind.unbiased)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.size and not kind.of_writer], ids=lambda kind: kind.name
)
def test_what_is_kept_is_that_of_the_distribution(kind):
    """Without repeats where the kind says so, the most likely tokens where it says so; and the columns tell the kind."""
    logprobs = (torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2).log_softmax(-1)
    ids = kind.keep(logprobs, 8, torch.rand(50, kind.uniforms(8), dtype=torch.float64))
    assert ids.shape == (50, 8)
    assert all(row.unique().numel() == 8 for row in ids) == kind.distinct
    assert torch.equal(ids.sort(1).values, logprobs.topk(8).indices.sort(1).values) == kind.most_likely
    soft = kind.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
    columns = kind.encode([soft], 200)
    assert tuple(columns) == kind.columns
    assert kind_of(["input_ids", *columns]) is kind
    assert kind_of(["input_ids"]) is TextOnly
    np.testing.assert_allclose(soft.outcomes().sum(1), 1, rtol=1e-5)
    later = soft.after(48)
    assert len(later) == 2
    np.testing.assert_array_equal(later.logweights(), soft.logweights()[48:])


@pytest.mark.parametrize("kind", ["sampled", "sampled_logprobs", "multinomial"])
def test_a_sample_without_the_padding_still_adds_up_to_one(kind):
    """The tokens that are left keep their weights relative to each other."""
    generator = np.random.default_rng(0)
    logprobs = torch.from_numpy(generator.normal(size=(6, 40)) * 2).log_softmax(-1)
    uniform = torch.from_numpy(generator.random((6, KINDS[kind].uniforms(9))))
    ids = KINDS[kind].keep(logprobs, 9, uniform)
    whole = KINDS[kind].from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
    left = whole.within(30)
    assert (whole.ids_NK >= 30).any()
    assert left.ids_NK.max() < 30
    weights, before = np.exp(left.logweights()), np.exp(whole.logweights())
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    before[whole.ids_NK >= 30] = 0
    np.testing.assert_allclose(weights, before / before.sum(1, keepdims=True), rtol=1e-4, atol=1e-7)
    assert whole.within(40).ids_NK is whole.ids_NK or (whole.within(40).ids_NK == whole.ids_NK).all()


@pytest.mark.parametrize("masses", [(1.0,), (0.7, 0.3), (0.6, 0.3, 0.1)])
@pytest.mark.parametrize("kind", ["topk", "sampled", "sampled_logprobs", "multinomial"])
def test_fewer_tokens_than_are_kept_may_have_a_probability(kind, masses):
    """Then a sample holds all of them, and the KL is that of the whole distribution, for any student."""
    p_V = torch.zeros(V, dtype=torch.float64)
    p_V[torch.tensor([7, 21, 2])[: len(masses)]] = torch.tensor(masses, dtype=torch.float64)
    logprobs = p_V.log().float().expand(5, V)
    uniform = torch.rand(5, KINDS[kind].uniforms(K), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = KINDS[kind].keep(logprobs, K, uniform)
    soft = KINDS[kind].from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
    row = {name: column[0].values.to_numpy() for name, column in KINDS[kind].encode([soft], V).items()}
    batch = DistillCollator(0)([{"input_ids": np.arange(6), "completion_start": 1, **row}])
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    _, parts = losses.distillation_loss(logits, torch.zeros(5, dtype=torch.long), batch, Objective(alpha=1.0))
    want = sum(
        p * (np.log(p) - logits.detach().log_softmax(1)[:, token]) for p, token in zip(masses, (7, 21, 2), strict=False)
    ).sum()
    if kind != "multinomial" or len(masses) == 1:  # which draws with replacement
        torch.testing.assert_close(parts["kl"], want, rtol=2e-3, atol=1e-4)
    loss, _ = losses.distillation_loss(logits, torch.zeros(5, dtype=torch.long), batch, Objective(alpha=1.0))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
