"""JSON Lines: a file of objects, read one by one, with an error instead of each that is unusable."""

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from llmdistill.config.shipped import find
from llmdistill.data.rows import storable
from llmdistill.errors import InputError, UnreadableError

Fields = dict[str, Any]

TEXT_TABLES = (".jsonl", ".json", ".csv", ".tsv")
_COMPRESSED = (".gz", ".bz2", ".zst")  # of text tables; decompressed as they are read
_DEPTH = 100  # of objects and lists inside each other


def ending_of(file: Path) -> str:
    """The suffix of a file name that gives its format: `.jsonl` for `a.jsonl.gz`."""
    suffix, inner = file.suffix.lower(), Path(file.stem).suffix.lower()
    return inner if suffix in _COMPRESSED and inner in TEXT_TABLES else suffix


def without_descriptions(files: list[Path]) -> list[Path]:
    """The data files of a folder: JSON files describe the others if there are others."""
    return [file for file in files if ending_of(file) != ".json"] or files


def open_text(file: Path, newline: str) -> TextIO:
    """A text file, decompressed by its suffix; a byte-order mark selects UTF-16, and is not part of the text."""
    with pa.input_stream(str(find(file)), compression="detect") as stream:
        is_utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    stream = pa.input_stream(str(find(file)), compression="detect")
    return io.TextIOWrapper(stream, encoding="utf-16" if is_utf16 else "utf-8-sig", newline=newline)


def read_json_rows(file: Path, key: str = "prompts.source") -> Iterator[tuple[int, Fields | UnreadableError]]:
    """The objects of a JSONL file, or of a JSON file that is one array, each with its number, counted from 1.

    The number is that of the line, of which blank ones are passed over, or the place in the array. What is no object is an
    error in its place.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        # A line ends at a line feed only: the other separators that Python knows may stand inside a string.
        is_array = ending_of(file) == ".json" and _begins_array(file)
        with open_text(file, "\n") as stream:
            if is_array:
                yield from _array(file, stream.read())
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, _parse(line, f"{file} line {number}")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file ({key})") from None
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None


def _begins_array(file: Path) -> bool:
    with open_text(file, "\n") as stream:
        return next((line.lstrip()[:1] for line in stream if line.strip()), "") == "["


def _array(file: Path, text: str) -> Iterator[tuple[int, Fields | UnreadableError]]:
    try:
        rows = _loads(text)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None
    for number, fields in enumerate(rows, start=1):
        yield number, fields if isinstance(fields, dict) else UnreadableError("must be a JSON object", f"{file} entry {number}")


def _parse(line: str, origin: str) -> Fields | UnreadableError:
    try:
        fields = _loads(line)
    except ValueError as error:
        return UnreadableError(str(error), origin)
    return fields if isinstance(fields, dict) else UnreadableError('must be a JSON object, such as {"prompt": "…"}', origin)


def _loads(text: str) -> Any:
    """Parse JSON, replacing NaN by null and lone surrogates by `?`, as neither could be stored.

    Raises:
        ValueError: it is none.
    """
    try:
        value = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if text.count("[") + text.count("{") > _DEPTH and _is_deeper(value, _DEPTH):
        raise ValueError(f"nested more than {_DEPTH} deep")
    return _storable(value) if "\\ud" in text.lower() else value


def _is_deeper(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth == 0 or any(_is_deeper(other, depth - 1) for other in inner)


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, dict):
        return {storable(key): _storable(other) for key, other in value.items()}
    return [_storable(other) for other in value] if isinstance(value, list) else value
