import hashlib
import multiprocessing
import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from llmdistill.config.machine import Precision
from llmdistill.errors import InputError
from llmdistill.runs import hashes, lock, record
from llmdistill.runs.files import new_directory, read_json
from llmdistill.runs.inputs import hub_commits, model_fingerprint

SETTINGS = {"generate": {"temperature": 1.0, "samples": 1}, "teacher": {"engine_args": {"max_num_seqs": 1}}}
INPUTS = {"prompts.jsonl": "hash"}


def changed(**generate):
    return SETTINGS | {"generate": SETTINGS["generate"] | generate}


@pytest.fixture
def started(tmp_path):
    """A directory with an unfinished stage and one thing that it has finished."""
    assert record.claim(tmp_path / "data", "generate", SETTINGS, INPUTS) == "new"
    record.begin(tmp_path / "data", "generate", SETTINGS, INPUTS, seed=3)
    (tmp_path / "data/shard").write_text("work")
    return tmp_path / "data"


def test_the_life_of_a_stage(started):
    assert record.claim(started, "generate", SETTINGS, INPUTS) == "resume"
    record.finish(started, {"rows": 5})
    assert record.claim(started, "generate", SETTINGS, INPUTS) == "done"
    run = read_json(started / "run.json")
    assert (run["status"], run["seed"], run["results"]) == ("done", 3, {"rows": 5})
    assert run["versions"]["python"]


def test_other_settings_and_other_inputs_are_refused_with_the_difference(started):
    with pytest.raises(InputError, match=r"generate.temperature was 1.0, is 0.5"):
        record.claim(started, "generate", changed(temperature=0.5), INPUTS)
    with pytest.raises(InputError, match=r'input.prompts.jsonl was "hash", is "other"'):
        record.claim(started, "generate", SETTINGS, {"prompts.jsonl": "other"})


def test_files_are_known_by_their_content(tmp_path):
    """An experiment may be moved, and a model copied to a local disk; settings that name another file are other settings."""
    settings = {"teacher": {"model": "hub/teacher"}, "train": {"mix": {"datasets": ["a", "b"]}, "seed": "x"}}
    inputs = {"hub/teacher": "1", "runs/curated/dataset.json": "2", "a/dataset.json": "3", "b/dataset.json": "4"}
    record.begin(tmp_path / "student", "train", settings, inputs, seed=0)
    (tmp_path / "student/checkpoint").write_text("work")

    def state(datasets=("a", "b"), seed="x", **read):
        now = {"teacher": {"model": "/scratch/7/teacher"}, "train": {"mix": {"datasets": list(datasets)}, "seed": seed}}
        moved = {"/scratch/7/teacher": "1", "/nfs/curated/dataset.json": "2"}
        mixed = {f"{name}/dataset.json": {"a": "3"}.get(name, "4") for name in datasets}
        return record.claim(tmp_path / "student", "train", now, moved | mixed | read)

    assert state() == state(("a", "/nfs/b")) == "resume"
    for other, said in (
        (
            {"/scratch/7/teacher": "5"},
            'teacher.model was "hub/teacher", is "/scratch/7/teacher"; input./scratch/7/teacher was null',
        ),
        ({"/nfs/curated/dataset.json": "5"}, "input./nfs/curated/dataset.json was null"),
        ({"a/dataset.json": "5"}, 'input.a/dataset.json was "3", is "5"'),
        ({"more.json": "2"}, 'input.more.json was null, is "2"'),
        ({"datasets": ("b", "a")}, "train.mix.datasets was"),
        ({"datasets": ("/nfs/b", "a")}, "train.mix.datasets was"),
        ({"seed": "y"}, 'train.seed was "x", is "y"'),
    ):
        with pytest.raises(record.StaleError, match=re.escape(said)):
            state(**other)


def test_how_fast_it_runs_may_change(started):
    for speed in ({"max_num_seqs": 2}, {}, {"compilation_config": {"level": 3}}):
        assert record.claim(started, "generate", SETTINGS | {"teacher": {"engine_args": speed}}, INPUTS) == "resume"
    with pytest.raises(record.StaleError, match=r"teacher\.engine_args\.quantization was null, is \"fp8\""):
        record.claim(started, "generate", SETTINGS | {"teacher": {"engine_args": {"quantization": "fp8"}}}, INPUTS)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"compare_text_only": True, "compare_examples": {"task": "t", "file": "f"}}, "resume"),
        ({"args": {"save_steps": 5, "save_total_limit": 1, "logging_steps": 9, "dataloader_num_workers": 2}}, "resume"),
        ({"args": {"learning_rate": 1.0}}, "train.args.learning_rate was null, is 1.0"),
        ({"validation": 0.1}, "train.validation was null, is 0.1"),
        ({"validation": 0.1, "args": {"save_steps": 5}}, "train.args.save_steps was null, is 5; train.validation"),
    ],
)
def test_a_student_does_not_depend_on_what_is_logged_saved_and_compared(tmp_path, changes, state):
    settings = {"compare_text_only": False, "compare_examples": None, "validation": None, "args": {}}
    record.begin(tmp_path / "student", "train", {"train": settings}, INPUTS, seed=3)
    (tmp_path / "student/checkpoint").write_text("work")

    def claimed():
        return record.claim(tmp_path / "student", "train", {"train": settings | changes}, INPUTS)

    if state == "resume":
        assert claimed() == state
    else:
        with pytest.raises(record.StaleError, match=re.escape(state)):
            claimed()


def test_how_fast_one_of_several_teachers_runs_may_change(tmp_path):
    several = {"teachers": {"math": {"model": "a", "url": "http://one", "engine_args": {}}, "code": {"model": "b"}}}
    record.begin(tmp_path / "data", "generate", several, INPUTS, seed=3)
    (tmp_path / "data/shard").write_text("work")
    moved = {
        "teachers": {"math": {"model": "a", "url": "http://two", "engine_args": {"max_num_seqs": 1}}, "code": {"model": "b"}}
    }
    assert record.claim(tmp_path / "data", "generate", moved, INPUTS) == "resume"
    other = {"teachers": {"math": {"model": "c"}, "code": {"model": "b"}}}
    with pytest.raises(InputError, match=r'teachers.math.model was "a", is "c"'):
        record.claim(tmp_path / "data", "generate", other, INPUTS)


def test_an_empty_directory_is_no_work(tmp_path):
    record.begin(tmp_path / "student", "train", SETTINGS, INPUTS, seed=3)
    (tmp_path / "student/checkpoints").mkdir()
    record.forget_begun(tmp_path / "student")
    assert record.claim(tmp_path / "student", "train", changed(temperature=0.5), INPUTS) == "new"


def test_other_work_is_never_touched(started, tmp_path):
    with pytest.raises(InputError, match="contains files not written by `train`"):
        record.claim(started, "train", SETTINGS, INPUTS)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("x")
    with pytest.raises(InputError, match="contains files not written by `generate`"):
        record.claim(tmp_path / "thesis", "generate", SETTINGS, INPUTS)


def test_a_stage_that_stopped_with_nothing_finished_does_not_bind(started):
    """Unless another worker is at it, which nobody but the lock can tell."""
    record.forget_begun(started)
    with pytest.raises(record.StaleError, match=r"generate\.temperature was 1\.0, is 0\.5"):
        record.claim(started, "generate", changed(temperature=0.5), INPUTS)
    (started / "shard").unlink()
    assert record.claim(started, "generate", changed(temperature=0.5), INPUTS) == "new"
    assert record.claim(started, "score", SETTINGS, INPUTS) == "new"
    with pytest.raises(record.StaleError):
        record.begin_computing(started, "generate", changed(temperature=0.5), INPUTS, 3, Precision("float32", "x"))
    record.forget_begun(started)
    assert not started.exists()


def test_what_is_begun_and_refused_is_forgotten(tmp_path):
    def work(error):
        with record.nothing_begun([tmp_path / "eval"]):
            record.begin(tmp_path / "eval", "eval", SETTINGS, INPUTS, seed=3)
            raise error

    with pytest.raises(InputError):
        work(InputError("the weights do not fit"))
    assert not (tmp_path / "eval").exists()
    with pytest.raises(ConnectionError):
        work(ConnectionError())
    assert (tmp_path / "eval/run.json").exists()


def test_a_model_is_known_by_its_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * (20 << 20))
    first = model_fingerprint(str(tmp_path / "a"), None)
    assert first == model_fingerprint(str(tmp_path / "b"), None)
    (tmp_path / "b/run.json").write_text("{}")
    assert first == model_fingerprint(str(tmp_path / "b"), None)
    (tmp_path / "b/config.json").write_text('{"a": 1}')
    assert first != model_fingerprint(str(tmp_path / "b"), None)
    assert model_fingerprint("org/name", "v1") == "org/name@v1"


def test_any_change_of_large_weights_is_seen_and_they_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "model/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(20 << 20))
    first = model_fingerprint(str(weights.parent), None)
    (kept,) = (tmp_path / "cache/llmdistill/hashes").iterdir()
    assert kept.read_text() == hashlib.sha256(bytes(20 << 20)).hexdigest()
    monkeypatch.setattr(hashes, "file_hash", lambda file: pytest.fail("it was read before"))
    assert model_fingerprint(str(weights.parent), None) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with weights.open("r+b") as stream:
        stream.seek(10 << 20)
        stream.write(b"1")
    assert model_fingerprint(str(weights.parent), None) != first


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Lets a branch of a model in the local cache of the Hub point to a commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def point(commit, branch="main"):
        model = tmp_path / "hub/models--org--name"
        (model / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (model / "snapshots" / commit / "config.json").write_text("{}")
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / branch).write_text(commit)

    return point


def test_two_commits_of_a_model_are_not_mixed(tmp_path, hub):
    data, old, new = tmp_path / "data", "a" * 40, "b" * 40
    settings, inputs = {"teacher": {"model": "org/name", "revision": None}}, {"org/name": "org/name@main"}
    assert hub_commits(inputs) == {}, "it was not downloaded yet"
    hub(old)
    record.begin(data, "generate", settings, inputs, seed=3)
    assert read_json(data / "run.json")["commits"] == {"org/name": old}
    (data / "shard").write_text("work")
    hub(new)
    for go_on in (record.claim, lambda *claim: record.begin(*claim, seed=3)):
        with pytest.raises(record.StaleError, match=f"org/name was commit {old}, is {new}"):
            go_on(data, "generate", settings, inputs)
    pinned = {"teacher": {"model": "org/name", "revision": old}}, {"org/name": f"org/name@{old}"}
    assert record.claim(data, "generate", *pinned) == "resume"
    other = {"teacher": {"model": "org/name", "revision": new}}, {"org/name": f"org/name@{new}"}
    with pytest.raises(record.StaleError, match=r"teacher\.revision was null"):
        record.claim(data, "generate", *other)
    record.finish(data, {})
    assert record.claim(data, "generate", settings, inputs) == "done", "what is finished is of one commit"


def test_the_versions_of_every_try_are_kept(tmp_path, monkeypatch):
    for version in ("1", "1", "2", "1", "3"):
        monkeypatch.setattr(record, "versions", lambda version=version: {"torch": version})
        record.begin(tmp_path, "generate", SETTINGS, INPUTS, seed=3)
    run = read_json(tmp_path / "run.json")
    assert run["versions"] == {"torch": "3"}
    assert [made["versions"]["torch"] for made in run["earlier"]] == ["1", "2"]


def test_a_stage_that_was_killed_while_it_claimed_its_directory_can_begin(tmp_path):
    (tmp_path / ".run.json.host-1.unfinished").write_text('{"stage": "gen')
    assert record.claim(tmp_path, "generate", SETTINGS, INPUTS) == "new"


def test_a_new_directory_appears_whole_or_not_at_all(tmp_path):
    def write(path, fails):
        with new_directory(path) as unfinished:
            (unfinished / "file").touch()
            assert not (path / "file").exists()
            if fails:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a/b", fails=True)
    assert not list((tmp_path / "a").iterdir())
    leftover = tmp_path / f"a/.b.{lock.writer_name()}.unfinished"  # of a killed process
    leftover.mkdir()
    (tmp_path / "a/b").mkdir()  # empty: as good as not there
    write(tmp_path / "a/b", fails=False)
    assert [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*")] == [Path("b"), Path("b/file")]
    with pytest.raises(InputError, match="b: exists and is not empty"):
        write(tmp_path / "a/b", fails=False)
    with pytest.raises(InputError, match="file: exists and is not empty"):
        write(tmp_path / "a/b/file", fails=False)
    with pytest.raises(InputError, match="inside: cannot be written"):
        write(tmp_path / "a/b/file/inside", fails=False)


BFLOAT16 = Precision("bfloat16", "this processor has bfloat16 instructions (AMX)")
FLOAT32 = Precision("float32", "this processor has no bfloat16 instructions")


def test_who_begins_decides_on_the_precision(tmp_path, capsys):
    """Another machine follows, and says so; other settings are other work."""
    first = record.begin_computing(tmp_path, "generate", {"seed": 1}, {}, 1, BFLOAT16)
    assert first == BFLOAT16
    assert read_json(tmp_path / "run.json")["precision"] == {"dtype": "bfloat16", "reason": BFLOAT16.reason}
    second = record.begin_computing(tmp_path, "generate", {"seed": 1}, {}, 1, FLOAT32)
    assert second.dtype == "bfloat16"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"generate  computes in {BFLOAT16}"
    assert said[1] == f"generate  computes in bfloat16: as {tmp_path} was started; here it would be {FLOAT32}"
    with pytest.raises(record.StaleError, match="seed was 1, is 2"):
        record.begin_computing(tmp_path, "generate", {"seed": 2}, {}, 1, FLOAT32)


def test_a_finished_directory_can_be_moved(tmp_path):
    record.begin_computing(tmp_path, "generate", {"teacher": {"dtype": "auto"}}, {}, 1, BFLOAT16)
    record.finish(tmp_path, {})
    assert record.claim(tmp_path, "generate", {"teacher": {"dtype": "auto"}}, {}) == "done"


def _begin(directory, precision):
    return record.begin_computing(directory, "score", {}, {}, 1, precision)


def test_one_of_many_that_begin_at_once_decides(tmp_path):
    """Each of them thinks that it is the first."""
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_begin, [tmp_path] * 8, [BFLOAT16, FLOAT32] * 4))
    (dtype,) = {precision.dtype for precision in found}
    assert read_json(tmp_path / "run.json")["precision"]["dtype"] == dtype


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "run.json: the whole must be a mapping, got "),
        ('{"status": "done"}', "run.json: stage must be text, got nothing"),
        ('{"stage": 3, "status": "done"}', "run.json: stage must be text, got 3"),
        ('{"stage": "x", "status": "done", "settings": []}', "run.json: settings must be a mapping"),
        ("{", "run.json: cannot be read as JSON"),
        ("[" * 100_000, "run.json: cannot be read as JSON"),
    ],
)
def test_a_record_of_another_shape_is_named(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    for look in (record.read_run, lambda directory: record.claim(directory, "generate", SETTINGS, INPUTS), record.forget_begun):
        with pytest.raises(InputError) as error:
            look(tmp_path)
        assert message in str(error.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="it needs the right to mount a file system")
def test_a_mount_point_is_filled_and_not_replaced(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("this machine does not let a file system be mounted")
    try:
        with new_directory(place) as unfinished:
            (unfinished / "dataset.json").write_text("{}")
            (unfinished / "a").mkdir()
            (unfinished / "a/file").write_text("x")
        assert sorted(path.relative_to(place).as_posix() for path in place.rglob("*")) == ["a", "a/file", "dataset.json"]
        with pytest.raises(InputError, match="exists and is not empty"), new_directory(place):
            pass
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_what_cannot_be_put_in_its_place_is_not_thrown_away(tmp_path):
    made = []

    def write():
        with new_directory(tmp_path / "out") as unfinished:
            made.append(unfinished)
            (unfinished / "file").write_text("x")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/other").touch()

    with pytest.raises(OSError, match=r"the finished result is in .*/\.out\."):
        write()
    assert (made[0] / "file").read_text() == "x"
