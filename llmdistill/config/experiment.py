"""The experiment: one YAML file with one section per stage, checked strictly before anything runs."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from llmdistill.config.curate import CurateStep
from llmdistill.config.eval import Eval
from llmdistill.config.export import Export
from llmdistill.config.generate import Generate, Score
from llmdistill.config.jobs import Jobs, Watch
from llmdistill.config.prompts import Prompts
from llmdistill.config.refresh import Refresh
from llmdistill.config.retokenize import Retokenize
from llmdistill.config.rounds import Rounds, against_micro_rounds, as_section
from llmdistill.config.route import DEFAULT, Route
from llmdistill.config.section import Section, StoreUrl
from llmdistill.config.student import Student
from llmdistill.config.targets import Targets
from llmdistill.config.teacher import Teacher, engines_with
from llmdistill.config.train import Train
from llmdistill.data.targets import Sampled, SampledByStudent, SampledLogprobs
from llmdistill.stages.table import Directory


def _instead(train: Train) -> str:
    """What to do if the targets are not of the kind that a loss needs."""
    fits = train.against(SampledLogprobs) is None
    return f"set targets.kind to {f'{SampledLogprobs.name} or ' if fits else ''}topk"


class Experiment(Section):
    """One experiment: one YAML file with one section per stage."""

    output: str
    """Directory that all stages write to."""
    store: StoreUrl | None = None
    """URL of a copy of `output` in an object store: s3://BUCKET/PREFIX, gs://… or file:///…"""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Random seed for sampling, splitting, training and the bootstrap."""
    shard_mb: float = Field(default=256, gt=0)
    """Size of the shards that `curate` writes, in megabytes."""
    teacher: Teacher
    teachers: dict[str, Teacher] = {}
    """Several teachers instead of `teacher`, under names of your choice. Each generates or scores the rows that `route` assigns
    to it; rows that name no other teacher go to `default`. If vocabularies, chat templates or end tokens differ, `retokenize`
    converts all rows to the student's tokens. Work that needs a single teacher, such as the steps of `prompts`, is done by
    `default`, or by the first teacher if there is no `default`."""
    route: Route | None = None
    prompts: Prompts | None = None
    generate: Generate = Generate()
    score: Score | None = None
    targets: Targets = Targets()
    curate: list[CurateStep] = Field(default=[], max_length=100)
    """Curation steps, applied in this order; `llmdistill curate --help-all` lists them."""
    retokenize: Retokenize = Retokenize()
    student: Student = Student()
    train: Train = Train()
    rounds: Annotated[Rounds | None, BeforeValidator(as_section)] = None
    refresh: Refresh | None = None
    eval: Eval = Eval()
    export: Export | None = None
    jobs: Jobs | None = None
    watch: Watch = Watch()

    @model_validator(mode="before")
    @classmethod
    def _teachers_stand_for_the_teacher(cls, tree: Any) -> Any:
        """With several, `teacher` is the one that does the work of a single teacher; it is not recorded as a choice."""
        teachers = tree.get("teachers") if isinstance(tree, dict) else None
        if not teachers or not isinstance(teachers, dict):
            return tree
        if "teacher" in tree:
            raise ValueError("give either teacher or teachers, not both")
        try:
            main = Teacher.model_validate(teachers.get(DEFAULT, next(iter(teachers.values()))))
        except ValidationError:  # reported under `teachers`
            main = Teacher(model="teachers")
        return {**tree, "teacher": main}

    @model_validator(mode="after")
    def _routes_lead_to_teachers(self) -> "Experiment":
        if bool(self.teachers) != bool(self.route):
            raise ValueError("teachers and route must be given together")
        if not self.teachers or self.route is None:
            return self
        self.model_fields_set.discard("teacher")
        if len(self.teachers) < 2:
            raise ValueError("teachers needs at least two; for a single one use teacher")
        for key, name in self.route.named.items():
            if name not in self.teachers:
                raise ValueError(f"route.{key}: there is no teacher {name}, only {', '.join(self.teachers)}")
        for key in ("engine", "dtype"):
            values = {name: getattr(teacher, key) for name, teacher in self.teachers.items()}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{name} {value}" for name, value in values.items())
                raise ValueError(f"teachers: all need the same {key}, but they have {listed}")
        single: dict[str, Any] = {"rounds": self.rounds, "eval.win_rate": self.eval.win_rate}
        single |= {"train.hidden": self.train.hidden, "train.attention": self.train.attention}
        for key, value in single.items():
            if value:
                raise ValueError(f"{key} needs a single teacher, not teachers")
        if self.teacher.abilities.api:
            raise ValueError(
                f"teachers: engine {self.teacher.engine} bills each dataset separately; make one for each, with teacher"
            )
        return self

    @field_validator("output")
    @classmethod
    def _is_a_name(cls, output: str) -> str:
        if not output or not output.isprintable():
            raise ValueError(f"{output!r} must not be empty or contain control characters")
        if output.startswith("~"):
            raise ValueError(f"{output} begins with ~, which only a shell expands; write the full path")
        return output

    @model_validator(mode="after")
    def _loss_fits_the_targets(self) -> "Experiment":
        reason = self.train.against(self.targets.stored)
        if reason and self.train.dataset is None:
            raise ValueError(f"{reason}; {_instead(self.train)}")
        return self

    @model_validator(mode="after")
    def _engine_can_do_it(self) -> "Experiment":
        engine, can = self.teacher.engine, self.teacher.abilities
        in_turn = any(teacher.in_turn for teacher in self.routed.values())
        if not self.targets.stored.distinct and not can.repeats:
            raise ValueError(
                f"engine {engine} returns each token once, so it does not support targets.kind {self.targets.kind}; "
                "use sampled or topk"
            )
        if in_turn and self.targets.stored is SampledLogprobs:
            raise ValueError(
                f"targets.kind {self.targets.kind} needs the full distribution of the ensemble, which engine {engine} cannot "
                f"compute, since it loads one teacher at a time; use engine {engines_with('whole_distribution')}, or set "
                "targets.kind to topk"
            )
        if in_turn and self.generate.rereads:
            key = "json_schema" if self.generate.json_schema is not None else "thinking: removed"
            raise ValueError(
                f"generate.{key} makes the teacher score its own text again, which an ensemble with engine {engine} does not "
                "support; `generate` with one teacher and `score` its dataset with the ensemble"
            )
        if self.generate.min_tokens and engine == "anthropic":
            raise ValueError(f"generate.min_tokens: engine {engine} has no such parameter; remove it")
        if self.generate.json_schema is not None and not can.grammar:
            raise ValueError(
                f"generate.json_schema needs constrained decoding, which teacher.engine {engines_with('grammar')} support"
            )
        for key, temperature in self._temperatures.items():
            if 0 < temperature < can.lowest_temperature:
                raise ValueError(
                    f"{key} is {temperature:g}, but engine {engine} does not support temperatures between 0 and "
                    f"{can.lowest_temperature:g}; set it to 0 or to at least {can.lowest_temperature:g}"
                )
        return self

    @property
    def _temperatures(self) -> dict[str, float]:
        """The teacher's sampling temperatures, by their keys."""
        of_prompts = {"prompts.sampling.temperature": self.prompts.sampling.temperature} if self.prompts else {}
        return {"generate.temperature": self.generate.temperature, **of_prompts}

    @model_validator(mode="after")
    def _endpoint_can_do_it(self) -> "Experiment":
        teacher, can = self.teacher, self.teacher.abilities
        if self.targets.stored.of_text and (not can.api or teacher.tokenizer is not None):
            raise ValueError(
                f"targets.kind {self.targets.kind} is for teachers behind an API whose tokenizer is unknown; with targets.kind "
                "none, `retokenize` makes chunks for a student with a different tokenizer"
            )
        if not can.api:
            return self
        engine, soft = f"teacher.engine {teacher.engine}", bool(self.targets.stored.columns)
        kind = f"targets.kind {self.targets.kind}"
        if soft and not can.logprobs:
            raise ValueError(f"{engine} returns no log-probabilities, so it does not support {kind}; set targets.kind to none")
        if not self.targets.stored.most_likely and not can.every_kind:
            raise ValueError(
                f"{engine} returns only the most likely tokens, so it does not support {kind}, which is drawn from the full "
                "distribution; set targets.kind to topk or none"
            )
        if soft and teacher.tokenizer is None and not self.targets.stored.of_text:
            raise ValueError(f"{kind} needs teacher.tokenizer for its token ids; set it, or set targets.kind to none")
        if teacher.tokenizer is None and self.student.model is None:
            raise ValueError(
                f"{engine} returns text, and there is no tokenizer to store it with; set teacher.tokenizer or student.model"
            )
        if self.targets.online or self.student.prune or self.student.config is not None:
            key = "targets.kind online" if self.targets.online else "student.prune" if self.student.prune else "student.config"
            raise ValueError(f"{key} needs the teacher's weights, which {engine} does not have")
        weights = [name for name in ("own_prompts", "own_tokens") if name in self.eval.model_fields_set]
        if weights and self.eval.own_prompts:
            raise ValueError(
                f"eval.{weights[0]} needs the teacher's weights, which {engine} does not have, to score the models' own text; "
                "remove it"
            )
        if (self.score or self.rounds) and not (teacher.api == "completions" and can.logprobs):
            key = "score" if self.score else "rounds"
            raise ValueError(f"{key} needs a teacher that scores given text; {engine} does only with teacher.api: completions")
        if self.generate.rereads and soft and teacher.api != "completions":
            key = "json_schema" if self.generate.json_schema is not None else "thinking: removed"
            raise ValueError(
                f"generate.{key} with {kind} needs a teacher that scores its text again, which {engine} does only with "
                "teacher.api: completions; set targets.kind to none"
            )
        return self

    @property
    def tokenizer(self) -> tuple[str, str | None, str]:
        """Name and revision of the tokenizer with which the teacher's text is stored, and the key that names it."""
        teacher = self.teacher
        if not teacher.abilities.api:
            return teacher.model, teacher.revision, "teacher.model"
        if teacher.tokenizer is not None:
            return teacher.tokenizer, None, "teacher.tokenizer"
        assert self.student.model is not None
        return self.student.model, self.student.revision, "student.model"

    @model_validator(mode="after")
    def _rounds_have_targets(self) -> "Experiment":
        if self.rounds is None:
            return self
        if not self.targets.stored.columns or self.targets.stored.of_writer:
            raise ValueError(f"rounds needs stored soft targets, but targets.kind is {self.targets.kind}")
        if self.rounds.teacher_share and self.train.mix:
            raise ValueError(
                "rounds.teacher_share and train.mix both set what is mixed into the rows of a round; remove one of them"
            )
        try:
            train = self.train.with_(loss=self.rounds.loss or self.train.loss)
        except ValidationError as error:
            raise ValueError(f"rounds.loss: train.{error.errors()[0]['ctx']['error']}") from None
        own = self.own_targets.stored
        if reason := train.against(own):
            raise ValueError(f"{reason.replace('train.loss', 'rounds.loss')}; {_instead(train)}")
        if own.of_writer and train.position_weights != "uniform":
            raise ValueError(
                f"train.position_weights is {train.position_weights}, but rounds with loss {train.loss} and targets.kind "
                "sampled learn from tokens that the student draws, which cannot give it; set it to uniform, or targets.kind to "
                "topk"
            )
        return self

    @model_validator(mode="after")
    def _a_sample_of_the_writer_is_read(self) -> "Experiment":
        stored = (self.own_targets if self.rounds else self.targets).stored
        if not stored.of_writer:
            return self
        key = f"rounds with loss {self.round_loss} and targets.kind sampled" if self.rounds else f"targets.kind {stored.name}"
        if not self.teacher.abilities.any_token or self.teacher.in_turn:
            raise ValueError(
                f"{key} needs the teacher's probabilities of tokens that the student has drawn. Engines "
                f"{engines_with('any_token')} return them, but not for an ensemble whose members are loaded in turn; "
                "use another engine, or set targets.kind to topk"
            )
        return self

    @model_validator(mode="after")
    def _micro_rounds_fit(self) -> "Experiment":
        if self.rounds and self.rounds.every and (reason := against_micro_rounds(self)):
            raise ValueError(reason)
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

    @property
    def round_loss(self) -> str:
        """Divergence used in the rounds."""
        return (self.rounds and self.rounds.loss) or self.train.loss

    @property
    def own_targets(self) -> Targets:
        """Targets stored on the student's text: a sample of the student's where the teacher's does not determine the loss."""
        drawn = self.targets.stored is Sampled and self.round_loss != "forward_kl"
        return Targets(kind=SampledByStudent.name, n=self.targets.n) if drawn else self.targets

    @property
    def routed(self) -> dict[str, Teacher]:
        """The teachers by name; the name of a single teacher is empty."""
        return self.teachers or {"": self.teacher}

    @property
    def main(self) -> str:
        """Name of the teacher that does the work of a single teacher."""
        return DEFAULT if DEFAULT in self.teachers else next(iter(self.routed))

    @property
    def who(self) -> set[str]:
        """The keys that define the teachers and which rows they get."""
        return {"teacher", "teachers", "route"} if self.teachers else {"teacher"}

    def directory(self, name: Directory) -> Path:
        """Directory of this name in the run; for `student`, that of the last round."""
        return Path(self.output) / (f"rounds/{self.rounds.last}student" if self.rounds and name == "student" else name)

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
        """The dataset that `train` and `eval` read, in the teacher's tokens."""
        return Path(self.train.dataset) if self.train.dataset else self.directory("curated")
