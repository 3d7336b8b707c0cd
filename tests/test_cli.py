"""The command's exit statuses, and the command among the processes of one training run."""

import errno
import re
import signal
import sys

import pytest

from llmdistill import cli
from llmdistill.config import keys, load_experiment
from llmdistill.config.help import COMMON
from llmdistill.errors import InputError, RemoteError
from llmdistill.workflow import pipeline


def test_what_another_than_the_first_process_finds_alone_it_says_after_a_while(monkeypatch, capsys, tmp_path, sigterm):
    waited = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", str(tmp_path / "none.yaml")])
    assert stopped.value.code == 2
    assert waited == [cli._PATIENCE]
    assert "none.yaml: no such file" in capsys.readouterr().err


def raising(error):
    def stage(*arguments):
        if error is not None:
            raise error

    return stage


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (InputError("file: key"), 2, "file: key\n"),
        (RemoteError("server: no answer"), 1, "server: no answer\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "finished work is kept"),
        (KeyboardInterrupt(), 1, "finished work is kept"),
    ],
)
def test_exit_statuses(monkeypatch, capsys, experiment_file, sigterm, error, status, said):
    monkeypatch.setattr(cli, "_stage", raising(error))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(experiment_file)])
    assert stopped.value.code == status
    assert said in capsys.readouterr().err


def test_the_configuration_stands_before_the_overrides(capsys, experiment_file, sigterm):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "--generate.samples", "4", str(experiment_file), "--dry-run"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "4: no such file; the configuration must come before the overrides\n"


def test_sigterm_is_143(monkeypatch, experiment_file, sigterm):
    monkeypatch.setattr(cli, "_stage", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(experiment_file)])
    assert stopped.value.code == 143


@pytest.mark.parametrize("command", ["status", "cancel"])
def test_a_run_that_is_not_there_is_said(command, tmp_path, capsys, sigterm):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"{tmp_path / 'run'}: no such directory; give the `output` of an experiment\n"


def test_a_key_that_a_stage_misses_is_named_with_its_file(capsys, experiment_file, sigterm):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["score", str(experiment_file)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"{experiment_file}: the key score is missing")


@pytest.mark.parametrize(("body", "status"), [("exit 143", 143), ("exit 2", 2), ("exit 7", 7), ("kill -9 $$", 1)])
def test_a_run_ends_as_its_stage_does(monkeypatch, tmp_path, experiment_file, body, status):
    stage = tmp_path / "stage"
    stage.write_text(f"#!/bin/bash\n{body}\n")
    stage.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stage))
    with pytest.raises(SystemExit) as stopped:
        pipeline.run_pipeline(load_experiment(experiment_file))
    assert stopped.value.code == status
    assert (tmp_path / "run").exists() == (status != 2), "wrong input leaves nothing behind"
    if status != 2:
        assert load_experiment(tmp_path / "run/configs/generate.yaml") == load_experiment(experiment_file)


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["trian", "x.yaml"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "llmdistill: no such command trian; did you mean train?\n"


def test_help_shows_the_common_keys_and_all_of_them_when_asked(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    texts = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", flag])
        assert ended.value.code == 0
        texts.append(capsys.readouterr().out)
    some, everything = texts
    assert "--train.loss" in some
    assert "--train.position_weights" not in some
    assert "--train.position_weights" in everything
    assert re.search(r"\d+ more keys: --help-all", some)
    assert all(len(line) <= 80 for line in everything.splitlines() if not line.lstrip().startswith(("--", "usage", "llmdistill")))
    assert {key for key, _, _ in keys()} >= COMMON


def test_what_a_section_needs_is_not_said_to_be_needed_without_it():
    texts = {key: text for key, _, text in keys()}
    assert texts["teacher.model"].endswith(" (required)")
    assert texts["score.source"].endswith(" (required with score)")
    assert texts["curate.N.judge.teacher.model"].endswith(" (required with curate.N.judge)")
    assert texts["curate.N.judge.teacher.price.input"].endswith(" (required with curate.N.judge.teacher.price)")


def test_keys_that_schedulers_have_in_common_are_shown_once(capsys):
    with pytest.raises(SystemExit):
        cli.main(["submit", "--help-all"])
    text = capsys.readouterr().out
    for name in ("{slurm,ray,skypilot,kubernetes}.workers", "{slurm,kubernetes}.time", "slurm.partition", "ray.address"):
        assert text.count(f"  --jobs.{name} ") == 1
    assert "--jobs.slurm.workers" not in text
    assert {name.split(".")[1] for name, _, _ in keys() if name.endswith(".workers")} == {
        "slurm",
        "ray",
        "skypilot",
        "kubernetes",
    }
