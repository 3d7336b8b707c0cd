"""The identity of what a stage reads: the content of a file or a local model, the commit of a model on the Hub."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from llmdistill.config.shipped import find
from llmdistill.errors import InputError
from llmdistill.runs.files import RUN_FILE
from llmdistill.runs.hashes import content_hashes, file_hash

_LARGE = 16 << 20  # bytes


def sha256(file: Path) -> str:
    """Hash of a file's content; for models see `model_fingerprint`."""
    try:
        return file_hash(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


def file_input(file: str | Path, key: str) -> dict[str, str]:
    """A file by its path and hash, as one of the inputs of a stage.

    Args:
        file: its path.
        key: of the configuration that names it, for the error.

    Raises:
        InputError: it is not there.
    """
    found = find(file)
    if not found.is_file():
        raise InputError(f"{file}: no such file ({key})")
    return {str(file): sha256(found)}


def model_fingerprint(model: str, revision: str | None) -> str:
    """The identity of a model: the content of a local directory, or name and revision on the Hub; see `hub_commits`.

    Files over 16 MiB enter by their hashes, which are kept.
    """
    directory = Path(model)
    if not directory.is_dir():
        return on_hub(model, revision)
    skipped = (RUN_FILE, "README.md")
    files = [
        (file, file.stat().st_size)
        for file in sorted(directory.iterdir())
        if file.name not in skipped and not file.name.startswith(".") and file.is_file()
    ]
    large = [file for file, size in files if size > _LARGE]
    hashes = dict(zip(large, content_hashes(large), strict=True))
    digest = hashlib.sha256()
    for file, size in files:
        digest.update(f"{file.name} {size}\n".encode())
        digest.update(hashes[file].encode() if file in hashes else file.read_bytes())
    return digest.hexdigest()


def on_hub(model: str, revision: str | None) -> str:
    """The fingerprint of a model on the Hub."""
    return f"{model}@{revision or 'main'}"


def hub_commits(inputs: Mapping[str, str]) -> dict[str, str]:
    """The Hub commit of each model that a stage reads, as far as the local cache knows it, without network access.

    Args:
        inputs: path or name of what the stage reads, with its hash or `model_fingerprint`.
    """
    found = {}
    for name, content in inputs.items():
        model, at, revision = content.rpartition("@")
        if at and (commit := _commit(model, revision)):
            found[name] = commit
    return found


def _commit(model: str, revision: str) -> str | None:
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # no name on the Hub
        return None
    return Path(found).parent.name if isinstance(found, str) else None
