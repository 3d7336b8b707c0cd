"""Passes over a chunk of logits that take several in plain torch, as Triton kernels: one reads it, one rewrites it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _log_sum_exp_kernel(logits_ptr, stride, top_ptr, log_sum_ptr, vocab, BLOCK: tl.constexpr):
    """One program per row: every lane keeps the largest of its logits and the sum of exp(logit − largest)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    top_b = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        place_b = start + tl.arange(0, BLOCK)
        logit_b = tl.load(row_ptr + place_b, mask=place_b < vocab, other=-float("inf")).to(tl.float32)
        new_b = tl.maximum(top_b, logit_b)
        sum_b = sum_b * tl.exp(top_b - new_b) + tl.exp(logit_b - new_b)
        top_b = new_b
    top = tl.max(top_b, axis=0)
    total = tl.sum(sum_b * tl.exp(top_b - top), axis=0)
    tl.store(top_ptr + row, top)
    tl.store(log_sum_ptr + row, top + tl.log(total))


@triton.jit
def _scaled_exp_kernel(logits_ptr, stride, log_sum_ptr, factor_ptr, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place_b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row * stride + place_b
    log_sum, factor = tl.load(log_sum_ptr + row), tl.load(factor_ptr + row)
    logit_b = tl.load(row_ptr, mask=place_b < vocab, other=-float("inf")).to(tl.float32)
    tl.store(row_ptr, (factor * tl.exp(logit_b - log_sum)).to(logits_ptr.dtype.element_ty), mask=place_b < vocab)


def log_sum_exp(logits_nV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and the log-sum-exp of the row, both (n, 1) in float32.

    Args:
        logits_nV: any float type up to float32, contiguous in a row.
    """
    top_n1 = torch.empty(len(logits_nV), 1, dtype=torch.float32, device=logits_nV.device)
    log_sum_n1 = torch.empty_like(top_n1)
    if len(logits_nV):
        _log_sum_exp_kernel[(len(logits_nV),)](
            logits_nV, logits_nV.stride(0), top_n1, log_sum_n1, logits_nV.shape[1], BLOCK=_BLOCK, num_warps=_WARPS
        )
    return top_n1, log_sum_n1


def scaled_exp_(logits_nV: Tensor, log_sum_n1: Tensor, factor_n1: Tensor) -> Tensor:
    """In place: factor · exp(logits − log_sum), computed in float32.

    Args:
        logits_nV: as above.
        log_sum_n1: per row, float32.
        factor_n1: per row, float32.
    """
    if len(logits_nV):
        grid = (len(logits_nV), triton.cdiv(logits_nV.shape[1], _BLOCK))
        _scaled_exp_kernel[grid](
            logits_nV, logits_nV.stride(0), log_sum_n1.contiguous(), factor_n1.contiguous(), logits_nV.shape[1],
            BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return logits_nV
