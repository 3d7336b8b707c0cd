"""Sources of prompts: tables (JSONL, CSV, Parquet, a dataset on the Hub) and documents (text, Markdown)."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmdistill.config.prompts import Combine, HubDataset, Passages, Prompts
from llmdistill.data.batches import read_batches
from llmdistill.data.dataset import shard_files
from llmdistill.data.jsonl import Fields, ending_of
from llmdistill.data.manifest import MANIFEST
from llmdistill.data.rows import metadata_and_provenance
from llmdistill.data.tables import (
    DOCUMENTS,
    MARKDOWN,
    Entry,
    content_hash,
    files_hash,
    find_files,
    is_hidden,
    read_document,
    read_table,
    with_sessions,
    without_nulls,
)
from llmdistill.errors import InputError
from llmdistill.prompting.passages import LINE_END, Starts, split_text

_OF_PASSAGES = ("passage", "heading")


def read_source(section: Prompts, token_starts: Starts | None = None) -> Iterator[Entry]:
    """The rows or passages of `prompts.source` or `prompts.dataset`, one by one; none if there is neither.

    Args:
        section: the configuration.
        token_starts: where tokens begin in a text; needed where passages are measured in tokens.

    Raises:
        InputError: names the file and the line or key.
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
    for entry in with_sessions(limited, section, "prompts.source"):
        found = True
        yield entry
    if not found:
        raise InputError(f"{section.from_where}: contains no prompts")


def read_files(source: str, key: str, passages: Passages | None = None, token_starts: Starts | None = None) -> Iterator[Entry]:
    """The rows or passages of a file, of the files of a folder, or of those that match a glob, in the order of their names.

    Raises:
        InputError: names the file and the line, or the key.
    """
    if (Path(source) / MANIFEST).is_file():
        rows = _dataset_rows(Path(source))
        yield from _cut_rows(rows, passages, token_starts) if passages else rows
        return
    files = find_files(source, key)
    if ending_of(files[0]) in DOCUMENTS:
        if passages and passages.field is not None:
            raise InputError(f"prompts.passages.field is {passages.field}, but {source} holds documents, which need no field")
        for file in files:
            yield from _document(file, passages or Passages(), token_starts)
        return
    rows = (row for file in files for row in read_table(file, key))
    yield from _cut_rows(rows, passages, token_starts) if passages else rows


def read_list(settings: Combine, key: str) -> list[Entry]:
    """The entries of the list to combine items with, with the requested fields.

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


def source_hash(section: Prompts) -> dict[str, str]:
    """The identity of the source: its path, or its name on the Hub, and a hash of the content."""
    if section.dataset is None:
        return files_hash(section.source, "prompts.source") if section.source else {}
    path, revision = Path(section.dataset.path), section.dataset.revision
    if not path.is_dir():
        return {section.dataset.path: f"{section.dataset.path}@{revision or 'main'}"}
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not is_hidden(file.relative_to(path))]
    return {section.dataset.path: content_hash(files)}


def _first_prompts(entries: Iterable[Entry], count: int) -> Iterator[Entry]:
    """The rows of the first prompts: a dataset may have several answers to each, in consecutive rows."""
    seen: set[bytes] = set()
    for entry in entries:
        asked = json.dumps([entry.fields["prompt"], entry.fields.get("tools")], sort_keys=True)
        prompt = hashlib.sha256(asked.encode()).digest()
        if prompt not in seen and len(seen) == count:
            return
        seen.add(prompt)
        yield entry


def _dataset_rows(directory: Path) -> Iterator[Entry]:
    """The prompts of a dataset's training rows, with their other known fields."""
    number = 0
    for batch in read_batches(shard_files(directory, "train"), ["prompt", "metadata"]):
        for row in batch.to_pylist():
            number += 1
            other, ours = metadata_and_provenance(row["metadata"])
            asked = {"prompt": ours["messages"][:-1] if "messages" in ours else row["prompt"]}
            tools = {"tools": ours["tools"]} if ours.get("tools") else {}
            session = {"conversation": ours["conversation"]} if "conversation" in ours else {}
            yield Entry({**other, **asked, **tools}, {"dataset": str(directory), "row": number, **session})


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
            yield Entry(without_nulls(fields), {"dataset": name, "row": number})
        del rows  # its file is open


@contextmanager
def _cache_of(path: str) -> Iterator[str]:
    """Where `datasets` caches what it reads; for a local directory, only temporarily.

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
    text = read_document(file)
    yield from _cut(text, file.suffix.lower() in MARKDOWN, {"document": str(file)}, {"file": str(file)}, settings, token_starts)


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
        if taken := next((name for name in _OF_PASSAGES if name in rest), None):
            yield replace(row, refused=f"has a field {taken}, which each passage gets; give it another name", unreadable=True)
            continue
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
