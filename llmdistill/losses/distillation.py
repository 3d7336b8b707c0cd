"""The loss of a batch from the student's logits: the plain form; `fused` is equal but does not hold the logits.

The kind of a batch's targets determines the divergence (`SoftTargets.loss_parts`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llmdistill.data.targets import KINDS
from llmdistill.losses.chunks import chunk_parts
from llmdistill.losses.classes import online_parts, stored_parts
from llmdistill.losses.divergences import Objective, cross_entropy, picked_logits


class RoutedLogits:
    """The logits of several online teachers, each at its own positions among N.

    Args:
        teacher_N: the number of the teacher of each position.
        logits: for each number, the logits of the teacher's positions in order, (n, V of its own) or `ChunkedLogits`.
    """

    def __init__(self, teacher_N: Tensor, logits: Mapping[int, Any]) -> None:
        self.teacher_N = teacher_N
        self.logits = logits

    def __getitem__(self, rows: slice) -> "RoutedLogits":
        """The logits of some positions."""
        first, end, _ = rows.indices(len(self.teacher_N))
        found: dict[int, Any] = {}
        for number, logits in self.logits.items():
            its_N = self.teacher_N == number
            before, there = int(its_N[:first].sum()), int(its_N[first:end].sum())
            if there or (first == end and not found):  # an empty slice also has the right shape
                found[number] = logits[before : before + there]
        return RoutedLogits(self.teacher_N[first:end], found)

    def each(self) -> Iterator[tuple[int, Tensor, Any]]:
        """Each teacher's number, its positions and its logits there."""
        for number, logits in self.logits.items():
            yield number, (self.teacher_N == number).nonzero()[:, 0], logits


def distillation_loss(
    logits_NV: Tensor, labels_N: Tensor, targets: Mapping[str, Any], objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, weighted and summed over tokens, and the detached, unweighted sums of its parts.

    Args:
        logits_NV: the student's logits, any float type.
        labels_N: the completion tokens.
        targets: a batch of the collator; `target_kind` determines the form, and without soft targets it is cross-entropy.
            `teacher_logits` (N, V), of an online teacher, or `RoutedLogits` of several, take precedence over stored targets.
            With `target_table`, a `ClassTable`, teacher and student have different vocabularies (`losses.classes`).
        objective: what to compute.
    """
    if isinstance(theirs := targets.get("teacher_logits"), RoutedLogits):
        places, parts_of = [], []
        for number, place_n, logits_nV in theirs.each():
            here = {name: targets[name][place_n] for name in ("target_soft",) if name in targets}
            here |= {name: targets[name] for name in ("target_table",) if name in targets}
            here["teacher_logits"] = logits_nV
            places.append(place_n)
            parts_of.append(_parts(logits_NV[place_n], labels_N[place_n], here, objective, number))
        back_N = torch.cat(places).argsort()
        parts = {name: torch.cat([found[name] for found in parts_of])[back_N] for name in parts_of[0]}
    else:
        parts = _parts(logits_NV, labels_N, targets, objective)
    return objective.total(parts, targets)


def _parts(
    logits_NV: Tensor, labels_N: Tensor, targets: Mapping[str, Any], objective: Objective, number: int = 0
) -> dict[str, Tensor]:
    """The parts of the loss by name, (N,); an online teacher, if any, is identified by a number in `target_table`."""
    if "teacher_logits" in targets and "target_table" not in targets:  # one vocabulary may have more padding
        targets = {**targets, "teacher_logits": targets["teacher_logits"][:, : logits_NV.shape[1]]}
    parts = {"ce": cross_entropy(logits_NV, labels_N)}
    with torch.set_grad_enabled(objective.alpha > 0 and torch.is_grad_enabled()):
        parts = _soft_parts(logits_NV, labels_N, targets, objective, parts["ce"], number) | parts
    if "agreement" not in parts and (choice_N1 := teacher_choice(targets)) is not None:
        with torch.no_grad():
            parts["agreement"] = (logits_NV.gather(1, choice_N1)[:, 0] >= logits_NV.amax(dim=1)).float()
    return parts


def _soft_parts(
    logits_NV: Tensor, labels_N: Tensor, targets: Mapping[str, Any], objective: Objective, ce_N: Tensor, number: int
) -> dict[str, Tensor]:
    """The divergences by name, (N,); none for text only."""
    if "target_table" in targets and "teacher_logits" in targets:
        return online_parts(logits_NV, labels_N, targets, objective, number)
    if "target_table" in targets:
        return stored_parts(logits_NV, labels_N, targets, objective)
    if "teacher_logits" in targets:
        teacher_NV = targets["teacher_logits"]
        return objective.divergences(teacher_NV, logits_NV[:, : teacher_NV.shape[1]])
    if "target_kind" not in targets:
        return {}
    if "target_chunk" in targets:
        return chunk_parts(ce_N, targets, objective)
    kind = KINDS[targets["target_kind"]]
    picked_NK, rest_N1 = picked_logits(logits_NV, targets["target_ids"], kind.has_tail)
    return kind.loss_parts(*kind.present(picked_NK, rest_N1, targets), targets, objective)


def teacher_choice(targets: Mapping[str, Any]) -> Tensor | None:
    """The teacher's most likely token, shape (N, 1); for a sample, the one with the largest weight; None for text only."""
    if "teacher_logits" in targets:
        return targets["teacher_logits"].argmax(dim=1, keepdim=True)
    if "target_kind" not in targets or "target_chunk" in targets:
        return None
    return targets["target_ids"].gather(1, KINDS[targets["target_kind"]].choice(targets))
