"""What every benchmark takes and prints at its end; and, for long ones, what is kept in a file in case it does not end well."""

import argparse
import json
import traceback
from pathlib import Path
from typing import Any


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """With the flags of every benchmark: `--smoke` and `--json`."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--smoke", action="store_true", help="tiny sizes and no figure that means anything: does it run?")
    made.add_argument("--json", type=Path, help="also write the figures here")
    return made


def report(figures: dict[str, Any], aims: dict[str, float], file: Path | None) -> None:
    """Print the aims, and write them to the file with the figures."""
    for name, value in aims.items():
        print(f"aim {name} {value:.4g}")
    if file:
        file.write_text(json.dumps({**figures, "aims": aims}, indent=2) + "\n")


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
