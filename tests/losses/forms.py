"""Both forms of the loss against its formula in float64."""

import torch

from llmdistill import losses
from llmdistill.losses import fused


def assert_both_forms(hidden, layer, labels, batch, objective, formula, rows, of_loss, of_gradients):
    """The plain and the fused loss and their gradients are those of the formula, up to tolerances (relative, absolute).

    `formula` makes the loss of logits in float64; the fused form has so many rows in a chunk.
    """
    exact, exact_hidden = (value.detach().double().requires_grad_() for value in (layer.weight, hidden))
    want = formula(exact_hidden @ exact.T)
    wanted = torch.autograd.grad(want, (exact_hidden, exact))
    plain, _ = losses.distillation_loss(hidden @ layer.weight.T, labels, batch, objective)
    size = rows * 4 * len(layer.weight)
    got, _ = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective, chunk_bytes=size)
    for found in (plain, got):
        torch.testing.assert_close(found.double(), want, rtol=of_loss[0], atol=of_loss[1])
        for ours, theirs in zip(torch.autograd.grad(found, (hidden, layer.weight)), wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=of_gradients[0], atol=of_gradients[1])
