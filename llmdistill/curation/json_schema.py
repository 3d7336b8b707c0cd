"""The step of `curate` that checks an answer against a JSON schema."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from llmdistill.config.curate import JsonSchema
from llmdistill.config.shipped import find
from llmdistill.curation.steps import Check, CurationStep, StepContext, excerpt, final_answers
from llmdistill.runs.files import read_json
from llmdistill.runs.inputs import file_input
from llmdistill.tasks.answers import problem, read_answer, validator_of


def inputs(settings: JsonSchema, key: str) -> dict[str, str]:
    """The schema.

    Raises:
        InputError: if it is missing, or not a JSON schema.
    """
    found = file_input(settings.file, f"{key}.file")
    _validator(settings.file)
    return found


def json_schema(settings: JsonSchema, context: StepContext) -> Check:
    """By a JSON schema; references in the schema are not fetched."""
    validator = _validator(settings.file)

    def check(rows: pa.Table) -> Iterator[str | None]:
        for answer in final_answers(rows, context.experiment):
            try:
                value = read_answer(answer)
            except ValueError as error:
                yield f"not JSON: {error}"
                continue
            found = problem(validator, value, settings.file)
            yield found and excerpt(found, 200)

    return check


def _validator(file: str) -> Any:
    """The validator for the schema in a file."""
    return validator_of(read_json(find(file)), file)


STEP = CurationStep(json_schema, inputs)
