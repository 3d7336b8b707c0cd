"""The fused form of the loss: from hidden states and the output matrix to the loss and its gradients, in chunks of rows.

Every loss here depends on a row of logits through a few of them, which are picked, and the log-sum-exp of the others. So a
chunk of logits is computed, replaced in place by the loss's gradient with respect to it, multiplied into the gradients of the
hidden states and of the output matrix, and overwritten by the next: one matrix product forward and two backward, as for plain
cross-entropy, and never N × V numbers in memory. In suffixes, n and C are the number of a chunk's rows and of the picked
logits per row.

On a GPU with Triton, a chunk stays in the type of the products and is read once and rewritten once (`fused_triton`);
all arithmetic is in float32 either way.

An online teacher's distribution is dense, so the loss depends on every logit of a row. Its logits are computed chunk by chunk
from its own hidden states (`ChunkedLogits`), and a chunk's gradient is left to autograd.
"""

import functools
import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from llmdistill import losses
from llmdistill.data.collator import some_tokens
from llmdistill.data.targets import KINDS
from llmdistill.losses.chunks import chunk_parts
from llmdistill.losses.classes import ClassPicks
from llmdistill.models.forward import at_work, completion_logits, in_place_of_logits, output_layer, replaced_forward

# Size of float32 logits: enough rows for matrix products at full speed. On a GPU, every chunk also reads and writes the whole
# gradient of the output matrix, so fewer chunks are faster.
CHUNK_BYTES = {"cpu": 1 << 27, "cuda": 3 << 29}
_CACHED = 1 << 20  # numbers

# The dense loss and its gradient hold several float32 copies of a chunk of both models' logits.
_DENSE_COPIES = 8

# From the picked logits, of rows (n, C) or of classes (P,), the log-sum-exp of the others (n, 1) and the largest of those (n, 1):
# the loss, and the sums of its parts.
RowLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
# From the rows' place among N, their logits (n, V), and whether to turn those in place into the gradient of the loss: the same.
ChunkLoss = Callable[[slice, Tensor, bool], tuple[Tensor, dict[str, Tensor]]]
# A low-rank adapter: from the hidden states (N, D) to (N, R), the linear layer from R to V, and a factor.
Adapter = tuple[Callable[[Tensor], Tensor], torch.nn.Linear, float]


@dataclass(frozen=True)
class Head:
    """A linear output layer, and what the model does with its output.

    logits = bend(scale · (hidden · weightᵀ + bias)), where bend(x) = softcap · tanh(x / softcap) if there is a softcap. The
    layer may be one that peft trains fully (`modules_to_save`) or adapts by LoRA, which is not added to the weight:
    hidden · (W + s · B · A)ᵀ = hidden · Wᵀ + (s · hidden · Aᵀ) · Bᵀ, two terms and no matrix of the size of W.
    """

    layer: torch.nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def is_in(self, model: Any) -> bool:
        """Whether it is still the model's output layer, neither replaced nor wrapped since it was found."""
        return output_layer(model) is self.layer and _is_untouched(self.layer) and _opened(self.layer) is not None

    def terms(self, hidden_ND: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Pairs x (N, R), W (V, R), flat, the first of the hidden states and the layer's own weight, and the bias (V,).

        The logits before the soft-cap are the sum of the products x · Wᵀ and the bias. The weights are the current ones, as
        FSDP gathers them only while the layer is running.
        """
        opened = _opened(self.layer)
        assert opened is not None
        linear, adapters = opened
        flat, bias_V = [hidden_ND, linear.weight], linear.bias
        for down, up, factor in adapters:
            flat += [down(hidden_ND) * factor, up.weight]
        if self.scale != 1:  # (scale · x) · Wᵀ + scale · bias: cheaper than on the logits
            flat[::2] = [x_NR * self.scale for x_NR in flat[::2]]
            bias_V = None if bias_V is None else bias_V * self.scale
        return flat, bias_V


class ChunkedLogits:
    """The logits (N, V) of a model that runs next to the student, without gradients; slices are computed on demand.

    Args:
        hidden_ND: the input of the model's output layer.
        head: the output layer. The product with its weight is in autocast's precision here.
    """

    def __init__(self, hidden_ND: Tensor, head: Head) -> None:
        dtype = _product_type(hidden_ND)
        with torch.no_grad():
            flat, bias_V = head.terms(hidden_ND)
        self._x_ND, self._weight_VD = flat[0].to(dtype), flat[1].to(dtype)
        self._bias_V = None if bias_V is None else bias_V.to(dtype)
        self._low = [tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in flat[2:]]
        self._softcap = head.softcap

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Logits (n, V) of a slice, or of rows given by number."""
        with torch.no_grad(), torch.autocast(self._x_ND.device.type, enabled=False):
            logits_nV = torch.nn.functional.linear(self._x_ND[rows], self._weight_VD, self._bias_V)
            for x_NR, weight_VR in zip(self._low[::2], self._low[1::2], strict=True):
                logits_nV = logits_nV + x_NR[rows] @ weight_VR.t()
            return logits_nV if self._softcap is None else _bent(logits_nV, self._softcap)


@torch.no_grad()
def logits_of(model: Any, batch: Mapping[str, Any], head: Head | None) -> Tensor | ChunkedLogits:
    """A model's logits that predict each completion token, to be sliced; kept as hidden states if there is a head for them.

    Args:
        model: the model.
        batch: as for `completion_logits`.
        head: its output layer, from `find_head`.
    """
    if head is None:
        return completion_logits(model, batch)
    _, hidden_ND = in_place_of_logits(model, batch, lambda hidden_ND: (hidden_ND.new_zeros(()), hidden_ND))
    return ChunkedLogits(hidden_ND, head)


@torch.no_grad()
def find_head(model: Any) -> Head | None:
    """The model's output layer, or None if the fused form would not compute the model's own logits.

    What a model does between this layer and its logits is measured, by passing known numbers through, instead of read from the
    configuration, where every family has its own names for it. A factor (Cohere, Granite) and a soft-cap (Gemma) are
    recognised; anything else makes it None. Call it under the autocast of the training: FlashAttention does not support
    float32.
    """
    layer = output_layer(model)
    opened = _opened(layer)
    if opened is None or not _is_untouched(layer) or hasattr(opened[0].weight, "ds_id"):  # ZeRO-3 gathers it in no other forward
        return None
    device = opened[0].weight.device
    given_V = torch.linspace(-300, 300, opened[0].out_features, device=device)
    given_V[0], given_V[1] = 2.0**-10, 1e9  # they show the slope at zero, and the bound if there is one
    with at_work(model), replaced_forward(layer, lambda *_: given_V.view(1, 1, -1)):
        made = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False).logits
    if made.numel() != given_V.numel():
        return None
    made_V = made.flatten().float()
    scale, bound = float(made_V[0] / given_V[0]), float(made_V[1])
    softcap = bound if 0 < bound < scale * 1e8 else None
    expected_V = given_V * scale if softcap is None else softcap * torch.tanh(given_V * scale / softcap)
    return Head(layer, scale, softcap) if torch.allclose(made_V, expected_V, rtol=1e-5, atol=1e-5) else None


@torch.compiler.disable  # excluded from compilation: it has its own matrix products, and writes in place
def distillation_loss(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    targets: Mapping[str, Any],
    objective: losses.Objective,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`losses.distillation_loss` of the head's logits for the hidden states, without holding the logits.

    Matrix products are in autocast's precision, everything else in float32. Gradients reach the hidden states and, if trained,
    the head's weight and bias.

    Args:
        hidden_ND: the input of the output layer at the positions that predict completion tokens.
        head: the output layer.
        labels_N: the completion tokens.
        targets: a batch of the collator.
        objective: what to compute.
        chunk_bytes: size of the float32 logits in memory at a time; by the type of device if not given.
    """
    flat, bias_V = head.terms(hidden_ND)
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cpu"])
    chunk_loss: ChunkLoss
    if "teacher_logits" in targets:
        chunk_bytes //= _DENSE_COPIES
        chunk_loss = _dense(head, labels_N, targets, objective)
    elif "target_chunk" in targets:
        chunk_loss = _text_chunks(head, labels_N, targets, objective)
    elif "target_table" in targets:
        chunk_loss = _classes(head, labels_N, targets, objective)
    else:
        chunk_loss = _sparse(head, labels_N, targets, objective)
    count = max(len(hidden_ND), 1)
    chunks = math.ceil(count / max(chunk_bytes // (4 * len(flat[1])), 1))
    rows = math.ceil(count / chunks)  # the last chunk is about as large as the others
    in_float32 = head.softcap is not None or "teacher_logits" in targets
    parts = _parts(len(hidden_ND), rows, targets.get("target_chunk"))
    loss, sums, gradients = _in_chunks(flat, bias_V, in_float32, chunk_loss, parts)
    return _WithGradients.apply(loss, gradients, *flat, bias_V), sums


def _parts(count: int, rows: int, chunk_N: Tensor | None) -> list[slice]:
    """Slices of about this many of N rows, none of which ends inside a chunk of text; one slice if there are no rows."""
    starts = list(range(0, max(count, 1), rows))
    if chunk_N is not None and count:
        begins_N = torch.cat([chunk_N.new_ones(1, dtype=torch.bool), (chunk_N[1:] != chunk_N[:-1]) | (chunk_N[1:] < 0)])
        allowed = begins_N.nonzero()[:, 0]
        starts = sorted({int(allowed[allowed <= start].max()) for start in starts})
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def _sparse(head: Head, labels_N: Tensor, targets: Mapping[str, Any], objective: losses.Objective) -> ChunkLoss:
    """The loss of stored targets, or of text only, which depends on a few logits of a row and the sum of the others."""
    kind = KINDS[targets["target_kind"]] if "target_kind" in targets else None
    has_tail = kind is not None and kind.has_tail
    columns_NC = torch.cat([labels_N[:, None]] if kind is None else [targets["target_ids"], labels_N[:, None]], dim=1)

    def row_loss(rows: slice, picked_nC: Tensor, others_n1: Tensor, top_n1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        here = some_tokens(targets, rows)
        shown_nK, label_n1, rest_n1 = picked_nC[:, :-1], picked_nC[:, -1:], others_n1
        if has_tail:  # of the others; the label is none of them, and may be among the targets
            is_target_n1 = (here["target_ids"] == labels_N[rows, None]).any(dim=1, keepdim=True)
            rest_n1 = torch.where(is_target_n1, others_n1, torch.logaddexp(others_n1, label_n1))
        if kind is not None:
            picked_nK, rest_n1 = kind.present(shown_nK, rest_n1, here)
        all_n1 = torch.cat([picked_nK, rest_n1], dim=1).logsumexp(dim=1, keepdim=True) if has_tail else rest_n1
        parts = {"ce": (all_n1 - label_n1)[:, 0]}
        if kind is not None:
            parts |= kind.loss_parts(picked_nK, rest_n1, here, objective)
            best_n = torch.maximum(picked_nC.detach().amax(dim=1), top_n1[:, 0])
            parts["agreement"] = (shown_nK.detach().gather(1, kind.choice(here))[:, 0] >= best_n).float()
        return objective.total(parts, here)

    return lambda rows, logits_nV, wanted: _to_gradient(
        logits_nV, _Columns(columns_NC[rows]), has_tail, head.softcap, partial(row_loss, rows), wanted
    )  # fmt: skip


def _text_chunks(head: Head, labels_N: Tensor, targets: Mapping[str, Any], objective: losses.Objective) -> ChunkLoss:
    """The loss on chunks of text, which depends on the labels' logits, and the sum of the others."""

    def chunk_loss(rows: slice, logits_nV: Tensor, wanted: bool) -> tuple[Tensor, dict[str, Tensor]]:
        here = some_tokens(targets, rows)

        def row_loss(label_n1: Tensor, all_n1: Tensor, top_n1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            ce_n = (all_n1 - label_n1)[:, 0]
            return objective.total({"ce": ce_n} | chunk_parts(ce_n, here, objective), here)

        return _to_gradient(logits_nV, _Columns(labels_N[rows, None]), False, head.softcap, row_loss, wanted)

    return chunk_loss


def _classes(head: Head, labels_N: Tensor, targets: Mapping[str, Any], objective: losses.Objective) -> ChunkLoss:
    """The loss of stored targets on root classes: it depends on the logits of their tokens, and the sum of the others."""
    has_tail = KINDS[targets["target_kind"]].has_tail

    def chunk_loss(rows: slice, logits_nV: Tensor, wanted: bool) -> tuple[Tensor, dict[str, Tensor]]:
        here = some_tokens(targets, rows)
        picks = ClassPicks.of(here, labels_N[rows], logits_nV.shape[1])

        def row_loss(picked_P: Tensor, others_n1: Tensor, top_n1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return objective.total(picks.row_loss(picked_P, others_n1, top_n1, here, objective), here)

        return _to_gradient(logits_nV, picks, has_tail, head.softcap, row_loss, wanted)

    return chunk_loss


def _dense(head: Head, labels_N: Tensor, targets: Mapping[str, Any], objective: losses.Objective) -> ChunkLoss:
    """The loss against all of an online teacher's logits."""

    def chunk_loss(rows: slice, logits_nV: Tensor, wanted: bool) -> tuple[Tensor, dict[str, Tensor]]:
        given_nV = logits_nV.detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            bent_nV = given_nV if head.softcap is None else _bent(given_nV, head.softcap)
            loss, sums = losses.distillation_loss(bent_nV, labels_N[rows], some_tokens(targets, rows), objective)
        if wanted:
            logits_nV.copy_(torch.autograd.grad(loss, given_nV)[0])
        return loss.detach(), sums

    return chunk_loss


def _bent(logits_nV: Tensor, softcap: float) -> Tensor:
    wide_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    return torch.tanh(wide_nV / softcap) * softcap


def _product_type(hidden_ND: Tensor) -> torch.dtype:
    """The precision of matrix products: autocast's, else that of the hidden states."""
    device = hidden_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor | None) -> Tensor:
        """Return the value; the gradients are those of the inputs. They are not activations, so nothing offloads them."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        """Scale in place, as the weight's gradient is large; therefore only once."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the fused loss does not support a second backward pass, as its gradients are scaled in place")
        return None, None, *(None if gradient is None else gradient.mul_(grad_value) for gradient in gradients)


def _in_chunks(
    flat: list[Tensor], bias_V: Tensor | None, in_float32: bool, chunk_loss: ChunkLoss, parts: Sequence[slice]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """The loss and its parts, summed over N, and the requested gradients of a head's terms and bias."""
    device, rows = flat[0].device, max(part.stop - part.start for part in parts)
    dtype = _product_type(flat[0])
    wide = torch.promote_types(dtype, torch.float32)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (*flat, bias_V)]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        gradients = [
            None if not want or tensor is None else torch.zeros_like(tensor, dtype=None if tensor is flat[0] else wide)
            for tensor, want in zip((*flat, bias_V), wanted, strict=True)
        ]
        x_ND, weight_VD = flat[0], flat[1].to(dtype)
        low = [tensor.to(wide) for tensor in flat[2:]]  # of low rank: float32 costs nothing there
        bias_V = None if bias_V is None else bias_V.to(dtype)
        buffer_nV = torch.empty(rows, len(weight_VD), dtype=dtype, device=device)
        # Anything added to the logits, or bending them, must not be rounded; without kernels nothing is.
        stays = dtype == wide or (kernels_for(device) is not None and not low and not in_float32)
        wide_buffer_nV = buffer_nV if stays else torch.empty_like(buffer_nV, dtype=wide)
        total, sums = torch.zeros((), dtype=wide, device=device), defaultdict[str, Any](int)
        for here in parts:
            x_nD = x_ND[here].to(dtype)
            product_nV = torch.mm(x_nD, weight_VD.t(), out=buffer_nV[: len(x_nD)])
            if bias_V is not None:
                product_nV.add_(bias_V)
            logits_nV = product_nV if stays else wide_buffer_nV[: len(x_nD)].copy_(product_nV)
            for x_NR, weight_VR in zip(low[::2], low[1::2], strict=True):
                logits_nV.addmm_(x_NR[here], weight_VR.t())
            loss, found = chunk_loss(here, logits_nV, any(wanted))
            total += loss
            for name, value in found.items():
                sums[name] += value
            if any(wanted):
                product_nV = product_nV if stays else product_nV.copy_(logits_nV)
                _add_gradients(gradients[:2], here, product_nV, x_nD, weight_VD)
                for number in range(0, len(low), 2):
                    _add_gradients(gradients[number + 2 :], here, logits_nV, low[number][here], low[number + 1])
                if gradients[-1] is not None:
                    gradients[-1].add_(logits_nV.sum(dim=0, dtype=wide))
    return total, dict(sums), gradients


def _add_gradients(gradients: Sequence[Tensor | None], here: slice, grad_nV: Tensor, x_nR: Tensor, weight_VR: Tensor) -> None:
    """Add to the gradients of one term, x · Wᵀ, from the gradient of a chunk of logits, in the type of the product."""
    grad_x_NR, grad_weight_VR = gradients[:2]
    if grad_x_NR is not None:
        grad_x_NR[here] = grad_nV @ weight_VR
    if grad_weight_VR is not None and grad_weight_VR.dtype == grad_nV.dtype:
        grad_weight_VR.addmm_(grad_nV.t(), x_nR)
    elif grad_weight_VR is not None and grad_nV.is_cuda and torch.version.hip is None:  # adds unrounded products in float32
        torch.addmm(grad_weight_VR, grad_nV.t(), x_nR, out_dtype=grad_weight_VR.dtype, out=grad_weight_VR)
    elif grad_weight_VR is not None:
        # On a CPU, in parts that stay in its cache: otherwise adding bfloat16 to float32 would cost as much as the product.
        block = max(_CACHED // x_nR.shape[1], 1) if x_nR.device.type == "cpu" else len(grad_weight_VR)
        for part, grad_nv in zip(grad_weight_VR.split(block), grad_nV.split(block, dim=1), strict=True):
            part.add_(grad_nv.t() @ x_nR)


@dataclass(frozen=True)
class _Columns:
    """The logits that a loss depends on, besides the log-sum-exp of the others: as many in each row, (n, C)."""

    columns_nC: Tensor

    def take(self, logits_nV: Tensor) -> Tensor:
        return logits_nV.gather(1, self.columns_nC)

    def hide_(self, logits_nV: Tensor, value: float) -> None:
        logits_nV.scatter_(1, self.columns_nC, value)

    def add_(self, logits_nV: Tensor, values_nC: Tensor) -> None:
        logits_nV.scatter_add_(1, self.columns_nC, values_nC)


def _to_gradient(
    logits_nV: Tensor,
    picks: "_Columns | ClassPicks",
    picked_apart: bool,
    softcap: float | None,
    row_loss: RowLoss,
    wanted: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn logits, in place, into the gradient of the summed loss with respect to them; return the loss and its parts.

    Of an unpicked logit z the loss's derivative is that with respect to the log-sum-exp, times exp(z − log-sum-exp). Where no
    gradient is wanted, what the logits become has no meaning.
    """
    slope_nV = None
    if softcap is not None:
        logits_nV.div_(softcap).tanh_()
        slope_nV = torch.addcmul(torch.ones_like(logits_nV[:1]), logits_nV, logits_nV, value=-1)
        logits_nV.mul_(softcap)
    kernels = kernels_for(logits_nV.device)
    picked = picks.take(logits_nV).to(torch.promote_types(logits_nV.dtype, torch.float32)).requires_grad_(wanted)
    if picked_apart:
        picks.hide_(logits_nV, max(losses.SMALLEST, torch.finfo(logits_nV.dtype).min))
    if kernels is not None:
        top_n1, others_n1 = kernels.log_sum_exp(logits_nV)
    else:
        top_n1 = logits_nV.amax(dim=1, keepdim=True)
        sum_n1 = logits_nV.sub_(top_n1).exp_().sum(dim=1, keepdim=True)
        others_n1 = top_n1 + sum_n1.log()
    with torch.set_grad_enabled(wanted):
        loss, parts = row_loss(picked, others_n1.requires_grad_(wanted), top_n1)
    if not wanted:
        return loss, parts
    grad_picked, grad_others_n1 = torch.autograd.grad(loss, (picked, others_n1))
    if kernels is not None:
        kernels.scaled_exp_(logits_nV, others_n1.detach(), grad_others_n1)
    else:
        logits_nV.mul_(grad_others_n1 / sum_n1)
    picks.add_(logits_nV, grad_picked.to(logits_nV.dtype))
    if slope_nV is not None:
        logits_nV.mul_(slope_nV)
    return loss.detach(), parts


@functools.cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """`fused_triton`, if it works on this GPU."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return None
    from llmdistill.losses import fused_triton

    return fused_triton


def _opened(layer: Any) -> tuple[torch.nn.Linear, list[Adapter]] | None:
    """The linear layer inside possible peft wrappers, and the adapters; None if there is anything else."""
    if _is_linear(layer):
        return layer, []
    if not type(layer).__module__.startswith("peft."):
        return None
    from peft.tuners.lora import Linear
    from peft.utils import ModulesToSaveWrapper

    if layer.disable_adapters:
        return None
    if type(layer) is ModulesToSaveWrapper:
        inner = layer.modules_to_save[layer.active_adapters[0]] if layer.active_adapters else None
        return (inner, []) if _is_linear(inner) and _is_untouched(inner) else None
    names = [name for name in layer.active_adapters if name in layer.lora_A] if type(layer) is Linear else []
    if not names or layer.merged or any(name in layer.lora_variant or layer.lora_bias[name] for name in names):
        return None
    if not all(_is_linear(part) and _is_untouched(part) for part in (layer.base_layer, *(layer.lora_B[name] for name in names))):
        return None

    def down(name: str, hidden_ND: Tensor) -> Tensor:
        into = layer.lora_A[name]
        return into(layer.lora_dropout[name](hidden_ND.to(into.weight.dtype)))

    return layer.base_layer, [(partial(down, name), layer.lora_B[name], layer.scaling[name]) for name in names]


def _is_linear(layer: Any) -> bool:
    """Whether it is a linear layer and not a subclass, as for quantised weights; FSDP2, however, makes a subclass for it."""
    kind = type(layer)
    return (kind.__mro__[2] if issubclass(kind, FSDPModule) else kind) is torch.nn.Linear


def _is_untouched(layer: Any) -> bool:
    """Whether its forward is not replaced and has no hooks, except FSDP's, to free the weight, and TRL's, not to offload it."""
    harmless = ("torch.distributed.fsdp.", "trl.models.activation_offloading")
    hooks = [hook for hook in layer._forward_hooks.values() if not hook.__module__.startswith(harmless)]
    return "forward" not in vars(layer) and not hooks
