"""The step of `curate` that checks an answer against a JSON schema."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmdistill.config.curate import JsonSchema
from llmdistill.curation.steps import Check, CurationStep, StepContext, answers, excerpt
from llmdistill.errors import InputError
from llmdistill.runs.record import file_input, read_json

_FENCED = re.compile(r"^(```+|~~~+)[^\n]*\n(.*?)^\1[`~]*\s*$", re.DOTALL | re.MULTILINE)


def inputs(settings: JsonSchema, key: str) -> dict[str, str]:
    """The schema.

    Raises:
        InputError: it is missing, or no JSON schema.
    """
    found = file_input(settings.file, f"{key}.file")
    _validator(settings.file)
    return found


def json_schema(settings: JsonSchema, context: StepContext) -> Check:
    """By a JSON schema; nothing that the schema refers to is fetched."""
    from referencing.exceptions import Unresolvable

    validator = _validator(settings.file)

    def check(rows: pa.Table) -> Iterator[str | None]:
        for answer in answers(rows):
            try:
                error = next(validator.iter_errors(_read_json(answer)), None)
            except (ValueError, RecursionError) as problem:
                yield f"no JSON: {problem}"
                continue
            except Unresolvable as problem:
                raise InputError(
                    f"{settings.file}: refers to {problem.ref}, which is not in the file; references are not fetched"
                ) from None
            yield excerpt(f"{error.json_path}: {error.message}", 200) if error else None

    return check


def _validator(file: str) -> Any:
    """What checks JSON against the schema in a file."""
    import jsonschema
    from referencing import Registry

    schema = read_json(Path(file))
    if not isinstance(schema, dict | bool):
        raise InputError(f"{file}: no JSON schema: it must be an object")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"{file}: not a valid JSON schema: {error.message}") from None
    return kind(schema, registry=Registry())


def _read_json(answer: str) -> Any:
    """The answer as JSON, or the content of its one fenced block."""
    blocks = _FENCED.findall(answer)
    return json.loads(blocks[0][1] if len(blocks) == 1 else answer, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


STEP = CurationStep(json_schema, inputs)
