"""The step of `curate` that parses the Python code of an answer."""

import re
from collections.abc import Iterator

import pyarrow as pa

from llmdistill.config.curate import Python
from llmdistill.curation.steps import Check, CurationStep, StepContext, final_answers
from llmdistill.curation.verify import Workers

_FENCED_PYTHON = re.compile(
    r"^([ \t]*)(```+|~~~+)[ \t]*(?:python3?|py)(?![\w-])[^\n]*\n(.*?)^[ \t]*\2", re.DOTALL | re.MULTILINE | re.IGNORECASE
)


def python(settings: Python, context: StepContext) -> Check:
    """By whether every block of Python in the answer parses."""
    workers = Workers(settings.timeout_s, {"check": "python", "code": ""}, context)

    def check(rows: pa.Table) -> Iterator[str | None]:
        blocks = [
            python_blocks(answer) or ([answer] if settings.unfenced == "parse" else [])
            for answer in final_answers(rows, context.experiment)
        ]
        verdicts = workers.ask({"check": "python", "code": code} for row in blocks for code in row)
        for row in blocks:
            of_row = [next(verdicts) for _ in row]
            yield next((verdict for verdict in of_row if verdict is not None), None)

    return check


def python_blocks(answer: str) -> list[str]:
    """The code in the fenced blocks that say they are Python, without the fence's own indentation."""
    return [
        "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
        for indent, _, code in _FENCED_PYTHON.findall(answer)
        if not code.lstrip().startswith(">>>")  # a session, not a program
    ]


STEP = CurationStep(python)
