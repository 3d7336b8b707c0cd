"""Choosing a few tokens of a distribution: the most likely ones, or a sample whose weighted sums are unbiased.

Fixed-size sampling with probability proportional to size (πps), drawn systematically: of V tokens with probabilities p,
n are kept with inclusion probabilities π = min(1, p/τ), where τ is such that they sum to n. Tokens with p ≥ τ are always
there and weigh p; the others weigh p/π = τ. The n weights sum to one, and for any f, E[Σ w f] = Σ p f.
(Madow 1949 for systematic sampling; the multinomial relative for distillation, n independent draws with replacement that
weigh 1/n each, is arXiv 2503.16870.)
"""

import torch
from torch import Tensor

_ROWS = 64  # at a time: in float64 a row of 150,000 tokens is 1.2 MB, several times over


def keep(kind: str, logprobs_NV: Tensor, n: int, uniform_NU: Tensor) -> Tensor:
    """The ids that a kind of targets keeps at each position, shape (N, n).

    Args:
        kind: `sampled`, `multinomial`, `topk`, or `none` with n = 0.
        logprobs_NV: the full distributions, natural logarithms.
        n: tokens kept or drawn.
        uniform_NU: numbers in [0, 1), as many a position as `uniforms` says.
    """
    if kind in ("topk", "none"):
        return logprobs_NV.topk(n).indices
    if kind == "multinomial":
        return sample_with_replacement(logprobs_NV, uniform_NU)
    return sample(logprobs_NV, n, uniform_NU[:, 0])


def uniforms(kind: str, n: int) -> int:
    """How many random numbers `keep` needs a position."""
    return {"sampled": 1, "multinomial": n}.get(kind, 0)


def sample_with_replacement(logprobs_NV: Tensor, uniform_Nn: Tensor) -> Tensor:
    """N independent draws at each position, one for each random number; shape (N, n), a token as often as it was drawn."""
    parts = zip(logprobs_NV.split(_ROWS), uniform_Nn.to(logprobs_NV.device).split(_ROWS), strict=True)
    return torch.cat([_search(logprobs.double().softmax(-1), uniform) for logprobs, uniform in parts])


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
    # One point in each of n − exact equal parts of the rest's mass, all at the same place in their part.
    points_Nn = (uniform_N.to(rest_NV)[:, None] + columns_n) / (n - exact_N)[:, None]
    drawn_Nn = _search(rest_NV, points_Nn).gather(1, (columns_n - exact_N[:, None]).clamp(min=0))
    return torch.where(is_exact_Nn, top.indices, drawn_Nn)


def _search(mass_NV: Tensor, points_Nn: Tensor) -> Tensor:
    """The tokens at points of the cumulative mass, given as shares of it."""
    cumulative_NV = mass_NV.cumsum(1)
    total_N1 = cumulative_NV[:, -1:]
    points_Nn = (points_Nn.to(total_N1) * total_N1).minimum(total_N1 * (1 - 1e-15))
    return torch.searchsorted(cumulative_NV, points_Nn, right=True).clamp(max=mass_NV.shape[1] - 1)


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
