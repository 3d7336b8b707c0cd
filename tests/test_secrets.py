"""No secret of the environment or the configuration is in anything that leaves a process: messages, errors, logs, files."""

import http.server
import threading

import pytest

from tests.conftest import run_cli

NAMES = (
    "HF_TOKEN", "WANDB_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GITHUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "AZURE_CLIENT_SECRET", "REGISTRY_AUTH", "GOOGLE_CREDENTIALS",
)  # fmt: skip
PLANTED = {name: f"planted-{number}-of-{name.lower()}" for number, name in enumerate(NAMES)}


def leaks(text: str) -> list[str]:
    return [name for name, value in PLANTED.items() if value in text]


def test_a_run_writes_no_secret(experiment_file, tmp_path):
    said = ""
    for words in (
        ["run", experiment_file, "--dry-run"],
        ["generate", experiment_file, "--watch.log", "json"],
        ["curate", experiment_file],
    ):
        done = run_cli(*words, **PLANTED)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert not leaks(said)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert not {file.name: found for file in files if (found := leaks(file.read_bytes().decode(errors="replace")))}


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that repeats the request's header in its error, as some do."""

    def do_GET(self):
        body = f'{{"error": {{"message": "no such key: {self.headers["Authorization"]}"}}}}'.encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


def test_an_error_of_an_endpoint_shows_no_key(experiment_file, tiny, tmp_path):
    pytest.importorskip("openai", reason="the extra `api` is not installed")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        teacher = f"{{model: large, engine: openai, url: '{url}', tokenizer: {tiny}, licence: mit}}"
        own = ["--student", f"{{model: {tiny}}}"]
        done = run_cli("generate", experiment_file, "--teacher", teacher, *own, **PLANTED)
        server.shutdown()
    assert done.returncode == 2
    assert "no such key: Bearer ***" in done.stderr
    assert not leaks(done.stdout + done.stderr)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and leaks(file.read_bytes().decode(errors="replace"))]


@pytest.mark.parametrize("ending", ["", "\n"])  # a secret that is mounted as a file ends in a line break
def test_an_error_of_a_server_shows_no_key(experiment_file, ending):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        secrets = {**PLANTED, "VLLM_API_KEY": PLANTED["VLLM_API_KEY"] + ending}
        done = run_cli("generate", experiment_file, "--teacher.engine", "server", "--teacher.url", url, **secrets)
        server.shutdown()
    assert done.returncode == 2
    assert "no such key: Bearer ***" in done.stderr
    assert not leaks(done.stdout + done.stderr)


def test_a_traceback_shows_no_key(experiment_file, tmp_path):
    """Whatever a library puts into its error."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "import llmdistill.workflow.pipeline as pipeline\n"
        "def stages(experiment):\n"
        "    raise RuntimeError('cannot log in with ' + os.environ['WANDB_API_KEY'])\n"
        "pipeline.stages = stages\n"
    )
    done = run_cli("run", experiment_file, PYTHONPATH=str(tmp_path), **PLANTED)
    assert done.returncode == 1
    assert "RuntimeError: cannot log in with ***" in done.stderr
    assert "Traceback" in done.stderr
    assert not leaks(done.stderr)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("teacher.url", "http://me:hunter2secret@node:8000", r"teacher.url: must not contain a user, a key or options"),
        ("teacher.url", "http://node:8000/?api_key=hunter2secret", r"teacher.url: must not contain a user, a key or options"),
        ("teacher.url", "not a hunter2secret", r"teacher.url: must be an address such as"),
        ("teacher.engine_args", "{hf_token: hunter2secret}", "hf_token would be written to run.json"),
        ("teacher.engine_args", "{a: {b: [{api-key: hunter2secret}]}}", "api-key would be written to run.json"),
        ("teacher.engine_args", "{a: [--api-key, hunter2secret]}", "--api-key would be written to run.json"),
        ("teacher.engine_args", "{a: [--token=hunter2secret]}", "--token would be written to run.json"),
        ("teacher.engine_args", "{a: ['redis://:hunter2secret@cache']}", "an address with a user or a password"),
        ("train.args", "{hub_token: hunter2secret}", "hub_token would be written to run.json"),
        ("store", "s3://me:hunter2secret@bucket/x", "must not contain a user"),
    ],
)
def test_secrets_in_the_configuration_are_refused_without_being_repeated(experiment_file, key, value, said):
    engine = ["--teacher.engine", "server"] if key == "teacher.url" else []
    done = run_cli("generate", experiment_file, f"--{key}", value, *engine)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "hunter2secret" not in done.stdout + done.stderr
