"""The step of `curate` that searches for a regular expression."""

from collections.abc import Iterator

import pyarrow as pa
import regex

from llmdistill.config.curate import Regex
from llmdistill.curation.steps import Check, CurationStep, Failed, StepContext, answers, excerpt

_SECONDS = 1.0  # for one regular expression on one row


def by_regex(settings: Regex, context: StepContext) -> Check:
    """By whether a regular expression is found in the answer; one that takes too long has failed."""
    pattern = regex.compile(settings.pattern)

    def check(rows: pa.Table) -> Iterator[str | None]:
        for answer in answers(rows):
            try:
                match = pattern.search(answer, timeout=_SECONDS)
            except TimeoutError:
                yield Failed(f"took more than {_SECONDS:g} s")
                continue
            if settings.keep == "matching":
                yield None if match else "no match"
            else:
                yield excerpt(match[0]) or "matches" if match else None

    return check


STEP = CurationStep(by_regex)
