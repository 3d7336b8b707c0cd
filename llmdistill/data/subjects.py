"""The subject of a row: rows with the same one are not independent, and are held out together."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from llmdistill.data.ngrams import normalised
from llmdistill.data.rows import OURS
from llmdistill.data.shard_writer import ROW_GROUP


def dataset_keys(rows: Any) -> list[str]:
    """`conversation_keys` for a `datasets.Dataset`, some rows at a time."""
    tables = rows.select_columns(["prompt", "completion", "metadata"]).with_format("arrow").iter(batch_size=ROW_GROUP)
    return [key for table in tables for key in conversation_keys(table)]


def conversation_keys(rows: pa.Table) -> list[str]:
    """The subject of each row, from `prompt`, `completion` and `metadata`: rows with the same one are not independent.

    It is the prompt, whose case, white space and system message do not matter; of text without a prompt, the text; and where
    several turns of one conversation are rows, that conversation.
    """
    keys: list[str] = []
    for prompt, metadata in zip(prompt_keys(rows), rows["metadata"].to_pylist(), strict=True):
        whole = json.loads(metadata).get(OURS, {}).get("conversation") if '"conversation"' in metadata else None
        keys.append(json.dumps(whole) if whole else prompt)
    return keys


def prompt_keys(rows: pa.Table) -> list[str]:
    """`conversation_of` for each row's prompt, from `prompt` and `completion`; for text without a prompt, for the text."""
    columns = (rows[name].to_pylist() for name in ("prompt", "completion"))
    return [conversation_of(prompt or completion) for prompt, completion in zip(*columns, strict=True)]


def conversation_of(prompt: Sequence[Mapping[str, str]]) -> str:
    """`conversation_keys` for a prompt."""
    turns = [turn for turn in prompt if turn["role"] != "system"] or prompt
    return json.dumps([[turn["role"], normalised(turn["content"])] for turn in turns])


def is_held_out(conversation: str, salt: Any, share: float) -> bool:
    """Whether a conversation is held out, by the hash of its key; independent of the size of the dataset."""
    digest = hashlib.sha256(f"{salt} {conversation}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < share
