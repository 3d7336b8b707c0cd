"""A managed job of SkyPilot: against its own schema, word by word as a machine gets them, and handed on to a double of sky."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmdistill.config import load_experiment
from llmdistill.errors import InputError
from llmdistill.jobs import backend_of
from llmdistill.jobs.commands import scheduled
from llmdistill.runs.files import read_json
from tests.conftest import ROOT, run_cli
from tests.doubles import double
from tests.jobs.test_jobs import HOSTILE

SETTINGS = (
    "{bucket: s3://team-runs, accelerator: A100, gpus: 1, spot: true, memory: 64G, cpus: 8, workers: 4, secrets: [HF_TOKEN], "
    "setup: [pip install llmdistill], environment: [source .venv/bin/activate], "
    "stages: {train: {nodes: 2, gpus: 8, spot: false, infra: aws/us-east-1}}}"
)


@pytest.fixture
def here(experiment_file, monkeypatch):
    """The experiment, in the working directory, which is what is copied to the machines."""
    monkeypatch.chdir(experiment_file.parent)
    return experiment_file


def documents(file, settings=SETTINGS, **more):
    experiment = load_experiment(file, [("jobs.skypilot", settings), *more.items()])
    settings = experiment.jobs.skypilot
    (text,) = backend_of("skypilot").render(experiment, settings, scheduled(experiment, settings)).values()
    head, *tasks = yaml.safe_load_all(text)
    return head, {task["name"]: task for task in tasks}


def run_machine(task, directory, **variables):
    """What a machine would run, with the commands in it replaced by doubles: their words."""
    for name in ("llmdistill", "torchrun", "accelerate"):
        double(directory, name, f'printf "%s\\n" {name} "$@"')
    environment = {"PATH": f"{directory}:/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", **variables}
    done = subprocess.run(["bash"], input=task["run"], env=environment, cwd=directory, capture_output=True, text=True, check=True)
    assert not (directory / "hacked").exists()
    return done.stdout.splitlines()


SCHEMAS = """
import json, sys, types
from pathlib import Path
root = Path(sys.argv[1])
sky = types.ModuleType("sky")  # without what it starts with: clouds, and their libraries
sky.__path__, sky.__version__, sky.__root_dir__, sky.__commit__ = [str(root / "sky")], "0.14.1", str(root / "sky"), ""
sys.modules["sky"] = sky
# What the schemas ask for the keys `autostop` and `config`, which no task of ours has, needs most of SkyPilot's libraries.
stopping = types.ModuleType("sky.skylet.autostop_lib")
stopping.AutostopWaitFor = types.SimpleNamespace(supported_modes=list)
sys.modules["sky.skylet.autostop_lib"] = stopping
sys.path.append(str(root))
import sky.skylet
sky.skylet.autostop_lib = stopping
from sky.utils import schemas
schemas._task_config_schema = lambda: False
print(json.dumps([schemas.get_task_schema(), schemas.get_resources_schema()]))
"""


def test_every_task_is_one_of_skypilot(here, monkeypatch):
    jsonschema = pytest.importorskip("jsonschema")
    schemas = ROOT / ".schemas"
    if not (schemas / "sky").is_dir():
        pytest.skip("the schemas of SkyPilot are not there: `make .schemas`")
    done = subprocess.run([sys.executable, "-c", SCHEMAS, str(schemas)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_task, of_resources = (jsonschema.Draft202012Validator(schema) for schema in json.loads(done.stdout))
    head, tasks = documents(here)
    assert set(head) == {"name"}, "what tells the head of a pipeline from a task"
    for task in tasks.values():
        of_task.validate(task)
        of_resources.validate(task["resources"])
        (mount,) = (mount for mount in task["file_mounts"].values() if isinstance(mount, dict))
        assert set(mount) == {"source", "mode"}
        assert re.search(rf"^    {mount['mode']} = ", (schemas / "sky/data/storage.py").read_text(), flags=re.M)
    with pytest.raises(jsonschema.ValidationError):
        of_task.validate({**tasks["train"], "nodes": 2})
    with pytest.raises(jsonschema.ValidationError):
        of_resources.validate({**tasks["train"]["resources"], "gpus": 2})


def test_a_stage_is_a_task_with_what_it_asks_for(here):
    head, tasks = documents(here)
    assert list(tasks) == ["generate", "curate", "prune", "train", "eval", "report"]
    assert re.fullmatch(r"run-[0-9a-f]{6}", head["name"])
    generate, train = tasks["generate"], tasks["train"]
    recovery = {"max_restarts_on_errors": 2, "recover_on_exit_codes": [143]}
    assert generate["resources"] == {
        "accelerators": "A100:1", "cpus": "8+", "memory": "64+", "use_spot": True, "job_recovery": recovery,
    }  # fmt: skip
    assert (generate["num_nodes"], train["num_nodes"], tasks["eval"]["num_nodes"]) == (4, 2, 1)
    assert (train["resources"]["accelerators"], train["resources"]["infra"]) == ("A100:8", "aws/us-east-1")
    assert train["resources"]["use_spot"] is False
    assert "accelerators" not in tasks["curate"]["resources"]
    for task in tasks.values():
        mounts, name, jobs = dict(task["file_mounts"]), task["name"], here.parent / "run/jobs"
        assert mounts.pop("/outputs") == {"source": "s3://team-runs", "mode": "MOUNT"}
        read = ["generate", "curate"] if name == "curate" else [name]
        assert mounts == {f"~/llmdistill/{each}.yaml": str(jobs / f"{each}.yaml") for each in read}
        assert task["workdir"] == str(here.parent)
        assert task["setup"] == "pip install llmdistill\n"
        assert task["secrets"] == {"HF_TOKEN": None}
        assert task["run"].startswith("source .venv/bin/activate\n")


def test_hostile_names_stay_names(here, tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    _, tasks = documents(here, output=HOSTILE)
    source = tasks["eval"]["file_mounts"]["~/llmdistill/eval.yaml"]
    assert source == f"{here.parent}/{HOSTILE}/jobs/eval.yaml"
    rank = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_TASK_ID": "sky-7", "HOME": "/home/sky"}

    def words(stage):
        return ["llmdistill", stage, f"/home/sky/llmdistill/{stage}.yaml"]

    assert run_machine(tasks["generate"], tmp_path, **rank) == [*words("generate"), "--shards", "2/4"]
    assert run_machine(tasks["curate"], tmp_path, **rank) == [*words("generate"), *words("curate")]
    train = "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id sky-7 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 -m"
    assert run_machine(tasks["train"], tmp_path, **rank) == [*train.split(), *words("train")]
    _, tasks = documents(here, SETTINGS[:-1] + ", accelerate: fsdp2.yaml}", output=HOSTILE)
    train = "accelerate launch --config_file fsdp2.yaml --num_machines 2 --num_processes 16 --machine_rank 1 "
    train += "--main_process_ip 10.0.0.1 --main_process_port 29500 -m"
    assert run_machine(tasks["train"], tmp_path, **rank) == [*train.split(), *words("train")]


@pytest.mark.slow
def test_sky_is_asked_and_understood(experiment_file, tmp_path):
    output, there = tmp_path / "my run", tmp_path / "bin"
    there.mkdir()
    double(there, "sky", f'echo "$@" >> "{tmp_path}/asked"; [ "$2" != queue ] || cat "{tmp_path}/queue.json"')
    environment = {"PATH": f"{there}:/usr/bin:/bin"}
    file = "configs/demo.yaml"
    arguments = ["--output", output, "--jobs.skypilot", SETTINGS]
    submitted = run_cli("submit", file, *arguments, **environment)
    assert submitted.returncode == 0, submitted.stderr
    name = read_json(output / "jobs/jobs.json")["jobs"][0]["job"]
    launched = f"jobs launch -y -d -n {name} --secret HF_TOKEN {output}/jobs/skypilot.yaml"
    assert (tmp_path / "asked").read_text().splitlines() == [launched]
    _, *tasks = yaml.safe_load_all((output / "jobs/skypilot.yaml").read_text())
    for task in tasks:
        source = task["file_mounts"][f"~/llmdistill/{task['name']}.yaml"]
        assert load_experiment(Path(source)).output == f"/outputs{output}"

    def queue(number, **states):
        rows = [{"job_id": number, "job_name": name, "task_name": key, "status": value} for key, value in states.items()]
        older = {"job_id": number - 1, "job_name": name, "task_name": "eval", "status": "FAILED"}
        other = {"job_id": number + 1, "job_name": "other", "task_name": "eval", "status": "FAILED"}
        (tmp_path / "queue.json").write_text(json.dumps([other, *rows, older]))

    queue(5, generate="SUCCEEDED", curate="RECOVERING", train="PENDING")
    said = run_cli("status", output, **environment).stdout
    assert f"generate  job {name}: 1 succeeded\n" in said
    assert f"curate    job {name}: 1 recovering\n" in said
    assert f"eval      job {name}: unknown to the scheduler\n" in said
    again = run_cli("submit", file, *arguments, **environment)
    assert (again.returncode, "curate, train of an earlier" in again.stderr) == (2, True)
    assert run_cli("cancel", output, **environment).returncode == 0
    assert (tmp_path / "asked").read_text().splitlines()[-1] == f"jobs cancel -y -n {name}"
    queue(5, generate="FAILED", curate="CANCELLED")
    assert "nothing to cancel, all jobs have ended" in run_cli("cancel", output, **environment).stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{accelerator: A100}", "jobs.skypilot.bucket is missing"),
        ("{bucket: /data}", "jobs.skypilot.bucket"),
        ("{bucket: s3://b, gpus: 8}", "gpus needs accelerator"),
        ("{bucket: s3://b, memory: 64Gi}", "counts in gigabytes"),
        ("{bucket: s3://b, secrets: [HF_TOKEN=abc]}", "not a variable name"),
        ("{bucket: s3://b, stages: {eval: {nodes: 2}}}", "eval runs on one node"),
        ("{bucket: s3://b, time: '01:00:00'}", "no such key jobs.skypilot.time"),
    ],
)
def test_bad_input_is_named(experiment_file, settings, message):
    with pytest.raises(InputError, match=message):
        load_experiment(experiment_file, [("jobs.skypilot", settings)])
