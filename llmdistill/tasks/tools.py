"""The kind `tools`: a request to one call of a function, `{"name": …, "arguments": {…}}`.

The score is 1 for the same function with equal arguments: what is left out has the schema's default, and 1.0 is 1. A call in
OpenAI's form (`{"type": "function", "function": {…}}`, with arguments as text) is read as well.
"""

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from llmdistill.data.rows import storable
from llmdistill.errors import InputError
from llmdistill.tasks.answers import canonical, contradiction, problem, read_answer
from llmdistill.tasks.task import Item, Task, check_targets

METRIC = "call_match"


def instructions(task: Task) -> str:
    """The functions."""
    shown = json.dumps(task.functions, ensure_ascii=False)
    return f'Answer with one call of one of these functions alone, as JSON: {{"name": …, "arguments": {{…}}}}.\n{shown}'


def check_outputs(task: Task, items: Sequence[Item]) -> None:
    """Refuse outputs that do not match their function's schema, and a schema that cannot be satisfied.

    Raises:
        InputError: names each line.
    """
    for name, schema in task.schemas.items():
        if found := contradiction(schema):
            raise InputError(f"{task.file}: tools: {name} cannot be called: {found}")
    check_targets(items, lambda output: verdict(task, output))


def verdict(task: Task, answer: str) -> str | None:
    """Why an answer is not a call that matches its schema; None if it is."""
    try:
        name, arguments = _call(answer)
    except ValueError as error:
        return f"no call: {error}"
    if name not in task.validators:
        return storable(f"no such function: {name[:60]}")
    return problem(task.validators[name], arguments, task.file)


def score(task: Task, answer: str, target: str) -> dict[str, float]:
    """`call_match`: 1 for the same function with equal arguments, else 0."""
    try:
        called, wanted = (_normalised(task, *_call(text)) for text in (answer, target))
    except ValueError:
        return {METRIC: 0.0}
    return {METRIC: float(called == wanted)}


def tables(task: Task, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """No results beyond the scores."""
    return {}


def _call(answer: str) -> tuple[str, Any]:
    """Name and arguments.

    Raises:
        ValueError: it is no call.
    """
    found = read_answer(answer)
    if isinstance(found, dict) and found.get("type") == "function":
        found = found.get("function")
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ValueError('not {"name": …, "arguments": {…}}')
    arguments = found.get("arguments", {})
    return found["name"], read_answer(arguments) if isinstance(arguments, str) else arguments


def _normalised(task: Task, name: str, arguments: Any) -> tuple[str, str]:
    return name, canonical(with_defaults(task.schemas.get(name), arguments))


def with_defaults(schema: Any, value: Any) -> Any:
    """A value with the schema's defaults for missing properties, at any depth of objects and lists.

    References within the schema and `allOf` are followed; of alternatives (`anyOf`, `oneOf`) no default is taken.
    """
    return _with_defaults(schema, value, schema, ())


def _with_defaults(schema: Any, value: Any, root: Any, inserted: tuple[int, ...]) -> Any:
    """As `with_defaults`; `inserted` are the schemas whose defaults contain the value, which would recurse forever."""
    parts = _parts(schema, root, ())
    if isinstance(value, list):
        items = next((part["items"] for part in parts if "items" in part), None)
        return [_with_defaults(items, inner, root, inserted) for inner in value]
    if not isinstance(value, dict):
        return value
    properties = {name: inner for part in reversed(parts) for name, inner in part.get("properties", {}).items()}
    defaults = {
        name: inner["default"]
        for name, its in properties.items()
        if name not in value and id(its) not in inserted
        for inner in reversed(_parts(its, root, ()))
        if "default" in inner
    }
    return {
        name: _with_defaults(its := properties.get(name), inner, root, () if name in value else (*inserted, id(its)))
        for name, inner in {**defaults, **value}.items()
    }


def _parts(schema: Any, root: Any, seen: tuple[str, ...]) -> list[dict[str, Any]]:
    """A schema, and those that it refers to or combines, nearest first."""
    if not isinstance(schema, dict):
        return []
    found, reference = [schema], schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#") and reference not in seen:
        found += _parts(_pointed(reference, root), root, (*seen, reference))
    return found + [part for inner in schema.get("allOf", []) for part in _parts(inner, root, seen)]


def _pointed(reference: str, root: Any) -> Any:
    """The target of a JSON pointer; None if there is none."""
    for step in unquote(reference[1:]).split("/")[1:]:
        root = root.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root
