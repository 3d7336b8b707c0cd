"""What the parts of the configuration have in common: they are strict, and more than one of them names a teacher."""

import re
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "total_variation"]


def _refuse_secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    for name, value in arguments.items():
        if isinstance(value, dict):
            _refuse_secrets(value)
        if re.search(r"(hub|hf|auth|access)_token|^token$|api_key|password|secret", str(name)):
            raise ValueError(f"{name} would be written into run.json; set it in the environment (HF_TOKEN, WANDB_API_KEY, …)")
    return arguments


def _check_store(url: str) -> str:
    # What is wrong with it is said without the URL, which may hold a secret.
    parts = urlsplit(url)
    if parts.scheme == "hf":
        raise ValueError("the Hub makes a commit of every file; upload what is finished with `llmdistill push`")
    if parts.scheme not in ("s3", "gs", "file"):
        raise ValueError("must begin with s3://, gs:// or file:///, where a file is there whole or not at all")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "a URL with a user, a key or options in it; credentials come from the environment or the cloud's own files"
        )
    if bool(parts.netloc) != (parts.scheme != "file") or (parts.scheme == "file" and parts.path.strip("/") == ""):
        raise ValueError("must name a bucket, as s3://BUCKET/PREFIX, or after file:// a path that begins with /")
    return url


PassedOn = Annotated[dict[str, Any], AfterValidator(_refuse_secrets)]
StoreUrl = Annotated[str, AfterValidator(_check_store)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, the docstring under a field is its help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def with_(self, **changes: Any) -> Self:
        """A copy with other values of some keys, checked as if it had been read from a file.

        Raises:
            ValueError: the values do not fit.
        """
        return type(self).model_validate({**{name: getattr(self, name) for name in self.model_fields_set}, **changes})


def check_schema(schema: dict[str, Any] | None) -> None:
    """Refuse what is no JSON schema.

    Raises:
        ValueError: saying why.
    """
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(schema or {})
    except jsonschema.SchemaError as error:
        raise ValueError(f"json_schema is no JSON schema: {error.message}") from None


class Step(Section):
    """One entry of a list of steps: exactly one key, under which its settings stand."""

    @model_validator(mode="after")
    def _one_key(self) -> "Step":
        if len(self.model_fields_set) != 1:
            raise ValueError(f"a step has exactly one key, one of {', '.join(type(self).model_fields)}")
        (name,) = self.model_fields_set
        if getattr(self, name) is None:
            section = type(self).step_types()[name]
            missing = [key for key, field in section.model_fields.items() if field.is_required()]
            if missing:
                raise ValueError(f"the key {name}.{missing[0]} is missing")
            setattr(self, name, section())
        return self

    @model_serializer(mode="wrap")
    def _only_the_key(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.name: dump(self)[self.name]}

    @classmethod
    def step_types(cls) -> dict[str, type[Section]]:
        """What may stand under which key."""
        return {name: get_args(field.annotation)[0] for name, field in cls.model_fields.items()}

    @property
    def name(self) -> str:
        """The step's one key."""
        (name,) = self.model_fields_set
        return name

    @property
    def settings(self) -> Section:
        """What stands under that key."""
        settings: Section = getattr(self, self.name)
        return settings


class Member(Section):
    """One more teacher, with the same tokenizer."""

    model: str
    """Model directory or name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the mean, relative to those of the others."""


class Teacher(Section):
    """The model that writes the text and gives its distribution at every token."""

    model: str
    """Model directory or name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    engine: Literal["vllm", "server", "transformers"] = "vllm"
    """`vllm` for speed; `server` for one that runs already, at `url`; `transformers` is the exact reference, without vLLM."""
    url: str | None = None
    """Where `vllm serve` listens, such as http://node7:8000 (engine server). Its key, if any, is that of VLLM_API_KEY."""
    served_model_name: str | None = None
    """The server's name for the model, if it is another than `model` (engine server)."""
    concurrency: int = Field(default=64, ge=1)
    """Requests on their way at a time (engine server)."""
    timeout: float = Field(default=600, gt=0)
    """Seconds without an answer after which a request is sent again (engine server)."""
    dtype: Dtype = "auto"
    """What it computes in; `auto`: bfloat16 where this machine is good at it, else float16 (GPU) or float32. Workers of one
    dataset compute in what the first of them chose."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest context in tokens, prompt and completion together; the model's own limit if not given."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that hold one copy of the model (engine vllm)."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences decoded together (engine transformers); part of what makes its floating-point results repeatable."""
    engine_args: PassedOn = {}
    """Any argument of `vllm.LLM`, passed through (engine vllm)."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""
    system: str | None = None
    """A system message that the teacher is given in the place of the conversation's own, and the student is not."""
    ensemble: list[Member] = []
    """More teachers with the same tokenizer: the mean of all their distributions is the teacher's (engine transformers)."""
    weight: float = Field(default=1.0, gt=0)
    """The share of `model` in that mean, relative to those of the others."""

    @model_validator(mode="after")
    def _only_one_engine_has_all_of_several_distributions(self) -> "Teacher":
        if self.ensemble and self.engine != "transformers":
            raise ValueError(
                f"an ensemble needs the whole distribution of each teacher, which engine transformers has and {self.engine} has "
                "not; to let one teacher write with vLLM, `generate` first and `score` its dataset with the ensemble"
            )
        return self

    @model_validator(mode="after")
    def _url_goes_with_the_server(self) -> "Teacher":
        if (self.engine == "server") != (self.url is not None):
            raise ValueError("engine server needs url, where `vllm serve` listens, and no other engine has one")
        return self
