"""Locks go with the process that holds them, say who it is, and leave nothing."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmdistill.errors import BusyError, InputError
from llmdistill.runs import lock

HOLDER = """
import sys, time
from pathlib import Path
from llmdistill.runs import lock
directory = Path(sys.argv[1])
held = lock.alone([directory], "curate") if sys.argv[2] == "alone" else lock.among_others(directory, "generate", lambda: None)
with held:
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold():
    """Another process that holds a lock until the test ends."""
    processes = []

    def start(directory, kind):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, directory, kind], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "holds\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_who_works_there_is_named_and_a_killed_one_holds_nothing(hold, tmp_path):
    holder = hold(tmp_path / "run/curated", "alone")
    with (
        pytest.raises(BusyError, match=rf"run/curated: `curate` is running here, process {holder.pid} on \S+, since 2\d{{3}}-"),
        lock.alone([tmp_path / "run/curated"], "curate"),
    ):
        pass
    holder.kill()
    holder.wait()
    with lock.alone([tmp_path / "run/curated", tmp_path / "run/other"], "curate"):
        assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [".curated.lock", ".other.lock"]
    assert not list((tmp_path / "run").iterdir())
    with lock.alone([tmp_path / "new/run/curated"], "curate"):
        pass
    assert not (tmp_path / "new").exists(), "nothing came of it"


def test_workers_share_and_only_the_first_cleans_up(hold, tmp_path):
    cleaned = []
    directory = tmp_path / "data"
    with lock.among_others(directory, "generate", lambda: cleaned.append(1)):
        pass
    assert cleaned == [1]
    hold(directory, "shared")
    with lock.among_others(directory, "generate", lambda: cleaned.append(2)):
        assert cleaned == [1], "another works there"
    with pytest.raises(BusyError, match="`generate` is running here"), lock.alone([directory], "refresh"):
        pass
    assert (tmp_path / ".data.lock").exists(), "the other one still has it"


def test_what_a_refused_worker_began_is_left_to_the_others(hold, tmp_path):
    directory, forgotten = tmp_path / "data", []

    def refused():
        with lock.among_others(directory, "generate", lambda: forgotten.append(1)):
            raise InputError("targets.k: lower it")

    with pytest.raises(InputError):
        refused()
    assert len(forgotten) == 2, "before and after"
    hold(directory, "shared")
    with pytest.raises(InputError):
        refused()
    assert len(forgotten) == 2


def test_a_worker_does_not_join_who_works_alone(hold, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.2)
    hold(tmp_path / "data", "alone")
    with (
        pytest.raises(BusyError, match="`curate` is running here"),
        lock.among_others(tmp_path / "data", "generate", lambda: None),
    ):
        pass


def test_a_place_that_can_be_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written: Not a directory"), lock.alone([tmp_path / "file/run/data"], "score"):
        pass
    with (
        pytest.raises(InputError, match="cannot be written: File name too long"),
        lock.alone([tmp_path / ("x" * 300) / "data"], "score"),
    ):
        pass


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(descriptor, kind):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.alone([tmp_path / "data"], "score"):
        pass
    with lock.among_others(tmp_path / "data", "score", lambda: None):
        pass
    assert "this disk does not support locks; do not start a stage twice there" in capsys.readouterr().out


def test_what_is_written_is_not_abandoned(tmp_path):
    for directory in (False, True):
        path = tmp_path / f"{directory}.{lock.writer_name()}"
        mark = lock.begin(path, directory)
        assert path.is_dir() == directory
        assert not lock.is_abandoned(path), "somebody writes it"
        os.close(mark)
        assert lock.is_abandoned(path)
    assert not lock.is_abandoned(Path("/nowhere/at/all"))


def test_what_is_taken_for_abandoned_as_it_begins_is_made_again(tmp_path, monkeypatch):
    """Between the making of a file and its mark another process may remove it."""
    file, real, taken = tmp_path / lock.writer_name(), lock.fcntl.flock, []

    def slow(descriptor, kind):
        if not taken:
            taken.append(file.unlink())
        real(descriptor, kind)

    monkeypatch.setattr(lock.fcntl, "flock", slow)
    mark = lock.begin(file)
    assert taken
    assert file.exists()
    assert not lock.is_abandoned(file)
    os.close(mark)


def test_without_locks_a_day_without_a_change_is_the_end(tmp_path, monkeypatch):
    def none(descriptor, kind):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(lock.fcntl, "flock", none)
    file = tmp_path / "file"
    assert lock.begin(file) is None
    assert not lock.is_abandoned(file)
    os.utime(file, (time.time() - 2 * lock._LONG,) * 2)
    assert lock.is_abandoned(file)


def test_nfs_is_asked_for_no_lock_that_it_has_not(tmp_path, monkeypatch):
    """NFSv4 makes of `flock` a lock of `fcntl`, which writers alone may have; on directories it locks for this machine."""
    real = fcntl.flock

    def nfs(descriptor, kind):
        can_write = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if kind & fcntl.LOCK_EX and not can_write and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, kind)

    monkeypatch.setattr(lock.fcntl, "flock", nfs)
    test_what_is_written_is_not_abandoned(tmp_path)
    with lock.written(tmp_path / "file") as unfinished:
        assert not lock.is_abandoned(unfinished)
    assert (tmp_path / "file").exists()
    with lock.in_turn(tmp_path / "file"), lock.alone([tmp_path / "data"], "score"), lock.InHand(tmp_path) as hand:
        assert hand.take("0")
    foreign = tmp_path / "of another user"
    foreign.touch()
    monkeypatch.setattr(lock.os, "access", lambda *_: False)
    assert not lock.is_abandoned(foreign), "it may be written, as far as can be told"


def test_what_is_renamed_while_it_is_looked_at_is_not_abandoned(tmp_path, monkeypatch):
    """Of another machine, as far as the name says."""
    file, real = tmp_path / "file", lock.fcntl.flock
    file.touch()

    def slow(descriptor, kind):
        file.unlink()
        real(descriptor, kind)

    monkeypatch.setattr(lock.fcntl, "flock", slow)
    assert not lock.is_abandoned(file)


def test_what_one_has_in_hand_another_does_not_take(tmp_path):
    with lock.InHand(tmp_path) as mine, lock.InHand(tmp_path) as others:
        assert mine.take("0")
        assert not others.take("0")
        assert others.take("1")
        (mark, _) = sorted(tmp_path.iterdir())
        assert not lock.is_abandoned(mark)
        mine.put_down("0")
        mine.put_down("never taken")
        assert others.take("0")
    assert not list(tmp_path.iterdir())
    mark.touch()  # by one that was killed
    assert lock.is_abandoned(mark)


def test_without_locks_all_is_free(tmp_path, monkeypatch):
    def none(descriptor, kind):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.InHand(tmp_path) as mine, lock.InHand(tmp_path) as others:
        assert mine.take("0")
        assert others.take("0")
    assert not list(tmp_path.iterdir())
