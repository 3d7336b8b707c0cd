"""An object store between machines: real s3fs, a real S3 server (moto's) in a process of its own, workers that are killed.

A machine is a directory: a worker's working directory, to which its `output` is relative.
"""

import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="s3fs is not installed; `make test` puts it into .s3")
pytest.importorskip("moto.server", reason="moto is not installed; `make test` puts it into .s3")

import s3fs

from llmdistill import cli
from llmdistill.config import load_experiment
from llmdistill.objectstore import store
from llmdistill.objectstore.copies import SEAL, bring
from llmdistill.objectstore.store import Store
from tests.integration.processes import losses, weights

MODULES = [
    "llmdistill.stages.generate",
    "llmdistill.stages.curate",
    "llmdistill.stages.train",
    "llmdistill.training.trainer",
    "llmdistill.teachers.transformers",
]


class Server:
    """The S3 server, with what it can be told."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        script = Path(__file__).parent / "s3_server.py"
        self.process = subprocess.Popen(
            [sys.executable, script, str(self.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.tell(up=True)

    def tell(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def hold(self, key, mark):
        """The next upload of such a name never ends; the file `mark` appears in the middle of it."""
        self.tell(fault={"method": "PUT", "key": key, "times": 1, "do": "hold", "mark": str(mark)})


@pytest.fixture(scope="module")
def server():
    started = Server()
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HOME": str(home),
    }


@pytest.fixture(autouse=True)
def there(environment, monkeypatch):
    """The environment of a machine in this process, too, and the server without faults."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(server, request):
    """The URL of a bucket of the test's own, and what is in it by path."""
    server.tell(fault={"method": "", "key": "", "times": 0})
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[-50:].strip("-")
    files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    files.mkdir(name)
    return Bucket(files, name)


class Bucket:
    def __init__(self, files, name):
        self.files, self.name, self.url = files, name, f"s3://{name}/runs/one"

    def names(self, under):
        root = f"{self.name}/runs/one/{under}"
        return {path.removeprefix(f"{root}/") for path in self.files.find(root)}

    def path(self, name):
        return f"{self.name}/runs/one/{name}"


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """The experiment, and what a machine without a store makes of it."""
    directory = tmp_path_factory.mktemp("stores")
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Say {number} in words."}}\n' for number in range(24)))
    file = directory / "experiment.yaml"
    file.write_text(f"""
output: run
teacher: {{model: {tiny}, engine: transformers, dtype: float32, batch_size: 3}}
prompts: {{source: {prompts}}}
generate: {{max_tokens: 8, rows_per_shard: 4}}
targets: {{kind: topk, k: 6}}
student: {{prune: {{layers: 2}}}}
train:
  compare_text_only: false
  args: {{max_steps: 12, save_steps: 3, save_total_limit: 1, per_device_train_batch_size: 2, learning_rate: 1.0e-3,
    gradient_checkpointing: false, bf16: false}}
eval: {{held_out: 0.25}}
""")
    assert run(directory / "local", {}, "generate curate train", file)[0] == 0
    return file, directory / "local/run"


def machine(directory, environment, arguments):
    """What a worker process does."""
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    os.environ.update(environment)
    sys.stdout = sys.stderr = (directory / "log").open("a", buffering=1)
    import torch

    torch.set_num_threads(1)
    for name in arguments[0].split():
        try:
            cli.main([name, *map(str, arguments[1:])])
        except SystemExit as end:
            if end.code:
                raise


def start(directory, environment, *arguments):
    """A command, or some in turn, on a machine: in a process of its own, forked from one that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    worker = context.Process(target=machine, args=(directory, environment, arguments))
    worker.start()
    return worker


def run(directory, environment, *arguments):
    """The same to its end: its status and what it said."""
    (directory / "log").unlink(missing_ok=True)
    worker = start(directory, environment, *arguments)
    worker.join(120)
    return worker.exitcode, (directory / "log").read_text()


def wait_for(mark, worker):
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert worker.is_alive(), "it ended before it was to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def dataset(directory):
    return {file.name: file.read_bytes() for file in [*directory.glob("*.parquet"), directory / "dataset.json"]}


def kill(worker):
    worker.kill()
    worker.join()


def test_two_machines_make_the_dataset_of_one(prepared, bucket, environment, tmp_path):
    file, local = prepared
    one, other = tmp_path / "one", tmp_path / "other"
    command = ("generate", file, "--store", bucket.url, "--shards")
    workers = [start(directory, environment, *command, share) for directory, share in ((one, "1/2"), (other, "2/2"))]
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    both = (one / "log").read_text() + (other / "log").read_text()
    assert bucket.names("data") == {*dataset(local / "data"), "README.md", "run.json", SEAL}
    for directory, share in ((one, "1/2"), (other, "2/2")):
        status, said = run(directory, environment, *command, share)
        assert (status, "is finished" in said) == (0, True), both + said
        assert dataset(directory / "run/data") == dataset(local / "data")
    # What the store holds is a dataset for whoever copies it.
    bucket.files.get(bucket.path("data"), str(tmp_path / "copied"), recursive=True)
    assert dataset(tmp_path / "copied") == dataset(local / "data")


def test_a_worker_killed_in_the_middle_of_an_upload(prepared, bucket, environment, server, tmp_path, monkeypatch, capsys):
    file, local = prepared
    one, other = tmp_path / "one", tmp_path / "other"
    command = ("generate", file, "--store", bucket.url)
    server.hold("train-00003", tmp_path / "held")
    worker = start(one, environment, *command)
    wait_for(tmp_path / "held", worker)
    kill(worker)
    names = bucket.names("data")
    assert {name[:11] for name in names} == {"run.json", "train-00000", "train-00001", "train-00002"}
    assert list((one / "run/data").glob("train-00003*"))
    before = {name: bucket.files.info(bucket.path(f"data/{name}"))["LastModified"] for name in names if name != "run.json"}

    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, command), "--targets.k", "5"])
    assert end.value.code == 2
    assert f"{bucket.url}/data was made with other settings: targets.k was 6, is 5" in capsys.readouterr().err
    assert bucket.names("data") == names
    assert not Path("run/data").exists()

    status, said = run(other, environment, *command)
    assert status == 0, said
    assert dataset(other / "run/data") == dataset(local / "data")
    for name, when in before.items():
        assert bucket.files.info(bucket.path(f"data/{name}"))["LastModified"] == when, "it was made again"
    status, said = run(one, environment, *command)
    assert (status, "is finished" in said) == (0, True)
    assert dataset(one / "run/data") == dataset(local / "data")


def test_what_is_damaged_in_the_store_is_noticed(prepared, bucket, environment, tmp_path):
    file, local = prepared
    command = ("--store", bucket.url)
    assert run(tmp_path / "one", environment, "generate", file, *command)[0] == 0
    victim = sorted(dataset(local / "data"))[2]
    path = bucket.path(f"data/{victim}")
    bucket.files.pipe_file(path, bucket.files.cat_file(path)[:-5])

    status, said = run(tmp_path / "reader", environment, "curate", file, *command)
    assert status == 2
    assert f"{bucket.url}/data/{victim} is damaged or gone; run the stage" in said
    assert not (tmp_path / "reader/run/data" / victim).exists()

    status, said = run(tmp_path / "writer", environment, "generate", file, *command)
    assert status == 0
    assert f"data/{victim} is damaged or gone; making it again" in said
    assert dataset(tmp_path / "writer/run/data") == dataset(local / "data")
    status, said = run(tmp_path / "reader", environment, "curate", file, *command)
    assert status == 0, said
    assert dataset(tmp_path / "reader/run/curated") == dataset(local / "curated")


def test_a_server_that_fails_costs_time_only(prepared, bucket, environment, server, tmp_path):
    file, local = prepared
    one, command = tmp_path / "one", ("generate", file, "--store", bucket.url)
    server.tell(fault={"method": "PUT", "key": "train-00001", "times": 2, "do": "503"})
    worker = start(one, environment, *command)
    deadline = time.monotonic() + 60
    while not list((one / "run/data").glob("train-00002*")):
        assert worker.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    server.tell(up=False)
    time.sleep(2)
    server.tell(up=True)
    worker.join(120)
    said = (one / "log").read_text()
    assert worker.exitcode == 0, said
    assert re.search(r"train-00001.*: .*Try again; retrying for 5 minutes", said)
    assert "Could not connect" in said or "Connection" in said
    assert dataset(one / "run/data") == dataset(local / "data")
    assert SEAL in bucket.names("data")


def test_a_server_that_stays_away_ends_the_work_with_what_is_finished(prepared, bucket, server, tmp_path, monkeypatch, capsys):
    file, local = prepared
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "_DELAYS", (0.05, 0.1))
    command = ["generate", str(file), "--store", bucket.url]
    server.tell(fault={"method": "PUT", "key": "train-00002", "times": 1000, "do": "503"})
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    assert end.value.code == 1
    assert re.search(rf"{bucket.url}/data/train-00002-.*: Try again; finished work is kept locally", capsys.readouterr().err)
    assert len(list(Path("run/data").glob("train-*.parquet"))) == 3
    server.tell(up=False)
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    assert end.value.code == 1
    server.tell(up=True)
    server.tell(fault={"method": "", "key": "", "times": 0})
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    assert end.value.code == 0
    assert dataset(Path("run/data")) == dataset(local / "data")


def test_training_goes_on_from_the_store_on_an_empty_machine(prepared, bucket, environment, server, tmp_path, monkeypatch):
    """Killed while its third checkpoint is uploaded: the second one is where another machine goes on."""
    file, local = prepared
    one, other, third = (tmp_path / name for name in ("one", "other", "third"))
    shutil.copytree(local / "data", one / "run/data")
    command = ("--store", bucket.url)
    assert run(one, environment, "generate curate", file, *command)[0] == 0  # generated already, it is uploaded
    server.hold("checkpoint-9/optimizer", tmp_path / "held")
    worker = start(one, environment, "train", file, *command)
    wait_for(tmp_path / "held", worker)
    kill(worker)
    seals = {name for name in bucket.names("student/checkpoints") if name.endswith(SEAL)}
    assert seals == {f"checkpoint-6/{SEAL}"}
    assert (one / "run/student/checkpoints/checkpoint-9/trainer_state.json").exists()

    status, said = run(other, environment, "train", file, *command)
    assert status == 0, said
    assert "fetching run/student/checkpoints/checkpoint-6" in said
    assert not (other / "run/student/checkpoints/checkpoint-3").exists()
    assert [entry.keys() for entry in losses(other / "run/student")] == [entry.keys() for entry in losses(local / "student")]
    for a, b in zip(losses(other / "run/student"), losses(local / "student"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    names = bucket.names("student")
    assert {"model.safetensors", "run.json", SEAL, f"checkpoints/checkpoint-12/{SEAL}"} <= names
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints")} == {"checkpoint-12"}

    status, said = run(third, environment, "train", file, *command)
    assert (status, "run/student is finished" in said) == (0, True), said
    trained = weights(other / "run/student")
    assert all((trained[name] == tensor).all() for name, tensor in weights(third / "run/student").items())
    # The one that was killed finds it done, too.
    status, said = run(one, environment, "train", file, *command)
    assert (status, "run/student is finished" in said) == (0, True), said
    # And a stage that comes later has everything that it reads.
    monkeypatch.chdir(tmp_path)
    bring(load_experiment(file, [("store", bucket.url)]), "eval")
    for name in ("curated", "student-before", "student"):
        assert json.loads(Path("run", name, "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    ("url", "unset", "message"),
    [
        ("s3://not-there/run", (), "s3://not-there/run: no such bucket"),
        ("s3://not-there/run", ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "no credentials"),
        ("s3://Not_A_Bucket!/run", (), "refused"),
    ],
)
def test_a_store_that_cannot_be_used_is_said_at_the_start(prepared, server, tmp_path, monkeypatch, capsys, url, unset, message):
    file, _ = prepared
    monkeypatch.chdir(tmp_path)
    for name in unset:
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", str(file), "--store", url])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("run/data").exists()


def test_of_two_that_decide_the_first_does(bucket, tmp_path):
    one, other = Store(bucket.url), Store(bucket.url)
    for content in ("first", "second"):
        (tmp_path / content).write_text(content)
    assert one.decide(tmp_path / "first", "data/dataset.json") == b"first"
    assert other.decide(tmp_path / "second", "data/dataset.json") == b"first"
    one.remove("data/dataset.json")
    assert other.decide(tmp_path / "second", "data/dataset.json") == b"second"


def test_a_large_file_appears_whole_or_not_at_all(bucket, environment, server, tmp_path):
    """Of more than 100 MB it is uploaded in parts; the process is killed in the middle of the second one."""
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(101 << 20)
    server.hold("partNumber=2", tmp_path / "held")
    worker = multiprocessing.get_context("forkserver").Process(target=upload, args=(environment, bucket.url, large))
    worker.start()
    wait_for(tmp_path / "held", worker)
    kill(worker)
    assert bucket.names("data") == set()
    Store(bucket.url).put(large, "data/large")
    assert Store(bucket.url).names("data") == {"large": 101 << 20}


def upload(environment, url, file):
    os.environ.update(environment)
    Store(url).put(file, "data/large")
