"""The loss for a student with a different vocabulary if only the log-probabilities of the teacher's text are known.

A chunk c of text begins and ends with a token of both tokenizers; p(c) and q(c) are the products of its tokens' probabilities.
One event per chunk is compared: that it is written or not (Minixhofer et al. 2025, arXiv 2503.20083):

    L = T · D( (p^(1/T), 1 − p^(1/T)) ‖ (q^(1/T), 1 − q^(1/T)) )

The factor T, rather than T², keeps the gradient's size: for large T, L approaches that of an event of rate −log p. A chunk
counts once, at its last token. Tokens outside chunks are learned as hard labels.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmdistill.losses.divergences import SMALLEST, Objective, wide

_NEAREST = 1e-7  # smallest distance to a probability of one


def chunk_parts(ce_N: Tensor, targets: Mapping[str, Any], objective: Objective) -> dict[str, Tensor]:
    """The divergence and, always, forward KL as `kl`, (N,): a chunk's values at its last token, 0 at its others.

    Args:
        ce_N: −log q(y) of the written tokens.
        targets: a batch of the collator with `target_chunk`, of complete chunks.
        objective: what to compute.
    """
    chunk_N, ends_N = targets["target_chunk"], targets["target_ends"]
    inside_N = chunk_N >= 0
    first = chunk_N[inside_N].min() if inside_N.any() else 0
    log_q_M = -ce_N.new_zeros(int(ends_N.sum())).index_add(0, chunk_N[inside_N] - first, ce_N[inside_N])
    log_p_M = wide(targets["target_logprobs"])[ends_N].to(log_q_M.dtype)
    outcomes = [_outcomes(log_MJ / objective.temperature) for log_MJ in (log_p_M, log_q_M)]
    made = replace(objective, temperature=1.0).divergences(*outcomes)
    hard_N = torch.where(inside_N, torch.zeros_like(ce_N), ce_N)
    return {name: hard_N.masked_scatter(ends_N, value_M * objective.temperature) for name, value_M in made.items()}


def _outcomes(log_p_M: Tensor) -> Tensor:
    """The log-probabilities of an event and of its complement, (M, 2)."""
    log_p_M = log_p_M.clamp(min=SMALLEST, max=-_NEAREST)
    log_not_M = torch.where(log_p_M > -0.7, (-torch.expm1(log_p_M)).log(), torch.log1p(-log_p_M.exp()))
    return torch.stack([log_p_M, log_not_M], dim=1)
