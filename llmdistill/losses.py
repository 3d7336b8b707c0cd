"""The losses: pure functions of tensors, in nats, one value a completion token.

Let p be the teacher on its stored support S, r = 1 − Σ_S p the mass outside, q the student's softmax, y the token that
was written. Every function returns a tensor of shape (N,); the caller sums it and divides by the completion tokens of
the whole global batch.
"""

import torch
from torch import Tensor


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """−log q(y): hard labels, sequence-level distillation on the teacher's text (Kim & Rush 2016, arXiv 1606.07947).

    Args:
        logits_NV: the student's logits at the positions that predict completion tokens, any float type.
        labels_N: the completion tokens.
    """
    return torch.nn.functional.cross_entropy(logits_NV.float(), labels_N, reduction="none")


def forward_kl(logits_NV: Tensor, ids_NK: Tensor, logprobs_NK: Tensor, tail_N: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) on the stored support and one bucket for everything else, times temperature².

    Σ_S p log(p/q) + r log(r / (1 − Σ_S q)); at K = V, where r = 0, this is the dense KL. By the data-processing
    inequality it never exceeds the dense KL at temperature 1.

    A temperature T ≠ 1 is applied to the partition of K + 1 outcomes, teacher and student alike: each probability, the
    bucket's included, to the power 1/T, then normalised. For K = V this is the usual softmax at temperature T; for
    K < V the bucket is softened as one outcome, since what it holds is not stored. The factor T² keeps the gradients'
    size (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        logits_NV: the student's logits, any float type; computed in float32.
        ids_NK: the support, without repeats in a row.
        logprobs_NK: the teacher's log-probabilities on it, natural logarithm.
        tail_N: the teacher's mass outside the support, a probability.
        temperature: T.
    """
    teacher_NJ = torch.cat([logprobs_NK.float(), tail_N.float().log()[:, None]], dim=1) / temperature
    teacher_NJ = teacher_NJ.log_softmax(dim=1)
    student_NJ = (student_partition(logits_NV, ids_NK) / temperature).log_softmax(dim=1)
    p_NJ = teacher_NJ.exp()
    # An outcome of probability zero adds nothing, whatever its logarithm: 0 × −inf would be NaN.
    terms_NJ = torch.where(p_NJ > 0, p_NJ * (teacher_NJ.clamp(min=_SMALLEST) - student_NJ), 0.0)
    return terms_NJ.sum(dim=1) * temperature**2


def dense_kl(logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) over the whole vocabulary, times temperature²: for a teacher that runs beside the student.

    Args:
        logits_NV: the student's logits, any float type; computed in float32.
        teacher_logits_NV: the teacher's. Where one model's vocabulary is padded further, both are cut to the shorter.
        temperature: T, of both softmaxes (Hinton et al. 2015, arXiv 1503.02531).
    """
    size = min(logits_NV.shape[1], teacher_logits_NV.shape[1])
    log_q_NV = (logits_NV[:, :size].float() / temperature).log_softmax(dim=1)
    log_p_NV = (teacher_logits_NV[:, :size].float() / temperature).log_softmax(dim=1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(dim=1) * temperature**2


def sampled_kl(logits_NV: Tensor, ids_NK: Tensor, logweights_NK: Tensor, entropy_N: Tensor) -> Tensor:
    """An unbiased estimate of the dense KL(teacher ‖ student) from sampled targets: −Σ w log q − entropy.

    Its gradient equals that of the dense KL in expectation over the sample (`pps`), so what it errs by is noise that
    averages out over tokens, not bias that stays. The entropy is a constant of the sample that makes the value an
    estimate of the KL: exactly zero, sample by sample, for a student that is the teacher. There is no temperature: what
    the teacher's distribution to the power 1/T is cannot be told without bias from a sample.

    Args:
        logits_NV: the student's logits, any float type; computed in float32.
        ids_NK: the sampled tokens.
        logweights_NK: natural logarithms of their weights, which add up to one in a row.
        entropy_N: −Σ w log p of the same sample, nats.
    """
    logits_NV = logits_NV.float()
    log_q_NK = logits_NV.gather(1, ids_NK) - logits_NV.logsumexp(dim=1, keepdim=True)
    return -(logweights_NK.float().exp() * log_q_NK).sum(dim=1) - entropy_N.float()


def student_partition(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The student's log-probabilities on the support and, last, of everything outside it; shape (N, K + 1).

    The outside is summed over the other logits, not taken as 1 − Σ_S q, which has no digits left when q is sure.
    """
    logits_NV = logits_NV.float()
    inside_NK = logits_NV.gather(1, ids_NK)
    outside_N1 = logits_NV.scatter(1, ids_NK, _SMALLEST).logsumexp(dim=1, keepdim=True)
    partition_NJ = torch.cat([inside_NK, outside_N1], dim=1)
    return partition_NJ - partition_NJ.logsumexp(dim=1, keepdim=True)


# Stands for log 0 where an infinite value would turn gradients into NaN.
_SMALLEST = -1e30
