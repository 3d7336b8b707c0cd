"""What `run` says before it begins."""

import json
import subprocess
import sys

import pytest

from llmdistill.config import load_experiment
from llmdistill.data.dataset import load_dataset
from llmdistill.errors import BusyError, InputError
from llmdistill.runs import record
from llmdistill.stages import train
from llmdistill.stages.curate import curate
from llmdistill.stages.generate import generate
from llmdistill.students.origins import ensure_before
from llmdistill.teachers import shared_file
from llmdistill.workflow.checks import check_stale
from llmdistill.workflow.pipeline import dry_run, run_pipeline
from tests.conftest import ROOT
from tests.factories import write_experiment, write_foreign


def test_a_dry_run_shows_every_round_before_there_is_a_student(tiny, tmp_path, capsys):
    file = write_experiment(tiny, tmp_path)
    dry_run(load_experiment(file, [("rounds", "2"), ("targets.kind", "topk")]))
    said = capsys.readouterr().out
    for number in (1, 2):
        for command, directory in [("generate", "written/data"), ("score", "data"), ("curate", "curated"), ("train", "student")]:
            assert f"{command} would write" in said
            assert f"rounds/{number}/{directory}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start", [dry_run, run_pipeline])
@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("curate", "[{contamination: {against: [nowhere.jsonl]}}]", r"nowhere\.jsonl"),
        ("eval.tasks", "[nowhere.yaml]", r"nowhere\.yaml: no such file"),
        ("student", "{}", r"student needs one of the keys student\.model"),
        ("student.model", "./nowhere", r"student\.model: .*nowhere"),
        ("train.args.learning_rat", "1", r"train\.args\.learning_rat: .*did you mean train\.args\.learning_rate"),
        ("rounds", "{n: 1, args: {max_step: 1}}", r"rounds\.args\.max_step: .*did you mean rounds\.args\.max_steps"),
        ("rounds", "{n: 1, args: {lr_scheduler_type: foo}}", r"rounds\.args: .*foo"),
        ("train.args.optim", "foo", r"train\.args: .*foo"),
        ("train.args.packing", "true", r"train\.args: packing needs max_length"),
        ("train.args.loss_type", "dft", r"train\.args: loss_type='dft' is not supported"),
        ("student.lora", "{r: 4, alpha: 8, args: {use_doraa: true}}", r"did you mean student\.lora\.args\.use_dora"),
        ("targets", "{kind: none}", r"train\.alpha is 0\.9, but targets\.kind is none"),
        ("eval.held_out", "0", r"eval\.held_out is 0, which leaves nothing for `eval`"),
        ("prompts.limit", "4", r"1 held-out prompt, but an interval needs at least 2; raise eval\.held_out"),
        ("export", "{formats: [w8a8]}", r"pip install 'llmdistill\[gptq\]'"),
    ],
)
def test_what_later_stages_read_is_looked_for_before_the_first(tiny, tmp_path, start, key, value, error):
    file = write_experiment(tiny, tmp_path)
    with pytest.raises(InputError, match=error):
        start(load_experiment(file, [(key, value)]))
    assert not (tmp_path / "run").exists()


def foreign(directory, changed):
    """A student of another vocabulary whose tokenizer is changed."""
    write_foreign(directory)
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return directory


def test_a_tokenizer_whose_bytes_cannot_be_told_is_refused_before_the_teacher_works(tiny, tmp_path):
    words = {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}, "pre_tokenizer": {"type": "Whitespace"}}
    student = foreign(tmp_path / "student", words)
    with pytest.raises(InputError, match=r"student\.model: cannot determine the bytes of .* tokens"):
        run_pipeline(load_experiment(write_experiment(tiny, tmp_path), [("student.model", str(student))]))
    assert not (tmp_path / "run").exists()


def test_a_student_whose_answers_have_no_end_is_refused_before_the_teacher_works(tiny, tmp_path):
    student = foreign(tmp_path / "student", {})
    for file in student.glob("*.json"):
        said = json.loads(file.read_text())
        file.write_text(json.dumps({name: value for name, value in said.items() if name not in ("eos_token", "eos_token_id")}))
    (student / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(
        InputError, match=r"student\.model: neither the configuration nor the tokenizer of .* names a token that ends"
    ):
        run_pipeline(load_experiment(write_experiment(tiny, tmp_path), [("student.model", str(student))]))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def begun(tiny, tmp_path):
    """A configuration with a dataset, what `curate` made of it, and a student that has been begun."""
    file = write_experiment(tiny, tmp_path)
    experiment = load_experiment(file)
    generate(experiment)
    curate(experiment)
    (claim,) = train.claims(experiment)
    record.begin(*claim, experiment.seed)
    (claim.directory / "model.safetensors").touch()
    return file


def test_work_of_other_settings_is_named_whole_and_once(begun, tmp_path):
    assert check_stale(load_experiment(begun)) == {}
    hotter = load_experiment(begun, [("generate.temperature", "0.5"), ("train.alpha", "0.25")])
    with pytest.raises(InputError) as refused:
        run_pipeline(hotter)
    assert str(refused.value).splitlines() == [
        f"{tmp_path / 'run'} was made with other settings:",
        "  data: generate.temperature was 1.0, is 0.5",
        "  student: train.alpha was 0.9, is 0.25",
        "  curated: made from these",
        f"{record.REMEDY}",
    ]
    only_training = load_experiment(begun, [("train.alpha", "0.25")])
    assert list(check_stale(only_training, remake=True)) == [tmp_path / "run" / "student"]
    with pytest.raises(
        InputError, match=r"data was made with other settings: .* is 0\.5; curated, student were made from it\. Choose"
    ):
        generate(hotter)


def test_an_experiment_may_be_moved(begun, tmp_path):
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = ("output", str(tmp_path / "moved"))
    assert check_stale(load_experiment(begun, [moved])) == {}
    stale = check_stale(load_experiment(begun, [moved, ("generate.temperature", "0.5")]), remake=True)
    assert {path.name: why for path, why in stale.items()} == {
        "data": "generate.temperature was 1.0, is 0.5",
        "curated": "made from these",
        "student": "made from these",
    }


def test_remake_removes_what_is_stale_and_nothing_else(begun, tmp_path, monkeypatch, capsys):
    for name in ("check_plan", "run_stages"):
        monkeypatch.setattr(f"llmdistill.workflow.pipeline.{name}", lambda *_: None)
    dry_run(load_experiment(begun, [("curate", "[{length: {min_tokens: 2}}]")]), remake=True)
    assert "would delete" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["curated", "data", "student"]
    shared_file(tmp_path / "run/curated").touch()  # what was spent on it
    run_pipeline(load_experiment(begun, [("curate", "[{length: {min_tokens: 2}}]")]), remake=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]


def test_remake_removes_nothing_in_which_another_process_works(begun, tmp_path):
    holder = "import sys, time; from pathlib import Path; from llmdistill.runs import lock\n"
    holder += "with lock.alone([Path(sys.argv[1])], 'curate'): print('held', flush=True); time.sleep(100)"
    directory = tmp_path / "run/curated"
    with subprocess.Popen([sys.executable, "-c", holder, str(directory)], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match="curated: `curate` is running here"):
            run_pipeline(load_experiment(begun, [("curate", "[{length: {min_tokens: 2}}]")]), remake=True)
        process.kill()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == ["curated", "data", "student"]


def test_too_few_held_out_prompts_are_said_before_the_teacher_works(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llmdistill.workflow.checks.estimate", lambda *_: {})
    file = write_experiment(tiny, tmp_path)
    dry_run(load_experiment(file))
    said = capsys.readouterr().out
    experiment = load_experiment(file)
    generate(experiment)
    curate(experiment)
    held_out = {row["prompt"][-1]["content"] for row in load_dataset(experiment.directory("curated"), "test")}
    assert 2 <= len(held_out) < 12
    assert f"only {len(held_out)} held-out prompts: with fewer than 12" in said


@pytest.mark.parametrize("start", [dry_run, run_pipeline])
@pytest.mark.parametrize(("share", "sides"), [("1e-06", "24 for training, 0 held out"), ("0.999999", "0 for training, 24")])
def test_prompts_that_leave_a_split_empty_are_refused_before_the_teacher_works(tiny, tmp_path, start, share, sides):
    with pytest.raises(InputError, match=f"eval.held_out: {share} of 24 conversations leaves {sides}"):
        start(load_experiment(write_experiment(tiny, tmp_path), [("eval.held_out", share)]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"train.sequence_alpha": "0.1", "generate.top_p": "0.9"}, r"train\.sequence_alpha is 0\.1, which needs"),
        ({"train.position_weights": "entropy", "targets": "{kind: none}", "train.alpha": "0"}, "which needs stored soft targets"),
    ],
)
def test_a_loss_that_the_dataset_could_not_have_is_refused_before_the_teacher_works(tiny, tmp_path, settings, error):
    with pytest.raises(InputError, match=error):
        run_pipeline(load_experiment(write_experiment(tiny, tmp_path), list(settings.items())))
    assert not (tmp_path / "run").exists()


def test_remake_makes_the_student_before_training_again(begun, tmp_path, monkeypatch):
    """That of random weights, which no stage of its own makes, and one that was made in the other way."""
    for name in ("check_plan", "run_stages"):
        monkeypatch.setattr(f"llmdistill.workflow.pipeline.{name}", lambda *_: None)

    def of(*overrides):
        return load_experiment(begun, [("output", f"{tmp_path}/other"), ("train.dataset", f"{tmp_path}/run/curated"), *overrides])

    small, large = (of(("student.config", f"{{num_hidden_layers: {layers}}}")) for layers in (1, 2))
    before = small.directory("student-before")
    ensure_before(small)
    assert check_stale(small) == {}
    assert check_stale(large, remake=True) == {before: "student.config.num_hidden_layers was 1, is 2"}
    pruned = of(("student.prune", "{layers: [0, 1], refit: false}"))
    assert list(check_stale(pruned, remake=True)) == [before]
    run_pipeline(pruned, remake=True)
    assert not before.exists()
    ensure_before(pruned)
    assert check_stale(pruned) == {}
    assert "student.prune" in check_stale(small, remake=True)[before]
    with pytest.raises(InputError, match=r"student-before was made with other settings: .* --remake"):
        ensure_before(small)


def test_remake_removes_what_a_link_leads_to(begun, tmp_path, monkeypatch):
    for name in ("check_plan", "run_stages"):
        monkeypatch.setattr(f"llmdistill.workflow.pipeline.{name}", lambda *_: None)
    (tmp_path / "run/curated").rename(tmp_path / "elsewhere")
    (tmp_path / "run/curated").symlink_to(tmp_path / "elsewhere")
    run_pipeline(load_experiment(begun, [("curate", "[{length: {min_tokens: 2}}]")]), remake=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]
    assert not (tmp_path / "elsewhere").exists()
