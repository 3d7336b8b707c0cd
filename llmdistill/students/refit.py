"""Refit of a pruned student: its layers' `down_proj` in closed form, so that its hidden states come near the teacher's.

Where layers go, the next one gets another input than it used to. From the first layer to the last, each `down_proj` is
therefore solved again by ridge regression, on what the student refitted so far makes of the calibration rows. ReplaceMe
(Shopkhoev et al. 2025, arXiv 2505.02819) puts one linear map behind the MLP before a gap and folds it into `down_proj`; here
all of `down_proj` is free, which contains that map, and every layer that stays is refitted.

Shapes: B rows of a batch, T tokens, N positions of a batch that are not padding, D hidden size, F feed-forward neurons.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from llmdistill.data.collator import DistillCollator, replaced_forward, text_only
from llmdistill.errors import InputError
from llmdistill.losses.hidden_states import of_pruned
from llmdistill.students.pruning import Kept

Batch = dict[str, Tensor]
_PROBE_TOKENS = 8
_NOT_LINEAR = 1e-3  # share of a change in a layer's output; rounding to float32 is a thousandth of it, a norm leaves about 1


@torch.no_grad()
def refit(
    student: Any, teacher: Any, kept: Kept, rows: Sequence[dict[str, Any]], ridge: float, batch_size: int = 8
) -> list[tuple[float, float]]:
    """Solve every layer's `down_proj` again, in place.

    With A (N × F) the input of `down_proj`, Y (N × D) what the next kept layer used to get in the teacher (the last: the
    teacher's last hidden state before the final norm) and R = Y − the layer's output, over all positions of all rows:

        W ← W + ΔW,  ΔWᵀ = (AᵀA + ridge · mean(diag AᵀA) · I)⁻¹ Aᵀ R / s

    s is the factor with which the layer adds the MLP's output, 1 for most models (granite's residual_multiplier). On these
    rows Σ R² never grows by this step. A bias stays as it is. Where channels went, Y is the teacher's state on those that
    stayed.

    Teacher and student go through the rows layer by layer, the teacher once and the student twice. Memory holds three hidden
    states of every position, 12 · D bytes, and the equations, 16 · F · (F + D) bytes whatever the number of rows.

    Args:
        student: cut out of the teacher by `prune_model`, in float32.
        teacher: in float32.
        kept: what stayed.
        rows: with `input_ids` and `completion_start`; prompts count, too.
        ridge: how strongly the weights are kept near the old ones.
        batch_size: rows in one forward pass; the result does not depend on it.

    Returns:
        For every layer of the student the sum of R² over that of Y², with the old and with the new weights of that layer.

    Raises:
        InputError: the layers are not built so that this solution is exact, or what they compute is not finite.
    """
    batches = _batches(rows, batch_size, student.device)
    scales = residual_scales(student, rows)
    if isinstance(scales, str):
        raise InputError(f"student.prune.refit: {scales}")
    theirs, ours = _Sweep(teacher, batches), _Sweep(student, batches)
    channels = torch.as_tensor(kept.hidden, device=student.device)
    errors, done = [], 0
    for number, source in of_pruned(kept.layers, len(theirs.layers)):
        for layer in range(done, source + 1):
            theirs.advance(layer)
        done = source + 1
        masks = (batch["attention_mask"].bool() for batch in batches)
        targets = [states_BTD[mask_BT][:, channels] for states_BTD, mask_BT in zip(theirs.states, masks, strict=True)]
        errors.append(_refit_layer(ours, number, targets, scales[number], ridge))
    return errors


def _refit_layer(sweep: "_Sweep", number: int, targets: list[Tensor], scale: float, ridge: float) -> tuple[float, float]:
    """Solve for one layer and move the states behind it; the error before and after, as `refit` returns it."""
    down = sweep.layers[number].mlp.down_proj
    size, width = down.in_features, down.out_features
    gram_FF = torch.zeros(size, size, dtype=torch.float64, device=down.weight.device)
    cross_FD = torch.zeros(size, width, dtype=torch.float64, device=down.weight.device)
    before = whole = 0.0
    for index, target_ND in enumerate(targets):
        a_NF, out_ND = sweep.inputs_and_outputs(number, index)
        gap_ND = target_ND - out_ND
        # With the ridge the equations are well-conditioned: products in float32 lose nothing that counts, and are fast.
        gram_FF += a_NF.T @ a_NF
        cross_FD += a_NF.T @ gap_ND
        before += float(gap_ND.double().square().sum())
        whole += float(target_ND.double().square().sum())
    down.weight += (ridge_solution(gram_FF, cross_FD, ridge).T / scale).to(down.weight.dtype)
    sweep.advance(number)
    pairs = zip(targets, sweep.states, sweep.masks, strict=True)
    after = sum(float((y_ND - states_BTD[mask_BT]).double().square().sum()) for y_ND, states_BTD, mask_BT in pairs)
    return before / (whole or 1), after / (whole or 1)


def ridge_solution(gram_FF: Tensor, cross_FD: Tensor, ridge: float) -> Tensor:
    """(G + ridge · mean(diag G) · I)⁻¹ C, shape (F, D); zero where G is zero, since what is always zero has no effect.

    Raises:
        InputError: the sums are not finite.
    """
    mean = gram_FF.diagonal().mean()
    if not (mean.isfinite() and cross_FD.isfinite().all()):
        raise InputError("student.prune.refit: the hidden states of the calibration rows are not finite; set it to false")
    if mean == 0:
        return torch.zeros_like(cross_FD)
    ridge_FF = gram_FF.clone()
    ridge_FF.diagonal().add_(ridge * mean)
    return torch.cholesky_solve(cross_FD, torch.linalg.cholesky(ridge_FF))


@torch.no_grad()
def residual_scales(model: Any, rows: Sequence[dict[str, Any]]) -> list[float] | str:
    """For every layer the s in: its output = what does not depend on `down_proj` + s · the output of `down_proj`.

    It is measured, by adding known numbers to the output of `down_proj`, so no list of architectures has to be right.

    Returns:
        The factors, or, for people, why there are none.
    """
    ids = [int(number) for number in rows[0]["input_ids"][:_PROBE_TOKENS]]
    (batch,) = _batches([{"input_ids": ids, "completion_start": 0}], 1, model.device)
    found = []
    for number, (states_BTD, args, kwargs) in enumerate(_calls(model, batch)):
        layer = model.get_decoder().layers[number]
        plain_BTD = layer(states_BTD, *args, **kwargs)
        if not isinstance(plain_BTD, Tensor):
            return f"the layers of {type(model).__name__} return more than hidden states"
        noise = torch.Generator().manual_seed(number)
        added_BTD = torch.randn(plain_BTD.shape, generator=noise).to(plain_BTD) * plain_BTD.square().mean().sqrt()
        handle = layer.mlp.down_proj.register_forward_hook(lambda module, args, output, more=added_BTD: output + more)
        try:
            change_BTD = layer(states_BTD, *args, **kwargs) - plain_BTD
        finally:
            handle.remove()
        scale = float((change_BTD * added_BTD).sum() / added_BTD.square().sum())
        # Written so that what is not a number fails.
        if not (scale != 0 and (change_BTD - scale * added_BTD).norm() <= _NOT_LINEAR * change_BTD.norm()):
            return (
                f"layer {number} of {type(model).__name__} is not linear in down_proj, for example because a norm follows "
                "it (gemma, olmo2), so there is no closed form"
            )
        found.append(scale)
    return found


class _Sweep:
    """A model's hidden states in front of one layer after the other, on all batches; `states` are of shape (B, T, D)."""

    def __init__(self, model: Any, batches: list[Batch]) -> None:
        self.layers = model.get_decoder().layers
        self.masks = [batch["attention_mask"].bool() for batch in batches]
        calls = [_calls(model, batch) for batch in batches]
        self.states: list[Tensor] = [of_batch[0][0] for of_batch in calls]
        self._arguments = [[(args, kwargs) for _, args, kwargs in of_batch] for of_batch in calls]

    def output(self, number: int, index: int) -> Tensor:
        """What layer `number` makes of the states of batch `index`, shape (B, T, D)."""
        args, kwargs = self._arguments[index][number]
        found: Tensor = self.layers[number](self.states[index], *args, **kwargs)
        return found

    def advance(self, number: int) -> None:
        """Move all states behind layer `number`."""
        for index in range(len(self.states)):
            self.states[index] = self.output(number, index)

    def inputs_and_outputs(self, number: int, index: int) -> tuple[Tensor, Tensor]:
        """The input of the layer's `down_proj` (N, F) and the layer's output (N, D) on batch `index`."""
        seen: list[Tensor] = []
        handle = self.layers[number].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            output_BTD = self.output(number, index)
        finally:
            handle.remove()
        return seen[0][self.masks[index]], output_BTD[self.masks[index]]


def _calls(model: Any, batch: Batch) -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
    """What the model calls each of its layers with: the embedded tokens, in place of hidden states, and other arguments.

    Masks and rotary embeddings, which differ between the kinds of layers, so are those of the model itself.
    """
    calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((hidden_states, args, kwargs))
        return hidden_states

    decoder = model.get_decoder()
    with ExitStack() as stack:
        for layer in decoder.layers:
            stack.enter_context(replaced_forward(layer, record))
        decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return calls


def _batches(rows: Sequence[dict[str, Any]], batch_size: int, device: Any) -> list[Batch]:
    """The rows' ids and masks, padded."""
    collate = DistillCollator(pad_token_id=0)
    text = text_only(rows)
    batches = [collate(text[start : start + batch_size]) for start in range(0, len(text), batch_size)]
    return [{name: batch[name].to(device) for name in ("input_ids", "attention_mask")} for batch in batches]
