"""The kind `generate`: free text. The score is the F1 of ROUGE-L (Lin 2004) over words, without case and punctuation."""

from collections.abc import Sequence
from typing import Any

from llmdistill.tasks.rouge import rouge_words
from llmdistill.tasks.task import Item, Task, check_targets

METRIC = "rouge_l"


def instructions(task: Task) -> str:
    """No instruction beyond the description."""
    return ""


def check_outputs(task: Task, items: Sequence[Item]) -> None:
    """Refuse outputs without a word.

    Raises:
        InputError: names each line.
    """
    check_targets(items, lambda output: verdict(task, output))


def verdict(task: Task, answer: str) -> str | None:
    """Why an answer is invalid; None if it is valid."""
    return None if rouge_words(answer) else "has no word"


def score(task: Task, answer: str, target: str) -> dict[str, float]:
    """`rouge_l`: 2·LCS / (words of the answer + words of the target), LCS their longest common subsequence."""
    from rapidfuzz.distance import LCSseq

    found, wanted = rouge_words(answer), rouge_words(target)
    return {METRIC: 2 * LCSseq.similarity(found, wanted) / max(len(found) + len(wanted), 1)}


def tables(task: Task, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """No results beyond the scores."""
    return {}
