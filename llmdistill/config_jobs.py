"""The configuration's section `jobs`: where the stages run as scheduled jobs, and with what."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from llmdistill.section import Section


def _one_word(value: str) -> str:
    if not re.fullmatch(r"[\w.,:@%+=/\[\]-]+", value):
        raise ValueError(f"{value!r} has signs that no option of a scheduler has")
    return value


Word = Annotated[str, AfterValidator(_one_word)]
StageName = Literal["prompts", "generate", "score", "curate", "prune", "train", "eval", "export", "report"]


class Resources(Section):
    """What a job asks for."""

    partition: Word | None = None
    """Where it may run."""
    gpus: int | None = Field(default=None, ge=0)
    """GPUs of each node; `curate` and `report` get none unless `stages` says so."""
    nodes: int | None = Field(default=None, ge=1)
    """Nodes; `train` alone uses more than one."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU cores of each node."""
    memory: Word | None = None
    """Memory of each node, such as 64G."""
    time: Word | None = None
    """Longest run, as HH:MM:SS or D-HH:MM:SS."""


class Slurm(Resources):
    """Stages as jobs of Slurm, each after those that it needs."""

    account: Word | None = None
    """Who pays."""
    workers: int = Field(default=1, ge=1)
    """Tasks of the array that `generate` and `score` are, each with its share of the shards."""
    environment: list[str] = []
    """Lines of shell before the command: modules, virtual environments, variables."""
    container: Word | None = None
    """Image in which the command runs (by srun's --container-image, of the pyxis plugin)."""
    grace: int = Field(default=120, ge=10)
    """Seconds before the end of its time at which a job stops, keeps what it has, and queues itself again."""
    retries: int = Field(default=2, ge=0)
    """How often a job that failed is queued again before the pipeline stops there."""
    options: dict[Word, Word] = {}
    """More options of sbatch, without their dashes: {qos: high}."""
    accelerate: str | None = None
    """A configuration of `accelerate launch` for `train`; torchrun with DDP where more than one GPU or node is asked for."""
    stages: dict[StageName, Resources] = {}
    """What a stage asks for where it is not the same: {train: {nodes: 2}}."""

    def of(self, stage: str) -> Resources:
        """What a stage asks for."""
        own = next((resources for name, resources in self.stages.items() if name == stage), Resources())
        names = Resources.model_fields
        found = {name: getattr(own, name) if getattr(own, name) is not None else getattr(self, name) for name in names}
        return Resources(**found)

    @model_validator(mode="after")
    def _only_training_has_many_nodes(self) -> "Slurm":
        for name in self.stages:
            if name != "train" and (self.stages[name].nodes or 1) > 1:
                raise ValueError(f"stages.{name}.nodes: {name} runs on one node; workers makes more of it")
        return self


class RayResources(Section):
    """What a stage asks of Ray."""

    gpus: int | None = Field(default=None, ge=0)
    """GPUs on one node."""
    cpus: int | None = Field(default=None, ge=1)
    """CPU cores on one node."""


class Ray(RayResources):
    """The pipeline as one job of a Ray cluster whose nodes share a file system."""

    address: str | None = None
    """Where the cluster takes jobs, such as http://head:8265; RAY_API_SERVER_ADDRESS if not given."""
    workers: int = Field(default=1, ge=1)
    """Actors that `generate` or `score`, each with one engine; they are handed shards one by one."""
    retries: int = Field(default=2, ge=0)
    """How often a shard, or a stage, that failed is tried again."""
    stages: dict[StageName, RayResources] = {}
    """What a stage asks for where it is not the same. Without `gpus`, `generate` and `score` ask for
    `teacher.tensor_parallel_size` a worker, `curate` and `report` for none, and the others for one."""


class Jobs(Section):
    """Scheduled jobs, for `llmdistill submit`."""

    slurm: Slurm | None = None
    """Jobs of Slurm."""
    ray: Ray | None = None
    """A job of Ray."""
