"""Making a dataset shard by shard: which are missing, which are this worker's, and what completes it.

Which rows a shard holds follows from the configuration alone, and a shard appears whole or not at all. So any number of
workers may make one dataset, none knows of the others, and whichever sees the last shard writes `dataset.json`.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmdistill import stage
from llmdistill.config import Experiment
from llmdistill.dataset import (
    MANIFEST,
    Row,
    bytes_per_position,
    describe_shard,
    finished_shards,
    is_damaged,
    remove_leftovers,
    rows_to_table,
    write_manifest,
    write_shard,
)
from llmdistill.errors import InputError
from llmdistill.progress import StageBar, console, say
from llmdistill.teachers import Completion, Engine, Request, open_engine
from llmdistill.teachers.chat import Chat


@dataclass(frozen=True)
class Share:
    """Every `of`-th shard, from number `index` on, counted from 0."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """From `2/8`, the second of eight workers.

        Raises:
            InputError: it is not of that form.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--shards {text}: must be like 2/8, the second of eight workers")
        return cls(int(match[1]) - 1, int(match[2]))


EVERYTHING = Share(0, 1)


class Source(Protocol):
    """The rows of a dataset before the teacher has seen them."""

    chat: Chat
    max_model_len: int
    reads: bool  # whether the text is there already

    @property
    def requests(self) -> Sequence[Request]:
        """What the engine is to write or read, a row each."""
        ...

    def row(self, completion: Completion) -> Row:
        """What is stored of a request's completion."""
        ...

    def run(self, engine: Engine, shards: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Let the engine write or read the requests of some shards."""
        ...

    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of them."""
        ...


def count_shards(experiment: Experiment, rows: int) -> int:
    """How many shards so many rows make."""
    return -(-rows // experiment.generate.rows_per_shard)


def count_finished(directory: Path) -> int:
    """How many shards are there."""
    return len(finished_shards(directory, "train")) if directory.is_dir() else 0


def missing_shards(name: str, directory: Path, count: int, share: Share) -> list[int]:
    """The shards that this worker is to make; damaged ones and what killed writers left are removed first.

    Args:
        name: of the stage.
        directory: of the shards.
        count: how many there are to be.
        share: this worker's part of them.
    """
    remove_leftovers(directory)
    mine = range(share.index, count, share.of)
    for shard in finished_shards(directory, "train"):
        if shard.index in mine and is_damaged(shard):
            say(name, f"{shard.file} is damaged; it is made again")
            shard.file.unlink()
    done = {shard.index for shard in finished_shards(directory, "train")}
    return [index for index in mine if index not in done]


def make_dataset(
    name: str, directory: Path, source: Source, settings: dict[str, Any], inputs: dict[str, str], share: Share
) -> None:
    """Make this worker's missing shards; then, if all are there, complete the dataset.

    Args:
        name: of the stage.
        directory: of the dataset.
        source: its rows.
        settings: the resolved configuration that they depend on.
        inputs: path and hash of what is read.
        share: this worker's part of the shards.
    """
    experiment = source.chat.experiment
    count = count_shards(experiment, len(source.requests))
    stage.begin(directory, name, settings, inputs, experiment.seed)
    missing = missing_shards(name, directory, count, share)
    if missing:
        (directory / MANIFEST).unlink(missing_ok=True)
    mine = len(range(share.index, count, share.of))
    made = _make(name, directory, source, missing, mine, count) if missing else {}
    there = finished_shards(directory, "train")
    if len(there) < count:
        say(name, f"{len(there):,} of {count:,} shards are there, the others are for other workers to make")
        return
    write_manifest(directory, there, source.chat.description() | source.description() | {"source": inputs})
    stage.finish(directory, {"rows": len(source.requests), **made})


def _make(name: str, directory: Path, source: Source, missing: list[int], mine: int, count: int) -> dict[str, Any]:
    """Run the engine over the missing shards; each is stored as soon as its last row is there. How fast it was."""
    chat, experiment = source.chat, source.chat.experiment
    size, everything = experiment.generate.rows_per_shard, len(source.requests)
    rows_of = {index: min(size, everything - index * size) for index in missing}
    shards = (source.requests[index * size : (index + 1) * size] for index in missing)

    made: list[dict[str, Any]] = []

    def store(index: int, completions: list[Completion]) -> None:
        table = rows_to_table([source.row(completion) for completion in completions], chat.vocab_size)
        made.append(describe_shard(write_shard(directory, "train", index, count, table)))

    with console.status("starting the teacher"):
        engine = open_engine(
            experiment.teacher,
            experiment.generate,
            experiment.targets,
            source.max_model_len,
            chat.end_ids,
            experiment.seed,
            chat.vocab_size if source.reads else None,
        )
    rows = sum(rows_of.values())
    total = rows if mine < count else everything
    started = time.monotonic()
    with StageBar(name, total, total - rows) as bar:
        tokens = 0
        for completion in _by_shard(source.run(engine, shards), size, rows_of, store):
            tokens += len(completion.ids)
            bar.advance(tokens=len(completion.ids), facts=[f"{tokens:,} tokens"])
        stored = bytes_per_position(made)
        bar.advance(0, facts=[f"{tokens:,} tokens"] + ([f"{stored:.0f} B/position"] if stored else []))
    return stage.speed(tokens, time.monotonic() - started)


def _by_shard(
    completions: Iterator[Completion], size: int, rows_of: dict[int, int], store: Callable[[int, list[Completion]], None]
) -> Iterator[Completion]:
    """Pass completions on; store a shard as soon as its last row is there, in the order of its requests."""
    pending: dict[int, list[Completion]] = {}
    for completion in completions:
        index = completion.index // size
        rows = pending.setdefault(index, [])
        rows.append(completion)
        if len(rows) == rows_of[index]:
            store(index, sorted(pending.pop(index), key=lambda row: row.index))
        yield completion
