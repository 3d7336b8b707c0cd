"""Shards of a dataset: Parquet files that appear when they are complete.

A shard is named `SPLIT-INDEX-of-COUNT-CHECKSUM.parquet`. It is written under a hidden name and renamed when it is
whole, so a shard that is there is done and says itself what its bytes must hash to.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill.errors import InputError
from llmdistill.runs import lock
from llmdistill.runs.files import fsync_directory
from llmdistill.runs.inputs import sha256
from llmdistill.runs.lock import writer_name

_FAILED = b"llmdistill.failed"
_BILL = b"llmdistill.bill"
ROW_GROUP = 1000  # rows; what a reader has to hold at a time
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
SHARD_NAME = re.compile(r"(?P<split>train|test)-(?P<index>\d{5,})-of-(?P<count>\d{5,})-(?P<checksum>[0-9a-f]{16})\.parquet")


@dataclass(frozen=True)
class Shard:
    """A finished shard, as described by its file name."""

    file: Path
    split: str
    index: int
    count: int
    checksum: str


class ShardWriter:
    """Streams one shard to disk; it appears by an atomic rename, under a name that contains its checksum.

    What has been written goes away again if the writing fails, for instance on a full disk.
    """

    def __init__(self, directory: Path, split: Split, index: int, schema: pa.Schema) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.split, self.index = directory, split, index
        self.unfinished = directory / f".{split}-{index:05d}.{writer_name()}.unfinished"
        self.rows = 0
        self._mark = lock.begin(self.unfinished)
        self._stream = pa.OSFile(str(self.unfinished), "wb")
        with self._removed_on_error():
            self._writer = pq.ParquetWriter(self._stream, schema, write_page_checksum=True, **parquet_encoding(schema))

    def write(self, table: pa.Table) -> None:
        """Add rows, in groups of at most `ROW_GROUP`."""
        with self._removed_on_error():
            self._writer.write_table(table, row_group_size=ROW_GROUP)
        self.rows += len(table)

    @property
    def bytes(self) -> int:
        """Number of bytes written so far."""
        return int(self._stream.tell())

    def close(self) -> None:
        """Write the footer and flush to disk; the shard is complete, but not visible yet."""
        with self._removed_on_error():
            self._writer.close()
            self._stream.close()
            with self.unfinished.open("rb+") as stream:
                os.fsync(stream.fileno())

    def __del__(self) -> None:
        if (mark := getattr(self, "_mark", None)) is not None:
            os.close(mark)

    def publish(self, count: int) -> Shard:
        """Publish the shard as one of `count`; if another worker has made it meanwhile, that one is kept."""
        checksum = sha256(self.unfinished)[:16]
        there = next((shard for shard in finished_shards(self.directory, self.split) if shard.index == self.index), None)
        if there:
            self.unfinished.unlink()
            return there
        file = self.directory / f"{self.split}-{self.index:05d}-of-{count:05d}-{checksum}.parquet"
        self.unfinished.replace(file)
        fsync_directory(self.directory)
        return Shard(file, self.split, self.index, count, checksum)

    @contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with suppress(OSError):
                self._stream.close()
            self.unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self.unfinished)) from None
            raise


class SplitWriter:
    """Streams a split into shards of about this many bytes; none is visible before all are complete."""

    def __init__(self, directory: Path, split: Split, shard_bytes: int) -> None:
        self.directory, self.split, self.shard_bytes = directory, split, shard_bytes
        self.rows = 0
        self._shards: list[ShardWriter] = []
        self._open: ShardWriter | None = None
        self._waiting: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Add rows; they are written once there are enough for a row group."""
        self.rows += len(table)
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= ROW_GROUP:
            self._flush()

    def publish(self) -> list[Shard]:
        """Finish the last shard, and publish all of them."""
        self._flush()
        self._close()
        return [writer.publish(len(self._shards)) for writer in self._shards]

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting) if self._waiting else None
        self._waiting = []
        if table is None or not len(table):
            return
        if self._open is None:
            self._open = ShardWriter(self.directory, self.split, len(self._shards), table.schema)
            self._shards.append(self._open)
        self._open.write(table)
        if self._open.bytes >= self.shard_bytes:
            self._close()

    def _close(self) -> None:
        if self._open:
            self._open.close()
            self._open = None


def write_shard(directory: Path, split: Split, index: int, count: int, table: pa.Table) -> Shard:
    """Write one complete shard."""
    writer = ShardWriter(directory, split, index, table.schema)
    writer.write(table)
    writer.close()
    return writer.publish(count)


def parquet_encoding(schema: pa.Schema) -> dict[str, Any]:
    """Encoding of a shard's columns: options of `pyarrow.parquet.write_table`.

    The high bytes of ids and log-probabilities repeat more than the low ones; stored apart, they compress by a tenth more.
    """
    lists = [column for column in schema if pa.types.is_list(column.type) and column.name.startswith(("target_", "token_"))]
    split = [column.name for column in lists if column.type.value_type.bit_width > 8]
    return {
        "compression": "zstd",
        "compression_level": 15,
        "use_dictionary": ["finish_reason"],
        "column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split},
        "write_statistics": False,
    }


def finished_shards(directory: Path, split: Split) -> list[Shard]:
    """The existing shards, one per index; if two workers made the same one, the first by name counts."""
    found: dict[int, Shard] = {}
    for file in sorted(directory.glob(f"{split}-*.parquet")):
        match = SHARD_NAME.fullmatch(file.name)
        if match is None:
            raise InputError(f"{file}: not a shard of this dataset")
        shard = Shard(file, split, int(match["index"]), int(match["count"]), match["checksum"])
        found.setdefault(shard.index, shard)
    return [found[index] for index in sorted(found)]


def is_damaged(file: Path) -> bool:
    """Whether the bytes of a shard do not match the checksum in its name."""
    match = SHARD_NAME.fullmatch(file.name)
    return match is None or sha256(file)[:16] != match["checksum"]


def remove_leftovers(directory: Path) -> None:
    """Delete what killed writers left behind; files of running ones are kept, wherever they run."""
    for file in directory.glob(".*.unfinished"):
        if lock.is_abandoned(file):
            file.unlink(missing_ok=True)


def with_failed(table: pa.Table, failed: Mapping[str, int]) -> pa.Table:
    """The rows of a shard, and in the file's metadata how many others were given up for which reason."""
    if not failed:
        return table
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _FAILED: json.dumps(dict(failed)).encode()})


def with_bill(table: pa.Table, bill: Mapping[str, Any]) -> pa.Table:
    """The rows of a shard, and in the file's metadata what an endpoint billed for them."""
    if not bill:
        return table
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _BILL: json.dumps(dict(bill)).encode()})


def failed_rows(shards: "Iterable[Shard]") -> dict[str, int]:
    """Number of rows given up while making shards, by reason."""
    total: Counter[str] = Counter()
    for shard in shards:
        total.update(json.loads((pq.read_schema(shard.file).metadata or {}).get(_FAILED, b"{}")))
    return dict(sorted(total.items()))


def billed(shards: "Iterable[Shard]") -> list[dict[str, Any]]:
    """What an endpoint billed for shards, as far as recorded."""
    found = (json.loads((pq.read_schema(shard.file).metadata or {}).get(_BILL, b"null")) for shard in shards)
    return [entry for entry in found if entry]
