"""Several workers on one dataset, and what happens to a shard that is damaged or missing."""

import shutil
import sys
import threading
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.data import shards
from llmdistill.data.manifest import read_manifest
from llmdistill.data.shard_writer import finished_shards, write_shard
from llmdistill.data.shards import Share, is_whole
from llmdistill.errors import InputError
from llmdistill.runs import lock
from llmdistill.runs.inputs import sha256
from llmdistill.runs.record import read_run
from llmdistill.stages.generate import generate


def files(directory):
    return {file.name: file.read_bytes() for file in directory.glob("train-*")}


@pytest.fixture
def experiment(experiment_file):
    return load_experiment(experiment_file)


@pytest.fixture
def undisturbed(experiment_file):
    experiment = load_experiment(experiment_file, [("output", f"{experiment_file.parent}/undisturbed")])
    generate(experiment)
    return files(experiment.directory("data"))


def test_workers_make_together_what_one_makes_alone(experiment, undisturbed, capsys):
    directory = experiment.directory("data")
    for number in (2, 0):
        generate(experiment, worker=Share(number, 3))
        with pytest.raises(InputError, match="not finished"):
            load_dataset(directory)
    assert "3 of 4 shards finished" in capsys.readouterr().out
    generate(experiment, worker=Share(1, 3))
    assert files(directory) == undisturbed
    assert len(load_dataset(directory)) == 24


def no_device(teacher):
    raise AssertionError("this machine was asked what it computes in")


def test_a_worker_with_nothing_to_do_says_so_and_begins_nothing(experiment, monkeypatch, capsys):
    """It may have no accelerator, and what it would compute in is not what those compute in who make the shards."""
    monkeypatch.setattr(shards, "teacher_precision", no_device)
    generate(experiment, worker=Share(4, 5))
    assert "0 of 4 shards finished" in capsys.readouterr().out
    assert not experiment.directory("data").exists()


@pytest.mark.parametrize("stored", [False, True], ids=["on one disk", "by a store"])
def test_what_others_have_begun_is_not_asked_of_this_machine(experiment_file, tmp_path, monkeypatch, stored):
    """Nor where the last shard is there and the dataset has to be completed."""
    places = ["one", "other", "third"] if stored else ["one"] * 3
    changes = [("teacher.dtype", "auto"), *([("store", f"file://{tmp_path}/store")] if stored else [])]
    one, other, third = (load_experiment(experiment_file, [*changes, ("output", f"{tmp_path}/{place}")]) for place in places)
    generate(one, worker=Share(0, 2))
    monkeypatch.setattr(shards, "teacher_precision", no_device)
    monkeypatch.setattr(shards, "write_manifest", lambda *arguments: sys.exit(9))
    with pytest.raises(SystemExit):
        generate(other, worker=Share(1, 2))
    monkeypatch.undo()
    monkeypatch.setattr(shards, "teacher_precision", no_device)
    generate(third, worker=Share(4, 5))
    began = read_run(one.directory("data"))["precision"]
    assert began["dtype"] == "float32"
    assert read_manifest(third.directory("data"))["precision"] == began


@pytest.mark.parametrize(("other", "rows"), [(7, 7), (9, 0)])
def test_shards_that_were_cut_elsewhere_are_refused(experiment, monkeypatch, other, rows):
    """By a version that put what is left over into the last one, or into another number: rows would be lost, or there twice."""
    odd = experiment.with_(generate=experiment.generate.with_(rows_per_shard=7))
    generate(odd, worker=Share(0, 4))
    cut = shards.Layout.__init__

    def elsewhere(self, rows, size):
        cut(self, rows, size)
        self.shards = [(0, range(start, min(start + other, rows[0]))) for start in range(0, rows[0], other)]

    monkeypatch.setattr(shards.Layout, "__init__", elsewhere)
    with pytest.raises(InputError, match=rf"train-00000-of-00004-.*: has 6 rows instead of {rows}: another version"):
        generate(odd)


def test_a_damaged_shard_is_named_and_made_again_when_work_goes_on(experiment, undisturbed, capsys):
    directory = experiment.directory("data")
    generate(experiment, worker=Share(0, 2))
    file = finished_shards(directory, "train")[1].file
    file.write_bytes(file.read_bytes()[:-7])
    generate(experiment)
    assert f"{file} is damaged; making it again" in capsys.readouterr().out.replace("\n", "")
    assert files(directory) == undisturbed


@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda content: content[:200] + b"x" + content[201:]])
def test_a_damaged_shard_of_another_worker_is_not_completed_with(experiment, undisturbed, capsys, damage):
    """Neither one that is no Parquet any more, nor one of which a byte is another."""
    directory = experiment.directory("data")
    generate(experiment, worker=Share(0, 2))
    file = finished_shards(directory, "train")[0].file
    file.write_bytes(damage(file.read_bytes()))
    generate(experiment, worker=Share(1, 2))
    said = capsys.readouterr().out.replace("\n", "")
    assert f"{file} is damaged" in said
    assert "3 of 4 shards finished" in said
    assert not (directory / "dataset.json").exists()
    generate(experiment, worker=Share(0, 2))
    assert files(directory) == undisturbed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "shards must be a list, got nothing"),
        ('{"shards": [{}]}', r"shards\.0\.file must be text"),
        ("[]", "the whole must"),
    ],
)
def test_a_manifest_that_says_no_shards_is_named(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=rf"dataset\.json: {message}"):
        is_whole(tmp_path)


def test_a_shard_that_went_missing_after_the_end_is_made_again(experiment, undisturbed):
    directory = experiment.directory("data")
    generate(experiment)
    finished_shards(directory, "train")[2].file.unlink()
    with pytest.raises(InputError, match="the shard is missing"):
        load_dataset(directory)
    generate(experiment)
    assert files(directory) == undisturbed
    assert len(load_dataset(directory)) == 24


def add_a_double(shard):
    """The same rows in other bytes, under a name that sorts before its own."""
    table, double = pq.read_table(shard.file), shard.file.with_name("double")
    for level in range(1, 20):
        for encoded in (True, False):
            pq.write_table(table, double, compression="zstd", compression_level=level, use_dictionary=encoded)
            if (checksum := sha256(double)[:16]) < shard.checksum:
                double.rename(shard.file.with_name(shard.file.name.replace(shard.checksum, checksum)))
                return
    raise AssertionError("none sorts before it")


def test_two_that_find_all_shards_complete_the_dataset_one_after_another(experiment, monkeypatch):
    """The second has made one of the shards too, with other bytes, and sees both when the first has seen only its own."""
    directory = experiment.directory("data")
    second = threading.Thread(target=generate, args=[experiment])
    write_manifest, begun = shards.write_manifest, []
    gather, gathered = shards.SharedShards.gather, threading.Semaphore(0)

    def gather_and_tell(shared, count):
        if threading.current_thread() is second:
            gathered.release()
        return gather(shared, count)

    def written_late(where, there, description):
        if not begun:
            begun.append(there)
            add_a_double(max(there, key=lambda shard: shard.checksum))
            second.start()
            gathered.acquire()
            gathered.acquire()  # at the start, and when nothing is missing
            second.join(3)
        write_manifest(where, there, description)

    monkeypatch.setattr(shards, "write_manifest", written_late)
    monkeypatch.setattr(shards.SharedShards, "gather", gather_and_tell)
    generate(experiment)
    second.join()
    assert is_whole(directory)
    assert len(load_dataset(directory)) == 24
    assert len(files(directory)) == 4
    assert not [file for file in directory.iterdir() if file.name.endswith(".unfinished")]


def test_a_worker_that_sees_an_old_listing_makes_again_what_is_there(experiment, undisturbed, monkeypatch):
    """As on NFS, where a listing may be as old as this process's own last change to the directory."""
    directory = experiment.directory("data")
    generate(experiment, worker=Share(1, 2))
    listed, begin = {"train": []}, lock.begin

    def listing(where, split):
        return listed.setdefault(split, finished_shards(where, split))

    def changed(path, directory=False):
        listed.clear()
        return begin(path, directory)

    monkeypatch.setattr(shards, "finished_shards", listing)
    monkeypatch.setattr(lock, "begin", changed)
    generate(experiment)
    assert files(directory) == undisturbed
    assert is_whole(directory)


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_a_share_that_is_none(text):
    with pytest.raises(InputError, match="must be like 2/8"):
        Share.parse(text)


def test_two_that_work_at_once_take_different_shards(tmp_path):
    """In step, as on two machines that begin together; what the other has in hand comes last, or not if it is there by then."""
    table = pa.table({"id": ["x"]})

    def finish(index):
        write_shard(tmp_path, "train", index, 6, table)

    with closing(Share(0, 1).shards("a", tmp_path, 6)) as first, closing(Share(0, 1).shards("b", tmp_path, 6)) as second:
        assert [next(first), next(second), next(first)] == [0, 1, 2]
        finish(0)
        assert [next(second), next(second)] == [3, 4]
        finish(3)
        assert next(first) == 5
        finish(1)
        assert list(first) == [4], "the other one may be lost"
        finish(2)
        assert list(second) == [5]
    assert not list(tmp_path.glob(".*"))
    assert list(Share(0, 1).shards("c", tmp_path, 6)) == [4, 5]


def test_a_worker_by_itself_makes_its_shards_in_their_order(tmp_path):
    assert list(Share(1, 3).shards("a", tmp_path, 9)) == [1, 4, 7]


def test_shards_that_others_finish_are_counted_and_not_made(experiment, undisturbed, tmp_path, monkeypatch, capsys):
    """Another worker makes the second shard while this one makes the first."""
    directory, store = experiment.directory("data"), shards._store
    made = []

    def also(making, index, completions, gives):
        if not made:
            (other,) = (tmp_path / "undisturbed/data").glob("train-00001-*")
            shutil.copy(other, directory)
        made.append(index)
        return store(making, index, completions, gives)

    monkeypatch.setattr(shards, "_store", also)
    capsys.readouterr()
    generate(experiment)
    assert made == [0, 2, 3]
    assert files(directory) == undisturbed
    assert "24/24" in capsys.readouterr().out
