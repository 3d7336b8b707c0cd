"""Rows that a stage could not use: counted by reason, said, kept beside the others, and refused where there are too many."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill.config.rows import RowReading
from llmdistill.config.section import without_secrets
from llmdistill.errors import InputError, UnreadableError, UnusableError
from llmdistill.runs import lock
from llmdistill.runs.progress import say

_SCHEMA = pa.schema([("place", pa.string()), ("reason", pa.string()), ("row", pa.string())])


class LeftOut:
    """What was left out of the rows that a stage reads.

    Args:
        settings: what becomes of rows that cannot be read.
    """

    def __init__(self, settings: RowReading | None = None) -> None:
        self.settings = settings or RowReading()
        self.reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._unreadable: Counter[str] = Counter()
        self._rows: list[dict[str, str]] = []

    def add(self, error: UnusableError, fields: Mapping[str, Any] | None = None) -> None:
        """Count one more.

        Args:
            error: why it cannot be used, and where it stands.
            fields: of the row.

        Raises:
            UnreadableError: it cannot be read, and the configuration says that none may be left out.
        """
        if isinstance(error, UnreadableError):
            if self.settings.on_bad_rows == "refuse":
                raise error
            self._unreadable[error.reason] += 1
        self.reasons[error.reason] += 1
        self._first.setdefault(error.reason, str(error))
        place = str(error).removesuffix(f": {error.reason}")
        row = "" if fields is None else json.dumps(without_secrets(fields), ensure_ascii=False, default=str)
        self._rows.append({"place": place, "reason": error.reason, "row": row.encode(errors="replace").decode()})

    def close(self, stage: str, used: int) -> None:
        """Say what was left out, once all rows were seen.

        Args:
            stage: that says it.
            used: rows that are left.

        Raises:
            InputError: none are left, or too many could not be read.
        """
        if self.reasons and not used:
            reason = self.reasons.most_common(1)[0][0]
            more = f"; nor can any of the {self.reasons.total() - 1:,} other rows be used" if self.reasons.total() > 1 else ""
            raise InputError(self._first[reason] + more)
        self.check_share(used)
        for reason, count in self.reasons.most_common():
            say(stage, f"left out {count:,} of {used + self.reasons.total():,} rows: {self._first[reason]}")

    def check_share(self, used: int) -> None:
        """Refuse a file of which too many rows cannot be read.

        Raises:
            InputError: naming the first of them.
        """
        bad, total = self._unreadable.total(), used + self.reasons.total()
        if bad > self.settings.max_bad_rows * total:
            first = self._first[self._unreadable.most_common(1)[0][0]]
            share = f"{bad:,} of {total:,} rows cannot be read, more than max_bad_rows, {self.settings.max_bad_rows:.0%}"
            raise InputError(f"{first}; {share}" if total > 1 else first)

    def write(self, file: Path) -> None:
        """Keep the rows, with their places and reasons, if there are any."""
        if self._rows:
            with lock.written(file) as unfinished:
                pq.write_table(pa.Table.from_pylist(self._rows, _SCHEMA), unfinished, compression="zstd")

    @property
    def described(self) -> dict[str, dict[str, int]]:
        """For `dataset.json`."""
        return {"left_out": dict(sorted(self.reasons.items()))} if self.reasons else {}
