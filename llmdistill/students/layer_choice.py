"""Choice of layers to remove, one at a time, by the KL from the teacher after a refit.

Block influence rates each layer in the whole model. But the value of a layer depends on which others are removed, and on what
a refit can compensate, so each removal is tried here.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from llmdistill.config.student import Prune
from llmdistill.data.collator import DistillCollator, text_only
from llmdistill.data.targets import Array
from llmdistill.errors import InputError
from llmdistill.models.forward import completion_logits, replaced_forward
from llmdistill.students.pruning import Importance, Kept, choose, measure, prune_model
from llmdistill.students.refit import ResidualPath, States, Sweep, batches_of, refit, residual_paths, solve, solved_weights

_CANDIDATES = 10  # layers tried for each removal: those with the least block influence in the current student
_JUDGED = 4  # one calibration row in this many is used to measure the KL instead of solving
_MOST_JUDGED = 16  # rows, for which the teacher's distributions are kept in memory
_TOKENS = 83  # of a row's completion on which the KL is measured

Removed = list[tuple[int, float]]  # layers in the order of removal, each with the resulting KL


def parts_kept(prune: Prune, teacher: Any, rows: Sequence[dict[str, Any]]) -> tuple[Kept, Importance | None, Removed]:
    """The parts of the teacher to keep, the measurements behind the choice, and the layers removed by KL.

    Raises:
        InputError: as for `choose` and `layers_by_kl`.
    """
    importance = measure(teacher, rows) if prune.measured else None
    config = teacher.config.get_text_config()
    kept = choose(prune, config, importance)
    if not prune.by_kl:
        return kept, importance, []
    layers, removed = layers_by_kl(teacher, rows, len(kept.layers), prune.ridge)
    return choose(prune.with_(layers=layers, by="block_influence"), config, importance), importance, removed


class TeacherKl:
    """The distance of a student from the teacher on the first 83 completion tokens of some rows, in float32.

    The teacher's distributions are computed once and kept: 4 · V bytes per token (V: vocabulary).
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
    """Choose layers to keep by repeatedly removing the one whose removal leaves the least KL from the teacher.

    Each of the ten layers with the least block influence in the current student is left out in turn: the layer before it is
    solved again, and the KL is measured on a quarter of the rows, at most 16; the others are used for solving. The best one
    is removed, and the whole student is refitted. The first layer is always kept, since nothing before it could be refitted.

    Args:
        teacher: the teacher in float32.
        rows: with `input_ids` and `completion_start`.
        keep: number of layers to keep.
        ridge: as in `refit`.

    Returns:
        The layers to keep, and those removed in order, each with the resulting KL in nats per token.

    Raises:
        InputError: if there are too few rows, or the layers cannot be refitted.
    """
    each = max(_JUDGED, math.ceil(len(rows) / _MOST_JUDGED))
    judged = list(rows[::each])
    solved_on = [row for number, row in enumerate(rows) if number % each]
    if not solved_on:
        raise InputError(f"student.prune.by: kl needs at least two calibration rows, got {len(rows)}")
    paths = residual_paths(teacher, rows)
    if isinstance(paths, str):
        raise InputError(f"student.prune.by: kl needs a refit, but {paths}; choose block_influence")
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
    """The position of each candidate in the student, and the KL without it."""
    influence: Array = measure(student, rows).layers[1:]
    candidates = {int(place) + 1 for place in np.argsort(influence, kind="stable")[:_CANDIDATES]}
    batches = batches_of(rows, 8, student.device)
    theirs, ours, judged = Sweep(teacher, batches), Sweep(student, batches), Sweep(student, nearness.batches)
    done, found = 0, []
    for place in range(1, len(layers)):
        if place in candidates:
            # The former input of the layer after the gap or, if the last layer is removed, of the final norm.
            upto = layers[place + 1] if place + 1 < len(layers) else len(theirs.layers)
            while done < upto:
                theirs.advance(done)
                done += 1
            weights = solved_weights(student.get_decoder().layers[place - 1])
            old = [weight.clone() for weight in weights]
            solve(ours, place - 1, theirs.at_tokens, paths[layers[place - 1]], ridge)
            found.append((place, _kl_without(student, place, judged.states, nearness)))
            for weight, before in zip(weights, old, strict=True):
                weight.copy_(before)
        ours.advance(place - 1)
        judged.advance(place - 1)
    return found


def _kl_without(student: Any, place: int, states: States, nearness: TeacherKl) -> float:
    """The KL without a layer, given the hidden states before the preceding layer, batch by batch."""
    layers = student.get_decoder().layers
    before = layers[place - 1]
    coming = iter(states)
    plain = before.forward
    with ExitStack() as stack:
        for layer in (*layers[: place - 1], layers[place]):
            stack.enter_context(replaced_forward(layer, lambda hidden_states, *args, **kwargs: hidden_states))
        stack.enter_context(replaced_forward(before, lambda hidden_states, *args, **kwargs: plain(next(coming), *args, **kwargs)))
        return nearness.kl(student)
