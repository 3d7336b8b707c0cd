"""The scripts of scheduled jobs, as text; tests/integration/test_slurm.py runs them."""

import http.server
import json
import shlex
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from llmdistill import jobs
from llmdistill.config import load_experiment
from llmdistill.errors import InputError, RemoteError
from llmdistill.jobs.commands import scheduled
from llmdistill.jobs.ray import resources
from llmdistill.workflow.status import how_far
from tests.conftest import run_cli
from tests.doubles import double

STEPS = "[{evolve: {templates: [x.yaml], rounds: 2}}, {novelty: }, {evolve: {templates: [x.yaml]}}]"


def scripts(file, slurm, **more):
    experiment = load_experiment(file, [("jobs.slurm", slurm), *more.items()])
    settings = experiment.jobs.slurm
    found = jobs.backend_of("slurm").render(experiment, settings, scheduled(experiment, settings))
    for text in found.values():
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    return found


def rendered(file, stage, slurm, **more):
    return scripts(file, slurm, **more)[f"{stage}.sh"]


def test_what_a_stage_asks_for_is_in_its_script(experiment_file, tmp_path):
    slurm = (
        "{partition: gpu, account: me, gpus: 4, time: '08:00:00', workers: 3, options: {qos: high}, "
        "environment: [module load cuda], stages: {train: {nodes: 2, gpus: 8, time: 1-00:00:00}}}"
    )
    text = rendered(experiment_file, "generate", slurm)
    for option in ("partition=gpu", "account=me", "gpus-per-node=4", "time=08:00:00", "array=0-2", "qos=high", "nodes=1"):
        assert f"\n#SBATCH --{option}\n" in text
    assert "\nmodule load cuda\n" in text
    assert f'\nllmdistill generate {tmp_path}/run/jobs/generate.yaml --shards "$((SLURM_ARRAY_TASK_ID + 1))/3" &\n' in text
    assert "gpus" not in rendered(experiment_file, "curate", slurm)
    assert "array" not in rendered(experiment_file, "eval", slurm).lower().split("near_the_limit")[0]
    train = rendered(experiment_file, "train", slurm)
    for option in ("partition=gpu", "gpus-per-node=8", "time=1-00:00:00", "nodes=2"):
        assert f"\n#SBATCH --{option}\n" in train


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "",
            "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id 7 --rdzv-backend c10d --rdzv-endpoint first:29500 -m llmdistill",
        ),
        (
            ", accelerate: configs/accelerate/fsdp2.yaml",
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_machines 2 --num_processes 16 --machine_rank 1 "
            "--main_process_ip first --main_process_port 29500 -m llmdistill",
        ),
    ],
)
def test_training_on_two_nodes_starts_a_launcher_on_each(experiment_file, tmp_path, more, words):
    """What a node would run, with srun, scontrol and the launchers replaced by doubles that say what they were told."""
    text = rendered(experiment_file, "train", "{gpus: 8, nodes: 2" + more + "}", output="a 'b' $c")
    doubles = tmp_path / "bin"
    doubles.mkdir()
    for name, body in {
        "srun": 'while [ "$1" != bash ]; do shift; done; exec "$@"',
        "scontrol": "printf 'first\\nsecond\\n'",
        "torchrun": 'printf "%s|" torchrun "$@"',
        "accelerate": 'printf "%s|" accelerate "$@"',
    }.items():
        (doubles / name).write_text(f"#!/bin/bash\n{body}\n")
        (doubles / name).chmod(0o755)
    environment = {
        "PATH": f"{doubles}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=environment)
    assert done.stdout.strip("|").split("|") == [*words.split(), "train", "a 'b' $c/jobs/train.yaml"]
    assert done.returncode == 0


HOSTILE = "x; touch hacked; $(touch hacked) `touch hacked` 'q' \"d\" %j#c"


def test_hostile_names_stay_names(experiment_file, tmp_path):
    """The words of the command are those that are meant; nothing else is run."""
    text = rendered(experiment_file, "curate", "{}", output=HOSTILE)
    assert shlex.split(next(line for line in text.splitlines() if line.startswith("llmdistill")))[:-1] == [
        "llmdistill", "curate", f"{HOSTILE}/jobs/curate.yaml",
    ]  # fmt: skip
    (tmp_path / "llmdistill").write_text("#!/bin/bash\n")
    (tmp_path / "llmdistill").chmod(0o755)
    subprocess.run(["bash"], input=text, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path, check=True)
    assert not (tmp_path / "hacked").exists()
    assert "\n#SBATCH --job-name=x_touch_hacked_" in text
    assert '"d\\" %%j#c/jobs/curate-%j.log"\n' in text


@pytest.mark.parametrize("name", ["a\ntouch hacked", "a\rb", "a\\b"])
def test_names_that_slurm_does_not_take_are_refused(experiment_file, name):
    with pytest.raises(InputError, match=r"output: .* (has a backslash|must not be empty or contain)"):
        rendered(experiment_file, "curate", "{}", output=json.dumps(name))


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ("{partition: 'a b'}", "jobs.slurm.partition"),
        ("{options: {qos: '$(x)'}}", "has characters that are not allowed in scheduler options"),
        ("{stages: {generate: {nodes: 2}}}", "generate runs on one node; set workers to use more"),
        (
            "{stages: {trian: {nodes: 2}}}",
            r"experiment.yaml: jobs.slurm.stages.trian: 'trian' is not a stage; stages are prompts, gen",
        ),
        ("{stages: {train: {gpu: 2}}}", r"jobs.slurm.stages.train.gpu; did you mean jobs.slurm.stages.STAGE.gpus\\?"),
    ],
)
def test_bad_input_is_named(experiment_file, slurm, message):
    with pytest.raises(InputError, match=message):
        load_experiment(experiment_file, [("jobs.slurm", slurm)])


def test_a_dry_run_prints_the_scripts_and_writes_nothing(experiment_file, tmp_path):
    done = run_cli("submit", experiment_file, "--jobs.slurm", "{partition: gpu}", "--dry-run", PATH="/nothing")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 6
    assert not (tmp_path / "run").exists()
    without = run_cli("submit", experiment_file)
    missing = "the key jobs.slurm or jobs.ray or jobs.skypilot or jobs.kubernetes is missing: `submit` needs a scheduler"
    assert (without.returncode, without.stderr) == (2, f"{experiment_file}: {missing}\n")
    nowhere = run_cli("submit", experiment_file, "--jobs.slurm", "{partition: gpu}", PATH="/nothing")
    assert (nowhere.returncode, nowhere.stderr) == (
        2, "squeue not found: this machine cannot submit jobs to Slurm\n"
    ) or nowhere.stderr.startswith("sbatch not found")  # fmt: skip
    status = run_cli("status", tmp_path)
    assert status.returncode == 2
    assert "no job was submitted" in status.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--prompts.source", "nope.jsonl"), "nope.jsonl: no such file (prompts.source)"),
        (("--train.args.learning_rat", "1"), "did you mean train.args.learning_rate"),
        (("--eval.tasks", "[nope.yaml]"), "nope.yaml: no such file"),
        (("--curate", "[{json_schema: {file: nope.json}}]"), "nope.json: no such file"),
        (("--jobs.slurm.accelerate", "nope.yaml"), "nope.yaml: no such file (accelerate)"),
        (("--student.prune.layers", "99"), "student.prune.layers is 99, but the teacher has 4 layers"),
        (("--eval.held_out", "0.001"), "eval.held_out: 0.001 of 24 conversations leaves 24 for training, 0 held out"),
    ],
)
def test_what_the_jobs_would_fail_of_is_said_before_they_are_submitted(experiment_file, tmp_path, wrong, message):
    for dry in ((), ("--dry-run",)):
        done = run_cli("submit", experiment_file, "--jobs.slurm.partition", "gpu", *wrong, *dry)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("workers", "rows_per_shard", "idle"), [(4, 6, False), (5, 6, True), (5, 5, False)])
def test_workers_that_would_have_no_shard_are_warned_of(experiment_file, workers, rows_per_shard, idle):
    """The experiment has 24 prompts, one answer each."""
    sizes = ("--jobs.slurm.workers", str(workers), "--generate.rows_per_shard", str(rows_per_shard))
    done = run_cli("submit", experiment_file, *sizes, "--dry-run", PATH="/nothing")
    assert done.returncode == 0, done.stderr
    assert ("generate has 4 shards for 5 workers" in done.stdout) == idle
    assert ("will be idle" in done.stdout) == idle


def test_retries_are_counted_by_failures_and_not_by_restarts(experiment_file, tmp_path):
    """Slurm counts preemptions as restarts, too."""
    script = rendered(experiment_file, "generate", "{partition: gpu, retries: 2}")
    (tmp_path / "run/jobs").mkdir(parents=True)
    for name, body in (("llmdistill", "exit 1"), ("scontrol", "true"), ("sleep", "true")):
        double(tmp_path, name, body)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "9"}
    tries = [subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True) for _ in range(3)]
    assert [done.returncode for done in tries] == [1, 1, 1]
    assert ["queued again" in done.stdout for done in tries] == [True, True, False]


def test_srun_gets_the_processors_of_the_job(experiment_file, tmp_path):
    """Since Slurm 22.05 it takes them from nowhere else."""
    words = tmp_path / "words"
    double(tmp_path, "srun", f'echo "$SRUN_CPUS_PER_TASK" > "{words}"')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    for stage in ("generate", "train"):
        text = rendered(experiment_file, stage, "{cpus: 12, gpus: 8, container: team/llmdistill, environment: [set -u]}")
        subprocess.run(["bash"], input=text, text=True, env=environment, check=True)
        assert words.read_text() == "12\n"
    assert "SRUN" not in rendered(experiment_file, "train", "{gpus: 8}")


def test_a_ray_that_cannot_be_reached_is_no_wrong_input():
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(RemoteError, match=r"jobs\.ray\.address: no Ray cluster accepts jobs at http://127\.0\.0\.1:9"):
        jobs.backend_of("ray").states([{"stage": "run", "job": "x", "address": "http://127.0.0.1:9"}])


def test_a_ray_that_goes_away_is_no_crash():
    """The cluster answers the first question, which is its version, and no other."""
    pytest.importorskip("ray", reason="Ray is not installed")

    class Leaving(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/api/version":
                return self.connection.close()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"version": "4", "ray_version": "2", "ray_commit": ""}')

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Leaving) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RemoteError, match=r"Ray: .*Connection aborted"):
            jobs.backend_of("ray").states([{"stage": "run", "job": "x", "address": f"http://127.0.0.1:{server.server_port}"}])
        server.shutdown()


def test_a_scheduler_that_cannot_be_reached_is_no_wrong_input(experiment_file, tmp_path):
    said = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    for error, status in ((said, 1), ("sbatch: error: invalid partition specified: gpu", 2)):
        double(tmp_path, "sbatch", f"echo '{error}' >&2; exit 1")
        double(tmp_path, "squeue", "true")
        done = run_cli("submit", experiment_file, "--jobs.slurm", "{partition: gpu}", PATH=f"{tmp_path}:/usr/bin:/bin")
        assert (done.returncode, done.stderr) == (status, f"sbatch: {error}\n")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["node-8gpu", "slurm-16-nodes"])
def test_the_shipped_configurations_of_clusters_show_what_they_would_do(name):
    for command in ("run", "submit"):
        done = run_cli(command, f"configs/{name}.yaml", "--dry-run", PATH="/nothing")
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 5
    (train,) = [line for line in done.stdout.splitlines() if f"train runs/{name}/jobs/train.yaml" in line]
    nodes, launcher = {"node-8gpu": (1, "torchrun"), "slurm-16-nodes": (4, "accelerate launch")}[name]
    assert launcher in train
    assert f"#SBATCH --nodes={nodes}\n" in done.stdout


def test_what_needs_no_model_gets_no_gpu_unless_its_entry_says_so(experiment_file, tmp_path):
    entry = "{gpus: 8, stages: {curate: {cpus: 4}}}"
    assert "gpus" not in rendered(experiment_file, "curate", entry)
    assert "gpus-per-node=1\n" in rendered(experiment_file, "curate", entry.replace("cpus: 4", "gpus: 1"))


JUDGE = ("eval.win_rate", "{judge: {model: some/judge, tensor_parallel_size: 4}}")
SPLIT, SPEED = ("teacher.tensor_parallel_size", "2"), ("eval.speed", "vllm")


@pytest.mark.parametrize(
    ("changes", "generating", "evaluating"),
    [
        ([("teacher.engine", "vllm"), ("teacher.dtype", "auto"), SPLIT], 2, 1),
        ([("teacher.engine", "vllm"), ("teacher.dtype", "auto"), SPLIT, SPEED], 2, 2),
        ([SPLIT, SPEED], 1, 2),  # transformers has it on one, vLLM measures it as it is served
        ([JUDGE], 1, 4),
        ([], 1, 1),
    ],
)
def test_a_stage_gets_the_gpus_that_its_engines_are_split_over(experiment_file, changes, generating, evaluating):
    experiment = load_experiment(experiment_file, [("jobs.ray", "{}"), *changes])
    settings = experiment.jobs.ray
    gpus = {stage.name: resources(settings, stage)["num_gpus"] for stage in scheduled(experiment, settings)}
    want = {"generate": generating, "curate": 0, "prune": 1, "train": 1, "eval": evaluating, "report": 0}
    assert gpus == want


KUBERNETES = "image: x, kubectl_image: y, claim: z, "


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("slurm", "{gpus: 2, stages: {eval: {gpus: 1}}}", "stages.eval.gpus: 1"),
        ("slurm", "{gpus: 2, stages: {eval: {cpus: 1}}}", None),
        ("slurm", "{gpus: 1, stages: {eval: {cpus: 1}}}", "gpus: 1"),
        ("ray", "{stages: {eval: {gpus: 1}}}", "stages.eval.gpus: 1"),
        ("ray", "{gpus: 0}", None),
        ("ray", "{}", None),
        ("skypilot", "{bucket: s3://x, accelerator: H100, gpus: 1}", "gpus: 1"),
        ("kubernetes", f"{{{KUBERNETES} gpus: 1}}", "gpus: 1"),
        ("kubernetes", f"{{{KUBERNETES} gpus: 8}}", None),
    ],
)
def test_too_few_gpus_for_an_engine_are_refused_before_anything_is_submitted(experiment_file, name, settings, key):
    experiment = load_experiment(experiment_file, [SPLIT, SPEED, (f"jobs.{name}", settings)])
    if key is None:
        return jobs.submit(experiment, dry_run=True)
    with pytest.raises(InputError, match=rf"^jobs\.{name}\.{key}, but eval runs a model that vLLM splits over 2 GPUs"):
        jobs.submit(experiment, dry_run=True)


def test_status_says_how_far_a_running_job_is(tmp_path):
    """Two elements of an array run, one waits; of the two one has said how far it is."""
    output, there = tmp_path / "run", tmp_path / "bin"
    for directory in (there, output / "jobs", output / ".progress"):
        directory.mkdir(parents=True)
    submitted = [{"stage": "generate", "job": "7"}, {"stage": "curate", "job": "8"}]
    (output / "jobs/jobs.json").write_text(json.dumps({"backend": "slurm", "jobs": submitted}))
    look = {"stage": "generate", "step": "generate", "done": 50, "total": 200, "tokens": 9, "tokens_per_s": 300.0}
    look |= {"seconds_left": 90.0, "time": time.time(), "host": "node1", "pid": 1, "share": "1/3"}
    (output / ".progress/generate.node1-1.json").write_text(json.dumps(look))
    double(there, "squeue", "echo 9 7 RUNNING; echo 10 7 RUNNING; echo 7 7 PENDING; echo 8 8 PENDING")
    said = run_cli("status", output, PATH=f"{there}:/usr/bin:/bin")
    assert said.stdout.splitlines() == [
        "generate  job 7: 1 pending, 2 running; running 50/200 · 300 tok/s · 1:30 left",
        "curate    job 8: 1 pending; not done",
    ], said.stderr


def test_a_worker_that_is_gone_does_not_count_as_one_that_runs(tmp_path):
    """It was killed on another machine, where nobody sees that its process is gone."""
    (tmp_path / ".progress").mkdir()
    look = {
        "stage": "generate",
        "step": "generate",
        "done": 5,
        "total": 20,
        "tokens": 9,
        "tokens_per_s": 30.0,
        "seconds_left": 90.0,
    }
    for number, silent in enumerate((5, 500)):
        told = look | {"time": time.time() - silent, "host": f"node{number}", "pid": 1, "share": f"{number + 1}/2"}
        (tmp_path / f".progress/generate.node{number}-1.json").write_text(json.dumps(told))
    assert how_far(tmp_path, "generate") == "running 10/40 · 30 tok/s · 1:30 left · 1 more without news for 8:15"


def test_status_of_prompts_that_were_started_again_is_that_of_the_stage(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/run.json").write_text('{"stage": "prompts", "status": "done"}')
    assert [how_far(tmp_path, name) for name in ("prompts", "prompts-2", "round-1-train")] == ["done", "done", "not done"]


def test_status_of_a_job_that_is_the_whole_run_shows_its_stages(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/run.json").write_text('{"stage": "generate", "status": "done"}')
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/jobs.json").write_text('{"backend": "double", "jobs": [{"stage": "run", "job": "5"}]}')
    backend = SimpleNamespace(states=lambda jobs: [["RUNNING"]], same_files=True)
    monkeypatch.setattr(jobs, "backend_of", lambda name: backend)
    jobs.status(tmp_path)
    assert capsys.readouterr().out == "run       job 5: 1 running\ngenerate  done\n"


@pytest.mark.parametrize("name", jobs.BACKENDS)
def test_every_key_of_the_section_has_a_backend(name):
    backend = jobs.backend_of(name)
    assert backend.over
    assert callable(backend.render)


def test_a_job_reads_the_whole_experiment_in_a_file_beside_its_script(experiment_file, tmp_path):
    """Without `jobs`, in whose lines of shell a secret may stand; with a round's changes in the place of the given values."""
    there = tmp_path / "bin"
    there.mkdir()
    double(there, "sbatch", "echo 7")
    slurm = "{partition: gpu, environment: [export HF_TOKEN=hf_secret]}"
    changes = ["--rounds", "{n: 1, loss: reverse_kl, args: {learning_rate: 1e-5}}", "--train.args.run_name", "'1e5'"]
    done = run_cli("submit", experiment_file, *changes, "--jobs.slurm", slurm, PATH=f"{there}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    files = {file.stem: file for file in (tmp_path / "run/jobs").glob("*.yaml")}
    assert set(files) >= {"generate", "train", "round-1-train"}
    assert set(files) == {file.stem for file in (tmp_path / "run/jobs").glob("*.sh")}
    assert not [name for name, file in files.items() if "secret" in file.read_text()]
    given, asked = load_experiment(experiment_file), load_experiment(files["generate"])
    assert asked.teacher == given.teacher
    assert asked.rounds.loss == "reverse_kl"
    assert asked.train.args == {**given.train.args, "run_name": "1e5"}
    first, later = load_experiment(files["train"]), load_experiment(files["round-1-train"])
    assert first.directory("student") == tmp_path / "run/student"
    assert (later.output, later.seed, later.train.loss) == (f"{tmp_path}/run/rounds/1", given.seed + 1, "reverse_kl")
    assert (later.student.model, later.student.prune) == (f"{tmp_path}/run/student", None)
    assert later.train.args == {**given.train.args, "run_name": "1e5", "learning_rate": 1e-5}
    assert load_experiment(files["eval"]).directory("student") == tmp_path / "run/rounds/1/student"


def test_workers_share_prompts_and_are_started_again_for_each_step(experiment_file, tmp_path):
    """Two rounds and one: three times the teacher is asked what follows from all of its answers before."""
    found = scripts(experiment_file, "{workers: 3}", **{"prompts.steps": STEPS})
    assert list(found)[:4] == ["prompts.sh", "prompts-2.sh", "prompts-3.sh", "generate.sh"]
    for name in ("prompts", "prompts-2", "prompts-3"):
        text = found[f"{name}.sh"]
        assert "\n#SBATCH --array=0-2\n" in text
        assert f'\nllmdistill prompts {tmp_path}/run/jobs/{name}.yaml --shards "$((SLURM_ARRAY_TASK_ID + 1))/3" &\n' in text
    alone = scripts(experiment_file, "{}", **{"prompts.steps": STEPS})
    assert list(alone)[:2] == ["prompts.sh", "generate.sh"]
    assert "--shards" not in alone["prompts.sh"]
