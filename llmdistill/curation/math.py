"""The step of `curate` that compares the final answer with the expected one, by math-verify."""

from collections.abc import Iterator

import pyarrow as pa

from llmdistill.config.curate import Math
from llmdistill.curation.steps import Check, CurationStep, Failed, StepContext, final_answers, metadata
from llmdistill.curation.verify import Workers


def math(settings: Math, context: StepContext) -> Check:
    """By whether the last formula or number of the answer equals the expected one."""
    workers = Workers(settings.timeout_s, {"check": "math", "expected": "1", "text": "1"}, context)
    missing = Failed(f"has no {settings.answer}") if settings.without == "fail" else None

    def check(rows: pa.Table) -> Iterator[str | None]:
        expected = [fields.get(settings.answer) for fields in metadata(rows)]
        verdicts = workers.ask(
            {"check": "math", "expected": str(value), "text": answer}
            for value, answer in zip(expected, final_answers(rows, context.experiment), strict=True)
            if value is not None
        )
        return (missing if value is None else next(verdicts) for value in expected)

    return check


STEP = CurationStep(math, libraries={"math_verify": "curate"})
