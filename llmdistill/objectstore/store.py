"""An object store as files under a URL, by fsspec: writes are atomic, and failing calls are retried."""

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from llmdistill.errors import InputError, RemoteError, not_installed
from llmdistill.runs import lock
from llmdistill.runs.inputs import sha256
from llmdistill.runs.progress import say

_DELAYS = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)  # seconds between attempts, about five minutes
_LIBRARIES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "file": ("fsspec", "s3")}  # package and extra
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}},  # retries are done here, with a message
    "gs": {},
    "file": {"auto_mkdir": True},
}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError", "RefreshError")
_TRANSIENT = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "ConditionalRequestConflict")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")


class DamagedError(InputError):
    """An object differs from what was uploaded, or is gone although it is listed; `name` is its name."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(f"{url}/{name} is damaged or gone")
        self.name = name


class Store:
    """Files by name under a URL; every call is retried for some minutes.

    Raises:
        InputError: if a library, the credentials or the bucket are missing, or the store refuses access.
        RemoteError: from any call, if the store cannot be reached, or fails.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = self.url.partition("://")[0]
        package, extra = _LIBRARIES[protocol]
        try:
            import fsspec

            self._files = fsspec.filesystem(protocol, use_listings_cache=False, **_OPTIONS[protocol])
        except ImportError:
            raise not_installed(f"store: {url}", package, extra) from None
        self._root = str(self._files._strip_protocol(self.url))
        self._renames = protocol == "file"
        self._no_bucket = f"store: {self.url}: no such bucket"

    def check(self) -> None:
        """Check that the store exists before starting work that will be uploaded to it."""
        if not self._renames:
            try:
                self._ask("", lambda: self._files.find(self._root, prefix="."))  # a prefix with which hardly anything begins
            except FileNotFoundError:
                raise InputError(self._no_bucket) from None

    def names(self, under: str, prefix: str = "") -> dict[str, int]:
        """The files in a directory and below, by their path in it, with their sizes in bytes.

        Args:
            under: name of the directory.
            prefix: beginning of the paths.
        """
        root = f"{self._root}/{under}"
        try:
            found = self._ask(under, lambda: self._files.find(root, detail=True, prefix=prefix))
        except FileNotFoundError:
            raise InputError(self._no_bucket) from None
        names = {path.removeprefix(f"{root}/"): int(info["size"]) for path, info in found.items()}
        return {name: size for name, size in names.items() if name.startswith(prefix) and not name.endswith(".unfinished")}

    def put(self, file: Path, name: str) -> None:
        """Upload a file atomically."""
        try:
            if self._renames:
                self._ask(name, lambda: self._put_beside(file, name).replace(f"{self._root}/{name}"))
            else:
                self._ask(name, lambda: self._files.put_file(str(file), f"{self._root}/{name}"))
        except FileNotFoundError:
            if not file.exists():
                raise
            raise InputError(self._no_bucket) from None

    def decide(self, file: Path, name: str) -> bytes:
        """Upload a file unless there is one already; returns the content found then, also with concurrent calls."""
        while True:
            with suppress(FileExistsError):
                self._create(file, name)
            with suppress(FileNotFoundError):  # already gone again
                return self._ask(name, lambda: bytes(self._files.cat_file(f"{self._root}/{name}")))

    def get(self, name: str, file: Path, checksum: str | None = None) -> None:
        """Download a file; it appears atomically here too.

        Args:
            name: name in the store.
            file: where to write it.
            checksum: beginning of its SHA-256.

        Raises:
            DamagedError: if the checksum differs, or the file is missing.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with lock.written(file) as unfinished:
                self._ask(name, lambda: self._files.get_file(f"{self._root}/{name}", str(unfinished)))
                if checksum is not None and not sha256(unfinished).startswith(checksum):
                    raise DamagedError(self.url, name)
        except FileNotFoundError:
            raise DamagedError(self.url, name) from None
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from None

    def read(self, name: str) -> Any:
        """Read a JSON file; None if it does not exist.

        Raises:
            DamagedError: if it is not JSON.
        """
        try:
            content = self._ask(name, lambda: bytes(self._files.cat_file(f"{self._root}/{name}")))
        except FileNotFoundError:
            return None
        try:
            return json.loads(content)
        except ValueError:
            raise DamagedError(self.url, name) from None

    def remove(self, name: str) -> None:
        """Delete a file, if it exists."""
        with suppress(FileNotFoundError):
            self._ask(name, lambda: self._files.rm_file(f"{self._root}/{name}"))

    def _create(self, file: Path, name: str) -> None:
        if not self._renames:
            content = file.read_bytes()
            self._ask(name, lambda: self._files.pipe_file(f"{self._root}/{name}", content, mode="create"))
            return
        beside = self._put_beside(file, name)
        try:
            Path(f"{self._root}/{name}").hardlink_to(beside)
        finally:
            beside.unlink()

    def _put_beside(self, file: Path, name: str) -> Path:
        """Write to a directory, which unlike a store shows a file while it is written: under a hidden name first."""
        target = PurePosixPath(self._root, name)
        beside = target.with_name(f".{target.name}.{lock.writer_name()}.unfinished")
        self._files.put_file(str(file), str(beside))
        return Path(beside)

    def _ask(self, name: str, what: Callable[[], T]) -> T:
        """Call until it succeeds.

        Raises:
            FileNotFoundError, FileExistsError: as raised by the store.
            OSError: if the local disk is full.
        """
        for number, delay in enumerate([*_DELAYS, None]):
            try:
                return what()
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # every library raises its own exceptions, with no common base
                reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
                if _code(error)[0] == "PreconditionFailed":
                    raise FileExistsError(name) from None
                if isinstance(error, OSError) and error.errno in _NO_SPACE:
                    raise
                if type(error).__name__ in _NO_CREDENTIALS:
                    raise InputError(
                        f"store: {self.url}: no credentials ({reason}); they come from the environment (AWS_ACCESS_KEY_ID, "
                        "GOOGLE_APPLICATION_CREDENTIALS, …) or the files of the cloud's own tools"
                    ) from None
                if _is_refusal(error):
                    raise InputError(f"store: {self.url}/{name}: refused: {reason}") from None
                if delay is None:
                    raise RemoteError(
                        f"{self.url}/{name}: {reason}; finished work is kept locally; run the same command to continue"
                    ) from error
                if number == 0:
                    say("store", f"{self.url}/{name}: {reason}; retrying for {sum(_DELAYS) / 60:.0f} minutes")
                time.sleep(delay)
        raise AssertionError


def _code(error: BaseException) -> tuple[str, int]:
    """S3's code for an error, and its HTTP status; empty and 0 for other errors."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return "", 0
    return str(response.get("Error", {}).get("Code", "")), int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_refusal(error: Exception) -> bool:
    """Whether the same call would fail again."""
    code, status = _code(error)
    refused = (400 <= status < 500 and status not in (408, 409, 429) and code not in _TRANSIENT) or status == 501
    return refused or isinstance(error, PermissionError) or type(error).__name__ == "ParamValidationError"
