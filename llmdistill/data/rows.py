"""A row of a dataset, and rows as the columns of a table."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from llmdistill.data import targets
from llmdistill.errors import InputError, NonFiniteError

Messages = list[dict[str, str]]  # role and content of each turn
OURS = "llmdistill"  # the field of `metadata` with a row's provenance; all others are the user's
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_LIST_ENTRIES = 1 << 30


@dataclass(frozen=True)
class Row:
    """One sequence before it is stored; `targets` has one row per completion token, or is None for text only.

    `metadata` is what the user's file says beside the conversation, `provenance` what is known of how the row was made.
    """

    id: str
    prompt: Messages
    completion: Messages
    prompt_ids: Sequence[int] | targets.Array
    completion_ids: targets.Array
    finish_reason: str
    token_logprobs: targets.Array
    targets: targets.SoftTargets | None
    sampling_logprob: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def rows_to_table(rows: list[Row], vocab_size: int) -> pa.Table:
    """The rows as columns; see docs/dataset.md for each."""
    entries = sum(np.size(row.targets.ids_NK) if row.targets else len(row.completion_ids) for row in rows)
    if entries > _LIST_ENTRIES and len(rows) > 1:  # Arrow counts the entries of a list column in 32 bits
        half = len(rows) // 2
        return pa.concat_tables([rows_to_table(part, vocab_size) for part in (rows[:half], rows[half:])])
    starts = np.array([len(row.prompt_ids) for row in rows])
    lengths = np.array([len(row.completion_ids) for row in rows])
    ids = [np.concatenate([np.asarray(row.prompt_ids), row.completion_ids]) for row in rows]
    mask = [np.arange(len(sequence)) >= start for sequence, start in zip(ids, starts, strict=True)]
    columns: dict[str, pa.Array] = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "prompt": pa.array([row.prompt for row in rows], MESSAGES),
        "completion": pa.array([row.completion for row in rows], MESSAGES),
        "input_ids": targets.list_array(np.concatenate(ids).astype(np.int32), starts + lengths),
        "completion_start": pa.array(starts.astype(np.int32)),
        # TRL's SFTTrainer reads this one: without it, it would train on the prompt as well.
        "completion_mask": targets.list_array(np.concatenate(mask).astype(np.int8), starts + lengths),
        "finish_reason": pa.array([row.finish_reason for row in rows], pa.string()),
        "metadata": pa.array([_metadata(row) for row in rows], pa.string()),
        "token_logprobs": targets.list_array(np.concatenate([row.token_logprobs for row in rows]).astype(np.float32), lengths),
    }
    if rows[0].sampling_logprob is not None:
        columns["sampling_logprob"] = pa.array([row.sampling_logprob for row in rows], pa.float32())
    soft = [row.targets for row in rows if row.targets is not None]
    if soft:
        columns |= type(soft[0]).encode(soft, vocab_size)
    return pa.table(columns)


def metadata_and_provenance(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of the column `metadata`: the fields of the user's file, and how the row was made."""
    fields: dict[str, Any] = json.loads(text)
    return fields, fields.pop(OURS, {})


def whole_conversation(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages of a stored row before reduction to roles and contents, and the tools offered.

    Args:
        row: with `prompt`, `completion` and `metadata`.
    """
    _, provenance = metadata_and_provenance(row["metadata"])
    return provenance.get("messages") or [*row["prompt"], *row["completion"]], provenance.get("tools")


def teacher_names(rows: pa.Table) -> list[str]:
    """The name of each row's teacher, from `metadata`; empty if not named."""
    return [str(metadata_and_provenance(text)[1].get("teacher", "")) for text in rows["metadata"].to_pylist()]


def _metadata(row: Row) -> str:
    if OURS in row.metadata:
        raise InputError(f"row {row.id}: has a field {OURS}, which is reserved; give it another name")
    return to_json({**row.metadata, OURS: row.provenance} if row.provenance else row.metadata)


def to_json(content: Any) -> str:
    """JSON whose keys keep their order; dates and the like become text, and non-finite numbers null."""
    try:
        text = json.dumps(content, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), ensure_ascii=False, default=str)
    return storable(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(other) for key, other in value.items()}
    return [_finite(other) for other in value] if isinstance(value, list | tuple) else value


def storable(text: str) -> str:
    """The text in a form that can be stored: lone surrogates, which a model may write, become `?`."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def check_logprobs(row: Row, unknown: bool = False) -> None:
    """Refuse invalid log-probabilities of a teacher before they are stored.

    Args:
        row: to be stored.
        unknown: whether that of a token may be NaN, which says that it is not known.

    Raises:
        NonFiniteError: one of a token or of the soft targets is not a number, or above zero.
    """
    written = np.nan_to_num(row.token_logprobs, nan=0.0) if unknown else row.token_logprobs
    stored = [written] if row.targets is None else [written, row.targets.told()]
    for values in map(np.asarray, stored):
        if np.isnan(values).any() or (values > 1e-3).any():
            raise NonFiniteError(
                f"row {row.id}: the teacher's log-probabilities are not negative numbers; some models overflow in float16: "
                "set teacher.dtype to bfloat16 or float32"
            )
