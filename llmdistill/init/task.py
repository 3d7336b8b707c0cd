"""The output of `llmdistill init --task` from a user's examples: the task, its held-out items, and seeds for the teacher."""

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args

from llmdistill.config.reading import dump_yaml
from llmdistill.data.ngrams import normalised
from llmdistill.data.ngrams import words as words_of
from llmdistill.errors import InputError
from llmdistill.init.questions import answer
from llmdistill.tasks.task import NEEDS, Item, Kind, Task, read_items, task_of

TASK, TEST, SEEDS = "task.yaml", "test.jsonl", "seeds.jsonl"
KINDS: list[Kind] = list(get_args(Kind))
_FILES = {"schema": "schema.json", "database": "database.sql", "tools": "tools.json"}  # names of the copies
_ASKED = {
    "schema": "JSON schema of an answer",
    "labels": "Labels, separated by commas (default: those of the examples)",
    "database": "SQL file that creates and fills the tables",
    "tools": "JSON list of function schemas",
}
_FEWEST = 10  # examples
_SHARE = 4  # one of so many examples is shown to the teacher; nothing is learned from the others
_SHOWN = 6  # examples in one question at most
_WANTED = {True: 2400, False: 320}  # inputs that the teacher is to write, on a GPU and without one
_ROUNDS, _LISTED = 4, 5  # of self-instruct, and inputs in one answer, as in prompts/inputs.yaml
_LONG = 15  # words; shorter inputs overlap by their form alone
_MOST_TOKENS = 4096


@dataclass(frozen=True)
class TaskChoices:
    """The flags about a task; None for what they leave open."""

    kind: Kind | None = None
    examples: Path | None = None
    description: str | None = None
    schema: Path | None = None
    labels: str | None = None
    """With commas between them."""
    database: Path | None = None
    tools: Path | None = None

    @property
    def given(self) -> list[str]:
        """The flags that were used, except that of the kind."""
        return [entry.name for entry in fields(self) if entry.name != "kind" and getattr(self, entry.name) is not None]


@dataclass(frozen=True)
class TaskParts:
    """The parts of an experiment on a task.

    Attributes:
        files: content by name.
        template: by which the teacher writes inputs.
        rows: inputs that it is asked for.
        settings: of the steps, for the experiment's template.
    """

    files: dict[str, str]
    template: str
    rows: int
    settings: dict[str, Any]


def task_parts(choices: TaskChoices, gpu: bool) -> TaskParts:
    """Read a user's examples, and check them by the rules of their kind.

    Args:
        choices: what the flags say; the rest is asked for on a terminal.
        gpu: whether many inputs can be written.

    Raises:
        InputError: something is missing, or the examples cannot be used; each line is named.
    """
    kind = choices.kind or cast("Kind", answer("An answer is", "extract", [*KINDS]))
    for name in choices.given:
        if name not in ("examples", "description", *NEEDS[kind]):
            raise InputError(f"--{name} is not for --task {kind}")
    path = choices.examples or Path(answer("JSONL file of examples, with input and output", "")).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file (--examples)" if path.name else "--examples is missing; nothing was written")
    description = choices.description or answer("What to do with an input", "")
    if not description.strip():
        raise InputError("--description is missing; nothing was written")
    items = read_items(path)
    if len(items) < _FEWEST:
        raise InputError(f"{path}: {len(items)} examples; at least {_FEWEST} are needed")
    rules = {name: _rule(choices, kind, name, items) for name in NEEDS[kind]}
    # Relative to the flag, which stands in the working directory, paths are as they were typed.
    task = task_of({"kind": kind, "description": description.strip(), **rules}, Path("--task"))
    task.rules.check_outputs(task, items)
    _check_inputs(items)
    seeds, held_out = split(items, of_label=kind == "classify")
    if len(seeds) < 2 or len({item.cluster for item in held_out}) < 2:
        raise InputError(
            f"{path}: too few values of the field cluster: they leave {len(seeds)} as examples and {len(held_out)} for the test"
        )
    template, rows, settings = _settings(items, len(seeds), gpu)
    return TaskParts(_files(task, rules, seeds, held_out), template, rows, settings)


def split(items: Sequence[Item], of_label: bool) -> tuple[list[Item], list[Item]]:
    """The examples shown to the teacher, and those held out.

    A quarter, rounded up, is shown, of every label where there are some, and of each at least one is held out. Which they
    are follows from the texts alone: the order of lines plays no part. What has one `cluster` stays together.
    """
    clusters: dict[str, list[Item]] = {}
    for item in items:
        clusters.setdefault(item.cluster, []).append(item)
    groups: dict[str, list[list[Item]]] = {}
    for cluster in sorted(clusters.values(), key=lambda several: min(_digest(item.input) for item in several)):
        groups.setdefault(cluster[0].output.strip() if of_label else "", []).append(cluster)
    shown = {
        item.id
        for group in groups.values()
        for cluster in group[: min(-(-len(group) // _SHARE), len(group) - 1)]
        for item in cluster
    }
    return [item for item in items if item.id in shown], [item for item in items if item.id not in shown]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _rule(choices: TaskChoices, kind: Kind, name: str, items: Sequence[Item]) -> str | list[str]:
    """The path of the file that the kind needs, or the labels."""
    given = getattr(choices, name)
    typed = str(given) if given is not None else answer(_ASKED[name], "")
    if name == "labels" and typed:
        return [label.strip() for label in typed.split(",")]
    if name == "labels":
        return list(dict.fromkeys(item.output.strip() for item in items))
    if not typed:
        raise InputError(f"--{name} is missing, which --task {kind} needs; nothing was written")
    return str(Path(typed).expanduser())


def _check_inputs(items: Sequence[Item]) -> None:
    """Refuse duplicate inputs, which could be both shown and held out, or have two right answers.

    Raises:
        InputError: names the lines.
    """
    seen: dict[str, str] = {}
    found = []
    for item in items:
        text = normalised(item.input)
        if text in seen:
            found.append(f"{item.origin}: has the same input as {seen[text]}")
        seen.setdefault(text, item.origin)
    if found:
        raise InputError("\n".join(found))


def _settings(items: Sequence[Item], seeds: int, gpu: bool) -> tuple[str, int, dict[str, Any]]:
    """The template for the teacher to write inputs, how many to request, and settings based on the examples' lengths."""
    inputs = [item.input.strip() for item in items]
    lines = all("\n" not in text for text in inputs)
    each = _LISTED if lines else 1
    samples = math.ceil(_WANTED[gpu] / _ROUNDS / each)
    words = statistics.median(len(words_of(text)) for text in inputs)
    settings = {
        "rounds": _ROUNDS,
        "samples": samples,
        "each": each,
        "examples": min(_SHOWN, max(seeds * 2 // 3, 2)),
        "overlap": 0.7 if words >= _LONG else 0.85,
        "input_tokens": _tokens(each * max(map(_bytes, inputs)) // 2),
        "max_tokens": _tokens(max(_bytes(item.output) for item in items)),
    }
    return "prompts/inputs.yaml" if lines else "prompts/long_input.yaml", _ROUNDS * samples * each, settings


def _bytes(text: str) -> int:
    return len(text.encode())


def _tokens(number: int) -> int:
    """Rounded up with a margin, to a multiple of 64."""
    return min(64 * math.ceil((number + 64) / 64), _MOST_TOKENS)


def _files(task: Task, rules: dict[str, Any], seeds: list[Item], held_out: list[Item]) -> dict[str, str]:
    """The task's file and those that it names, all in one directory."""
    tree: dict[str, Any] = {"kind": task.settings.kind, "description": task.settings.description}
    files = {}
    for name, rule in rules.items():
        tree[name] = _FILES.get(name, rule)
        if name in _FILES:
            files[_FILES[name]] = Path(rule).read_text(encoding="utf-8")
    clusters = Counter(item.cluster for item in [*seeds, *held_out])
    about = "# The prompt for every model, and how answers are checked.\n"
    return {
        TASK: about + dump_yaml({**tree, "test": TEST}),
        **files,
        TEST: "".join(_line(item, clusters) for item in held_out),
        SEEDS: "".join(_line(item, clusters) for item in seeds),
    }


def _line(item: Item, clusters: Counter[str]) -> str:
    """An example as a line of JSONL; JSON outputs are embedded as JSON."""
    try:
        value = json.loads(item.output)
    except ValueError:
        value = item.output
    row: dict[str, Any] = {"id": item.id}
    if clusters[item.cluster] > 1:
        row["cluster"] = item.cluster
    row |= {"input": item.input, "output": value if isinstance(value, dict | list) else item.output}
    return json.dumps(row, ensure_ascii=False) + "\n"
