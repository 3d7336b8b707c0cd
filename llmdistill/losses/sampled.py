"""Any divergence Σ f(p, q) from a sample of tokens whose inclusion probabilities π are known (Horvitz & Thompson 1952).

Σ_S f(p, q)/π over the sample is unbiased for Σ f(p, q) over the vocabulary, for every student, even one that has changed since
the sample was drawn. As Σ p = Σ q = 1, so is

    L = c + d + Σ_S (f(p, q) − c q − d p)/π

for all c and d that do not depend on the sample (control variates). Its gradient is Σ_S q (∂f/∂q − c)/π · ∇ log q.

- If drawn from the teacher, π = min(1, p/τ), the summand has to vanish with p; otherwise tokens that only the student considers
  likely come rarely and have a large weight. That leaves one c: f(0, q) = c q. Total variation becomes 1 − Σ_S min(p, q)/π.
  Reverse KL has no such c.
- If drawn from the student, π = min(1, q₀/τ), it has to vanish with q, so d p = f(p, 0). c is free: it is ∂f/∂q where log(q/p)
  has its mean over the drawn tokens of the row's other positions. Forward KL has no such d.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmdistill.losses.divergences import DIVERGENCES, SMALLEST, wide

Terms = Callable[[Tensor, Tensor], Tensor]  # from log p and log q of some tokens to f(p, q) of each

_INFINITE = 1e20


def sampled_divergence(
    name: str,
    log_q_NK: Tensor,
    logprobs_NK: Tensor,
    logdesign_NK: Tensor,
    logratio_N: Tensor | None = None,
    beta: float | None = None,
) -> Tensor:
    """The estimate L above, (N,), in nats; may be negative.

    Args:
        name: one of `DIVERGENCES` that is a sum over tokens.
        log_q_NK: the student's log-probabilities of the sampled tokens.
        logprobs_NK: the teacher's.
        logdesign_NK: −log π; −inf for no token.
        logratio_N: for a sample drawn from the student, the mean of log(q/p) over other samples; None if drawn from the
            teacher.
        beta: as in `divergence`.
    """
    mixture = {} if beta is None else {"beta": beta}
    log_p_NK = wide(logprobs_NK).to(log_q_NK.dtype)
    design_NK = wide(logdesign_NK).to(log_q_NK.dtype).exp()

    def terms(log_p: Tensor, log_q: Tensor) -> Tensor:
        """f(p, q) of each token."""
        each: Tensor = DIVERGENCES[name](log_p.reshape(-1, 1), log_q.reshape(-1, 1), **mixture)
        return each.view(log_q.shape)

    if logratio_N is None:
        zero = log_q_NK.new_zeros(1)
        c_N1, d_N1 = terms(zero + SMALLEST, zero)[:, None], zero[:, None]
    else:
        c_N1, d_N1 = _control(terms, wide(logratio_N).to(log_q_NK.dtype))
    left_NK = terms(log_p_NK, log_q_NK) - c_N1 * log_q_NK.exp() - d_N1 * log_p_NK.exp()
    return (left_NK * design_NK).sum(dim=1) + c_N1[:, 0] + d_N1[:, 0]


def _control(terms: Terms, logratio_N: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers c and d for a sample drawn from the student, (N, 1) each."""
    with torch.inference_mode(False), torch.enable_grad():
        log_p_N, log_q_N = (-logratio_N.clone()).requires_grad_(), torch.zeros_like(logratio_N).requires_grad_()
        by_p_N, by_q_N = torch.autograd.grad(terms(log_p_N, log_q_N).sum(), (log_p_N, log_q_N))
    zero = logratio_N.new_zeros(1)
    d = terms(zero, zero + SMALLEST)
    d_N = torch.where(d > _INFINITE, by_p_N / log_p_N.detach().exp(), d)  # ∂f/∂p, where f(1, 0) is infinite
    return by_q_N[:, None], d_N[:, None]
