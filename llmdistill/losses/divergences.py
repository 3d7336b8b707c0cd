"""The losses: pure functions of tensors, in nats, with one value per completion token, computed in float32.

Let p be the teacher, q the student's softmax, y the written token. A divergence is defined once, on the log-probabilities of
two distributions over the same J outcomes. For an online teacher the outcomes are the vocabulary (`divergence`); for stored
top-k targets they are the K tokens of the support and, last, everything outside it (`topk_divergence`). The weights of a
sample allow only forward KL (`sampled_kl`); with its log-probabilities there are others (`losses.sampled`). Every function
returns a tensor of shape (N,); the caller sums it and divides by the completion tokens of the whole global batch.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST = -1e30  # replaces log 0 where an infinite value would turn gradients into NaN
# Used by reverse KL as the logarithm of a teacher's probability of zero, where it would be infinite: the mass outside a
# support is one minus a sum, and there float32 cannot distinguish less than 2^-24 from zero.
_LOG_ZERO = -24 * math.log(2)


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """−log q(y): hard labels, sequence-level distillation on the teacher's text (Kim & Rush 2016, arXiv 1606.07947).

    Args:
        logits_NV: the student's logits at the positions that predict completion tokens, any float type.
        labels_N: the completion tokens.
    """
    return torch.nn.functional.cross_entropy(wide(logits_NV), labels_N, reduction="none")


def divergence(name: str, teacher_NJ: Tensor, student_NJ: Tensor, temperature: float = 1.0, beta: float | None = None) -> Tensor:
    """A divergence between two distributions over the same J outcomes, times temperature².

    With two full rows of logits (J = V) this is the dense loss against an online teacher. The factor T² keeps the
    gradients' size (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        name: one of `DIVERGENCES`.
        teacher_NJ: logits or log-probabilities, any float type; −inf means a probability of zero.
        student_NJ: the student's; finite.
        temperature: T: each probability is raised to the power 1/T and normalised, for both teacher and student.
        beta: weight of the mixture, between 0 and 1, for the divergences that have one; the paper's value if not given.

    Raises:
        ValueError: if there is no such divergence, or a number is out of range.
    """
    Objective(name, temperature=temperature, beta=beta)
    mixture = {} if beta is None else {"beta": beta}
    log_p_NJ = (wide(teacher_NJ) / temperature).log_softmax(dim=1)
    log_q_NJ = (wide(student_NJ) / temperature).log_softmax(dim=1)
    return DIVERGENCES[name](log_p_NJ, log_q_NJ, **mixture) * temperature**2


def topk_divergence(
    name: str,
    logits_NV: Tensor,
    ids_NK: Tensor,
    logprobs_NK: Tensor,
    tail_N: Tensor,
    temperature: float = 1.0,
    beta: float | None = None,
) -> Tensor:
    """The divergence on the stored support, with one bucket for everything else, times temperature².

    At K = V it equals the dense one. At temperature 1 all but `adaptive_kl`, being functions of f-divergences, never exceed the
    dense one, by the data-processing inequality. A temperature T ≠ 1 is applied to the K + 1 outcomes, including the bucket as
    one of them, since its contents are not stored.

    Args:
        name: one of `DIVERGENCES`.
        logits_NV: the student's logits, any float type.
        ids_NK: the support, without repeats in a row.
        logprobs_NK: the teacher's log-probabilities on it, natural logarithm.
        tail_N: the teacher's mass outside the support, a probability; 0 at K = V.
        temperature: T.
        beta: as in `divergence`.
    """
    teacher_NJ, student_NJ = bucket_outcomes(logprobs_NK, tail_N, *picked_logits(logits_NV, ids_NK, apart=True))
    return divergence(name, teacher_NJ, student_NJ, temperature, beta)


def sampled_kl(logits_NV: Tensor, ids_NK: Tensor, logweights_NK: Tensor, entropy_N: Tensor) -> Tensor:
    """An unbiased estimate of the dense KL(teacher ‖ student) from sampled targets: −Σ w log q − entropy.

    Its gradient equals that of the dense KL in expectation over the sample (`targets.draw`), so its error is noise that
    averages out over tokens, not bias. The entropy is a constant of the sample that makes the value an estimate of the KL:
    exactly zero, sample by sample, for a student that equals the teacher. There is no temperature, since the teacher's
    distribution to the power 1/T cannot be estimated from a sample without bias.

    Args:
        logits_NV: the student's logits, any float type.
        ids_NK: the sampled tokens.
        logweights_NK: natural logarithms of their weights, which sum to one per row.
        entropy_N: −Σ w log p of the same sample, nats.
    """
    picked_NK, all_N1 = picked_logits(logits_NV, ids_NK, apart=False)
    return weighted_kl(picked_NK - all_N1, logweights_NK, entropy_N)


def weighted_kl(log_q_NK: Tensor, logweights_NK: Tensor, entropy_N: Tensor) -> Tensor:
    """`sampled_kl` from the student's log-probabilities of the sampled tokens."""
    return -(wide(logweights_NK).exp() * log_q_NK).sum(dim=1) - wide(entropy_N)


def sequence_kl(ce_N: Tensor, token_logprobs_N: Tensor, importance_N: Tensor) -> Tensor:
    """Each token's share w (log p(y) − log q(y)) of the KL between whole texts, estimated from the teacher's own text.

    Summed over a text it is w (log p(y|x) − log q(y|x)), whose mean over texts drawn from s, with w = p(y|x) / s(y|x), is
    KL(p(·|x) ‖ q(·|x)) in nats per text. At sampling temperature 1, w = 1 and the gradient is that of cross-entropy (Kim &
    Rush 2016, arXiv 1606.07947); the token-level forward KL on the same text has the same mean and less noise.

    Args:
        ce_N: −log q(y) of the student.
        token_logprobs_N: log p(y) of the teacher.
        importance_N: w of the text that the token is in; see `importance`.
    """
    return wide(importance_N) * (wide(token_logprobs_N) + ce_N)


def bucket_outcomes(logprobs_NK: Tensor, tail_N: Tensor, picked_NK: Tensor, rest_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities, up to a constant, of teacher and student on the support and, last, all else; both (N, K + 1).

    If the student has nothing outside the support, as at K = V, that is not an outcome: the teacher's tail there is rounding,
    or belongs to tokens that the student does not have.

    Args:
        logprobs_NK: the teacher's log-probabilities on the support.
        tail_N: its probability mass outside the support.
        picked_NK: the student's logits on the support.
        rest_N1: the log-sum-exp of its other logits.
    """
    rest_of_teacher_N1 = wide(tail_N).log()[:, None].masked_fill(rest_N1 < SMALLEST / 2, -math.inf)
    return torch.cat([wide(logprobs_NK), rest_of_teacher_N1], dim=1), torch.cat([picked_NK, rest_N1], dim=1)


def picked_logits(logits_NV: Tensor, ids_NK: Tensor, apart: bool) -> tuple[Tensor, Tensor]:
    """The logits of some tokens, (N, K), and the log-sum-exp, (N, 1), of the others if `apart`, else of all.

    The others are summed over their own logits instead of as 1 − Σ_S q, which has no significant digits left when q is
    confident.
    """
    logits_NV = wide(logits_NV)
    rest_NV = logits_NV.scatter(1, ids_NK, SMALLEST) if apart else logits_NV
    return logits_NV.gather(1, ids_NK), rest_NV.logsumexp(dim=1, keepdim=True)


def forward_kl(log_p_NJ: Tensor, log_q_NJ: Tensor) -> Tensor:
    """Σ p log(p/q): the student covers everything the teacher might write (Hinton et al. 2015, arXiv 1503.02531)."""
    return _kl(log_p_NJ, log_q_NJ)


def reverse_kl(log_p_NJ: Tensor, log_q_NJ: Tensor) -> Tensor:
    """Σ q log(q/p): the student avoids everything the teacher would not write (MiniLLM, arXiv 2306.08543)."""
    return _kl(log_q_NJ, log_p_NJ.masked_fill(log_p_NJ.isneginf(), _LOG_ZERO))


def jsd(log_p_NJ: Tensor, log_q_NJ: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon: β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = βp + (1 − β)q (GKD, arXiv 2306.13649)."""
    log_m_NJ = _mixture(log_p_NJ, log_q_NJ, beta)
    return beta * _kl(log_p_NJ, log_m_NJ) + (1 - beta) * _kl(log_q_NJ, log_m_NJ)


def skew_kl(log_p_NJ: Tensor, log_q_NJ: Tensor, beta: float = 0.1) -> Tensor:
    """KL(p ‖ βp + (1 − β)q): forward KL bounded by log(1/β) (DistiLLM, arXiv 2402.03898)."""
    return _kl(log_p_NJ, _mixture(log_p_NJ, log_q_NJ, beta))


def skew_reverse_kl(log_p_NJ: Tensor, log_q_NJ: Tensor, beta: float = 0.1) -> Tensor:
    """KL(q ‖ βq + (1 − β)p): reverse KL bounded by log(1/β) (DistiLLM, arXiv 2402.03898)."""
    return _kl(log_q_NJ, _mixture(log_q_NJ, log_p_NJ, beta))


def adaptive_kl(log_p_NJ: Tensor, log_q_NJ: Tensor) -> Tensor:
    """Adaptive KL: s KL(p ‖ q) + (1 − s) KL(q ‖ p), where s is the share of Σ |p − q| in the head (arXiv 2404.02657).

    The head is the smallest set of the teacher's most likely outcomes with at least half its mass; s has no gradient.
    """
    p_NJ = log_p_NJ.exp()
    gap_NJ = (p_NJ - log_q_NJ.detach().exp()).abs()
    sorted_NJ, order_NJ = p_NJ.sort(dim=1, descending=True, stable=True)
    is_head_NJ = sorted_NJ.cumsum(dim=1) - sorted_NJ < 0.5
    head_N = (gap_NJ.gather(1, order_NJ) * is_head_NJ).sum(dim=1)
    share_N = head_N / gap_NJ.sum(dim=1).clamp(min=torch.finfo(gap_NJ.dtype).tiny)
    return share_N * forward_kl(log_p_NJ, log_q_NJ) + (1 - share_N) * reverse_kl(log_p_NJ, log_q_NJ)


def total_variation(log_p_NJ: Tensor, log_q_NJ: Tensor) -> Tensor:
    """½ Σ |p − q|, between 0 and 1 (f-distill, arXiv 2307.15190)."""
    return (log_p_NJ.exp() - log_q_NJ.exp()).abs().sum(dim=1) / 2


def neg_log_acceptance(log_p_NJ: Tensor, log_q_NJ: Tensor) -> Tensor:
    """−log Σ min(p, q): of the acceptance rate in speculative decoding (Leviathan et al., arXiv 2211.17192).

    Its gradient is that of the total variation divided by the acceptance, so it does not vanish if little is accepted. The sum
    is over logarithms, as probabilities would underflow if p and q hardly overlap.
    """
    return -torch.minimum(log_p_NJ, log_q_NJ).logsumexp(dim=1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        jsd,
        skew_kl,
        skew_reverse_kl,
        adaptive_kl,
        total_variation,
        neg_log_acceptance,
    )
}


@dataclass(frozen=True)
class Objective:
    """(1 − alpha − sequence_alpha) · cross-entropy + alpha · divergence + sequence_alpha · sequence-level KL.

    Args:
        loss: the divergence, one of `DIVERGENCES`.
        alpha: its weight.
        temperature: temperature of both distributions in the divergence, which is multiplied by its square.
        beta: weight of the mixture in `jsd`, `skew_kl` and `skew_reverse_kl`; the paper's value if not given.
        sequence_alpha: the weight of `sequence_kl`.

    Raises:
        ValueError: if one of them is out of range, or beta is given for a divergence without a mixture.
    """

    loss: str = "forward_kl"
    alpha: float = 0.9
    temperature: float = 1.0
    beta: float | None = None
    sequence_alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in DIVERGENCES:
            raise ValueError(f"loss is {self.loss!r}, must be one of {', '.join(DIVERGENCES)}")
        if not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise ValueError(f"alpha must be in [0, 1] and temperature above 0, got {self.alpha} and {self.temperature}")
        if not 0 <= self.sequence_alpha <= 1 or self.alpha + self.sequence_alpha > 1 + 1e-9:
            raise ValueError(
                f"alpha and sequence_alpha must add up to at most 1, got {self.alpha} and {self.sequence_alpha}; "
                "the rest is the weight of cross-entropy"
            )
        if self.beta is not None and "beta" not in inspect.signature(DIVERGENCES[self.loss]).parameters:
            raise ValueError(f"beta is {self.beta}, but {self.loss} has no parameter beta")
        if self.beta is not None and not 0 < self.beta < 1:
            raise ValueError(
                f"beta must be above 0 and below 1, got {self.beta}; the limits of jsd are forward_kl and reverse_kl"
            )

    def divergences(self, teacher_NJ: Tensor, student_NJ: Tensor) -> dict[str, Tensor]:
        """The divergence under its name and, always, forward KL as `kl`, so that runs with different losses can be compared."""
        found = {"kl": divergence("forward_kl", teacher_NJ, student_NJ, self.temperature)}
        if self.loss != "forward_kl":
            found[self.loss] = divergence(self.loss, teacher_NJ, student_NJ, self.temperature, self.beta)
        return found

    def total(self, parts: dict[str, Tensor], batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, weighted and summed over tokens, and the detached, unweighted sums of its parts.

        Args:
            parts: `ce` and, if there are soft targets, the divergence and `agreement`; one value per token.
            batch: of the same tokens; `token_weights` (N,) multiply their losses, and `sequence_kl` is added to the parts if
                there are `token_importance` and `token_logprobs`. Tokens without weight get no gradient.
        """
        if "token_importance" in batch:
            parts["sequence_kl"] = sequence_kl(parts["ce"], batch["token_logprobs"], batch["token_importance"])
        weights = {
            "ce": max(1 - (self.alpha + self.sequence_alpha), 0.0),
            "kl" if self.loss == "forward_kl" else self.loss: self.alpha,
            "sequence_kl": self.sequence_alpha,
        }
        loss_N = torch.stack([weight * parts[name] for name, weight in weights.items() if weight]).sum(dim=0)
        if "token_weights" in batch:
            loss_N = loss_N * batch["token_weights"]
        return loss_N.sum(), {name: values.detach().sum() for name, values in parts.items()}


def _kl(log_a_NJ: Tensor, log_b_NJ: Tensor) -> Tensor:
    """Σ a log(a/b); outcomes with a = 0 add nothing, whatever their logarithm: 0 × −inf would be NaN."""
    return (log_a_NJ.exp() * (log_a_NJ.clamp(min=SMALLEST) - log_b_NJ)).sum(dim=1)


def _mixture(log_a_NJ: Tensor, log_b_NJ: Tensor, share: float) -> Tensor:
    """log(share · a + (1 − share) · b)."""
    return torch.logaddexp(log_a_NJ + math.log(share), log_b_NJ + math.log1p(-share))


def wide(values: Tensor) -> Tensor:
    """Convert to float32 at least; float64 is kept, for tests."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
