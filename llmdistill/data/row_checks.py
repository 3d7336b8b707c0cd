"""The checks of a shard's rows when a dataset is read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmdistill.data import targets
from llmdistill.data.batches import read_batches, rows_at_once
from llmdistill.data.rows import OURS, teacher_names
from llmdistill.errors import InputError


def _are_integers(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and pa.types.is_integer(kind.value_type))


def _are_floats(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and pa.types.is_floating(kind.value_type))


# The columns that every shard has, and whether a type is theirs.
_COLUMNS: dict[str, Callable[[pa.DataType], bool]] = {
    "id": pa.types.is_string,
    "prompt": pa.types.is_list,
    "completion": pa.types.is_list,
    "input_ids": _are_integers,
    "completion_start": pa.types.is_integer,
    "finish_reason": pa.types.is_string,
    "metadata": pa.types.is_string,
    "token_logprobs": _are_floats,
}
# Further columns after `retokenize`.
_OF_TEACHER = {"teacher_ids": _are_integers, "teacher_start": pa.types.is_integer, "target_places": _are_integers}


def check_rows(
    file: Path,
    sizes: Mapping[str, int],
    kind: type[targets.SoftTargets] = targets.TextOnly,
    their_sizes: Mapping[str, int] | None = None,
) -> None:
    """Refuse a shard without rows or columns, or with impossible values.

    Args:
        file: the shard.
        sizes: of the vocabularies of `input_ids` by the teachers' names; of a single one the name is empty.
        kind: of its soft targets.
        their_sizes: of those of `teacher_ids`, after `retokenize`.

    Raises:
        InputError: names the file and the row.
    """
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a Parquet file: {error}") from None
    wanted = _COLUMNS | (_OF_TEACHER if their_sizes is not None else {})
    for name, is_it in wanted.items():
        if name not in schema.names:
            raise InputError(f"{file}: has no column {name}")
        _check_type(file, schema.field(name), is_it)
    for name in kind.columns:
        if name not in schema.names:
            raise InputError(f"{file}: has no column {name}, which targets of kind {kind.name} have")
        _check_type(file, schema.field(name), lambda of: _are_integers(of) or _are_floats(of))
    first, named = 0, [name for name in ("teacher",) if name in schema.names]
    for rows in read_batches([file], [*wanted, *named, *kind.columns], rows_at_once(file)):
        _check_text(file, rows, first)
        positions_R, limit_R = _check_ids(file, rows, first, ("input_ids", "completion_start"), sizes)
        written = pc.fill_null(pc.list_value_length(rows["token_logprobs"]), -1).to_numpy()
        if (wrong := np.flatnonzero(written != positions_R)).size:
            raise InputError(f"{file}: row {first + wrong[0]}: token_logprobs does not have one value per completion token")
        if their_sizes is not None:
            of_teacher_R, their_limit_R = _check_ids(file, rows, first, ("teacher_ids", "teacher_start"), their_sizes)
            _check_places(file, rows, first, positions_R, of_teacher_R)
            if not kind.of_text:
                positions_R, limit_R = of_teacher_R, their_limit_R
        if kind.columns:
            _check_targets(file, rows, first, kind, positions_R, limit_R)
        first += len(rows)
    if not first:
        raise InputError(f"{file}: has no rows")


def _check_type(file: Path, column: pa.Field, is_it: Callable[[pa.DataType], bool]) -> None:
    """Refuse a column of a wrong type.

    Raises:
        InputError: names the file and the column.
    """
    if not is_it(column.type):
        raise InputError(f"{file}: the column {column.name} cannot be of the type {column.type}")


def _check_ids(
    file: Path, rows: pa.Table, first: int, names: tuple[str, str], sizes: Mapping[str, int]
) -> tuple[targets.Array, targets.Array]:
    """The number of completion tokens of each row, and the size of its vocabulary.

    Args:
        file: the shard.
        rows: some of its rows.
        first: the number of the first of them.
        names: the columns with the ids and with the place of the first completion token.
        sizes: of the vocabularies, by the teachers' names.

    Raises:
        InputError: that place or an id is out of range; naming the file and the row.
    """
    starts = pc.fill_null(rows[names[1]], -1).to_numpy()
    lengths = pc.fill_null(pc.list_value_length(rows[names[0]]), -1).to_numpy()
    if (wrong := np.flatnonzero((starts < 1) | (starts > lengths))).size:  # nothing predicts the first token
        raise InputError(f"{file}: row {first + wrong[0]}: {names[1]} is not a position in {names[0]} after the first")
    ids = pc.list_flatten(rows[names[0]]).fill_null(-1).to_numpy()
    limit_R = np.full(len(rows), sizes[""]) if "" in sizes else _limits(file, rows, first, sizes)
    if (wrong := np.flatnonzero((ids < 0) | (ids >= np.repeat(limit_R, lengths)))).size:
        row = first + targets.row_of(lengths, wrong[0])
        raise InputError(f"{file}: row {row}: the token id {ids[wrong[0]]} is outside the vocabulary ({names[0]})")
    return lengths - starts, limit_R


def _check_places(file: Path, rows: pa.Table, first: int, positions_R: targets.Array, of_teacher_R: targets.Array) -> None:
    """Refuse `target_places` that are out of range, or not one per completion token.

    Raises:
        InputError: names the file and the row.
    """
    lengths = pc.fill_null(pc.list_value_length(rows["target_places"]), -1).to_numpy()
    if (wrong := np.flatnonzero(lengths != positions_R)).size:
        raise InputError(f"{file}: row {first + wrong[0]}: target_places does not have one value per completion token")
    places = pc.list_flatten(rows["target_places"]).fill_null(-2).to_numpy()
    if (wrong := np.flatnonzero((places < -1) | (places >= np.repeat(of_teacher_R, lengths)))).size:
        row = targets.row_of(lengths, wrong[0])
        raise InputError(
            f"{file}: row {first + row}: target_places has {places[wrong[0]]}, must be from -1 to {of_teacher_R[row] - 1}"
        )


def _check_text(file: Path, rows: pa.Table, first: int) -> None:
    """Refuse nulls, a completion that is not one message, metadata that is not a JSON object, and invalid log-probabilities.

    Raises:
        InputError: names the file, and the row or the column.
    """
    for name in ("prompt", "completion"):
        messages = pc.list_flatten(rows[name])
        _check_nulls(file, name, first, rows[name], messages, *(pc.struct_field(messages, part) for part in ("role", "content")))
    answers = pc.list_value_length(rows["completion"]).to_numpy()
    if (wrong := np.flatnonzero(answers != 1)).size:
        raise InputError(f"{file}: row {first + wrong[0]}: completion has {answers[wrong[0]]} messages, but must have one")
    for name in ("id", "finish_reason"):
        _check_nulls(file, name, first, rows[name])
    for number, text in enumerate(rows["metadata"].to_pylist(), first):
        try:
            fields = json.loads(text)
        except (TypeError, ValueError, RecursionError):
            fields = None
        if not (isinstance(fields, dict) and isinstance(fields.get(OURS, {}), dict)):
            raise InputError(f"{file}: row {number}: metadata is not a JSON object")
    logprobs = pc.list_flatten(rows["token_logprobs"])
    if logprobs.null_count or (logprobs.to_numpy() > targets.ROUNDED_UP).any():
        raise InputError(f"{file}: token_logprobs has an invalid log-probability in a row from {first}")


def _check_nulls(file: Path, name: str, first: int, *values: Any) -> None:
    """Refuse a column with nulls among its values or parts of them.

    Raises:
        InputError: names the file and the column.
    """
    if any(part.null_count for part in values):
        raise InputError(f"{file}: the column {name} has a null in a row from {first}")


def _check_targets(
    file: Path, rows: pa.Table, first: int, kind: type[targets.SoftTargets], counts_R: targets.Array, limit_R: targets.Array
) -> None:
    """Refuse impossible soft targets.

    Raises:
        InputError: names the file and the row.
    """
    flat, lengths = {}, {}
    for name in kind.columns:
        values = pc.list_flatten(rows[name])
        _check_nulls(file, name, first, rows[name], values)
        flat[name], lengths[name] = values.to_numpy(), pc.list_value_length(rows[name]).to_numpy()
    if (wrong := targets.wrong_row(kind, flat, lengths, counts_R, limit_R)) is not None:
        raise InputError(f"{file}: row {first + wrong[0]}: {wrong[1]}")


def _limits(file: Path, rows: pa.Table, first: int, sizes: Mapping[str, float]) -> targets.Array:
    """The size of the vocabulary of each row's teacher.

    Raises:
        InputError: a row names none of them.
    """
    names = rows["teacher"].to_pylist() if "teacher" in rows.column_names else teacher_names(rows)
    for number, name in enumerate(names, first):
        if name not in sizes:
            raise InputError(f"{file}: row {number}: is of the teacher {name!r}, but the dataset has {', '.join(sizes)}")
    return np.array([sizes[name] for name in names])
