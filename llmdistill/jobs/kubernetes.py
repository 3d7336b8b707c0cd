"""Stages as Kubernetes Jobs: the objects as one would write them by hand, and the output of kubectl."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment, dump_experiment
from llmdistill.config.jobs import Kubernetes
from llmdistill.errors import InputError, RemoteError
from llmdistill.jobs.backend import Backend, Job
from llmdistill.jobs.commands import ask, completed, documents, of_stage, run_name, words_of
from llmdistill.workflow.plan import StageRun

_LABEL = "llmdistill/run"
_CONFIGS = "/etc/llmdistill"  # in the pods
_Object = dict[str, Any]

# Kubernetes does not order Jobs. A pod that waits for the previous stage would hold its GPUs meanwhile, possibly those that the
# previous stage needs; so later Jobs are created suspended, without pods, and a small pod without GPUs starts each in turn.
_NEXT = """\
set -eu
previous=$1; shift
for job; do
  while :; do
    state=$(kubectl get job "$previous" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}')
    case " $state " in
      *" Complete "*) break ;;
      *" Failed "*) echo "$previous failed; $job is not started"; exit 2 ;;
    esac
    sleep 15
  done
  echo "$previous is complete; $job starts"
  kubectl patch job "$job" --type merge --patch '{"spec": {"suspend": false}}'
  previous=$job
done
"""


class _Kubernetes:
    over = frozenset({"COMPLETE", "FAILED"})
    same_files = False

    def render(self, experiment: Experiment, settings: Kubernetes, stages: Sequence[StageRun]) -> dict[str, str]:
        """The configurations, a Job per stage, and one that starts them in order, with the permissions to do so."""
        run = run_name(experiment.output)
        configs = {f"{stage.name}.yaml": dump_experiment(stage.experiment) for stage in stages}
        found = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _named(settings, run, "configs"), "data": configs}
        jobs = [_job(settings, run, stages, number) for number in range(len(stages))]
        order = _order(settings, run, [f"{run}-{stage.name}" for stage in stages])
        return {"kubernetes.yaml": documents([found, *jobs, *order])}

    def submit(
        self, experiment: Experiment, settings: Kubernetes, stages: Sequence[StageRun], files: Mapping[str, Path]
    ) -> Iterator[Job]:
        """Pass the objects to `kubectl apply`; those of an earlier submission are removed once they have ended."""
        run = run_name(experiment.output)
        jobs = [
            {"stage": name, "job": f"{run}-{name}", "run": run, "namespace": settings.namespace}
            for name in [*(stage.name for stage in stages), "order"]
        ]
        states = zip(jobs, self.states(jobs), strict=True)
        if alive := [job["job"] for job, found in states if not self.over.issuperset(found)]:
            raise InputError(
                f"output {experiment.output}: {', '.join(alive)} of another submission are waiting or running in namespace "
                f"{settings.namespace}; `cancel` them where they were submitted, or choose another `output`"
            )
        _delete(jobs[0])
        try:
            ask(["kubectl", "apply", "-f", str(files["kubernetes.yaml"])], "Kubernetes", InputError)
        except (InputError, RemoteError):
            with suppress(RemoteError):
                _delete(jobs[0])
            raise
        yield from jobs

    def states(self, jobs: Sequence[Job]) -> list[list[str]]:
        """For each Job, the states of its pods, or complete, failed or suspended; empty for one that does not exist."""
        where = ["--namespace", jobs[0]["namespace"], "--selector", f"{_LABEL}={jobs[0]['run']}"]
        found = json.loads(ask(["kubectl", "get", "jobs", *where, "--output", "json"], "Kubernetes"))["items"]
        state_of = {job["metadata"]["name"]: _states(job.get("status", {})) for job in found}
        return [state_of.get(job["job"], []) for job in jobs]

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Remove the Jobs of a run and the one that starts them; the volume is not changed."""
        _delete(jobs[0])


BACKEND: Backend[Kubernetes] = _Kubernetes()


def _job(settings: Kubernetes, run: str, stages: Sequence[StageRun], number: int) -> _Object:
    stage = stages[number]
    asked = of_stage(settings, stage.command)
    many = settings.workers > 1 and stage.shared
    command = _command(settings, asked.gpus or 0, stage)
    if before := completed(stages, number, settings.workers, _CONFIGS):
        command = ["sh", "-c", f'{before}exec "$@"', "llmdistill", *command]
    spec: _Object = {
        **({"completionMode": "Indexed", "completions": settings.workers, "parallelism": settings.workers} if many else {}),
        "backoffLimitPerIndex" if many else "backoffLimit": settings.retries,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"containerName": "llmdistill", "operator": "In", "values": [2]}},
                {"action": "Ignore", "onExitCodes": {"containerName": "llmdistill", "operator": "In", "values": [143]}},
            ]
        },
        **({"activeDeadlineSeconds": _seconds(asked.time)} if asked.time else {}),
        **({"suspend": True} if number else {}),
        "template": {
            "metadata": {"labels": {_LABEL: run}},
            "spec": _pod(settings, asked, run, command),
        },
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _named(settings, run, stage.name), "spec": spec}


def _pod(settings: Kubernetes, asked: Kubernetes, run: str, command: list[str]) -> _Object:
    limits = {
        "nvidia.com/gpu": asked.gpus or None,
        "cpu": asked.cpus,
        "memory": asked.memory,
    }
    limits = {name: str(value) for name, value in limits.items() if value is not None}
    container = {
        "name": "llmdistill",
        "image": settings.image,
        "command": [_unexpanded(word) for word in command],
        "workingDir": settings.workdir,
        **({"envFrom": [{"secretRef": {"name": name}} for name in settings.secrets]} if settings.secrets else {}),
        **({"resources": {"limits": limits}} if limits else {}),
        "volumeMounts": [
            {"name": "output", "mountPath": settings.mount},
            {"name": "configs", "mountPath": _CONFIGS},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
        ],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace,
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [
            {"name": "output", "persistentVolumeClaim": {"claimName": settings.claim}},
            {"name": "configs", "configMap": {"name": _named(settings, run, "configs")["name"]}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # processes pass tensors to each other through it
        ],
        **settings.pod,
    }


def _command(settings: Kubernetes, gpus: int, stage: StageRun) -> list[str]:
    """The command of a pod: words without a shell, unless it has to compute."""
    words = words_of(stage, _CONFIGS)
    if stage.command == "train" and settings.accelerate:
        launcher = ["accelerate", "launch", "--config_file", settings.accelerate, "--num_machines", "1"]
        return [*launcher, "--num_processes", str(max(gpus, 1)), "-m", "llmdistill", *words]
    if stage.command == "train" and gpus > 1:
        return ["torchrun", "--standalone", "--nproc-per-node", str(gpus), "-m", "llmdistill", *words]
    if stage.shared and settings.workers > 1:
        share = f'--shards "$((JOB_COMPLETION_INDEX + 1))/{settings.workers}"'
        return ["sh", "-c", f"exec llmdistill {' '.join(words)} {share}"]
    return ["llmdistill", *words]


def _unexpanded(word: str) -> str:
    """A word of a command in Kubernetes' syntax, which expands $(NAME) and turns $$ into $."""
    return word.replace("$", "$$")


def _order(settings: Kubernetes, run: str, jobs: list[str]) -> list[_Object]:
    """The Job that starts the suspended Jobs, and has permission for nothing else."""
    about = _named(settings, run, "order")
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": about["name"],
        "containers": [
            {
                "name": "kubectl",
                "image": settings.kubectl_image,
                "command": ["sh", "-c", _unexpanded(_NEXT), "order", *jobs],
                "resources": {"limits": {"cpu": "100m", "memory": "128Mi"}},
            }
        ],
    }
    failed = {"action": "FailJob", "onExitCodes": {"containerName": "kubectl", "operator": "In", "values": [2]}}
    lost = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    group = "rbac.authorization.k8s.io"
    rights = {"apiGroups": ["batch"], "resources": ["jobs"], "resourceNames": jobs, "verbs": ["get", "patch"]}
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": about},
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": about, "rules": [rights]},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": about,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": about["name"]},
            "subjects": [{"kind": "ServiceAccount", "name": about["name"], "namespace": settings.namespace}],
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": about,
            "spec": {
                "podFailurePolicy": {"rules": [lost, failed]},
                "template": {"metadata": {"labels": {_LABEL: run}}, "spec": pod},
            },
        },
    ]


def _named(settings: Kubernetes, run: str, part: str) -> _Object:
    return {"name": f"{run}-{part}", "namespace": settings.namespace, "labels": {_LABEL: run}}


def _seconds(clock: str) -> int:
    days, _, rest = clock.rpartition("-")
    hours, minutes, seconds = map(int, rest.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _states(status: _Object) -> list[str]:
    true = {condition["type"] for condition in status.get("conditions", []) if condition["status"] == "True"}
    for condition in ("Complete", "Failed", "Suspended"):
        if condition in true:
            return [condition.upper()]
    active, ready = status.get("active", 0), status.get("ready", 0)
    return ["COMPLETE"] * status.get("succeeded", 0) + ["RUNNING"] * ready + ["PENDING"] * max(active - ready, 0) or ["PENDING"]


def _delete(job: Job) -> None:
    where = ["--namespace", job["namespace"], "--selector", f"{_LABEL}={job['run']}", "--ignore-not-found"]
    ask(["kubectl", "delete", "job,configmap,rolebinding,role,serviceaccount", *where], "Kubernetes")
