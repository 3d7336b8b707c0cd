"""Jobs of Kubernetes: against its own schemas, word by word as a container gets them, and handed on to a double of kubectl."""

import json
import re
import subprocess

import pytest
import yaml

from llmdistill.config import load_experiment
from llmdistill.errors import InputError
from llmdistill.jobs import backend_of
from llmdistill.jobs.commands import run_name, scheduled
from llmdistill.runs.files import read_json
from tests.conftest import ROOT, run_cli
from tests.doubles import double
from tests.jobs.test_jobs import HOSTILE

SETTINGS = (
    "{image: team/llmdistill, kubectl_image: tools/kubectl, claim: runs, namespace: ml, secrets: [hf-token], workers: 16, "
    "gpus: 1, memory: 64G, time: '1-02:03:04', pod: {nodeSelector: {gpu: a100}}, "
    "stages: {train: {gpus: 8, time: '00:10:00'}, curate: {cpus: 4}}}"
)


def objects(file, settings=SETTINGS, **more):
    experiment = load_experiment(file, [("jobs.kubernetes", settings), *more.items()])
    settings = experiment.jobs.kubernetes
    (text,) = backend_of("kubernetes").render(experiment, settings, scheduled(experiment, settings)).values()
    return list(yaml.safe_load_all(text))


def jobs(found):
    """The Jobs by what comes after the run in their names."""
    return {each["metadata"]["name"].rsplit("-", 1)[1]: each for each in found if each["kind"] == "Job"}


def configuration(found, name, directory):
    """The experiment that a pod reads in a file below the mount of the ConfigMap."""
    (configs,) = (each for each in found if each["kind"] == "ConfigMap")
    (directory / name).write_text(configs["data"][name])
    return load_experiment(directory / name)


def container(job):
    (only,) = job["spec"]["template"]["spec"]["containers"]
    return only


def expanded(word, variables):
    """What Kubernetes makes of a word of a command: $$ is $, $(NAME) is the variable, and stays where there is none."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]), word)


def run_container(job, directory, **variables):
    """What a container would run, with the commands in it replaced by doubles: their words."""
    for name in ("llmdistill", "torchrun", "accelerate"):
        double(directory, name, f'printf "%s\\n" {name} "$@"')
    command = [expanded(word, variables) for word in container(job)["command"]]
    environment = {"PATH": f"{directory}:/usr/bin:/bin", **variables}
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, check=True)
    assert not (directory / "hacked").exists()
    return done.stdout.splitlines()


def test_every_object_is_one_of_kubernetes(experiment_file):
    schemas = ROOT / ".schemas"
    if not (schemas / "kubernetes_validate").is_dir():
        pytest.skip("the schemas of Kubernetes are not there: `make .schemas`")
    from tests.doubles import imported_from

    validate = imported_from(schemas, "kubernetes_validate").validate
    found = objects(experiment_file)
    for each in found:
        for version in ("1.33", "1.37"):
            validate(each, version, strict=True)
    assert sorted(each["kind"] for each in found) == ["ConfigMap"] + ["Job"] * 7 + ["Role", "RoleBinding", "ServiceAccount"]
    found[1]["spec"]["template"]["spec"]["restartPolicies"] = "Never"
    with pytest.raises(Exception, match="restartPolicies"):
        validate(found[1], "1.37", strict=True)


def test_a_stage_is_a_job_with_what_it_asks_for(experiment_file):
    found = jobs(objects(experiment_file))
    assert list(found) == ["generate", "curate", "prune", "train", "eval", "report", "order"]
    generate, train = found["generate"]["spec"], found["train"]["spec"]
    assert [generate[key] for key in ("completionMode", "completions", "parallelism")] == ["Indexed", 16, 16]
    assert (generate["backoffLimitPerIndex"], "backoffLimit" in generate, train["backoffLimit"]) == (2, False, 2)
    assert generate["activeDeadlineSeconds"] == ((24 + 2) * 60 + 3) * 60 + 4
    assert train["activeDeadlineSeconds"] == 600
    assert container(found["generate"])["resources"] == {"limits": {"nvidia.com/gpu": "1", "memory": "64G"}}
    assert container(found["train"])["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container(found["curate"])["resources"] == {"limits": {"cpu": "4", "memory": "64G"}}
    for name, job in found.items():
        pod = job["spec"]["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        assert job["metadata"]["namespace"] == "ml"
        if name == "order":
            continue
        assert pod["terminationGracePeriodSeconds"] == 120
        assert pod["nodeSelector"] == {"gpu": "a100"}
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
        (where,) = (mount["mountPath"] for mount in container(job)["volumeMounts"] if mount["name"] == "configs")
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "configs")
        assert (where, volume["configMap"]["name"]) == (
            "/etc/llmdistill",
            job["metadata"]["labels"]["llmdistill/run"] + "-configs",
        )
        assert container(job)["envFrom"] == [{"secretRef": {"name": "hf-token"}}]
        assert job["spec"].get("suspend", False) == (name != "generate")
        wrong, stopped = (rule for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule)
        assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", [2])
        assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [143])


def test_hostile_names_stay_names(experiment_file, tmp_path):
    """A name with quotes, with what a shell would run, and with what Kubernetes would put a variable in the place of."""
    name = f"{HOSTILE} $(HF_TOKEN) $$HOME $(JOB_COMPLETION_INDEX)"
    made = objects(experiment_file, output=name)
    found, secret = jobs(made), {"HF_TOKEN": "secret", "JOB_COMPLETION_INDEX": "3"}

    def words(stage):
        assert configuration(made, f"{stage}.yaml", tmp_path).output == f"/outputs/{name}"
        return ["llmdistill", stage, f"/etc/llmdistill/{stage}.yaml"]

    assert run_container(found["generate"], tmp_path, **secret) == [*words("generate"), "--shards", "4/16"]
    assert run_container(found["curate"], tmp_path, **secret) == [*words("generate"), *words("curate")]
    assert run_container(found["eval"], tmp_path, **secret) == words("eval")
    train = run_container(found["train"], tmp_path, **secret)
    assert train == ["torchrun", "--standalone", "--nproc-per-node", "8", "-m", *words("train")]
    for each in found.values():
        assert re.fullmatch(r"[a-z0-9-]{1,63}", each["metadata"]["name"])


def test_rounds_stay_on_the_volume(experiment_file, tmp_path):
    """Their stages name each other's outputs, which are not where they were on this machine; each completes what it reads."""
    made = objects(experiment_file, rounds="{n: 1}", output="a b")
    found = {each["metadata"]["name"].split("-", 3)[3]: each for each in made if each["kind"] == "Job"}
    names = [f"round-1-{stage}" for stage in ("generate", "score", "curate", "train")]
    assert [name for name in found if name.startswith("round")] == names
    written, scored, _, trained = (f"/etc/llmdistill/{name}.yaml" for name in names)
    writes = ["llmdistill", "generate", written]
    assert run_container(found[names[0]], tmp_path, JOB_COMPLETION_INDEX="0") == [*writes, "--shards", "1/16"]
    assert run_container(found[names[1]], tmp_path, JOB_COMPLETION_INDEX="0") == [
        *writes, "llmdistill", "score", scored, "--shards", "1/16",
    ]  # fmt: skip
    assert run_container(found[names[3]], tmp_path)[-1] == trained
    generate, score, _, train = (configuration(made, f"{name}.yaml", tmp_path) for name in names)
    assert (generate.output, generate.targets.kind) == ("/outputs/a b/rounds/1/written", "none")
    assert generate.teacher.model == train.student.model == "/outputs/a b/student"
    assert score.score.source == "/outputs/a b/rounds/1/written/data"
    assert str(tmp_path / "run") not in yaml.dump([found[name] for name in found])


def test_workers_that_share_prompts_are_started_for_each_step(experiment_file, tmp_path):
    """One after the other, each time all of them; what they have left is completed before the prompts are answered."""
    made = objects(experiment_file, **{"prompts.steps": "[{ask: {template: x.yaml}}, {evolve: {templates: [x.yaml]}}]"})
    found = [each for each in made if each["kind"] == "Job"]
    assert [each["metadata"]["name"].split("-", 2)[2] for each in found[:4]] == ["prompts", "prompts-2", "generate", "curate"]
    assert [each["spec"].get("completions") for each in found[:4]] == [16, 16, 16, None]
    index = {"JOB_COMPLETION_INDEX": "0"}
    for job, name in zip(found, ("prompts", "prompts-2"), strict=False):
        words = ["llmdistill", "prompts", f"/etc/llmdistill/{name}.yaml", "--shards", "1/16"]
        assert run_container(job, tmp_path, **index) == words
    assert run_container(found[2], tmp_path, **index)[:3] == ["llmdistill", "prompts", "/etc/llmdistill/prompts-2.yaml"]


def run_order(job, directory, states):
    """Run what starts the stages, with a kubectl that answers with the states in turn."""
    double(directory, "sleep", "exit 0")
    answers = directory / "answers"
    answers.write_text("".join(f"{state}\n" for state in states))
    double(
        directory,
        "kubectl",
        f'echo "$1 $3" >> "{directory}/asked"; [ "$1" = patch ] || {{ head -n 1 "{answers}"; sed -i 1d "{answers}"; }}',
    )
    command = [expanded(word, {}) for word in container(job)["command"]]
    done = subprocess.run(command, env={"PATH": f"{directory}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=60)
    asked = [line.rsplit("-", 1) for line in (directory / "asked").read_text().splitlines()]
    return done, [(first.split()[0], stage) for first, stage in asked]


def test_a_stage_starts_when_the_one_before_it_is_complete(experiment_file, tmp_path):
    order = jobs(objects(experiment_file))["order"]
    done, asked = run_order(order, tmp_path, ["", "", *["SuccessCriteriaMet Complete"] * 2, "Suspended", *["Complete"] * 3])
    assert done.returncode == 0, done.stderr
    assert asked[:4] == [("get", "generate")] * 3 + [("patch", "curate")]
    assert [stage for verb, stage in asked if verb == "patch"] == ["curate", "prune", "train", "eval", "report"]


def test_nothing_starts_after_a_stage_that_failed(experiment_file, tmp_path):
    order = jobs(objects(experiment_file))["order"]
    done, asked = run_order(order, tmp_path, ["Complete", "FailureTarget Failed"])
    assert done.returncode == 2
    assert [stage for verb, stage in asked if verb == "patch"] == ["curate"]
    rules = order["spec"]["podFailurePolicy"]["rules"]
    assert {"action": "FailJob", "onExitCodes": {"containerName": "kubectl", "operator": "In", "values": [2]}} in rules


@pytest.mark.slow
def test_what_was_applied_before_the_server_went_away_is_removed(experiment_file, tmp_path):
    double(
        tmp_path,
        "kubectl",
        f'echo "$1" >> "{tmp_path}/asked"; [ "$1" != get ] || echo \'{{"items": []}}\'\n'
        '[ "$1" != apply ] || { echo "Unable to connect" >&2; exit 1; }',
    )
    arguments = ["--output", tmp_path / "run", "--jobs.kubernetes", SETTINGS]
    done = run_cli("submit", experiment_file, *arguments, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert (done.returncode, done.stderr) == (1, "kubectl: Unable to connect\n")
    assert (tmp_path / "asked").read_text().split() == ["get", "delete", "apply", "delete"]


@pytest.mark.slow
def test_kubectl_is_asked_and_understood(experiment_file, tmp_path):
    output = tmp_path / "my run"
    arguments = ["--output", output, "--jobs.kubernetes", SETTINGS]
    there = tmp_path / "bin"
    there.mkdir()
    double(there, "kubectl", f'echo "$@" >> "{tmp_path}/asked"; [ "$1" != get ] || cat "{tmp_path}/jobs.json"')
    path = {"PATH": f"{there}:/usr/bin:/bin"}
    (tmp_path / "jobs.json").write_text('{"items": []}')
    submitted = run_cli("submit", experiment_file, *arguments, **path)
    assert submitted.returncode == 0, submitted.stderr
    _, deleted, applied = (tmp_path / "asked").read_text().splitlines()
    run = read_json(output / "jobs/jobs.json")["jobs"][0]["run"]
    assert re.fullmatch(r"my-run-[0-9a-f]{6}", run)
    where = f"--namespace ml --selector llmdistill/run={run}"
    assert deleted == f"delete job,configmap,rolebinding,role,serviceaccount {where} --ignore-not-found"
    assert applied == f"apply -f {output}/jobs/kubernetes.yaml"

    def items(**states):
        found = [{"metadata": {"name": f"{run}-{stage}"}, "status": status} for stage, status in states.items()]
        (tmp_path / "jobs.json").write_text(json.dumps({"items": found}))

    complete, suspended = ({"conditions": [{"type": kind, "status": "True"}]} for kind in ("Complete", "Suspended"))
    items(generate={"active": 13, "ready": 12, "succeeded": 3, "failed": 1}, curate=suspended, order={"active": 1})
    said = run_cli("status", output, **path)
    assert said.returncode == 0, said.stderr
    assert f"generate  job {run}-generate: 3 complete, 1 pending, 12 running\n" in said.stdout
    assert f"curate    job {run}-curate: 1 suspended\n" in said.stdout
    assert f"train     job {run}-train: unknown to the scheduler\n" in said.stdout
    again = run_cli("submit", experiment_file, *arguments, **path)
    assert (again.returncode, "generate, curate, order of an earlier" in again.stderr) == (2, True)
    cancelled = run_cli("cancel", output, **path)
    assert cancelled.stdout.startswith(f"cancel    generate ({run}-generate), curate")
    assert (tmp_path / "asked").read_text().splitlines()[-1] == deleted
    items(generate=complete, order=complete)
    assert "nothing to cancel, all jobs have ended" in run_cli("cancel", output, **path).stdout


def test_jobs_of_another_submission_are_not_removed_while_they_run(experiment_file, tmp_path, monkeypatch):
    """From another machine or directory, whose `jobs.json` is not here."""
    experiment = load_experiment(experiment_file, [("output", "run"), ("jobs.kubernetes", SETTINGS)])
    settings, backend = experiment.jobs.kubernetes, backend_of("kubernetes")
    stages = scheduled(experiment, settings)

    def submit(**states):
        (tmp_path / "asked").write_text("")
        found = [{"metadata": {"name": f"{run_name('run')}-{stage}"}, "status": status} for stage, status in states.items()]
        (tmp_path / "jobs.json").write_text(json.dumps({"items": found}))
        double(tmp_path, "kubectl", f'echo "$1" >> "{tmp_path}/asked"; [ "$1" != get ] || cat "{tmp_path}/jobs.json"')
        list(backend.submit(experiment, settings, stages, {"kubernetes.yaml": tmp_path / "x"}))

    def asked():
        return (tmp_path / "asked").read_text().split()

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    complete, failed, suspended = (
        {"conditions": [{"type": kind, "status": "True"}]} for kind in ("Complete", "Failed", "Suspended")
    )
    with pytest.raises(InputError, match=r"output run: run-\w+-train, run-\w+-eval of another submission are waiting "):
        submit(generate=complete, train={"active": 1}, eval=suspended, order=failed)
    assert asked() == ["get"]
    submit(generate=complete, train=failed, order=failed)
    assert asked() == ["get", "delete", "apply"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{kubectl_image: k, claim: c}", "jobs.kubernetes.image is missing"),
        ("{image: i, kubectl_image: k}", "jobs.kubernetes.claim is missing"),
        ("{image: i, kubectl_image: k, claim: c, stages: {train: {nodes: 2}}}", "trains in one pod"),
        ("{image: i, kubectl_image: k, claim: c, nodes: 2}", "trains in one pod"),
        ("{image: i, kubectl_image: k, claim: 'C c'}", "not a valid Kubernetes object name"),
        ("{image: i, kubectl_image: k, claim: c, mount: '/a/../b'}", "not an absolute path"),
        ("{image: i, kubectl_image: k, claim: c, time: 8h}", "not a time such as HH:MM:SS"),
        ("{image: i, kubectl_image: k, claim: c, pod: {password: x}}", "would be written"),
        ("{image: i, kubectl_image: k, claim: c, pod: {volumes: []}}", "jobs.kubernetes.pod: volumes is set by"),
    ],
)
def test_bad_input_is_named(experiment_file, settings, message):
    with pytest.raises(InputError, match=message):
        load_experiment(experiment_file, [("jobs.kubernetes", settings)])


def test_one_backend_only(experiment_file):
    with pytest.raises(InputError, match="give either slurm or kubernetes, not more than one"):
        load_experiment(experiment_file, [("jobs.kubernetes", SETTINGS), ("jobs.slurm", "{}")])


def test_an_output_does_not_leave_the_volume(experiment_file):
    with pytest.raises(InputError, match="would leave /outputs"):
        objects(experiment_file, output="../x")
