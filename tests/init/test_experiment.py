"""The experiments that `init` writes: valid, of the user's own files, and never over what is there."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from llmdistill import cli
from llmdistill.config import load_experiment, shipped
from llmdistill.errors import InputError
from llmdistill.init.experiment import Choices, init, init_demo
from llmdistill.prompting.sources import read_source
from llmdistill.stages.prompts import load_prompts
from llmdistill.workflow import pipeline
from tests.conftest import ROOT, run_cli

FILES = {
    "questions.txt": "Why is the sky blue?\n\n  Name three birds. \nWhat is 2 + 2?\n",
    "asked.jsonl": '{"prompt": "Why?"}\n{"messages": [{"role": "user", "content": "How?"}]}\n',
    "alpaca.csv": "instruction,topic\nName a bird.,birds\nName a fish.,fish\n",
    "said.jsonl": '{"prompt": "Why?", "completion": "So."}\n{"text": "Once upon a time."}\n',
    "odd: #1.jsonl": '{"prompt": "Why?"}\n',
    "notes/a.md": "# Bees\n" + "Bees live in hives and make honey. " * 20,
    "other.csv": "title\nWhy?\n",
    "empty.txt": "\n \n",
    "unanswered.jsonl": '{"prompt": "Why?"}\n',
}


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A working directory with a user's files, and a model beside them."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def choices(kind, path=None, gpu=False):
    return Choices(kind, path and Path(path), "models/tiny", "models/tiny", gpu)


def dry_run(file, monkeypatch, capsys):
    """What the dry run of all stages says; a few prompts are enough for it, and no time is measured."""
    monkeypatch.setattr(pipeline, "check_plan", lambda experiment: None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(file), "--dry-run"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    ("kind", "path", "source", "said"),
    [
        ("none", None, "prompts/seeds/general.jsonl", "240 prompts = 240 rows"),
        ("prompts", "questions.txt", "prompts.jsonl", "3 prompts × 8 samples = 24 rows"),
        ("prompts", "asked.jsonl", "../asked.jsonl", "2 prompts × 8 samples = 16 rows"),
        ("prompts", "alpaca.csv", "../alpaca.csv", "2 prompts × 8 samples = 16 rows"),
        ("prompts", "odd: #1.jsonl", "../odd: #1.jsonl", "1 prompt × 8 samples = 8 rows"),
        ("text", "said.jsonl", "../said.jsonl", "2 rows of ../said.jsonl in 1 shard"),
        ("documents", "notes", "../notes", "4 questions, up to 1,024 tokens"),
    ],
)
def test_each_is_valid_and_all_its_files_are_the_users(here, monkeypatch, capsys, kind, path, source, said, gpu):
    init(Path("first"), choices(kind, path, gpu))
    monkeypatch.chdir(here / "first")
    monkeypatch.setattr(shipped, "SHIPPED", here / "nowhere")
    experiment = load_experiment(Path("experiment.yaml"))
    assert (experiment.score or experiment.prompts).source == source
    assert experiment.teacher.model == experiment.student.model == "../models/tiny"
    assert experiment.teacher.engine == ("vllm" if gpu else "transformers")
    assert said in dry_run("experiment.yaml", monkeypatch, capsys)
    text = Path("experiment.yaml").read_text()
    assert len(text.splitlines()) < 40
    assert all(len(line) <= 125 for line in text.splitlines())


PICTURE = {"image": "a.jpg", "prompt": "What is it?", "completion": "A bird."}


@pytest.mark.parametrize("kind", ["prompts", "text"])
def test_some_rows_that_cannot_be_used_are_said_and_the_others_counted(here, capsys, kind):
    rows = [{"prompt": f"Number {number}?", "completion": "Yes.", "label": number > 0} for number in range(20)]
    lines = [json.dumps(PICTURE), *map(json.dumps, rows), "no JSON"]
    Path("some.jsonl").write_text("\n".join(lines))
    init(Path("first"), choices(kind, "some.jsonl"))
    said = capsys.readouterr().out
    assert "left out 1 of 22 rows: some.jsonl line 1: `image` cannot be passed" in " ".join(said.split())
    assert "some.jsonl line 22: not valid JSON" in " ".join(said.split())
    assert ("its answer is marked as not to be learned" in " ".join(said.split())) == (kind == "text")


def test_rows_with_an_instruction_are_asked_with_all_that_they_say(here, monkeypatch):
    rows = [
        {"instruction": "Add.", "context": "2, 2", "response": "4", "category": "qa"},
        {"instruction": "Add.", "input": "3, 3", "output": "6", "system": "Be brief."},
    ]
    Path("dolly.jsonl").write_text("\n".join(map(json.dumps, rows)))
    init(Path("first"), choices("prompts", "dolly.jsonl"))
    monkeypatch.chdir("first")
    first, second = load_prompts(load_experiment(Path("experiment.yaml")).prompts)
    assert first.messages == [{"role": "user", "content": "Add.\n\n2, 2"}]
    assert second.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n\n3, 3"}]


def test_a_prompt_on_each_line_becomes_a_prompt_in_each_row(here):
    init(Path("first"), choices("prompts", "questions.txt"))
    rows = [json.loads(line) for line in Path("first/prompts.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": text} for text in ("Why is the sky blue?", "Name three birds.", "What is 2 + 2?")]


@pytest.mark.parametrize(("rows", "samples", "held_out"), [(20, 8, 0.25), (50, 4, 0.25), (400, 1, 0.12), (5000, 1, 0.05)])
def test_few_prompts_are_answered_more_than_once_and_enough_are_held_out(here, rows, samples, held_out):
    Path("many.jsonl").write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(rows)))
    init(Path("first"), choices("prompts", "many.jsonl"))
    experiment = load_experiment(Path("first/experiment.yaml"))
    assert (experiment.generate.samples, experiment.eval.held_out) == (samples, held_out)


def test_an_absolute_path_stays_as_it_is(here):
    init(Path("first"), choices("prompts", here / "asked.jsonl"))
    assert load_experiment(Path("first/experiment.yaml")).prompts.source == str(here / "asked.jsonl")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (choices("prompts", "nowhere.jsonl"), r"nowhere\.jsonl: no such file"),
        (choices("prompts", "nowhere.txt"), r"nowhere\.txt: no such file"),
        (choices("prompts", "empty.txt"), r"empty\.txt: contains no prompts"),
        (choices("prompts", "other.csv"), "line 2: has no conversation in a known format"),
        (choices("text", "unanswered.jsonl"), "line 1: must have `messages`"),
        (choices("text", "empty.txt"), r"empty\.txt lines 1–3: its text is empty"),
        (choices("documents", "asked.jsonl"), "prompts.passages.field is missing"),
        (Choices("none", teacher="models/tiny"), "give both --teacher and --student"),
        (Choices("none", student="models/tiny"), "give both --teacher and --student"),
        (Choices("none", teacher="models/tiny", layers=0), "--layers is 0, but must be at least 1"),
        (Choices("none", None, "./tiny", "models/tiny"), "--teacher: ./tiny is neither a model directory"),
        (Choices("none", None, "models/tiny", "./tiny"), "--student: ./tiny is neither a model directory"),
    ],
)
def test_what_cannot_be_used_is_said_and_nothing_is_written(here, chosen, message):
    with pytest.raises(InputError, match=message):
        init(Path("first"), chosen)
    assert not Path("first").exists()


@pytest.mark.parametrize("there", ["experiment.yaml", "prompts/instruct.yaml"])
def test_nothing_is_written_over(here, there):
    file = Path("first") / there
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(InputError, match=f"first/{there}: already exists"):
        init(Path("first"), choices("none"))
    assert [path for path in Path("first").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_a_file_in_the_way_of_the_directory_is_said(here):
    with pytest.raises(InputError, match="cannot be written"):
        init(Path("empty.txt"), choices("none"))


def test_without_a_terminal_nothing_is_asked_and_the_next_commands_are_said(here):
    arguments = ["--prompts", here / "questions.txt", "--teacher", here / "models/tiny", "--student", here / "models/tiny"]
    result = run_cli("init", here / "in here", *arguments, "--gpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"wrote {here}/in here/experiment.yaml\nwrote {here}/in here/prompts.jsonl\n\nnext:\n  cd '{here}/in here'\n"
        "  llmdistill run experiment.yaml --dry-run\n  llmdistill run experiment.yaml\n"
    )
    again = run_cli("init", here / "in here", *arguments)
    assert again.returncode == 2
    assert again.stderr == f"{here}/in here/experiment.yaml: already exists; nothing was written\n"


def typed(text, *arguments):
    """`llmdistill init` on a terminal on which this is typed."""
    mine, theirs = pty.openpty()
    with os.fdopen(mine, "wb", buffering=0) as keyboard, os.fdopen(theirs, "rb", buffering=0) as terminal:
        keyboard.write(text.encode())
        return subprocess.run(
            [sys.executable, "-m", "llmdistill", "init", *arguments],
            stdin=terminal,
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )


def test_a_student_of_some_of_the_teachers_layers(here):
    init(Path("first"), Choices("none", teacher="models/tiny", layers=2, gpu=False))
    student = load_experiment(here / "first/experiment.yaml").student
    assert (student.model, student.prune.layers) == (None, 2)


def test_on_a_terminal_what_no_flag_says_is_asked_for(here):
    result = typed("pictures\ndocuments\nnotes\nyes\nmodels/tiny\nmodels/tiny\n", "first")
    assert result.returncode == 0, result.stderr
    experiment = load_experiment(here / "first/experiment.yaml")
    assert experiment.prompts.source == "../notes"
    assert (experiment.teacher.model, experiment.teacher.engine) == ("../models/tiny", "vllm")


def test_on_a_terminal_enter_takes_the_defaults(here):
    result = typed("\n\n\n\n", "first")
    assert result.returncode == 0, result.stderr
    experiment = load_experiment(here / "first/experiment.yaml")
    assert experiment.prompts.source == "prompts/seeds/general.jsonl"
    assert experiment.teacher.model == "HuggingFaceTB/SmolLM2-360M-Instruct"
    assert experiment.student.model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_an_end_of_input_writes_nothing(here):
    result = typed("none\n\x04", "first")
    assert result.returncode == 2
    assert result.stderr.endswith("no answer; nothing was written\n")
    assert not Path("first").exists()


def test_the_demo_is_the_shipped_one_with_its_files(here, smollm2, monkeypatch, capsys):
    init_demo(Path())
    said = capsys.readouterr().out
    assert "python -m llmdistill.models.demo_teacher models/SmolLM2-135M-Instruct\n" in said
    assert "llmdistill run demo.yaml" in said
    assert Path("demo.yaml").read_bytes() == (ROOT / "configs/demo.yaml").read_bytes()
    Path("models/SmolLM2-135M-Instruct").symlink_to(smollm2)
    monkeypatch.setattr(shipped, "SHIPPED", here / "nowhere")
    assert "128 prompts = 128 rows" in dry_run("demo.yaml", monkeypatch, capsys)
    section = load_experiment(Path("demo.yaml")).prompts
    assert len(list(read_source(section))) == 128
    with pytest.raises(InputError, match=r"demo\.yaml: already exists"):
        init_demo(Path())


def test_the_demo_takes_no_other_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["init", "--demo", "--gpu"])
    assert ended.value.code == 2
    assert "cannot be combined with other flags" in capsys.readouterr().err


def test_files_are_found_from_where_a_link_leads_to(here, monkeypatch):
    """The paths in the experiment are read in its directory, which a link may name from elsewhere."""
    (here / "deep/down").mkdir(parents=True)
    (here / "link").symlink_to("deep/down")
    init(here / "link", choices("prompts", "asked.jsonl"))
    experiment = load_experiment(here / "link/experiment.yaml")
    monkeypatch.chdir(here / "link")
    assert experiment.prompts.source == "../../asked.jsonl"
    assert Path(experiment.prompts.source).is_file()
    assert (Path(experiment.teacher.model) / "config.json").is_file()
    assert experiment.teacher.model.endswith("models/tiny"), "a link as it is"
