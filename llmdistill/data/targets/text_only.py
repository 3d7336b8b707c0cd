"""Soft targets of kind `none`: the dataset contains only text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmdistill.data.targets.base import MemberTokens, SoftTargets
from llmdistill.data.targets.columns import Array

if TYPE_CHECKING:
    from torch import Tensor


class TextOnly(SoftTargets):
    """Describes the kind; as nothing is kept, it has no instances and nothing to encode or learn from."""

    name = "none"
    summary = "text only"
    columns = ()
    most_likely = True

    @classmethod
    def keep(cls, logprobs_NV: "Tensor", n: int, uniform_NU: "Tensor") -> "Tensor":
        from llmdistill.data.targets import draw

        return draw.most_likely(logprobs_NV, n)

    @classmethod
    def from_kept(cls, ids_NK: Array, logprobs_NK: Array) -> None:
        return None

    @classmethod
    def mix(cls, members: MemberTokens, n: int, uniform_NU: Array) -> None:
        return None

    @classmethod
    def sentence(cls, described: Mapping[str, Any]) -> str:
        return "none, the text only"
