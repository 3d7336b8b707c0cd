"""Results of `eval` so far, in files: a later attempt with the same settings continues from them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmdistill.evaluation.statistics import Array
from llmdistill.runs.files import read_json, write_json, writing


class Parts:
    """Results in a directory, by name; each is written by an atomic rename."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether `result` has been measured."""
        return (self.directory / f"{name}.json").exists()

    def result(self, name: str, measure: Callable[[], Any]) -> Any:
        """A result that JSON can hold; measured if missing."""
        file = self.directory / f"{name}.json"
        if not self.has(name):
            write_json(file, {"result": measure()})
        found = read_json(file)
        assert found is not None
        return found["result"]

    def arrays(self, name: str, measure: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """Arrays by name; measured if missing."""
        file = self.directory / f"{name}.npz"
        if not file.exists():
            measured = measure()
            stored: dict[str, Any] = {f"array_{number}": values for number, values in enumerate(measured.values())}
            with writing(file) as stream:
                np.savez(stream, **stored, names=np.array(json.dumps(list(measured))))
        with np.load(file, allow_pickle=False) as found:
            return {name: found[f"array_{number}"] for number, name in enumerate(json.loads(str(found["names"])))}

    def remove(self) -> None:
        """Delete the results once everything is in its final place."""
        shutil.rmtree(self.directory, ignore_errors=True)
