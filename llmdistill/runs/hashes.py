"""Hashes of large files, each read only once: they are cached in the user's home as long as the files do not change."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from llmdistill.runs.lock import written
from llmdistill.runs.progress import working

_READERS = 4  # files at a time: one core hashes slower than a disk reads


def content_hashes(files: Sequence[Path]) -> list[str]:
    """SHA-256 of the content of each file."""
    kept = [_kept(file) for file in files]
    found = [_read(place) for place in kept]
    missing = [number for number, known in enumerate(found) if known is None]
    if missing:
        with working("inputs", f"hashing {files[missing[0]].parent}"), ThreadPoolExecutor(_READERS) as pool:
            hashed = list(pool.map(file_hash, (files[number] for number in missing)))
        for number, new in zip(missing, hashed, strict=True):
            found[number] = new
            place = kept[number]
            if place is not None and place == _kept(files[number]):  # it has not changed meanwhile
                _write(place, new)
    return [known for known in found if known is not None]


def file_hash(file: Path) -> str:
    """SHA-256 of the content of a file, read anew."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _kept(file: Path) -> Path | None:
    """Where the hash of a file in its current state is cached; None for a user without a home directory."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    state = file.stat()
    key = [str(file.resolve()), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    return cache / "llmdistill" / "hashes" / hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _read(place: Path | None) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        if place is not None and re.fullmatch(r"[0-9a-f]{64}", text := place.read_text(encoding="ascii")):
            return text
    return None


def _write(place: Path, text: str) -> None:
    with suppress(OSError):  # a full disk, or one that cannot be written to: the file is read again the next time
        place.parent.mkdir(parents=True, exist_ok=True)
        with written(place) as unfinished:
            unfinished.write_text(text, encoding="ascii")
