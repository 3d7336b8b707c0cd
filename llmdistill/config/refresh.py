"""The configuration's section `refresh`: a run that comes back, night after night."""

from pydantic import Field

from llmdistill.config.section import Section


class Refresh(Section):
    """New prompts, training on from the promoted student, and promotion of the new one only if it is not worse."""

    replay: float = Field(default=0.5, ge=0, lt=1)
    """Share of the training rows that come from earlier versions; `eval` measures on their held-out rows, too."""
    margin: float = Field(default=0.02, ge=0)
    """Nats a token by which the new student's KL may be above the old one's: the upper end of the paired 95% interval."""
