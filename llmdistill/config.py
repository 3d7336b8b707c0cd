"""The experiment: one YAML file, a section a stage, checked strictly before anything runs.

Nothing here imports torch, transformers or vLLM, so that a configuration can be read and shown on any machine.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from llmdistill.config_curate import CurateStep
from llmdistill.config_eval import WinRate
from llmdistill.config_export import Export
from llmdistill.config_jobs import Jobs, Watch
from llmdistill.config_prompts import Prompts as Prompts
from llmdistill.config_prompts import Sampling
from llmdistill.config_refresh import Refresh
from llmdistill.config_rounds import Rounds, as_section
from llmdistill.config_student import ORIGINS, Student
from llmdistill.config_train import Train as Train
from llmdistill.errors import InputError
from llmdistill.section import Section as Section
from llmdistill.section import Step, StoreUrl, check_schema
from llmdistill.section import Teacher as Teacher


class Generate(Sampling):
    """How the teacher writes."""

    samples: int = Field(default=1, ge=1)
    """Completions a prompt."""
    min_tokens: int = Field(default=0, ge=0)
    """Tokens before which no completion ends."""
    json_schema: dict[str, Any] | None = None
    """A JSON schema that every completion follows, by vLLM's grammar. The targets are read afterwards, without the grammar."""
    thinking: Literal["kept", "masked", "removed"] = "kept"
    """What becomes of a reasoning trace: `kept`, learned as the rest; `masked`, not learned but before the answer's eyes;
    `removed`, and the teacher reads the answer alone after the prompt."""
    thinking_end: str = Field(default="</think>", min_length=1)
    """Where a reasoning trace ends and the answer begins."""
    rows_per_shard: int = Field(default=1024, ge=1)
    """Rows in one Parquet shard, the unit of work and of resuming."""

    @property
    def shows_everything(self) -> bool:
        """Whether every text can come out, so that sampled ones can stand for the teacher's at temperature 1."""
        whole = self.min_tokens == 0 and self.json_schema is None and self.thinking == "kept"
        return whole and self.temperature > 0 and self.top_p == 1 and self.top_k == 0

    @property
    def unused(self) -> set[str]:
        """Fields of what is not asked for, which need not be said of a dataset."""
        fields = ("min_tokens", "json_schema", "thinking")
        left = {name for name in fields if getattr(self, name) == type(self).model_fields[name].default}
        return left | ({"thinking_end"} if self.thinking == "kept" else set())

    @property
    def rereads(self) -> bool:
        """Whether what is stored has to be read again, because the teacher wrote it seeing something else."""
        return self.json_schema is not None or self.thinking == "removed"

    @model_validator(mode="after")
    def _lengths_fit(self) -> "Generate":
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens:,}, more than max_tokens {self.max_tokens:,}")
        if self.json_schema is not None and self.thinking != "kept":
            raise ValueError("json_schema begins with the first token, so there is no thinking to be masked or removed")
        check_schema(self.json_schema)
        return self


class Score(Section):
    """Finished text that the teacher reads instead of writing any; `run` scores where this section is given."""

    source: str
    """A JSONL file whose lines hold `messages` up to and with the assistant's answer, or `prompt` and `completion`; or the
    directory of a dataset, whose exact token ids are read again. Lines that hold `text` alone are learned from their second
    token on."""
    turns: Literal["last", "all"] = "last"
    """Which of the assistant's turns are learned: `all` are rows of their own, each with what came before it as its prompt."""
    tool_calls: bool = True
    """Whether turns that call a tool are learned; where they are not, they still stand before others."""


class Targets(Section):
    """What is kept of the teacher's distribution at each completion token."""

    kind: Literal["sampled", "multinomial", "topk", "none", "online"] = "sampled"
    """`sampled`: an unbiased sample of n tokens. `multinomial`: n independent draws. `topk`: the k most likely and the mass
    outside. `none`: the text only. `online`: nothing stored, the whole distribution of a teacher that runs beside the student."""
    n: int = Field(default=16, ge=2, le=255)
    """Tokens kept a position (kind sampled), or drawn (kind multinomial, which needs about three times as many)."""
    k: int = Field(default=64, ge=1)
    """Tokens kept a position (kind topk)."""

    @property
    def kept(self) -> int:
        """Tokens kept a position, whatever the kind."""
        return {"sampled": self.n, "multinomial": self.n, "topk": self.k}.get(self.kind, 0)

    @property
    def stored(self) -> Literal["sampled", "multinomial", "topk", "none"]:
        """The kind that a dataset holds."""
        return "none" if self.kind == "online" else self.kind

    @property
    def described(self) -> dict[str, Any]:
        """What a dataset says of its targets: what is kept, whether it is unbiased, and how far a stored value may be off."""
        half_precision = {"relative_error": 2**-11}  # of a log-probability in float16
        kept: dict[str, dict[str, Any]] = {
            "sampled": {"n": self.n, "unbiased": True, **half_precision},
            "multinomial": {"n": self.n, "unbiased": True, "relative_error": 0},
            "topk": {"k": self.k, "unbiased": False, **half_precision},
        }
        return {"kind": self.stored, **kept.get(self.stored, {})}


class Eval(Section):
    """How the student is measured against the teacher, on rows held out of training."""

    held_out: float = Field(default=0.05, ge=0, lt=1)
    """Share of the prompts that `curate` keeps out of training; with 0 there is nothing for `eval` to measure on."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences in one forward pass."""
    resamples: int = Field(default=2000, ge=100)
    """Bootstrap resamples behind every interval."""
    samples: int = Field(default=4, ge=0)
    """Held-out prompts that every model answers for the report."""
    sample_tokens: int = Field(default=64, ge=1)
    """Length of those answers, and of the decoding that is timed."""
    own_prompts: int = Field(default=24, ge=0)
    """Held-out prompts that every model answers by sampling, to be measured on its own text; 0 leaves it out."""
    own_tokens: int = Field(default=64, ge=1)
    """Where such an answer is cut."""
    speed: Literal["transformers", "vllm"] = "transformers"
    """The engine in which models are timed, here and by `export`: `vllm` as they will be served, reading and memory included, for
    a start of vLLM each."""
    tasks: list[str] = []
    """Tasks for every model: YAML files in lm-eval's format, as in configs/tasks, or names of lm-eval's own, whose data is on the
    Hub."""
    task_limit: int | None = Field(default=None, ge=2)
    """The first items of each task only."""
    win_rate: WinRate | None = None
    """Let a judge compare the student's answers with another model's."""


Directory = Literal["prompts", "data", "curated", "student-before", "student", "student-text-only", "eval", "export", "judge"]


class Experiment(Section):
    """One experiment: one YAML file with a section a stage."""

    output: str
    """Directory that receives what every stage writes."""
    store: StoreUrl | None = None
    """A copy of `output` that outlives the machine, at s3://BUCKET/PREFIX, gs://… or file:///…; docs/stores.md."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling, splitting, training and bootstrap."""
    shard_mb: float = Field(default=256, gt=0)
    """Size of the shards that `curate` writes, in megabytes."""
    teacher: Teacher
    prompts: Prompts | None = None
    generate: Generate = Generate()
    score: Score | None = None
    targets: Targets = Targets()
    curate: list[CurateStep] = Field(default=[], max_length=100)
    """Steps, applied in this order; docs/curation.md shows each."""
    student: Student = Student()
    train: Train = Train()
    rounds: Annotated[Rounds | None, BeforeValidator(as_section)] = None
    refresh: Refresh | None = None
    eval: Eval = Eval()
    export: Export | None = None
    jobs: Jobs | None = None
    watch: Watch = Watch()

    @model_validator(mode="after")
    def _loss_fits_the_targets(self) -> "Experiment":
        reason = self.train.against(self.targets.kind)
        if reason and self.train.dataset is None:
            raise ValueError(f"{reason}; set targets.kind to topk")
        if self.teacher.engine == "server" and self.targets.kind == "multinomial":
            raise ValueError("a server names each token once, so it cannot give targets.kind multinomial; use sampled or topk")
        if self.teacher.engine == "transformers" and self.generate.json_schema is not None:
            raise ValueError("generate.json_schema needs a grammar, which teacher.engine vllm and server have")
        return self

    @model_validator(mode="after")
    def _rounds_have_targets(self) -> "Experiment":
        if self.rounds and self.targets.kind in ("none", "online"):
            raise ValueError(f"rounds needs stored targets, and targets.kind is {self.targets.kind}")
        loss = self.rounds and self.rounds.loss
        if loss and (reason := self.train.model_copy(update={"loss": loss}).against(self.targets.kind)):
            raise ValueError(f"{reason.replace('train.loss', 'rounds.loss')}; set targets.kind to topk")
        return self

    @model_validator(mode="after")
    def _traces_without_an_answer_go(self) -> "Experiment":
        if self.generate.thinking != "kept" and not any(step.finish_reason for step in self.curate):
            raise ValueError(
                f"generate.thinking is {self.generate.thinking}: a trace that does not end leaves no answer, and only "
                "the step finish_reason in curate takes such rows away"
            )
        return self

    @model_validator(mode="after")
    def _layers_need_a_teacher(self) -> "Experiment":
        for name in ("hidden", "attention"):
            if getattr(self.train, name) is not None and self.targets.kind != "online":
                raise ValueError(f"train.{name} needs the teacher beside the student; set targets.kind to online")
        if self.train.fake_quantize and self.student.lora:
            raise ValueError("train.fake_quantize rounds the weights that train, and lora trains others; remove one of them")
        if self.train.attention and self.student.attn_implementation not in (None, "eager"):
            raise ValueError("train.attention needs eager attention, which is set for it; remove student.attn_implementation")
        return self

    def directory(self, name: Directory) -> Path:
        """Where a stage writes; the student is that of the last round."""
        return Path(self.output) / (f"rounds/{self.rounds.n}/{name}" if self.rounds and name == "student" else name)

    @property
    def first_student(self) -> Path:
        """The student that has learned from the teacher's text alone, where rounds follow."""
        return Path(self.output) / "student"

    @property
    def mixed_datasets(self) -> list[Path]:
        """The directories of `train.mix`."""
        return [Path(directory) for directory in self.train.mix.datasets] if self.train.mix else []

    @property
    def dataset_directory(self) -> Path:
        """Where `train` and `eval` read."""
        return Path(self.train.dataset) if self.train.dataset else self.directory("curated")


def overrides_of(rest: list[str]) -> list[tuple[str, str]]:
    """Pairs of dotted key and value from `--key value` and `--key=value`."""
    pairs = []
    words = iter(rest)
    for word in words:
        if not word.startswith("--") or len(word) == 2:
            raise InputError(f"unexpected argument {word}; an override is --KEY VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise InputError(f"--{key} needs a value")
            value = following
        pairs.append((key, value))
    return pairs


def load_experiment(file: Path, overrides: Sequence[tuple[str, str]] = ()) -> Experiment:
    """The experiment in `file` with dotted overrides applied: `("train.alpha", "0.5")`, the value read as YAML.

    Raises:
        InputError: naming the file and the key.
    """
    tree = read_yaml(file)
    for key, value in overrides:
        try:
            _set(tree, key.split("."), yaml.load(value, Loader=_Loader))
            origin = key.split(".")[1] if key.startswith("student.") else None
            if origin in ORIGINS:  # they are alternatives: one on the command line replaces another in the file
                tree["student"] = {name: kept for name, kept in tree["student"].items() if name == origin or name not in ORIGINS}
        except (yaml.YAMLError, LookupError, TypeError, ValueError):
            raise InputError(f"{file}: cannot set {key} to {value!r}") from None
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(f"{file}: {explain(detail)}" for detail in error.errors())) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        with file.open(encoding="utf-8") as stream:
            tree = yaml.load(stream, Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file}: must hold a mapping of keys to values")
    return tree


def keys(section: type[Section] = Experiment, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of the configuration with its type and its help, in the order of the file."""
    for name, field in section.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type) and issubclass(t, Section)]
        if inner and issubclass(inner[0], Step):
            yield f"{prefix}{name}", "LIST", field.description or ""
            for step, settings in inner[0].step_types().items():
                yield from keys(settings, f"{prefix}{name}.N.{step}.")
        elif inner and get_origin(field.annotation) is list:
            yield f"{prefix}{name}", "LIST", field.description or ""
            yield from keys(inner[0], f"{prefix}{name}.N.")
        elif inner:
            yield from keys(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _type_name(field.annotation), _with_default(field)


def _with_default(field: Any) -> str:
    description = (field.description or "").replace("\n", " ")
    if field.is_required():
        return f"{description} (required)"
    return description if field.default in (None, {}, []) else f"{description} (default {field.default})"


def _type_name(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):  # what else is asked of the value is not its type
        return _type_name(annotation.__origin__)
    values = [v for v in get_args(annotation) if v is not type(None)]
    if getattr(annotation, "__origin__", None) is Literal:
        return "|".join(str(v) for v in values)
    if getattr(annotation, "__origin__", None) in (list, dict):
        return str(annotation.__origin__.__name__).upper()
    return "|".join(_type_name(v) for v in values) if values else str(annotation.__name__).upper()


def _set(tree: Any, path: list[str], value: Any) -> None:
    """Set a dotted key; sections that are not there yet are made, list items are addressed by number."""
    *parents, last = path
    for part in parents:
        if isinstance(tree, list):
            tree = tree[int(part)]
        else:
            if tree.get(part) is None:
                tree[part] = {}
            tree = tree[part]
    if isinstance(tree, list):
        tree[int(last)] = value
    else:
        tree[last] = value


def explain(detail: Any) -> str:
    """One validation error as a sentence that names the key."""
    key = ".".join(str(part) for part in detail["loc"] if not _is_type_label(part))
    if detail["type"] == "extra_forbidden":
        known = [name for name, _, _ in keys()]
        known += sorted({prefix for name in known for prefix in _prefixes(name)})
        near = difflib.get_close_matches(re.sub(r"\.\d+\.", ".N.", key), known, n=1, cutoff=0.75)
        hint = f"; did you mean {near[0]}?" if near else ""
        if not near and key.startswith("train."):
            hint = f"; arguments of trl.SFTConfig go under train.args (train.args.{key.removeprefix('train.')})"
        return f"no such key {key}{hint}"
    if detail["type"] == "missing":
        return f"the key {key} is missing"
    if detail["type"] == "value_error":
        return f"{key + ': ' if key else ''}{detail['ctx']['error']}"
    message = detail["msg"].removeprefix("Input ")
    return f"{key} {message}, got {detail['input']!r}"


def _is_type_label(part: Any) -> bool:
    """Pydantic puts the branch of a union into the location (`int`, `list[int]`); that is no key of ours."""
    return isinstance(part, str) and bool(re.fullmatch(r"(int|str|float|bool|none|(list|literal)\[.*\])", part))


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader; `1e-4` is a number, as in YAML 1.2, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice: the later one would win in silence."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)
