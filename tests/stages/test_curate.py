"""The stage as a whole: where every row goes, that it goes there unchanged, and that the account adds up."""

import importlib.util
import itertools
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.config.curate import CurateStep
from llmdistill.curation import judge
from llmdistill.curation.steps import CurationStep, step_named
from llmdistill.data.manifest import read_manifest, write_manifest
from llmdistill.data.rows import Row, rows_to_table
from llmdistill.data.shard_writer import SPLITS, finished_shards, write_shard
from llmdistill.data.subjects import conversation_keys, is_held_out
from llmdistill.errors import InputError
from llmdistill.runs import record
from llmdistill.stages.curate import claims, curate
from tests.conftest import ROOT
from tests.curation.steps import make_experiment
from tests.factories import described, most_likely

VOCAB = 40
SENTENCE = "The tide rises and falls because the moon pulls at the sea and the earth turns under that pull every day, they say."


@pytest.fixture(scope="module")
def tiny(whole_tiny):
    """With the whole vocabulary, in which the judge's question fits into the context."""
    return whole_tiny


def make_row(number, text, prompt=None, length=4, reason="stop", fields=None):
    generator = np.random.default_rng(number)
    logits = generator.normal(size=(length, VOCAB))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = generator.integers(1, VOCAB, size=length)
    return Row(
        f"row{number}",
        prompt or [{"role": "user", "content": f"question {number}"}],
        [{"role": "assistant", "content": text}],
        [1, 2],
        ids,
        reason,
        logprobs[np.arange(length), ids].astype(np.float32),
        most_likely(logprobs, 4),
        metadata=fields or {},
    )


def write_dataset(directory, rows, shard_rows=7):
    data = directory / "data"
    parts = [rows[start : start + shard_rows] for start in range(0, len(rows), shard_rows)]
    for index, part in enumerate(parts):
        write_shard(data, "train", index, len(parts), rows_to_table(part, VOCAB))
    about = described("topk", VOCAB, k=4)
    about["tokenizer"]["special_token_ids"] = [0]
    write_manifest(data, finished_shards(data, "train"), about)


def read(directory, split):
    tables = [pq.read_table(shard.file) for shard in finished_shards(directory / "curated", split)]
    return pa.concat_tables(tables)


def fate(directory):
    """Where each row is: a split, or the reason why not."""
    found = {row: split for split in SPLITS for row in read(directory, split)["id"].to_pylist()}
    rejected = pq.read_table(directory / "curated/rejected.parquet").to_pylist()
    assert not found.keys() & {row["id"] for row in rejected}
    return found | {row["id"]: row["reason"] for row in rejected}


def curated(directory, rows, steps=(), held_out=0.3):
    write_dataset(directory, rows)
    curate(make_experiment(steps, directory, held_out))
    return fate(directory)


def test_the_first_step_that_a_row_fails_is_its_reason_and_the_account_adds_up(tmp_path, capsys):
    good = [make_row(number, f"{SENTENCE} {number}") for number in range(20)]
    bad = [
        make_row(20, f"{SENTENCE} cut", reason="length"),
        make_row(21, "```\nopen", reason="length"),  # two reasons; the first step counts
        make_row(22, "```\nopen"),
        make_row(23, good[3].completion[0]["content"].upper()),
        make_row(24, "something else"),
        make_row(25, "5"),
        make_row(26, "6"),
    ]
    steps = [{"finish_reason": None}, {"malformed": None}, {"duplicates": None}, {"regex": {"pattern": "[56]$|say"}}]
    where = curated(tmp_path, [*good, *bad], steps)
    assert {row: where[row] for row in ("row20", "row21", "row22", "row23", "row24")} == {
        "row20": "finish_reason",
        "row21": "finish_reason",
        "row22": "malformed",
        "row23": "duplicates",
        "row24": "regex",
    }
    manifest = read_manifest(tmp_path / "curated")
    assert manifest["rows_in"] == 27
    assert manifest["steps"] == [
        {"name": "finish_reason", "rows_in": 27, "kept": 25, "rejected": 2, "failed": 0},
        {"name": "malformed", "rows_in": 25, "kept": 24, "rejected": 1, "failed": 0},
        {"name": "duplicates", "rows_in": 24, "kept": 23, "rejected": 1, "failed": 0},
        {"name": "regex", "rows_in": 23, "kept": 22, "rejected": 1, "failed": 0},
    ]
    rejected = {row["id"]: row for row in pq.read_table(tmp_path / "curated/rejected.parquet").to_pylist()}
    assert (rejected["row23"]["step"], rejected["row23"]["detail"]) == (3, "as row3")
    assert (rejected["row20"]["step"], rejected["row20"]["detail"], rejected["row20"]["failed"]) == (1, "length", False)
    said = capsys.readouterr().out
    kept = [sum(value == split for value in where.values()) for split in SPLITS]
    reasons = "2 finish_reason, 1 malformed, 1 duplicates, 1 regex"
    assert f"27 in = {kept[0]} train + {kept[1]} held out + 5 rejected ({reasons})" in said


def test_failed_rows_are_no_rejected_ones(tmp_path, capsys):
    rows = [make_row(number, "7", fields={"answer": 7 if number < 15 else 8} if number < 18 else {}) for number in range(20)]
    where = curated(tmp_path, rows, [{"math": None}])
    assert [where[f"row{number}"] for number in range(15, 20)] == ["math"] * 5
    rejected = {row["id"]: row for row in pq.read_table(tmp_path / "curated/rejected.parquet").to_pylist()}
    assert [rejected[f"row{number}"]["failed"] for number in range(15, 20)] == [False, False, False, True, True]
    assert rejected["row15"]["detail"] == "7 is not 8"
    (step,) = read_manifest(tmp_path / "curated")["steps"]
    assert step == {"name": "math", "rows_in": 20, "kept": 15, "rejected": 3, "failed": 2}
    assert "3 rejected (3 math) + 2 failed (2 math)" in capsys.readouterr().out


def test_what_a_run_says_of_itself(tmp_path, monkeypatch):
    """A clock that goes on by a second at each look: two for the whole, two for the step's start, two for each of four groups."""
    monkeypatch.setattr("llmdistill.stages.curate.time", SimpleNamespace(monotonic=itertools.count().__next__))
    curated(tmp_path, [make_row(number, f"text {number}") for number in range(20)], [{"length": {"max_tokens": 9}}])
    results = json.loads((tmp_path / "curated/run.json").read_text())["results"]
    assert (results["tokens"], results["seconds"], results["tokens_per_s"]) == (80, 11, 7.3)
    assert results["steps"][0]["seconds"] == 5
    assert (results["rows_in"], results["kept"], results["rejected"], results["failed"]) == (20, 20, 0, 0)


def against(tmp_path):
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps(["a question of eight words or more than that, for the test of it"]))
    return str(file)


def every_step(tmp_path, tiny):
    """Each step, set so that it rejects some of the rows below and keeps others."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "number"}')
    task = tmp_path / "task.yaml"
    task.write_text("kind: classify\ndescription: A number.\nlabels: ['3', '4']\n")
    return {
        "finish_reason": {"keep": ["stop"]},
        "length": {"min_tokens": 4},
        "language": {"keep": ["en"]},
        "repetition": {"max_line_share": 0.4},
        "refusals": None,
        "malformed": None,
        "math": {"without": "keep"},
        "python": None,
        "json_schema": {"file": str(schema)},
        "task": {"file": str(task)},
        "regex": {"pattern": "tide|\\d"},
        "judge": {
            "teacher": {"model": str(tiny), "engine": "transformers", "dtype": "float32"},
            "min_mass": 1e-9,
            "min_score": 3,
        },
        "duplicates": None,
        "best_of": {},
        "near_duplicates": {"threshold": 0.6},
        "contamination": {"against": [against(tmp_path)]},
        "personal_data": None,
        "balance": {"max_rows": 12},
    }


def mixed_rows():
    german = "Ebbe und Flut entstehen, weil der Mond am Meer zieht und die Erde sich unter diesem Zug zweimal am Tag dreht."
    texts = [f"{SENTENCE} {' '.join(f'{word}{number}' for word in 'abcdefghijklmnopqrst')}" for number in range(12)]
    texts += [
        SENTENCE,
        SENTENCE,
        f"{german} {german}",
        "3",
        "4",
        "As an AI, I",
        "one\none\none",
        "```python\nx =\n```",
        "```py",
        "write to maria@gmail.com",
    ]
    texts += ["A question of eight words, or more than that: for the TEST of it!", "fine"]
    return [
        make_row(
            n,
            text,
            [{"role": "user", "content": f"question {min(n, len(texts) - 2)}"}],  # the last two answer the same one
            length=3 if n == 2 else 5,
            reason="length" if n == 1 else "stop",
            fields={"topic": "x"} | ({"answer": 3} if n == 16 else {}),
        )
        for n, text in enumerate(texts)
    ]


def test_every_step_of_the_configuration_is_there_and_documented():
    page = (ROOT / "docs/curation.md").read_text()
    for name, section in CurateStep.step_types().items():
        assert isinstance(step_named(name), CurationStep)
        (part,) = re.findall(rf"^### `{name}`\n(.*?)(?=^##|\Z)", page, flags=re.DOTALL | re.MULTILINE)
        for key in section.model_fields:
            assert f"`{key}" in part, (name, key)


@pytest.mark.parametrize("name", CurateStep.step_types())
def test_no_step_changes_a_row(name, tmp_path, tiny, monkeypatch):
    """Kept or rejected, every column of every row is what it was: ids, alignment and targets need no second scoring."""
    monkeypatch.setattr(judge, "_K", 49152)  # a random model has no digits among its most likely tokens
    rows = mixed_rows()
    steps = [{name: every_step(tmp_path, tiny)[name]}]
    where = curated(tmp_path, rows, steps)
    assert name in where.values(), "it rejected nothing"
    before = {row["id"]: row for row in rows_to_table(rows, VOCAB).to_pylist()}
    after = [row for split in SPLITS for row in read(tmp_path, split).to_pylist()]
    rejected = pq.read_table(tmp_path / "curated/rejected.parquet").to_pylist()
    after += [{key: value for key, value in row.items() if key in before["row0"]} for row in rejected]
    assert {row["id"]: row for row in after} == before
    assert len(after) == len(before)
    columns = read(tmp_path, "train").column_names
    assert columns == rows_to_table(rows, VOCAB).column_names
    assert {"input_ids", "completion_start", "target_ids", "target_logprobs", "target_tail"} <= set(columns)


def test_a_second_run_gives_the_same_bytes(tmp_path, tiny):
    left_out = ("json_schema", "task", "judge")
    steps = [{name: value} for name, value in every_step(tmp_path, tiny).items() if name not in left_out]
    for name in ("one", "two"):
        curated(tmp_path / name, mixed_rows(), steps)
    one, two = ({file.name: file for file in (tmp_path / name / "curated").iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one.keys() - {"run.json", "dataset.json"}:
        assert one[name].read_bytes() == two[name].read_bytes(), name
    assert read_manifest(tmp_path / "one/curated")["steps"] == read_manifest(tmp_path / "two/curated")["steps"]


PIPELINES = st.lists(
    st.sampled_from(
        [
            {"finish_reason": {"keep": ["stop"]}},
            {"length": {"max_tokens": 6}},
            {"repetition": {"ngram": 1, "max_share": 0.4}},
            {"malformed": None},
            {"refusals": None},
            {"regex": {"pattern": "^(a|aa)+$|b"}},
            {"duplicates": None},
            {"near_duplicates": {"threshold": 0.5}},
            {"balance": {"by": "topic", "max_rows": 6}},
        ]
    ),
    max_size=6,
)


@given(PIPELINES, st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_every_row_is_somewhere_whatever_the_steps(tmp_path_factory, steps, seed):
    """In = kept + rejected + failed at each step, in a chain, and the files hold what the account says."""
    directory = tmp_path_factory.mktemp("curate")
    chance = random.Random(seed)
    texts = ["b a", "b A", "b c d e f", "b c d e f g", "", "```\nb", "As an AI, b", "b"]
    rows = [
        make_row(
            number,
            chance.choice(texts),
            [{"role": "user", "content": f"q{number // 2}"}],
            chance.randint(1, 8),
            chance.choice(["stop", "length"]),
            {"topic": chance.choice("xy")},
        )
        for number in range(60)
    ]
    try:
        where = curated(directory, rows, steps, held_out=0.5)
    except InputError:  # nothing was left to train on, or to hold out
        assert sorted(path.name for path in directory.iterdir()) == ["data"]
        return
    assert where.keys() == {row.id for row in rows}
    account = read_manifest(directory / "curated")["steps"]
    assert [step["name"] for step in account] == [next(iter(step)) for step in steps]
    rows_in = 60
    for step in account:
        assert step["rows_in"] == rows_in == step["kept"] + step["rejected"] + step["failed"]
        rows_in = step["kept"]
    assert rows_in == sum(value in SPLITS for value in where.values())
    rejected = pq.read_table(directory / "curated/rejected.parquet").to_pylist()
    for number, step in enumerate(account, start=1):
        mine = [row for row in rejected if row["step"] == number]
        assert sum(row["failed"] for row in mine) == step["failed"]
        assert len(mine) == step["failed"] + step["rejected"]
        assert all(row["reason"] == step["name"] and row["detail"] for row in mine)


@given(st.permutations(range(24)))
@settings(max_examples=6, deadline=None)
def test_what_looks_at_one_row_does_not_care_about_the_order(tmp_path_factory, order):
    steps = [
        {"finish_reason": None},
        {"length": {"min_tokens": 4}},
        {"refusals": None},
        {"malformed": None},
        {"repetition": None},
    ]
    rows = mixed_rows()
    found = [
        curated(tmp_path_factory.mktemp("order"), [rows[number] for number in numbers], steps) for numbers in (range(24), order)
    ]
    assert found[0] == found[1]


def test_duplicates_are_found_across_groups_of_rows(tmp_path):
    rows = [make_row(number, str(number % 1500), length=1) for number in range(3000)]
    write_dataset(tmp_path, rows, 3000)
    curate(make_experiment([{"duplicates": None}], tmp_path))
    where = fate(tmp_path)
    assert all((where[f"row{number}"] == "duplicates") == (number >= 1500) for number in range(3000))


def test_no_prompt_is_on_both_sides_and_the_share_is_about_right(tmp_path):
    def variants(number):
        text = f"What is the {number}th word?"
        return [
            [{"role": "user", "content": text}],
            [{"role": "user", "content": f"  {text.upper()}\n"}],
            [{"role": "system", "content": f"Be short, {number}."}, {"role": "user", "content": text.replace(" ", " \n ")}],
        ]

    rows = [make_row(3 * n + k, f"t {n} {k}", prompt, length=1) for n in range(1000) for k, prompt in enumerate(variants(n))]
    write_dataset(tmp_path, rows, 3000)
    curate(make_experiment([], tmp_path, 0.1))
    where = fate(tmp_path)
    held_out = [[where[f"row{3 * n + k}"] == "test" for k in range(3)] for n in range(1000)]
    assert all(len(set(sides)) == 1 for sides in held_out)
    assert 70 <= sum(sides[0] for sides in held_out) <= 130  # a tenth of 1,000 prompts, within three deviations


def sides(prompts, completions=None, metadata=None):
    rows = {"prompt": prompts, "completion": completions or [[]] * len(prompts), "metadata": metadata or ["{}"] * len(prompts)}
    return {is_held_out(key, 0, 0.5) for key in conversation_keys(pa.table(rows))}


def test_prompts_of_other_content_or_turns_are_not_one():
    """Few-shot examples before the question are the same for all; the turns of one conversation are told by its name."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompts = [[*turns, {"role": "user", "content": f"c{n}"}] for n in range(20)]
    assert sides(prompts) == {True, False}
    assert len(sides(prompts, metadata=['{"llmdistill": {"conversation": "x"}}'] * 20)) == 1
    assert len(sides(prompts, metadata=['{"conversation": "x"}'] * 20)) == 2, "a user's field means nothing to us"
    assert sides([[{"role": "system", "content": str(n)}] for n in range(20)]) == {True, False}
    assert sides([[]] * 20, [[{"role": "assistant", "content": str(n)}] for n in range(20)]) == {True, False}


@pytest.mark.parametrize(
    ("step", "library", "extra"),
    [
        ({"language": {"keep": ["en"]}}, "lingua", "curate"),
        ({"math": None}, "math_verify", "curate"),
        ({"near_duplicates": None}, "datasketch", "curate"),
        ({"personal_data": None}, "presidio_analyzer", "personal-data"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, step, library, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))
    write_dataset(tmp_path, [make_row(0, "a")])
    (name,) = step
    for dry_run in (True, False):
        with pytest.raises(InputError, match=rf"curate\.0\.{name} needs {library}.*'llmdistill\[{extra}\]'"):
            curate(make_experiment([step], tmp_path), dry_run)
    assert not (tmp_path / "curated").exists()


def test_files_of_steps_are_inputs_of_the_run(tmp_path):
    rows = [make_row(number, f"text {number}") for number in range(20)]
    steps = [{"contamination": {"against": [against(tmp_path)]}}]
    curated(tmp_path, rows, steps)
    inputs = json.loads((tmp_path / "curated/run.json").read_text())["inputs"]
    assert against(tmp_path) in inputs
    (tmp_path / "tasks.json").write_text("[]")
    with pytest.raises(InputError, match=r"was made with other settings: input\..*tasks\.json was "):
        curate(make_experiment(steps, tmp_path, 0.3))
    with pytest.raises(InputError, match=r"nowhere\.json: no such file \(curate\.0\.contamination\.against\)"):
        curate(make_experiment([{"contamination": {"against": ["nowhere.json"]}}], tmp_path), dry_run=True)


def test_asked_first(tmp_path, capsys):
    experiment = make_experiment([{"length": None}, {"duplicates": None}], tmp_path, 0.25)
    curate(experiment, dry_run=True)
    assert f"{tmp_path}/data (does not exist yet) through length, duplicates; holds out 25% of the prompts" in "".join(
        capsys.readouterr().out.splitlines()
    )
    write_dataset(tmp_path, [make_row(number, f"text {number}") for number in range(20)])
    curate(experiment, dry_run=True)
    said = capsys.readouterr().out
    assert "20 rows, 80 completion tokens, 0.0 MB of" in said
    assert "at most 20 rows and as many bytes are kept, about 5 of them held out" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_what_a_kill_left_behind_goes_with_the_next_run(tmp_path):
    leftover = tmp_path / ".curate.elsewhere-1.unfinished/logs"
    leftover.mkdir(parents=True)
    (leftover / "contamination-1.jsonl").write_text("half a line")
    curated(tmp_path, [make_row(number, f"text {number}") for number in range(20)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curated", "data"]


def test_nothing_left_is_said_and_nothing_is_written(tmp_path):
    write_dataset(tmp_path, [make_row(number, "same") for number in range(20)])
    with pytest.raises(InputError, match=r"20 in = \d train \+ \d held out \+ 19 rejected \(19 duplicates\); both"):
        curate(make_experiment([{"duplicates": None}], tmp_path, 0.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_where_answers_begin_is_a_setting_where_it_is_said(tmp_path):
    """Steps look at what comes behind a trace; what was made before that was recorded stays valid."""
    write_dataset(tmp_path, [make_row(number, SENTENCE) for number in range(3)])
    experiment = make_experiment([{"finish_reason": {}}], tmp_path)
    (claim,) = claims(experiment)
    assert "generate" not in claim.settings
    record.begin(*claim, 0)
    (claim.directory / "kept").touch()
    assert record.claim(*claim) == "resume"
    for changes in ({"thinking_end": "<end>"}, {"thinking": "masked"}):
        (other,) = claims(experiment.with_(generate=experiment.generate.with_(**changes)))
        with pytest.raises(record.StaleError, match=rf"generate was null, is .*{next(iter(changes))}"):
            record.claim(*other)
