"""A user's own task: one YAML file that defines the instruction, the kind of answers, and how they are checked.

The kind NAME is the module `tasks/NAME.py`, of plain functions: `instructions(task)`, what the system message says beside the
description; `check_outputs(task, items)`, which refuses examples that cannot be learned from; `verdict(task, answer)`, why an
answer cannot be accepted without knowing the right one; `score(task, answer, target)`, metrics of one item, of which
`METRIC` is its score; and `tables(task, pairs)`, what a mean over items does not say. Answers and targets are text.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from llmdistill.config.reading import explain, read_yaml
from llmdistill.config.section import Section
from llmdistill.config.shipped import find
from llmdistill.data.jsonl import read_json_rows
from llmdistill.errors import InputError, UnreadableError
from llmdistill.runs.files import read_json
from llmdistill.tasks.answers import validator_of
from llmdistill.tasks.database import Database

Kind = Literal["extract", "classify", "sql", "tools", "generate"]
NEEDS: dict[Kind, tuple[str, ...]] = {
    "extract": ("schema",),
    "classify": ("labels",),
    "sql": ("database",),
    "tools": ("tools",),
    "generate": (),
}
OF_ONE_KIND = ("schema", "labels", "database", "tools")
_NAMED = 10  # lines of a file that one error names


class TaskSettings(Section):
    """A task's file. Paths are relative to it."""

    kind: Kind
    """What an answer is: `extract`: JSON; `classify`: a label; `sql`: a query; `tools`: a function call; `generate`: text."""
    description: str = Field(min_length=1)
    """What is to be done with the input, as the model is told."""
    describe_answers: bool = True
    """Tell the model the schema, labels, tables or functions too. Models that have been trained on the task do without."""
    schema_file: str | None = Field(default=None, alias="schema")
    """JSON schema that answers match (`extract`)."""
    labels: list[str] | None = Field(default=None, min_length=2)
    """The possible answers (`classify`)."""
    database: str | None = None
    """SQL that makes the tables and their rows, for SQLite (`sql`)."""
    tools: str | None = None
    """JSON list of function schemas in OpenAI's form (`tools`)."""
    test: str | None = None
    """JSONL file of held-out items: `{"input": …, "output": …}`."""


@dataclass(frozen=True)
class Item:
    """An input with its right answer, as text; `origin` is the file and line, `cluster` groups dependent items."""

    origin: str
    id: str
    cluster: str
    input: str
    output: str


@dataclass(frozen=True)
class Task:
    """A task as read; fields that its kind does not need are empty.

    Attributes:
        file: its YAML file.
        settings: the content.
        files: the file and those that it names, but for the test, by their paths as the experiment would name them.
        schemas: by the name of a function; the one schema of `extract` has the name "".
        validators: what checks JSON against each.
        functions: as the file `tools` has them.
        database: to query.
    """

    file: Path
    settings: TaskSettings
    files: dict[str, Path]
    schemas: dict[str, Any] = field(default_factory=dict)
    validators: dict[str, Any] = field(default_factory=dict)
    functions: list[Any] = field(default_factory=list)
    database: Database | None = None

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.file.stem

    @property
    def labels(self) -> list[str]:
        """The possible answers of `classify`."""
        return self.settings.labels or []

    @property
    def rules(self) -> Any:
        """The module of its kind."""
        return importlib.import_module(f"llmdistill.tasks.{self.settings.kind}")

    @property
    def told(self) -> str:
        """The instruction before the input, the same for every model."""
        answers = self.rules.instructions(self) if self.settings.describe_answers else ""
        return "\n\n".join(part for part in (self.settings.description.strip(), answers) if part)

    def prompt(self, text: str) -> list[dict[str, str]]:
        """The messages for every model, for prompts, training and evaluation alike."""
        return [{"role": "system", "content": self.told}, {"role": "user", "content": text}]


def read_task(file: str | Path, key: str) -> Task:
    """Read a task from its file; loads no model.

    Args:
        file: the YAML file.
        key: of the configuration that names it, for errors.

    Raises:
        InputError: it, or a file that it names, is missing or cannot be used.
    """
    return task_of(read_yaml(Path(file), key), Path(file))


def task_of(tree: dict[str, Any], file: Path) -> Task:
    """Read a task from the content of its file, which need not exist itself; the files that it names must.

    Raises:
        InputError: the content, or a file that it names, cannot be used.
    """
    try:
        settings = TaskSettings.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(f"{file}: {_explained(detail)}" for detail in error.errors())) from None
    kind = settings.kind
    for name in OF_ONE_KIND:
        if name in NEEDS[kind] and tree.get(name) is None:
            raise InputError(f"{file}: the key {name} is missing, which kind {kind} needs")
        if name not in NEEDS[kind] and name in tree:
            raise InputError(f"{file}: {name} is not a key of kind {kind}")
    _check_labels(file, settings.labels or [])
    files = {str(file): find(file)}

    def named(name: str, path: str) -> Path:
        found = find(file).parent / path
        if not found.is_file():
            raise InputError(f"{file}: {name}: {path} does not exist")
        files[str(file.parent / path)] = found
        return found

    if settings.schema_file is not None:
        found = named("schema", settings.schema_file)
        schema = read_json(found)
        return Task(file, settings, files, {"": schema}, {"": validator_of(schema, found)})
    if settings.tools is not None:
        found = named("tools", settings.tools)
        functions = read_json(found)
        schemas = dict(_parameters(functions, found))
        validators = {name: validator_of(schema, f"{found}: {name}") for name, schema in schemas.items()}
        return Task(file, settings, files, schemas, validators, functions)
    if settings.database is not None:
        return Task(file, settings, files, database=Database(named("database", settings.database)))
    return Task(file, settings, files)


def _explained(detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return (
            f"no such key {detail['loc'][0]}; a task has kind, description, describe_answers, {', '.join(OF_ONE_KIND)} and test"
        )
    return explain(detail)


def _check_labels(file: Path, labels: list[str]) -> None:
    for label in labels:
        if label != label.strip() or not label:
            raise InputError(f"{file}: labels: {label!r} is empty, or has leading or trailing white space")
        if labels.count(label) > 1:
            raise InputError(f"{file}: labels: {label!r} is listed twice")


def _parameters(functions: Any, file: Path) -> Iterator[tuple[str, Any]]:
    """Name and argument schema of each function."""
    if not isinstance(functions, list) or not functions:
        raise InputError(f"{file}: must be a list of function schemas")
    seen: set[str] = set()
    for number, entry in enumerate(functions):
        function = entry.get("function") if isinstance(entry, dict) and entry.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(f'{file}: entry {number} is not {{"type": "function", "function": {{"name": …}}}}')
        if function["name"] in seen:
            raise InputError(f"{file}: entry {number}: the function {function['name']} is defined twice")
        seen.add(function["name"])
        yield function["name"], function.get("parameters", {"type": "object", "properties": {}})


def items_file(task: Task) -> tuple[str, Path]:
    """The file of held-out items, by its path as in the experiment, and its location.

    Raises:
        InputError: the task has none, or it is not there.
    """
    if task.settings.test is None:
        raise InputError(f"{task.file}: the key test is missing; without held-out items there is nothing to evaluate")
    found = find(task.file).parent / task.settings.test
    if not found.is_file():
        raise InputError(f"{task.file}: test: {task.settings.test} does not exist")
    return str(task.file.parent / task.settings.test), found


def read_items(file: Path) -> list[Item]:
    """The items of a JSONL file, one `{"input": …, "output": …}` per line.

    An output that is no text is its JSON. Fields `id` and `cluster` name an item, and what is drawn together.

    Raises:
        InputError: a line is no item; it is named.
    """
    items: list[Item] = []
    seen: dict[str, str] = {}
    for number, row in read_json_rows(file, "test"):
        origin = f"{file} line {number}"
        if isinstance(row, UnreadableError):
            raise InputError(f"{origin}: {row.reason}")
        if not isinstance(row.get("input"), str) or not row["input"].strip():
            raise InputError(f"{origin}: input must be text")
        if row.get("output") in (None, ""):
            raise InputError(f"{origin}: output is missing")
        output = row["output"] if isinstance(row["output"], str) else json.dumps(row["output"], ensure_ascii=False)
        named = {name: str(row[name]) for name in ("id", "cluster") if row.get(name) is not None}
        identity = named.get("id", str(number - 1))
        if identity in seen:
            raise InputError(f"{origin}: the id {identity} is also that of {seen[identity]}")
        seen[identity] = origin
        items.append(Item(origin, identity, named.get("cluster", f"item {identity}"), row["input"], output))
    if not items:
        raise InputError(f"{file}: contains no items")
    return items


def check_targets(items: Sequence[Item], verdict: Callable[[str], str | None]) -> None:
    """Refuse invalid right answers.

    Raises:
        InputError: names the line of each, ten at most.
    """
    found = [f"{item.origin}: output: {why}" for item in items if (why := verdict(item.output)) is not None]
    if found:
        more = [f"… and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
        raise InputError("\n".join([*found[:_NAMED], *more]))
