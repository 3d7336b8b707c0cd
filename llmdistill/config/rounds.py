"""The configuration's section `rounds`: training on the student's own text (on-policy distillation by batches)."""

from typing import Any

from pydantic import Field

from llmdistill.config.section import Divergence, PassedOn, Section


class Rounds(Section):
    """After the training on the teacher's text: the student writes, the teacher reads it, the student learns from that."""

    n: int = Field(default=1, ge=1)
    """How often; `rounds: 2` is short for `rounds: {n: 2}`."""
    teacher_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of a round's training rows that are the teacher's own text."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts that the student answers in a round: the first so many of the training split, or all of them."""
    loss: Divergence | None = None
    """The divergence in the rounds; `train.loss` if not given."""
    args: PassedOn = {}
    """Arguments of `trl.SFTConfig` that are others in the rounds than in `train.args`."""


def as_section(value: Any) -> Any:
    """A number of rounds is short for a section; 0 is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"n": value} if value else None
    return value
