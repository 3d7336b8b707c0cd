"""The experiment: one YAML file, a section a stage, checked strictly before anything runs."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from llmdistill.config.curate import CurateStep
from llmdistill.config.eval import Eval
from llmdistill.config.export import Export
from llmdistill.config.generate import Generate, Score
from llmdistill.config.jobs import Jobs, Watch
from llmdistill.config.prompts import Prompts
from llmdistill.config.refresh import Refresh
from llmdistill.config.rounds import Rounds, as_section
from llmdistill.config.section import Section, StoreUrl
from llmdistill.config.student import Student
from llmdistill.config.targets import Targets
from llmdistill.config.teacher import Teacher, engines_with
from llmdistill.config.train import Train
from llmdistill.stages.table import Directory


class Experiment(Section):
    """One experiment: one YAML file with a section a stage."""

    output: str
    """Directory that all stages write to."""
    store: StoreUrl | None = None
    """URL of a copy of `output` in an object store: s3://BUCKET/PREFIX, gs://… or file:///…"""
    seed: int = Field(default=0, ge=0)
    """Random seed for sampling, splitting, training and the bootstrap."""
    shard_mb: float = Field(default=256, gt=0)
    """Size of the shards that `curate` writes, in megabytes."""
    teacher: Teacher
    prompts: Prompts | None = None
    generate: Generate = Generate()
    score: Score | None = None
    targets: Targets = Targets()
    curate: list[CurateStep] = Field(default=[], max_length=100)
    """Curation steps, applied in this order; `llmdistill curate --help-all` lists them."""
    student: Student = Student()
    train: Train = Train()
    rounds: Annotated[Rounds | None, BeforeValidator(as_section)] = None
    refresh: Refresh | None = None
    eval: Eval = Eval()
    export: Export | None = None
    jobs: Jobs | None = None
    watch: Watch = Watch()

    @field_validator("output")
    @classmethod
    def _is_a_name(cls, output: str) -> str:
        if not output or not output.isprintable():
            raise ValueError(f"{output!r} must not contain control characters, nor be empty")
        return output

    @model_validator(mode="after")
    def _loss_fits_the_targets(self) -> "Experiment":
        reason = self.train.against(self.targets.stored)
        if reason and self.train.dataset is None:
            raise ValueError(f"{reason}; set targets.kind to topk")
        return self

    @model_validator(mode="after")
    def _engine_can_do_it(self) -> "Experiment":
        engine, can = self.teacher.engine, self.teacher.abilities
        if not self.targets.stored.distinct and not can.repeats:
            raise ValueError(
                f"engine {engine} returns each token once, so it does not support targets.kind {self.targets.kind}; "
                "use sampled or topk"
            )
        if self.teacher.in_turn and self.generate.rereads:
            key = "json_schema" if self.generate.json_schema is not None else "thinking: removed"
            raise ValueError(
                f"generate.{key} makes the teacher read its text again, which an ensemble of engine {engine} does not support; "
                "`generate` with one teacher and `score` its dataset with the ensemble"
            )
        if self.generate.json_schema is not None and not can.grammar:
            raise ValueError(
                f"generate.json_schema needs constrained decoding, which teacher.engine {engines_with('grammar')} support"
            )
        return self

    @model_validator(mode="after")
    def _rounds_have_targets(self) -> "Experiment":
        if self.rounds and not self.targets.stored.columns:
            raise ValueError(f"rounds needs stored soft targets, but targets.kind is {self.targets.kind}")
        loss = self.rounds and self.rounds.loss
        if not loss:
            return self
        try:
            train = self.train.with_(loss=loss)
        except ValidationError as error:
            raise ValueError(f"rounds.loss: train.{error.errors()[0]['ctx']['error']}") from None
        if reason := train.against(self.targets.stored):
            raise ValueError(f"{reason.replace('train.loss', 'rounds.loss')}; set targets.kind to topk")
        return self

    @model_validator(mode="after")
    def _traces_without_an_answer_go(self) -> "Experiment":
        if self.generate.thinking != "kept" and not any(step.finish_reason for step in self.curate):
            raise ValueError(
                f"generate.thinking is {self.generate.thinking}, so a truncated reasoning trace leaves no answer; "
                "add the step finish_reason to curate, which rejects such rows"
            )
        return self

    @model_validator(mode="after")
    def _layers_need_a_teacher(self) -> "Experiment":
        for name in ("hidden", "attention"):
            if getattr(self.train, name) is not None and not self.targets.online:
                raise ValueError(f"train.{name} needs an online teacher; set targets.kind to online")
        if self.train.fake_quantize and self.student.lora:
            raise ValueError("train.fake_quantize trains all weights, so it does not work with student.lora; remove one of them")
        if self.train.attention and self.student.attn_implementation not in (None, "eager"):
            raise ValueError("train.attention needs eager attention and selects it itself; remove student.attn_implementation")
        return self

    def directory(self, name: Directory) -> Path:
        """Directory of the run with this name; for `student`, that of the last round."""
        return Path(self.output) / (f"rounds/{self.rounds.n}/{name}" if self.rounds and name == "student" else name)

    @property
    def first_student(self) -> Path:
        """The student before the on-policy rounds, trained on the teacher's text."""
        return Path(self.output) / "student"

    @property
    def mixed_datasets(self) -> list[Path]:
        """The directories of `train.mix`."""
        return [Path(directory) for directory in self.train.mix.datasets] if self.train.mix else []

    @property
    def dataset_directory(self) -> Path:
        """Where `train` and `eval` read."""
        return Path(self.train.dataset) if self.train.dataset else self.directory("curated")
