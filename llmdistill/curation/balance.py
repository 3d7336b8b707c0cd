"""The step of `curate` that limits the number of rows per value."""

import json
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from llmdistill.config.curate import Balance
from llmdistill.curation.steps import Check, CurationStep, StepContext, excerpt, metadata


def balance(settings: Balance, context: StepContext) -> Check:
    """By the number of earlier rows with the same value."""
    seen: Counter[str] = Counter()

    def check(rows: pa.Table) -> Iterator[str | None]:
        for fields in metadata(rows):
            value = json.dumps(fields.get(settings.by), sort_keys=True, ensure_ascii=False)
            if seen[value] < settings.max_rows:
                seen[value] += 1
                yield None
            else:
                yield f"{settings.by} is {excerpt(value)}, of which {settings.max_rows:,} are kept"

    return check


STEP = CurationStep(balance)
