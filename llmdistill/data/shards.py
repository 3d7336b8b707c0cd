"""Making a dataset shard by shard: the missing ones, those of this worker, and completing the dataset.

Which rows a shard holds follows from the configuration alone, and a shard appears whole or not at all. So any number of
workers may make one dataset, none needs to know of the others, and whichever sees the last shard writes `dataset.json`.
"""

import re
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill.config import Experiment, Targets
from llmdistill.config.machine import Precision
from llmdistill.data.budget import Budget, bill, money, whole_bill
from llmdistill.data.left_out import LeftOut
from llmdistill.data.manifest import MANIFEST, bytes_per_position, describe_shard, write_manifest
from llmdistill.data.rows import Row, check_logprobs, rows_to_table
from llmdistill.data.shard_writer import (
    Shard,
    failed_rows,
    finished_shards,
    is_damaged,
    remove_leftovers,
    with_bill,
    with_failed,
    write_shard,
)
from llmdistill.errors import InputError, RemoteError
from llmdistill.objectstore.shared_shards import SharedShards
from llmdistill.runs import lock, record
from llmdistill.runs.files import check_shape, read_json
from llmdistill.runs.progress import StageBar, counted, say, working
from llmdistill.teachers import Completion, Engine, EngineSpec, Request, open_engine, shared_file, teacher_precision
from llmdistill.teachers.prompt_encoding import PromptEncoder, have_several_tokenizers


class Worker(Protocol):
    """Determines which shards a worker makes."""

    def part(self, count: int) -> range:
        """The numbers of the shards that may be its own, out of this many; called before any is made."""
        ...

    def shards(self, name: str, directory: Path, count: int) -> Iterable[int]:
        """The numbers of missing shards, possibly decided only when requested.

        Args:
            name: of the stage.
            directory: of the shards.
            count: how many there are to be.
        """
        ...


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

    def part(self, count: int) -> range:
        """Its share."""
        return range(self.index, count, self.of)

    def shards(self, name: str, directory: Path, count: int) -> Generator[int, None, None]:
        """The missing shards of its share, checked just in time; those in progress in another process come last.

        Damaged ones and what killed writers left are removed first.
        """
        remove_leftovers(directory)
        mine = self.part(count)
        for shard in finished_shards(directory, "train"):
            if shard.index in mine and is_damaged(shard.file):
                say(name, f"{shard.file} is damaged; making it again")
                shard.file.unlink()
        there, begun = indices(directory), set[int]()
        with lock.InHand(directory) as hand:
            # Shards in progress elsewhere are made twice rather than not at all: they may be lost, on another machine.
            for last in (False, True):
                for index in mine:
                    if index in there or index in begun:
                        continue
                    free = hand.take(str(index))
                    there = indices(directory)
                    for done in there & {index, *begun}:
                        hand.put_down(str(done))
                    if index not in there and (free or last):
                        begun.add(index)
                        yield index


def indices(directory: Path) -> set[int]:
    """The numbers of the existing training shards."""
    return {shard.index for shard in finished_shards(directory, "train")}


def counting_others(begun: Iterator[int], directory: Path, rows: Mapping[int, int], bar: StageBar) -> Iterator[int]:
    """Pass on the shards that are started; those that others have finished in between are counted as done.

    Args:
        begun: the numbers of shards that were not there.
        directory: of the shards.
        rows: of each shard that the bar is about.
        bar: has counted those that are there at the beginning.
    """
    known = indices(directory)
    then: Iterator[int | None] = chain(begun, [None])
    for index in then:
        others = (indices(directory) & rows.keys()) - known - {index}
        bar.found(sum(rows[other] for other in others))
        if index is not None:
            known |= {index, *others}
            yield index


EVERYTHING = Share(0, 1)
Opened = Callable[[EngineSpec], Engine]
_TELLING = 16  # rows of a shard from which on their failures tell something of the endpoint
_STAGING = ".ensemble"  # in a dataset's directory: what the members of an ensemble say, until their mean is stored


@dataclass(frozen=True)
class Part:
    """The rows of one teacher, which are contiguous and do not share shards with those of another one.

    Attributes:
        name: of the teacher; empty where there is a single one.
        chat: the teacher without its weights.
        rows: how many there are.
        max_model_len: tokens of the longest sequence.
    """

    name: str
    chat: PromptEncoder
    rows: int
    max_model_len: int


class Layout:
    """The rows of each shard, and the part that it belongs to; the shards of a part differ by at most one row.

    So none is so small that an endpoint may well refuse all of it: it could never be finished.

    Args:
        rows: of each part.
        size: maximum number of rows in a shard.
    """

    def __init__(self, rows: Sequence[int], size: int) -> None:
        ends = [sum(rows[: part + 1]) for part in range(len(rows))]
        self.shards: list[tuple[int, range]] = []
        for part, (count, end) in enumerate(zip(rows, ends, strict=True)):
            shards = -(-count // size)
            bounds = [end - count + number * count // shards for number in range(shards)] + [end]
            self.shards += [(part, range(*bound)) for bound in pairwise(bounds)]
        self._starts = [held.start for _, held in self.shards]
        self._ends = ends

    def __len__(self) -> int:
        return len(self.shards)

    def shard_of(self, row: int) -> int:
        """The number of the shard that contains a row."""
        return bisect_right(self._starts, row) - 1

    def part_of(self, row: int) -> int:
        """The number of the part that a row belongs to."""
        return bisect_right(self._ends, row)


class Source(Protocol):
    """The rows of a dataset before the teacher has seen them."""

    chat: PromptEncoder  # of the teacher that stands for all of them
    parts: list[Part]
    reads: bool  # whether the text is there already
    left_out: LeftOut

    @property
    def requests(self) -> Sequence[Request]:
        """The requests for the engine, one per row."""
        ...

    def row(self, completion: Completion) -> Row:
        """What is stored for a request's completion."""
        ...

    def run(self, engine: Engine, shards: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Let the engine generate or score the requests of some shards."""
        ...

    def description(self) -> dict[str, Any]:
        """Their entries in `dataset.json`."""
        ...


def count_shards(experiment: Experiment, rows: Iterable[int]) -> int:
    """Number of shards for the rows of some parts."""
    return sum(-(-count // experiment.generate.rows_per_shard) for count in rows)


def count_finished(directory: Path) -> int:
    """Number of existing shards."""
    return len(finished_shards(directory, "train")) if directory.is_dir() else 0


def is_whole(directory: Path) -> bool:
    """Whether a dataset is complete and all of its shards exist.

    Raises:
        InputError: its `dataset.json` is none.
    """
    file = directory / MANIFEST
    manifest = read_json(file)
    if manifest is None:
        return False
    entries = check_shape(file, manifest, {"shards": list})["shards"]
    names = [check_shape(file, entry, {"file": str}, f"shards.{number}")["file"] for number, entry in enumerate(entries)]
    return all((directory / name).is_file() for name in names)


def make_dataset(claim: record.Claim, source: Source, worker: Worker, opened: Opened = open_engine) -> None:
    """Make this worker's missing shards; then, if all exist, complete the dataset.

    Who makes the first shard decides what the teacher computes in. A worker that makes none may be on a machine without the
    accelerator of the others: it begins nothing.

    Args:
        claim: the dataset's directory, the stage, and what the rows depend on.
        source: the rows.
        worker: knows which shards are its own.
        opened: gives the engine; called only if shards are missing.
    """
    experiment = source.chat.experiment
    directory, name, settings, inputs = claim
    layout = Layout([part.rows for part in source.parts], experiment.generate.rows_per_shard)
    count = len(layout)
    if count and not directory.exists():
        Budget(experiment, directory, partial(_requests, source, layout), source.reads).check(0)
    shared = SharedShards(experiment, directory)
    shared.join(name, settings, inputs)
    _check_layout(directory, layout)
    is_idle = count > 0 and not worker.part(count)
    precision = record.begun_precision(directory, settings, inputs) or shared.begun_precision()
    if precision is None and is_idle:
        _say_lacking(name, 0, count)
        return
    precision = record.begin_computing(*claim, experiment.seed, precision or teacher_precision(experiment.teacher))
    made: dict[str, Any] = {}
    shared.gather(count)  # who only asks what is missing sees what others have finished
    gathered = False
    while not gathered:
        shared.put_lacking()
        with closing(shared.lacking(worker.shards(name, directory, count))) as missing:
            if (first := next(missing, None)) is not None:
                (directory / MANIFEST).unlink(missing_ok=True)
                making = _Making(name, directory, source, worker, layout, shared, precision, opened)
                made = _make(making, chain([first], missing))
        gathered = shared.gather(count)
    with lock.in_turn(directory / MANIFEST):
        there = finished_shards(directory, "train")
        if len(there) == count:
            there = _undamaged(name, there)
        if len(there) < count:
            known = len({shard.index for shard in there} | shared.indices())
            _say_lacking(name, known, count)
            return
        described = source.chat.description() | {"precision": precision.recorded} | source.description()
        described |= whole_bill(directory, there, experiment)
        if experiment.teachers:
            described["teachers"] = _teachers(source.parts)
            described["route"] = experiment.model_dump(mode="json", include={"route"}, exclude_defaults=True)["route"]
        source.left_out.write(directory / "rejected.parquet")
        failed = failed_rows(there)
        for reason, lost in failed.items():
            say("warning", f"{lost:,} of {len(source.requests):,} rows were given up: the server returned {reason}")
        if "total" in described.get("cost", {}):
            say(name, f"cost {money(described['cost']['paid'])}")
        if failed:
            described["failed"] = failed
        write_manifest(directory, there, described | {"source": inputs})
    shutil.rmtree(directory / _STAGING, ignore_errors=True)
    remove_leftovers(directory)
    shared.decide()
    record.finish(directory, {"rows": len(source.requests) - sum(failed.values()), **made})
    shared.finish()


def _undamaged(name: str, shards: Iterable[Shard]) -> list[Shard]:
    """The shards whose bytes match their checksums, whichever worker made them."""
    whole = []
    for shard in shards:
        if is_damaged(shard.file):
            say(name, f"{shard.file} is damaged; rerun its worker to replace it")
        else:
            whole.append(shard)
    return whole


def _say_lacking(name: str, there: int, count: int) -> None:
    say(name, f"{there:,} of {counted(count, 'shard')} finished; the rest are left to other workers")


def _check_layout(directory: Path, layout: Layout) -> None:
    """Refuse shards that another version has split differently: rows would be lost or duplicated.

    Raises:
        InputError: names the first.
    """
    for shard in finished_shards(directory, "train") if directory.is_dir() else ():
        try:
            rows = pq.read_metadata(shard.file).num_rows + sum(failed_rows([shard]).values())
        except (pa.ArrowException, OSError):  # it is damaged, and made again
            continue
        belong = len(layout.shards[shard.index][1]) if shard.count == len(layout) else 0
        if rows != belong:
            raise InputError(
                f"{shard.file}: has {rows:,} rows instead of {belong:,}: another version of llmdistill, or of a model on the "
                f"Hub, has split them differently; finish it with that version, or remove {directory} to make it again"
            )


def _teachers(parts: Sequence[Part]) -> dict[str, Any]:
    """The entries of several teachers in `dataset.json`, with their tokenizers if these differ."""
    several = have_several_tokenizers({part.name: part.chat for part in parts})
    described = {part.name: part.chat.description() for part in parts}
    return {
        part.name: {
            **described[part.name]["teacher"],
            "rows": part.rows,
            **({"tokenizer": described[part.name]["tokenizer"]} if several else {}),
        }
        for part in parts
    }


@dataclass(frozen=True)
class _Making:
    """How the shards of a dataset are made, by whom and where: those of `layout`, in a stage's `directory`."""

    name: str
    directory: Path
    source: Source
    worker: Worker
    layout: Layout
    shared: SharedShards
    precision: Precision
    opened: Opened


def _requests(source: Source, layout: Layout, index: int) -> Sequence[Request]:
    """The requests of a shard."""
    return [source.requests[row] for row in layout.shards[index][1]]


def _make(making: _Making, missing: Iterable[int]) -> dict[str, Any]:
    """Run the engines over the missing shards; each is stored as soon as its last row is finished. Returns the speed."""
    name, source, layout = making.name, making.source, making.layout
    experiment = source.chat.experiment

    requests_of = partial(_requests, source, layout)
    waiting, budget = iter(missing), Budget(experiment, making.directory, requests_of, source.reads)
    if experiment.teacher.price and (first := next(waiting, None)) is not None:
        budget.check(first)
        most = budget.most(first)
        say(name, f"costs at most about {money(most)} per shard, {money(most * len(layout))} for all {len(layout):,}")
        waiting = chain([first], waiting)
    made: list[dict[str, Any]] = []
    mine = making.worker.part(len(layout))
    tokens, seconds, engine, current = 0, 0.0, None, None
    while True:
        for number, shards in groupby(budget.within(waiting), key=lambda index: layout.shards[index][0]):
            if engine is None or number != current:
                if engine is not None:
                    engine.close()
                engine, current = _open(making, source.parts[number]), number
            started = time.monotonic()
            there = indices(making.directory) | making.shared.indices()
            rows = {index: len(layout.shards[index][1]) for index in mine if layout.shards[index][0] == number}
            # What is written is counted token by token, what is read a row at a time.
            bar = StageBar(name, sum(rows.values()), sum(rows[index] for index in there if index in rows))
            if not source.reads:
                bar.count_tokens(partial(getattr, engine, "tokens"), experiment.generate.max_tokens)

            def store(index: int, completions: list[Completion], gives: Any = engine.gives) -> None:
                made.append(_store(making, index, completions, gives))
                budget.finished(index)

            with bar:
                begun = counting_others(shards, making.directory, rows, bar)
                for completion in _by_shard(source.run(engine, map(requests_of, begun)), layout, store):
                    bar.advance(tokens=len(completion.ids))
                stored = bytes_per_position(made)
                bar.advance(0, facts=[f"{stored:.0f} B/position"] if stored else [])
            tokens, seconds = tokens + bar.tokens, seconds + time.monotonic() - started
        if budget.held is None:
            return record.speed(tokens, seconds)
        budget.check(budget.held)


def _open(making: _Making, part: Part) -> Engine:
    """The engine of a part's teacher."""
    chat, experiment = part.chat, part.chat.experiment
    kept, asked = experiment.targets, None
    if kept.stored.of_writer:
        kept, asked = Targets(kind="none"), kept.kept
    with working(making.name, f"starting the teacher {part.name}".rstrip()):
        spec = EngineSpec(
            teacher=experiment.teacher.model_copy(update={"dtype": making.precision.dtype}),
            sampling=experiment.generate,
            kept=kept,
            end_ids=chat.end_ids,
            max_model_len=part.max_model_len,
            seed=experiment.seed,
            reads_with=chat.vocab_size if making.source.reads else None,
            known_ids=chat.known_ids,
            vocab_size=chat.vocab_size,
            template=chat.template,
            shared=shared_file(making.directory),
            staging=making.directory / _STAGING,
            asked=asked,
        )
        return making.opened(spec)


def _store(making: _Making, index: int, completions: list[Completion], gives: dict[str, Any] | None) -> dict[str, Any]:
    """Store the rows of a shard; returns its entry in `dataset.json`.

    Args:
        making: the dataset.
        index: of the shard.
        completions: its rows.
        gives: what an endpoint gives.

    Raises:
        RemoteError: most of its rows were given up.
    """
    experiment = making.source.parts[making.layout.shards[index][0]].chat.experiment
    failed = Counter(completion.failed for completion in completions if completion.failed)
    check_given_up(failed, len(completions), len(making.layout) == 1, experiment.teacher.endpoint or making.name)
    rows = [making.source.row(completion) for completion in completions if not completion.failed]
    for row in rows:
        check_logprobs(row, unknown=experiment.teacher.abilities.api)
    largest = max(part.chat.vocab_size for part in making.source.parts)  # all shards store their ids in one type
    table = with_failed(rows_to_table(rows, largest), failed)
    table = with_bill(table, bill(completions, experiment, gives))
    shard = write_shard(making.directory, "train", index, len(making.layout), table)
    described = describe_shard(shard)
    making.shared.put(shard)
    return described


def check_given_up(failed: Counter[str], asked: int, alone: bool, where: str) -> None:
    """Refuse a shard most of which was given up: the endpoint has a problem, and another attempt may work.

    Args:
        failed: how many answers, by the reason.
        asked: how many were asked for.
        alone: whether there is no other shard.
        where: the endpoint.

    Raises:
        RemoteError: all were, or most of enough.
    """
    if asked and (failed.total() == asked or (failed.total() > asked / 2 and (asked >= _TELLING or alone))):
        why, count = failed.most_common(1)[0]
        raise RemoteError(f"{where}: {count:,} of {asked:,} answers had {why}; not stored")


def _by_shard(
    completions: Iterator[Completion], layout: Layout, store: Callable[[int, list[Completion]], None]
) -> Iterator[Completion]:
    """Pass completions on; store a shard as soon as its last row is finished, in the order of its requests."""
    pending: dict[int, list[Completion]] = {}
    for completion in completions:
        index = layout.shard_of(completion.index)
        rows = pending.setdefault(index, [])
        rows.append(completion)
        if len(rows) == len(layout.shards[index][1]):
            store(index, sorted(pending.pop(index), key=lambda row: row.index))
        yield completion
