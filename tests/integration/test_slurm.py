"""A real Slurm on this machine: the pipeline as its jobs gives what a local run gives, whatever happens to them on the way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from llmdistill.data.dataset import load_dataset
from llmdistill.data.manifest import read_manifest
from llmdistill.runs.files import read_json
from tests.conftest import ROOT, run_cli
from tests.factories import write_cut_experiment, write_experiment
from tests.integration.servers import free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = f"{ROOT}/.venv/bin:{os.environ['PATH']}:/usr/sbin:/sbin"
missing = [name for name in DAEMONS if shutil.which(name, path=PATH) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"there is no Slurm here: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons need root"),
]

# A requeued job waits until the credential of its last run has expired.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=3
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
KillWait=5
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One node with two cores; the environment of those who use it."""
    directory = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (directory / name).mkdir()
    conf = directory / "slurm.conf"
    conf.write_text(CONF.format(directory=directory, host=socket.gethostname(), ports=[free_port(), free_port()]))
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = {"SLURM_CONF": str(conf), "PATH": PATH, "OMP_NUM_THREADS": "1"}
    files = {"key-file": key, "socket": directory / "munge.socket", "pid-file": directory / "munge.pid"}
    files |= {"log-file": directory / "munge.log", "seed-file": directory / "munge.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items())]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "localhost"]):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            daemons.append(subprocess.Popen(command, env={**os.environ, **environment}, **quiet))
            time.sleep(1)
        try:
            wait_for(lambda: "idle" in ask(environment, "sinfo", "--noheader", "--format=%T"), 60)
        except AssertionError:
            logs = [file.read_text()[-500:] for file in sorted(directory.glob("*.log"))]
            pytest.skip(f"Slurm's daemons do not start on this machine: {logs}")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env={**os.environ, **environment}, timeout=30)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(20)


def ask(environment, *command):
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30).stdout


def wait_for(done, seconds):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.3)


def is_over(environment, output):
    """Whether none of the jobs waits or runs."""
    jobs = ",".join(entry["job"] for entry in read_json(output / "jobs/jobs.json")["jobs"])
    return not ask(environment, "squeue", "--noheader", f"--jobs={jobs}").strip()


def logs(output):
    return "\n".join(f"{file.name}: {file.read_text()}" for file in sorted((output / "jobs").glob("*.log")))


def settings(workers=2):
    return ["--jobs.slurm.workers", workers, "--jobs.slurm.cpus", 1, "--jobs.slurm.environment", f"[export PATH={PATH}]"]


def sharing_prompts(directory):
    """Two steps of prompts of which the random teacher makes nothing, so that all given ones stay."""
    template = directory / "rewrite.yaml"
    template.write_text("""
name: rewrite
description: Rewrite it.
variables: [prompt]
answer: {field: prompt, pattern: "^New: (.+)$"}
messages: [{role: user, content: "Rewrite: {{ prompt }}"}]
""")
    step = {"evolve": {"templates": [str(template)]}}
    return ["--prompts.steps", json.dumps([step, step]), "--prompts.sampling", "{max_tokens: 6}"]


def worker_of(output, share):
    """The process that makes a share of the shards, once it has made one."""
    wait_for(lambda: list((output / "data").glob("train-*.parquet")), 120)
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"]
        and share in process.info["cmdline"]
        and f"{output}/jobs/generate.yaml" in process.info["cmdline"]
    ]
    return found[0] if found else None


def test_the_pipeline_as_jobs_makes_what_a_local_run_makes(cluster, tiny, tmp_path):
    """One worker is killed, another is told that its time is nearly over; both are queued again, alone, and go on."""
    file = write_experiment(tiny, tmp_path)
    slow = ["--generate.rows_per_shard", 2, "--generate.max_tokens", 60, *sharing_prompts(tmp_path)]
    local, output = tmp_path / "local", tmp_path / "it's a run; $(touch hacked)"
    for stage in ("prompts", "generate"):
        assert run_cli(stage, file, *slow, "--output", local, OMP_NUM_THREADS="1").returncode == 0
    submitted = run_cli("submit", file, *slow, "--output", output, *settings(), **cluster)
    assert submitted.returncode == 0, submitted.stderr
    again = run_cli("submit", file, *slow, "--output", output, *settings(), **cluster)
    assert again.returncode == 2
    assert "of an earlier submission are still queued or running" in again.stderr
    jobs = {job["stage"]: job["job"] for job in read_json(output / "jobs/jobs.json")["jobs"]}
    assert list(jobs)[:3] == ["prompts", "prompts-2", "generate"]
    generate = jobs["generate"]
    victim = worker_of(output, "1/2")
    assert victim is not None
    victim.send_signal(signal.SIGKILL)
    ask(cluster, "scancel", "--batch", "--signal=USR1", f"{generate}_1")
    shown = run_cli("status", output, **cluster)
    assert shown.returncode == 0, shown.stderr
    assert f"generate  job {generate}: " in shown.stdout
    wait_for(lambda: is_over(cluster, output), 500)
    said = logs(output)
    assert "failed with status 137: queued again" in said, said
    assert "stopped before the end of its time: queued again" in said, said
    assert "left to other workers; run this command again" in said, "the prompts were not shared"
    mine, theirs = (
        [(entry["file"], entry["rows"]) for entry in read_manifest(directory / "data")["shards"]] for directory in (output, local)
    )
    assert mine == theirs, "names hold checksums"
    assert (output / "report.html").is_file(), said
    assert not list(ROOT.glob("hacked")) + list(tmp_path.glob("**/hacked"))
    done = run_cli("status", output, **cluster).stdout
    assert done.count("done") == 8
    assert "not done" not in done


def test_wrong_input_ends_the_pipeline_and_keeps_what_is_there(cluster, tiny, tmp_path):
    """Status 2 is not tried again, and what would come after it is not run."""
    file = write_experiment(tiny, tmp_path)
    output = tmp_path / "run"
    submitted = run_cli("submit", file, "--output", output, *settings(1), **cluster)
    assert submitted.returncode == 0, submitted.stderr
    of_train = output / "jobs/train.yaml"  # changed behind the back of `submit`, which would have refused it
    of_train.write_text(of_train.read_text().replace("max_steps:", "no_such:"))
    wait_for(lambda: is_over(cluster, output), 240)
    said = run_cli("status", output, **cluster).stdout
    assert [line.split()[-1] for line in said.splitlines()] == ["done"] * 3 + ["done"] * 3
    assert [("not done" in line) for line in said.splitlines()] == [False] * 3 + [True] * 3
    assert "no_such" in logs(output)
    assert "queued again" not in logs(output)


def test_cancelling_ends_all_of_it(cluster, tiny, tmp_path):
    file = write_experiment(tiny, tmp_path)
    output = tmp_path / "run"
    long = ["--generate.rows_per_shard", "1", "--generate.max_tokens", "64", "--generate.samples", "500"]  # minutes of work
    assert run_cli("submit", file, "--output", output, *settings(1), *long, **cluster).returncode == 0
    cancelled = run_cli("cancel", output, **cluster)
    assert cancelled.returncode == 0, cancelled.stderr
    assert "generate (" in cancelled.stdout
    wait_for(lambda: is_over(cluster, output), 60)
    assert "nothing to cancel, all jobs have ended" in run_cli("cancel", output, **cluster).stdout
    assert Path(output / "jobs/generate.sh").is_file()


@pytest.mark.engine
def test_jobs_with_a_real_vllm(cluster, smollm2, tmp_path):
    """The rows are those that the exact engine makes, by their ids; the text is vLLM's."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    file = write_cut_experiment(smollm2, tmp_path)
    assert run_cli("generate", file, "--teacher.engine", "transformers", "--output", tmp_path / "exact").returncode == 0
    submitted = run_cli("submit", file, *settings(1), **cluster)
    assert submitted.returncode == 0, submitted.stderr
    wait_for(lambda: is_over(cluster, tmp_path / "run"), 300)
    # All rows are cut, so nothing is left to train on, and what depends on it is not run.
    assert "both splits need at least one row" in logs(tmp_path / "run")
    ids = [list(load_dataset(directory / "data")["id"]) for directory in (tmp_path / "run", tmp_path / "exact")]
    assert ids[0] == ids[1]
