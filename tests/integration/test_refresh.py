"""Runs that come back: what is new is added, the student is promoted if it is not worse, twice a night is once."""

import json
import os

import pytest

from llmdistill import load_dataset
from llmdistill.data.manifest import read_manifest
from llmdistill.runs import lock
from llmdistill.runs.files import read_json, write_json
from llmdistill.workflow.refresh import _decide, _made_from, _promote
from tests.conftest import run_cli
from tests.factories import write_experiment


def difference(low, high):
    return {"worse": "student before", "metric": "kl", "mean": (low + high) / 2, "low": low, "high": high}


@pytest.mark.parametrize(
    ("kl", "tasks", "promoted"),
    [
        ((-0.2, -0.1), None, True),
        ((-0.2, 0.019), None, True),
        ((-0.2, 0.021), None, False),
        ((0.1, 0.2), None, False),
        ((-0.2, -0.1), (-0.1, 0.02), True),
        ((-0.2, -0.1), (-0.1, -0.02), False),
    ],
)
@pytest.mark.parametrize("models", [["teacher", "student"], ["student"]], ids=["with its weights", "behind an API"])
def test_only_what_is_not_worse_is_promoted(tiny, tmp_path, models, kl, tasks, promoted):
    from llmdistill.config import load_experiment

    file = write_experiment(tiny, tmp_path)
    experiment = load_experiment(file, [("refresh", "{margin: 0.02}")])
    output = tmp_path / "run"
    by = "kl" if "teacher" in models else "nll"
    metrics = {"models": [{"name": name} for name in models], "differences": [{**difference(*kl), "metric": by}]}
    if tasks:
        metrics["tasks"] = {"together": {"differences": [{"against": "student before", **difference(*tasks)}]}}
    (output / "versions/2/eval").mkdir(parents=True)
    write_json(output / "versions/2/eval/metrics.json", metrics)
    assert _decide(experiment, output, [{"version": 1}]) == {"promoted": True, "reason": "it is the first"}
    decided = _decide(experiment, output, [{"version": 1, "promoted": True}, {"version": 2}])
    assert decided["promoted"] == promoted
    assert f"{kl[0]:+.3f} to {kl[1]:+.3f}" in decided["reason"]


def test_the_link_follows_what_is_recorded(tmp_path):
    """Whatever was interrupted between the decision, its record and the link."""
    versions = [{"version": 1, "promoted": True}, {"version": 2, "promoted": True}, {"version": 3, "promoted": False}]
    _promote(tmp_path, versions[:1])
    assert (tmp_path / "promoted").readlink().as_posix() == "versions/1/student"
    for _ in range(2):
        _promote(tmp_path, versions)
        assert (tmp_path / "promoted").readlink().as_posix() == "versions/2/student"
    assert [file.name for file in tmp_path.iterdir()] == ["promoted"]


def test_an_edited_template_is_something_new(tiny, tmp_path):
    from llmdistill.config import load_experiment

    template = tmp_path / "template.yaml"
    template.write_text("name: t\ndescription: d\nvariables: [prompt]\nmessages: [{role: user, content: 'Do: {{ prompt }}'}]\n")
    experiment = load_experiment(write_experiment(tiny, tmp_path), [("prompts.template", str(template))])
    before = _made_from(experiment)
    assert before == _made_from(experiment)
    template.write_text(template.read_text().replace("Do:", "Please do:"))
    assert before != _made_from(experiment)


def add_prompts(directory, numbers):
    with (directory / "prompts.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"prompt": f"Count to {number}."}) + "\n" for number in numbers)


@pytest.fixture(scope="module")
def nights(tiny, tmp_path_factory):
    """Three nights: the first, one with nothing new, and one with new prompts that is interrupted and goes on."""
    directory = tmp_path_factory.mktemp("refresh")
    file = write_experiment(tiny, directory)
    arguments = ["refresh", file, "--refresh", "{replay: 0.5, margin: 10}", "--eval.own_prompts", 0, "--eval.samples", 0]
    said = []

    def night(*more, status=0):
        result = run_cli(*arguments, *more, OMP_NUM_THREADS="1")
        assert result.returncode == status, result.stderr
        said.append(result.stdout + result.stderr)

    night()
    night()
    add_prompts(directory, range(24))
    night("--dry-run")
    with lock.alone([directory / "run/versions"], "refresh"):
        night(status=1)
    # a fault in the middle: the directory of the training is taken
    (directory / "run/versions/2/student").mkdir(parents=True)
    (directory / "run/versions/2/student/taken").touch()
    night(status=2)
    (directory / "run/versions/2/student/taken").unlink()
    night()
    night()
    return directory / "run", said


def test_each_version_adds_what_is_new_and_goes_on_from_the_last(nights):
    output, said = nights
    first, nothing, planned, locked, faulty, second, again = said
    assert "version 1 is promoted: it is the first" in first
    assert "nothing new since version 1" in nothing
    assert "would make version 2" in planned
    assert "24 new prompts" in planned
    assert f"run/versions: `refresh` is running here, process {os.getpid()} on " in locked
    assert "contains files not written by" in faulty
    assert "version 2, of 24 new prompts, continued" in second
    assert "generate  " in second
    assert "data is finished" in second
    assert "version 2 is promoted: its KL" in second
    assert "nothing new since version 2" in again
    assert (output / "promoted").resolve() == (output / "versions/2/student").resolve()
    versions = read_json(output / "refresh.json")["versions"]
    assert [entry["promoted"] for entry in versions] == [True, True]


def test_rows_are_new_ones_and_some_of_the_earlier(nights):
    output, said = nights
    prompts = [
        {row[0]["content"] for row in load_dataset(output / f"versions/{number}/data").with_format(None)["prompt"]}
        for number in (1, 2)
    ]
    assert len(prompts[0]) == len(prompts[1]) == 24
    assert not prompts[0] & prompts[1]
    run = read_json(output / "versions/2/student/run.json")
    assert str(output / "versions/1/student") in run["inputs"]
    assert str(output / "versions/1/curated/dataset.json") in run["inputs"]
    assert "of other datasets" in said[5]
    assert read_manifest(output / "versions/2/data")["prompts"][-1]["reasons"] == {"known": 24}


def test_both_versions_held_out_rows_are_measured(nights):
    output, _ = nights
    held_out = [len(load_dataset(output / f"versions/{number}/curated", "test")) for number in (1, 2)]
    assert read_json(output / "versions/2/eval/metrics.json")["held_out"]["rows"] == sum(held_out)
