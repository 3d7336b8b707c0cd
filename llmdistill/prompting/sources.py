"""Where prompts come from: tables (JSONL, CSV, Parquet, a dataset of the Hub) and documents (text, Markdown)."""

import csv
import glob
import hashlib
import json
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmdistill.config.prompts import Combine, HubDataset, Passages, Prompts
from llmdistill.config.rows import RowReading
from llmdistill.config.shipped import find
from llmdistill.data.conversations import CONVERSATION
from llmdistill.data.dataset import MANIFEST, metadata_and_provenance, read_batches, shard_files
from llmdistill.data.jsonl import TEXT_TABLES, Fields, ending_of, open_text, read_json_rows
from llmdistill.data.traffic import is_recorded, read_recorded, session_of
from llmdistill.errors import InputError, UnreadableError
from llmdistill.prompting.passages import LINE_END, Starts, split_text
from llmdistill.runs.record import sha256

TABLES = (*TEXT_TABLES, ".parquet")
_MARKDOWN = (".md", ".markdown")
_DOCUMENTS = (*_MARKDOWN, ".txt")
_KNOWN = ", ".join((*TABLES, *_DOCUMENTS))
_OF_PROMPTS = {"prompt", "with_tools", "metadata", "lineage"}  # the columns of `prompts.parquet`
csv.field_size_limit(sys.maxsize)  # a cell may be a whole document


@dataclass(frozen=True)
class Entry:
    """A row of a table or a passage of a document; `refused` says why it cannot be used, or not even be read."""

    fields: Fields
    place: dict[str, Any]
    refused: str | None = None
    unreadable: bool = False

    @property
    def origin(self) -> str:
        """Its place in words."""
        return describe_place(self.place)

    @property
    def conversation(self) -> str | None:
        """The session that it belongs to, where that is known."""
        return self.place.get("conversation")

    def check(self) -> None:
        """Refuse a row that cannot be read.

        Raises:
            UnreadableError: with the reason.
        """
        if self.unreadable:
            raise UnreadableError(self.refused or "cannot be read", self.origin)


def describe_place(place: dict[str, Any]) -> str:
    """A place in words: `a.jsonl line 3`, `a.md lines 3–9`."""
    where = place.get("file") or place.get("dataset")
    if "lines" in place:
        return f"{where} lines {place['lines'][0]}–{place['lines'][1]}"
    return f"{where} line {place['line']}" if "line" in place else f"{where} row {place['row']}"


def read_source(section: Prompts, token_starts: Starts | None = None) -> Iterator[Entry]:
    """The rows or passages of `prompts.source` or `prompts.dataset`, one by one; none if there is neither.

    Args:
        section: the configuration.
        token_starts: where tokens begin in a text; needed where passages are measured in tokens.

    Raises:
        InputError: naming the file and the line or key.
    """
    if section.dataset is not None:
        entries = _hub_rows(section.dataset)
    elif section.source is not None:
        entries = read_files(section.source, "prompts.source", section.passages, token_starts)
    else:
        return
    if section.dataset is not None and section.passages:
        entries = _cut_rows(entries, section.passages, token_starts)
    found = False
    of_dataset = section.source is not None and (Path(section.source) / MANIFEST).is_file() and not section.passages
    limited = _first_prompts(entries, section.limit) if of_dataset and section.limit else islice(entries, section.limit)
    for entry in _taken(limited, section, "prompts.source"):
        found = True
        yield entry
    if not found:
        raise InputError(f"{section.from_where}: holds no prompts")


def read_files(source: str, key: str, passages: Passages | None = None, token_starts: Starts | None = None) -> Iterator[Entry]:
    """The rows or passages of a file, of the files of a folder, or of those that a glob matches, in the order of their names.

    Raises:
        InputError: naming the file and the line, or the key.
    """
    if (Path(source) / MANIFEST).is_file():
        rows = _dataset_rows(Path(source))
        yield from _cut_rows(rows, passages, token_starts) if passages else rows
        return
    files = find_files(source, key)
    if ending_of(files[0]) in _DOCUMENTS:
        if passages and passages.field is not None:
            raise InputError(f"prompts.passages.field is {passages.field}, but {source} holds documents, which need no field")
        for file in files:
            yield from _document(file, passages or Passages(), token_starts)
        return
    rows = (row for file in files for row in _rows(file, key))
    yield from _cut_rows(rows, passages, token_starts) if passages else rows


def read_list(settings: Combine, key: str) -> list[Entry]:
    """The entries of the list that items are combined with, with the fields that are asked for.

    Args:
        settings: the list.
        key: where they stand in the configuration, for errors.

    Raises:
        InputError: the list, or one of its entries, lacks what is asked for.
    """
    entries = []
    for entry in read_files(settings.source, f"{key}.source"):
        entry.check()
        names = settings.fields if settings.fields is not None else list(entry.fields)
        missing = [name for name in names if name not in entry.fields]
        if missing:
            raise InputError(f"{entry.origin}: has no field {missing[0]} ({key}.fields), only {', '.join(entry.fields)}")
        entries.append(Entry({name: entry.fields[name] for name in names}, entry.place))
    if settings.samples > len(entries):
        raise InputError(f"{key}.samples is {settings.samples:,}, but {settings.source} has {len(entries):,} entries")
    return entries


def find_files(source: str, key: str) -> list[Path]:
    """The files that a source means: all tables, or all documents.

    Raises:
        InputError: there are none, or both.
    """
    path = Path(source)
    is_there = find(path).exists()
    if not is_there and not glob.has_magic(source):
        raise InputError(f"{source}: no such file ({key})")
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if not _is_hidden(file.relative_to(path))]
    elif is_there:
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.iglob(source, recursive=True))]  # noqa: PTH207 - absolute ones too
        if not found:
            raise InputError(f"{key}: {source} matches no file")
    known = [file for file in found if ending_of(file) in (*TABLES, *_DOCUMENTS) and not file.is_dir()]
    if path.is_dir():  # of a folder, JSON files describe the others
        known = [file for file in known if ending_of(file) != ".json"] or known
    for file in known:
        try:
            str(file).encode()
        except UnicodeEncodeError:
            raise InputError(f"{key}: the name {os.fsencode(file)!r} is not UTF-8; rename the file") from None
    if not known:
        what = "is no file" if found == [path] else "holds no file"
        raise InputError(f"{key}: {source} {what} that ends in one of {_KNOWN}")
    endings = sorted({ending_of(file) for file in known})
    if len({ending in _DOCUMENTS for ending in endings}) > 1:
        raise InputError(
            f"{key}: {source} holds both tables and documents ({', '.join(endings)}); use a glob such as *{endings[0]}"
        )
    return known


def source_hash(section: Prompts) -> dict[str, str]:
    """What identifies the source: its path, or its name on the Hub, and a hash of the content."""
    if section.dataset is None:
        return files_hash(section.source, "prompts.source") if section.source else {}
    path, revision = Path(section.dataset.path), section.dataset.revision
    if not path.is_dir():
        return {section.dataset.path: f"{section.dataset.path}@{revision or 'main'}"}
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]
    return {section.dataset.path: _hash_of(files)}


def files_hash(source: str, key: str) -> dict[str, str]:
    """Path and hash of a file, or a folder's or glob's name and the hash of all its files; of a dataset, that of its manifest."""
    if (Path(source) / MANIFEST).is_file():
        return {str(Path(source) / MANIFEST): sha256(Path(source) / MANIFEST)}
    files = find_files(source, key)
    return {source: sha256(find(source)) if files == [Path(source)] else _hash_of(files)}


def _hash_of(files: list[Path]) -> str:
    """Of their names below the directory that they share, and their content: the directory may be moved."""
    digest, above = hashlib.sha256(), os.path.commonpath([file.parent for file in files]) if files else ""
    for file in files:
        digest.update(f"{file.relative_to(above).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_answered(source: str, settings: RowReading, key: str) -> Iterator[Entry]:
    """The rows of tables whose answers are to be read; of recorded requests, those without one are refused.

    Args:
        source: as for `read_tables`.
        settings: how rows are to be read.
        key: of the configuration that names the source.

    Raises:
        InputError: naming the file and the line, or the key.
    """
    return _taken(read_tables(source, key), settings, key, answered=True)


def _taken(entries: Iterable[Entry], settings: RowReading, key: str, answered: bool = False) -> Iterator[Entry]:
    """The entries with their sessions; of recorded requests, no more than is taken of them.

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


def read_tables(source: str, key: str) -> Iterator[Entry]:
    """The rows of a table, of the tables of a folder, or of those that a glob matches, in the order of their names.

    A document is one row, with all of it as `text`.

    Raises:
        InputError: naming the file and the line, or the key.
    """
    for file in find_files(source, key):
        if ending_of(file) in _DOCUMENTS:
            text = _read_document(file)
            yield Entry({"text": text, "document": str(file)}, {"file": str(file), "lines": [1, text.count("\n") + 1]})
        else:
            yield from _rows(file, key)


def _rows(file: Path, key: str) -> Iterator[Entry]:
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
    """The rows below the header; a row is named by the line on which it begins."""
    begin = 1
    try:
        with open_text(file, "") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise InputError(f"{file} line 1: the header has a column twice")
            begin = reader.line_num + 1
            for row in reader:
                if len(row) not in (0, len(header)):
                    why = f"has {len(row)} cells, the header has {len(header)}"
                    yield Entry({}, {"file": str(file), "line": begin}, why, True)
                elif row:
                    yield Entry(dict(zip(header, row, strict=True)), {"file": str(file), "line": begin})
                begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file} line {begin}: not valid CSV: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None


def _first_prompts(entries: Iterable[Entry], count: int) -> Iterator[Entry]:
    """The rows of the first prompts: a dataset may have several answers to each, side by side."""
    seen: set[bytes] = set()
    for entry in entries:
        asked = json.dumps([entry.fields["prompt"], entry.fields.get("tools")], sort_keys=True)
        prompt = hashlib.sha256(asked.encode()).digest()
        if prompt not in seen and len(seen) == count:
            return
        seen.add(prompt)
        yield entry


def _dataset_rows(directory: Path) -> Iterator[Entry]:
    """The prompts of a dataset's training rows, with what else was known of them."""
    number = 0
    for batch in read_batches(shard_files(directory, "train"), ["prompt", "metadata"]):
        for row in batch.to_pylist():
            number += 1
            other, ours = metadata_and_provenance(row["metadata"])
            asked = {"prompt": ours["messages"][:-1] if "messages" in ours else row["prompt"]}
            tools = {"tools": ours["tools"]} if ours.get("tools") else {}
            session = {"conversation": ours["conversation"]} if "conversation" in ours else {}
            yield Entry({**other, **asked, **tools}, {"dataset": str(directory), "row": number, **session})


def _parquet_rows(file: Path) -> Iterator[Entry]:
    number = 0
    for batch in read_batches([file]):
        for fields in batch.to_pylist():
            number += 1
            yield Entry(_prompt_of(fields) if set(fields) == _OF_PROMPTS else fields, {"file": str(file), "row": number})


def _prompt_of(stored: Fields) -> Fields:
    """A row of `prompts.parquet`, as `prompts` has written it."""
    messages, tools = conversation_of_prompt(stored)
    return {**json.loads(stored["metadata"]), "prompt": messages, **({"tools": tools} if tools else {})}


def conversation_of_prompt(stored: Fields) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages of a row of `prompts.parquet` as the chat template takes them, and the tools."""
    whole = json.loads(stored["with_tools"]) if stored["with_tools"] else {"messages": stored["prompt"], "tools": None}
    return whole["messages"], whole["tools"]


def _hub_rows(section: HubDataset) -> Iterator[Entry]:
    import datasets

    datasets.utils.logging.disable_progress_bar()
    name = " ".join(part for part in (section.path, section.name, section.split) if part)
    with _cache_of(section.path) as cache:
        try:
            rows = datasets.load_dataset(
                section.path, section.name, split=section.split, revision=section.revision, cache_dir=cache
            )
        except Exception as error:  # whatever the dataset, the network or the cache raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(f"prompts.dataset: cannot load {section.path}: {reason[0]}") from None
        for number, fields in enumerate(rows, start=1):
            yield Entry(fields, {"dataset": name, "row": number})
        del rows  # its file is open


@contextmanager
def _cache_of(path: str) -> Iterator[str]:
    """Where `datasets` keeps what it reads: of a local directory, only for now.

    It knows a directory whose card has `configs` by its last name alone, so another of that name, or one with new files,
    gives the rows that were read before.
    """
    import datasets

    cache = datasets.config.HF_DATASETS_CACHE
    if not Path(path).is_dir():
        yield str(cache)
        return
    Path(cache).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix="local-", ignore_cleanup_errors=True) as temporary:
        yield temporary


def _document(file: Path, settings: Passages, token_starts: Starts | None) -> Iterator[Entry]:
    text = _read_document(file)
    yield from _cut(text, file.suffix.lower() in _MARKDOWN, {"document": str(file)}, {"file": str(file)}, settings, token_starts)


def _read_document(file: Path) -> str:
    try:
        with open_text(file, "\n") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None


def _cut_rows(rows: Iterator[Entry], settings: Passages, token_starts: Starts | None) -> Iterator[Entry]:
    if settings.field is None:
        raise InputError("prompts.passages.field is missing: set it to the column of the table that holds the text")
    for row in rows:
        if row.unreadable:
            yield row
            continue
        text = row.fields.get(settings.field)
        if not isinstance(text, str):
            reason = f"has no text in {settings.field} (prompts.passages.field), only {', '.join(row.fields)}"
            yield replace(row, refused=reason, unreadable=True)
            continue
        rest = {name: value for name, value in row.fields.items() if name != settings.field}
        yield from _cut(text, True, rest, row.place, settings, token_starts)


def _cut(
    text: str, markdown: bool, fields: Fields, place: dict[str, Any], settings: Passages, token_starts: Starts | None
) -> Iterator[Entry]:
    ends = [match.start() for match in re.finditer(LINE_END, text)]
    passages = split_text(text, markdown, settings, token_starts)
    reason = f"shorter than {settings.min_size} {settings.unit}"
    for passage in passages:
        lines = [1 + bisect_left(ends, offset) for offset in (passage.start, passage.end - 1)]
        here = {"lines": lines, "characters": [passage.start, passage.end]}
        found = {"passage": text[passage.start : passage.end], "heading": passage.heading}
        yield Entry({**fields, **found}, {**place, **here}, reason if passage.too_short else None)
    if not passages:
        empty = {"lines": [1, 1 + len(ends)], "characters": [0, len(text)]}
        yield Entry({**fields, "passage": "", "heading": ""}, {**place, **empty}, "empty")


def metadata(fields: Fields, used: Collection[str] = CONVERSATION) -> Fields:
    """What a line says beside its conversation: an expected answer, a topic; kept with the row.

    Args:
        fields: of the line.
        used: those that are in the conversation.
    """
    return {name: value for name, value in fields.items() if name not in used}
