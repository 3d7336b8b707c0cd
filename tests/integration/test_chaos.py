"""Every stage is killed, started twice, or runs out of disk, at moments that a seed chooses: it ends as if undisturbed.

`make chaos` takes more seeds (CHAOS_SEEDS=1-20) and writes what was tried (CHAOS_TABLE=FILE).
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.factories import write_experiment
from tests.forked import context

FIRST, _, LAST = os.environ.get("CHAOS_SEEDS", "1").partition("-")
SEEDS = range(int(FIRST), int(LAST or FIRST) + 1)
STAGES = ("generate", "curate", "prune", "train", "eval", "export", "report")
# A process that is still being started ends by the signal itself.
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
OUTPUTS = {"generate": "data", "curate": "curated", "prune": "student-before", "train": "student", "convert": "jsonl"}
ROOM = "size=900m"
GRACE = 60  # seconds from SIGTERM to the end, on a machine with two other tests
TRIED: Counter[tuple[str, str, str]] = Counter()


def command(words: list[str], directory: Path, log: str, jump: float) -> None:
    """The command line in a process that has done the imports; its text goes to a file, its clock may jump."""
    from llmdistill import cli

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(directory)
    if jump:
        real, begin = time.time, time.monotonic()
        time.time = lambda: real() + (jump if time.monotonic() - begin > 0.5 else 0.0)
    said = io.StringIO()
    status = 1
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        Path(log).write_text(said.getvalue())
    os._exit(status)


class Started:
    """A command at work in a directory, in which its output is called `run`."""

    def __init__(self, stage: str, directory: Path, log: str = "log", jump: float = 0.0, more: tuple[str, ...] = ()) -> None:
        words = [stage, "run/curated", "run/jsonl", "--to", "jsonl"] if stage == "convert" else [stage, "e.yaml", *more]
        self.log = directory / log
        self.log.unlink(missing_ok=True)
        self.process = context.Process(target=command, args=(words, directory, str(self.log), jump))
        self.process.start()

    def finish(self, seconds: float = 300) -> tuple[int, str]:
        """Its status, and all that it has said."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it does not end"
        text = self.log.read_text() if self.log.exists() else ""
        assert "Traceback" not in text, text
        return self.process.exitcode, text


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """A whole run that nobody disturbed, its configuration, and how long each stage took."""
    directory = tmp_path_factory.mktemp("chaos")
    file = write_experiment(tiny, directory)
    text = file.read_text().replace("max_steps: 3", "max_steps: 6, save_steps: 2").replace(f"{directory}/run", "run")
    (directory / "e.yaml").write_text(text + "export: {formats: [safetensors]}\n")
    imported = context.Process(target=int)  # the first process waits for the imports
    imported.start()
    imported.join()
    seconds = {}
    for stage in (*STAGES, "convert"):
        begin = time.monotonic()
        status, said = Started(stage, directory).finish()
        assert status == 0, said
        seconds[stage] = time.monotonic() - begin
    yield directory, seconds
    if table := os.environ.get("CHAOS_TABLE"):
        write_table(Path(table))


def write_table(file: Path) -> None:
    """Of each stage and disturbance how often it came before the stage had ended, and how often it was tried."""
    kinds = ["KILL", "TERM", "INT", "two at once", "two settings", "full disk", "read-only disk"]
    lines = ["| stage | " + " | ".join(kinds) + " |", "| --- |" + " ---: |" * len(kinds)]
    for stage in (*STAGES, "convert"):
        early = [TRIED[stage, kind, "early"] for kind in kinds]
        tried = [TRIED[stage, kind, "late"] + number for kind, number in zip(kinds, early, strict=True)]
        cells = [f"{number} of {of}" if of else "" for number, of in zip(early, tried, strict=True)]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    file.write_text("\n".join(lines) + "\n")


def result(run: Path, stage: str) -> dict[str, object]:
    """What a stage has made, but for times and names of directories."""
    name = OUTPUTS.get(stage, stage)
    if stage == "report":
        page = (run / "report.html").read_text()
        return {"whole": page.endswith("</html>") and (run / "report.png").stat().st_size > 1000}
    if stage == "eval":
        metrics = json.loads((run / "eval/metrics.json").read_text())
        return {model["name"]: (model["kl"], model["top1"]) for model in metrics["models"]}
    if stage == "export":
        export = json.loads((run / "export/export.json").read_text())
        return {made["name"]: (made["bytes"], made["kl"]) for made in export["formats"]}
    if stage in ("generate", "curate"):
        manifest = json.loads((run / name / "dataset.json").read_text())
        return {entry["file"]: entry["rows"] for entry in manifest["shards"]}  # the name of a shard has its checksum
    files = (file for file in (run / name).glob("*") if file.suffix in (".safetensors", ".jsonl"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def prepared(undisturbed, to: Path, stage: str) -> Path:
    """A directory with a copy of the run as it was before a stage."""
    directory, _ = undisturbed
    later = STAGES[STAGES.index(stage) :] if stage in STAGES else ()
    left_out = {OUTPUTS.get(name, name) for name in later} | {f"report.{form}" for form in ("html", "md", "png")} | {"jsonl"}
    to.mkdir(exist_ok=True)
    shutil.copy(directory / "e.yaml", to)
    shutil.copytree(
        directory / "run", to / "run", ignore=lambda path, names: left_out & set(names) if path.endswith("/run") else []
    )
    return to


def check(undisturbed, directory: Path, stage: str) -> None:
    run = directory / "run"
    assert result(run, stage) == result(undisturbed[0] / "run", stage)
    assert not [path for path in run.rglob(".*") if path.name.endswith((".unfinished", ".lock"))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", [*STAGES, "convert"])
def test_a_stage_that_is_killed_ends_as_if_it_had_not_been(undisturbed, tmp_path, stage, seed):
    """Two ends at random moments by random signals, the second time with a clock that jumps an hour; then it is left alone."""
    _, seconds = undisturbed
    chance = random.Random(f"{stage} {seed}")
    here = prepared(undisturbed, tmp_path / "here", stage)
    for jump in (0.0, chance.choice([-3600.0, 3600.0])):
        name = chance.choice(list(SIGNALS))
        work = Started(stage, here, jump=jump)
        work.process.join(chance.uniform(0.02, 1.0) * seconds[stage])
        early = work.process.exitcode is None
        if early:
            os.kill(work.process.pid, SIGNALS[name])
        status, said = work.finish(GRACE)
        TRIED[stage, name, "early" if early else "late"] += 1
        assert status in (0, 1, 143, -signal.SIGKILL, -signal.SIGTERM) or "exists and is not empty" in said, said
    status, said = Started(stage, here).finish()
    assert status == 0 or "exists and is not empty" in said, said
    check(undisturbed, here, stage)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", [*STAGES, "convert"])
def test_two_at_once_do_not_disturb_each_other(undisturbed, tmp_path, stage, seed):
    """Both end well, or one says who works there."""
    _, seconds = undisturbed
    here = prepared(undisturbed, tmp_path / "here", stage)
    first = Started(stage, here, "log-1")
    time.sleep(random.Random(f"{stage} {seed}").uniform(0, 0.7) * seconds[stage])
    ends = [work.finish() for work in (first, Started(stage, here, "log-2"))]
    TRIED[stage, "two at once", "early" if any(status for status, _ in ends) else "late"] += 1
    assert any(status == 0 for status, _ in ends), ends
    for status, said in ends:
        assert status == 0 or "is running here, process" in said or "exists and is not empty" in said, said
    check(undisturbed, here, stage)


@pytest.mark.parametrize("seed", SEEDS)
def test_workers_with_other_settings_do_not_share_a_dataset(undisturbed, tmp_path, seed):
    """The first one's settings decide; the other is refused, and the dataset is that of one of them."""
    here = prepared(undisturbed, tmp_path / "here", "generate")
    chance = random.Random(seed)
    settings = [("--seed", "0"), ("--seed", "7", "--generate.temperature", "0")]
    chance.shuffle(settings)
    works = []
    for number, more in enumerate(settings, start=1):
        works.append(Started("generate", here, f"log-{number}", more=("--shards", f"{number}/2", *more)))
        time.sleep(chance.uniform(0, 0.3))
    ends = [work.finish() for work in works]
    TRIED["generate", "two settings", "early"] += 1
    assert sorted(status for status, _ in ends) == [0, 2], ends
    (refused,) = [said for status, said in ends if status == 2]
    assert "was made with other settings" in refused
    (winner,) = [number for number, (status, _) in enumerate(ends) if status == 0]
    status, said = Started("generate", here, more=settings[winner]).finish()
    assert status == 0, said
    if settings[winner] == ("--seed", "0"):
        check(undisturbed, here, "generate")
    assert json.loads((here / "run/data/dataset.json").read_text())["seed"] == int(settings[winner][1])


@pytest.fixture
def disk(tmp_path):
    """A file system of its own; what remounts it."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", ROOM, "tmpfs", str(directory)], capture_output=True).returncode
    ):
        pytest.skip("this machine does not let a file system be mounted")
    yield directory, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(directory)], check=True)
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", ["generate", "curate", "prune", "train", "export", "convert"])
def test_a_full_disk_costs_nothing_that_was_finished(undisturbed, disk, stage, seed):
    """A disk that is full somewhere in the middle: one line, and the same command goes on when there is room."""
    directory, remount = disk
    here = prepared(undisturbed, directory / "here", stage)
    needs = size(undisturbed[0] / "run" / OUTPUTS.get(stage, stage))
    room = int(needs * random.Random(f"{stage} {seed}").uniform(0.1, 0.8))
    remount(f"size={shutil.disk_usage(directory).used + room}")
    status, said = Started(stage, here).finish()
    TRIED[stage, "full disk", "early" if status else "late"] += 1
    if status:
        assert status == 1, said
        (line,) = [line for line in said.splitlines() if "No space left on device" in line]
        assert line.startswith(("run", str(directory))), line
    remount(ROOM)
    status, said = Started(stage, here).finish()
    assert status == 0 or "exists and is not empty" in said, said
    check(undisturbed, here, stage)


def size(directory: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


@pytest.mark.parametrize("stage", ["generate", "convert"])
def test_a_disk_that_cannot_be_written_to_is_said_in_a_line(undisturbed, disk, stage):
    directory, remount = disk
    here = prepared(undisturbed, directory / "here", stage)
    remount("ro")
    work = Started(stage, here, str(directory.parent / "log"))
    status, said = work.finish()
    TRIED[stage, "read-only disk", "early"] += 1
    assert status == 2, said
    assert "Read-only file system" in said.splitlines()[-1]
