"""The step of `curate` that checks an answer against a JSON schema."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmdistill.config.curate import JsonSchema
from llmdistill.curation.steps import Check, Work, answers, excerpt
from llmdistill.errors import InputError
from llmdistill.runs.record import read_json

_FENCED = re.compile(r"^(```+|~~~+)[^\n]*\n(.*?)^\1[`~]*\s*$", re.DOTALL | re.MULTILINE)


def json_schema(settings: JsonSchema, work: Work) -> Check:
    """By a JSON schema; nothing that the schema refers to is fetched."""
    import jsonschema
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    schema = read_json(Path(settings.file))
    if schema is None:
        raise InputError(f"{settings.file}: no such file ({work.key}.file)")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"{settings.file}: no JSON schema: {error.message}") from None
    validator = kind(schema, registry=Registry())

    def check(rows: pa.Table) -> Iterator[str | None]:
        for answer in answers(rows):
            try:
                error = next(validator.iter_errors(_read_json(answer)), None)
            except (ValueError, RecursionError) as problem:
                yield f"no JSON: {problem}"
                continue
            except Unresolvable as problem:
                raise InputError(f"{settings.file}: refers to {problem.ref}, which is not in it; nothing is fetched") from None
            yield excerpt(f"{error.json_path}: {error.message}", 200) if error else None

    return check


def _read_json(answer: str) -> Any:
    """The answer as JSON, or the content of its one fenced block."""
    blocks = _FENCED.findall(answer)
    return json.loads(blocks[0][1] if len(blocks) == 1 else answer, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
