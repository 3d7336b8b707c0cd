"""What reaches the Hub, byte for byte, through the real client; and what must never be sent."""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import yaml

from llmdistill import DistillConfig, load_dataset, push_to_hub
from llmdistill.config import Experiment
from llmdistill.data.cards import model_card
from llmdistill.data.manifest import read_manifest, write_manifest
from llmdistill.data.rows import rows_to_table
from llmdistill.data.shard_writer import finished_shards, write_shard
from llmdistill.errors import InputError, RemoteError
from llmdistill.runs import record
from tests import factories
from tests.conftest import run_cli
from tests.data.test_dataset import DESCRIPTION, VOCAB, make_row

TOKEN = "hf_thisIsNoSecretButATestOfOne"


class HubDouble(ThreadingHTTPServer):
    """A test double of the Hugging Face Hub's HTTP side, in memory: repositories, branches, LFS objects, commits.

    It knows one token, whose user `me` may write under `me` and `lab`. `requests` records every request as
    (method, path, authorization); `failure` is the status that every request gets instead of an answer.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: dict[str, bool] = {}  # by "models/me/name" or "datasets/me/name"
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: dict[str, int] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.failure: int | None = None

    def answer(self, method, path, body, authorization):
        """Status and content for one request."""
        self.requests.append((method, path, authorization))
        if self.failure:
            return self.failure, {"error": f"no, whatever {authorization} may be"}
        if method == "PUT" and (match := re.fullmatch("/lfs/(.+)", path)):  # a signed address: no token
            self.objects[match[1]] = body
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        lines = [json.loads(line) for line in body.splitlines()]
        content = lines[0] if lines else {}
        if path == "/api/repos/create":
            return self.create(content)
        if path == "/api/validate-yaml":
            return self.validate(content["content"])
        if match := re.fullmatch(r"/(datasets/)?(.+)\.git/info/lfs/objects/batch", path):
            return 200, {"objects": [self.batch(entry) for entry in content["objects"]]}
        if match := re.fullmatch(r"/lfs/(.+)/verify", path):
            whole = hashlib.sha256(self.objects.get(match[1], b"")).hexdigest() == match[1]
            return (200 if whole else 400), {}
        match = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path)
        if match is None or match[1] not in self.private:
            return 404, {"error": "Repository not found"}
        repo, action, revision = match[1], match[2], unquote(match[3] or "main")
        if action == "branch":
            self.branches[repo].setdefault(revision, dict(self.branches[repo]["main"]))
            return 200, {}
        files = self.branches[repo][revision]
        if action == "preupload":
            return 200, {"files": [self.preupload(files, entry["path"]) for entry in content["files"]]}
        if action == "tree":
            return 200, [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
        if action == "commit":
            return 200, self.commit(repo, files, lines)
        return 200, {"id": repo.partition("/")[2], "private": self.private[repo], "sha": self.sha(repo), "siblings": []}

    def create(self, content):
        owner = content["organization"] or "me"
        if owner not in ("me", "lab"):
            return 403, {"error": f"You don't have the rights to create a repository under the namespace {owner}"}
        repo = f"{content.get('type', 'model')}s/{owner}/{content['name']}"
        url = f"{self.url}/{repo.removeprefix('models/')}"
        if repo in self.private:
            return 409, {"error": "You already created this repository", "url": url}
        self.private[repo] = content.get("visibility") == "private"
        self.branches[repo] = {"main": {".gitattributes": b"*.parquet filter=lfs\n"}}
        self.commits[repo] = 0
        return 200, {"url": url}

    def validate(self, card):
        base = yaml.safe_load(card.split("---")[1]).get("base_model", "org/name")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            error = {"message": f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'}
            return 400, {"errors": [error], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, files, path):
        data, lfs = files.get(path), path.endswith((".parquet", ".safetensors"))
        oid = data and (hashlib.sha256(data) if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, entry):
        if entry["oid"] in self.objects:
            return entry
        href = f"{self.url}/lfs/{entry['oid']}"
        return {**entry, "actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}}

    def commit(self, repo, files, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits[repo] += 1
        return {"commitUrl": f"{self.url}/{repo}/commit/{self.sha(repo)}", "commitOid": self.sha(repo)}

    def sha(self, repo):
        return hashlib.sha1(f"{repo} {self.commits[repo]}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _respond(self):
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, content = self.server.answer(self.command, path, body, self.headers.get("Authorization"))
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _respond

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The double, running, and the client in this process pointed at it; hf_xet speaks another protocol and is off."""
    huggingface_hub.utils.disable_progress_bars()
    server = HubDouble()
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it asks the Hub for names of agents
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def dataset(tmp_path):
    """What `curate` leaves, with a half-written shard and somebody's notes beside it."""
    path = tmp_path / "curated"
    write_dataset(path, range(6))
    (path / ".train-00000.77.unfinished").write_bytes(b"half a shard")
    (path / "notes").mkdir()
    (path / "notes/todo.txt").write_text("not yours")
    (path / "todo.txt").write_text("not yours")
    return path


def write_dataset(path, numbers):
    record.begin(path, "curate", {"seed": 0}, {}, 0)
    rows = [make_row(number, 2 + number) for number in numbers]
    for split, index, count, part in (("train", 0, 2, rows[:3]), ("train", 1, 2, rows[3:5]), ("test", 0, 1, rows[5:])):
        write_shard(path, split, index, count, rows_to_table(part, VOCAB))
    pq.write_table(rows_to_table([make_row(99)], VOCAB), path / "rejected.parquet")
    write_manifest(path, finished_shards(path, "train") + finished_shards(path, "test"), DESCRIPTION)
    record.finish(path, {"kept": 6})


@pytest.fixture
def student(tiny, tmp_path):
    """What `train` leaves, with its checkpoints and the pruned model before training."""
    path = tmp_path / "student"
    shutil.copytree(tiny, path)
    record.begin(path, "train", {"seed": 0}, {str(tiny): "abc"}, 0)
    for name in ("before/model.safetensors", "checkpoints/checkpoint-1/optimizer.bin", "adapter/adapter_config.json"):
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text("{}")
    (path / "adapter/adapter_model.safetensors").write_bytes(b"low rank")
    (path / ".unfinished").write_text("half")
    (path / "trainer_state.json").write_text("{}")
    experiment = Experiment.model_validate(
        {"output": str(tmp_path), "teacher": {"model": str(tiny)}, "student": {"model": str(tiny)}}
    )
    manifest = {"teacher": {"model": str(tiny)}, "targets": {"kind": "topk", "k": 4}, "shards": []}
    (path / "README.md").write_text(
        model_card(experiment, manifest, "student", DistillConfig(str(path), use_cpu=True, bf16=False), {"steps": 1})
    )
    record.finish(path, {"steps": 1})
    return path


def bytes_of(directory, names):
    return {name: (directory / name).read_bytes() for name in names}


def pull(files, directory):
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def sent(hub):
    """Whether anything but questions reached the repositories."""
    return hub.objects or any(hub.commits.values())


def test_a_dataset_arrives_whole_and_alone(hub, dataset, tmp_path):
    url = push_to_hub(dataset, "me/answers")
    (repo,) = hub.branches
    assert repo == "datasets/me/answers"
    assert url == f"{hub.url}/datasets/me/answers/commit/{hub.sha(repo)}"
    assert hub.commits[repo] == 1
    assert hub.private[repo] is False
    shards = [entry["file"] for entry in read_manifest(dataset)["shards"]]
    want = bytes_of(dataset, [*shards, "dataset.json", "README.md", "run.json"])
    files = hub.branches[repo]["main"]
    files.pop(".gitattributes")
    assert files == want
    assert set(hub.objects.values()) == {data for name, data in want.items() if name.endswith(".parquet")}

    pulled = pull(files, tmp_path / "pulled")
    for split in ("train", "test"):
        assert load_dataset(pulled, split).with_format("arrow")[:] == load_dataset(dataset, split).with_format("arrow")[:]
    found = datasets.load_dataset(str(pulled), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 5, "test": 1}


def test_a_student_arrives_whole_and_alone(hub, student, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    push_to_hub(str(student), "lab/student")
    (repo,) = hub.branches
    assert repo == "models/lab/student"
    files = hub.branches[repo]["main"]
    files.pop(".gitattributes")
    names = {
        "README.md", "run.json", "trainer_state.json", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    assert files == bytes_of(student, names)
    pulled = pull(files, tmp_path / "pulled")
    assert AutoModelForCausalLM.from_pretrained(pulled).num_parameters() > factories.VOCAB * 32
    assert AutoTokenizer.from_pretrained(pulled).chat_template


def test_the_same_again_makes_no_commit(hub, dataset):
    assert push_to_hub(dataset, "answers") == push_to_hub(dataset, "me/answers")
    assert hub.commits == {"datasets/me/answers": 1}


def test_a_new_push_replaces_the_shards_of_the_last_and_nothing_else(hub, dataset, tmp_path):
    push_to_hub(dataset, "me/answers")
    files = hub.branches["datasets/me/answers"]["main"]
    files["LICENSE"] = b"mine"
    write_dataset(tmp_path / "newer", range(10, 16))
    push_to_hub(tmp_path / "newer", "me/answers")
    assert hub.commits == {"datasets/me/answers": 2}
    shards = [entry["file"] for entry in read_manifest(tmp_path / "newer")["shards"]]
    assert files.keys() == {*shards, "dataset.json", "README.md", "run.json", "LICENSE", ".gitattributes"}


def test_weights_of_an_earlier_student_do_not_stay(hub, student):
    push_to_hub(student, "me/student")
    shutil.rmtree(student / "adapter")
    (student / "model.safetensors").rename(student / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    push_to_hub(student, "me/student")
    files = hub.branches["models/me/student"]["main"]
    assert {name for name in files if "safetensors" in name} == {
        index["weight_map"]["lm_head.weight"],
        "model.safetensors.index.json",
    }
    assert not [name for name in files if name.startswith("adapter")]


def test_another_branch_leaves_main_alone(hub, dataset):
    push_to_hub(dataset, "me/answers", revision="next")
    branches = hub.branches["datasets/me/answers"]
    assert list(branches["main"]) == [".gitattributes"]
    assert "dataset.json" in branches["next"]


def test_private_means_private(hub, dataset):
    push_to_hub(dataset, "me/answers", private=True)
    assert hub.private == {"datasets/me/answers": True}
    push_to_hub(dataset, "me/answers", private=True)
    hub.private["datasets/me/answers"] = False
    hub.requests.clear()
    with pytest.raises(InputError, match="me/answers: exists and is public"):
        push_to_hub(dataset, "me/answers", private=True)
    assert [method for method, *_ in hub.requests] == ["POST", "GET"]


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def as_unfinished(directory):
    run = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps({**run, "status": "unfinished"}))


DAMAGE = {
    "a flipped bit": (
        "dataset",
        lambda d: flip_a_bit(finished_shards(d, "test")[0].file),
        r"test-00000-.*checksum does not match",
    ),
    "a lost shard": ("dataset", lambda d: finished_shards(d, "train")[1].file.unlink(), r"train-00001-.*the shard is missing"),
    "an unfinished curate": ("dataset", as_unfinished, "curated: not finished; run `curate` again"),
    "no manifest": ("dataset", lambda d: (d / "dataset.json").unlink(), "neither a dataset .* nor a student"),
    "an unfinished train": ("student", as_unfinished, "student: not finished; run `train` again"),
    "no weights": ("student", lambda d: (d / "model.safetensors").unlink(), "model.safetensors: the file is missing"),
    "no run.json": ("student", lambda d: (d / "run.json").unlink(), "neither a dataset .* nor a student"),
    "no directory": ("student", shutil.rmtree, "student: no such directory"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_not_whole_is_refused_and_nothing_is_asked_or_sent(case, hub, request):
    fixture, damage, message = DAMAGE[case]
    directory = request.getfixturevalue(fixture)
    damage(directory)
    with pytest.raises(InputError, match=message):
        push_to_hub(directory, "me/name")
    assert not hub.requests


@pytest.mark.parametrize("repo_id", ["datasets/me/name", "me/na me", "me/-name", "me/a--b", "", "me/name.git"])
def test_a_wrong_name_is_refused_before_anything_is_asked(hub, dataset, repo_id):
    with pytest.raises(InputError, match="not a valid repository name"):
        push_to_hub(dataset, repo_id)
    assert not hub.requests


def test_without_a_usable_token_or_offline_nothing_is_asked(hub, dataset, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no token for the Hub: set HF_TOKEN"):
        push_to_hub(dataset, "me/answers")
    monkeypatch.setenv("HF_OIDC_RESOURCE", "me/answers")
    monkeypatch.delenv("HF_OIDC_ID_TOKEN", raising=False)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    with pytest.raises(InputError, match="no token for the Hub: HF_OIDC_RESOURCE is set but"):
        push_to_hub(dataset, "me/answers")
    monkeypatch.delenv("HF_OIDC_RESOURCE")
    monkeypatch.setenv("HF_TOKEN", "hf_copied\x07badly")
    with pytest.raises(InputError, match="an invalid character") as error:
        push_to_hub(dataset, "me/answers")
    assert "copied" not in str(error.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(dataset, "me/answers")
    assert not hub.requests


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (401, InputError, "me/answers: the Hub rejects the token"),
        (403, InputError, "me/answers: the Hub refuses: no, whatever Bearer … may be"),
        (400, InputError, "me/answers: the Hub refuses"),
        (412, RemoteError, "me/answers: the push failed; try again"),
        (429, RemoteError, "me/answers: the push failed; try again"),
        (500, RemoteError, "me/answers: the push failed; try again"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(hub, dataset, failure, kind, message):
    hub.failure = failure
    with pytest.raises(kind, match=message) as error:
        push_to_hub(dataset, "me/answers")
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
    assert hub.requests[0][2] == f"Bearer {TOKEN}"
    assert not sent(hub)


def test_another_owners_name(hub, dataset):
    with pytest.raises(InputError, match="others/answers: the Hub refuses: You don't have the rights to create"):
        push_to_hub(dataset, "others/answers")
    assert not sent(hub)


def test_an_upload_that_breaks_off_commits_nothing_and_names_the_file(hub, dataset, monkeypatch):
    answer = hub.answer
    monkeypatch.setattr(hub, "answer", lambda method, *rest: (403, {}) if method == "PUT" else answer(method, *rest))
    with pytest.raises(InputError, match=r"Error while uploading '.*\.parquet' to the Hub\. status 403$"):
        push_to_hub(dataset, "me/answers")
    assert not sent(hub)


def test_a_card_that_the_hub_does_not_take(hub, student):
    card = student / "README.md"
    card.write_text(card.read_text().replace("library_name:", "base_model: /home/me/model\nlibrary_name:"))
    with pytest.raises(InputError, match=r'me/student: the Hub refuses: Invalid metadata in README.md. - "base_model" with'):
        push_to_hub(student, "me/student")
    assert not sent(hub)


def test_no_hub_at_the_address(hub, dataset):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(RemoteError, match=r"me/answers: the push failed; try again.*refused") as error:
        push_to_hub(dataset, "me/answers")
    assert "\n" not in str(error.value)


def test_the_command(hub, dataset, tmp_path):
    switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {**switches, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
    plan = run_cli("push", dataset, "me/answers", "--dry-run", **{**environment, "HF_HUB_OFFLINE": "1"})
    assert plan.returncode == 0, plan.stderr
    lines = [line.split() for line in plan.stdout.splitlines()]
    shards = [entry["file"] for entry in read_manifest(dataset)["shards"]]
    names = [*shards, "dataset.json", "README.md", "run.json"]
    assert {name: int(size.replace(",", "")) for _, size, name in lines[:-1]} == {
        name: (dataset / name).stat().st_size for name in names
    }
    total = sum((dataset / name).stat().st_size for name in names)
    assert f"would upload 6 files, {total:,} bytes, to the dataset repository me/answers, branch main" in plan.stdout
    assert not hub.requests

    done = run_cli("push", dataset, "me/answers", "--private", "--revision", "next", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == [
        "push",
        f"{hub.url}/datasets/me/answers/commit/{hub.sha('datasets/me/answers')}",
    ]
    assert done.stderr == ""
    assert hub.private == {"datasets/me/answers": True}
    assert "dataset.json" in hub.branches["datasets/me/answers"]["next"]

    assert {authorization for method, _, authorization in hub.requests if method != "PUT"} == {f"Bearer {TOKEN}"}
    assert {authorization for method, _, authorization in hub.requests if method == "PUT"} == {None}  # signed addresses

    results = [plan, done]
    for change, status in (
        ({"HF_HUB_OFFLINE": "1"}, 2),
        ({"HF_TOKEN": f"{TOKEN}, mistyped"}, 2),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 1),
    ):
        failed = run_cli("push", dataset, "me/answers", **{**environment, **change})
        assert failed.returncode == status, failed.stderr
        assert len(failed.stderr.splitlines()) == 1, failed.stderr
        results.append(failed)
    assert hub.requests[-1][2] == f"Bearer {TOKEN}, mistyped"
    assert not [result for result in results if TOKEN in result.stdout + result.stderr]
