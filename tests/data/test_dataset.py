"""The shard contract: atomic, checksummed, readable without this package, refused when it is not what it was."""

import hashlib
import json
import os
import resource
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from llmdistill import load_dataset
from llmdistill.data import targets
from llmdistill.data.batches import read_batches
from llmdistill.data.inspect import inspect
from llmdistill.data.manifest import read_manifest, write_manifest
from llmdistill.data.rows import Row, rows_to_table
from llmdistill.data.shard_writer import SplitWriter, finished_shards, remove_leftovers, write_shard
from llmdistill.errors import InputError
from llmdistill.runs import lock
from tests import factories

VOCAB = 100
DESCRIPTION = factories.described("topk", VOCAB, k=4) | {
    "teacher": {"model": "org/some-teacher", "commit": "abc", "engine": "vllm"},
    "sampling": {"temperature": 0.7},
}


def _without(key):
    return {name: value for name, value in DESCRIPTION["tokenizer"].items() if name != key}


def make_row(number, length=3):
    generator = np.random.default_rng(number)
    logits = generator.normal(size=(length, VOCAB))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = generator.integers(0, VOCAB, size=length)
    return Row(
        id=f"row{number}",
        prompt=[{"role": "user", "content": f"question {number}"}],
        completion=[{"role": "assistant", "content": f"answer {number}"}],
        prompt_ids=[1, 2, 3 + number],
        completion_ids=ids,
        finish_reason="stop",
        token_logprobs=logprobs[np.arange(length), ids].astype(np.float32),
        targets=factories.most_likely(logprobs, 4),
    )


@pytest.fixture
def directory(tmp_path):
    """Two training shards of three and two rows, and a held-out one."""
    path = tmp_path / "data"
    rows = [make_row(number, 2 + number) for number in range(6)]
    for split, index, count, part in (("train", 0, 2, rows[:3]), ("train", 1, 2, rows[3:5]), ("test", 0, 1, rows[5:])):
        write_shard(path, split, index, count, rows_to_table(part, VOCAB))
    write_manifest(path, finished_shards(path, "train") + finished_shards(path, "test"), DESCRIPTION)
    return path


def test_columns_as_the_format_says(directory):
    row = load_dataset(directory)[1]
    want = make_row(1, 3)
    assert row["id"] == "row1"
    assert row["input_ids"].tolist() == [1, 2, 4, *want.completion_ids]
    assert row["completion_start"] == 3
    assert row["completion_mask"].tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(row["token_logprobs"], want.token_logprobs)
    assert row["target_ids"].reshape(3, 4).tolist() == want.targets.ids_NK.tolist()
    np.testing.assert_array_equal(row["target_tail"], want.targets.tail_N)
    assert read_manifest(directory)["completion_tokens"] == 2 + 3 + 4 + 5 + 6 + 7


def test_datasets_opens_it_without_this_package(directory):
    found = datasets.load_dataset("parquet", data_dir=str(directory), cache_dir=str(directory / "cache"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 5, "test": 1}
    assert found["train"][0]["prompt"] == [{"role": "user", "content": "question 0"}]


def test_the_card_says_what_it_is_and_the_names_of_the_files_are_the_splits(directory):
    card = (directory / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["llmdistill", "distillation", "synthetic"]
    (directory / "rejected.parquet").write_bytes(b"of no split")
    for fact in ("`org/some-teacher` at `abc`", "temperature 0.7", "the 4 most likely tokens", "| rows | 6 |"):
        assert fact in card
    found = datasets.load_dataset(str(directory), cache_dir=str(directory / "cache"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 5, "test": 1}


def test_datasets_does_not_take_one_directory_for_another_of_its_name(tmp_path):
    """Nor for what it held before: the cache of `datasets` is shared by all that a user opens."""

    def opened(place, number):
        directory = factories.write_rows(tmp_path / place / "curated", [make_row(number, 3)], "topk", VOCAB, k=4)
        return datasets.load_dataset(str(directory), split="train", cache_dir=str(tmp_path / "cache"))["prompt"][0][0]["content"]

    assert [opened("a", 1), opened("b", 2)] == ["question 1", "question 2"]
    shutil.rmtree(tmp_path / "a")
    assert opened("a", 3) == "question 3"


def test_the_same_rows_give_the_same_bytes(directory, tmp_path):
    again = write_shard(tmp_path / "again", "train", 0, 2, rows_to_table([make_row(n, 2 + n) for n in range(3)], VOCAB))
    assert again.file.name == finished_shards(directory, "train")[0].file.name


def test_a_flipped_bit_is_found_and_named(directory):
    file = finished_shards(directory, "train")[1].file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file.name}: the checksum does not match"):
        load_dataset(directory)


def test_a_flipped_bit_is_found_by_reading_too(directory):
    """Every page has a checksum of its own: what was not verified as a whole is not read in silence either."""
    shard = finished_shards(directory, "train")[1]
    content = bytearray(shard.file.read_bytes())
    content[200] ^= 1
    shard.file.write_bytes(content)
    with pytest.raises(InputError, match=f"{shard.file.name}: cannot be read"):
        list(read_batches([shard.file]))


def test_a_truncated_and_a_missing_shard(directory):
    file = finished_shards(directory, "train")[0].file
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match=f"{file.name}: the checksum does not match"):
        load_dataset(directory)
    file.unlink()
    with pytest.raises(InputError, match=f"{file.name}: the shard is missing"):
        load_dataset(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version is 99"),
        ({"format": "other"}, "schema_version is"),
        (
            {"targets": {"kind": "of tomorrow"}},
            "targets.kind is 'of tomorrow', this version reads sampled, sampled_logprobs, sampled_by_student, multinomial, topk",
        ),
    ],
)
def test_another_schema_is_refused(directory, change, message):
    manifest = json.loads((directory / "dataset.json").read_text())
    (directory / "dataset.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(InputError, match=f"dataset.json: {message}"):
        load_dataset(directory)


def test_no_dataset_and_an_unfinished_one(tmp_path):
    with pytest.raises(InputError, match="no such dataset"):
        load_dataset(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no dataset.json"):
        load_dataset(tmp_path)
    (tmp_path / "run.json").write_text('{"stage": "generate", "status": "unfinished"}')
    with pytest.raises(InputError, match="not finished; run `generate` again"):
        load_dataset(tmp_path)


def test_of_two_workers_at_the_same_shard_the_first_stays(directory):
    before = {shard.file: shard.file.stat().st_mtime_ns for shard in finished_shards(directory, "train")}
    write_shard(directory, "train", 0, 2, rows_to_table([make_row(99)], VOCAB))
    assert {file: file.stat().st_mtime_ns for file in directory.glob("train-*")} == before
    assert not list(directory.glob(".*unfinished"))


def test_doubles_that_appeared_at_the_same_moment_are_removed_by_the_manifest(directory):
    shards = finished_shards(directory, "train") + finished_shards(directory, "test")
    double = directory / f"train-00000-of-00002-{'f' * 16}.parquet"
    double.write_bytes(shards[0].file.read_bytes())
    assert finished_shards(directory, "train") == shards[:2]
    write_manifest(directory, shards, DESCRIPTION)
    assert not double.exists()
    assert len(load_dataset(directory)) == 5


def test_only_leftovers_of_dead_writers_are_removed(directory):
    """Whatever the host and the process are called: what a living process marks is its own."""
    dead, alive = (directory / f".train-0000{number}.{lock.writer_name()}.unfinished" for number in range(2))
    elsewhere = directory / f".train-00002.{'f' * 24}.unfinished"  # a disk may not show the locks of another machine
    for file in (dead, elsewhere):
        file.write_bytes(b"half a shard")
    mark = lock.begin(alive)
    remove_leftovers(directory)
    assert (dead.exists(), alive.exists(), elsewhere.exists()) == (False, True, True)
    os.close(mark)
    remove_leftovers(directory)
    assert not alive.exists()


def test_a_shard_that_cannot_be_written_leaves_nothing_and_names_the_file(tmp_path):
    """A limit on file sizes fails as a full disk does: in the middle of a write."""
    table = rows_to_table([make_row(number, 60) for number in range(200)], VOCAB)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_shard(tmp_path, "train", 0, 1, table)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(error.value.filename).startswith(f"{tmp_path}/.train-00000")
    assert not list(tmp_path.iterdir())
    assert write_shard(tmp_path, "train", 0, 1, table).file.exists()


def test_a_split_is_streamed_into_shards_of_a_size(tmp_path):
    tables = [rows_to_table([make_row(10 * part + n, 40) for n in range(10)], VOCAB) for part in range(300)]
    writer = SplitWriter(tmp_path, "train", shard_bytes=200_000)
    for table in tables:
        writer.write(table)
    assert not list(tmp_path.glob("train-*")), "a shard is there before all are whole"
    shards = writer.publish()
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert {shard.count for shard in shards} == {len(shards)}
    assert len(shards) > 2
    ids = [row for batch in read_batches([shard.file for shard in shards], ["id"]) for row in batch["id"].to_pylist()]
    assert ids == [f"row{number}" for number in range(3000)]


def test_text_only_rows(tmp_path):
    rows = [Row(**{**vars(make_row(number)), "targets": None}) for number in range(2)]
    table = rows_to_table(rows, VOCAB)
    assert not [name for name in table.column_names if name.startswith("target")]
    shard = write_shard(tmp_path, "train", 0, 1, table)
    assert pq.read_table(shard.file).num_rows == 2


def test_there_may_be_more_than_99_999_shards(directory, tmp_path):
    """The name is as long as the numbers are."""
    first = finished_shards(directory, "train")[0]
    for index in (7, 100_000):
        shutil.copy(first.file, tmp_path / f"train-{index:05d}-of-100001-{first.checksum}.parquet")
    assert [(shard.index, shard.count) for shard in finished_shards(tmp_path, "train")] == [(7, 100_001), (100_000, 100_001)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": {}}, "dataset.json: shards must be a list"),
        ({"shards": [1]}, r"dataset.json: shards\.0 must be a mapping, got 1"),
        ({"shards": [{"file": "x"}]}, r"dataset.json: shards\.0\.split must be text, got nothing"),
        ({"targets": None}, "dataset.json: targets must be a mapping, got null"),
        ({"teacher": "x"}, "dataset.json: teacher must be a mapping"),
        ({"teacher": {"model": "t"}}, r"dataset.json: teacher\.engine must be text, got nothing"),
        ({"shards": []}, "dataset.json: shards is empty"),
        ({"targets": {"kind": ["topk"]}}, r"dataset.json: targets\.kind must be text"),
        ({"targets": {"kind": "topk"}}, r"dataset.json: targets\.k must be an integer, got nothing"),
        ({"tokenizer": None}, "dataset.json: tokenizer must be a mapping, got null"),
        ({"tokenizer": {"vocab_size": "100"}}, r"dataset.json: tokenizer\.vocab_size must be an integer, got \"100\""),
        ({"tokenizer": _without("chat_template")}, r"dataset.json: tokenizer\.chat_template must be present, even if null"),
        ({"teacher_tokenizer": {}}, r"dataset.json: teacher_tokenizer\.vocab_size must be an integer, got nothing"),
        ({"rows": None}, "dataset.json: rows must be an integer, got null"),
        ({"determinism": 1}, "dataset.json: determinism must be text, got 1"),
        ({"steps": []}, "dataset.json: rows_in must be an integer, got nothing"),
        ({"rows_in": 6, "steps": [{"name": "a", "kept": 6}]}, r"dataset.json: steps\.0\.rows_in must be an integer"),
        ({"alignment": {}}, "dataset.json: student must be a mapping, got nothing"),
        ({"alignment": {"soft": 1}, "student": {"model": "s"}}, r"dataset.json: alignment\.positions must be an integer"),
    ],
)
def test_a_manifest_of_another_shape_is_named(directory, change, message):
    manifest = json.loads((directory / "dataset.json").read_text())
    (directory / "dataset.json").write_text(json.dumps(manifest | change))
    with pytest.raises(InputError, match=message):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards: shards[0].pop("target_bytes"), r"shards\.0\.target_bytes must be an integer, got nothing"),
        (lambda shards: shards[1].update(rows=-1), r"shards\.1\.rows is -1, must be at least 0"),
        (lambda shards: shards[0].update(split="test"), r"shards\.0\.split is 'test', but the file is train-00000-of"),
        (lambda shards: shards[1].update(shards[0]), r"shards\.1\.file is train-00000-of-.*, which is listed twice"),
    ],
)
def test_what_a_manifest_cannot_say_of_a_shard_is_named(directory, change, message):
    manifest = json.loads((directory / "dataset.json").read_text())
    change(manifest["shards"])
    (directory / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"dataset\.json: {message}"):
        read_manifest(directory)


def test_a_shard_is_not_looked_for_elsewhere(directory):
    manifest = json.loads((directory / "dataset.json").read_text())
    manifest["shards"][0]["file"] = "../../etc/passwd"
    (directory / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="which is not the name of a shard"):
        read_manifest(directory)


def rewritten(directory, change):
    """The first shard with other rows and a right checksum, as somebody else may have made it."""
    manifest = json.loads((directory / "dataset.json").read_text())
    entry = manifest["shards"][0]
    table = change(pq.read_table(directory / entry["file"]))
    new = directory / "new.parquet"
    pq.write_table(table, new)
    checksum = hashlib.sha256(new.read_bytes()).hexdigest()[:16]
    entry["file"] = f"{entry['file'][:-24]}{checksum}.parquet"
    new.rename(directory / entry["file"])
    (directory / "dataset.json").write_text(json.dumps(manifest))


def with_column(table, name, values):
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type))


def all_ids(table, token):
    return with_column(table, "input_ids", [[token] * len(ids) for ids in table["input_ids"].to_pylist()])


def starts(table, values):
    return with_column(table, "completion_start", values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: all_ids(t, VOCAB), "row 0: the token id 100 is outside"),
        (lambda t: all_ids(t, -1), "row 0: the token id -1 is outside"),
        (lambda t: starts(t, [*t["completion_start"].to_pylist()[:-1], 10**6]), "completion_start is not a position"),
        (lambda t: starts(t, [None] * len(t)), "row 0: completion_start is not a position"),
        (lambda t: with_column(t, "token_logprobs", [[]] * len(t)), "row 0: token_logprobs does not have one value"),
        (lambda t: with_column(t, "completion", [[], *t["completion"].to_pylist()[1:]]), "row 0: completion has 0 messages"),
        (
            lambda t: with_column(t, "completion", [2 * turns for turns in t["completion"].to_pylist()]),
            "completion has 2 messages",
        ),
        (lambda t: t.drop_columns(["metadata"]), "has no column metadata"),
        (lambda t: t.slice(0, 0), "has no rows"),
    ],
)
def test_rows_that_no_teacher_wrote_are_named(directory, change, message):
    """With a right checksum: `inspect --verify` and training say the file and the row."""
    rewritten(directory, change)
    with pytest.raises(InputError, match=rf"train-00000-of-.*\.parquet: .*{message}"):
        load_dataset(directory)
    with pytest.raises(InputError, match=message):
        inspect(directory, verify=True)


@pytest.mark.parametrize("tokens", [1, 14, 1 << 16])
def test_a_row_is_named_however_few_are_read_at_once(directory, monkeypatch, tokens):
    monkeypatch.setattr("llmdistill.data.batches.TOKENS_AT_ONCE", tokens)
    rewritten(directory, lambda t: with_column(t, "target_tail", [*t["target_tail"].to_pylist()[:2], [9.0] * 4]))
    with pytest.raises(InputError, match="row 2: target_tail holds 9"):
        load_dataset(directory)


def first(value, place=0):
    """The first row's list with another value at a place."""

    def change(lists):
        lists[0][place] = value
        return lists

    return change


def shorter(lists):
    return [lists[0][:-1], *lists[1:]]


def moved(lists):
    """The last value of the first row is the first of the second: as many in all, but not in each."""
    return [lists[0][:-1], [lists[0][-1], *lists[1]], *lists[2:]]


def raised(lists):
    """Probabilities that are three times as large together."""
    return [[min(value + np.log(3), 0) for value in values] for values in lists]


def certain(lists):
    return [[0.0] * len(values) for values in lists]


def repeated(lists):
    lists[0][1] = lists[0][0]
    return lists


KINDS = ("sampled", "topk", "sampled_logprobs", "multinomial")
BAD = [
    *((kind, "target_ids", first(60_000), "outside the vocabulary") for kind in KINDS),
    *((kind, "target_ids", shorter, "") for kind in KINDS),
    *((kind, "target_logprobs", first(np.nan), "target_logprobs holds nan") for kind in ("sampled", "topk", "sampled_logprobs")),
    *((kind, "target_logprobs", first(5.0), "target_logprobs holds 5") for kind in ("sampled", "topk", "sampled_logprobs")),
    *((kind, "target_logprobs", first(None), "has a null") for kind in ("sampled", "topk", "sampled_logprobs")),
    *((kind, "target_logprobs", moved, "row 0: target_logprobs has") for kind in ("sampled", "topk", "sampled_logprobs")),
    ("multinomial", "target_counts", moved, "row 0: target_counts has"),
    ("topk", "target_logprobs", raised, "the probabilities in target_logprobs and target_tail add up to"),
    ("topk", "target_tail", certain, "row 0: the probabilities in target_logprobs"),
    ("sampled", "target_logprobs", certain, "row 0: the probabilities in target_logprobs"),
    ("sampled_logprobs", "target_logprobs", certain, "row 0: the probabilities in target_logprobs"),
    ("topk", "target_ids", repeated, "row 0: target_ids contains a token twice"),
    *(("topk", "target_tail", first(value), "target_tail holds") for value in (np.nan, -5.0, 1e9)),
    ("topk", "target_tail", shorter, "row 0: target_tail does not have one value"),
    *((kind, "target_exact", first(value), "") for kind in ("sampled", "sampled_logprobs") for value in (4, 200)),
    ("sampled", "target_exact", shorter, "row 0: target_exact does not have one value"),
    ("sampled", "target_entropy", first(np.nan), "target_entropy holds nan"),
    ("multinomial", "target_entropy", first(np.inf), "target_entropy holds inf"),
    ("multinomial", "target_distinct", first(9), ""),
    ("topk", "token_logprobs", first(5.0), "token_logprobs has an invalid log-probability"),
    ("topk", "metadata", lambda rows: ["{", *rows[1:]], "row 0: metadata is not a JSON object"),
    ("topk", "metadata", lambda rows: ["[]", *rows[1:]], "row 0: metadata is not a JSON object"),
    ("topk", "metadata", lambda rows: [None, *rows[1:]], "row 0: metadata is not a JSON object"),
    ("topk", "finish_reason", lambda rows: [None, *rows[1:]], "the column finish_reason has a null"),
    ("topk", "completion", lambda rows: [[{"role": None, "content": "x"}], *rows[1:]], "the column completion has a null"),
    ("topk", "completion_start", lambda rows: [0, *rows[1:]], "row 0: completion_start is not a position"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "column", "change", "message"), BAD)
def test_targets_that_no_teacher_has_told_are_refused_before_they_are_learned(tmp_path, kind, column, change, message):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for name, length in (("a", 5), ("b", 3)):
        logprobs = (2 * torch.randn(length, VOCAB, generator=generator)).log_softmax(-1)
        of = targets.KINDS[kind]
        ids = of.keep(logprobs, 4, torch.rand(length, of.uniforms(4), generator=generator, dtype=torch.float64))
        soft = of.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
        rows.append(factories.make_row(name, [1, 2], np.arange(length), soft=soft))
    factories.write_rows(tmp_path, rows, kind, VOCAB)
    rewritten(tmp_path, lambda table: table)
    assert len(load_dataset(tmp_path)) == 2
    rewritten(tmp_path, lambda table: with_column(table, column, change(table[column].to_pylist())))
    with pytest.raises(InputError, match=rf"train-00000-of-.*\.parquet: .*{message}"):
        load_dataset(tmp_path)


def test_targets_of_which_nothing_is_known_have_all_of_their_mass_outside(tmp_path):
    """As of a token that an endpoint has not shown; without the mass outside, nothing would be left."""
    hidden = targets.TopK(np.full((2, 3), 7), np.full((2, 3), -np.inf, dtype=np.float32), np.ones(2, dtype=np.float32))
    factories.write_rows(tmp_path, [factories.make_row("a", [1, 2], np.arange(2), soft=hidden)], "topk", VOCAB)
    assert len(load_dataset(tmp_path)) == 1
    rewritten(tmp_path, lambda table: with_column(table, "target_tail", [[1.0, 0.0]]))
    with pytest.raises(InputError, match="row 0: the probabilities in target_logprobs and target_tail add up to 0"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("sizes", [[2, 0, 1], [0, 0, 4], [0, 2, 2], [1, 2, 1]])
def test_a_chunk_that_reaches_into_the_one_before_or_another_row_is_refused(tmp_path, sizes):
    def row(name, sizes):
        kept = targets.Chunks(np.empty((3, 0)), np.array(sizes), np.where(np.array(sizes) > 0, -0.5, 0))
        return factories.make_row(name, [1, 2], np.arange(3), soft=kept)

    right = [row("a", [0, 2, 1]), row("b", [0, 0, 3])]
    assert len(load_dataset(factories.write_rows(tmp_path / "right", right, "chunks", VOCAB))) == 2
    factories.write_rows(tmp_path / "wrong", [*right, row("c", sizes)], "chunks", VOCAB)
    with pytest.raises(InputError, match="row 2: target_chunks is"):
        load_dataset(tmp_path / "wrong")


def write_aligned(directory):
    """Two rows as `retokenize` stores them, of 3 and 2 tokens in the student's and of 4 and 2 in the teacher's."""
    generator = np.random.default_rng(0)
    soft = [factories.most_likely(np.log(generator.dirichlet(np.ones(20), size)), 4) for size in (4, 2)]
    rows = [factories.make_row(name, [1, 2], np.arange(size)) for name, size in (("a", 3), ("b", 2))]
    columns = {
        "teacher_ids": pa.array([[1, 2, 3, 4, 5, 19], [1, 6, 7]], pa.list_(pa.int32())),
        "teacher_start": pa.array([2, 1], pa.int32()),
        "target_places": pa.array([[0, -1, 3], [0, 1]], pa.list_(pa.int32())),
    } | targets.TopK.encode(soft, 20)
    table = rows_to_table(rows, 10)
    for name, values in columns.items():
        table = table.append_column(name, values)
    description = factories.described("topk", 10, k=4)
    counts = {"positions": 5, "soft": 4, "inside": 1, "disagree": 0}
    theirs = {"teacher_tokenizer": description["tokenizer"] | {"vocab_size": 20}, "alignment": counts, "student": {"model": "s"}}
    write_manifest(directory, [write_shard(directory, "train", 0, 1, table)], description | theirs)
    return directory


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("target_places", lambda rows: [[0, -1, 4], *rows[1:]], "row 0: target_places has 4, must be from -1 to 3"),
        ("target_places", lambda rows: [rows[0], [-2, 1]], "row 1: target_places has -2, must be from -1 to 1"),
        ("target_places", shorter, "row 0: target_places does not have one value per completion token"),
        ("target_places", lambda rows: [None, *rows[1:]], "row 0: target_places does not have one value per completion token"),
        ("teacher_ids", lambda rows: [rows[0], [1, 6, 20]], "row 1: the token id 20 is outside the vocabulary .teacher_ids"),
        ("teacher_start", lambda rows: [2, 0], "row 1: teacher_start is not a position in teacher_ids after the first"),
        ("teacher_start", lambda rows: [7, 1], "row 0: teacher_start is not a position in teacher_ids after the first"),
        ("target_ids", lambda rows: [[20, *rows[0][1:]], rows[1]], "row 0: target_ids contains a token outside"),
    ],
)
def test_positions_that_the_teachers_text_does_not_have_are_refused(tmp_path, column, change, message):
    assert len(load_dataset(write_aligned(tmp_path))) == 2
    rewritten(tmp_path, lambda table: with_column(table, column, change(table[column].to_pylist())))
    with pytest.raises(InputError, match=rf"train-00000-of-.*\.parquet: {message}"):
        load_dataset(tmp_path)


def test_a_manifest_of_another_kind_than_the_columns_is_refused(directory):
    manifest = json.loads((directory / "dataset.json").read_text())
    (directory / "dataset.json").write_text(json.dumps(manifest | {"targets": {"kind": "multinomial", "n": 4}}))
    with pytest.raises(InputError, match=r"has no column target_\w+, which targets of kind multinomial have"):
        load_dataset(directory)


def test_what_a_model_wrote_does_not_reach_the_terminal_as_commands(directory, capsys):
    evil = "\x1b]0;title\x07\x1b[2J:smile: [bold]x[/bold] \u202egnp.exe"
    messages = [[{"role": "user", "content": evil}]]
    rewritten(directory, lambda t: with_column(t.slice(0, 1), "completion", messages))
    inspect(directory)
    said = capsys.readouterr().out
    assert not any(character in said for character in "\x1b\x07\u202e")
    assert "]0;title[2J:smile: [bold]x[/bold] gnp.exe" in said
