"""The shards of a dataset made by workers without a shared disk, which exchange them through the store.

A shard is uploaded as soon as it is finished, and its name contains its checksum. A worker that finds all of them there
fetches those it lacks and writes `dataset.json`, which only the first can upload: if two workers made the same shard with
different bytes, that file determines which one counts, and the others adopt it.
"""

import json
from collections.abc import Collection, Generator, Iterable
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.machine import Precision
from llmdistill.data.cards import dataset_card, write_card
from llmdistill.data.manifest import MANIFEST
from llmdistill.data.shard_writer import SHARD_NAME, Shard, finished_shards, is_damaged
from llmdistill.errors import InputError, RemoteError
from llmdistill.objectstore.copies import CARD, Copy
from llmdistill.objectstore.store import DamagedError, Store
from llmdistill.runs.files import RUN_FILE, write_text
from llmdistill.runs.inputs import sha256
from llmdistill.runs.progress import say

_TRIES = 5  # attempts to fetch shards while others decide or damaged ones are made again


class SharedShards:
    """The training shards of one dataset in the store; without a store there are none, and nothing needs to be done."""

    def __init__(self, experiment: Experiment, directory: Path) -> None:
        self.directory = directory
        self._tries = _TRIES
        self._begun = False
        self.copy = Copy(Store(experiment.store), directory.parent, directory.name) if experiment.store else None

    def join(self, name: str, settings: dict[str, Any], inputs: dict[str, str]) -> None:
        """Check that this worker's settings equal those of the others.

        Args:
            name: name of the stage.
            settings: the resolved configuration that the rows depend on.
            inputs: path and hash of what is read.

        Raises:
            InputError: if the store has work made with other settings.
        """
        if self.copy:
            self.copy.check(name, settings, inputs)

    def begun_precision(self) -> Precision | None:
        """The teacher's precision in the work that was started in the store; None if there is none."""
        run = self.copy.store.read(f"{self.copy.name}/{RUN_FILE}") if self.copy else None
        recorded = (run or {}).get("precision")
        return Precision(**recorded) if recorded else None

    def indices(self) -> set[int]:
        """The shards in the store."""
        return set(self._names()) if self.copy else set()

    def lacking(self, wanted: Iterable[int]) -> Generator[int, None, None]:
        """The wanted shards that are not in the store, which is asked again just before each is made."""
        there = self.indices()
        for index in wanted:
            if index not in there and not (self.copy and self._names(_prefix(index))):
                yield index

    def put(self, shard: Shard) -> None:
        """Upload a shard unless another worker has done so; then that one counts, and this one is deleted."""
        if not self.copy:
            return
        there = self._names(_prefix(shard.index)).get(shard.index)
        if not self._begun:
            self.copy.begin()
            self._begun = True
        if there is None:
            self.copy.store.put(shard.file, f"{self.copy.name}/{shard.file.name}")
        elif there != shard.file.name:
            shard.file.unlink()

    def put_lacking(self) -> None:
        """Upload shards that a killed worker had finished here."""
        there = self.indices()
        for shard in finished_shards(self.directory, "train") if self.copy else ():
            if shard.index not in there and not is_damaged(shard.file):
                self.put(shard)

    def gather(self, count: int) -> bool:
        """Once all shards are in the store, fetch them; returns False if one is damaged there, in which case it is deleted.

        Raises:
            RemoteError: if they are damaged repeatedly.
        """
        if not self.copy:
            return True
        try:
            names = self._decided() or list(self._names().values())
            if len(names) == count:
                self._fetch(names)
            return True
        except DamagedError as error:
            self._tries -= 1
            if not self._tries:
                raise RemoteError(f"{error}, repeatedly") from None
            say("store", f"{error}; making it again unless there is another one")
            self.copy.break_seal(error.name)
            return False

    def decide(self) -> None:
        """Upload `dataset.json`, or adopt the existing one."""
        if not self.copy:
            return
        file = self.directory / MANIFEST
        content = self.copy.store.decide(file, f"{self.copy.name}/{MANIFEST}")
        if content != file.read_bytes():
            manifest = json.loads(content)
            self._fetch(_shards_of(manifest))
            write_card(self.directory / CARD, lambda: dataset_card(manifest))
            write_text(file, content.decode())

    def finish(self) -> None:
        """Upload the rest of the finished dataset."""
        if self.copy:
            self.copy.upload_if_done()

    def _names(self, prefix: str = "train-") -> dict[int, str]:
        """The shards in the store by index; if two workers made the same one, the first by name."""
        assert self.copy is not None
        names: dict[int, str] = {}
        for name in sorted(self.copy.store.names(self.copy.name, prefix)):
            if match := SHARD_NAME.fullmatch(name):
                names.setdefault(int(match["index"]), name)
        return names

    def _decided(self) -> list[str]:
        """The shards that count, if a worker has decided; those deleted since have to be made again."""
        assert self.copy is not None
        manifest = self.copy.store.read(f"{self.copy.name}/{MANIFEST}")
        if manifest is None:
            return []
        names, there = _shards_of(manifest), self.copy.store.names(self.copy.name)
        if any(name not in there for name in names):
            self.copy.break_seal()
            return []
        return names

    def _fetch(self, names: Collection[str]) -> None:
        """Make exactly these shards available here."""
        assert self.copy is not None
        for name in names:
            file, checksum = self.directory / name, name.removesuffix(".parquet").rpartition("-")[2]
            if not file.is_file() or not sha256(file).startswith(checksum):
                self.copy.store.get(f"{self.copy.name}/{name}", file, checksum)
        for file in self.directory.glob("train-*.parquet"):
            if file.name not in names:
                file.unlink(missing_ok=True)


def _prefix(index: int) -> str:
    return f"train-{index:05d}-"


def _shards_of(manifest: dict[str, Any]) -> list[str]:
    """The names in a `dataset.json`."""
    names = [str(entry["file"]) for entry in manifest["shards"]]
    if not all(SHARD_NAME.fullmatch(name) for name in names):
        raise InputError(f"{MANIFEST} of the store names files that are not shards")
    return names
