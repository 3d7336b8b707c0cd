"""The kind `classify`: text to one of some labels.

The score is 1 for the right label, else 0. Case counts, white space around it does not.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from llmdistill.errors import InputError
from llmdistill.tasks.task import Item, Task, check_targets

METRIC = "accuracy"
_NO_LABEL = "(no label)"


def instructions(task: Task) -> str:
    """The labels."""
    return "Answer with one of these labels alone:\n" + "\n".join(task.labels)


def check_outputs(task: Task, items: Sequence[Item]) -> None:
    """Refuse outputs that are not labels, and a label with a single example, which cannot be both learned and tested.

    Raises:
        InputError: names each line.
    """
    check_targets(items, lambda output: verdict(task, output))
    counts = Counter(item.output.strip() for item in items)
    if once := [f"{item.origin}: {item.output.strip()!r}" for item in items if counts[item.output.strip()] == 1]:
        raise InputError("labels with a single example; each needs at least two:\n" + "\n".join(once))


def verdict(task: Task, answer: str) -> str | None:
    """Why an answer is not a label; None if it is one."""
    if answer.strip() in task.labels:
        return None
    shown = " ".join(answer.split())
    return f"not a label: {shown[:60]}{'…' if len(shown) > 60 else ''}"


def score(task: Task, answer: str, target: str) -> dict[str, float]:
    """`accuracy`: 1 for the right label, else 0."""
    return {METRIC: float(answer.strip() == target.strip())}


def tables(task: Task, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """`confusion`: for each right label (row), how often each label was answered (column); the last column is no label."""
    columns = [*task.labels, _NO_LABEL]
    counted = Counter(
        (target.strip(), label if (label := answer.strip()) in task.labels else _NO_LABEL) for answer, target in pairs
    )
    return {"confusion": {"labels": columns, "counts": [[counted[row, column] for column in columns] for row in task.labels]}}
