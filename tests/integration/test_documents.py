"""A folder of Markdown files becomes a curated dataset with soft targets, the same one each time, with every row counted."""

import json
import os
import time

import pyarrow.parquet as pq
import pytest

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.workflow.plan import stages
from tests.conftest import ROOT, run_cli
from tests.forked import start_forked

# The tiny teacher writes no sentences: what it writes up to the first e is taken for a question, long or short.
TEMPLATE = """
name: question
description: Anything.
variables: [passage]
answer: {field: instruction, stop: [e], pattern: '(?s)(.*)'}
messages: [{role: user, content: "{{ passage }}"}]
"""


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """The same experiment done twice, in two directories."""
    directory = tmp_path_factory.mktemp("documents")
    (directory / "question.yaml").write_text(TEMPLATE)
    file = directory / "experiment.yaml"
    file.write_text(f"""
output: {directory}/one
teacher: {{model: {tiny}, engine: transformers, dtype: float32, batch_size: 8}}
prompts:
  source: examples/documents
  passages: {{size: 200, min_size: 40}}
  limit: 24
  steps:
    - ask: {{template: {directory}/question.yaml, samples: 2}}
    - novelty: {{max_overlap: 0.7}}
  sampling: {{max_tokens: 24}}
  template: prompts/instruct.yaml
generate: {{max_tokens: 12, rows_per_shard: 10}}
targets: {{kind: sampled, n: 6}}
curate: [{{repetition: {{max_share: 0.3}}}}, {{duplicates: }}]
eval: {{held_out: 0.3}}
""")
    for name in ("one", "two"):
        for stage in ("prompts", "generate", "curate"):
            result = run_cli(stage, file, "--output", directory / name)
            assert result.returncode == 0, result.stderr
    return directory


def test_a_second_run_from_nothing_gives_the_same_bytes(made):
    one, two = (
        {path.relative_to(made / name): path.read_bytes() for path in (made / name).rglob("*.parquet")} for name in ("one", "two")
    )
    assert len(one) > 10
    assert one == two


def test_a_kill_while_the_teacher_is_asked_loses_nothing(made):
    """kill −9 once the first shard of answers is there: the same command ends in the bytes of the undisturbed run."""
    killed = made / "killed/prompts"
    words = ["llmdistill", "prompts", str(made / "experiment.yaml"), "--output", str(made / "killed")]
    process = start_forked(words, ROOT, os.environ, made / "out", made / "err")
    deadline = time.monotonic() + 120
    while not (there := list(killed.glob("1-ask/train-*.parquet"))):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.join()
    kept = {path: path.stat().st_mtime_ns for path in there}
    assert not (killed / "prompts.parquet").exists()
    assert run_cli("prompts", made / "experiment.yaml", "--output", made / "killed").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for path in (made / "one/prompts").rglob("*.parquet"):
        assert (killed / path.relative_to(made / "one/prompts")).read_bytes() == path.read_bytes()
    assert not list(killed.rglob(".*"))


def test_every_row_is_where_it_was_counted(made):
    """From the passages to the two splits: what goes into a step is what the step before kept."""
    steps = json.loads((made / "one/prompts/run.json").read_text())["results"]["steps"]
    assert [step["name"] for step in steps] == ["source", "1 ask", "2 novelty", "template"]
    assert all(step["rows_in"] == step["kept"] + step["rejected"] + step["failed"] for step in steps)
    assert [step["rows_in"] for step in steps] == [24, 48, steps[1]["kept"], steps[2]["kept"]]
    left = pq.read_table(made / "one/prompts/rejected.parquet").to_pylist()
    assert len(left) == sum(step["rows_in"] - step["kept"] for step in steps)
    assert all(row["reason"] for row in left)
    curated = json.loads((made / "one/curated/dataset.json").read_text())
    assert curated["rows_in"] == steps[-1]["kept"]
    assert curated["rows"] + pq.read_metadata(made / "one/curated/rejected.parquet").num_rows == curated["rows_in"]


def test_every_row_knows_the_passage_that_it_comes_from(made):
    rows = load_dataset(made / "one/curated")
    assert len(rows)
    for row in rows:
        metadata = json.loads(str(row["metadata"]))
        source, (step,) = metadata["llmdistill"]["lineage"]["source"], metadata["llmdistill"]["lineage"]["steps"]
        start, end = source["characters"]
        assert (ROOT / source["file"]).read_text()[start:end] == metadata["passage"]
        assert row["prompt"][0]["content"] == step["gave"]["instruction"]


def test_run_begins_with_the_prompts_where_there_are_steps(made):
    assert [stage.name for stage in stages(load_experiment(made / "experiment.yaml"))[:3]] == ["prompts", "generate", "curate"]
    again = run_cli("prompts", made / "experiment.yaml")
    assert "is finished" in again.stdout
    assert stages(load_experiment(ROOT / "configs/demo.yaml"))[0].name == "generate"


def test_the_shipped_example_reads_its_documents_without_a_teacher(tmp_path):
    result = run_cli(
        "run", "configs/documents.yaml", "--output", tmp_path / "run", "--dry-run", "--teacher.model", "some/teacher"
    )
    assert result.returncode == 0, result.stderr
    assert "source    24 in = 24 kept" in result.stdout
    assert "ask       96 questions" in result.stdout
    assert not (tmp_path / "run").exists()
