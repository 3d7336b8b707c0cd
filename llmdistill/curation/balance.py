"""The step of `curate` that counts how many rows of a kind there were before."""

import json
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from llmdistill.config.curate import Balance
from llmdistill.curation.steps import Check, CurationStep, StepContext, excerpt, metadata


def balance(settings: Balance, context: StepContext) -> Check:
    """By how many rows with the same value there were before."""
    seen: Counter[str] = Counter()

    def check(rows: pa.Table) -> Iterator[str | None]:
        for fields in metadata(rows):
            value = json.dumps(fields.get(settings.by), sort_keys=True, ensure_ascii=False)
            if seen[value] < settings.max_rows:
                seen[value] += 1
                yield None
            else:
                yield f"{settings.by} is {excerpt(value)}, of which there are {settings.max_rows:,}"

    return check


STEP = CurationStep(balance)
