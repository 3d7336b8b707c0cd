"""Refit of a pruned student: its layers' `down_proj` in closed form, to bring its hidden states close to the teacher's.

When layers are removed, the next one gets a different input. From the first layer to the last, each `down_proj` is therefore
solved again by ridge regression, on the output of the student refitted so far for the calibration rows. ReplaceMe (Shopkhoev
et al. 2025, arXiv 2505.02819) inserts one linear map after the MLP before a gap and folds it into `down_proj`; here all of
`down_proj` is free, which includes that map, and every layer that is kept is refitted. If a norm follows `down_proj` (gemma,
olmo2), the same equations are solved a few times with the norm's divisors held fixed.

Shapes: B rows of a batch, T tokens, N positions of a batch that are not padding, D hidden size, F feed-forward neurons.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmdistill.data.collator import DistillCollator, text_only
from llmdistill.data.targets.draw import widest
from llmdistill.errors import InputError
from llmdistill.losses.hidden_states import of_pruned
from llmdistill.models.forward import replaced_forward
from llmdistill.students.pruning import Kept

Batch = dict[str, Tensor]
_PROBE_TOKENS = 8
_NOT_LINEAR = 1e-3  # share of a change in a layer's output; rounding to float32 is a thousandth of it, a norm leaves about 1
_NORM = "post_feedforward_layernorm"  # after the MLP and before the sum: gemma, olmo2
_STEPS = 4  # with the norm's divisors held fixed; the first one or two do nearly all


@dataclass(frozen=True)
class ResidualPath:
    """How a layer adds the output of `down_proj`: its output = what does not depend on it + scale · norm(down_proj(a)).

    Attributes:
        scale: 1 for most models; granite's residual_multiplier.
        norm: whether there is an RMS norm between them.
    """

    scale: float
    norm: bool = False


@torch.no_grad()
def refit(
    student: Any, teacher: Any, kept: Kept, rows: Sequence[dict[str, Any]], ridge: float, batch_size: int = 8
) -> list[tuple[float, float]]:
    """Solve every layer's `down_proj` again, in place.

    With A (N × F) the input of `down_proj`, Y (N × D) the former input of the next kept layer in the teacher (for the last: the
    teacher's last hidden state before the final norm) and R = Y − the layer's output, over all positions of all rows:

        W ← W + ΔW,  ΔWᵀ = (AᵀA + ridge · mean(diag AᵀA) · I)⁻¹ Aᵀ R / s

    s is the factor with which the layer adds the MLP's output, 1 for most models (granite's residual_multiplier). If a norm
    x ↦ g · x / d(x) follows `down_proj`, each position of A is divided by its d, column j of R/s by g_j, the penalty is on
    g_j · ΔW_j, and the step is repeated with the new d as long as Σ R² falls, at most four times. On these rows Σ R² never
    increases. A bias is not changed. If channels were removed, Y is the teacher's state on those that are kept.

    Teacher and student process the rows layer by layer, the teacher once and the student twice. Memory holds four hidden states
    of every position, 16 · D bytes, and the equations, 16 · F · (F + D) bytes regardless of the number of rows.

    Args:
        student: pruned from the teacher by `prune_model`, in float32.
        teacher: the teacher in float32.
        kept: what was kept.
        rows: with `input_ids` and `completion_start`; prompts count too.
        ridge: how strongly the weights are kept near the old ones.
        batch_size: rows per forward pass; the result does not depend on it.

    Returns:
        For every layer of the student, the sum of R² over that of Y², with the old and with the new weights of that layer.

    Raises:
        InputError: if the layers do not allow this solution exactly, or produce values that are not finite.
    """
    batches = batches_of(rows, batch_size, student.device)
    paths = residual_paths(student, rows)
    if isinstance(paths, str):
        raise InputError(f"student.prune.refit: {paths}; set it to false")
    theirs, ours = Sweep(teacher, batches), Sweep(student, batches)
    channels = torch.as_tensor(kept.hidden, device=student.device)
    errors, done = [], 0
    for number, source in of_pruned(kept.layers, len(theirs.layers)):
        for layer in range(done, source + 1):
            theirs.advance(layer)
        done = source + 1
        masks = (batch["attention_mask"].bool() for batch in batches)
        targets = [states_BTD[mask_BT][:, channels] for states_BTD, mask_BT in zip(theirs.states, masks, strict=True)]
        ours.states, error = solve(ours, number, targets, paths[number], ridge)
        errors.append(error)
    return errors


def solve(
    sweep: "Sweep", number: int, targets: list[Tensor], path: ResidualPath, ridge: float
) -> tuple[list[Tensor], tuple[float, float]]:
    """Solve for the `down_proj` of layer `number`, in place.

    Args:
        sweep: positioned before the layer, and not moved.
        number: number of the layer.
        targets: the desired output, batch by batch, shape (N, D).
        path: path of the layer.
        ridge: as in `refit`.

    Returns:
        The hidden states after the layer, and the sum of squared errors over that of the targets, before and after.
    """
    layer = sweep.layers[number]
    weight_DF = layer.mlp.down_proj.weight
    gain_D = _gain(layer) if path.norm else torch.ones_like(weight_DF[:, 0])
    factor_D1 = path.scale * gain_D[:, None]
    errors: list[float] = []
    for _ in range(_STEPS if path.norm else 1):
        error, solution_DF = _solution(sweep, number, targets, gain_D if path.norm else None, ridge)
        if errors and error >= errors[-1]:
            break
        errors.append(error)
        old_DF = weight_DF.clone()
        # Where the gain is 0 the weight has no effect.
        weight_DF += torch.where(factor_D1 == 0, 0, solution_DF / factor_D1).to(weight_DF.dtype)
    states, after = sweep.moved(number, targets)
    if after > errors[-1]:
        weight_DF.copy_(old_DF)
        states, after = sweep.moved(number, targets)
    whole = sum(_squares(target_ND) for target_ND in targets) or 1.0
    return states, (errors[0] / whole, after / whole)


def _solution(sweep: "Sweep", number: int, targets: list[Tensor], gain_D: Tensor | None, ridge: float) -> tuple[float, Tensor]:
    """Σ R² of a layer before, and the update of scale · g · W, shape (D, F), by the equations on all batches."""
    down = sweep.layers[number].mlp.down_proj
    size, width = down.in_features, down.out_features
    device = "cpu" if widest(down.weight) != torch.float64 else down.weight.device  # the sums are in float64
    gram_FF = torch.zeros(size, size, dtype=torch.float64, device=device)
    cross_FD = torch.zeros(size, width, dtype=torch.float64, device=device)
    error = 0.0
    for index, target_ND in enumerate(targets):
        seen, mask_BT = sweep.seen(number, index), sweep.masks[index]
        gap_ND = target_ND - seen.output_BTD[mask_BT]
        a_NF = seen.input_BTF[mask_BT]
        if gain_D is not None:
            a_NF = a_NF / _divisors(seen.down_BTD[mask_BT], seen.added_BTD[mask_BT], gain_D)
        # With the ridge the equations are well-conditioned: products in float32 are accurate enough, and fast.
        gram_FF += (a_NF.T @ a_NF).to(device)
        cross_FD += (a_NF.T @ gap_ND).to(device)
        error += _squares(gap_ND)
    solution_DF = ridge_solution(gram_FF, cross_FD, ridge).T
    return error, solution_DF.to(widest(down.weight)).to(down.weight.device)


def _squares(values: Tensor) -> float:
    """The sum of their squares."""
    return float(values.to(widest(values)).square().sum())


def _gain(layer: Any) -> Tensor:
    """The factors g of the norm after `down_proj`, shape (D,): its output for ones, whose root mean square is 1."""
    found_1D: Tensor = getattr(layer, _NORM)(torch.ones_like(layer.mlp.down_proj.weight[:, :1].T))
    return found_1D[0]


def _divisors(x_ND: Tensor, y_ND: Tensor, gain_D: Tensor) -> Tensor:
    """The d of each position in y = g · x / d, shape (N, 1), by least squares over the channels; infinite where y is 0."""
    scaled_ND = x_ND * gain_D
    product_N1 = (scaled_ND * y_ND).sum(-1, keepdim=True)
    return torch.where(product_N1 == 0, torch.inf, scaled_ND.square().sum(-1, keepdim=True) / product_N1)


def ridge_solution(gram_FF: Tensor, cross_FD: Tensor, ridge: float) -> Tensor:
    """(G + ridge · mean(diag G) · I)⁻¹ C, shape (F, D); zero where G is zero, since inputs that are always zero have no effect.

    The ridge is added to `gram_FF` in place, as a copy would be too large for large F.

    Raises:
        InputError: if the sums are not finite.
    """
    mean = gram_FF.diagonal().mean()
    if not (mean.isfinite() and cross_FD.isfinite().all()):
        raise InputError("student.prune.refit: the hidden states of the calibration rows are not finite; set it to false")
    if mean == 0:
        return torch.zeros_like(cross_FD)
    gram_FF.diagonal().add_(ridge * mean)
    return torch.cholesky_solve(cross_FD, torch.linalg.cholesky(gram_FF))


@torch.no_grad()
def residual_paths(model: Any, rows: Sequence[dict[str, Any]]) -> list[ResidualPath] | str:
    """For every layer, how it adds the output of `down_proj`.

    Measured by adding known values after `down_proj`, or after a norm that follows it, so that no list of architectures is
    needed.

    Returns:
        The paths, or a message saying why there are none.
    """
    ids = [int(number) for number in rows[0]["input_ids"][:_PROBE_TOKENS]]
    (batch,) = batches_of([{"input_ids": ids, "completion_start": 0}], 1, model.device)
    found = []
    for number, (states_BTD, args, kwargs) in enumerate(_calls(model, batch)):
        layer = model.get_decoder().layers[number]
        output = partial(layer, states_BTD, *args, **kwargs)
        if not isinstance(output(), Tensor):
            return f"the layers of {type(model).__name__} return more than hidden states"
        scale, norm = _linear_in(layer.mlp.down_proj, output, number), False
        if scale is None and _norm_follows(layer, output):
            scale, norm = _linear_in(getattr(layer, _NORM), output, number), True
        if scale is None:
            return f"layer {number} of {type(model).__name__} is linear neither in down_proj nor in an RMS norm after it"
        found.append(ResidualPath(scale, norm))
    return found


def _linear_in(module: Any, output: Callable[[], Tensor], seed: int) -> float | None:
    """The factor by which a layer's output changes with that of a module in it; None if it is not linear in it."""
    plain_BTD = output()
    noise = torch.Generator().manual_seed(seed)
    added_BTD = torch.randn(plain_BTD.shape, generator=noise).to(plain_BTD) * plain_BTD.square().mean().sqrt()
    handle = module.register_forward_hook(lambda module, args, output: output + added_BTD)
    try:
        change_BTD = output() - plain_BTD
    finally:
        handle.remove()
    scale = float((change_BTD * added_BTD).sum() / added_BTD.square().sum())
    # Written so that NaN fails.
    linear = scale != 0 and bool((change_BTD - scale * added_BTD).norm() <= _NOT_LINEAR * change_BTD.norm())
    return scale if linear else None


def _norm_follows(layer: Any, output: Callable[[], Tensor]) -> bool:
    """Whether the output of `down_proj` goes through an RMS norm without a shift."""
    if not hasattr(layer, _NORM):
        return False
    seen = _Seen.of(layer, output)
    gain_D = _gain(layer)
    want_BTD = seen.down_BTD * gain_D / _divisors(seen.down_BTD, seen.added_BTD, gain_D)
    return bool((seen.added_BTD - want_BTD).norm() <= _NOT_LINEAR * want_BTD.norm())


class _Seen(NamedTuple):
    """Values in a layer: the input and output of `down_proj`, the output of the norm after it, and the layer's output."""

    input_BTF: Tensor
    down_BTD: Tensor
    added_BTD: Tensor  # down_BTD where no norm follows
    output_BTD: Tensor

    @classmethod
    def of(cls, layer: Any, output: Callable[[], Tensor]) -> "_Seen":
        """Call the layer and record the values."""
        inside: list[Tensor] = []
        modules = [layer.mlp.down_proj, *([getattr(layer, _NORM)] if hasattr(layer, _NORM) else [])]
        handles = [
            module.register_forward_hook(lambda module, args, output: inside.extend((args[0], output))) for module in modules
        ]
        try:
            output_BTD = output()
        finally:
            for handle in handles:
                handle.remove()
        return cls(inside[0], inside[1], inside[-1], output_BTD)


class Sweep:
    """A model's hidden states before one layer after the other, on all batches; `states` have shape (B, T, D)."""

    def __init__(self, model: Any, batches: list[Batch]) -> None:
        self.layers = model.get_decoder().layers
        self.masks = [batch["attention_mask"].bool() for batch in batches]
        calls = [_calls(model, batch) for batch in batches]
        self.states: list[Tensor] = [of_batch[0][0] for of_batch in calls]
        self._arguments = [[(args, kwargs) for _, args, kwargs in of_batch] for of_batch in calls]

    def output(self, number: int, index: int) -> Tensor:
        """The output of layer `number` for the states of batch `index`, shape (B, T, D)."""
        args, kwargs = self._arguments[index][number]
        found: Tensor = self.layers[number](self.states[index], *args, **kwargs)
        return found

    def seen(self, number: int, index: int) -> _Seen:
        """The values in layer `number` on batch `index`."""
        return _Seen.of(self.layers[number], partial(self.output, number, index))

    def advance(self, number: int) -> None:
        """Move all states past layer `number`."""
        for index in range(len(self.states)):
            self.states[index] = self.output(number, index)

    def moved(self, number: int, targets: list[Tensor]) -> tuple[list[Tensor], float]:
        """The states after layer `number`, and the sum of their squared distances from targets of shape (N, D)."""
        states = [self.output(number, index) for index in range(len(self.states))]
        pairs = zip(targets, states, self.masks, strict=True)
        return states, sum(_squares(y_ND - states_BTD[mask_BT]) for y_ND, states_BTD, mask_BT in pairs)


def _calls(model: Any, batch: Batch) -> list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
    """The arguments with which the model calls each of its layers: the embedded tokens as hidden states, and others.

    Masks and rotary embeddings, which differ between types of layers, are thus the model's own.
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


def batches_of(rows: Sequence[dict[str, Any]], batch_size: int, device: Any) -> list[Batch]:
    """The rows' ids and masks, padded, on a device."""
    collate = DistillCollator(pad_token_id=0)
    text = text_only(rows)
    batches = [collate(text[start : start + batch_size]) for start in range(0, len(text), batch_size)]
    return [{name: batch[name].to(device) for name in ("input_ids", "attention_mask")} for batch in batches]
