"""Stores as far as a directory can be one; tests/integration/test_store.py has a real S3 server."""

import builtins
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmdistill.config import load_experiment
from llmdistill.data.dataset import load_dataset
from llmdistill.data.manifest import write_manifest
from llmdistill.data.rows import Row, rows_to_table
from llmdistill.data.shard_writer import finished_shards, write_shard
from llmdistill.errors import InputError
from llmdistill.objectstore import copies
from llmdistill.objectstore.copies import SEAL, Copy, bring, keep_checkpoints
from llmdistill.objectstore.shared_shards import SharedShards
from llmdistill.objectstore.store import DamagedError, Store
from llmdistill.runs import lock, record
from llmdistill.runs.files import read_json, write_json
from llmdistill.stages.generate import generate
from llmdistill.workflow.plan import stages
from llmdistill.workflow.refresh import refresh
from tests import factories

ABOUT = factories.described()


@pytest.fixture
def store(tmp_path):
    return Store(f"file://{tmp_path}/store")


def stage_directory(directory, files, status="done", **settings):
    """What a stage leaves."""
    record.begin(directory, "train", settings, {}, 0)
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    if status == "done":
        record.finish(directory, {})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://datasets/me/it", "upload finished results with `llmdistill push`"),
        ("https://host/it", "must begin with s3://, gs:// or file:///"),
        ("runs/store", "must begin with"),
        ("s3://key:hushhush@bucket/run", "credentials are read from the environment"),
        ("s3://bucket/run?token=hushhush", "credentials are read from the environment"),
        ("s3:///run", "must name a bucket"),
        ("file://host/run", "must name a bucket"),
    ],
)
def test_urls_that_are_none_of_a_store(experiment_file, url, message):
    with pytest.raises(InputError, match=message) as refused:
        load_experiment(experiment_file, [("store", url)])
    assert "hushhush" not in str(refused.value)


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest: (_ for _ in ()).throw(ImportError(name)) if name == "gcsfs" else real(name, *rest),
    )
    with pytest.raises(InputError, match=r"needs gcsfs, which is not installed: pip install 'llmdistill\[gcs\]'"):
        Store("gs://bucket/run")


def test_a_refusal_is_not_taken_for_damage(store, monkeypatch):
    def refuse(path):
        raise PermissionError("not yours")

    monkeypatch.setattr(store._files, "cat_file", refuse)
    with pytest.raises(InputError, match="refused: not yours") as refused:
        store.read("run.json")
    assert not isinstance(refused.value, DamagedError)


def test_a_copy_is_fetched_as_it_was_uploaded(store, tmp_path):
    files = {
        "config.json": "{}",
        "adapter/model": "weights",
        "README.md": "card",
        "checkpoints/checkpoint-1/x": "no",
        ".hidden": "no",
    }
    stage_directory(tmp_path / "one/student", files, a=1)
    Copy(store, tmp_path / "one", "student").upload_if_done()
    assert store.names("student").keys() == {"config.json", "adapter/model", "README.md", "run.json", SEAL}
    other = Copy(store, tmp_path / "other", "student")
    other.fetch()
    assert other.is_done_here()
    for name in ("config.json", "adapter/model", "README.md", "run.json"):
        assert (other.directory / name).read_bytes() == (tmp_path / "one/student" / name).read_bytes()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("moment", range(5))
def test_an_upload_that_ends_at_any_moment_leaves_nothing_that_looks_finished(store, tmp_path, monkeypatch, moment, again):
    copy, put, calls = Copy(store, tmp_path / "one", "student"), store.put, []
    if again:  # over what was whole
        stage_directory(copy.directory, {"a": "0", "b": "0", "README.md": "0"})
        copy.upload_if_done()
    stage_directory(copy.directory, {"a": "1", "b": "2", "README.md": "3"})
    record.finish(copy.directory, {"more": 1})

    def killed(file, name):
        calls.append(name)
        if len(calls) > moment:
            raise KeyboardInterrupt
        put(file, name)

    monkeypatch.setattr(store, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        copy.upload_if_done()
    assert copy.seal() is None
    monkeypatch.setattr(store, "put", put)
    copy.upload_if_done()
    assert set(copy.seal()["files"]) == {"a", "b"}
    assert calls[-1] == f"student/{['README.md', 'a', 'b', 'run.json', SEAL][moment]}"


def test_a_fetch_that_ends_at_any_moment_leaves_nothing_that_looks_finished(store, tmp_path, monkeypatch):
    stage_directory(tmp_path / "one/student", {"a": "1", "b": "2"})
    Copy(store, tmp_path / "one", "student").upload_if_done()
    there = tmp_path / "store/student/b"
    there.write_text("3")
    other = Copy(store, tmp_path / "other", "student")
    with pytest.raises(DamagedError, match="student/b"):
        other.fetch()
    assert (other.directory / "a").read_text() == "1"
    assert not other.is_done_here()
    assert record.claim(other.directory, "train", {}, {}) == "resume"
    assert sorted(path.name for path in other.directory.iterdir()) == ["a", "run.json"]
    there.write_text("2")
    other.fetch()
    assert other.is_done_here()


def test_work_that_went_on_replaces_its_copy_and_that_of_another_run_stays(store, tmp_path):
    stage_directory(tmp_path / "one/export", {"a": "1", "old": "2"})
    copy = Copy(store, tmp_path / "one", "export")
    copy.upload_if_done()
    (copy.directory / "old").unlink()
    (copy.directory / "new").write_text("3")
    record.finish(copy.directory, {"more": 1})
    copy.upload_if_done()
    assert store.names("export").keys() == {"a", "new", "run.json", SEAL}
    stage_directory(tmp_path / "other/export", {"a": "5"})
    run = read_json(tmp_path / "other/export/run.json")
    write_json(tmp_path / "other/export/run.json", {**run, "started": "another time"})
    Copy(store, tmp_path / "other", "export").upload_if_done()
    assert (tmp_path / "store/export/a").read_text() == "1"
    stage_directory(tmp_path / "third/export", {"a": "5"}, b=2)
    with pytest.raises(InputError, match="export was made with other settings: b was null, is 2"):
        Copy(store, tmp_path / "third", "export").upload_if_done()


def test_a_copy_that_would_lie_outside_is_refused(store, tmp_path):
    stage_directory(tmp_path / "one/student", {"a": "1"})
    Copy(store, tmp_path / "one", "student").upload_if_done()
    seal = tmp_path / "store/student" / SEAL
    seal.write_text(json.dumps({"run": None, "files": {"../../outside": "0" * 64}}))
    with pytest.raises(InputError, match=r"\.\./\.\./outside would lie outside of it"):
        Copy(store, tmp_path / "other", "student").fetch()


@pytest.mark.parametrize(
    ("directory", "url"),
    [
        ("runs/b/curated", "s3://bucket/x/runs/b/curated"),
        ("runs/a/curated", "s3://bucket/x/runs/a/curated"),
        ("runs/b/rounds/1/student", "s3://bucket/x/runs/b/rounds/1/student"),
        ("elsewhere", "s3://bucket/x/elsewhere"),
        ("../elsewhere", None),
        ("/models/teacher", None),
        ("runs", None),
    ],
)
def test_what_lies_beside_the_output_is_looked_for_beside_its_copy(experiment_file, tmp_path, monkeypatch, directory, url):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(copies, "Store", lambda url: SimpleNamespace(url=url))
    experiment = load_experiment(experiment_file, [("output", "runs/b"), ("store", "s3://bucket/x/runs/b/")])
    found = copies._copy(experiment, Path(directory))
    assert (found and found.url) == url
    assert found is None or found.directory == Path(directory)


def test_where_output_and_store_are_named_apart_nothing_is_looked_for_beside_them(experiment_file, monkeypatch):
    monkeypatch.setattr(copies, "Store", lambda url: SimpleNamespace(url=url))
    experiment = load_experiment(experiment_file, [("output", "runs/b"), ("store", "s3://bucket/b2")])
    assert copies._copy(experiment, Path("runs/b/data")).url == "s3://bucket/b2/data"
    assert copies._copy(experiment, Path("runs/a/data")) is None


def test_each_round_has_its_place_in_the_store(experiment_file):
    experiment = load_experiment(experiment_file, [("output", "runs/b"), ("store", "s3://bucket/b"), ("rounds", "2")])
    written, scored, *_ = (stage for stage in stages(experiment) if stage.round == 2)
    assert written.experiment.store == "s3://bucket/b/rounds/2/written"
    assert scored.experiment.store == "s3://bucket/b/rounds/2"
    for stage_of in (written, scored):
        here = stage_of.experiment
        assert here.output.removeprefix("runs/b") == here.store.removeprefix("s3://bucket/b")


def test_refresh_refuses_a_store(experiment_file):
    experiment = load_experiment(experiment_file, [("store", "s3://bucket/b"), ("refresh", "{}")])
    with pytest.raises(InputError, match=r"refresh does not support store"):
        refresh(experiment)


def shard(directory, index, text):
    """A shard of one row, whose bytes depend on the text."""
    message = [{"role": "user", "content": text}]
    row = Row(text, message, message, [1, 2], np.arange(3), "stop", np.zeros(3), None)
    return write_shard(directory, "train", index, 2, rows_to_table([row], 49152))


def test_two_that_make_the_same_shard_with_other_bytes_end_in_one_dataset(experiment_file, tmp_path):
    """As an engine does that is not exact: both have listed the store before either has uploaded."""
    experiment = load_experiment(experiment_file, [("store", f"file://{tmp_path}/store")])
    workers = []
    for name in ("one", "other"):
        directory = tmp_path / name / "data"
        record.begin(directory, "generate", {"a": 1}, {}, 0)
        workers.append((SharedShards(experiment, directory), directory))
    made = [shard(directory, 0, f"first of {directory.parent.name}") for _, directory in workers]
    for (shared, directory), own in zip(workers, made, strict=True):
        shared.copy.begin()
        shared.copy.store.put(own.file, f"data/{own.file.name}")
        second = shard(directory, 1, f"second of {directory.parent.name}")
        shared.put(second)
        assert second.file.exists() == (directory.parent.name == "one"), "the store had it already"

    def complete(shared, directory):
        write_manifest(directory, finished_shards(directory, "train"), ABOUT)
        shared.decide()
        record.finish(directory, {})
        shared.finish()

    # The first decides on its own shard before it has seen the other's, whatever their names.
    first, directory = workers[0]
    first._fetch([made[0].file.name, finished_shards(directory, "train")[1].file.name])
    complete(first, directory)
    for shared, directory in workers[1:]:
        assert shared.gather(2)
        complete(shared, directory)
    one, other = (load_dataset(directory)["id"] for _, directory in workers)
    assert list(one) == list(other) == ["first of one", "second of one"]
    assert sorted(path.name for path in (tmp_path / "store/data").glob("*.parquet")) == sorted(
        path.name for path in (tmp_path / "other/data").glob("*.parquet")
    )


def test_a_shard_that_is_damaged_or_gone_before_the_dataset_is_complete_is_made_again(experiment_file, tmp_path, capsys):
    experiment = load_experiment(experiment_file, [("store", f"file://{tmp_path}/store")])
    record.begin(tmp_path / "one/data", "generate", {"a": 1}, {}, 0)
    maker, reader = SharedShards(experiment, tmp_path / "one/data"), SharedShards(experiment, tmp_path / "other/data")
    shards = [shard(tmp_path / "one/data", index, str(index)) for index in range(2)]
    for made in shards:
        maker.put(made)
    there = tmp_path / "store/data" / shards[1].file.name
    there.write_bytes(there.read_bytes()[:-1])
    assert not reader.gather(2)
    assert reader.indices() == {0}
    assert f"{shards[1].file.name} is damaged or gone" in capsys.readouterr().out.replace("\n", "")
    maker.put_lacking()
    assert reader.gather(2)
    write_manifest(tmp_path / "one/data", finished_shards(tmp_path / "one/data", "train"), ABOUT)
    maker.decide()
    there.unlink()
    assert reader.gather(2)
    assert not (tmp_path / "store/data/dataset.json").exists(), "what it decided on is not there any more"
    assert reader.indices() == {0}


def checkpoint(student, step, best=None):
    """What the trainer leaves after a step."""
    directory = student / f"checkpoints/checkpoint-{step}"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep/weights").write_text(f"of step {step}")
    state = {"global_step": step, "best_model_checkpoint": best and f"elsewhere/checkpoint-{best}"}
    (directory / "trainer_state.json").write_text(json.dumps(state))


def checkpoints(student):
    return {path.parent.name for path in student.glob("checkpoints/*/trainer_state.json")}


@pytest.mark.parametrize(("limit", "left"), [(None, {2, 4, 6, 8}), (1, {8})])
def test_checkpoints_are_found_again_by_the_newest_whole_one(experiment_file, tmp_path, limit, left):
    changes = [("store", f"file://{tmp_path}/store"), ("output", str(tmp_path / "one"))]
    experiment, student = load_experiment(experiment_file, changes), tmp_path / "one/student"
    record.begin(student, "train", {"a": 1}, {}, 0)
    for step in (2, 4, 6):
        checkpoint(student, step, best=2)
        keep_checkpoints(experiment, student, None)
    checkpoint(student, 10)
    (student / "checkpoints/checkpoint-10/trainer_state.json").unlink()  # it is still being written

    other = load_experiment(experiment_file, [*changes, ("output", str(tmp_path / "other"))])
    bring(other, "train")
    assert checkpoints(tmp_path / "other/student") == {"checkpoint-2", "checkpoint-6"}, "the newest, and the best"
    assert record.claim(tmp_path / "other/student", "train", {"a": 1}, {}) == "resume"
    with pytest.raises(InputError, match="a was 1, is 2"):
        record.claim(tmp_path / "other/student", "train", {"a": 2}, {})

    (tmp_path / "store/student/checkpoints/checkpoint-6/deep/weights").write_text("of another step")
    third = load_experiment(experiment_file, [*changes, ("output", str(tmp_path / "third"))])
    bring(third, "train")
    assert checkpoints(tmp_path / "third/student") == {"checkpoint-2", "checkpoint-4"}, "the newest that is whole"
    assert (tmp_path / "third/student/checkpoints/checkpoint-4/deep/weights").read_text() == "of step 4"

    checkpoint(student, 8)
    if limit:
        for step in (2, 4, 6):
            shutil.rmtree(student / f"checkpoints/checkpoint-{step}")
    keep_checkpoints(experiment, student, limit)
    whole = {path.parent.name for path in (tmp_path / "store/student/checkpoints").glob(f"*/{SEAL}")}
    assert whole == {f"checkpoint-{step}" for step in left}


def test_a_disk_without_locks_has_what_is_in_the_store(experiment_file, tmp_path, monkeypatch):
    """Such as Lustre that was mounted without `flock`."""

    def none(descriptor, kind):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(lock.fcntl, "flock", none)
    changes = [("store", f"file://{tmp_path}/store"), ("output", str(tmp_path / "one"))]
    stage_directory(tmp_path / "other/curated", {"a": "1"})
    Copy(Store(f"file://{tmp_path}/store"), tmp_path / "other", "curated").upload_if_done()
    bring(load_experiment(experiment_file, changes), "train")
    assert (tmp_path / "one/curated/a").read_text() == "1"
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["curated"]


def test_who_only_asks_what_is_missing_has_what_others_have_finished(experiment_file, tmp_path):
    class Plan:
        def part(self, count):
            return range(0)

        def shards(self, name, directory, count):
            self.there = {shard.index for shard in finished_shards(directory, "train")}
            return []

    changes, plan = [("store", f"file://{tmp_path}/store"), ("generate.max_tokens", "2")], Plan()
    generate(load_experiment(experiment_file, changes))
    generate(load_experiment(experiment_file, [*changes, ("output", str(tmp_path / "other"))]), worker=plan)
    assert plan.there == {0, 1, 2, 3}
    assert (tmp_path / "other/data/dataset.json").read_bytes() == (tmp_path / "run/data/dataset.json").read_bytes()


def test_without_a_store_there_is_nothing_to_share(experiment_file, tmp_path):
    shared = SharedShards(load_experiment(experiment_file), tmp_path)
    shared.join("generate", {}, {})
    shared.put(shard(tmp_path, 0, "x"))
    shared.put_lacking()
    shared.decide()
    shared.finish()
    assert shared.indices() == set()
    assert shared.gather(1)
