"""The interface of a step of `curate`, what it may use, and the text of a row.

The step NAME is the object `STEP` of the module `curation/NAME.py`; its settings are in `config/curate.py`. It is started
once for a dataset and then called with its rows, group after group and in their order. For each row it says why the row
does not stay, or None. No step changes a row: what stays is the row as the teacher wrote it, with its token ids and
targets, so nothing has to be scored again.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmdistill.config import Experiment
from llmdistill.config.curate import CurateStep
from llmdistill.data.batches import read_batches
from llmdistill.errors import not_installed
from llmdistill.teachers.thinking import behind_trace

Array = np.ndarray[Any, Any]


class Failed(str):
    """Why a step could not decide on a row, which is then not kept."""


Check = Callable[[pa.Table], Iterable[str | None]]  # for each row of a group why it is rejected; None: it stays
COLUMNS = ["id", "prompt", "completion", "input_ids", "completion_start", "finish_reason", "metadata", "token_logprobs"]


@dataclass
class StepContext:
    """What a step may use besides its settings."""

    experiment: Experiment
    manifest: dict[str, Any]
    """`dataset.json` of the rows."""
    files: list[Path]
    """The shards of the rows, for a look at all of them before the first verdict."""
    key: str
    """Where the step stands in the configuration, such as `curate.2.judge`."""
    scratch: Path
    """A directory that goes away when all verdicts are there."""
    log: Path
    """A file that the step may write, to be put beside the dataset."""
    closing: ExitStack
    """Closed when all verdicts are there."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers of the step's own, for `dataset.json`."""


@dataclass(frozen=True)
class CurationStep:
    """A step of `curate`.

    Attributes:
        start: makes what looks at the rows, from the step's settings.
        inputs: path or name and hash of what the step reads beside the rows, from its settings and its place in the
            configuration; refuses what is missing or cannot be used. A dry run calls it, too, so it loads no model.
        libraries: that the step needs, each with the extra that installs it.
    """

    start: Callable[[Any, StepContext], Check]
    inputs: Callable[[Any, str], dict[str, str]] = lambda settings, key: {}
    libraries: Mapping[str, str] = field(default_factory=dict)


def step_named(name: str) -> CurationStep:
    """The step of that name in the configuration."""
    step: CurationStep = importlib.import_module(f"llmdistill.curation.{name}").STEP
    return step


def step_inputs(steps: Sequence[CurateStep]) -> dict[str, str]:
    """Path or name and hash of what the steps read besides the rows, after checking that each can run.

    Raises:
        InputError: a library, a file or a model is missing, or a file cannot be used; it names the key.
    """
    inputs: dict[str, str] = {}
    for number, entry in enumerate(steps):
        key, step = f"curate.{number}.{entry.name}", step_named(entry.name)
        for library, extra in step.libraries.items():
            if importlib.util.find_spec(library) is None:
                raise not_installed(key, library, extra)
        inputs |= step.inputs(entry.settings, key)
    return inputs


def answers(rows: pa.Table) -> Iterator[str]:
    """The teacher's text of every row."""
    return ("\n".join(message["content"] for message in completion) for completion in rows["completion"].to_pylist())


def final_answers(rows: pa.Table, experiment: Experiment) -> Iterator[str]:
    """The same without a reasoning trace, where rows may have one."""
    if experiment.generate.thinking != "kept":
        return answers(rows)
    return (behind_trace(answer, experiment.generate.thinking_end) for answer in answers(rows))


def questions(rows: pa.Table) -> Iterator[str]:
    """The text of all messages before the teacher's answer, for every row."""
    return ("\n".join(message["content"] for message in prompt) for prompt in rows["prompt"].to_pylist())


def whole_texts(rows: pa.Table) -> Iterator[str]:
    """The whole text, prompt and completion, of every row."""
    return (f"{question}\n{answer}" for question, answer in zip(questions(rows), answers(rows), strict=True))


def compared(rows: pa.Table, of: str) -> Iterator[str]:
    """The text to compare of every row: its `completion`, or its `conversation`."""
    return answers(rows) if of == "completion" else whole_texts(rows)


def completion_ids(rows: pa.Table) -> Iterator[Array]:
    """The teacher's token ids of every row."""
    starts = rows["completion_start"].to_pylist()
    return (np.asarray(ids.values)[start:] for ids, start in zip(rows["input_ids"], starts, strict=True))


def metadata(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """The metadata of every row."""
    return (json.loads(text) for text in rows["metadata"].to_pylist())


def all_rows(context: StepContext) -> Iterator[pa.Table]:
    """All rows of the dataset, group by group."""
    return read_batches(context.files, COLUMNS)


def excerpt(text: str, length: int = 80) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
