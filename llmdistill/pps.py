"""Sampling a few tokens from a distribution so that a weighted sum over them is unbiased.

Fixed-size sampling with probability proportional to size (πps), drawn systematically: of V tokens with probabilities p,
n are kept with inclusion probabilities π = min(1, p/τ), where τ is such that they sum to n. Tokens with p ≥ τ are always
there and weigh p; the others weigh p/π = τ. The n weights sum to one, and for any f, E[Σ w f] = Σ p f.
(Madow 1949 for systematic sampling; the multinomial relative for distillation is arXiv 2503.16870.)
"""

import torch
from torch import Tensor

_ROWS = 64  # at a time: in float64 a row of 150,000 tokens is 1.2 MB, several times over


def sample(logprobs_NV: Tensor, n: int, uniform_N: Tensor) -> Tensor:
    """Draw n tokens at each position.

    Args:
        logprobs_NV: the full distributions, natural logarithms.
        n: tokens kept, below V.
        uniform_N: one number in [0, 1) a position, all the randomness there is.

    Returns:
        Their ids, shape (N, n); those with p ≥ τ first, most likely first.
    """
    parts = zip(logprobs_NV.split(_ROWS), uniform_N.split(_ROWS), strict=True)
    return torch.cat([_sample(logprobs, n, uniform) for logprobs, uniform in parts])


def _sample(logprobs_NV: Tensor, n: int, uniform_N: Tensor) -> Tensor:
    p_NV = logprobs_NV.double().softmax(-1)
    top = p_NV.topk(n)
    exact_N = count_exact(top.values)
    columns_n = torch.arange(n, device=p_NV.device)
    is_exact_Nn = columns_n < exact_N[:, None]
    rest_NV = p_NV.scatter(1, top.indices, torch.where(is_exact_Nn, 0.0, top.values))
    cumulative_NV = rest_NV.cumsum(1)
    total_N1 = cumulative_NV[:, -1:]
    # One point in each of n − exact equal parts of the rest's mass, all at the same place in their part.
    points_Nn = (uniform_N.to(total_N1)[:, None] + columns_n) * total_N1 / (n - exact_N)[:, None]
    drawn_Nn = torch.searchsorted(cumulative_NV, points_Nn.minimum(total_N1 * (1 - 1e-15)), right=True)
    drawn_Nn = drawn_Nn.clamp(max=p_NV.shape[1] - 1).gather(1, (columns_n - exact_N[:, None]).clamp(min=0))
    return torch.where(is_exact_Nn, top.indices, drawn_Nn)


def count_exact(largest_Nn: Tensor) -> Tensor:
    """How many tokens are always kept, from the n largest probabilities in descending order.

    The least c whose next probability is at most τ = (1 − sum of the first c) / (n − c); below n by construction. The
    same number comes out of a drawn sample's own probabilities, since it holds all c and nothing else above τ.
    """
    n = largest_Nn.shape[1]
    before_Nn = largest_Nn.cumsum(1) - largest_Nn
    tau_Nn = (1 - before_Nn).clamp(min=0) / (n - torch.arange(n, device=largest_Nn.device))
    fits_Nn = largest_Nn <= tau_Nn
    fits_Nn[:, -1] = True
    return fits_Nn.int().argmax(1)
