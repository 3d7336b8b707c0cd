"""The kind `sql`: a question to a query on a database of SQLite.

The score is execution accuracy: 1 where the answer gives the rows of the target's query. Their order counts where the target
sorts them, names of columns never do, and floats are equal within 1e-9.
"""

import re
from collections.abc import Sequence
from typing import Any

from llmdistill.tasks.answers import unfenced
from llmdistill.tasks.database import Database
from llmdistill.tasks.task import Item, Task, check_targets

METRIC = "execution_accuracy"

_NO_CODE = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_INNERMOST = re.compile(r"\([^()]*\)")


def instructions(task: Task) -> str:
    """The definitions of the tables."""
    return "Answer with one SQLite query alone, on these tables:\n" + "\n".join(_database(task).definitions)


def check_outputs(task: Task, items: Sequence[Item]) -> None:
    """Refuse outputs that do not run, or that do more than read.

    Raises:
        InputError: names each line.
    """
    check_targets(items, lambda output: verdict(task, output))


def verdict(task: Task, answer: str) -> str | None:
    """Why an answer is not a valid query; None if it is."""
    return _database(task).refused(unfenced(answer))


def score(task: Task, answer: str, target: str) -> dict[str, float]:
    """`execution_accuracy`: 1 for the same rows, else 0."""
    right = unfenced(target)
    return {METRIC: float(_database(task).refused(unfenced(answer), right, is_ordered(right)) is None)}


def tables(task: Task, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """No results beyond the scores."""
    return {}


def is_ordered(query: str) -> bool:
    """Whether a query sorts its result: it has ORDER BY outside of parentheses, strings, names and comments."""
    text = _NO_CODE.sub(" x ", query)
    while (shorter := _INNERMOST.sub(" ", text)) != text:
        text = shorter
    return re.search(r"\border\s+by\b", text, re.IGNORECASE) is not None


def _database(task: Task) -> Database:
    assert task.database is not None
    return task.database
