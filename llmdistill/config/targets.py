"""The section `targets` of the experiment."""

from typing import Any, Literal

from pydantic import Field

from llmdistill.config.section import Section


class Targets(Section):
    """What is kept of the teacher's distribution at each completion token."""

    kind: Literal["sampled", "multinomial", "topk", "none", "online"] = "sampled"
    """`sampled`: an unbiased sample of n tokens. `multinomial`: n independent draws. `topk`: the k most likely and the mass
    outside. `none`: the text only. `online`: nothing stored, the whole distribution of a teacher that runs beside the student."""
    n: int = Field(default=16, ge=2, le=255)
    """Tokens kept a position (kind sampled), or drawn (kind multinomial, which needs about three times as many)."""
    k: int = Field(default=64, ge=1)
    """Tokens kept a position (kind topk)."""

    @property
    def kept(self) -> int:
        """Tokens kept a position, whatever the kind."""
        return {"sampled": self.n, "multinomial": self.n, "topk": self.k}.get(self.kind, 0)

    @property
    def stored(self) -> Literal["sampled", "multinomial", "topk", "none"]:
        """The kind that a dataset holds."""
        return "none" if self.kind == "online" else self.kind

    @property
    def described(self) -> dict[str, Any]:
        """What a dataset says of its targets: what is kept, whether it is unbiased, and how far a stored value may be off."""
        half_precision = {"relative_error": 2**-11}  # of a log-probability in float16
        kept: dict[str, dict[str, Any]] = {
            "sampled": {"n": self.n, "unbiased": True, **half_precision},
            "multinomial": {"n": self.n, "unbiased": True, "relative_error": 0},
            "topk": {"k": self.k, "unbiased": False, **half_precision},
        }
        return {"kind": self.stored, **kept.get(self.stored, {})}
