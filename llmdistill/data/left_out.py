"""Rows that a stage could not use: counted by reason, said, and refused where nothing else is left."""

from collections import Counter

from llmdistill.errors import InputError, UnusableError
from llmdistill.runs.progress import say


class LeftOut:
    """What was left out of the rows that a stage reads."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, error: UnusableError) -> None:
        """Count one more."""
        self.reasons[error.reason] += 1
        self._first.setdefault(error.reason, str(error))

    def close(self, stage: str, used: int) -> None:
        """Say what was left out, once all rows were seen.

        Args:
            stage: that says it.
            used: rows that are left.

        Raises:
            InputError: none are left.
        """
        if self.reasons and not used:
            reason = self.reasons.most_common(1)[0][0]
            more = f"; nor can any of the {self.reasons.total() - 1:,} other rows be used" if self.reasons.total() > 1 else ""
            raise InputError(self._first[reason] + more)
        for reason, count in self.reasons.most_common():
            say(stage, f"left out {count:,} of {used + self.reasons.total():,} rows: {self._first[reason]}")

    @property
    def described(self) -> dict[str, dict[str, int]]:
        """For `dataset.json`."""
        return {"left_out": dict(sorted(self.reasons.items()))} if self.reasons else {}
