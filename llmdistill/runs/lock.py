"""Locks on directories that are released with the process that holds them, on local disks and NFS.

The lock of a directory is the file `.NAME.lock` beside it, held by `flock` and removed at the end. It says who holds it.
"""

import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llmdistill.errors import BusyError, InputError
from llmdistill.runs.progress import say
from llmdistill.runs.watch import timestamp

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_TAKEN = ".taken-"
_LONG = 86400.0  # seconds, in which whatever is written has changed
_PATIENCE = 10.0  # seconds for which a first worker may look at what it finds


@contextmanager
def alone(directories: Iterable[Path], stage: str) -> Iterator[None]:
    """Keep other processes out of directories while this one works in them.

    Args:
        directories: what the stage writes.
        stage: its name, for those who find the lock.

    Raises:
        BusyError: another process works in one of them: which, where, since when.
        InputError: there can be no such directory.
    """
    with ExitStack() as held:
        for directory in sorted(directories):
            held.enter_context(_Lock(directory, stage)).take()
        yield


@contextmanager
def among_others(directory: Path, stage: str, forget: Callable[[], None]) -> Iterator[None]:
    """Work in a directory together with other processes of the same stage.

    Args:
        directory: what the stage writes.
        stage: its name, for those who find the lock.
        forget: called if no other process works there, before this one begins and after its input was refused.

    Raises:
        BusyError: another process works there alone.
        InputError: there can be no such directory.
    """
    with _Lock(directory, stage) as lock:
        lock.share(forget)
        try:
            yield
        except InputError:
            lock.call_if_alone(forget)
            raise


def begin(path: Path, directory: bool = False) -> int | None:
    """Create an unfinished file or directory, marked as being written.

    It is shown for as long as the descriptor that this returns is open; None where a disk has no locks.
    """
    while True:
        if directory:
            path.mkdir(parents=True, exist_ok=True)
        # NFSv4 locks only what is open for writing, which a directory cannot be.
        flags = os.O_RDONLY if directory else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                return None
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # somebody took it for abandoned in between


@contextmanager
def written(file: Path) -> Iterator[Path]:
    """A path next to a file, which becomes the file if the block succeeds; otherwise it is deleted."""
    unfinished = file.with_name(f".{file.name}.{writer_name()}.unfinished")
    mark = begin(unfinished)
    try:
        yield unfinished
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        if mark is not None:
            os.close(mark)


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Let processes that each make a file from what they find take turns.

    What is created in a directory makes NFS read its listing anew, so that it shows what the others have made.
    """
    turn = file.with_name(f".{file.name}.turn.unfinished")
    mark = begin(turn)
    try:
        yield
    finally:
        turn.unlink(missing_ok=True)
        if mark is not None:
            os.close(mark)


def writer_name() -> str:
    """What distinguishes the unfinished files of two processes: a sign of the machine, and a random name of the process."""
    return _HOST + _random_of(os.getpid())


@functools.cache
def _random_of(pid: int) -> str:
    return secrets.token_hex(8)


def is_abandoned(path: Path) -> bool:
    """Whether an unfinished file or directory is no longer being written.

    Of another machine's, and on a disk without locks, that is after a day: not every disk shows the locks of others.
    """
    try:
        # Somebody else's file may be only for reading, and a directory is.
        flags = os.O_RDWR if path.is_file() and os.access(path, os.W_OK) else os.O_RDONLY
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        silent = time.time() - os.fstat(descriptor).st_mtime
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tells = _HOST in path.name or path.name.startswith(_TAKEN)  # a mark holds nothing that could be lost
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            return False
        tells = False
    finally:
        os.close(descriptor)
    return tells or silent > _LONG


class InHand:
    """The parts of the work in a directory in progress in this process, so that others start with something else.

    On a disk without locks nobody sees it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "InHand":
        return self

    def take(self, name: str) -> bool:
        """Take a part of the work; returns whether no other process has it."""
        try:
            descriptor = os.open(self._file(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError:  # it is another user's
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                if isinstance(error, BlockingIOError):
                    return False
                raise
        self._descriptors[name] = descriptor
        return True

    def put_down(self, name: str) -> None:
        """Release a part, done or not, if it was taken."""
        if (descriptor := self._descriptors.pop(name, None)) is not None:
            self._file(name).unlink(missing_ok=True)
            os.close(descriptor)

    def _file(self, name: str) -> Path:
        return self._directory / f"{_TAKEN}{name}.unfinished"

    def __exit__(self, *_: object) -> None:
        for name in list(self._descriptors):
            self.put_down(name)


class _Lock:
    """The lock of a directory; none on a disk that does not support it, or that is read-only."""

    def __init__(self, directory: Path, stage: str) -> None:
        self._directory, self._stage = directory, stage
        self._file = directory.parent / f".{directory.name}.lock"
        # Removed again where nothing comes of it.
        self._made = [path for path in self._file.parents if not os.path.lexists(path)]
        self._descriptor: int | None = None

    def __enter__(self) -> "_Lock":
        return self

    def take(self) -> None:
        if self._open() and not self._try(fcntl.LOCK_EX):
            raise BusyError(f"{self._directory}: {self._holder()}")
        self._sign()

    def share(self, first: Callable[[], None]) -> None:
        if not self._open():
            return
        if self._try(fcntl.LOCK_EX):
            if self._descriptor is None:
                return
            first()
            self._sign()
        # Not in one step: another may be the first in between, which is as good.
        end = time.monotonic() + _PATIENCE
        while not self._try(fcntl.LOCK_SH):
            if time.monotonic() > end:
                raise BusyError(f"{self._directory}: {self._holder()}")
            time.sleep(0.05)

    def call_if_alone(self, call: Callable[[], None]) -> None:
        """Call it if no other process shares the lock, which may be lost otherwise."""
        if self._descriptor is not None and self._try(fcntl.LOCK_EX):
            call()

    def _open(self) -> bool:
        """Open the file; returns whether locking is supported."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in _READ_ONLY:  # what cannot be locked cannot be written to
                return False
            raise InputError(f"{self._directory}: cannot be written: {error.strerror}") from None
        return True

    def _try(self, kind: int) -> bool:
        """Whether the lock is available."""
        while True:
            assert self._descriptor is not None
            try:
                fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                say("warning", f"{self._file.parent}: this disk does not support locks; do not start a stage twice there")
                os.close(self._descriptor)
                self._descriptor = None
                return True
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), self._file.stat()):
                    return True
            os.close(self._descriptor)  # its last holder has removed it
            self._open()

    def _sign(self) -> None:
        if self._descriptor is None:
            return
        holder = {"stage": self._stage, "host": platform.node(), "pid": os.getpid()}
        holder["since"] = timestamp()
        with suppress(OSError):  # a full disk, or one that lets locks be had and nothing be written
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _holder(self) -> str:
        try:
            held = json.loads(self._file.read_text(encoding="utf-8"))
            return f"`{held['stage']}` is running here, process {held['pid']} on {held['host']}, since {held['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process is running here"

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # of those that share it the last one removes it
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file.unlink(missing_ok=True)
            os.close(self._descriptor)
        for path in self._made:
            with suppress(OSError):
                path.rmdir()
