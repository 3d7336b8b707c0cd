"""The kind `extract`: text to JSON that matches a schema.

The score is 1 where the JSON equals the target's as a whole, whatever the order of its keys. The fields are its leaves,
named by their paths (`buyer.name`, `items[].price`), a list's elements in any order: a right value is a true positive, one
that the target has not a false positive, one that is missing a false negative; a wrong value is both of the latter.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from llmdistill.errors import InputError
from llmdistill.tasks.answers import canonical, contradiction, problem, read_answer
from llmdistill.tasks.task import Item, Task, check_targets

METRIC = "exact_match"
_OTHERS = "(others)"


def instructions(task: Task) -> str:
    """The schema."""
    return f"Answer with JSON alone, which matches this JSON schema:\n{json.dumps(task.schemas[''], ensure_ascii=False)}"


def check_outputs(task: Task, items: Sequence[Item]) -> None:
    """Refuse outputs that violate the schema, and a schema that cannot be satisfied.

    Raises:
        InputError: names each line.
    """
    if found := contradiction(task.schemas[""]):
        raise InputError(f"{task.file}: schema: {task.settings.schema_file} cannot be satisfied: {found}")
    check_targets(items, lambda output: verdict(task, output))


def verdict(task: Task, answer: str) -> str | None:
    """Why an answer is not JSON that matches the schema; None if it is."""
    try:
        value = read_answer(answer)
    except ValueError as error:
        return f"not JSON: {error}"
    return problem(task.validators[""], value, task.file)


def score(task: Task, answer: str, target: str) -> dict[str, float]:
    """`exact_match`, and the `true_positives`, `false_positives` and `false_negatives` of all fields together.

    An answer that is not JSON has no fields.
    """
    wanted = read_answer(target)
    try:
        found = read_answer(answer)
    except ValueError:
        return {METRIC: 0.0, **_summed(_counts(None, wanted).values())}
    return {METRIC: float(canonical(found) == canonical(wanted)), **_summed(_counts((found,), wanted).values())}


def tables(task: Task, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """`fields`: precision, recall and F1 of each field, micro-averaged over the items, and of all together, named "".

    Args:
        task: the task.
        pairs: answer and target of each item. What stands in no target is counted as one field, `(others)`.
    """
    counts: dict[str, Counter[str]] = {}
    wanted = [read_answer(target) for _, target in pairs]
    known = {path for value in wanted for path, _ in _leaves(value)}
    for (answer, _), value in zip(pairs, wanted, strict=True):
        try:
            found: tuple[Any, ...] | None = (read_answer(answer),)
        except ValueError:
            found = None
        for path, counted in _counts(found, value).items():
            counts.setdefault(path if path in known else _OTHERS, Counter()).update(counted)
    order = sorted(counts, key=lambda path: (path == _OTHERS, path))
    return {"fields": [_row("", _summed(counts.values())), *(_row(path, _summed([counts[path]])) for path in order)]}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and value of each leaf; an empty object or list is one."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _leaves(inner, f"{path}[]")
    else:
        yield path or "(value)", canonical(value)


def _counts(found: tuple[Any, ...] | None, wanted: Any) -> dict[str, Counter[str]]:
    """By path, the numbers of right, extra and missing values; `found` is None if nothing could be read."""
    ours = Counter(_leaves(found[0])) if found else Counter()
    theirs = Counter(_leaves(wanted))
    counts: dict[str, Counter[str]] = {}
    for name, leaves in (
        ("true_positives", ours & theirs),
        ("false_positives", ours - theirs),
        ("false_negatives", theirs - ours),
    ):
        for (path, _), count in leaves.items():
            counts.setdefault(path, Counter())[name] += count
    return counts


def _summed(counts: Any) -> dict[str, float]:
    total: Counter[str] = sum(counts, Counter())
    return {name: float(total[name]) for name in ("true_positives", "false_positives", "false_negatives")}


def _row(path: str, counted: dict[str, float]) -> dict[str, Any]:
    """Counts and the scores derived from them; None for a share of nothing."""
    right, wrong, missing = counted.values()
    return {
        "field": path,
        **{name: int(count) for name, count in counted.items()},
        "precision": right / (right + wrong) if right + wrong else None,
        "recall": right / (right + missing) if right + missing else None,
        "f1": 2 * right / (2 * right + wrong + missing),
    }
