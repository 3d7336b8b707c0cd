"""The strict base class of all sections of the configuration, and types that several of them use."""

import ast
import inspect
import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
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
Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "total_variation", "neg_log_acceptance"
]


_SECRET = re.compile(
    r"(hub|hf|auth|access)[_-]token|^-*token$|api[_-]?key|password|passwd|secret|credential|authorization|cookie", re.IGNORECASE
)


def _refuse_secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    _look_for_secrets(arguments)
    return arguments


def _look_for_secrets(value: Any) -> None:
    """Refuse keys named like a secret, at any depth, and addresses with a password; the message does not contain it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_name(str(name))
            _look_for_secrets(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            if isinstance(inner, str) and inner.startswith("-"):  # a flag, with its value or before it
                _check_name(inner.partition("=")[0])
            _look_for_secrets(inner)
    elif isinstance(value, str) and re.search(r"://[^/\s]*@", value):
        raise ValueError("an address with a user or a password would be written to run.json; set them in the environment")


def is_secret(name: str) -> bool:
    """Whether a field of this name would hold a secret."""
    return _SECRET.search(name) is not None


def without_secrets(value: Any) -> Any:
    """The value with None instead of anything named like a secret, at any depth."""
    if isinstance(value, Mapping):
        return {name: None if is_secret(str(name)) else without_secrets(inner) for name, inner in value.items()}
    return [without_secrets(inner) for inner in value] if isinstance(value, list | tuple) else value


def _check_name(name: str) -> None:
    if is_secret(name):
        raise ValueError(f"{name} would be written to run.json; set it in the environment (HF_TOKEN, WANDB_API_KEY, …)")


def _check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or any(character.isspace() for character in url):
        raise ValueError("must be an address such as http://node7:8000")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must not contain a user, a key or options; an API key is read from the environment (VLLM_API_KEY, …)")
    return url


def _check_store(url: str) -> str:
    # Messages do not contain the URL, which may hold a secret.
    parts = urlsplit(url)
    if parts.scheme == "hf":
        raise ValueError("the Hub would need a commit for every file; upload finished results with `llmdistill push`")
    if parts.scheme not in ("s3", "gs", "file"):
        raise ValueError("must begin with s3://, gs:// or file:///")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "must not contain a user, a key or options; credentials are read from the environment or the cloud's own files"
        )
    if bool(parts.netloc) != (parts.scheme != "file") or (parts.scheme == "file" and parts.path.strip("/") == ""):
        raise ValueError("must name a bucket, such as s3://BUCKET/PREFIX, or an absolute path, such as file:///PATH")
    return url


PassedOn = Annotated[dict[str, Any], AfterValidator(_refuse_secrets)]
ServerUrl = Annotated[str, AfterValidator(_check_url)]
StoreUrl = Annotated[str, AfterValidator(_check_store)]


class Empty(dict[str, Any]):
    """The value of a key that has none in the file: all defaults for a section, null for anything else."""


def _without_empty(value: Any) -> Any:
    """The value with None instead of `Empty`, at any depth."""
    if isinstance(value, Empty):
        return None
    if isinstance(value, dict):
        return {key: _without_empty(inner) for key, inner in value.items()}
    return [_without_empty(inner) for inner in value] if isinstance(value, list) else value


def _holds_sections(annotation: Any) -> bool:
    """Whether values of a type are or contain sections."""
    if isinstance(annotation, type) and not get_args(annotation):
        return issubclass(annotation, Section)
    return any(_holds_sections(inner) for inner in get_args(annotation))


class Section(BaseModel):
    """A section of the configuration. Unknown keys are errors; the docstring below a field is its help text."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_sections_may_be_empty(cls, tree: Any) -> Any:
        """Read a key without a value as null if it is not a section and may be null: `limit:` means no limit."""
        if not isinstance(tree, dict):
            return tree
        kept = dict(tree)
        for name, value in tree.items():
            field = cls.model_fields.get(name)
            if field is None or _holds_sections(field.annotation):
                continue
            if isinstance(value, Empty) and (field.default is None or field.annotation is Any):
                kept[name] = None
            elif not isinstance(value, Empty):
                kept[name] = _without_empty(value)
        return kept

    def with_(self, **changes: Any) -> Self:
        """A copy with some keys changed, validated as if it had been read from a file.

        Raises:
            ValueError: if the values are invalid.
        """
        return type(self).model_validate({**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    @classmethod
    @cache
    def help_texts(cls) -> dict[str, str]:
        """The description of each field, or the docstring below it, on one line.

        Read on demand: pydantic's `use_attribute_docstrings` does it at import, which takes seconds if many modules are
        loaded.
        """
        texts = {name: field.description for name, field in cls.model_fields.items() if field.description}
        for base in reversed(cls.__mro__):
            if not issubclass(base, Section) or base.__pydantic_generic_metadata__["origin"]:
                continue  # a generic class with its parameters filled in has no source of its own
            (definition,) = ast.parse(inspect.getsource(base)).body
            for field, text in pairwise(definition.body):  # type: ignore[attr-defined]
                match field, text:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        texts[name] = " ".join(text.split())
        return texts


def check_schema(schema: dict[str, Any] | None) -> None:
    """Check that a schema is valid.

    Raises:
        ValueError: if it is not a JSON schema, or contains words that YAML has read as booleans.
    """
    import jsonschema

    try:
        jsonschema.Draft202012Validator.check_schema(schema or {})
    except jsonschema.SchemaError as error:
        raise ValueError(f"json_schema is not a valid JSON schema: {error.message}") from None
    _refuse_booleans(schema)


def _refuse_booleans(schema: Any) -> None:
    """Refuse booleans among the values of a string: YAML reads some unquoted words as such."""
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _refuse_booleans(inner)
    if isinstance(schema, dict) and schema.get("type") == "string":
        for value in (*schema.get("enum", ()), schema.get("const")):
            if isinstance(value, bool):
                raise ValueError(f"json_schema allows {str(value).lower()} for a string; quote words such as yes, no, on and off")


class Step(Section):
    """One entry of a list of steps: exactly one key, the step's name, with its settings."""

    @model_validator(mode="after")
    def _one_key(self) -> "Step":
        if len(self.model_fields_set) != 1:
            raise ValueError(f"a step has exactly one key: one of {', '.join(type(self).model_fields)}")
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
        """The settings class of each step, by name."""
        return {name: get_args(field.annotation)[0] for name, field in cls.model_fields.items()}

    @property
    def name(self) -> str:
        """Name of the step, which is its only key."""
        (name,) = self.model_fields_set
        return name

    @property
    def settings(self) -> Section:
        """The step's settings."""
        settings: Section = getattr(self, self.name)
        return settings
