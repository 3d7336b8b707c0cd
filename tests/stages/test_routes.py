"""Several teachers in one run: every row is its own teacher's, by what the configuration and the row say."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.config.reading import dump_experiment
from llmdistill.data.manifest import read_manifest
from llmdistill.data.rows import metadata_and_provenance
from llmdistill.data.shard_writer import finished_shards
from llmdistill.data.shards import Layout, Share
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.stages.curate import curate
from llmdistill.stages.evaluate import evaluate
from llmdistill.stages.generate import generate
from llmdistill.stages.report import report
from llmdistill.stages.score import score
from llmdistill.stages.train import train
from tests.factories import VOCAB, write_noisy

DOMAINS = ("math", "code", "art")  # of which the last names no teacher


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("teachers")
    return {
        "math": write_noisy(tiny, directory / "math", 1),
        "code": write_noisy(tiny, directory / "code", 2, padding=64),
        "default": tiny,
    }


@pytest.fixture
def file(experiment_file, models, tmp_path):
    """The small experiment with 17, 4 and 3 rows for three teachers."""
    lines = [{"prompt": f"Say {n} in words.", "domain": DOMAINS[2 if n % 8 == 1 else n % 7 == 0]} for n in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = experiment_file.read_text().splitlines()
    common = "engine: transformers, dtype: float32, batch_size: 4"
    teachers = [f"  {name}: {{model: {model}, {common}}}" for name, model in models.items()]
    text = [line for line in text if not line.startswith("teacher:")]
    experiment_file.write_text("\n".join([*text, "teachers:", *teachers, "route: {column: domain}"]) + "\n")
    return experiment_file


def own_logprobs(model, row):
    """Of the completion's tokens, in float64."""
    ids, start = torch.tensor(row["input_ids"]).long(), int(row["completion_start"])
    with torch.inference_mode():
        logits = load_model(str(model)).double()(ids[None]).logits[0, start - 1 : -1, :VOCAB]
    return logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0].numpy()


def check(rows, models):
    """Every row has the distributions of the teacher that it names, and is far from the others."""
    for row in rows:
        fields, ours = metadata_and_provenance(str(row["metadata"]))
        assert ours["teacher"] == {"art": "default"}.get(fields["domain"], fields["domain"])
        np.testing.assert_allclose(row["token_logprobs"], own_logprobs(models[ours["teacher"]], row), atol=5e-4)
    first = rows[0]
    other = next(name for name in models if name != metadata_and_provenance(str(first["metadata"]))[1]["teacher"])
    assert np.abs(first["token_logprobs"] - own_logprobs(models[other], first)).max() > 0.05


def test_every_row_is_its_own_teachers(file, models, tmp_path):
    experiment = load_experiment(file)
    generate(experiment)
    directory = experiment.directory("data")
    rows = load_dataset(directory)
    assert len(rows) == 24
    check(list(rows), models)
    manifest = read_manifest(directory)
    counts = {name: described["rows"] for name, described in manifest["teachers"].items()}
    assert sum(counts.values()) == 24
    assert len(manifest["shards"]) == sum(-(-count // 6) for count in counts.values())
    names = [metadata_and_provenance(str(text))[1]["teacher"] for text in rows["metadata"]]
    for shard in finished_shards(directory, "train"):
        held = load_dataset_of(shard.file)
        assert len({metadata_and_provenance(text)[1]["teacher"] for text in held}) == 1, "a shard is one teacher's"
    assert {name: names.count(name) for name in counts} == counts
    curate(experiment)
    assert read_manifest(experiment.directory("curated"))["teachers"].keys() == models.keys()


def load_dataset_of(shard):
    return pq.read_table(shard, columns=["metadata"])["metadata"].to_pylist()


def test_workers_make_together_what_one_makes_alone(file, tmp_path):
    whole = load_experiment(file, [("output", f"{tmp_path}/whole")])
    generate(whole)
    shared = load_experiment(file)
    for number in (1, 0):
        generate(shared, worker=Share(number, 2))
    names = [sorted(shard.file.name for shard in finished_shards(e.directory("data"), "train")) for e in (whole, shared)]
    assert names[0] == names[1], "their names hold their checksums"


@pytest.mark.parametrize("turns", ["table", "dataset"])
def test_each_reads_its_own_text(file, models, tmp_path, turns):
    experiment = load_experiment(file)
    if turns == "table":
        source = tmp_path / "text.jsonl"
        lines = [{"prompt": f"q{n}", "completion": f"number {n}", "domain": DOMAINS[n % 3]} for n in range(9)]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        generate(experiment)
        source = experiment.directory("data")
    read = load_experiment(file, [("score.source", str(source)), ("output", f"{tmp_path}/read")])
    score(read)
    rows = list(load_dataset(read.directory("data")))
    assert len(rows) == (9 if turns == "table" else 24)
    check(rows, models)


def test_by_the_file_that_a_row_comes_from(file, tmp_path):
    for name in ("math", "code"):
        (tmp_path / f"log/{name}").mkdir(parents=True)
        (tmp_path / f"log/{name}/a.jsonl").write_text("".join(f'{{"prompt": "{name} {n}"}}\n' for n in range(3)))
    route = f"{{files: {{'*/math/*': math, {tmp_path}/log/code/a.jsonl: code}}}}"
    experiment = load_experiment(file, [("prompts.source", f"{tmp_path}/log"), ("route", route)])
    generate(experiment)
    for row in load_dataset(experiment.directory("data")):
        _, ours = metadata_and_provenance(str(row["metadata"]))
        assert row["prompt"][0]["content"].split()[0] == ours["teacher"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("route.column", "topic")], r"prompts\.jsonl line 1: has no field topic \(route\.column\) .*but domain"),
        ([("route.values", "{math: code}")], r"teachers\.math: no row is assigned to it by route\.column domain"),
        ([("route.values", "{math: maths}")], r"route\.values\.math: there is no teacher maths, only math, code, default"),
        ([("teachers.other", "{model: x}")], "teachers: all need the same engine"),
        ([("teacher", "{model: x}")], "give either teacher or teachers, not both"),
        ([("route", "{column: a, files: {b: math}}")], "route: needs either column or files"),
        ([("route", "null")], "teachers and route must be given together"),
        ([("train.hidden", "{weight: 1.0}"), ("targets.kind", "online")], "train.hidden needs a single teacher"),
        ([("rounds.n", "1"), ("targets.kind", "sampled")], "rounds needs a single teacher"),
        ([("teachers.code.model", "/nowhere")], r"teachers\.code\.model"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(file, overrides, message):
    with pytest.raises(InputError, match=message):
        generate(load_experiment(file, overrides), dry_run=True)


def test_without_a_default_every_row_has_to_name_its_teacher(file, models):
    text = file.read_text().splitlines()
    file.write_text("\n".join(line for line in text if not line.startswith("  default:")) + "\n")
    with pytest.raises(InputError, match="domain is 'art', which is not one of the teachers math, code"):
        generate(load_experiment(file))


def test_the_plan_says_who_gets_what(file, capsys):
    generate(load_experiment(file), dry_run=True)
    out = " ".join(capsys.readouterr().out.split())
    assert "24 prompts (17 to math, 4 to code, 3 to default) = 24 rows" in out
    assert "in 5 shards" in out


def test_what_is_set_is_written_and_read_back(file, tmp_path):
    experiment = load_experiment(file)
    assert experiment.teacher.model == experiment.teachers["default"].model
    (tmp_path / "again.yaml").write_text(dump_experiment(experiment))
    assert "\nteacher:" not in dump_experiment(experiment)
    assert load_experiment(tmp_path / "again.yaml") == experiment
    assert experiment.with_(seed=1).teachers == experiment.teachers


def test_a_layout_counts_every_part_by_itself():
    layout = Layout([5, 0, 4, 1], 3)
    assert [(part, list(rows)) for part, rows in layout.shards] == [
        (0, [0, 1]),
        (0, [2, 3, 4]),
        (2, [5, 6]),
        (2, [7, 8]),
        (3, [9]),
    ]
    assert [layout.shard_of(row) for row in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 4]
    assert [layout.part_of(row) for row in range(10)] == [0] * 5 + [2] * 4 + [3]


@pytest.mark.parametrize(("rows", "size"), [(129, 128), (1, 5), (12, 12), (1000, 7), (7, 1000), (13, 1)])
def test_the_shards_of_a_part_are_of_one_size(rows, size):
    """A last one of a single row could be refused as a whole, again and again."""
    held = [shard for _, shard in Layout([rows], size).shards]
    assert [row for shard in held for row in shard] == list(range(rows))
    assert len(held) == math.ceil(rows / size)
    assert max(map(len, held)) <= min(size, min(map(len, held)) + 1)


def test_the_student_is_measured_against_each_rows_own_teacher(file, models, tmp_path):
    """Against the KL in float64 over the vocabulary, for each teacher's held-out rows."""
    experiment = load_experiment(file, [("eval.held_out", "0.5"), ("eval.own_prompts", "4"), ("eval.own_tokens", "6")])
    for stage in (generate, curate, train, evaluate):
        stage(experiment)
    directory = experiment.directory("eval")
    metrics = json.loads((directory / "metrics.json").read_text())
    rows = list(load_dataset(experiment.directory("curated"), "test"))
    student = load_model(str(experiment.directory("student"))).double()
    kl = {name: [] for name in models}
    for row in rows:
        name = metadata_and_provenance(str(row["metadata"]))[1]["teacher"]
        ids, start = torch.tensor(row["input_ids"]).long()[None], int(row["completion_start"])
        with torch.inference_mode():
            p, q = (
                model(ids).logits[0, start - 1 : -1, :VOCAB].log_softmax(-1)
                for model in (load_model(str(models[name])).double(), student)
            )
        kl[name] += (p.exp() * (p - q)).sum(-1).tolist()
    assert [entry["name"] for entry in metrics["teachers"] if "models" not in entry] == ["default"], "it has a single prompt"
    for entry in metrics["teachers"][:2]:
        (found,) = [model["kl"]["mean"] for model in entry["models"] if model["name"] == "student"] or [0.0]
        assert entry["tokens"] == len(kl[entry["name"]])
        np.testing.assert_allclose(found, np.mean(kl[entry["name"]]), rtol=1e-4)
    whole = {model["name"]: model["kl"]["mean"] for model in metrics["models"]}
    np.testing.assert_allclose(whole["student"], np.mean(np.concatenate(list(kl.values()))), rtol=1e-4)
    assert abs(whole["teacher"]) < 1e-6
    assert metrics["models"][0]["own_text"]["reverse_kl"]["mean"] == pytest.approx(0, abs=1e-6), "it is compared with itself"
    named = [(metadata_and_provenance(str(row["metadata"]))[1]["teacher"], row["prompt"][-1]["content"]) for row in rows]
    assert {view["prompt"] for view in metrics["views"]} == {prompt for name, prompt in named if name == "default"}
    assert set(pq.read_table(directory / "rows.parquet")["teacher"].to_pylist()) <= models.keys()
    report(experiment)
    text = (tmp_path / "run/report.md").read_text()
    assert "3 teachers: every row was compared with its own teacher." in text
    assert "math: student" in text
    assert "(math, 17 rows)" in (experiment.directory("data") / "README.md").read_text()
