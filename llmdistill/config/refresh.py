"""The section `refresh`: incremental retraining."""

from pydantic import Field

from llmdistill.config.section import Section


class Refresh(Section):
    """Incremental retraining: train the promoted student on new prompts, and promote the result only if it is not worse."""

    replay: float = Field(default=0.5, ge=0, lt=1)
    """Share of the training rows that come from earlier versions. `eval` also uses their held-out rows."""
    margin: float = Field(default=0.02, ge=0)
    """Non-inferiority margin in nats per token: upper limit for the paired 95% confidence interval of the new student's KL
    minus the promoted one's; with a teacher behind an API, of the difference in NLL on its text."""
