"""The step of `curate` that rejects invalid answers for one of the user's own tasks."""

from collections.abc import Iterator

import pyarrow as pa

from llmdistill.config.curate import Task
from llmdistill.curation.steps import Check, CurationStep, StepContext, excerpt, final_answers
from llmdistill.runs.inputs import sha256
from llmdistill.tasks.task import read_task


def inputs(settings: Task, key: str) -> dict[str, str]:
    """The task's file and those that it names, except its held-out items.

    Raises:
        InputError: one is missing, or cannot be used.
    """
    return {name: sha256(file) for name, file in read_task(settings.file, f"{key}.file").files.items()}


def task(settings: Task, context: StepContext) -> Check:
    """By the verdict of the task's kind; the right answer is unknown."""
    read = read_task(settings.file, f"{context.key}.file")

    def check(rows: pa.Table) -> Iterator[str | None]:
        for answer in final_answers(rows, context.experiment):
            found = read.rules.verdict(read, answer)
            yield found and excerpt(found, 200)

    return check


STEP = CurationStep(task, inputs)
