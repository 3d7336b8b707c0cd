"""A stage as it is seen from outside: lines of JSON, metrics, the file of its progress, and what `status` makes of it."""

import json
import os
import re
import subprocess
import sys
import threading

import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmdistill.config import dump_experiment, load_experiment
from llmdistill.config.jobs import Watch
from llmdistill.errors import InputError
from llmdistill.runs import progress, watch
from llmdistill.runs.files import read_json
from llmdistill.runs.progress import StageBar, say
from llmdistill.runs.watch import watched
from llmdistill.workflow import status
from llmdistill.workflow.plan import stages
from tests.conftest import ROOT, run_cli

SECRET = "hf_do-not-print-this"


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch):
    """What a stage has set, and how often it is looked at: at each step."""
    monkeypatch.setattr(watch.current, "as_json", False)
    monkeypatch.setattr(watch, "_EVERY", 0)


def metrics(directory):
    """The value of every metric there by its name and the labels that are not those of all."""
    found = {}
    for file in directory.glob("*.prom"):
        for family in text_string_to_metric_families(file.read_text()):
            for sample in family.samples:
                rest = [value for key, value in sorted(sample.labels.items()) if key not in ("run", "stage", "worker")]
                found[(sample.name.removeprefix("llmdistill_"), *rest)] = sample.value
    return found


@pytest.mark.slow
def test_lines_of_json_metrics_and_no_secret(experiment_file, tmp_path):
    """What `generate` says in two tries, by two workers, in another form each, into a directory with the name of a secret."""
    output, seen = tmp_path / SECRET, tmp_path / "metrics"
    arguments = ["generate", experiment_file, "--output", output, "--watch.metrics", seen]
    first = run_cli(*arguments, "--watch.log", "json", "--shards", "1/2", HF_TOKEN=SECRET)
    assert first.returncode == 0, first.stderr
    lines = [json.loads(line) for line in first.stdout.splitlines()]
    # How often a line comes before the last depends on how fast the machine is.
    lines = [line for line in lines if line["event"] != "activity" and (line["event"] != "progress" or line.get("finished"))]
    assert [line["event"] for line in lines] == ["start", "message", "progress", "message", "end"]
    assert re.match("computes in (bfloat16|float32): ", lines.pop(1)["text"])
    tokens = sum(
        len(ids) - start
        for file in (output / "data").glob("*.parquet")
        for ids, start in zip(*(pq.read_table(file)[name].to_pylist() for name in ("input_ids", "completion_start")), strict=True)
    )
    progress = lines[1]
    assert (progress["done"], progress["total"], progress["tokens"], progress["finished"]) == (12, 12, tokens, True)
    assert progress["tokens_per_s"] == pytest.approx(tokens / progress["seconds"], rel=0.05)
    assert progress["seconds_left"] == 0
    assert "2 of 4 shards finished" in lines[2]["text"]
    assert lines[3]["state"] == "done"
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"])
        assert (line["stage"], line["level"], line["share"], line["host"]) == ("generate", "info", "1/2", os.uname().nodename)
        assert line["pid"] == lines[0]["pid"] != os.getpid()
    found = metrics(seen)
    (file,) = seen.iterdir()
    assert file.name.endswith("-generate-1-of-2.prom")
    assert SECRET not in file.name + file.read_text()
    assert (found["done", "generate"], found["total", "generate"], found["tokens", "generate"]) == (12, 12, tokens)
    assert [found["stage_state", state] for state in watch.STATES] == [0, 1, 0, 0]
    assert not (output / watch.PROGRESS).exists()

    second = run_cli(*arguments, HF_TOKEN=SECRET)  # the other half, and nobody minds that it is watched otherwise
    assert second.returncode == 0, second.stderr
    assert run_cli("status", output).stdout == "generate  done\n"
    third = run_cli(*arguments, "--watch.log", "json", HF_TOKEN=SECRET)
    assert any("is finished (24 rows)" in json.loads(line).get("text", "") for line in third.stdout.splitlines())
    for done in (first, second, third):
        assert SECRET not in done.stdout + done.stderr
        assert "in words" not in done.stdout + done.stderr, "prompts are not for logs"
    wrong = run_cli(*arguments, "--watch.log", "json", "--generate.temperature", "0.5", HF_TOKEN=SECRET)
    assert wrong.returncode == 2
    levels = [line["level"] for line in map(json.loads, wrong.stdout.splitlines()) if line["event"] != "activity"]
    assert levels == ["info", "error"]
    error = json.loads(wrong.stderr)
    assert (error["level"], "temperature was 1.0, is 0.5" in error["text"], SECRET in wrong.stderr) == ("error", True, False)


@pytest.mark.slow
def test_training_is_seen_with_the_parts_of_its_loss(experiment_file, tmp_path):
    for name in ("generate", "curate"):
        assert run_cli(name, experiment_file).returncode == 0
    done = run_cli("train", experiment_file, "--watch.metrics", tmp_path / "seen", "--watch.log", "json")
    assert done.returncode == 0, done.stderr
    last = [line for line in read_json(tmp_path / "run/student/trainer_state.json")["log_history"] if "kl" in line][-1]
    found = metrics(tmp_path / "seen")
    for part in ("loss", "kl", "ce", "agreement", "grad_norm"):
        assert found["loss", part, "train"] == pytest.approx(last[part])
    assert (found["done", "train"], found["total", "train"]) == (3, 3)
    assert found["tokens", "train"] == last["num_completion_tokens"]
    (end,) = [line for line in map(json.loads, done.stdout.splitlines()) if line.get("finished")]
    assert end["losses"]["kl"] == pytest.approx(last["kl"])


def test_how_far_workers_are_is_added_up(tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    (output / "data").mkdir(parents=True)
    (output / "data/run.json").write_text('{"stage": "generate", "status": "unfinished"}')
    assert status.how_far(output, "generate") == "not done"
    with watched("generate", str(output), Watch(), "1/2"), StageBar("generate", 200) as bar:
        bar.advance(50, tokens=100)
        (mine,) = (output / watch.PROGRESS).iterdir()
        look = read_json(mine)
        assert (look["done"], look["total"], look["tokens"], look["share"]) == (50, 200, 100, "1/2")
        # Another worker on another machine, an older try of it, and one that was killed on this machine.
        other = {**look, "host": "n2", "share": "2/2", "done": 30, "total": 100, "seconds_left": 7200.0, "tokens_per_s": 1e9}
        for name, changes in {
            **{f"n{n}-1": {"host": f"n{n}", "time": look["time"] - 500 * (n != 4), "done": 99 - 69 * (n == 4)} for n in range(6)},
            "killed": {"host": look["host"], "share": "3/3", "pid": 2**22 + 1},
        }.items():
            (output / watch.PROGRESS / f"generate.{name}.json").write_text(json.dumps(other | changes))
        said = status.how_far(output, "generate")
        assert re.fullmatch(r"running 80/300 · 1,000,\d{3},\d{3} tok/s · 2:00:00 left · 2 workers", said), said
        assert status.begun(output) == ["generate"]
        monkeypatch.setattr(status.time, "time", lambda: look["time"] + 400)
        assert status.how_far(output, "generate").endswith("· last update 6:40 ago")
    assert not mine.exists()


def test_a_stage_is_looked_at_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_EVERY", 3600)
    with watched("eval", str(tmp_path), Watch()), StageBar("eval", 9) as bar:
        (file,) = (tmp_path / watch.PROGRESS).iterdir()
        for _ in range(5):
            bar.advance()
        assert read_json(file)["done"] == 0
    assert not (tmp_path / watch.PROGRESS).exists()


@pytest.mark.parametrize(
    ("error", "state"),
    [(SystemExit(143), "stopped"), (KeyboardInterrupt(), "stopped"), (InputError("x"), "failed"), (SystemExit(0), "done")],
)
def test_how_a_stage_ended_is_told(tmp_path, capsys, error, state):
    seen = tmp_path / "seen"

    def stage():
        with watched("eval", str(tmp_path), Watch(log="json", metrics=str(seen))):
            assert metrics(seen)["stage_state", "running"] == 1
            raise error

    with pytest.raises(type(error)):
        stage()
    assert {name: metrics(seen)["stage_state", name] for name in watch.STATES} == dict.fromkeys(watch.STATES, 0) | {state: 1}
    end = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (end["event"], end["state"], end["level"]) == ("end", state, "error" if state == "failed" else "info")


def test_addresses_and_variables_lose_their_secrets(monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "generated")  # no secret
    say("eval", "https://me:pass@host/x, abc/def+ghi, generated")
    assert capsys.readouterr().out == "eval      https://***@host/x, ***, generated\n"


def test_metrics_that_have_nowhere_to_go_are_said_before_anything_is_done(experiment_file, tmp_path):
    (tmp_path / "file").touch()
    done = run_cli("generate", experiment_file, "--watch.metrics", tmp_path / "file")
    assert (done.returncode, done.stderr.startswith("watch.metrics: ")) == (2, True)
    assert not (tmp_path / "run").exists()


def test_only_the_first_of_many_processes_is_seen(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with watched("eval", str(tmp_path), Watch(log="json", metrics=str(tmp_path / "seen"))), StageBar("eval", 9) as bar:
        bar.advance()
        assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_the_stages_of_a_run_without_jobs(tmp_path):
    for directory, stage, state in [
        ("data", "score", "done"),
        ("curated", "curate", "unfinished"),
        ("student-before", "fresh", "done"),
    ]:
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "run.json").write_text(json.dumps({"stage": stage, "status": state}))
    for directory, stage in [("rounds/1/written/data", "generate"), ("rounds/1/data", "score"), ("eval", "eval")]:
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "run.json").write_text(json.dumps({"stage": stage, "status": "done"}))
    said = {name: status.how_far(tmp_path, name) for name in status.begun(tmp_path)}
    assert said == {"score": "done", "curate": "not done", "round-1-generate": "done", "round-1-score": "done", "eval": "done"}
    assert list(said) == ["score", "curate", "round-1-generate", "round-1-score", "eval"]


def test_training_is_done_when_the_students_beside_the_first_are(tmp_path):
    for directory, state in (("student", "done"), ("student-text-only", "unfinished")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "run.json").write_text(json.dumps({"stage": "train", "status": state}))
    assert status.how_far(tmp_path, "train") == "not done"
    (tmp_path / "student-text-only/run.json").write_text(json.dumps({"stage": "train", "status": "done"}))
    assert status.how_far(tmp_path, "train") == "done"


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves, and no thread that reports by itself."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_reporter", progress._Reporter())
    monkeypatch.setattr(progress._reporter, "_thread", threading.current_thread())
    return now


def test_there_is_a_line_early_and_every_ten_seconds(clock, capsys):
    """Also before anything is whole, and while nothing moves."""
    said = []
    with progress.working("generate", "loading the teacher"):
        for _ in range(25):
            clock[0] += 1
            progress._reporter.report_if_due()
            if out := capsys.readouterr().out:
                said.append((clock[0] - 1000, out))
    assert [when for when, _ in said] == [3, 12, 21]
    assert said[1][1] == "generate  loading the teacher · 0:12\n"


def test_colours_where_there_is_no_terminal_do_not_make_lines_move():
    """FORCE_COLOR is set by Jupyter and by CI, whose logs show every step of an animation."""
    program = """
import time
from llmdistill.runs.progress import StageBar, console, working
console.print("[bold]ready[/bold]")
with working("prune", "measuring"), StageBar("prune", 9) as bar:
    time.sleep(0.5)
    bar.advance(9)
"""
    environment = {**os.environ, "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    first, *others = done.stdout.splitlines()
    assert first == "\x1b[1mready\x1b[0m"
    assert len(others) <= 2, others
    assert not any(code in done.stdout for code in ("\x1b[?25l", "\x1b[2K", "\r"))


def test_the_rate_is_that_of_the_last_half_minute(clock):
    rate = progress.Rate()
    for second in range(1, 61):  # 10 a second, then 2
        clock[0] += 1
        rate.see(10 * min(second, 20) + 2 * max(second - 20, 0))
    assert rate.per_second == pytest.approx(2)
    clock[0] += 60  # and now none at all
    assert rate.per_second < 1


def test_tokens_count_before_their_rows_are_whole(clock, capsys):
    """The time left is the most that it can be until it is known how long rows are."""
    written = [0]
    bar = StageBar("generate", 4)
    bar.count_tokens(lambda: written[0], 100)
    with bar:
        for _ in range(9):
            clock[0] += 1
            written[0] += 4
            bar.advance(0)
        assert bar._text(end=False) == " · 36 tokens · 4 tok/s", "too early to tell"
        clock[0] += 1
        written[0] += 4
        bar.advance(0)
        assert bar.progress().tokens == 40
        assert bar.progress().tokens_per_s == pytest.approx(4)
        assert bar._text(end=False) == " · 40 tokens · 4 tok/s · at most 1:30 left"
        bar.advance(2, tokens=20)  # two rows of ten tokens: half of all, so others may be as long
        assert bar._text(end=False) == " · 40 tokens · 4 tok/s · 0:00 left"
    assert "done in 0:10" in capsys.readouterr().out


def test_status_says_what_is_being_done_where_nothing_can_be_counted(tmp_path):
    with watched("generate", str(tmp_path), Watch()), progress.working("generate", "loading the teacher"):
        assert status.how_far(tmp_path, "generate") == "running · loading the teacher"


def test_what_killed_processes_have_left_goes_when_the_next_one_begins(tmp_path):
    left = tmp_path / watch.PROGRESS / "train.0123.json"
    left.parent.mkdir()
    left.write_text("{}")
    os.utime(left, (0, 0))
    with watched("eval", str(tmp_path), Watch()), StageBar("eval", 9):
        assert not left.exists()
    assert not left.parent.exists()


def test_all_stages_of_a_run_are_listed_and_foreign_directories_are_no_rounds(experiment_file, tmp_path):
    experiment = load_experiment(experiment_file, [("rounds", "1")])
    output = tmp_path / "run"
    (output / "configs").mkdir(parents=True)
    (output / "configs/generate.yaml").write_text(dump_experiment(experiment))
    (output / "data").mkdir()
    (output / "data/run.json").write_text('{"stage": "generate", "status": "done"}')
    (output / "rounds/1-old").mkdir(parents=True)
    names = [stage.name for stage in stages(experiment)]
    assert status.known(output) == names
    assert "round-1-train" in names
    assert status.known(tmp_path / "nothing") == []
