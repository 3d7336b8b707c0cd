"""A real Ray of several nodes on this machine: the pipeline as its job makes what a local run makes, also if an actor dies."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from llmdistill.data.dataset import load_dataset
from llmdistill.data.manifest import read_manifest
from llmdistill.runs.files import read_json
from tests.conftest import ROOT, run_cli
from tests.factories import write_cut_experiment, write_experiment
from tests.integration.servers import free_port
from tests.integration.test_slurm import sharing_prompts, wait_for

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

# A process of its own, since what Ray starts should end with it and not with the tests.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": int(sys.argv[1])}
cluster = Cluster(initialize_head=True, head_node_args=head)
for _ in range(2):
    cluster.add_node(num_cpus=1)
print("there", flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def tiny(whole_tiny):
    """With the whole vocabulary, so that there is time to kill an actor, or to cancel a job, at work."""
    return whole_tiny


@pytest.fixture(scope="module")
def cluster():
    """Three nodes; the address that takes jobs."""
    port = free_port()
    path = f"{ROOT}/.venv/bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    try:
        line = next((line for line in process.stdout if line.strip() == "there"), None)
        assert line, "the cluster did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        subprocess.run([f"{ROOT}/.venv/bin/ray", "stop", "--force"], capture_output=True, timeout=60)


def settings(address, **more):
    found = {"address": address, "workers": 2, "gpus": 0, "retries": 2, **more}
    return ["--jobs.ray", json.dumps(found)]


def actors():
    """The processes in which actors make shards: Ray names them so."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if process.info["cmdline"] and process.info["cmdline"][0] == "ray::Actor.make"]


def job_of(output):
    return read_json(output / "jobs/jobs.json")["jobs"][0]["job"]


def is_over(address, output):
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address).get_job_status(job_of(output)).is_terminal()


def logs(address, output):
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address).get_job_logs(job_of(output))


def test_the_pipeline_as_a_job_makes_what_a_local_run_makes(cluster, tiny, tmp_path):
    """One actor is killed while it makes shards; another takes its place, and only that shard is made again."""
    file = write_experiment(tiny, tmp_path)
    slow = ["--generate.rows_per_shard", 2, "--generate.max_tokens", 60, *sharing_prompts(tmp_path)]
    local, output = tmp_path / "local", tmp_path / "it's a run; $(touch hacked)"
    for stage in ("prompts", "generate"):
        assert run_cli(stage, file, *slow, "--output", local, OMP_NUM_THREADS="1").returncode == 0
    submitted = run_cli("submit", file, *slow, "--output", output, *settings(cluster))
    assert submitted.returncode == 0, submitted.stderr
    wait_for(lambda: list((output / "data").glob("train-*.parquet")), 120)
    victims = actors()
    assert victims, "no actor is at it"
    victims[0].send_signal(signal.SIGKILL)
    wait_for(lambda: is_over(cluster, output), 500)
    said = logs(cluster, output)
    assert "failed: " in said, said
    assert "left to other workers; run this command again" in said, "the prompts were not shared"
    mine, theirs = (
        [(entry["file"], entry["rows"]) for entry in read_manifest(directory / "data")["shards"]] for directory in (output, local)
    )
    assert mine == theirs, "names hold checksums"
    assert (output / "report.html").is_file(), said
    assert not list(ROOT.glob("hacked")) + list(tmp_path.glob("**/hacked"))
    shown = run_cli("status", output)
    assert shown.returncode == 0, shown.stderr
    assert "SUCCEEDED" in shown.stdout.upper()


def test_wrong_input_ends_the_job_at_once(cluster, tiny, tmp_path):
    file = write_experiment(tiny, tmp_path)
    output = tmp_path / "run"
    submitted = run_cli("submit", file, "--output", output, *settings(cluster))
    assert submitted.returncode == 0, submitted.stderr
    of_job = output / "jobs/ray.yaml"  # changed behind the back of `submit`, which would have refused it
    of_job.write_text(of_job.read_text().replace(str(tiny), str(tmp_path)))
    wait_for(lambda: is_over(cluster, output), 120)
    assert "teacher.model" in logs(cluster, output)
    assert not (output / "data").exists()


def test_cancelling_keeps_what_is_there(cluster, tiny, tmp_path):
    file = write_experiment(tiny, tmp_path)
    output = tmp_path / "run"
    slow = ["--generate.rows_per_shard", 1, "--generate.max_tokens", 100]
    assert run_cli("submit", file, *slow, "--output", output, *settings(cluster)).returncode == 0
    wait_for(lambda: list((output / "data").glob("train-*.parquet")), 120)
    cancelled = run_cli("cancel", output)
    assert cancelled.returncode == 0, cancelled.stderr
    wait_for(lambda: is_over(cluster, output), 60)
    time.sleep(1)
    assert list((output / "data").glob("train-*.parquet"))
    assert not (output / "report.html").exists()


@pytest.mark.engine
def test_actors_hold_a_real_vllm(cluster, smollm2, tmp_path):
    """The rows are those that the exact engine makes, by their ids; the text is vLLM's."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    file = write_cut_experiment(smollm2, tmp_path)
    exact = ["--teacher.engine", "transformers", "--output", tmp_path / "exact"]
    assert run_cli("generate", file, *exact).returncode == 0
    submitted = run_cli("submit", file, *settings(cluster, workers=1))
    assert submitted.returncode == 0, submitted.stderr
    wait_for(lambda: is_over(cluster, tmp_path / "run"), 300)
    said = logs(cluster, tmp_path / "run")
    # All rows are cut, so nothing is left to train on, and the job ends there, as a local run does.
    assert "both splits need at least one row" in said, said
    ids = [list(load_dataset(directory / "data")["id"]) for directory in (tmp_path / "run", tmp_path / "exact")]
    assert ids[0] == ids[1]
