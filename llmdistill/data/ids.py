"""Ids and seeds of rows, which depend only on their content."""

import hashlib
import json
from typing import Any

from llmdistill.config import Generate


def row_id(messages: list[dict[str, str]], teacher: str, sampling: Generate, sample: int) -> str:
    """Stable id of a row: the same prompt, teacher, sampling and sample index give the same id on any machine."""
    return stable_id(messages, teacher, sampling.model_dump(exclude={"samples", "rows_per_shard"}), sample)


def stable_id(*content: Any) -> str:
    """32 hexadecimal digits that depend only on the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def row_seed(row: str, seed: int) -> int:
    """The 63-bit seed of a row, from its id and the experiment's seed."""
    return int.from_bytes(hashlib.sha256(f"{row} {seed}".encode()).digest()[:8]) >> 1
