"""The step of `curate` that checks why a completion ended."""

from llmdistill.config.curate import FinishReason
from llmdistill.curation.steps import Check, CurationStep, StepContext


def finish_reason(settings: FinishReason, context: StepContext) -> Check:
    """By the finish reason of a completion."""
    return lambda rows: (None if reason in settings.keep else str(reason) for reason in rows["finish_reason"].to_pylist())


STEP = CurationStep(finish_reason)
