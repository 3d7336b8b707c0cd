"""The best of a prompt's answers, by hand and against every group; and the pairs for preference training."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.config import load_experiment
from llmdistill.data.convert.exports import export_dataset
from llmdistill.data.dataset import load_dataset
from llmdistill.errors import InputError
from llmdistill.stages.curate import _whole_prompts, curate
from llmdistill.stages.generate import generate
from tests.curation.steps import apply_step, table

LOGPROBS = [[-1.0, -3.0], [-1.5], [-0.5, -0.5], [-4.0], [-4.0], [float("nan")]]
PROMPTS = ["a", "a", "a", "b", "b", "b"]


def test_by_the_teachers_own_likelihood(tmp_path):
    """Means −2, −1.5, −0.5 for one prompt, −4, −4 and an unknown one for the other; the first of equals stays."""
    rows = table(["x"] * 6, PROMPTS, logprobs=LOGPROBS)
    reasons, _ = apply_step(tmp_path, {"best_of": {}}, rows)
    assert reasons == [
        "score -2.000, row row2 has -0.500", "score -1.500, row row2 has -0.500", None,
        None, "score -4.000, row row3 has -4.000", "no log-probabilities of its tokens are known",
    ]  # fmt: skip
    pairs = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("row2", "row0"), ("row2", "row1"), ("row3", "row4")]
    two, _ = apply_step(tmp_path, {"best_of": {"keep": 2}}, rows)
    assert [reason is None for reason in two] == [False, True, True, True, True, False]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 7))
def test_a_group_never_ends_within_a_prompt(letters, size):
    rows = table([str(n) for n in range(len(letters))], letters)
    batches = [rows.slice(start, size) for start in range(0, len(rows), size)]
    groups = list(_whole_prompts(batches))
    assert pa.concat_tables(groups).equals(rows)
    for before, after in itertools.pairwise(groups):
        assert before["prompt"][-1] != after["prompt"][0]


@pytest.fixture
def curated(experiment_file, tmp_path):
    def run(*overrides):
        base = [("generate.samples", "4"), ("prompts.limit", "12"), ("curate", "[best_of: {}]"), *overrides]
        experiment = load_experiment(experiment_file, base)
        generate(experiment)
        curate(experiment)
        return tmp_path / "run"

    return run


def test_every_prompt_keeps_its_best_and_its_losers_become_pairs(curated, tmp_path):
    run = curated()
    rows = load_dataset(run / "data")
    means = {str(row["id"]): float(row["token_logprobs"].mean()) for row in rows}
    best = {}
    for row in rows:
        key = json.dumps([dict(message) for message in row["prompt"]])
        best.setdefault(key, []).append(str(row["id"]))
    winners = {max(ids, key=means.__getitem__) for ids in best.values()}
    kept = {str(row["id"]) for split in ("train", "test") for row in load_dataset(run / "curated", split)}
    assert kept == winners
    assert len(kept) == 12

    export_dataset(run / "curated", tmp_path / "pairs", "preferences")
    texts = {str(row["id"]): row["completion"][0]["content"] for row in rows}
    found = []
    for split in ("train", "test"):
        splits = {str(row["id"]) for row in load_dataset(run / "curated", split)}
        for line in (tmp_path / f"pairs/{split}.jsonl").read_text().splitlines():
            pair = json.loads(line)
            (winner,) = set(best[json.dumps(pair["prompt"])]) & winners
            assert winner in splits
            assert pair["chosen"][0]["content"] == texts[winner]
            assert pair["chosen_score"] == pytest.approx(means[winner], rel=1e-5)
            assert pair["rejected_score"] <= pair["chosen_score"]
            found.append(pair["rejected"][0]["content"])
    assert sorted(found) == sorted(texts[identity] for identity in set(means) - winners)
    assert np.isfinite([float(value) for value in means.values()]).all()


def test_pairs_need_losers(curated, tmp_path):
    run = curated(("curate", "[]"))
    with pytest.raises(InputError, match="no preference pairs"):
        export_dataset(run / "curated", tmp_path / "pairs", "preferences")
    assert not (tmp_path / "pairs").exists()
