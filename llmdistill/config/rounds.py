"""The section `rounds`: on-policy distillation in rounds, on the student's own text."""

from typing import Any

from pydantic import Field

from llmdistill.config.section import Divergence, PassedOn, Section


class Rounds(Section):
    """On-policy rounds after training on the teacher's text: the student writes, the teacher scores, the student trains on it."""

    n: int = Field(default=1, ge=1)
    """Number of rounds; `rounds: 2` is short for `rounds: {n: 2}`."""
    teacher_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows of a round that come from the teacher's text. With targets.kind sampled they are learnt by
    forward KL, whatever the loss of the rounds."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts that the student answers per round: the first N of the training split; all if not set."""
    loss: Divergence | None = None
    """Divergence in the rounds; `train.loss` if not set. For another one than forward_kl, targets.kind sampled is a sample that
    the student draws."""
    args: PassedOn = {}
    """Arguments of `trl.SFTConfig` that override `train.args` in the rounds."""


def as_section(value: Any) -> Any:
    """A number of rounds is short for a section; 0 is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"n": value} if value else None
    return value
