"""What the parts of the configuration have in common: they are strict; and types that more than one of them has."""

import re
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
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
