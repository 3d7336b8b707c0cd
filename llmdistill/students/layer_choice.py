"""Layers to remove, chosen one after the other by the KL from the teacher after a refit.

Block influence looks at each layer of the whole model. What a layer is worth depends on which others are gone, and on what a
refit makes good; so here each removal is tried.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmdistill.config.student import Prune
from llmdistill.data.collator import DistillCollator, text_only
from llmdistill.data.targets import Array
from llmdistill.errors import InputError
from llmdistill.models.forward import completion_logits, replaced_forward
from llmdistill.students.pruning import Importance, Kept, choose, measure, prune_model
from llmdistill.students.refit import ResidualPath, Sweep, batches_of, refit, residual_paths, solve

_CANDIDATES = 10  # layers tried for each removal, those with the least block influence in the student so far
_JUDGED = 4  # one calibration row in so many is not solved on: the KL is measured on it
_MOST_JUDGED = 16  # rows: the teacher's distributions on them are held
_TOKENS = 83  # of a row's completion, on which the KL is measured

Removed = list[tuple[int, float]]  # layers in the order in which they went, each with the KL that it left


def parts_kept(prune: Prune, teacher: Any, rows: Sequence[dict[str, Any]]) -> tuple[Kept, Importance | None, Removed]:
    """What stays of the teacher, the measurements that it was chosen by, and what went by KL.

    Raises:
        InputError: as `choose` and `layers_by_kl`.
    """
    importance = measure(teacher, rows) if prune.measured else None
    config = teacher.config.get_text_config()
    kept = choose(prune, config, importance)
    if not prune.by_kl:
        return kept, importance, []
    layers, removed = layers_by_kl(teacher, rows, len(kept.layers), prune.ridge)
    return choose(prune.with_(layers=layers, by="block_influence"), config, importance), importance, removed


class TeacherKl:
    """How far a student is from the teacher on the first 83 completion tokens of some rows; in float32.

    The teacher's distributions are computed once and held: 4 · V bytes a token (V: vocabulary).
    """

    def __init__(self, teacher: Any, rows: Sequence[dict[str, Any]], batch_size: int = 4) -> None:
        starts = [int(row["completion_start"]) for row in rows]
        cut = [
            {"input_ids": row["input_ids"][: at + _TOKENS], "completion_start": at} for row, at in zip(rows, starts, strict=True)
        ]
        text = text_only(cut)
        batches = [DistillCollator(0)(text[start : start + batch_size]) for start in range(0, len(text), batch_size)]
        self.batches = [{name: values.to(teacher.device) for name, values in batch.items()} for batch in batches]
        with torch.inference_mode():
            self._logprobs = [completion_logits(teacher, batch).float().log_softmax(-1) for batch in self.batches]

    def kl(self, student: Any) -> float:
        """KL(teacher ‖ student) in nats per token."""
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for batch, theirs_NV in zip(self.batches, self._logprobs, strict=True):
                ours_NV = completion_logits(student, batch).float().log_softmax(-1)
                total += float(torch.nn.functional.kl_div(ours_NV, theirs_NV, reduction="sum", log_target=True))
                tokens += len(theirs_NV)
        return total / tokens


def layers_by_kl(teacher: Any, rows: Sequence[dict[str, Any]], keep: int, ridge: float) -> tuple[list[int], Removed]:
    """The layers that stay when, one after the other, the layer goes whose removal leaves the least KL from the teacher.

    For each of the ten layers with the least block influence in the student so far, the layer is left out, the `down_proj`
    before it is solved again, and the KL is measured on a quarter of the rows, 16 at most; the others are solved on. The best
    one goes, and the whole student is refitted. The first layer always stays, since nothing before it could be refitted.

    Args:
        teacher: in float32.
        rows: with `input_ids` and `completion_start`.
        keep: how many layers stay.
        ridge: as in `refit`.

    Returns:
        The layers that stay, and those that went in their order, each with the KL in nats per token that it left.

    Raises:
        InputError: there are too few rows, or the layers are not built so that they can be refitted.
    """
    each = max(_JUDGED, math.ceil(len(rows) / _MOST_JUDGED))
    judged = list(rows[::each])
    solved_on = [row for number, row in enumerate(rows) if number % each]
    if not solved_on:
        raise InputError(f"student.prune.by: kl needs at least two calibration rows, there are {len(rows)}")
    paths = residual_paths(teacher, rows)
    if isinstance(paths, str):
        raise InputError(f"student.prune.by: kl refits, but {paths}; choose block_influence")
    nearness = TeacherKl(teacher, judged)
    layers = list(range(teacher.config.num_hidden_layers))
    removed: Removed = []
    while len(layers) > keep:
        kept = choose(Prune(layers=layers), teacher.config, None)
        student = prune_model(teacher, kept)
        if removed:
            refit(student, teacher, kept, solved_on, ridge)
        tried = _tried(student, teacher, layers, solved_on, nearness, paths, ridge)
        place, kl = min(tried, key=lambda found: found[1])
        removed.append((layers.pop(place), kl))
    return layers, removed


@torch.no_grad()
def _tried(
    student: Any,
    teacher: Any,
    layers: list[int],
    rows: Sequence[dict[str, Any]],
    nearness: TeacherKl,
    paths: list[ResidualPath],
    ridge: float,
) -> list[tuple[int, float]]:
    """The place of each candidate in the student, and the KL without it."""
    influence: Array = measure(student, rows).layers[1:]
    candidates = {int(place) + 1 for place in np.argsort(influence, kind="stable")[:_CANDIDATES]}
    batches = batches_of(rows, 8, student.device)
    theirs, ours, judged = Sweep(teacher, batches), Sweep(student, batches), Sweep(student, nearness.batches)
    done, found = 0, []
    for place in range(1, len(layers)):
        if place in candidates:
            # What the layer behind the gap used to get, or, where the last layer goes, the final norm.
            upto = layers[place + 1] if place + 1 < len(layers) else len(theirs.layers)
            while done < upto:
                theirs.advance(done)
                done += 1
            targets = [states_BTD[mask_BT] for states_BTD, mask_BT in zip(theirs.states, theirs.masks, strict=True)]
            weight = student.get_decoder().layers[place - 1].mlp.down_proj.weight
            old = weight.clone()
            solve(ours, place - 1, targets, paths[layers[place - 1]], ridge)
            found.append((place, _kl_without(student, place, judged.states, nearness)))
            weight.copy_(old)
        ours.advance(place - 1)
        judged.advance(place - 1)
    return found


def _kl_without(student: Any, place: int, states: list[Tensor], nearness: TeacherKl) -> float:
    """The KL without a layer, given the hidden states in front of the layer before it, batch by batch."""
    layers = student.get_decoder().layers
    before = layers[place - 1]
    coming = iter(states)
    plain = before.forward
    with ExitStack() as stack:
        for layer in (*layers[: place - 1], layers[place]):
            stack.enter_context(replaced_forward(layer, lambda hidden_states, *args, **kwargs: hidden_states))
        stack.enter_context(replaced_forward(before, lambda hidden_states, *args, **kwargs: plain(next(coming), *args, **kwargs)))
        return nearness.kl(student)
