"""The sections `jobs` and `watch`: where stages run as scheduled jobs, their resources, and how they are monitored."""

import re
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from llmdistill.config.section import PassedOn, Section, ServerUrl
from llmdistill.stages.table import STAGES


def _matching(pattern: str, problem: str) -> AfterValidator:
    """A type whose values fully match the pattern."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{value!r} {problem}")
        return value

    return AfterValidator(check)


def _stage(name: str) -> str:
    if name not in STAGES:
        raise ValueError(f"{name!r} is not a stage; stages are {', '.join(STAGES)}")
    return name


StageName = Annotated[str, AfterValidator(_stage)]
Word = Annotated[str, _matching(r"[\w.,:@%+=/\[\]-]+", "has characters that are not allowed in scheduler options")]
Clock = Annotated[str, _matching(r"(\d+-)?\d+:\d\d:\d\d", "is not a time such as HH:MM:SS or D-HH:MM:SS")]
WholePath = Annotated[str, _matching(r"(/(?!\.\.)[\w.-]+)+", "is not an absolute path of plain names")]
Variable = Annotated[str, _matching(r"[A-Za-z_]\w*", "is not a variable name; the secret itself stays in the environment")]
ObjectName = Annotated[str, _matching(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "is not a valid Kubernetes object name")]


class Resources(Section):
    """Resources of a job: for all stages under a scheduler, for a single stage under its `stages`."""

    gpus: int | None = Field(default=None, ge=0)
    """GPUs per node. `curate` and `report` get none unless it is set in `stages`."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU cores per node."""


class NodeResources(Resources):
    """Resources of a job on whole nodes."""

    nodes: int | None = Field(default=None, ge=1)
    """Number of nodes; only `train` uses more than one."""
    memory: Word | None = None
    """Memory per node, such as 64G."""


class SlurmResources(NodeResources):
    """Resources of a Slurm job."""

    partition: Word | None = None
    """Partition."""
    time: Word | None = None
    """Time limit, as HH:MM:SS or D-HH:MM:SS."""


class SkyPilotResources(NodeResources):
    """Resources of a SkyPilot task."""

    accelerator: Word | None = None
    """Type of GPU, such as A100 or H100; `gpus` is the number."""
    infra: Word | None = None
    """Cloud, optionally with region and zone, such as aws/us-east-1; the cheapest if not set."""
    spot: bool | None = None
    """Use spot instances; preempted ones are replaced."""


class KubernetesResources(NodeResources):
    """Resources of a pod."""

    time: Clock | None = None
    """Time limit, as HH:MM:SS or D-HH:MM:SS."""


Asked = TypeVar("Asked", bound=Resources)


def _one_node(stages: Any) -> Any:
    for name, resources in stages.items():
        if name != "train" and (getattr(resources, "nodes", None) or 1) > 1:
            raise ValueError(f"{name} runs on one node; set workers to use more")
    return stages


class Scheduler(Section, Generic[Asked]):
    """Settings of all schedulers."""

    workers: int = Field(default=1, ge=1)
    """Workers that share the shards of `prompts`, `generate` and `score`: tasks of a job array (slurm), actors (ray), machines
    (skypilot), pods (kubernetes)."""
    retries: int = Field(default=2, ge=0)
    """Number of retries after a failure. Preempted work is always restarted."""
    stages: Annotated[dict[StageName, Asked], AfterValidator(_one_node)] = {}
    """Resources of individual stages: `{train: {gpus: 8}}`."""


class NodeScheduler(Scheduler[Asked]):
    """Settings of schedulers that assign whole nodes."""

    accelerate: str | None = None
    """Configuration file of `accelerate launch` for `train`; without it, torchrun with DDP for more than one GPU or node."""


class Mounted(Section):
    """Settings for machines without a shared directory."""

    mount: WholePath = "/outputs"
    """Mount point of the storage for all output; `output` must be a path below it."""


class Slurm(NodeScheduler[SlurmResources], SlurmResources):
    """Stages as Slurm jobs with dependencies."""

    account: Word | None = None
    """Account to charge."""
    environment: list[str] = []
    """Shell lines before the command: modules, virtual environments, variables."""
    container: Word | None = None
    """Image in which the command runs (srun's --container-image, from the pyxis plugin)."""
    grace: int = Field(default=120, ge=10)
    """Seconds before its time limit at which a job stops, saves its finished work and requeues itself."""
    options: dict[Word, Word] = {}
    """Further options of sbatch, without dashes: `{qos: high}`."""


class SkyPilot(NodeScheduler[SkyPilotResources], Mounted, SkyPilotResources):
    """Stages as the tasks of one managed SkyPilot job, in order."""

    bucket: str = Field(pattern=r"^[a-z0-9]+://[\w./-]+$")
    """Bucket mounted for all output, such as s3://name. It outlives the machines."""
    setup: list[str] = []
    """Shell lines that set up a new machine."""
    environment: list[str] = []
    """Shell lines before the command: modules, virtual environments, variables."""
    secrets: list[Variable] = []
    """Names of environment variables, such as HF_TOKEN, to pass on from `submit`."""
    image: Word | None = None
    """Image of the machine, such as docker:USER/IMAGE."""

    @model_validator(mode="after")
    def _gpus_have_a_kind(self) -> "SkyPilot":
        for resources in (self, *self.stages.values()):
            if resources.gpus and not (resources.accelerator or self.accelerator):
                raise ValueError("gpus needs accelerator, the type of GPU, such as A100")
            if resources.memory and not re.fullmatch(r"\d+G?", resources.memory):
                raise ValueError(f"memory {resources.memory}: SkyPilot counts in gigabytes, such as 64G")
        return self


class Kubernetes(NodeScheduler[KubernetesResources], Mounted, KubernetesResources):
    """Stages as Kubernetes Jobs."""

    image: Word
    """Image in which the command runs."""
    kubectl_image: Word
    """Image with a shell and kubectl, for the small pod that starts each stage when the previous one is complete."""
    claim: ObjectName
    """PersistentVolumeClaim for all output. With more than one pod it must be ReadWriteMany."""
    workdir: WholePath = "/workspace"
    """Working directory in the image or below `mount`; relative paths in the configuration start here."""
    namespace: ObjectName = "default"
    """Namespace of all objects."""
    secrets: list[ObjectName] = []
    """Names of Secrets whose entries become environment variables, such as HF_TOKEN."""
    pod: PassedOn = {}
    """Further fields of the pod specification: `{nodeSelector: {…}, tolerations: […]}`."""
    grace: int = Field(default=120, ge=10)
    """Seconds from SIGTERM to SIGKILL, in which a stage saves its finished work."""

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
            raise ValueError("nodes: a Kubernetes Job trains in one pod; for more nodes use slurm or skypilot")
        return self


class Ray(Scheduler[Resources], Resources):
    """The pipeline as one job on a Ray cluster whose nodes share a file system."""

    address: ServerUrl | None = None
    """Address for job submission, such as http://head:8265; RAY_API_SERVER_ADDRESS if not set."""


class Jobs(Section):
    """Scheduled jobs, for `llmdistill submit`: exactly one scheduler. Each is a module in `llmdistill.jobs`."""

    slurm: Slurm | None = None
    """Slurm jobs."""
    ray: Ray | None = None
    """A Ray job."""
    skypilot: SkyPilot | None = None
    """A managed SkyPilot job."""
    kubernetes: Kubernetes | None = None
    """Kubernetes Jobs."""

    @model_validator(mode="after")
    def _one_backend(self) -> "Jobs":
        if len(self._given) > 1:
            raise ValueError(f"give either {' or '.join(self._given)}, not more than one")
        return self

    @property
    def _given(self) -> list[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    @property
    def chosen(self) -> "tuple[str, Scheduler[Any]] | None":
        """The name of the backend and its settings; None if there is none."""
        return next(((name, getattr(self, name)) for name in self._given), None)


class Watch(Section):
    """How a run is monitored; may be changed between attempts."""

    log: Literal["text", "json"] = "text"
    """Plain text, or one JSON object per line."""
    metrics: str | None = None
    """Directory in which every process writes a metrics file in Prometheus' text format, for node_exporter."""
