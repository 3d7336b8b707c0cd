"""The Triton kernels, and the loss with them, against float64: on a GPU, or anywhere with Triton and TRITON_INTERPRET=1."""

import copy
import os

import pytest
import torch
from accelerate.utils import send_to_device

from llmdistill.losses import fused
from tests.losses.test_fused import V, by_the_formula, gradients, logits_of, objective_of, problem

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 as `make test` runs it", allow_module_level=True)

from llmdistill.losses import fused_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("vocab", [40, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels(dtype, vocab):
    generator = torch.Generator().manual_seed(0)
    wide = torch.full((6, vocab + 3), torch.nan, dtype=dtype, device=DEVICE)  # what is beside the logits is not read or written
    logits = wide[:5, :vocab]
    logits.copy_(torch.randn(5, vocab, generator=generator) * 4)
    logits[1, :30] = torch.finfo(dtype).min
    logits[2, :] = -1e4
    given = logits.clone().double()
    top, log_sum = fused_triton.log_sum_exp(logits)
    assert top.double().equal(given.amax(1, keepdim=True))
    torch.testing.assert_close(log_sum.double(), given.logsumexp(1, keepdim=True), rtol=1e-6, atol=1e-6)
    factor = torch.randn(5, 1, generator=generator).to(DEVICE)
    fused_triton.scaled_exp_(logits, log_sum, factor)
    want = factor.double() * given.softmax(1)
    torch.testing.assert_close(logits.double(), want, rtol=max(2e-3, torch.finfo(dtype).eps), atol=1e-7)
    assert wide[5].isnan().all()
    assert wide[:, vocab:].isnan().all()


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "sampled", "none"])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (True, 5.0)])
def test_the_loss_with_them_is_that_of_the_formulas(kind, bias, softcap, monkeypatch):
    monkeypatch.setattr(fused, "kernels_for", lambda device: fused_triton)
    alpha = 0.0 if kind == "none" else 0.6
    hidden, layer, labels, batch, teacher = problem(kind, bias=bias)
    exact, exact_hidden = copy.deepcopy(layer).double(), hidden.detach().double().requires_grad_()
    layer, hidden = layer.to(DEVICE), hidden.detach().to(DEVICE).requires_grad_()
    batch_there = send_to_device(batch, DEVICE)
    head = fused.Head(layer, 1.0, softcap)
    objective = objective_of(kind, alpha)
    loss, sums = fused.distillation_loss(hidden, head, labels.to(DEVICE), batch_there, objective, chunk_bytes=5 * 4 * V)
    logits = logits_of(exact_hidden, exact, 1.0, softcap)
    want, parts = by_the_formula(logits, labels, batch, teacher, kind, alpha)
    torch.testing.assert_close(loss.double().cpu(), want, rtol=1e-5, atol=1e-5)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(
        {name: value.item() for name, value in parts.items()}, rel=1e-4
    )
    for got, expected in zip(gradients(loss, hidden, layer), gradients(want, exact_hidden, exact), strict=True):
        torch.testing.assert_close(got.double().cpu(), expected, rtol=2e-4, atol=2e-5)


def test_a_chunk_in_bfloat16_stays_in_it(monkeypatch):
    """Its gradients are as near to float64 as those of the form in float32 passes, which rounds at the same places."""
    hidden, layer, labels, batch, teacher = problem("forward_kl", torch.bfloat16)
    layer, hidden = layer.to(DEVICE), hidden.detach().to(DEVICE).requires_grad_()
    batch_there = send_to_device(batch, DEVICE)
    found = []
    for kernels in (fused_triton, None):
        monkeypatch.setattr(fused, "kernels_for", lambda device, kernels=kernels: kernels)
        head, objective = fused.Head(layer), objective_of("forward_kl", 0.7)
        loss, _ = fused.distillation_loss(hidden, head, labels.to(DEVICE), batch_there, objective, chunk_bytes=5 * 4 * V)
        found.append([loss.detach(), *gradients(loss, hidden, layer)])
    exact, states = copy.deepcopy(layer).cpu().double(), hidden.detach().cpu().double().requires_grad_()
    want, _ = by_the_formula(logits_of(states, exact), labels, batch, teacher, "forward_kl", 0.7)
    for ours, plain, truth in zip(*found, [want.detach(), *gradients(want, states, exact)], strict=True):
        ours, plain = ours.double().cpu(), plain.double().cpu()
        assert (ours - truth).norm() <= 1.5 * (plain - truth).norm() + 1e-6 * truth.norm()
