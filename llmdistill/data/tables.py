"""Files of rows: tables (JSONL, CSV, Parquet) and documents, and each row with its location."""

import csv
import glob
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmdistill.config.rows import RowReading
from llmdistill.config.shipped import find
from llmdistill.data.batches import read_batches
from llmdistill.data.jsonl import TEXT_TABLES, Fields, ending_of, open_text, read_json_rows, without_descriptions
from llmdistill.data.manifest import MANIFEST
from llmdistill.data.traffic import is_recorded, read_recorded, session_of
from llmdistill.errors import InputError, UnreadableError
from llmdistill.runs.inputs import sha256

TABLES = (*TEXT_TABLES, ".parquet")
MARKDOWN = (".md", ".markdown")
DOCUMENTS = (*MARKDOWN, ".txt")
_KNOWN = ", ".join((*TABLES, *DOCUMENTS))
_OF_PROMPTS = {"prompt", "with_tools", "metadata", "lineage"}  # the columns of `prompts.parquet`
csv.field_size_limit(sys.maxsize)  # a cell may be a whole document


@dataclass(frozen=True)
class Entry:
    """A row of a table or a passage of a document; `refused` is the reason if it is unusable or unreadable."""

    fields: Fields
    place: dict[str, Any]
    refused: str | None = None
    unreadable: bool = False

    @property
    def origin(self) -> str:
        """Its location in words."""
        return describe_place(self.place)

    @property
    def conversation(self) -> str | None:
        """The session that it belongs to, if known."""
        return self.place.get("conversation")

    def check(self) -> None:
        """Refuse an unreadable row.

        Raises:
            UnreadableError: with the reason.
        """
        if self.unreadable:
            raise UnreadableError(self.refused or "cannot be read", self.origin)


def describe_place(place: dict[str, Any]) -> str:
    """A location in words: `a.jsonl line 3`, `a.md lines 3–9`."""
    where = place.get("file") or place.get("dataset")
    if "lines" in place:
        return f"{where} lines {place['lines'][0]}–{place['lines'][1]}"
    return f"{where} line {place['line']}" if "line" in place else f"{where} row {place['row']}"


def find_files(source: str, key: str) -> list[Path]:
    """The files of a source: all tables, or all documents.

    Raises:
        InputError: there are none, or both.
    """
    path = Path(source)
    is_there = find(path).exists()
    if not is_there and not glob.has_magic(source):
        raise InputError(f"{source}: no such file ({key})")
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if not is_hidden(file.relative_to(path))]
    elif is_there:
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.iglob(source, recursive=True))]  # noqa: PTH207 - absolute ones too
        if not found:
            raise InputError(f"{key}: {source} matches no file")
    known = [file for file in found if ending_of(file) in (*TABLES, *DOCUMENTS) and not file.is_dir()]
    if path.is_dir():
        known = without_descriptions(known)
    for file in known:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            raise InputError(f"{key}: the name {os.fsencode(file)!r} is not UTF-8; rename the file") from None
    if not known:
        what = "is not a file" if found == [path] else "contains no file"
        raise InputError(f"{key}: {source} {what} that ends in one of {_KNOWN}")
    endings = sorted({ending_of(file) for file in known})
    if len({ending in DOCUMENTS for ending in endings}) > 1:
        raise InputError(
            f"{key}: {source} holds both tables and documents ({', '.join(endings)}); use a glob such as *{endings[0]}"
        )
    return known


def files_hash(source: str, key: str) -> dict[str, str]:
    """Path and hash of a file, or name of a folder or glob and hash of all its files; for a dataset, that of its manifest."""
    if (Path(source) / MANIFEST).is_file():
        return {str(Path(source) / MANIFEST): sha256(Path(source) / MANIFEST)}
    files = find_files(source, key)
    return {source: sha256(find(source)) if files == [Path(source)] else content_hash(files)}


def content_hash(files: list[Path]) -> str:
    """A hash of their content and of their names below the common directory, which may be moved."""
    digest, above = hashlib.sha256(), os.path.commonpath([file.parent for file in files]) if files else ""
    for file in files:
        digest.update(f"{file.relative_to(above).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def is_hidden(path: Path) -> bool:
    """Whether it, or a directory that contains it, is hidden."""
    return any(part.startswith(".") for part in path.parts)


def read_tables(source: str, key: str) -> Iterator[Entry]:
    """The rows of a table, of the tables of a folder, or of those that match a glob, in the order of their names.

    A document is one row, with all of it as `text`.

    Raises:
        InputError: names the file and the line, or the key.
    """
    for file in find_files(source, key):
        if ending_of(file) in DOCUMENTS:
            text = read_document(file)
            yield Entry({"text": text, "document": str(file)}, {"file": str(file), "lines": [1, text.count("\n") + 1]})
        else:
            yield from read_table(file, key)


def read_answered(source: str, settings: RowReading, key: str) -> Iterator[Entry]:
    """The rows of tables whose answers are to be read; of recorded requests, those without one are refused.

    Args:
        source: as for `read_tables`.
        settings: how rows are to be read.
        key: of the configuration that names the source.

    Raises:
        InputError: names the file and the line, or the key.
    """
    return with_sessions(read_tables(source, key), settings, key, answered=True)


def with_sessions(entries: Iterable[Entry], settings: RowReading, key: str, answered: bool = False) -> Iterator[Entry]:
    """The entries with their sessions; for recorded requests, only the fields that are kept.

    Raises:
        InputError: no request has a field that the settings name.
    """
    unseen: set[str] | None = None
    for entry in entries:
        try:
            if entry.unreadable:
                yield entry
            elif settings.format == "requests" or (settings.format == "auto" and is_recorded(entry.fields)):
                taken = read_recorded(entry.fields, settings, entry.origin)
                unseen = (set(settings.metadata) if unseen is None else unseen) - taken.keys()
                place = {**entry.place, "conversation": taken.conversation}
                yield Entry(taken, place, taken.unanswered if answered else None)
            else:
                session = session_of(entry.fields, settings, entry.origin)
                yield replace(entry, place={**entry.place, "conversation": session}) if session else entry
        except UnreadableError as error:
            yield Entry({}, entry.place, error.reason, unreadable=True)
    if unseen:
        raise InputError(f"{key.removesuffix('.source')}.metadata: no recorded request has the field {min(unseen)}")


def read_table(file: Path, key: str) -> Iterator[Entry]:
    """The rows of one table, by the suffix of its name.

    Raises:
        InputError: the file cannot be read.
    """
    ending = ending_of(file)
    if ending in (".jsonl", ".json"):
        return (_json_entry(file, number, fields) for number, fields in read_json_rows(file, key))
    if ending == ".parquet":
        return _parquet_rows(file)
    return _csv_rows(file, "\t" if ending == ".tsv" else ",")


def _json_entry(file: Path, number: int, fields: Fields | UnreadableError) -> Entry:
    place = {"file": str(file), "line": number}
    return Entry({}, place, fields.reason, True) if isinstance(fields, UnreadableError) else Entry(fields, place)


def _csv_rows(file: Path, delimiter: str) -> Iterator[Entry]:
    """The rows below the header; a row is identified by the line on which it begins."""
    begin = 1
    try:
        with open_text(file, "") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise InputError(f"{file} line 1: the header has a duplicate column")
            begin = reader.line_num + 1
            for row in reader:
                if len(row) not in (0, len(header)):
                    why = f"has {len(row)} cells, but the header has {len(header)}"
                    yield Entry({}, {"file": str(file), "line": begin}, why, True)
                elif row:
                    yield Entry(dict(zip(header, row, strict=True)), {"file": str(file), "line": begin})
                begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file} line {begin}: not valid CSV: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None


def _parquet_rows(file: Path) -> Iterator[Entry]:
    number = 0
    for batch in read_batches([file]):
        for fields in _objects(batch):
            number += 1
            place = {"file": str(file), "row": number}
            if fields is None:
                yield Entry({}, place, "contains text that is not UTF-8", unreadable=True)
            else:
                yield Entry(_prompt_of(fields) if set(fields) == _OF_PROMPTS else without_nulls(fields), place)


def _objects(batch: pa.Table) -> Iterator[Fields | None]:
    """The rows of a table; None instead of each that cannot be decoded."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


def without_nulls(fields: Fields) -> Fields:
    """A row of an Arrow table without the fields that its messages and tools have only because other rows do."""
    return {
        name: _bare(value) if isinstance(value, list) or (isinstance(value, dict) and "role" in value) else value
        for name, value in fields.items()
    }


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _bare(other) for name, other in value.items() if other is not None}
    return [_bare(other) for other in value] if isinstance(value, list) else value


def _prompt_of(stored: Fields) -> Fields:
    """A row of `prompts.parquet`, as written by `prompts`."""
    messages, tools = conversation_of_prompt(stored)
    return {**json.loads(stored["metadata"]), "prompt": messages, **({"tools": tools} if tools else {})}


def conversation_of_prompt(stored: Fields) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages of a row of `prompts.parquet` as the chat template takes them, and the tools."""
    whole = json.loads(stored["with_tools"]) if stored["with_tools"] else {"messages": stored["prompt"], "tools": None}
    return whole["messages"], whole["tools"]


def read_document(file: Path) -> str:
    """All of a text.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open_text(file, "\n") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
