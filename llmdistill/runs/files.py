"""Files and directories that appear complete or not at all, and JSON that is checked when it is read."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmdistill.errors import InputError
from llmdistill.runs import lock
from llmdistill.runs.lock import writer_name

RUN_FILE = "run.json"  # the record of a stage, in its output directory


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `path` if the block succeeds; otherwise it is deleted.

    Raises:
        InputError: `path` exists and is not empty, or cannot be written.
    """
    path = path.resolve()
    # A mount point cannot be replaced: there, what is finished is moved inside, and is on the same disk.
    inside = path.is_mount()
    unfinished = path / ".unfinished" if inside else path.with_name(f".{path.name}.{writer_name()}.unfinished")
    try:
        if path.exists() and not (path.is_dir() and not {entry.name for entry in path.iterdir()} - {"lost+found", ".unfinished"}):
            raise InputError(f"{path}: exists and is not empty; choose another output directory, or move it")
        if inside:
            shutil.rmtree(unfinished, ignore_errors=True)
        for leftover in path.parent.glob(f".{path.name}.*.unfinished"):
            if lock.is_abandoned(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
        mark = lock.begin(unfinished, directory=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    try:
        if inside:
            for entry in sorted(unfinished.iterdir(), key=lambda entry: entry.suffix == ".json"):  # what tells that all is there
                entry.replace(path / entry.name)
            unfinished.rmdir()
        else:
            unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the finished result is in {unfinished}", str(path)) from None
    finally:
        if mark is not None:
            os.close(mark)


def read_json(file: Path) -> Any:
    """Read a JSON file; None if it does not exist.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None


_KINDS: dict[type, str] = {
    str: "text",
    int: "an integer",
    dict: "a mapping",
    list: "a list",
    object: "present, even if null",
}


def check_shape(file: Path, found: Any, shape: Mapping[str, type], at: str = "") -> dict[str, Any]:
    """Check that a mapping in a JSON file has values of the right types.

    Args:
        file: it stands in, for the error.
        found: it.
        shape: what the keys that it must have are.
        at: where in the file it stands.

    Raises:
        InputError: names the file and the key.
    """
    if not isinstance(found, dict):
        raise InputError(f"{file}: {at or 'the whole'} must be a mapping, got {shortened(found)}")
    for key, kind in shape.items():
        if key not in found or not isinstance(found[key], kind) or isinstance(found[key], bool):
            name = f"{at}.{key}" if at else key
            raise InputError(f"{file}: {name} must be {_KINDS[kind]}, got {shortened(found[key]) if key in found else 'nothing'}")
    return found


def create_json(file: Path, content: Any) -> bool:
    """Write a complete file unless it exists; returns whether it did not."""
    unfinished = file.with_name(f".{file.name}.new.{writer_name()}.unfinished")
    write_json(unfinished, content)
    try:
        os.link(unfinished, file)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if file.exists():
            return False
        write_json(file, content)
    finally:
        unfinished.unlink(missing_ok=True)
    return True


def write_json(file: Path, content: Any) -> None:
    """Write the file atomically."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write the file atomically; lone surrogates, which a model may write, become `?`."""
    write_bytes(file, text.encode("utf-8", errors="replace"))


def write_bytes(file: Path, content: bytes) -> None:
    """Write the file atomically."""
    with writing(file) as stream:
        stream.write(content)


def write_parquet(file: Path, table: Any) -> None:
    """Write the file atomically."""
    import pyarrow.parquet as pq

    with writing(file) as stream:
        pq.write_table(table, stream, compression="zstd")


@contextmanager
def writing(file: Path) -> Iterator[BinaryIO]:
    """A stream to write to; the complete file appears if the block succeeds, otherwise nothing does."""
    try:
        with lock.written(file) as unfinished, unfinished.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        if error.errno is None:  # a library's own, which names no file
            raise
        raise OSError(error.errno, error.strerror, str(file)) from None
    fsync_directory(file.parent)


def fsync_directory(directory: Path) -> None:
    """Wait until a rename in the directory is on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def shortened(value: Any) -> str:
    """A value as JSON, cut at 60 characters, for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
