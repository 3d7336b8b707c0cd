"""Turns rows into batches; the only place where targets are aligned with the logits that predict them.

Soft-target row t of a sequence is the teacher's distribution for `input_ids[completion_start + t]` given everything
before it. The student's logits for it stand at position `completion_start + t − 1`. No other module shifts anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmdistill.data import targets
from llmdistill.models.root_classes import RootClasses, by_name

# A token's weight in the loss, from how undecided the teacher was there, in nats.
POSITION_WEIGHTS: dict[str, Callable[[targets.Array], targets.Array]] = {
    "uniform": np.ones_like,
    "entropy": lambda entropy_N: entropy_N,
    "certainty": lambda entropy_N: np.exp(-entropy_N),
}

_OF_ALL = ("target_kind", "target_table")  # entries of a batch that are not a value a token


@dataclass
class DistillCollator:
    """Pads rows of a dataset to a batch and gathers their soft targets in one flat run of N completion tokens.

    The batch holds `input_ids`, `attention_mask` and `labels` (B, T), the labels −100 outside the completions;
    `lengths` (rows,), in tokens; `pack_sizes` (items,), in rows, all 1 without packs; `positions` (N,), where in the
    flattened (B × T) the logits stand that predict each completion token; `token_weights` (N,), what each counts in the
    loss; and the soft targets that the rows have: the name of their kind as `target_kind`, a string, `target_ids` (N, K), and
    what else `SoftTargets.batch` of that kind gives. Rows with an `importance` give `token_importance` (N,) and
    `token_logprobs` (N,) too. With `with_ids`, `ids` is the list of the rows' ids.

    If padding-free, all rows are concatenated in a batch of one (B = 1, T the sum of lengths), with `position_ids`
    (1, T) that begin again at every row, and without a mask; so does every row of a pack, a list of rows.

    Args:
        pad_token_id: fills `input_ids`; masked in attention and labels, so any id will do.
        max_length: sequences are cut to so many tokens, their targets with them; None keeps them whole.
        padding_free: whether rows stand behind instead of below each other.
        position_weights: one of `POSITION_WEIGHTS`; a row whose weights are all zero counts uniformly.
        by_sequence: scale the weights so that they add up to one in every row with a completion, else they are as they are.
        with_ids: put the rows' `id` into the batch.
        vocab_size: of the student's output layer; targets from there on are given to the others. None if there are none.
        classes: of rows from `retokenize`, whose targets are in the teacher's tokens: they become targets over classes, and
            `target_soft` (N,) says which positions have one. Of several teachers by their names; then `target_teacher` (N,) is
            the number of each position's, in this order, by the row's `teacher`.
        for_teacher: return what an online teacher needs instead of stored targets, in its own tokens:
            of teacher number 0 `their_0_input_ids` and so on, and `teacher_positions` (N,), where its logits stand.
        teachers: the names of several teachers of rows that are in one vocabulary.
    """

    pad_token_id: int
    max_length: int | None = None
    padding_free: bool = False
    position_weights: str = "uniform"
    by_sequence: bool = False
    with_ids: bool = False
    vocab_size: int | None = None
    classes: "RootClasses | Mapping[str, RootClasses] | None" = None
    for_teacher: bool = False
    teachers: Sequence[str] = ()

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """One batch from rows of `load_dataset`, or from packs of such rows."""
        packs = [pack if isinstance(pack, list) else [pack] for pack in rows]
        rows = [row for pack in packs for row in pack]
        ids = [np.asarray(row["input_ids"])[: self.max_length] for row in rows]
        starts = np.array([int(row["completion_start"]) for row in rows])
        lengths = np.array([len(sequence) for sequence in ids])
        counts = np.maximum(lengths - starts, 0)
        batch = self._in_a_line(ids, starts, lengths) if self.padding_free else self._below_each_other(ids, starts, lengths)
        batch |= {"lengths": lengths, "pack_sizes": np.array([len(pack) for pack in packs])}
        batch |= {"positions": np.flatnonzero(batch["labels"] != -100) - 1}  # the shift
        kind = targets.TextOnly if self.for_teacher else targets.kind_of(list(rows[0]))
        by_teacher = self.for_teacher or (kind.columns and not kind.of_text)
        numbers = self._numbers(rows) if by_teacher else None
        if numbers is not None:
            batch["target_teacher"] = np.repeat(numbers, counts)
        if self.for_teacher:
            batch |= self._teachers(rows, counts, numbers)
        entropy_N = np.full(counts.sum(), np.nan)
        if kind.columns:
            if "target_places" in rows[0] and not kind.of_text:
                soft, batch["target_soft"] = self._of_classes(kind, rows, counts, numbers)
            else:
                soft = kind.of_rows(rows, counts)
                if self.vocab_size is not None:
                    soft = soft.within(self.vocab_size)
            batch |= soft.batch()
            if self.position_weights != "uniform":
                is_known_N = ~np.isneginf(soft.logweights()).all(axis=1) & batch.get("target_soft", True)
                entropy_N = np.where(is_known_N, soft.entropies(), np.nan)
        batch["token_weights"] = self._weights(entropy_N, counts)
        if "importance" in rows[0]:
            batch["token_importance"] = np.repeat(np.array([row["importance"] for row in rows], dtype=np.float32), counts)
            written = [np.asarray(row["token_logprobs"])[:count] for row, count in zip(rows, counts, strict=True)]
            batch["token_logprobs"] = np.concatenate(written).astype(np.float32)
        tensors: dict[str, Any] = {name: torch.from_numpy(values) for name, values in batch.items()}
        if kind.columns:
            tensors["target_kind"] = kind.name
        if self.with_ids and "id" in rows[0]:
            tensors["ids"] = [str(row["id"]) for row in rows]
        return tensors

    def _below_each_other(self, ids: list[targets.Array], starts: targets.Array, lengths: targets.Array) -> dict[str, Any]:
        columns_T = np.arange(lengths.max())
        real_BT = columns_T < lengths[:, None]
        input_ids_BT = np.full(real_BT.shape, self.pad_token_id, dtype=np.int64)
        input_ids_BT[real_BT] = np.concatenate(ids)
        labels_BT = np.where(real_BT & (columns_T >= starts[:, None]), input_ids_BT, -100)
        return {"input_ids": input_ids_BT, "attention_mask": real_BT.astype(np.int64), "labels": labels_BT}

    def _in_a_line(self, ids: list[targets.Array], starts: targets.Array, lengths: targets.Array) -> dict[str, Any]:
        input_ids_T = np.concatenate(ids).astype(np.int64)
        place_T = np.arange(len(input_ids_T)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        labels_T = np.where(place_T >= np.repeat(starts, lengths), input_ids_T, -100)
        return {"input_ids": input_ids_T[None], "position_ids": place_T[None], "labels": labels_T[None]}

    def _numbers(self, rows: Sequence[Any]) -> targets.Array | None:
        """The number of each row's teacher; None for a single teacher.

        Raises:
            ValueError: a row is of another teacher.
        """
        names = list(self.classes if isinstance(self.classes, Mapping) else self.teachers)
        if names in ([], [""]):
            return None
        for row in rows:
            if str(row["teacher"]) not in names:
                raise ValueError(f"a row is of the teacher {row['teacher']}, but the dataset has the teachers {', '.join(names)}")
        return np.array([names.index(str(row["teacher"])) for row in rows])

    def _of_classes(
        self, kind: type[targets.SoftTargets], rows: Sequence[Any], counts: targets.Array, numbers: targets.Array | None
    ) -> tuple[targets.SoftTargets, targets.Array]:
        """The targets over classes at every position, and whether it has one; otherwise those of any position."""
        if self.classes is None:
            raise ValueError("the rows and their targets have different vocabularies; pass the classes (load_classes)")
        places, theirs = _places(rows, counts)
        index_N = np.concatenate([place + before for place, before in zip(places, theirs.cumsum() - theirs, strict=True)])
        soft_N = np.concatenate(places) >= 0
        soft = kind.of_rows(rows, theirs).at(np.where(soft_N, index_N, np.repeat(theirs.cumsum() - theirs, counts)))
        teacher_N = np.repeat(np.zeros(len(rows), dtype=np.int64) if numbers is None else numbers, counts)
        parts, order = [], []
        for number, classes in enumerate(by_name(self.classes).values()):  # no id is looked up in other classes
            its = np.flatnonzero(teacher_N == number)
            parts.append(soft.at(its).of_classes(classes.teacher_V, classes.dropped))
            order.append(its)
        return targets.SoftTargets.together(parts).at(np.argsort(np.concatenate(order))), soft_N

    def _teachers(self, rows: Sequence[Any], counts: targets.Array, numbers: targets.Array | None) -> dict[str, targets.Array]:
        """The rows in their teachers' tokens as far as needed, and the position of the logits for each token in them."""
        if "target_places" not in rows[0]:  # one vocabulary: a token is the teacher's own
            if numbers is None:
                return {}
            rows = [_in_own_tokens(row, count) for row, count in zip(rows, counts, strict=True)]
        places, theirs = _places(rows, counts)
        starts = np.array([int(row["teacher_start"]) for row in rows])
        ids = [np.asarray(row["teacher_ids"])[: start + count] for row, start, count in zip(rows, starts, theirs, strict=True)]
        batch: dict[str, targets.Array] = {}
        begins = np.zeros(len(rows), dtype=np.int64)
        for number in range(1 if numbers is None else numbers.max() + 1):
            its = np.arange(len(rows)) if numbers is None else np.flatnonzero(numbers == number)
            if not len(its):
                continue
            lengths = np.array([len(ids[row]) for row in its])
            shown = (self._in_a_line if self.padding_free else self._below_each_other)(
                [ids[row] for row in its], starts[its], lengths
            )
            del shown["labels"]
            begins[its] = lengths.cumsum() - lengths if self.padding_free else np.arange(len(its)) * lengths.max()
            batch |= {f"their_{number}_{name}": values for name, values in shown.items()}
        positions = [place + start + begin - 1 for place, start, begin in zip(places, starts, begins, strict=True)]  # the shift
        soft_N = np.concatenate(places) >= 0
        first_N = np.repeat(begins, counts)  # of the row: a place that is there, where none is meant
        return batch | {"target_soft": soft_N, "teacher_positions": np.where(soft_N, np.concatenate(positions), first_N)}

    def _weights(self, entropy_N: targets.Array, counts: targets.Array) -> targets.Array:
        weights_N, row_N = POSITION_WEIGHTS[self.position_weights](entropy_N), np.repeat(np.arange(len(counts)), counts)
        if (is_known_N := ~np.isnan(weights_N)).sum() < len(weights_N):  # the others count as much as the mean of their row
            known, total = (np.bincount(row_N[is_known_N], of, len(counts)) for of in (None, weights_N[is_known_N]))
            weights_N = np.where(is_known_N, weights_N, np.where(known, total / np.maximum(known, 1), 1.0)[row_N])
        total_N = np.bincount(row_N, weights_N, len(counts))[row_N]
        weights_N = np.where(total_N > 0, weights_N, 1.0)  # all zero: uniform
        if self.by_sequence:
            weights_N = weights_N / np.bincount(row_N, weights_N, len(counts))[row_N]
        return weights_N.astype(np.float32)


def _places(rows: Sequence[Any], counts: targets.Array) -> tuple[list[targets.Array], targets.Array]:
    """For the first positions of each row, the teacher's, −1 for none; and how many of the teacher's positions that takes."""
    places = [np.asarray(row["target_places"])[:count].astype(np.int64) for row, count in zip(rows, counts, strict=True)]
    return places, np.array([max(int(place.max(initial=-1)) + 1, 1) for place in places])


def _in_own_tokens(row: Any, count: int) -> dict[str, Any]:
    """A row with a single vocabulary in the form that `retokenize` stores."""
    return {"teacher_ids": row["input_ids"], "teacher_start": row["completion_start"], "target_places": np.arange(count)}


def teacher_batch(batch: Mapping[str, Any], number: int = 0) -> dict[str, Any]:
    """The input of `completion_logits` for an online teacher: its own rows, in its own tokens."""
    prefix, positions_N = f"their_{number}_", batch["teacher_positions"]
    if "target_teacher" in batch:
        positions_N = positions_N[batch["target_teacher"] == number]
    theirs = {name.removeprefix(prefix): values for name, values in batch.items() if name.startswith(prefix)}
    return {**theirs, "positions": positions_N}


def text_only(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The rows without their soft targets, for batches that are not learned from."""
    return [{name: row[name] for name in ("input_ids", "completion_start")} for row in rows]


def some_tokens(batch: Mapping[str, Any], tokens: slice) -> dict[str, Any]:
    """The entries of a batch for some of its completion tokens; entries that are not per token are kept."""
    names = [name for name in batch if name.startswith(("positions", "target_", "teacher_", "token_"))]
    return {name: batch[name] if name in _OF_ALL else batch[name][tokens] for name in names}


def first_items(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The batch with only the completions of its first items, rows or packs: the others are not learned from or counted."""
    lengths = batch["lengths"][: batch["pack_sizes"][:count].sum()]
    labels_BT = batch["labels"].clone()
    if "position_ids" in batch:
        labels_BT[:, lengths.sum() :] = -100
    else:
        labels_BT[len(lengths) :] = -100
    flat = some_tokens(batch, slice(int((labels_BT != -100).sum())))
    return {**batch, **flat, "labels": labels_BT, "lengths": lengths}


def completion_labels(batch: Mapping[str, Any]) -> torch.Tensor:
    """The completion tokens, shape (N,), without searching `labels`, which would need a GPU synchronisation."""
    return batch["labels"].flatten()[batch["positions"] + 1]
