"""Exports against readers written from the other projects' documentation and a model's own logits; round trips; bad files."""

import functools
import json
import re
from contextlib import nullcontext

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from llmdistill import load_dataset
from llmdistill.cli import main
from llmdistill.config import load_experiment
from llmdistill.data import targets
from llmdistill.data.convert import exports as formats
from llmdistill.data.convert import imports
from llmdistill.data.convert.exports import export_dataset
from llmdistill.data.convert.imports import import_dataset
from llmdistill.data.inspect import inspect
from llmdistill.data.manifest import read_manifest, write_manifest
from llmdistill.data.rows import Row, rows_to_table
from llmdistill.data.shard_writer import SPLITS, write_shard
from llmdistill.errors import InputError
from llmdistill.stages.curate import curate
from llmdistill.stages.generate import generate
from tests.conftest import run_cli
from tests.data.convert.test_distillkit import bits_of, curve
from tests.factories import described, make_row, most_likely, write_rows

K = 8


@pytest.fixture(scope="module", autouse=True)
def _each_tokenizer_is_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imports, "_Teacher", functools.cache(imports._Teacher))
        yield


@pytest.fixture(scope="module")
def tiny(whole_tiny):
    """With the whole vocabulary, so that ids take 16 bits."""
    return whole_tiny


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """What `generate` and `curate` make with a real tiny model: top-8 targets, train and test rows."""
    directory = tmp_path_factory.mktemp("source")
    (directory / "prompts.jsonl").write_text("".join(f'{{"prompt": "Say {n} in words."}}\n' for n in range(24)))
    file = directory / "experiment.yaml"
    file.write_text(f"""
output: {directory}
teacher: {{model: {tiny}, engine: transformers, dtype: float32}}
prompts: {{source: {directory}/prompts.jsonl}}
generate: {{max_tokens: 8}}
targets: {{kind: topk, k: {K}}}
eval: {{held_out: 0.25}}
""")
    experiment = load_experiment(file)
    generate(experiment)
    curate(experiment)
    return directory / "curated"


@pytest.fixture(scope="module")
def model_logprobs(tiny):
    """The teacher's log-probabilities for the token after each token of a row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()

    def logprobs(ids):
        with torch.no_grad():
            return model(torch.tensor([list(map(int, ids))])).logits[0].double().log_softmax(-1).numpy()

    return logprobs


def soft(directory, split="train"):
    rows = list(load_dataset(directory, split))
    kind = targets.KINDS[read_manifest(directory)["targets"]["kind"]]
    return rows, kind.decode({name: np.concatenate([np.atleast_1d(row[name]) for row in rows]) for name in kind.columns})


def opened(directory, split):
    """As axolotl and DistillKit open it: by `datasets`, from the directory, without knowing anything else."""
    return datasets.load_dataset(str(directory), split=split, cache_dir=str(directory.parent / "cache"))


def settings(directory):
    """The other project's configuration from the README."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (directory / "README.md").read_text(), flags=re.S)
    return yaml.safe_load(block)


@pytest.mark.parametrize("split", SPLITS)
def test_axolotl_entries_stand_where_the_student_predicts(source, model_logprobs, tmp_path, split):
    """Its README: entry j is the distribution over `input_ids[j + 1]`, `target_mask[j]` is 0 where `labels[j + 1]` is −100."""
    export_dataset(source, tmp_path / "out", "axolotl")
    ours = list(load_dataset(source, split))
    theirs = opened(tmp_path / "out", split)
    assert len(theirs) == len(ours)
    for row, want in zip(theirs, ours, strict=True):
        length, start = len(want["input_ids"]), int(want["completion_start"])
        assert row["input_ids"] == want["input_ids"].tolist()
        assert row["attention_mask"] == [1] * length
        assert row["labels"] == [-100] * start + want["input_ids"][start:].tolist()
        mask = [[int(label != -100)] * K for label in [*row["labels"][1:], -100]]
        assert row["target_mask"] == mask
        counted = np.flatnonzero(np.array(mask)[:, 0])
        logprobs = model_logprobs(row["input_ids"])
        ids = np.array(row["target_token_ids"])
        assert (ids[counted] == np.argsort(-logprobs[counted], kind="stable")[:, :K]).mean() > 0.99  # but for equal ones
        stored = np.array(row["target_logprobs"])
        np.testing.assert_allclose(stored[counted], np.take_along_axis(logprobs, ids, 1)[counted], atol=5e-3)
        assert np.isfinite(stored).all()


@pytest.mark.parametrize("exact_k", [None, 1])
@pytest.mark.parametrize("split", SPLITS)
def test_distillkit_counts_exactly_the_completions(source, model_logprobs, tmp_path, split, exact_k):
    """Its trainer: entry j goes with the student's logits at j, wherever `labels[j]` is not negative, without a shift."""
    export_dataset(source, tmp_path / "out", "distillkit", exact_k)
    config = settings(tmp_path / "out")
    compressor = config["teacher"]["logprob_compressor"]
    assert compressor == yaml.safe_load((tmp_path / "out/compression_config.yaml").read_text())
    exact = compressor["exact_k"]
    ours = list(load_dataset(source, split))
    theirs = opened(tmp_path / "out", split)
    assert {len(ids) for ids in theirs["input_ids"]} == {config["sequence_length"]}
    for row, want in zip(theirs, ours, strict=True):
        length, start = len(want["input_ids"]), int(want["completion_start"])
        assert row["input_ids"][:length] == want["input_ids"].tolist()
        assert sum(row["attention_mask"]) == length
        counted = [place for place, label in enumerate(row["labels"]) if label >= 0]
        assert counted == list(range(start - 1, length - 1))
        assert [row["labels"][place] for place in counted] == [row["input_ids"][place] for place in counted]
        logprobs = model_logprobs(row["input_ids"][:length])
        for place in counted:
            ids = bits_of(row["bytepacked_indices"][place], 16, K)  # 2^16 is the first power above 49,152
            stored = bytes(row["compressed_logprobs"][place])
            floats = np.frombuffer(stored[: 2 * exact], "<f2").astype(float)
            np.testing.assert_allclose(floats, logprobs[place, ids[:exact]], atol=5e-3)
            if exact < K:
                coefficients = np.frombuffer(stored[2 * exact :], "<f4").astype(float)
                read = [curve(coefficients, compressor["polynomial_terms"], rank) for rank in range(K - exact)]
                # Six coefficients for seven values: what the fit leaves is small.
                np.testing.assert_allclose(read, logprobs[place, ids[exact:]], atol=0.3)
        for place in set(range(length)) - set(counted):  # elsewhere: the next token itself
            ids = bits_of(row["bytepacked_indices"][place], 16, K)
            assert ids[0] == (row["input_ids"][place + 1] if place + 1 < config["sequence_length"] else 2)
            assert len(set(ids)) == K
            assert np.frombuffer(bytes(row["compressed_logprobs"][place])[:2], "<f2")[0] == pytest.approx(0, abs=3e-3)


@pytest.mark.parametrize("form", ["axolotl", "distillkit"])
@pytest.mark.parametrize("tokens", [1 << 16, 1])
def test_there_and_back(source, tiny, tmp_path, form, tokens, monkeypatch):
    """Also with one row at a time: the parts that a file is read in leave no trace but the number of shards."""
    monkeypatch.setattr("llmdistill.data.batches.TOKENS_AT_ONCE", tokens)
    export_dataset(source, tmp_path / "out", form)
    import_dataset(tmp_path / "out", tmp_path / "back", form, str(tiny))
    manifest, before = read_manifest(tmp_path / "back"), read_manifest(source)
    assert manifest["targets"] == {"kind": "topk", "k": K}
    assert manifest["tokenizer"] == before["tokenizer"]
    assert manifest["teacher"]["fingerprint"] == before["teacher"]["fingerprint"]
    assert manifest["sampling"] == {}
    assert set(manifest["source"]) == {str(tmp_path / f"out/{split}.parquet") for split in SPLITS}
    for split in SPLITS:
        assert (sum(entry["split"] == split for entry in manifest["shards"]) > 1) == (tokens == 1)
        rows, want = soft(source, split)
        again, got = soft(tmp_path / "back", split)
        assert len(rows) == len(again)
        for row, copy in zip(rows, again, strict=True):
            for name in ("input_ids", "completion_start", "completion_mask", "finish_reason", "completion"):
                assert np.array_equal(row[name], copy[name]), name
            assert len(copy["token_logprobs"]) == len(row["token_logprobs"])
        assert got.ids_NK.tolist() == want.ids_NK.tolist()
        np.testing.assert_allclose(got.logprobs_NK, want.logprobs_NK, rtol=2**-10, atol=1e-3)
        np.testing.assert_allclose(got.tail_N, want.tail_N, atol=1e-3)
        known, stored = (np.concatenate([row["token_logprobs"] for row in part]) for part in (rows, again))
        written = np.concatenate([row["input_ids"][int(row["completion_start"]) :] for row in rows])
        among = (want.ids_NK == written[:, None]).any(axis=1)
        assert np.isnan(stored).tolist() == (~among).tolist()
        np.testing.assert_allclose(stored[among], known[among], rtol=2e-3, atol=2e-3)


def test_the_same_file_gives_the_same_rows_and_an_unknown_number_breaks_nothing(source, tiny, tmp_path, capsys):
    export_dataset(source, tmp_path / "out", "axolotl")
    for name in ("a", "b"):
        import_dataset(tmp_path / "out", tmp_path / name / "data", "axolotl", str(tiny))
    assert [row["id"] for row in load_dataset(tmp_path / "a/data")] == [row["id"] for row in load_dataset(tmp_path / "b/data")]
    assert len({row["id"] for row in load_dataset(tmp_path / "a/data")}) == len(load_dataset(tmp_path / "a/data"))
    assert any(np.isnan(row["token_logprobs"]).any() for row in load_dataset(tmp_path / "a/data"))
    inspect(tmp_path / "a/data")
    assert re.search(r"sampling +unknown", capsys.readouterr().out)
    (tmp_path / "e.yaml").write_text(f"output: {tmp_path}/a\nteacher: {{model: {tiny}}}\neval: {{held_out: 0.3}}")
    curate(load_experiment(tmp_path / "e.yaml"))
    assert read_manifest(tmp_path / "a/curated")["targets"] == {"kind": "topk", "k": K}


@pytest.fixture
def sampled(tmp_path):
    """A dataset of one row with an unbiased sample of 6 of 300 tokens at each of 9 positions."""
    logprobs = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 300)) * 2).log_softmax(-1)
    ids = targets.Sampled.keep(logprobs, 6, torch.rand(9, 1, generator=torch.Generator().manual_seed(0)))
    drawn = targets.Sampled.from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
    text = [{"role": "user", "content": "x"}]
    row = Row("a", text, text, [1, 2], np.arange(9), "stop", np.zeros(9, dtype=np.float32), drawn)
    shard = write_shard(tmp_path / "sampled", "train", 0, 1, rows_to_table([row], 300))
    about = described("sampled", 300, n=6)
    about["tokenizer"]["end_token_ids"] = []
    write_manifest(tmp_path / "sampled", [shard], about)
    return tmp_path / "sampled"


def test_a_sample_stays_a_distribution(sampled, tmp_path):
    """Its weights add up to one, so Σ w (log w − log q) is the loss that both readers compute when they do not renormalise."""
    want = soft(sampled)[1]
    weights = [dict(zip(*pair, strict=True)) for pair in zip(want.ids_NK.tolist(), np.exp(want.logweights_NK), strict=True)]
    export_dataset(sampled, tmp_path / "ax", "axolotl")
    assert settings(tmp_path / "ax")["kd_normalize_topk"] is False
    row = opened(tmp_path / "ax", "train")[0]
    assert [mask[0] for mask in row["target_mask"]] == [0, *[1] * 9, 0]
    for place in range(9):
        ids, stored = row["target_token_ids"][1 + place], np.exp(row["target_logprobs"][1 + place])
        assert stored.sum() == pytest.approx(1, abs=1e-5)
        assert dict(zip(ids, stored, strict=True)) == pytest.approx(weights[place], rel=1e-5)

    export_dataset(sampled, tmp_path / "dk", "distillkit")
    assert settings(tmp_path / "dk")["loss_functions"][1]["missing_probability_handling"] == "zero"
    row = opened(tmp_path / "dk", "train")[0]
    for place in range(9):
        stored = np.exp(np.frombuffer(bytes(row["compressed_logprobs"][1 + place]), "<f2").astype(float))
        assert (np.diff(stored) <= 0).all()
        ids = bits_of(row["bytepacked_indices"][1 + place], 9, 6)
        assert dict(zip(ids, stored, strict=True)) == pytest.approx(weights[place], rel=5e-3)


def test_a_sample_is_no_top_k(sampled, tiny, tmp_path):
    for form in ("axolotl", "distillkit"):
        export_dataset(sampled, tmp_path / form, form)
        with pytest.raises(InputError, match=r"train.parquet: contains an unbiased sample, not the most likely tokens"):
            import_dataset(tmp_path / form, tmp_path / "back", form, str(tiny))
    with pytest.raises(InputError, match="only these follow a curve"):
        export_dataset(sampled, tmp_path / "curve", "distillkit", exact_k=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["axolotl", "distillkit", "sampled"]


def write_axolotl(file, rows):
    """Rows of (ids, target ids, log-probabilities, mask) as axolotl's trainer takes them."""
    names = ("input_ids", "target_token_ids", "target_logprobs", "target_mask")
    table = {name: [row[n] for row in rows] for n, name in enumerate(names)}
    table["labels"] = [[-100] * len(row[0]) for row in rows]
    table["attention_mask"] = [[1] * len(row[0]) for row in rows]
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), file)
    return file


def test_every_run_of_entries_becomes_a_row(tiny, tmp_path):
    """Two answers in one conversation, and a row that has none."""
    mask = [[0, 0], [1, 1], [1, 1], [0, 0], [0, 0], [1, 1], [0, 0]]
    ids = [5, 6, 7, 2, 8, 9, 2]
    entries = [[next_id, 100 + n] for n, next_id in enumerate([*ids[1:], 0])]
    rows = [(ids, entries, [[-0.5, -1.0]] * 7, mask), ([1, 2], [[1, 2]] * 2, [[-0.5, -1.0]] * 2, [[0, 0]] * 2)]
    import_dataset(write_axolotl(tmp_path / "a.parquet", rows), tmp_path / "out", "axolotl", str(tiny))
    found = list(load_dataset(tmp_path / "out"))
    assert [(row["input_ids"].tolist(), int(row["completion_start"])) for row in found] == [([5, 6, 7, 2], 2), (ids, 6)]
    assert [row["finish_reason"] for row in found] == ["stop", "stop"]
    assert found[0]["target_ids"].reshape(-1, 2).tolist() == [[7, 101], [2, 102]]
    np.testing.assert_allclose(found[1]["token_logprobs"], [-0.5])
    assert found[0]["prompt"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        ([5, 6], [[6, 9], [0, 0]], None),
        ([5, 6], [[6, -1], [0, 0]], "contains a negative token id"),
        ([-5, 6], [[6, 9], [0, 0]], "contains a negative token id"),
        ([5, 6], [[6, 6], [0, 0]], "has the same token twice among the targets of a position"),
    ],
)
def test_targets_that_cannot_be_are_refused(tiny, tmp_path, ids, targets, message):
    file = write_axolotl(tmp_path / "a.parquet", [(ids, targets, [[-0.5, -1.0]] * 2, [[1, 1], [0, 0]])])
    with pytest.raises(InputError, match=message) if message else nullcontext():
        import_dataset(file, tmp_path / "out", "axolotl", str(tiny))
    assert (tmp_path / "out").exists() == (message is None)


def test_padding_inside_an_entry_is_no_target(tiny, tmp_path):
    ids, n = [5, 6, 7], -1e9
    rows = [(ids, [[6, 9, 0], [8, 7, 0], [0, 0, 0]], [[-1.0, -0.5, n], [-0.5, -1.0, n], [n] * 3], [[1, 1, 0]] * 2 + [[0] * 3])]
    import_dataset(write_axolotl(tmp_path / "a.parquet", rows), tmp_path / "out", "axolotl", str(tiny))
    (row,) = load_dataset(tmp_path / "out")
    assert row["target_ids"].reshape(-1, 2).tolist() == [[9, 6], [8, 7]]  # the most likely first
    np.testing.assert_allclose(row["target_tail"], 1 - np.exp(-0.5) - np.exp(-1), atol=1e-6)


def test_a_probability_of_zero_is_finite_and_none_is_above_one(tiny, tmp_path):
    rows = [([5, 6], [[6, 9], [0, 0]], [[0.05, -1e9]] * 2, [[1, 1], [0, 0]])]
    import_dataset(write_axolotl(tmp_path / "a.parquet", rows), tmp_path / "out", "axolotl", str(tiny))
    assert soft(tmp_path / "out")[1].logprobs_NK.tolist() == [[0, -10000]]


def test_fewer_targets_somewhere_are_never_made_up(tiny, tmp_path):
    ids = [5, 6, 7]
    rows = [(ids, [[6, 9], [8, 7], [0, 0]], [[-1.0, -2.0]] * 3, [[1, 1], [1, 0], [0, 0]])]
    file = write_axolotl(tmp_path / "a.parquet", rows)
    with pytest.raises(InputError, match=r"a.parquet rows 0 to 0: has from 1 to 2 targets per position, not 2; --k 1 keeps"):
        import_dataset(file, tmp_path / "out", "axolotl", str(tiny))
    import_dataset(file, tmp_path / "out", "axolotl", str(tiny), k=1)
    (row,) = load_dataset(tmp_path / "out")
    assert row["target_ids"].tolist() == [6, 8]


def test_targets_that_are_one_position_late_are_refused(tiny, tmp_path):
    """What axolotl 0.19 makes of stored log-probabilities through its chat template."""
    ids = np.random.default_rng(0).integers(0, 40000, size=80).tolist()
    targets_of = [[token, 45000 + n] for n, token in enumerate(ids)]
    masks = [[[0, 0]] * 10 + [[1, 1]] * 69 + [[0, 0]]]
    on_time = [(ids, [*targets_of[1:], [0, 0]], [[-0.5, -1.0]] * 80, *masks)]
    import_dataset(write_axolotl(tmp_path / "a.parquet", on_time), tmp_path / "out", "axolotl", str(tiny))
    late = [(ids, targets_of, [[-0.5, -1.0]] * 80, *masks)]
    with pytest.raises(InputError, match=r"b.parquet rows 0 to 0: the targets are one position late: 100% of them"):
        import_dataset(write_axolotl(tmp_path / "b.parquet", late), tmp_path / "back", "axolotl", str(tiny))


def test_a_packed_capture_without_labels(tiny, tmp_path):
    """As DistillKit's packing leaves it: texts numbered in `attention_mask`, no entry at the last token of a row."""
    ids = [[5, 6, 7, 8, 9, 3, 4], [5, 6, 2, 2, 2]]
    after = [[6, 7, 99, 9, 3, 4], [6, 99, 2, 2, 2]]  # 99: the token behind a text, which was cut off
    packed = [[list(int(f"{n:016b}{n + 1:016b}", 2).to_bytes(4, "big")) for n in row] for row in after]
    table = {
        "input_ids": ids,
        "attention_mask": [[1, 1, 1, 2, 2, 2, 2], [1, 1, 0, 0, 0]],
        "compressed_logprobs": [[list(np.array([-0.25, -2.0], "<f4").tobytes())] * len(row) for row in after],
        "bytepacked_indices": packed,
    }
    pq.write_table(pa.table(table), tmp_path / "data_0.parquet")
    (tmp_path / "compression_config.yaml").write_text("{d: 49152, k: 2, exact_k: 2, residual_bins: [], delta_encoding: false}")
    import_dataset(tmp_path, tmp_path / "out", "distillkit", str(tiny))
    rows = list(load_dataset(tmp_path / "out"))
    assert [(row["input_ids"].tolist(), int(row["completion_start"])) for row in rows] == [
        ([5, 6, 7], 1),
        ([8, 9, 3, 4], 1),
        ([5, 6], 1),
    ]
    assert rows[0]["target_ids"].reshape(-1, 2).tolist() == [[6, 7], [7, 8]]
    np.testing.assert_allclose(rows[1]["token_logprobs"], [-0.25, -0.25, -0.25])


def test_text_there_and_back_is_exact(tiny, tmp_path):
    lines = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Says "a\\b"\u2028\n—?'}],
            "completion": [{"role": "assistant", "content": " Yes.\t\n\n{x}"}],
        },
        {"prompt": "One string", "completion": "and another"},
    ]
    (tmp_path / "in").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / "in" / name).write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    import_dataset(tmp_path / "in", tmp_path / "ours", "jsonl", str(tiny))
    export_dataset(tmp_path / "ours", tmp_path / "out", "jsonl")
    for split in SPLITS:
        first, second = (json.loads(line) for line in (tmp_path / f"out/{split}.jsonl").read_text().split("\n")[:-1])
        assert first == lines[0]
        assert second["prompt"] == [{"role": "user", "content": "One string"}]
        assert second["completion"] == [{"role": "assistant", "content": "and another"}]
    assert opened(tmp_path / "out", "test")[0] == first | {"prompt": lines[0]["prompt"], "completion": lines[0]["completion"]}


def test_plain_text_there_and_back_is_plain_text(tiny, tmp_path):
    lines = [{"text": "One two.\nThree"}, {"prompt": "Four?", "completion": "Five."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_dataset(tmp_path / "a.jsonl", tmp_path / "ours", "jsonl", str(tiny))
    export_dataset(tmp_path / "ours", tmp_path / "out", "jsonl")
    written = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert written[0] == lines[0]
    assert written[1].keys() == {"prompt", "completion"}
    import_dataset(tmp_path / "out/train.jsonl", tmp_path / "again", "jsonl", str(tiny))
    for row, again in zip(load_dataset(tmp_path / "ours"), load_dataset(tmp_path / "again"), strict=True):
        assert row["input_ids"].tolist() == again["input_ids"].tolist()
        assert len(row["prompt"]) == len(again["prompt"])


def test_rows_that_cannot_be_used_are_kept_with_their_reasons(tiny, tmp_path):
    rows = [{"prompt": "a", "completion": str(number)} for number in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "a"}\n')
    import_dataset(tmp_path / "a.jsonl", tmp_path / "ours", "jsonl", str(tiny))
    (kept,) = pq.read_table(tmp_path / "ours/rejected.parquet").to_pylist()
    assert kept["place"].endswith("a.jsonl line 21")
    assert kept["reason"].startswith("must have `messages`")
    assert len(load_dataset(tmp_path / "ours")) == 20


def test_two_files_that_hold_the_same_give_rows_of_different_ids(tiny, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    import_dataset(tmp_path / "in", tmp_path / "ours", "jsonl", str(tiny))
    assert len({row["id"] for row in load_dataset(tmp_path / "ours")}) == 2


def test_text_in_the_ids_of_the_teacher(tiny, source, tmp_path):
    """The prompt as `generate` sees it; the end token is the last, whatever the template writes after it."""
    from transformers import AutoTokenizer

    (tmp_path / "a.jsonl").write_text('{"prompt": "Say 3 in words.", "completion": "Three."}\n')
    import_dataset(tmp_path / "a.jsonl", tmp_path / "ours", "jsonl", str(tiny))
    (row,) = load_dataset(tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    start = int(row["completion_start"])
    assert tokenizer.decode(row["input_ids"][start:]) == "Three.<|im_end|>"
    assert row["finish_reason"] == "stop"
    assert np.isnan(row["token_logprobs"]).all()
    same = [r for split in SPLITS for r in load_dataset(source, split) if r["prompt"][-1]["content"] == "Say 3 in words."]
    assert row["input_ids"][:start].tolist() == same[0]["input_ids"][: int(same[0]["completion_start"])].tolist()
    assert read_manifest(tmp_path / "ours")["targets"] == {"kind": "none"}
    for form in ("axolotl", "distillkit"):
        with pytest.raises(InputError, match=f"{form} does not support targets of kind none"):
            export_dataset(tmp_path / "ours", tmp_path / "none", form)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: must be a JSON object"),
        ('{"prompt": "a"}', "line 2: must have `messages`"),
        ('{"completion": "a"}', "line 2: has no conversation in a known format, only completion"),
        ('{"prompt": 3, "completion": "a"}', "line 2: must have `messages`"),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}], "completion": "a"}',
            "line 2: the assistant's turn 2 does not follow a turn to answer",
        ),
        ('{"prompt": "a", "completion": null}', "line 2: must have `messages`"),
        ('{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}', "line 2: must have `messages`"),
    ],
)
def test_a_bad_line_is_named_and_leaves_nothing(tiny, tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(InputError, match=rf"a.jsonl {re.escape(message)}"):
        import_dataset(tmp_path / "a.jsonl", tmp_path / "out", "jsonl", str(tiny))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([5, 49152], [[6]] * 2, [[-1.0]] * 2, [[1]] * 2), "contains the token 49,152, but .* has 49,152"),
        (([5, 6], [[6]] * 2, [[float("nan")]] * 2, [[1]] * 2), "not log-probabilities"),
        (([5, 6], [[6]] * 2, [[17.0]] * 2, [[1]] * 2), "not log-probabilities"),
        (([5, 6, 7, 8], [[6], [7], [8], [8]], [[-1.0], [float("inf")], [-1.0], [-1.0]], [[1]] * 4), "not log-probabilities"),
        (([5, 6], [[6]] * 2, [[-1.0]] * 2, [1, 1]), "the column `target_mask` holds .*, not lists of lists of numbers"),
        (([5, 6], [[0.5]] * 2, [[-1.0]] * 2, [[1]] * 2), "`target_token_ids` holds .*, not lists of lists of whole numbers"),
        (("ab", [[6]] * 2, [[-1.0]] * 2, [[1]] * 2), "the column `input_ids` holds string, not lists of whole numbers"),
        (([5, 6], [[6]], [[-1.0]] * 2, [[1]] * 2), "do not have one entry per token"),
        (([5, 6], [[6]] * 2, [[-1.0, -2.0]] * 2, [[1]] * 2), "do not have one entry per token"),
        (([5, 6], [[6]] * 2, [[-1.0]] * 2, [[0]] * 2), "contains no completions with targets"),
        (([5, None], [[6]] * 2, [[-1.0]] * 2, [[1]] * 2), "the column `input_ids` has a null among its numbers"),
        (([5, 6], [[6]] * 2, [[-1.0], [None]], [[1]] * 2), "the column `target_logprobs` has a null among its numbers"),
        (([5, 6], [[6, 7, 8]] * 2, [[-0.1] * 3] * 2, [[1] * 3] * 2), r"the probabilities of a position add up to 2\.71"),
    ],
)
def test_bad_columns_are_named_and_leave_nothing(tiny, tmp_path, row, message):
    file = write_axolotl(tmp_path / "a.parquet", [row])
    with pytest.raises(InputError, match=rf"a.parquet.*{message}"):
        import_dataset(file, tmp_path / "out", "axolotl", str(tiny))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_other_columns_and_other_configurations(source, tiny, tmp_path):
    export_dataset(source, tmp_path / "dk", "distillkit")
    with pytest.raises(InputError, match=r"test.parquet rows .* has no column `target_token_ids`, only input_ids, "):
        import_dataset(tmp_path / "dk/test.parquet", tmp_path / "out", "axolotl", str(tiny))
    config = tmp_path / "dk/compression_config.yaml"
    config.write_text(config.read_text().replace("exact_k: 8", "exact_k: 7"))
    with pytest.raises(InputError, match=r"entries of 16 and 16 bytes, but compression_config.yaml means 14 and 16"):
        import_dataset(tmp_path / "dk", tmp_path / "out", "distillkit", str(tiny))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"a.parquet: cannot be read as Parquet"):
        import_dataset(tmp_path / "a.parquet", tmp_path / "out", "axolotl", str(tiny))
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"rows.jsonl: must be a .parquet file"):
        import_dataset(tmp_path / "rows.jsonl", tmp_path / "out", "axolotl", str(tiny))
    with pytest.raises(InputError, match=r"a.parquet: must be a .jsonl or .json file"):
        import_dataset(tmp_path / "a.parquet", tmp_path / "out", "jsonl", str(tiny))
    with pytest.raises(InputError, match=r"contains no .jsonl files"):
        import_dataset(tmp_path / "dk", tmp_path / "out", "jsonl", str(tiny))


def test_a_damaged_parquet_file_is_named(source, tiny, tmp_path):
    export_dataset(source, tmp_path / "out", "axolotl")
    file = tmp_path / "out/train.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 255
    for damaged, message in ((content[:-9], "cannot be read as Parquet"), (content, "the file was damaged or changed")):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=f"train.parquet: .*{message}"):
            import_dataset(file, tmp_path / "back", "axolotl", str(tiny))
        assert not (tmp_path / "back").exists()


def test_the_command(source, tiny, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    wrong = [
        ([source, tmp_path / "full", "--to", "axolotl"], "full: exists and is not empty"),
        ([source, tmp_path / "out"], "one of the arguments --to --from is required"),
        ([source, tmp_path / "out", "--to", "parquet"], "invalid choice: 'parquet'"),
        ([source, tmp_path / "out", "--to", "jsonl", "--teacher", tiny], "--teacher is only for --from"),
        ([source, tmp_path / "out", "--to", "axolotl", "--exact-k", 4], "--exact-k needs --to distillkit"),
        ([source, tmp_path / "out", "--to", "distillkit", "--exact-k", 0], "--exact-k 0: with 8 values"),
        ([source, tmp_path / "out", "--from", "jsonl"], "needs --teacher"),
        (
            [source, tmp_path / "out", "--from", "axolotl", "--teacher", "./nowhere"],
            "--teacher: ./nowhere is neither a model directory",
        ),
        ([tmp_path / "nowhere", tmp_path / "out", "--to", "jsonl"], "nowhere: no such dataset"),
        ([tmp_path / "nowhere", tmp_path / "out", "--from", "jsonl", "--teacher", tiny], "nowhere: no such file or directory"),
    ]
    for arguments, message in wrong:
        with pytest.raises(SystemExit, match="2"):
            main(["convert", *map(str, arguments)])
        assert message in capsys.readouterr().err
    result = run_cli("convert", source, tmp_path / "out", "--to", "distillkit", "--exact-k", 1)
    assert result.returncode == 0, result.stderr
    assert re.search(r"those on the curve by 0\.\d+ on average and at most \d\.\d+", result.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {"full", "out"}


def test_a_capture_as_the_sampler_writes_it_keeps_its_last_token(source, tiny, tmp_path):
    """T tokens and T − 1 entries: the last entry predicts the last token, often the one that ends the text."""
    export_dataset(source, tmp_path / "dk", "distillkit")
    for file in (tmp_path / "dk").glob("*.parquet"):
        table = pq.read_table(file)
        for name in ("compressed_logprobs", "bytepacked_indices"):
            column = pa.array([row[:-1] for row in table[name].to_pylist()], table.schema.field(name).type)
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
        pq.write_table(table, file)
    import_dataset(tmp_path / "dk", tmp_path / "back", "distillkit", str(tiny))
    for split in ("train", "test"):
        for row, again in zip(load_dataset(source, split), load_dataset(tmp_path / "back", split), strict=True):
            assert again["input_ids"].tolist() == row["input_ids"].tolist()
            assert int(again["completion_start"]) == int(row["completion_start"])
            assert len(again["target_tail"]) == len(row["target_tail"])


def test_something_is_always_missing_to_one(tiny, tmp_path):
    """A teacher that is sure: its float16 values add up to one and more, and DistillKit takes log(1 − Σ p)."""
    generator, rows = np.random.default_rng(0), []
    for number in range(6):
        logits = generator.normal(size=(20, 300)) * 4
        logits[np.arange(20), generator.integers(0, 300, 20)] += 25
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        ids = generator.integers(3, 300, 20)
        rows.append(make_row(str(number), [5, 6], ids, logprobs[np.arange(20), ids], most_likely(logprobs, 8)))
    write_rows(tmp_path / "sure", rows, "topk", 49152, k=8)
    export_dataset(tmp_path / "sure", tmp_path / "out", "distillkit")
    for row in opened(tmp_path / "out", "train"):
        for entry in row["compressed_logprobs"]:
            p = np.exp(np.frombuffer(bytes(entry), "<f2").astype(np.float32))
            assert p.sum() < 1
            assert p.sum() > 0.99 or p.max() < 0.99


@pytest.fixture
def not_shown(tmp_path):
    """A dataset of one row: an endpoint has named one of two tokens at its second position, and nothing at its end token."""
    ids_NK, logprobs_NK = np.array([[1, 2], [3, 3], [7, 7]]), np.log([[0.6, 0.2], [0.5, 1.0], [1.0, 1.0]])
    logprobs_NK[1, 1] = logprobs_NK[2] = -np.inf
    text = [{"role": "user", "content": "x"}]
    kept = targets.TopK.from_kept(ids_NK, logprobs_NK)
    row = Row("a", text, text, [1, 2], np.array([1, 3, 7]), "stop", np.array([-1, -1, np.nan], dtype=np.float32), kept)
    shard = write_shard(tmp_path / "data", "train", 0, 1, rows_to_table([row], 50))
    about = described(vocab_size=50) | {"targets": kept.describe(2)}
    about["tokenizer"]["end_token_ids"] = [7]
    write_manifest(tmp_path / "data", [shard], about)
    return tmp_path / "data"


def test_axolotl_masks_what_an_endpoint_has_not_shown(not_shown, tmp_path):
    """Nothing infinite is in the file: 0 times −∞ is not 0."""
    export_dataset(not_shown, tmp_path / "out", "axolotl")
    (written,) = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    assert written["target_mask"] == [[0, 0], [1, 1], [1, 0], [0, 0], [0, 0]]
    assert np.isfinite(written["target_logprobs"]).all()


def test_distillkit_does_not_count_what_an_endpoint_has_not_shown(not_shown, tmp_path):
    """Nothing infinite is in the file, and no token stands twice at a position."""
    export_dataset(not_shown, tmp_path / "out", "distillkit")
    (written,) = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    assert written["input_ids"] == [1, 2, 1, 3, 7]
    assert written["labels"] == [-100, 2, 1, -100, -100]
    probabilities = np.exp([np.frombuffer(bytes(entry), "<f2").astype(float) for entry in written["compressed_logprobs"]])
    np.testing.assert_allclose(probabilities, [[1, 0], [0.6, 0.2], [0.5, 0], [1, 0], [1, 0]], atol=3e-3)
    ids = [bits_of(entry, 6, 2) for entry in written["bytepacked_indices"]]
    assert ids[1] == [1, 2]
    assert ids[2][0] == 3 != ids[2][1]
    assert ids[3][0] == 7 != ids[3][1]
    assert "nan" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_tokens_of_no_weight_are_others_than_are_there(k):
    """Against sets, with a vocabulary that has no token to spare."""
    generator = np.random.default_rng(k)
    ids_NK = np.array([generator.permutation(k)[:k] for _ in range(50)])
    logprobs_NK = np.where(generator.random((50, k)) < 0.5, -1.0, -np.inf)
    ids_NK = np.where(np.isfinite(logprobs_NK), ids_NK, ids_NK[:, :1])
    found_NK, filled_NK = formats._filled(ids_NK, logprobs_NK)
    assert [set(row) for row in found_NK.tolist()] == [set(range(k))] * 50
    assert (found_NK == ids_NK)[np.isfinite(logprobs_NK)].all()
    assert filled_NK.min() >= -30


def test_files_are_held_out_by_what_they_are_called(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "test-00000-of-1.jsonl", "eval_2.jsonl", "evaluated.jsonl", "testimony.jsonl"):
        (tmp_path / name).touch()
    of = {split: sorted(file.name for file in files) for split, files in imports._files(tmp_path, (".jsonl",)).items()}
    assert of["test"] == ["eval_2.jsonl", "test-00000-of-1.jsonl", "test.jsonl"]
    assert of["train"] == ["evaluated.jsonl", "testimony.jsonl", "train.jsonl"]
    (tmp_path / "dataset_info.json").touch()  # describes the others
    assert imports._files(tmp_path, (".jsonl", ".json"))["train"] == [tmp_path / name for name in of["train"]]
    assert imports._files(tmp_path / "test.jsonl", (".jsonl",)) == {"train": [tmp_path / "test.jsonl"], "test": []}
