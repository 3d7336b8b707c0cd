"""Refit of a pruned student: its layers' output matrices in closed form, to bring its hidden states close to the teacher's.

When layers are removed, the next one gets a different input. From the first layer to the last, `o_proj` and then `down_proj` are
therefore solved again by ridge regression, on the output of the student refitted so far for the calibration rows. ReplaceMe
(Shopkhoev et al. 2025, arXiv 2505.02819) inserts one linear map after the MLP before a gap and folds it into `down_proj`; here
all of `down_proj` is free, which includes that map, and every layer that is kept is refitted. If a norm follows `down_proj`
(gemma, olmo2), its equations are solved a few times with the norm's divisors held fixed, and `o_proj` stays as it is.

Shapes: B rows of a batch, T tokens, N positions of a batch that are not padding, D hidden size, F feed-forward neurons, H outputs
of the attention heads.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmdistill.data.collator import DistillCollator, text_only
from llmdistill.data.targets.draw import widest
from llmdistill.errors import InputError
from llmdistill.losses.hidden_states import of_pruned
from llmdistill.models.forward import replaced_forward
from llmdistill.students.pruning import Kept

Batch = dict[str, Tensor]
Targets = Callable[[int], Tensor]  # of a batch's number: the desired output at its positions, shape (N, D)
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
        attention: the factor with which the layer adds the output of `o_proj`; None if it is not linear in it, as with a norm.
    """

    scale: float
    norm: bool = False
    attention: float | None = None


@torch.no_grad()
def refit(
    student: Any, teacher: Any, kept: Kept, rows: Sequence[dict[str, Any]], ridge: float, batch_size: int = 8
) -> list[tuple[float, float]]:
    """Solve every layer's `o_proj` and `down_proj` again, in place.

    Y (N × D) is the former input of the next kept layer in the teacher (for the last: the teacher's last hidden state before the
    final norm) and R = Y − the layer's output, over all positions of all rows. The error of a position is relative,
    |R|² / |Y|², since the norms of the following layers remove a state's size, and the first token's state may be hundreds of
    times as large as the others. With A (N × F) the input of `down_proj`, and the rows of A and R divided by |Y|:

        W ← W + ΔW,  ΔWᵀ = (AᵀA + ridge · mean(diag AᵀA) · I)⁻¹ Aᵀ R / s

    s is the factor with which the layer adds the MLP's output, 1 for most models (granite's residual_multiplier). Before that,
    the same equations are solved for the inputs of `o_proj` (N × H) and A together, each with a ridge relative to its own
    diagonal. Of this solution only the update of `o_proj` is used, since it changes A.

    If a norm x ↦ g · x / d(x) follows `down_proj`, `o_proj` is not changed, each position of A is divided by its d, column j of
    R/s by g_j, the penalty is on g_j · ΔW_j, and the step is repeated with the new d as long as the error falls, at most four
    times. The error of these rows never increases. A bias is not changed. If channels were removed, Y is the teacher's state
    on those that are kept.

    Teacher and student process the rows layer by layer, the teacher once and the student three times. Memory does not depend on
    the number of rows: the equations take 16 · (F + H) · (F + H + D) bytes, and the hidden states are in temporary files, up to
    four of every position, 16 · D bytes.

    Args:
        student: pruned from the teacher by `prune_model`, in float32.
        teacher: the teacher in float32.
        kept: what was kept.
        rows: with `input_ids` and `completion_start`; prompts count too.
        ridge: how strongly the weights are kept near the old ones.
        batch_size: rows per forward pass; the result does not depend on it.

    Returns:
        For every layer of the student, the mean of |R|² / |Y|² over the positions, with the old and with its new weights.

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
        ours.states, error = solve(ours, number, lambda index: theirs.at_tokens(index)[:, channels], paths[number], ridge)
        errors.append(error)
    return errors


def solved_weights(layer: Any) -> list[Tensor]:
    """The weights of a layer that `solve` changes: those of `o_proj`, shape (D, H), and `down_proj`, shape (D, F)."""
    return [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]


def solve(
    sweep: "Sweep", number: int, targets: Targets, path: ResidualPath, ridge: float
) -> tuple["States", tuple[float, float]]:
    """Solve for the `o_proj` and `down_proj` of layer `number`, in place.

    Args:
        sweep: positioned before the layer, and not moved.
        number: number of the layer.
        targets: the desired output of the layer.
        path: path of the layer.
        ridge: as in `refit`.

    Returns:
        The hidden states after the layer, and the mean relative squared error, before and after.
    """
    layer = sweep.layers[number]
    attention_DH, down_DF = solved_weights(layer)
    old_DH, old_DF, before = attention_DH.clone(), down_DF.clone(), None
    if path.attention is not None:
        before, solution_DX = _solution(sweep, number, targets, path, ridge, with_attention=True)
        attention_DH += (solution_DX[:, : attention_DH.shape[1]] / path.attention).to(attention_DH.dtype)
    gain_D = _gain(layer) if path.norm else torch.ones_like(down_DF[:, 0])
    factor_D1 = path.scale * gain_D[:, None]
    errors: list[float] = []
    for _ in range(_STEPS if path.norm else 1):
        error, solution_DF = _solution(sweep, number, targets, path, ridge)
        if errors and error >= errors[-1]:
            break
        errors.append(error)
        last_DF = down_DF.clone()
        # Where the gain is 0 the weight has no effect.
        down_DF += torch.where(factor_D1 == 0, 0, solution_DF / factor_D1).to(down_DF.dtype)
    states, after = sweep.moved(number, targets)
    if after > errors[-1]:
        down_DF.copy_(last_DF)
        states, after = sweep.moved(number, targets)
    if before is None:
        before = errors[0]
    if after > before:
        attention_DH.copy_(old_DH)
        down_DF.copy_(old_DF)
        states, after = sweep.moved(number, targets)
    return states, (before, after)


def _solution(
    sweep: "Sweep", number: int, targets: Targets, path: ResidualPath, ridge: float, with_attention: bool = False
) -> tuple[float, Tensor]:
    """The error before, and the update of scale · g · W by the equations on all batches.

    Its shape is (D, F) or, with the update of `o_proj` before it, (D, H + F).
    """
    layer = sweep.layers[number]
    o_proj, down = layer.self_attn.o_proj, layer.mlp.down_proj
    sizes = [o_proj.in_features] * with_attention + [down.in_features]
    device = "cpu" if widest(down.weight) != torch.float64 else down.weight.device  # the sums are in float64
    gram_XX = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64, device=device)
    cross_XD = torch.zeros(sum(sizes), down.out_features, dtype=torch.float64, device=device)
    error = 0.0
    for index, mask_BT in enumerate(sweep.masks):
        seen, target_ND = sweep.seen(number, index), targets(index)
        weight_N1 = _weights(target_ND)
        gap_ND = (target_ND - seen.output_BTD[mask_BT]) * weight_N1
        a_NX = seen.input_BTF[mask_BT]
        if with_attention:
            a_NX = torch.cat([seen.heads_BTH[mask_BT], a_NX], -1)
        if path.norm:
            a_NX = a_NX / _divisors(seen.down_BTD[mask_BT], seen.added_BTD[mask_BT], _gain(layer))
        a_NX = a_NX * weight_N1
        # With the ridge the equations are well-conditioned: products in float32 are accurate enough, and fast.
        gram_XX += (a_NX.T @ a_NX).to(device)
        cross_XD += (a_NX.T @ gap_ND).to(device)
        error += _squares(gap_ND)
    solution_DX = ridge_solution(gram_XX, cross_XD, ridge, sizes).T
    return error / sweep.tokens, solution_DX.to(widest(down.weight)).to(down.weight.device)


def _squares(values: Tensor) -> float:
    """The sum of their squares."""
    return float(values.to(widest(values)).square().sum())


def _weights(target_ND: Tensor) -> Tensor:
    """1 / |Y| of every position, shape (N, 1); 0 where Y is 0."""
    norm_N1 = target_ND.norm(dim=-1, keepdim=True)
    return torch.where(norm_N1 == 0, 0, 1 / norm_N1)


def _gain(layer: Any) -> Tensor:
    """The factors g of the norm after `down_proj`, shape (D,): its output for ones, whose root mean square is 1."""
    found_1D: Tensor = getattr(layer, _NORM)(torch.ones_like(layer.mlp.down_proj.weight[:, :1].T))
    return found_1D[0]


def _divisors(x_ND: Tensor, y_ND: Tensor, gain_D: Tensor) -> Tensor:
    """The d of each position in y = g · x / d, shape (N, 1), by least squares over the channels; infinite where y is 0."""
    scaled_ND = x_ND * gain_D
    product_N1 = (scaled_ND * y_ND).sum(-1, keepdim=True)
    return torch.where(product_N1 == 0, torch.inf, scaled_ND.square().sum(-1, keepdim=True) / product_N1)


def ridge_solution(gram_XX: Tensor, cross_XD: Tensor, ridge: float, sizes: Sequence[int]) -> Tensor:
    """(G + ridge · M)⁻¹ C, shape (X, D), where M has the mean of each block of G's diagonal on the block's diagonal.

    The ridge is added to `gram_XX` in place, as a copy would be too large for large X. Blocks of inputs that are always zero
    have no effect, and a zero solution.

    Args:
        gram_XX: G.
        cross_XD: C.
        ridge: relative to the diagonal.
        sizes: of the blocks; their sum is X.

    Raises:
        InputError: if the sums are not finite.
    """
    diagonal_X = gram_XX.diagonal()
    if not (diagonal_X.isfinite().all() and cross_XD.isfinite().all()):
        raise InputError("student.prune.refit: the hidden states of the calibration rows are not finite; set it to false")
    for block in diagonal_X.split(list(sizes)):
        mean = block.mean()
        block += ridge * mean if mean else 1
    return torch.cholesky_solve(cross_XD, torch.linalg.cholesky(gram_XX))


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
        attention = None if norm else _linear_in(layer.self_attn.o_proj, partial(_without_mlp, layer, output), number)
        found.append(ResidualPath(scale, norm, attention))
    return found


def _without_mlp(layer: Any, output: Callable[[], Tensor]) -> Tensor:
    """A layer's output without what `down_proj` adds to it."""
    handle = layer.mlp.down_proj.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        return output()
    finally:
        handle.remove()


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
    """Values in a layer: the inputs of `o_proj` and `down_proj`, its output, that of the norm after it, and the layer's."""

    heads_BTH: Tensor
    input_BTF: Tensor
    down_BTD: Tensor
    added_BTD: Tensor  # down_BTD where no norm follows
    output_BTD: Tensor

    @classmethod
    def of(cls, layer: Any, output: Callable[[], Tensor]) -> "_Seen":
        """Call the layer and record the values."""
        modules = {"heads": layer.self_attn.o_proj, "down": layer.mlp.down_proj, "norm": getattr(layer, _NORM, None)}
        inside: dict[str, tuple[Tensor, Tensor]] = {}

        def record(name: str, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            inside[name] = args[0], output

        handles = [module.register_forward_hook(partial(record, name)) for name, module in modules.items() if module is not None]
        try:
            output_BTD = output()
        finally:
            for handle in handles:
                handle.remove()
        input_BTF, down_BTD = inside["down"]
        return cls(inside["heads"][0], input_BTF, down_BTD, inside.get("norm", inside["down"])[1], output_BTD)


class States:
    """Hidden states of all batches, shape (B, T, D) each, in a temporary file, so that memory does not grow with their number."""

    def __init__(self, states: Iterator[Tensor]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the last reference
        self._places: list[tuple[int, torch.Size]] = []
        for states_BTD in states:
            self._places.append((self._file.tell(), states_BTD.shape))
            self._write(states_BTD)
        self._device, self._dtype = states_BTD.device, states_BTD.cpu().numpy().dtype

    def __getitem__(self, index: int) -> Tensor:
        place, shape = self._places[index]
        self._file.seek(place)
        values = np.fromfile(self._file, self._dtype, math.prod(shape))
        return torch.from_numpy(values.reshape(shape)).to(self._device)

    def __setitem__(self, index: int, states_BTD: Tensor) -> None:
        self._file.seek(self._places[index][0])
        self._write(states_BTD)

    def _write(self, states_BTD: Tensor) -> None:
        self._file.write(states_BTD.contiguous().cpu().numpy().data)


class Sweep:
    """A model's hidden states before one layer after the other, on all batches."""

    def __init__(self, model: Any, batches: list[Batch]) -> None:
        self.layers = model.get_decoder().layers
        self.masks = [batch["attention_mask"].bool() for batch in batches]
        self.tokens = sum(int(mask_BT.sum()) for mask_BT in self.masks)
        self._arguments_of = [partial(_calls, model, batch) for batch in batches]
        self.states = States(calls()[0][0] for calls in self._arguments_of)

    def at_tokens(self, index: int) -> Tensor:
        """The states of batch `index` at its positions that are not padding, shape (N, D)."""
        return self.states[index][self.masks[index]]

    def output(self, number: int, index: int) -> Tensor:
        """The output of layer `number` for the states of batch `index`, shape (B, T, D)."""
        _, args, kwargs = self._arguments_of[index]()[number]  # computed each time: masks are larger than the states
        found: Tensor = self.layers[number](self.states[index], *args, **kwargs)
        return found

    def seen(self, number: int, index: int) -> _Seen:
        """The values in layer `number` on batch `index`."""
        return _Seen.of(self.layers[number], partial(self.output, number, index))

    def advance(self, number: int) -> None:
        """Move all states past layer `number`."""
        for index in range(len(self.masks)):
            self.states[index] = self.output(number, index)

    def moved(self, number: int, targets: Targets) -> tuple[States, float]:
        """The states after layer `number`, and the mean of |Y − state|² / |Y|² for targets Y."""
        squares = 0.0

        def outputs() -> Iterator[Tensor]:
            nonlocal squares
            for index, mask_BT in enumerate(self.masks):
                states_BTD, target_ND = self.output(number, index), targets(index)
                squares += _squares((target_ND - states_BTD[mask_BT]) * _weights(target_ND))
                yield states_BTD

        return States(outputs()), squares / self.tokens


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
