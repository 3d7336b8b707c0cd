"""What a benchmark finds: printed at once, and kept in a file in case it does not end well."""

import json
import traceback
from pathlib import Path
from typing import Any


class Found:
    """Rows of each table, aims and failures; printed as they come, and written to a file after each."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.all: dict[str, Any] = {"rows": {}, "aims": {}, "failures": [], "skipped": []}
        self._columns: list[str] = []

    def row(self, section: str, **values: Any) -> None:
        if list(values) != self._columns:
            self._columns = list(values)
            print(f"\n| {' | '.join(values)} |\n|{' --- |' * len(values)}", flush=True)
        shown = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values.values())
        print(f"| {' | '.join(shown)} |", flush=True)
        self.all["rows"].setdefault(section, []).append(values)
        self.write()

    def aim(self, name: str, value: float) -> None:
        self.all["aims"][name] = value
        self.write()

    def failed(self, what: str) -> None:
        print(f"FAILED {what}", flush=True)
        self.all["failures"].append(what)
        self.write()

    def raised(self, what: str, error: Exception) -> None:
        traceback.print_exc()
        self.failed(f"{what}: {type(error).__name__}: {str(error).strip()[:300]}")

    def skipped(self, what: str) -> None:
        print(f"skipped {what}", flush=True)
        self.all["skipped"].append(what)
        self.write()

    def add(self, other: dict[str, Any]) -> None:
        for name in ("rows", "aims"):
            self.all[name] |= other[name]
        for name in ("failures", "skipped"):
            self.all[name] += other[name]
        self.write()

    def write(self) -> None:
        if self.file:
            unfinished = self.file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.all, indent=2) + "\n")
            unfinished.replace(self.file)
