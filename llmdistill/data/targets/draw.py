"""Selecting a few tokens of a distribution: the most likely ones, or a sample whose weighted sums are unbiased.

Fixed-size sampling with probability proportional to size (πps), drawn systematically: of V tokens with probabilities p,
n are kept with inclusion probabilities π = min(1, p/τ), where τ is such that they sum to n. Tokens with p ≥ τ are always
there and weigh p; the others weigh p/π = τ. The n weights sum to one, and for any f, E[Σ w f] = Σ p f.
(Madow 1949 for systematic sampling; the multinomial relative for distillation, n independent draws with replacement that
weigh 1/n each, is arXiv 2503.16870.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_AT_ONCE = 256  # rows: their probabilities are held once more, 0.6 MB a row of 150,000 tokens
_FLOATS_AT_ONCE = 1 << 22  # on a CPU: memory of blocks above 32 MB is new each time, and takes longer to get than to fill
_BLOCK = 64  # tokens, of which only the sum or the largest is looked at first


def widest(tensor: Tensor) -> torch.dtype:
    """The widest float type on a tensor's device: float64, or float32 on Apple GPUs, which have no other."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def most_likely(logprobs_NV: Tensor, k: int) -> Tensor:
    """The ids of the k most likely tokens, most likely first; shape (N, k).

    All of them are in the k blocks with the most likely token, so that no more than those are sorted.
    """
    if logprobs_NV.shape[1] % _BLOCK or k * _BLOCK >= logprobs_NV.shape[1]:
        return logprobs_NV.topk(k).indices
    blocks_NMB = logprobs_NV.unflatten(1, (-1, _BLOCK))
    block_Nk = blocks_NMB.amax(2).topk(k).indices
    inside_NkB = blocks_NMB.gather(1, block_Nk[:, :, None].expand(-1, -1, _BLOCK))
    place_Nk = inside_NkB.flatten(1).topk(k).indices
    return block_Nk.gather(1, place_Nk // _BLOCK) * _BLOCK + place_Nk % _BLOCK


def sample_with_replacement(logprobs_NV: Tensor, uniform_Nn: Tensor) -> Tensor:
    """N independent draws at each position, one per random number; shape (N, n), with repeated tokens."""
    return torch.cat([_search(logprobs.exp(), uniform) for logprobs, uniform in pieces(logprobs_NV, uniform_Nn)])


def sample(logprobs_NV: Tensor, n: int, uniform_N: Tensor) -> Tensor:
    """Draw n tokens at each position.

    Args:
        logprobs_NV: the full distributions, natural logarithms.
        n: tokens kept, below V. Where fewer have any probability, the most likely of the others are taken, which weigh nothing.
        uniform_N: one number in [0, 1) per position, the only source of randomness.

    Returns:
        Their ids, shape (N, n); those with p ≥ τ first, most likely first.
    """
    return torch.cat([_sample(logprobs, n, uniform) for logprobs, uniform in pieces(logprobs_NV, uniform_N)])


def pieces(values_NV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of several tensors, in chunks small enough for working copies."""
    rows = _AT_ONCE
    if values_NV.device.type == "cpu":
        rows = max(1, min(rows, _FLOATS_AT_ONCE // values_NV.shape[1]))
    return zip(*(tensor.split(rows) for tensor in (values_NV, *others)), strict=True)


def _sample(logprobs_NV: Tensor, n: int, uniform_N: Tensor) -> Tensor:
    top_Nn = most_likely(logprobs_NV, n)
    p_NV = logprobs_NV.exp()
    p_Nn = p_NV.gather(1, top_Nn)
    exact_N = count_exact(p_Nn.to(widest(p_Nn)))
    columns_n = torch.arange(n, device=p_NV.device)
    is_exact_Nn = columns_n < exact_N[:, None]
    rest_NV = p_NV.scatter_(1, top_Nn, p_Nn.masked_fill(is_exact_Nn, 0))
    # One point in each of n − exact equal parts of the rest's mass, all at the same place in their part.
    points_Nn = (uniform_N.to(p_NV.device, widest(p_NV))[:, None] + columns_n) / (n - exact_N)[:, None]
    drawn_Nn = _search(rest_NV, points_Nn).gather(1, (columns_n - exact_N[:, None]).clamp(min=0))
    none_is_left_N1 = p_Nn.gather(1, exact_N[:, None]) == 0
    return torch.where(is_exact_Nn | none_is_left_N1, top_Nn, drawn_Nn)


def _search(mass_NV: Tensor, points_Nn: Tensor) -> Tensor:
    """The tokens at points of the cumulative mass, given as shares of it: first the block, then the token in it."""
    if short := -mass_NV.shape[1] % _BLOCK:
        mass_NV = torch.nn.functional.pad(mass_NV, (0, short))
    blocks_NMB = mass_NV.unflatten(1, (-1, _BLOCK))
    ends_NM = blocks_NMB.sum(2).cumsum(1, dtype=widest(mass_NV))  # to sum in float64 would copy all of it
    points_Nn = points_Nn.to(ends_NM) * ends_NM[:, -1:]
    block_Nn = _place(ends_NM, points_Nn)
    inside_NnB = blocks_NMB.gather(1, block_Nn[:, :, None].expand(-1, -1, _BLOCK)).to(ends_NM).cumsum(2)
    begin_Nn = ends_NM.gather(1, block_Nn) - inside_NnB[:, :, -1]
    return block_Nn * _BLOCK + _place(inside_NnB, (points_Nn - begin_Nn)[:, :, None])[:, :, 0]


def _place(ends: Tensor, points: Tensor) -> Tensor:
    """For each point, the first index whose cumulative mass exceeds it, along the last dimension; never one without mass."""
    points = points.clamp(min=0).minimum(ends[..., -1:] * (1 - 4 * torch.finfo(ends.dtype).eps))
    return torch.searchsorted(ends, points, right=True).clamp(max=ends.shape[-1] - 1)


def count_exact(largest_Nn: Tensor) -> Tensor:
    """Number of tokens that are always kept, from the n largest probabilities in descending order.

    The least c whose next probability is at most τ = (1 − sum of the first c) / (n − c); below n by construction. The
    same number comes out of a drawn sample's own probabilities, since it holds all c and nothing else above τ.
    """
    n = largest_Nn.shape[1]
    before_Nn = largest_Nn.cumsum(1) - largest_Nn
    tau_Nn = (1 - before_Nn).clamp(min=0) / (n - torch.arange(n, device=largest_Nn.device))
    fits_Nn = largest_Nn <= tau_Nn
    fits_Nn[:, -1] = True
    return fits_Nn.int().argmax(1)
