"""Checks of the stored columns of soft targets: shape, range and finiteness."""

from collections.abc import Mapping

import numpy as np

from llmdistill.data.targets.base import SoftTargets
from llmdistill.data.targets.columns import Array

ROUNDED_UP = 1e-2  # what a log-probability may be above zero: float16, and sums of a bfloat16 teacher


def wrong_row(
    kind: type[SoftTargets], flat: Mapping[str, Array], lengths: Mapping[str, Array], positions_R: Array, limit_R: Array
) -> tuple[int, str] | None:
    """The first row with invalid targets, and why; None if there is none.

    Args:
        kind: of the targets.
        flat: the values of its columns in R rows, concatenated.
        lengths: how many of them each row has, shape (R,).
        positions_R: how many positions each row has targets of.
        limit_R: the size of its teacher's vocabulary.
    """
    for name in kind.one_each:
        if (wrong := np.flatnonzero(lengths[name] != positions_R)).size:
            return int(wrong[0]), f"{name} does not have one value per completion token"
    for name, (low, high) in kind.ranges.items():
        values = flat[name]
        if (wrong := np.flatnonzero(~((values >= low) & (values <= high + ROUNDED_UP)))).size:
            return row_of(lengths[name], wrong[0]), f"{name} holds {values[wrong[0]]:g}"
    count = positions_R.sum()
    if not count:
        return None
    row_N = np.repeat(np.arange(len(positions_R)), positions_R)
    if kind.distinct and kind.size:  # as many tokens at every position
        k = len(flat["target_ids"]) // count
        if (wrong := np.flatnonzero(lengths["target_ids"] != k * positions_R)).size:
            return int(wrong[0]), f"target_ids does not have {k} tokens per completion token"
        exact = flat.get("target_exact", np.zeros(0))
        if (wrong := np.flatnonzero(exact >= k)).size:
            return int(row_N[wrong[0]]), f"target_exact is {exact[wrong[0]]}, out of {k} tokens"
    for name, sizes_N in kind.sizes(flat, int(count)).items():
        expected_R = np.bincount(row_N, sizes_N, len(positions_R)).astype(np.int64)
        if (wrong := np.flatnonzero(lengths[name] != expected_R)).size:
            row = int(wrong[0])
            return row, f"{name} has {lengths[name][row]} values, but the other target columns need {expected_R[row]}"
    if (found := kind.wrong_position(flat, row_N)) is not None:
        return int(row_N[found[0]]), found[1]
    try:
        soft = kind.decode(flat)
    except (ValueError, IndexError, TypeError) as error:
        return 0, f"the target columns of it, or of a row after it, do not match: {error}"
    if len(soft) != count:
        return 0, "it, or a row after it, does not have one target per completion token"
    limit_N1 = np.repeat(limit_R, positions_R)[:, None]
    if (wrong := np.flatnonzero(((soft.ids_NK < 0) | (soft.ids_NK >= limit_N1)).any(axis=1))).size:
        return int(row_N[wrong[0]]), "target_ids contains a token outside the vocabulary"
    return None


def row_of(lengths_R: Array, place: int) -> int:
    """The row that a value belongs to, by its index in the flat column."""
    return int(np.searchsorted(lengths_R.cumsum(), place, side="right"))
