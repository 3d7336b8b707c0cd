"""The loss for a student whose vocabulary differs from its teacher's, on root classes (`models.root_classes`).

Let ρ(u) be the class of token u, p_c the teacher's weight on class c, q the student's softmax, Q_c = Σ q(u) over the
student's tokens of class c, and y the written token. If the position has a soft target:

    L = D(p_C ‖ Q_C) − log( q(y) / Q_{ρ(y)} )

D is the divergence over classes, which never exceeds the one over tokens (data processing). The second term is the choice
within the class; its expectation over the text is its cross-entropy. With forward KL and a sample of the teacher's tokens,
D = −Σ w_c log Q_c − entropy is unbiased, since w_c is linear in the weights. At all other positions, L = −log q(y). With
equal vocabularies every token is its own class, and L is the loss of `divergences`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmdistill.data.targets import KINDS
from llmdistill.losses.divergences import SMALLEST, Objective, cross_entropy, wide
from llmdistill.models.root_classes import RootClasses, by_name


@dataclass(frozen=True)
class ClassTable:
    """Root classes on a device, of one teacher or several; see `RootClasses`.

    The classes of several teachers are numbered consecutively, so that the tokens of any class are found the same way.

    Attributes:
        teacher_V: the class of each of a teacher's tokens, in its own numbers, for each teacher.
        student_GV: the class of each of the student's tokens, in the own numbers of every teacher.
        are_tokens: whether each teacher's classes are single tokens, that is, whether it has the student's vocabulary.
        first_G: the number of each teacher's first class, and the total number (G + 1,).
        members_M: the student's tokens, class by class, all of them once for every teacher.
        starts_C: the start of each class in `members_M`, and the end (C + 1,).
    """

    teacher_V: tuple[Tensor, ...]
    student_GV: Tensor
    are_tokens: tuple[bool, ...]
    first_G: Tensor
    members_M: Tensor
    starts_C: Tensor

    @classmethod
    def of(cls, classes: "RootClasses | Mapping[str, RootClasses]", device: Any = "cpu") -> "ClassTable":
        """Build from the arrays of a dataset; teachers are numbered in their order there."""
        each = list(by_name(classes).values())
        size = len(each[0].student_V)
        members, starts = zip(*(one.members for one in each), strict=True)
        begins = np.concatenate([start[:-1] + size * number for number, start in enumerate(starts)])

        def put(values: Any) -> Tensor:
            return torch.from_numpy(np.asarray(values)).long().to(device)

        return cls(
            tuple(put(one.teacher_V) for one in each),
            put(np.stack([one.student_V for one in each])),
            tuple(one.are_tokens for one in each),
            put(np.concatenate([[0], np.cumsum([one.count for one in each])])),
            put(np.concatenate(members)),
            put(np.append(begins, size * len(each))),
        )

    @property
    def count(self) -> int:
        """Number of classes."""
        return len(self.starts_C) - 1

    def numbered(self, class_nK: Tensor, teacher_n: Tensor | None) -> Tensor:
        """Convert classes from a teacher's own numbers to those of this table; −1, for none, is kept.

        Args:
            class_nK: the classes.
            teacher_n: the number of the teacher of each row; None for a single teacher.
        """
        return class_nK if teacher_n is None else class_nK + self.first_G[teacher_n][:, None] * (class_nK >= 0)

    def classes_of(self, token_n: Tensor, teacher_n: Tensor | None) -> Tensor:
        """The classes of the student's tokens, (n, 1), in the own numbers of each row's teacher."""
        found_n: Tensor = self.student_GV[0 if teacher_n is None else teacher_n, token_n]
        return found_n[:, None]

    def expand(self, class_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of some classes, concatenated (M,), and the index n · K + k of each token's class (M,).

        Args:
            class_NK: the classes; −1 for none.
        """
        flat = class_NK.flatten()
        start, end = self.starts_C[flat.clamp(min=0)], self.starts_C[flat.clamp(min=0) + 1]
        size = (end - start) * (flat >= 0)
        place_M = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), size)
        offset_M = torch.arange(len(place_M), device=flat.device) - (size.cumsum(0) - size)[place_M]
        return self.members_M[start[place_M] + offset_M], place_M


def segment_logsumexp(values_M: Tensor, place_M: Tensor, count: int) -> Tensor:
    """The log-sum-exp of the values at each index, shape (count,); `SMALLEST` if there are none."""
    top = values_M.new_full((count,), SMALLEST).scatter_reduce(0, place_M, values_M.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, place_M, (values_M - top[place_M]).exp())
    return torch.where(total > 0, top + total.clamp(min=torch.finfo(total.dtype).tiny).log(), top)


def class_logits(logits_NV: Tensor, class_V: Tensor, count: int) -> Tensor:
    """The log-probability of every class, (N, C), as far as float32 can distinguish it from zero.

    Args:
        logits_NV: logits of a model whose tokens the classes consist of; any float type.
        class_V: the class of each token, including those of a padded output layer.
        count: number of classes.
    """
    p_NV = wide(logits_NV)[:, : len(class_V)].softmax(dim=1)
    p_NC = p_NV.new_zeros(len(p_NV), count).index_add(1, class_V[: p_NV.shape[1]], p_NV)
    return p_NC.clamp(min=torch.finfo(p_NC.dtype).tiny).log()


@dataclass(frozen=True)
class ClassPicks:
    """The logits of rows (n, V) that a loss over classes depends on, besides the log-sum-exp of the others.

    They are flat (P,): those of the tokens of all stored classes (M), of the tokens of the labels' classes, and of the
    labels (n). The same logit may occur more than once.

    Attributes:
        labels_n: the written tokens.
        class_nK: the stored classes; −1 for none.
        flat_P: the index of each in the flattened (n · V).
        place_M: the index n · K + k of the stored class of each.
        own_place_M: the row of each token of the labels' classes.
    """

    labels_n: Tensor
    class_nK: Tensor
    flat_P: Tensor
    place_M: Tensor
    own_place_M: Tensor

    @classmethod
    def of(cls, batch: Mapping[str, Any], labels_n: Tensor, width: int) -> "ClassPicks":
        """Build from stored classes and labels.

        Args:
            batch: batch of the collator, with a `ClassTable` as `target_table`.
            labels_n: the written tokens.
            width: number of logits per row.
        """
        table, teacher_n = batch["target_table"], batch.get("target_teacher")
        class_nK = table.numbered(batch["target_ids"], teacher_n)
        token_M, place_M = table.expand(class_nK)
        own_token_M, own_place_M = table.expand(table.numbered(table.classes_of(labels_n, teacher_n), teacher_n))
        row_P = torch.cat([place_M // class_nK.shape[1], own_place_M, torch.arange(len(labels_n), device=labels_n.device)])
        flat_P = row_P * width + torch.cat([token_M, own_token_M, labels_n])
        return cls(labels_n, class_nK, flat_P, place_M, own_place_M)

    def take(self, logits_nV: Tensor) -> Tensor:
        """The picked logits (P,)."""
        return logits_nV.flatten()[self.flat_P]

    def hide_(self, logits_nV: Tensor, value: float) -> None:
        """In place: set the logits of the tokens of the stored classes to a value."""
        logits_nV.view(-1)[self.flat_P[: len(self.place_M)]] = value

    def add_(self, logits_nV: Tensor, values_P: Tensor) -> None:
        """In place: add to the picked logits."""
        logits_nV.view(-1).index_add_(0, self.flat_P, values_P)

    def row_loss(
        self, picked_P: Tensor, others_n1: Tensor, top_n1: Tensor, batch: Mapping[str, Any], objective: Objective
    ) -> dict[str, Tensor]:
        """The parts of the loss (n,): `ce`, the divergence and forward KL, `agreement`.

        Args:
            picked_P: the picked logits, in float32 or float64.
            others_n1: the log-sum-exp of all logits except those of stored classes if the kind has a tail, else of all logits.
            top_n1: the largest of those logits.
            batch: batch of the collator for these rows.
            objective: what to compute.
        """
        kind, count = KINDS[batch["target_kind"]], len(self.labels_n)
        stored_M, own_M, label_n = picked_P.split([len(self.place_M), len(self.own_place_M), count])
        picked_nK = segment_logsumexp(stored_M, self.place_M, self.class_nK.numel()).view(self.class_nK.shape)
        picked_nK, others_n1 = kind.present(picked_nK, others_n1, batch)
        all_n1 = torch.cat([picked_nK, others_n1], dim=1).logsumexp(dim=1, keepdim=True) if kind.has_tail else others_n1
        ce_n = all_n1[:, 0] - label_n
        choice_n = segment_logsumexp(own_M, self.own_place_M, count) - label_n
        found = kind.loss_parts(picked_nK, others_n1, batch, objective)
        with torch.no_grad():
            agreement_n = self._agreement(stored_M, label_n, top_n1[:, 0], batch)
        return {"ce": ce_n, "agreement": agreement_n} | with_labels(found, batch["target_soft"], ce_n, choice_n)

    def _agreement(self, stored_M: Tensor, label_n: Tensor, top_n: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Whether the most likely token is in the teacher's most likely class; for hard labels, whether it is the label."""
        best_nK = stored_M.new_full((self.class_nK.numel(),), SMALLEST).scatter_reduce(0, self.place_M, stored_M, "amax")
        best_nK = best_nK.view(self.class_nK.shape)
        best_n = torch.maximum(best_nK.amax(dim=1), top_n)
        choice_n = best_nK.gather(1, KINDS[batch["target_kind"]].choice(batch))[:, 0]
        return (torch.where(batch["target_soft"], choice_n, label_n) >= best_n).float()


def with_labels(found: dict[str, Tensor], soft_N: Tensor, ce_N: Tensor, choice_N: Tensor) -> dict[str, Tensor]:
    """Divergences over classes plus the choice within the class, and cross-entropy where there is no soft target; (N,).

    Args:
        found: the divergences by name; their values without a soft target are ignored, but must be finite.
        soft_N: whether a position has a soft target.
        ce_N: −log q(y).
        choice_N: −log of the label's share of its class.
    """
    return {name: torch.where(soft_N, value_N + choice_N, ce_N) for name, value_N in found.items()}


def stored_parts(logits_NV: Tensor, labels_N: Tensor, targets: Mapping[str, Any], objective: Objective) -> dict[str, Tensor]:
    """The parts of the loss against stored targets, (N,).

    Args:
        logits_NV: the student's, any float type.
        labels_N: the written tokens.
        targets: a batch of the collator, with a `ClassTable` as `target_table`.
        objective: what to compute.
    """
    logits_NV = wide(logits_NV)
    picks = ClassPicks.of(targets, labels_N, logits_NV.shape[1])
    picked_P, others_NV = picks.take(logits_NV), logits_NV
    if KINDS[targets["target_kind"]].has_tail:
        others_NV = logits_NV.clone()
        picks.hide_(others_NV, SMALLEST)
    others_N1, top_N1 = others_NV.logsumexp(dim=1, keepdim=True), others_NV.detach().amax(dim=1, keepdim=True)
    return picks.row_loss(picked_P, others_N1, top_N1, targets, objective)


def online_parts(
    logits_NV: Tensor, labels_N: Tensor, targets: Mapping[str, Any], objective: Objective, number: int = 0
) -> dict[str, Tensor]:
    """The parts of the loss against an online teacher's distributions, by its number in the table; else as `stored_parts`."""
    table, soft_N, teacher_NV = targets["target_table"], targets["target_soft"], targets["teacher_logits"]
    ce_N = cross_entropy(logits_NV, labels_N)
    if table.are_tokens[number]:
        size = min(teacher_NV.shape[1], logits_NV.shape[1])
        teacher_NC, student_NC, choice_N = teacher_NV[:, :size], logits_NV[:, :size], torch.zeros_like(ce_N)
    else:
        student_V, count = table.student_GV[number], int(table.first_G[number + 1] - table.first_G[number])
        teacher_V = table.teacher_V[number]
        # What only one of them has a token for is not an outcome: the teacher's mass there is dropped, as for stored targets.
        one_sided_C = (student_V.bincount(minlength=count) == 0) | (teacher_V.bincount(minlength=count) == 0)
        teacher_NC = class_logits(teacher_NV, teacher_V, count).masked_fill(one_sided_C, -torch.inf)
        student_NC = class_logits(logits_NV, student_V, count)
        choice_N = student_NC.gather(1, student_V[labels_N][:, None])[:, 0] + ce_N
    with torch.no_grad():
        same_N = student_NC.argmax(dim=1) == teacher_NC.argmax(dim=1)
        agree_N = torch.where(soft_N, same_N, wide(logits_NV).argmax(dim=1) == labels_N)
    found = with_labels(objective.divergences(teacher_NC, student_NC), soft_N, ce_N, choice_N)
    return {"agreement": agree_N.float()} | found
