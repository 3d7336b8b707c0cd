"""The step of `curate` that finds repeated token n-grams and lines in an answer."""

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from llmdistill.config.curate import Repetition
from llmdistill.curation.steps import Array, Check, CurationStep, StepContext, answers, completion_ids

_LIST_MARKER = re.compile(r"^\s*(?:[-*+•#>|]+|\(?\d+[.):])\s+")


def repetition(settings: Repetition, context: StepContext) -> Check:
    """By token n-grams and lines that occur earlier in the completion."""

    def check(rows: pa.Table) -> Iterator[str | None]:
        for ids, answer in zip(completion_ids(rows), answers(rows), strict=True):
            ngrams, lines = repeated_share(ids, settings.ngram), repeated_line_share(answer)
            if ngrams > settings.max_share:
                yield f"{ngrams:.0%} of its {settings.ngram}-grams are repeats"
            elif lines > settings.max_line_share:
                yield f"{lines:.0%} of it in repeated lines"
            else:
                yield None

    return check


def repeated_share(ids: Array, ngram: int) -> float:
    """The share of n-grams that occur earlier in the sequence; 0 if there are none."""
    if len(ids) < ngram:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(ids, ngram)
    return 1 - len(np.unique(windows, axis=0)) / len(windows)


def repeated_line_share(text: str) -> float:
    """The share of a text's characters in lines that occur earlier, ignoring case, spaces, bullets and numbers."""
    seen: set[str] = set()
    repeated = total = 0
    for line in text.splitlines():
        plain = " ".join(_LIST_MARKER.sub("", line).casefold().split())
        total += len(plain)
        repeated += len(plain) if plain in seen else 0
        seen.add(plain)
    return repeated / total if total else 0.0


STEP = CurationStep(repetition)
