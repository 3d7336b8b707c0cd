"""Soft targets: what is kept of the teacher's distribution at each completion token; one class per kind.

Shape suffixes used across the package: `B` batch, `T` tokens, `N` completion tokens, `K` targets per position,
`V` vocabulary. Log-probabilities are natural logarithms (nats) of the teacher's own distribution at temperature 1.
The columns are described in docs/dataset.md.
"""

from collections.abc import Sequence

from llmdistill.data.targets.base import MemberTokens, SoftTargets
from llmdistill.data.targets.checks import ROUNDED_UP, row_of, wrong_row
from llmdistill.data.targets.chunks import Chunks
from llmdistill.data.targets.columns import Array, list_array, list_column
from llmdistill.data.targets.multinomial import Multinomial
from llmdistill.data.targets.sampled import Sampled
from llmdistill.data.targets.sampled_by_student import SampledByStudent
from llmdistill.data.targets.sampled_logprobs import SampledLogprobs
from llmdistill.data.targets.text_only import TextOnly
from llmdistill.data.targets.topk import TopK

__all__ = [
    "KINDS",
    "ROUNDED_UP",
    "Array",
    "Chunks",
    "MemberTokens",
    "Multinomial",
    "Sampled",
    "SampledByStudent",
    "SampledLogprobs",
    "SoftTargets",
    "TextOnly",
    "TopK",
    "kind_of",
    "list_array",
    "list_column",
    "row_of",
    "wrong_row",
]

KINDS: dict[str, type[SoftTargets]] = {
    kind.name: kind for kind in (Sampled, SampledLogprobs, SampledByStudent, Multinomial, TopK, TextOnly, Chunks)
}
"""By name. A new kind is a module of this package and its entry here."""


def kind_of(columns: Sequence[str]) -> type[SoftTargets]:
    """The kind of soft targets of a dataset with these columns."""
    there = [kind for kind in KINDS.values() if set(kind.columns) <= set(columns)]
    return max(there, key=lambda kind: len(kind.columns))
