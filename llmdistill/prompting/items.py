"""What prompts are made of: fields and where they came from, and a file for each step with what became of every one."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill.data.batches import read_batches
from llmdistill.data.jsonl import Fields
from llmdistill.data.rows import storable, to_json
from llmdistill.data.shard_writer import ROW_GROUP
from llmdistill.data.tables import describe_place
from llmdistill.runs import lock
from llmdistill.runs.files import fsync_directory

Verdict = Literal["kept", "rejected", "failed"]
_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "fields", "lineage", "verdict", "reason", "text")])


@dataclass(frozen=True)
class Item:
    """What a prompt is made of: `fields` for templates, and in `lineage` its ancestors, the source first."""

    id: str
    fields: Fields
    lineage: dict[str, Any]

    @property
    def where(self) -> str:
        """Its place in the source, in words, and the last step that it went through."""
        steps = self.lineage.get("steps", [])
        place = describe_place(self.lineage["source"]) if "source" in self.lineage else "the teacher"
        return f"{place}, made by the step {steps[-1]['step']}" if steps else place

    def child(self, identity: str, fields: Fields, step: dict[str, Any]) -> "Item":
        """An item made out of this one, with more fields or other ones."""
        return Item(identity, {**self.fields, **fields}, {**self.lineage, "steps": [*self.lineage.get("steps", []), step]})


@dataclass
class Counts:
    """What became of the items of one step: those that came in are those kept, rejected and failed."""

    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def came_in(self) -> int:
        """All of them."""
        return self.kept + self.rejected.total() + self.failed.total()

    def add(self, reason: str | None) -> None:
        """Count one that is kept, or rejected for a reason."""
        if reason is None:
            self.kept += 1
        else:
            self.rejected[reason] += 1

    def __str__(self) -> str:
        parts = [f"{self.came_in:,} in = {self.kept:,} kept"]
        for name, reasons in (("rejected", self.rejected), ("failed", self.failed)):
            if reasons:
                why = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
                parts.append(f"{reasons.total():,} {name} ({why})")
        return " + ".join(parts)

    def described(self) -> dict[str, Any]:
        """For `run.json` and `dataset.json`."""
        return {
            "rows_in": self.came_in,
            "kept": self.kept,
            "rejected": self.rejected.total(),
            "failed": self.failed.total(),
            "reasons": dict(sorted((self.rejected + self.failed).items())),
        }


class RowWriter:
    """Streams rows to a Parquet file."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        """One row."""
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def copy(self, file: Path) -> None:
        """All rows of another such file."""
        self._flush()
        for batch in read_batches([file]):
            self._writer.write_table(batch)

    def close(self) -> None:
        """Write what waits, and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows = []


@contextmanager
def rows_file(file: Path, schema: pa.Schema) -> Iterator[RowWriter]:
    """A file of rows that is there once the block has ended well; else nothing of it is."""
    try:
        with lock.written(file) as unfinished:
            writer = RowWriter(unfinished, schema)
            yield writer
            writer.close()
            with unfinished.open("rb+") as stream:
                os.fsync(stream.fileno())
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(file)) from None
    fsync_directory(file.parent)


class ItemWriter:
    """Writes the items of one step, with what became of them."""

    def __init__(self, rows: RowWriter) -> None:
        self.rows = rows

    def keep(self, item: Item) -> None:
        """Keep the item."""
        self._add(item, fields=to_json(item.fields), verdict="kept")

    def refuse(self, verdict: Verdict, item: Item, reason: str, text: str) -> None:
        """The item, or what was made of it, stays behind, for a reason; `text` is what was not wanted."""
        self._add(item, verdict=verdict, reason=reason, text=storable(text))

    def _add(self, item: Item, **columns: str) -> None:
        self.rows.add({"id": item.id, "lineage": to_json(item.lineage), **columns})


@contextmanager
def items_file(file: Path) -> Iterator[ItemWriter]:
    """A file of items that is there once the block has ended well; else nothing of it is."""
    with rows_file(file, _SCHEMA) as rows:
        yield ItemWriter(rows)


def read_items(file: Path) -> Iterator[Item]:
    """The items that were kept."""
    for batch in read_batches([file], ["id", "fields", "lineage", "verdict"]):
        for row in batch.to_pylist():
            if row["verdict"] == "kept":
                yield Item(row["id"], json.loads(row["fields"]), json.loads(row["lineage"]))


def read_refused(file: Path) -> Iterator[dict[str, str]]:
    """The rows of those that were not."""
    for batch in read_batches([file]):
        yield from (row for row in batch.to_pylist() if row["verdict"] != "kept")


def count_items(file: Path) -> Counts:
    """What became of the items of a step."""
    counts = Counts()
    for batch in read_batches([file], ["verdict", "reason"]):
        for row in batch.to_pylist():
            if row["verdict"] == "kept":
                counts.kept += 1
            else:
                (counts.rejected if row["verdict"] == "rejected" else counts.failed)[row["reason"]] += 1
    return counts
