"""The configuration's sections `jobs` and `watch`: where stages run as scheduled jobs, with what, and how they are watched."""

import re
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from llmdistill.config.section import PassedOn, Section
from llmdistill.stages.table import STAGES


def _matching(pattern: str, problem: str) -> AfterValidator:
    """Values match the pattern as a whole."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} {problem}")
        return value

    return AfterValidator(check)


def _stage(name: str) -> str:
    if name not in STAGES:
        raise ValueError(f"{name!r} is no stage; they are {', '.join(STAGES)}")
    return name


StageName = Annotated[str, AfterValidator(_stage)]
Word = Annotated[str, _matching(r"[\w.,:@%+=/\[\]-]+", "has signs that no option of a scheduler has")]
Clock = Annotated[str, _matching(r"(\d+-)?\d+:\d\d:\d\d", "is no time such as HH:MM:SS or D-HH:MM:SS")]
WholePath = Annotated[str, _matching(r"(/(?!\.\.)[\w.-]+)+", "is no absolute path of plain names")]
Variable = Annotated[str, _matching(r"[A-Za-z_]\w*", "is no name of a variable; the secret itself stays in the environment")]
ObjectName = Annotated[str, _matching(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "is no name of an object of Kubernetes")]


class Resources(Section):
    """What a job asks for: under a scheduler for all stages, under its `stages` for one of them."""

    gpus: int | None = Field(default=None, ge=0)
    """GPUs of each node; `curate` and `report` get none unless `stages` says so."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU cores of each node."""


class NodeResources(Resources):
    """What a job asks for where it gets whole nodes."""

    nodes: int | None = Field(default=None, ge=1)
    """Nodes; `train` alone uses more than one."""
    memory: Word | None = None
    """Memory of each node, such as 64G."""


class SlurmResources(NodeResources):
    """What a job of Slurm asks for."""

    partition: Word | None = None
    """Where it may run."""
    time: Word | None = None
    """Longest run, as HH:MM:SS or D-HH:MM:SS."""


class SkyPilotResources(NodeResources):
    """What a task of SkyPilot asks for."""

    accelerator: Word | None = None
    """The kind of GPU, such as A100 or H100; `gpus` says how many."""
    infra: Word | None = None
    """Where it may run: a cloud, with its region and zone if need be, such as aws/us-east-1; the cheapest if not given."""
    spot: bool | None = None
    """Whether on machines that may be taken away, and are looked for again."""


class KubernetesResources(NodeResources):
    """What a pod asks for."""

    time: Clock | None = None
    """Longest run, as HH:MM:SS or D-HH:MM:SS."""


Asked = TypeVar("Asked", bound=Resources)


def _one_node(stages: Any) -> Any:
    for name, resources in stages.items():
        if name != "train" and (getattr(resources, "nodes", None) or 1) > 1:
            raise ValueError(f"{name} runs on one node; workers makes more of it")
    return stages


class Scheduler(Section, Generic[Asked]):
    """What all schedulers are told in the same way."""

    workers: int = Field(default=1, ge=1)
    """Workers that share the shards of `prompts`, `generate` and `score`: tasks of an array (slurm), actors (ray), machines
    (skypilot), pods (kubernetes)."""
    retries: int = Field(default=2, ge=0)
    """How often what failed is started again; what was preempted always is."""
    stages: Annotated[dict[StageName, Asked], AfterValidator(_one_node)] = {}
    """What a stage asks for where it is not the same: {train: {gpus: 8}}."""


class NodeScheduler(Scheduler[Asked]):
    """What schedulers are told that give whole nodes."""

    accelerate: str | None = None
    """A configuration of `accelerate launch` for `train`; torchrun with DDP where more than one GPU or node is asked for."""


class Mounted(Section):
    """Where machines have no directory in common with the one that submits."""

    mount: WholePath = "/outputs"
    """Where the storage of all output is mounted; what `output` names lies below."""


class Slurm(NodeScheduler[SlurmResources], SlurmResources):
    """Stages as jobs of Slurm, each after those that it needs."""

    account: Word | None = None
    """Who pays."""
    environment: list[str] = []
    """Lines of shell before the command: modules, virtual environments, variables."""
    container: Word | None = None
    """Image in which the command runs (by srun's --container-image, of the pyxis plugin)."""
    grace: int = Field(default=120, ge=10)
    """Seconds before the end of its time at which a job stops, keeps what it has, and queues itself again."""
    options: dict[Word, Word] = {}
    """More options of sbatch, without their dashes: {qos: high}."""


class SkyPilot(NodeScheduler[SkyPilotResources], Mounted, SkyPilotResources):
    """Stages as the tasks of one managed job of SkyPilot, one after the other."""

    bucket: str = Field(pattern=r"^[a-z0-9]+://[\w./-]+$")
    """The bucket that is mounted as the place of all output, such as s3://name: machines come and go, what lies there stays."""
    setup: list[str] = []
    """Lines of shell that set up a new machine."""
    environment: list[str] = []
    """Lines of shell before the command: modules, virtual environments, variables."""
    secrets: list[Variable] = []
    """Names of variables, such as HF_TOKEN, that are passed on from the environment of `submit`."""
    image: Word | None = None
    """Image of the machine, such as docker:USER/IMAGE."""

    @model_validator(mode="after")
    def _gpus_have_a_kind(self) -> "SkyPilot":
        for resources in (self, *self.stages.values()):
            if resources.gpus and not (resources.accelerator or self.accelerator):
                raise ValueError("gpus needs accelerator, the kind of GPU, such as A100")
            if resources.memory and not re.fullmatch(r"\d+G?", resources.memory):
                raise ValueError(f"memory {resources.memory}: SkyPilot counts in gigabytes, such as 64G")
        return self


class Kubernetes(NodeScheduler[KubernetesResources], Mounted, KubernetesResources):
    """Stages as Jobs of Kubernetes."""

    image: Word
    """Image in which the command runs."""
    kubectl_image: Word
    """Image with a shell and kubectl, for the small pod that starts each stage when the one before it is complete."""
    claim: ObjectName
    """PersistentVolumeClaim for all output; with more than one pod it has to be one that many may write (ReadWriteMany)."""
    workdir: WholePath = "/workspace"
    """Directory in the image or below `mount` in which the command runs: that of the files which the configuration names."""
    namespace: ObjectName = "default"
    """Namespace of all of it."""
    secrets: list[ObjectName] = []
    """Names of Secrets whose entries become variables, such as HF_TOKEN."""
    pod: PassedOn = {}
    """More of the pods, as Kubernetes writes it: {nodeSelector: {…}, tolerations: […]}."""
    grace: int = Field(default=120, ge=10)
    """Seconds from SIGTERM to SIGKILL, in which a stage keeps what it has."""

    @field_validator("pod")
    @classmethod
    def _what_is_set_for_every_pod(cls, pod: dict[str, Any]) -> dict[str, Any]:
        for name in ("containers", "restartPolicy", "terminationGracePeriodSeconds", "automountServiceAccountToken", "volumes"):
            if name in pod:
                raise ValueError(f"{name} is set by the other keys of jobs.kubernetes")
        return pod

    @model_validator(mode="after")
    def _one_pod_trains(self) -> "Kubernetes":
        own = self.stages.get("train")
        if ((own and own.nodes) or self.nodes or 1) > 1:
            raise ValueError("nodes: a Job of Kubernetes trains in one pod; for more nodes use slurm or skypilot")
        return self


class Ray(Scheduler[Resources], Resources):
    """The pipeline as one job of a Ray cluster whose nodes share a file system."""

    address: str | None = None
    """Where the cluster takes jobs, such as http://head:8265; RAY_API_SERVER_ADDRESS if not given."""


class Jobs(Section):
    """Scheduled jobs, for `llmdistill submit`: one of these. The module of its name in `llmdistill.jobs` is the backend."""

    slurm: Slurm | None = None
    """Jobs of Slurm."""
    ray: Ray | None = None
    """A job of Ray."""
    skypilot: SkyPilot | None = None
    """A managed job of SkyPilot."""
    kubernetes: Kubernetes | None = None
    """Jobs of Kubernetes."""

    @model_validator(mode="after")
    def _one_backend(self) -> "Jobs":
        if len(self._given) > 1:
            raise ValueError(f"either {' or '.join(self._given)}, not more than one")
        return self

    @property
    def _given(self) -> list[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    @property
    def chosen(self) -> "tuple[str, Scheduler[Any]] | None":
        """The name of the backend and its settings; None if there is none."""
        return next(((name, getattr(self, name)) for name in self._given), None)


class Watch(Section):
    """How a run is watched while it goes on; may be changed between two tries."""

    log: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line for programs."""
    metrics: str | None = None
    """Directory in which every process keeps a file of its progress in Prometheus' text format, for node_exporter."""
