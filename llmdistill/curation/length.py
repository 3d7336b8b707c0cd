"""The step of `curate` that counts completion tokens."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmdistill.config.curate import Length
from llmdistill.curation.steps import Check, CurationStep, StepContext


def length(settings: Length, context: StepContext) -> Check:
    """By the number of completion tokens."""
    longest = settings.max_tokens or np.inf

    def check(rows: pa.Table) -> Iterator[str | None]:
        tokens = pc.subtract(pc.list_value_length(rows["input_ids"]), rows["completion_start"])
        for count in tokens.to_pylist():
            yield None if settings.min_tokens <= count <= longest else f"{count:,} tokens"

    return check


STEP = CurationStep(length)
