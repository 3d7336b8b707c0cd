"""Rounds: the student writes, the teacher reads, the student learns from that."""

import json

import numpy as np
import pytest
import torch

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.data.manifest import read_manifest
from llmdistill.data.targets import SampledByStudent, SampledLogprobs
from llmdistill.errors import InputError
from llmdistill.runs.files import read_json
from llmdistill.runs.inputs import model_fingerprint
from llmdistill.workflow.plan import stages
from tests.conftest import run_cli
from tests.factories import write_experiment


def test_a_number_is_short_for_a_section(tiny, tmp_path):
    file = write_experiment(tiny, tmp_path)
    assert load_experiment(file, [("rounds", "2")]) == load_experiment(file, [("rounds", "{n: 2}")])
    assert load_experiment(file, [("rounds", "0")]).rounds is None
    assert [stage.name for stage in stages(load_experiment(file))] == [
        "generate", "curate", "prune", "train", "eval", "report",
    ]  # fmt: skip
    names = [stage.name for stage in stages(load_experiment(file, [("rounds", "2")]))]
    assert names[3:9] == ["train", *(f"round-1-{name}" for name in ("generate", "score", "curate", "train")), "round-2-generate"]
    assert names[-3:] == ["round-2-train", "eval", "report"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([("rounds", "1"), ("targets", "{kind: none}"), ("train.alpha", "0")], "rounds needs stored soft targets"),
        ([("rounds", "{loss: reverse_kl}"), ("targets", "{kind: sampled_logprobs}")], "rounds.loss is reverse_kl"),
        (
            [("rounds", "{loss: adaptive_kl}"), ("targets", "{kind: sampled}")],
            "rounds.loss is adaptive_kl.*; set targets.kind to topk",
        ),
        (
            [("rounds", "1"), ("targets", "{kind: sampled_by_student}"), ("train.loss", "reverse_kl")],
            "rounds needs stored soft targets",
        ),
        ([("train.loss", "jsd"), ("targets", "{kind: sampled}")], "set targets.kind to sampled_logprobs or topk"),
        (
            [
                ("rounds", "{loss: jsd}"),
                ("targets", "{kind: sampled}"),
                ("teacher.engine", "server"),
                ("teacher.url", "http://h:1"),
            ],
            "rounds with loss jsd and targets.kind sampled needs the teacher's probabilities of tokens that the student has",
        ),
        (
            [("targets", "{kind: sampled_logprobs}"), ("teacher.engine", "vllm"), ("teacher.ensemble", "[{model: other}]")],
            "targets.kind sampled_logprobs needs the full distribution of the ensemble, .* use engine transformers",
        ),
        (
            [
                ("rounds", "{loss: jsd}"),
                ("targets", "{kind: sampled}"),
                ("teacher.engine", "vllm"),
                ("teacher.ensemble", "[{model: other}]"),
            ],
            "return them, but not for an ensemble whose members are loaded in turn",
        ),
        ([("rounds", "{n: 0}")], "rounds.n should be greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(tiny, tmp_path, overrides, said):
    with pytest.raises(InputError, match=said):
        load_experiment(write_experiment(tiny, tmp_path), overrides)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run with one round, half of whose rows are the teacher's text."""
    directory = tmp_path_factory.mktemp("rounds")
    file = write_experiment(tiny, directory)
    rounds = "{n: 1, teacher_share: 0.5, loss: reverse_kl, limit: 12, args: {max_steps: 2}}"
    arguments = ["run", file, "--rounds", rounds, "--generate.temperature", 1]
    result = run_cli(*arguments, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    return directory / "run", result.stdout, arguments


def test_the_student_writes_what_the_teacher_reads(trained, tiny):
    """The round's text is the first student's, its log-probabilities are the teacher's."""
    output, _, _ = trained
    here = output / "rounds/1"
    written, read = load_dataset(here / "written/data"), load_dataset(here / "data")
    assert read_manifest(here / "written/data")["teacher"]["model"] == str(output / "student")
    assert read_manifest(here / "data")["teacher"]["model"] == str(tiny)
    assert len(written) == len(read) == 12
    assert list(written["id"]) == list(read["id"])
    asked = {json.dumps(prompt) for prompt in load_dataset(output / "curated").with_format(None)["prompt"]}
    for mine, theirs in zip(written, read, strict=True):
        assert mine["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert json.dumps([dict(turn) for turn in mine["prompt"]]) in asked
    from llmdistill.models.loading import load_model

    of_the_teacher, of_the_student = [], []
    models = {name: load_model(str(path), dtype="float32") for name, path in (("t", tiny), ("s", output / "student"))}
    for mine in written:
        ids, start = torch.from_numpy(mine["input_ids"]).long(), int(mine["completion_start"])
        with torch.inference_mode():
            for name, found in (("t", of_the_teacher), ("s", of_the_student)):
                logits = models[name](ids[None]).logits[0, start - 1 : -1]
                found.append(logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0].numpy())
    stored = np.concatenate([row["token_logprobs"] for row in read])
    np.testing.assert_allclose(stored, np.concatenate(of_the_teacher), atol=1e-4)
    by_writer = np.concatenate([row["token_logprobs"] for row in written])
    np.testing.assert_allclose(by_writer, np.concatenate(of_the_student), atol=0.05)  # its weights are stored in bfloat16


def test_the_round_goes_on_from_the_first_student(trained):
    output, said, _ = trained
    run = read_json(output / "rounds/1/student/run.json")
    assert run["inputs"][str(output / "student")] == model_fingerprint(str(output / "student"), None)
    assert run["settings"]["train"]["loss"] == "reverse_kl"
    assert run["results"]["steps"] == 2
    assert read_json(output / "student/run.json")["results"]["steps"] == 3
    assert "12 rows, and 12 of the" in said
    names = {model["name"]: model["path"] for model in read_json(output / "eval/metrics.json")["models"]}
    assert names["student"] == str(output / "rounds/1/student")
    assert names["student, first round"] == str(output / "student")


def test_a_finished_run_with_rounds_does_nothing(trained):
    output, _, arguments = trained
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    # What a stage was run with can be read, and run by itself.
    alone = run_cli("train", output / "rounds/1/configs/train.yaml")
    assert f"{output}/rounds/1/student is finished" in alone.stdout, alone.stderr
    again = run_cli(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished") == 9
    after = {file: file.stat().st_mtime_ns for file in output.rglob("*") if file.is_file()}
    changed = {file.name for file in before if after[file] != before[file]}
    assert changed <= {"report.html", "report.md", "report.png", "figures.json"}


@pytest.fixture(scope="module")
def drawn(tiny, tmp_path_factory):
    """A run with sampled targets and one round with reverse KL, for which the sample is drawn from the student.

    Half of its rows are the teacher's text, with the teacher's sample.
    """
    directory = tmp_path_factory.mktemp("drawn")
    file = write_experiment(tiny, directory)
    rounds = "{n: 1, loss: reverse_kl, limit: 6, teacher_share: 0.5, args: {max_steps: 2}}"
    arguments = ["run", file, "--rounds", rounds, "--targets", "{kind: sampled, n: 6}", "--eval.samples", 0]
    result = run_cli(*arguments, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert "6 rows, and 6 of the" in result.stdout
    return directory / "run", arguments


def test_the_student_draws_and_the_teacher_tells(drawn, tiny):
    """The ids and design weights are of the student's distribution, the log-probabilities the teacher's, by their own logits."""
    output, _ = drawn
    here = output / "rounds/1"
    assert read_manifest(output / "data")["targets"]["kind"] == "sampled"
    assert read_manifest(here / "written/data")["targets"]["kind"] == "sampled_logprobs"
    assert read_manifest(here / "curated")["targets"] == {
        "kind": "sampled_by_student", "n": 6, "unbiased": True, "relative_error": 2**-11,
    }  # fmt: skip
    written, read = load_dataset(here / "written/data"), load_dataset(here / "data")
    assert list(written["id"]) == list(read["id"])
    from llmdistill.models.loading import load_model

    teacher, student = (load_model(str(path), dtype="float32") for path in (tiny, output / "student"))
    for mine, theirs in zip(written, read, strict=True):
        ids, start = torch.from_numpy(mine["input_ids"]).long(), int(mine["completion_start"])
        with torch.inference_mode():
            log_p, log_q = (model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1).numpy() for model in (teacher, student))
        soft = SampledByStudent.of_rows([theirs], [len(log_p)])
        kept = SampledLogprobs.of_rows([mine], [len(log_p)])
        np.testing.assert_array_equal(soft.ids_NK, kept.ids_NK)
        np.testing.assert_allclose(soft.logprobs_NK, np.take_along_axis(log_p, soft.ids_NK, 1), rtol=2**-10, atol=1e-3)
        own = np.take_along_axis(log_q, soft.ids_NK, 1)
        weights = np.exp(own + soft.logdesign_NK)  # the first ones weigh what they are, the others share the rest
        np.testing.assert_allclose(weights.sum(1), 1, atol=0.1)  # the student's weights are stored in bfloat16
        for position, exact in enumerate(soft.exact_N):
            assert (soft.logdesign_NK[position, :exact] == 0).all()
            assert (soft.logdesign_NK[position, exact:] >= 0).all()


def test_the_round_learns_reverse_kl_from_it_and_is_finished(drawn):
    output, _ = drawn
    history = read_json(output / "rounds/1/student/trainer_state.json")["log_history"]
    assert all(np.isfinite(entry["reverse_kl"]) for entry in history if "reverse_kl" in entry)
    assert any("reverse_kl" in entry for entry in history)
    assert read_json(output / "rounds/1/student/run.json")["settings"]["train"]["loss"] == "reverse_kl"
    again = run_cli("score", output / "rounds/1/configs/score.yaml")
    assert "is finished" in again.stdout, again.stderr


def test_what_has_no_sample_of_its_writer_is_refused(drawn, tmp_path):
    """Text, a dataset with other targets, another n; and `generate`, which has no text to read."""
    output, arguments = drawn
    configuration = output / "rounds/1/configs/score.yaml"
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "a", "completion": "b"}\n')
    for source, n, said in (
        (text, 6, "has no sample of the model that wrote it"),
        (output / "data", 6, "has no sample of the model that wrote it"),
        (output / "rounds/1/written/data", 7, "targets.n is 7, but the sample in"),
    ):
        result = run_cli("score", configuration, "--score.source", source, "--targets.n", n, "--output", tmp_path / "out")
        assert result.returncode == 2
        assert said in result.stderr
        assert not (tmp_path / "out").exists()
    targets = ("--targets", "{kind: sampled_by_student}", "--train.loss", "reverse_kl")
    result = run_cli("generate", arguments[1], *targets, "--output", tmp_path / "out", "--dry-run")
    assert result.returncode == 2
    assert "for rounds set it to sampled" in result.stderr


def test_other_targets_are_not_mixed_in(trained, tiny):
    output, _, (_, file, *_) = trained
    mix = json.dumps({"datasets": [str(output / "rounds/1/written/data")], "share": 0.5})
    result = run_cli(
        "train", file, "--train.mix", mix, "--output", output.parent / "other", "--train.dataset", output / "curated"
    )
    assert result.returncode == 2
    assert "has different targets than" in result.stderr
