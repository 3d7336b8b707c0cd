"""The section `targets` of the experiment."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from llmdistill.config.section import Section
from llmdistill.data.targets import KINDS, SoftTargets, TextOnly

_ONLINE = "online"  # the one value that is not a kind of stored targets
_SUMMARIES = {name: kind.summary for name, kind in KINDS.items()}
_SUMMARIES[_ONLINE] = "nothing; the teacher runs during training"
if TYPE_CHECKING:
    Kind = str  # the names are known only at run time
else:
    Kind = Literal[tuple(_SUMMARIES)]


class Targets(Section):
    """What is stored of the teacher's next-token distribution at each completion token."""

    kind: Kind = Field(default="sampled", description=" ".join(f"`{name}`: {summary}." for name, summary in _SUMMARIES.items()))
    n: int = Field(default=16, ge=2, le=255)
    """Tokens per position: the number kept (kinds sampled, sampled_logprobs) or drawn (kind multinomial, which needs about
    three times as many)."""
    k: int = Field(default=64, ge=1)
    """Tokens kept per position (kind topk)."""

    @model_validator(mode="after")
    def _sizes_are_of_the_kind(self) -> "Targets":
        for name in ("n", "k"):
            if name in self.model_fields_set and name != self.stored.size:
                kinds = ", ".join(kind for kind, stored in KINDS.items() if stored.size == name)
                raise ValueError(f"{name} has no effect with kind {self.kind}, only with {kinds}; remove it, or change kind")
        return self

    @property
    def online(self) -> bool:
        """Whether the teacher runs during training."""
        return self.kind == _ONLINE

    @property
    def stored(self) -> type[SoftTargets]:
        """The kind of targets that the dataset stores."""
        return KINDS[TextOnly.name if self.online else self.kind]

    @property
    def kept(self) -> int:
        """Tokens kept per position, for any kind."""
        return getattr(self, self.stored.size) if self.stored.size else 0
