"""The step of `curate` that finds repeated texts."""

import hashlib
from collections.abc import Iterator

import pyarrow as pa

from llmdistill.config.curate import Duplicates
from llmdistill.curation.steps import Check, CurationStep, StepContext, compared
from llmdistill.data.ngrams import normalised


def duplicates(settings: Duplicates, context: StepContext) -> Check:
    """By whether the same text occurred earlier; stores 16 bytes per text, and the number of the row."""
    seen: dict[bytes, str] = {}

    def check(rows: pa.Table) -> Iterator[str | None]:
        for identity, text in zip(rows["id"].to_pylist(), compared(rows, settings.of), strict=True):
            digest = hashlib.sha256(normalised(text).encode(errors="replace")).digest()[:16]
            first = seen.setdefault(digest, identity)
            yield None if first is identity else f"as {first}"

    return check


STEP = CurationStep(duplicates)
