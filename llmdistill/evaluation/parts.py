"""What `eval` has measured so far, in files: a later try with the same settings goes on from them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmdistill.evaluation.statistics import Array
from llmdistill.runs.lock import writer_name
from llmdistill.runs.record import read_json, write_json


class Parts:
    """Results in a directory, by name; each appears by an atomic rename."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def has(self, name: str) -> bool:
        """Whether `result` has measured it."""
        return (self.directory / f"{name}.json").exists()

    def result(self, name: str, measure: Callable[[], Any]) -> Any:
        """What JSON can hold, measured if it is not there."""
        file = self.directory / f"{name}.json"
        if not self.has(name):
            write_json(file, {"result": measure()})
        found = read_json(file)
        assert found is not None
        return found["result"]

    def arrays(self, name: str, measure: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """Arrays by name, measured if they are not there."""
        file = self.directory / f"{name}.npz"
        if not file.exists():
            unfinished = self.directory / f".{name}.{writer_name()}.npz"
            measured = measure()
            stored: dict[str, Any] = {f"array_{number}": values for number, values in enumerate(measured.values())}
            np.savez(unfinished, **stored, names=np.array(json.dumps(list(measured))))
            unfinished.replace(file)
        with np.load(file, allow_pickle=False) as found:
            return {name: found[f"array_{number}"] for number, name in enumerate(json.loads(str(found["names"])))}

    def remove(self) -> None:
        """When all is in its place."""
        shutil.rmtree(self.directory, ignore_errors=True)
