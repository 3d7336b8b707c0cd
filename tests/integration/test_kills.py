"""Work that is killed at any moment, repeatedly, ends in the same dataset."""

import os
import random
import subprocess
import time

import pytest

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.data.manifest import read_manifest
from llmdistill.data.shards import Share
from llmdistill.stages.generate import generate
from llmdistill.stages.score import score
from tests.conftest import ROOT, run_cli
from tests.forked import context, start_forked

WORKERS = 3
KILLS = 34


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """An experiment of 27 shards, and what `generate` and `score` make of it undisturbed, in one go."""
    directory = tmp_path_factory.mktemp("kills")
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {number} in words."}}\n' for number in range(54)))
    file = directory / "experiment.yaml"
    file.write_text(f"""
output: {directory}/undisturbed
teacher: {{model: {tiny}, engine: transformers, dtype: float32, batch_size: 3}}
prompts: {{source: {prompts}}}
generate: {{max_tokens: 24, rows_per_shard: 2}}
targets: {{kind: sampled, n: 6}}
""")
    assert run_cli("generate", file).returncode == 0
    scored = ("--score.source", directory / "undisturbed/data", "--output", directory / "undisturbed-score")
    assert run_cli("score", file, *scored).returncode == 0
    return file, directory


def shards(directory):
    return {file.name: file.read_bytes() for file in directory.glob("train-*.parquet")}


def work(stage, file, overrides, share):
    """What a worker process does."""
    run = {"generate": generate, "score": score}[stage]
    run(load_experiment(file, overrides), worker=Share(share, WORKERS))


def wait_for_a_moment(worker, data, chance, number):
    """A moment while the worker runs: any at all, or, every other time, that at which it writes a shard."""
    deadline = time.monotonic() + (chance.uniform(0, 3) if number % 2 else 60)
    while worker.is_alive() and time.monotonic() < deadline:
        if number % 2 == 0 and list(data.glob(".train-*.unfinished")):
            return
        time.sleep(0.001)


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_kills_at_random_moments_lose_nothing(prepared, stage):
    """kill −9 of one of three workers, seventeen times a stage, half of them in the middle of writing a shard.

    A worker that was killed is started again with the same share. The engine is exact, so the bytes are those of the
    undisturbed run; a shard that was there before a kill is not touched by anything after it. When a dataset is complete
    and there are kills left, another one is begun. (The workers are forked from a process that has done the imports.)
    """
    file, directory = prepared
    undisturbed = directory / ("undisturbed/data" if stage == "generate" else "undisturbed-score/data")
    chance, kills, begun = random.Random(stage), 0, 0
    while kills < KILLS // 2:
        begun += 1
        data = directory / f"killed-{stage}-{begun}/data"
        overrides = [("output", str(data.parent))]
        if stage == "score":
            overrides.append(("score.source", str(directory / "undisturbed/data")))

        def started(share, overrides=overrides):
            worker = context.Process(target=work, args=(stage, file, overrides, share))
            worker.start()
            return worker

        workers = [started(share) for share in range(WORKERS)]
        seen = {}
        while kills < KILLS // 2 and any(worker.is_alive() for worker in workers):
            victim = chance.randrange(WORKERS)
            wait_for_a_moment(workers[victim], data, chance, kills)
            if not workers[victim].is_alive():
                continue
            workers[victim].kill()
            workers[victim].join()
            kills += 1
            for path in data.glob("train-*.parquet"):
                assert seen.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
            workers[victim] = started(victim)
        for worker in workers:
            worker.join(120)
            assert worker.exitcode == 0
        assert shards(data) == shards(undisturbed)
        assert not list(data.glob(".*"))
    assert list(load_dataset(data)["id"]) == list(load_dataset(undisturbed)["id"])
    assert read_manifest(data)["determinism"].startswith("bit-exact")


def test_sigterm_keeps_finished_shards_and_says_so(prepared):
    file, directory = prepared
    words, err = ["llmdistill", "generate", str(file), "--output", str(directory / "terminated")], directory / "err"
    worker = start_forked(words, ROOT, os.environ, directory / "out", err)
    deadline = time.monotonic() + 120
    while not list((directory / "terminated/data").glob("train-*.parquet")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 143
    assert "finished work is kept" in err.read_text()
    kept = shards(directory / "terminated/data")
    assert run_cli("generate", file, "--output", directory / "terminated").returncode == 0
    assert kept.items() <= shards(directory / "terminated/data").items() == shards(directory / "undisturbed/data").items()


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk needs the right to mount one")
def test_a_full_disk_is_said_and_the_same_command_goes_on(prepared, tmp_path):
    """A file system of its own with room for some of the shards; then it is made larger."""
    file, directory = prepared
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(map(len, shards(directory / "undisturbed/data").values())) // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let a file system be mounted")
    try:
        full = run_cli("generate", file, "--output", disk)
        assert full.returncode == 1
        assert "No space left on device; finished work is kept" in full.stderr
        assert f"{disk}/data/" in full.stderr
        assert "Traceback" not in full.stderr
        kept = shards(disk / "data")
        assert kept
        subprocess.run(["mount", "-o", f"remount,size={size * 8}", str(disk)], check=True)
        assert run_cli("generate", file, "--output", disk).returncode == 0
        assert kept.items() <= shards(disk / "data").items() == shards(directory / "undisturbed/data").items()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_dataset_of_another_configuration_is_refused_with_the_difference(prepared):
    file, directory = prepared
    before = shards(directory / "undisturbed/data")
    changed = run_cli("generate", file, "--targets.n", 7)
    assert changed.returncode == 2
    assert "targets.n was 6, is 7" in changed.stderr
    assert shards(directory / "undisturbed/data") == before
