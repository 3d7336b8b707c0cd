"""Rows that a stage could not use: counted by reason, reported, saved next to the others, and refused if too many."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmdistill.config.rows import RowReading
from llmdistill.config.section import without_secrets
from llmdistill.data.rows import to_json
from llmdistill.errors import InputError, UnreadableError, UnusableError
from llmdistill.runs.files import write_parquet
from llmdistill.runs.progress import say

_LONGEST = 4000  # characters that are kept of a row
_SCHEMA = pa.schema([("place", pa.string()), ("reason", pa.string()), ("row", pa.string())])


class LeftOut:
    """Rows left out of those that a stage reads.

    Args:
        settings: what becomes of rows that cannot be read.

    Attributes:
        reasons: how many for each reason.
        seen: rows that were read, where they may be neither used nor left out, as repeats are.
    """

    def __init__(self, settings: RowReading | None = None) -> None:
        self.settings = settings or RowReading()
        self.reasons: Counter[str] = Counter()
        self.seen = 0
        self._first: dict[str, str] = {}
        self._unreadable: Counter[str] = Counter()
        self._rows: list[dict[str, str]] = []

    def add(self, error: UnusableError, fields: Mapping[str, Any] | None = None) -> None:
        """Count one more row.

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
        self._rows.append({"place": place, "reason": error.reason, "row": "" if fields is None else _described(fields)})

    def close(self, stage: str, used: int) -> None:
        """Report what was left out, once all rows have been read.

        Args:
            stage: that says it.
            used: rows that are left.

        Raises:
            InputError: none are left, or too many could not be read.
        """
        if self.reasons and not used:
            reason = self.reasons.most_common(1)[0][0]
            more = f"; none of the {self.reasons.total() - 1:,} other rows is usable" if self.reasons.total() > 1 else ""
            raise InputError(self._first[reason] + more)
        self.check_share(used)
        self.say(stage, used)

    def say(self, stage: str, used: int) -> None:
        """Report what has been left out so far."""
        for reason, count in self.reasons.most_common():
            say(stage, f"left out {count:,} of {max(self.seen, used + self.reasons.total()):,} rows: {self._first[reason]}")

    def check_share(self, used: int) -> None:
        """Refuse a file with too many unreadable rows.

        Raises:
            InputError: names the first of them.
        """
        bad, total = self._unreadable.total(), self.seen or used + self.reasons.total()
        if bad > self.settings.max_bad_rows * total:
            first = self._first[self._unreadable.most_common(1)[0][0]]
            share = f"{bad:,} of {total:,} rows cannot be read, more than max_bad_rows, {self.settings.max_bad_rows:.0%}"
            raise InputError(f"{first}; {share}" if total > 1 else first)

    def write(self, file: Path) -> None:
        """Save the rows with their locations and reasons, if there are any."""
        if self._rows:
            write_parquet(file, pa.Table.from_pylist(self._rows, _SCHEMA))

    @property
    def described(self) -> dict[str, dict[str, int]]:
        """Entry in `dataset.json`."""
        return {"left_out": dict(sorted(self.reasons.items()))} if self.reasons else {}


def _described(fields: Mapping[str, Any]) -> str:
    """A row as text of a readable length."""
    text = to_json(_without_bytes(without_secrets(fields)))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text) - _LONGEST:,} more characters)"


def _without_bytes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_bytes(inner) for name, inner in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes>"
    return [_without_bytes(inner) for inner in value] if isinstance(value, list) else value
