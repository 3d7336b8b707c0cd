"""The fused form of the loss: from hidden states and the output matrix to the loss and its gradients, in chunks of rows.

Every loss here depends on a row of logits through a few of them, which are picked, and through the log-sum-exp of the
others. So a chunk of logits is computed, turned in place into the loss's gradient with respect to itself, multiplied into
the gradients of the hidden states and of the output matrix, and overwritten by the next: one matrix product forward and
two backward, as for plain cross-entropy, and never N × V numbers in memory. In suffixes, n and C count a chunk's rows and
the picked logits of a row.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llmdistill import losses
from llmdistill.collator import output_layer

CHUNK_BYTES = 1 << 27  # of float32 logits: enough rows for matrix products at full speed
_CACHED = 1 << 20  # numbers

# From the rows' place among N, their picked logits (n, C), the log-sum-exp of their others (n, 1) and the largest of those
# (n, 1): the loss, and the sums of its parts.
RowLoss = Callable[[slice, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Head:
    """A linear output layer, and what the model does to its output.

    logits = bend(scale · (hidden · weightᵀ + bias)), where bend(x) = softcap · tanh(x / softcap) if there is a softcap.
    """

    layer: torch.nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def is_in(self, model: Any) -> bool:
        """Whether it is the model's output layer still, neither replaced nor wrapped since it was found."""
        return output_layer(model) is self.layer and _is_plain(self.layer)


@torch.no_grad()
def find_head(model: Any) -> Head | None:
    """The model's output layer, or None where the fused form would not compute the model's own logits.

    What a model does between this layer and its logits is measured, by putting known numbers in the layer's place. It is
    not read from the configuration, where every family has its own names for it. A factor (Cohere, Granite) and a soft-cap
    (Gemma) are recognised; whatever else is done makes it None.
    """
    layer = output_layer(model)
    if not _is_plain(layer) or hasattr(layer.weight, "ds_id"):  # under ZeRO-3 it is not whole but in a layer's own forward
        return None
    device = layer.weight.device
    given_V = torch.linspace(-300, 300, layer.out_features, device=device)
    given_V[0], given_V[1] = 2.0**-10, 1e9  # they show the slope at zero, and the bound if there is one
    handle = layer.register_forward_hook(lambda *_: given_V.view(1, 1, -1))
    try:
        made = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False).logits
    finally:
        handle.remove()
    if made.numel() != given_V.numel():
        return None
    made_V = made.flatten().float()
    scale, bound = float(made_V[0] / given_V[0]), float(made_V[1])
    softcap = bound if 0 < bound < scale * 1e8 else None
    expected_V = given_V * scale if softcap is None else softcap * torch.tanh(given_V * scale / softcap)
    return Head(layer, scale, softcap) if torch.allclose(made_V, expected_V, rtol=1e-5, atol=1e-5) else None


def distillation_loss(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    targets: Mapping[str, Tensor],
    objective: losses.Objective,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`losses.distillation_loss` of the logits that the head makes of the hidden states, without holding the logits.

    The matrix products are in the type that autocast asks for, everything else is in float32. Gradients reach the hidden
    states and, where they are trained, the head's weight and bias.

    Args:
        hidden_ND: what enters the output layer at the positions that predict completion tokens.
        head: the output layer.
        labels_N: the completion tokens.
        targets: a batch of the collator.
        objective: what to compute.
        chunk_bytes: of float32 logits in memory at a time.
    """
    is_topk = "target_tail" in targets
    columns = [labels_N[:, None]]
    if "target_ids" in targets:
        columns = [targets["target_ids"], *columns]

    def row_loss(rows: slice, picked_nC: Tensor, others_n1: Tensor, top_n1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        here = {name: values[rows] for name, values in targets.items() if name.startswith(("target_", "token_"))}
        if is_topk:
            parts = _topk_parts(picked_nC, others_n1, labels_N[rows], here, objective)
        else:
            parts = _sampled_parts(picked_nC, others_n1, here)
        if "target_ids" in here:
            best_n = torch.maximum(picked_nC.detach().amax(dim=1), top_n1[:, 0])
            parts["agreement"] = (picked_nC.detach().gather(1, losses.stored_choice(here))[:, 0] >= best_n).float()
        return objective.total(parts, here)

    inputs = [hidden_ND, head.layer.weight, head.layer.bias]
    if head.scale != 1:  # (scale · hidden) · weightᵀ + scale · bias: cheaper than on the logits
        inputs = [hidden_ND * head.scale, head.layer.weight, None if head.layer.bias is None else head.layer.bias * head.scale]
    loss, sums, gradients = _in_chunks(
        inputs,
        [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs],
        head.softcap,
        torch.cat(columns, dim=1),
        is_topk,
        row_loss,
        max(chunk_bytes // (4 * head.layer.out_features), 1),
    )
    return _WithGradients.apply(loss, gradients, *inputs), sums


def _topk_parts(
    picked_nC: Tensor, others_n1: Tensor, labels_n: Tensor, targets: Mapping[str, Tensor], objective: losses.Objective
) -> dict[str, Tensor]:
    """Picked are the support and, last, the label, neither of them among the others; the label may be in both."""
    label_n1 = picked_nC[:, -1:]
    in_support_n1 = (targets["target_ids"] == labels_n[:, None]).any(dim=1, keepdim=True)
    outside_n1 = torch.where(in_support_n1, others_n1, torch.logaddexp(others_n1, label_n1))
    student_nJ = torch.cat([picked_nC[:, :-1], outside_n1], dim=1)
    teacher_nJ = losses.teacher_outcomes(targets["target_logprobs"], targets["target_tail"])
    return {"ce": student_nJ.logsumexp(dim=1) - label_n1[:, 0], **objective.divergences(teacher_nJ, student_nJ)}


def _sampled_parts(picked_nC: Tensor, all_n1: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Picked are the sample, if there is one, and last the label; the log-sum-exp is of all logits."""
    log_q_nC = picked_nC - all_n1
    parts = {"ce": -log_q_nC[:, -1]}
    if "target_logweights" in targets:
        weights_nK = targets["target_logweights"].to(picked_nC.dtype).exp()
        parts["kl"] = -(weights_nK * log_q_nC[:, :-1]).sum(dim=1) - targets["target_entropy"]
    return parts


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor | None) -> Tensor:
        """The value; the gradients are those with respect to the inputs."""
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        """In place, for the weight's gradient is large; autograd itself refuses a second call after that."""
        return None, None, *(None if gradient is None else gradient.mul_(grad_value) for gradient in ctx.saved_tensors)


@torch.no_grad()
def _in_chunks(
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    softcap: float | None,
    columns_NC: Tensor,
    picked_apart: bool,
    row_loss: RowLoss,
    rows: int,
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """The loss and its parts, summed over N, and the wanted gradients of the inputs: hidden states, weight and bias."""
    hidden_ND, weight_VD, bias_V = inputs
    assert hidden_ND is not None
    assert weight_VD is not None
    device, count = hidden_ND.device, len(hidden_ND)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden_ND.dtype
    wide = torch.promote_types(dtype, torch.float32)
    gradients = [
        None if not want or tensor is None else torch.zeros_like(tensor, dtype=None if tensor is hidden_ND else wide)
        for tensor, want in zip(inputs, wanted, strict=True)
    ]
    rows = max(min(rows, count), 1)
    buffer_nV = torch.empty(rows, len(weight_VD), dtype=dtype, device=device)
    wide_buffer_nV = buffer_nV if dtype == wide else torch.empty_like(buffer_nV, dtype=wide)
    total, sums = torch.zeros((), dtype=wide, device=device), defaultdict[str, Any](int)
    with torch.autocast(device.type, enabled=False):
        weight_VD, bias_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        # Once where there are no rows at all, so that every part has its sum.
        for start in range(0, max(count, 1), rows):
            here = slice(start, min(start + rows, count))
            hidden_nD = hidden_ND[here].to(dtype)
            product_nV = torch.mm(hidden_nD, weight_VD.t(), out=buffer_nV[: len(hidden_nD)])
            if bias_V is not None:
                product_nV.add_(bias_V)
            logits_nV = product_nV if dtype == wide else wide_buffer_nV[: len(hidden_nD)].copy_(product_nV)
            loss, parts = _to_gradient(logits_nV, columns_NC[here], picked_apart, softcap, partial(row_loss, here))
            total += loss
            for name, value in parts.items():
                sums[name] += value
            if any(wanted):
                product_nV = product_nV if dtype == wide else product_nV.copy_(logits_nV)
                _add_gradients(gradients, here, logits_nV, product_nV, hidden_nD, weight_VD)
    return total, dict(sums), gradients


def _add_gradients(
    gradients: Sequence[Tensor | None], here: slice, wide_nV: Tensor, grad_nV: Tensor, hidden_nD: Tensor, weight_VD: Tensor
) -> None:
    """From the gradient with respect to a chunk of logits, in the sums' type and in that of the products."""
    grad_hidden_ND, grad_weight_VD, grad_bias_V = gradients
    if grad_hidden_ND is not None:
        grad_hidden_ND[here] = grad_nV @ weight_VD
    if grad_weight_VD is not None and grad_weight_VD.dtype == grad_nV.dtype:
        grad_weight_VD.addmm_(grad_nV.t(), hidden_nD)
    elif grad_weight_VD is not None:
        # On a CPU in parts that stay in its cache: adding bfloat16 to float32 would else cost as much as the product.
        block = max(_CACHED // hidden_nD.shape[1], 1) if hidden_nD.device.type == "cpu" else len(grad_weight_VD)
        for part, grad_nv in zip(grad_weight_VD.split(block), grad_nV.split(block, dim=1), strict=True):
            part.add_(grad_nv.t() @ hidden_nD)
    if grad_bias_V is not None:
        grad_bias_V.add_(wide_nV.sum(dim=0))


def _to_gradient(
    logits_nV: Tensor,
    columns_nC: Tensor,
    picked_apart: bool,
    softcap: float | None,
    row_loss: Callable[[Tensor, Tensor, Tensor], Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn logits, in place, into the gradient of the summed loss with respect to them; return the loss and its parts.

    Of an unpicked logit z the loss's derivative is that with respect to the log-sum-exp, times exp(z − log-sum-exp).
    """
    slope_nV = None
    if softcap is not None:
        logits_nV.div_(softcap).tanh_()
        slope_nV = torch.addcmul(torch.ones_like(logits_nV[:1]), logits_nV, logits_nV, value=-1)
        logits_nV.mul_(softcap)
    with torch.enable_grad():
        picked_nC = logits_nV.gather(1, columns_nC).requires_grad_()
    if picked_apart:
        logits_nV.scatter_(1, columns_nC, losses.SMALLEST)
    top_n1 = logits_nV.amax(dim=1, keepdim=True)
    sum_n1 = logits_nV.sub_(top_n1).exp_().sum(dim=1, keepdim=True)
    with torch.enable_grad():
        others_n1 = (top_n1 + sum_n1.log()).requires_grad_()
        loss, parts = row_loss(picked_nC, others_n1, top_n1)
        grad_picked_nC, grad_others_n1 = torch.autograd.grad(loss, (picked_nC, others_n1))
    logits_nV.mul_(grad_others_n1 / sum_n1).scatter_add_(1, columns_nC, grad_picked_nC)
    if slope_nV is not None:
        logits_nV.mul_(slope_nV)
    return loss.detach(), parts


def _is_plain(layer: Any) -> bool:
    """A linear layer and nothing else: no subclass (adapters, quantised weights), no replaced forward, no hooks on its output.

    Under FSDP2 a layer's class is a subclass made for it, and a hook of FSDP's own frees its gathered weight.
    """
    kind, hooks = type(layer), layer._forward_hooks.values()
    if issubclass(kind, FSDPModule):
        kind, hooks = kind.__mro__[2], [hook for hook in hooks if not hook.__module__.startswith("torch.distributed.fsdp.")]
    return kind is torch.nn.Linear and "forward" not in vars(layer) and not hooks
