"""`llmdistill curate`: filter a dataset and hold out rows, accounting for every row.

The rows are read twice: once to decide what becomes of each, once to copy them to where they belong. What is held between
the two is two bytes per row; the reasons for rejection are kept on disk.
"""

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmdistill.config import Experiment
from llmdistill.curation.steps import COLUMNS, Array, Check, Failed, StepContext, step_inputs, step_named
from llmdistill.data.batches import read_batches
from llmdistill.data.budget import money
from llmdistill.data.dataset import shard_files
from llmdistill.data.manifest import MANIFEST, read_manifest, write_manifest
from llmdistill.data.shard_writer import SPLITS, Shard, Split, SplitWriter
from llmdistill.data.subjects import conversation_keys, is_held_out
from llmdistill.errors import InputError
from llmdistill.evaluation.statistics import check_clusters
from llmdistill.runs import lock, record
from llmdistill.runs.inputs import sha256
from llmdistill.runs.progress import StageBar, counted, say

_DETAILS = pa.schema({"failed": pa.bool_(), "detail": pa.string()})  # of every row; null where it stays


@dataclass
class Account:
    """The account of one step: in = kept + rejected + failed."""

    name: str
    rows_in: int = 0
    kept: int = 0
    rejected: int = 0
    failed: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, reasons: list[str | None]) -> None:
        """Count rows by the step's verdict."""
        kept, failed = reasons.count(None), sum(isinstance(reason, Failed) for reason in reasons)
        self.rows_in += len(reasons)
        self.kept += kept
        self.failed += failed
        self.rejected += len(reasons) - kept - failed

    def described(self) -> dict[str, Any]:
        """Entry in `dataset.json`: only what is the same in the next run."""
        counts = {name: getattr(self, name) for name in ("name", "rows_in", "kept", "rejected", "failed")}
        return counts | ({"facts": self.facts} if self.facts else {})


@dataclass(frozen=True)
class Verdicts:
    """The verdicts on rows; two arrays of shape (N,), with one byte per row.

    Attributes:
        step_N: number of the step, from 0, that has rejected the row or failed on it; -1 for rows that stay.
        held_out_N: whether its prompt is held out.
    """

    step_N: Array
    held_out_N: Array

    def __len__(self) -> int:
        return len(self.step_N)

    def part(self, start: int, rows: int) -> "Verdicts":
        """Verdicts on consecutive rows."""
        return Verdicts(self.step_N[start : start + rows], self.held_out_N[start : start + rows])

    def out(self) -> Array:
        """The rows that are not kept."""
        return self.step_N >= 0

    def of_split(self, split: Split) -> Array:
        """The kept rows of a split."""
        return ~self.out() & (self.held_out_N == (split == "test"))


def curate(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/curated` with the splits `train` and `test`, and `rejected.parquet`.

    Raises:
        InputError: there is no complete dataset, it is damaged, a step cannot be done, or nothing is left of the rows.
    """
    source, directory = experiment.directory("data"), experiment.directory("curated")
    step_inputs(experiment.curate)
    if dry_run:
        return _say_plan(experiment, source, directory)
    manifest = read_manifest(source)
    (claim,) = claims(experiment)
    if record.claim(*claim) == "done":
        return say("curate", f"{directory} is finished")

    files = shard_files(source, "train")
    if not files:
        raise InputError(f"{source}: no rows to train on, only held-out ones")
    started = time.monotonic()
    rows = sum(shard["rows"] for shard in manifest["shards"] if shard["split"] == "train")
    with _scratch(Path(experiment.output)) as scratch, StageBar("curate", rows) as bar:
        verdicts, accounts, prompts = _decide(experiment, manifest, files, scratch, bar)
        train, test = (int(verdicts.of_split(split).sum()) for split in SPLITS)
        _check_accounts(accounts, len(verdicts), train + test)
        if not train or (not test and experiment.eval.held_out):
            raise InputError(
                f"{source}: {_sum(accounts, train, test)}; both splits need at least one row; "
                "add prompts, relax the steps or change eval.held_out"
            )
        record.begin(*claim, experiment.seed)
        _clear(directory)
        shards = _write(experiment, files, verdicts, scratch, directory)
        for log in sorted((scratch / "logs").iterdir()):
            shutil.move(log, directory / log.name)
        write_manifest(directory, shards, _description(manifest, claim.inputs, accounts, len(verdicts)))
        if (paid := manifest.get("cost", {}).get("paid")) is not None:
            say("curate", f"cost per kept row: {money(paid / max(train + test, 1))}")
        record.finish(directory, _results(manifest, accounts, len(verdicts), train + test, time.monotonic() - started))
        bar.summary = _sum(accounts, train, test)
    if experiment.eval.held_out:  # said before training, not after it
        warn_of_few(prompts)
    return None


def warn_of_few(prompts: int) -> None:
    """Warn if there are too few held-out prompts for an interval, or for a reliable one."""
    try:
        warning = check_clusters(prompts, "held-out prompts", "raise eval.held_out")
    except InputError as error:
        warning = str(error)
    if warning:
        say("warning", warning)


def claims(experiment: Experiment) -> list[record.Claim]:
    """The filtered dataset, and what it depends on."""
    manifest = experiment.directory("data") / MANIFEST
    settings = experiment.model_dump(mode="json", include={"seed", "curate", "shard_mb"})
    settings["eval"] = {"held_out": experiment.eval.held_out}
    if trace := experiment.generate.model_dump(include={"thinking", "thinking_end"}, exclude_defaults=True):
        settings["generate"] = trace  # where answers begin
    inputs = {str(manifest): sha256(manifest)} | step_inputs(experiment.curate)
    return [record.Claim(experiment.directory("curated"), "curate", settings, inputs)]


def _clear(directory: Path) -> None:
    """Delete the output of an interrupted run: its decisions are lost, so writing starts over."""
    for leftover in [*directory.glob("*.parquet"), *directory.glob(".*.unfinished"), *directory.glob("*-*.jsonl")]:
        leftover.unlink()


_CARRIED = ("precision", "left_out", "failed", "cost", "gives", "teachers", "route", "text_from")  # of `dataset.json`


def _description(manifest: dict[str, Any], inputs: dict[str, str], accounts: list[Account], rows_in: int) -> dict[str, Any]:
    """Entry in `dataset.json`."""
    description = {key: manifest[key] for key in ("teacher", "tokenizer", "sampling", "targets", "seed", "determinism")}
    description |= {"prompts": manifest.get("prompts", [])}
    description |= {key: manifest[key] for key in _CARRIED if key in manifest}
    description |= {"source": inputs, "versions": record.versions(), "rows_in": rows_in}
    return description | {"steps": [account.described() for account in accounts]}


def _sum(accounts: list[Account], train: int, test: int) -> str:
    """The account in one line."""
    parts = [f"{train:,} train", f"{test:,} held out"]
    for outcome in ("rejected", "failed"):
        by_name: dict[str, int] = {}
        for account in accounts:
            by_name[account.name] = by_name.get(account.name, 0) + getattr(account, outcome)
        reasons = [f"{number:,} {name}" for name, number in by_name.items() if number]
        if reasons or outcome == "rejected":
            parts.append(f"{sum(by_name.values()):,} {outcome}" + (f" ({', '.join(reasons)})" if reasons else ""))
    rows_in = train + test + sum(account.rejected + account.failed for account in accounts)
    return f"{rows_in:,} in = {' + '.join(parts)}"


def _results(manifest: dict[str, Any], accounts: list[Account], rows_in: int, kept: int, seconds: float) -> dict[str, Any]:
    """Entry in `run.json`."""
    tokens = sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "train")
    return {
        "rows_in": rows_in,
        "kept": kept,
        "rejected": sum(account.rejected for account in accounts),
        "failed": sum(account.failed for account in accounts),
        **record.speed(tokens, seconds),
        "steps": [account.described() | {"seconds": round(account.seconds, 3)} for account in accounts],
    }


def _say_plan(experiment: Experiment, source: Path, directory: Path) -> None:
    steps = ", ".join(step.name for step in experiment.curate) or "no steps"
    held_out = experiment.eval.held_out
    if (source / MANIFEST).is_file():
        shards = [shard for shard in read_manifest(source)["shards"] if shard["split"] == "train"]
        rows, tokens, size = (sum(shard[key] for shard in shards) for key in ("rows", "tokens", "bytes"))
        say(
            "curate",
            f"{counted(rows, 'row')}, {counted(tokens, 'completion token')}, {size / 1e6:,.1f} MB of {source} through {steps}",
        )
        say("curate", f"at most {counted(rows, 'row')} and as many bytes are kept, about {rows * held_out:,.0f} of them held out")
    else:
        say("curate", f"{source} (does not exist yet) through {steps}; holds out {held_out:.0%} of the prompts")
    say("curate", f"would write {directory}")


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A temporary directory next to those of the stages."""
    for leftover in output.glob(".curate.*.unfinished"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = output / f".curate.{lock.writer_name()}.unfinished"
    (scratch / "logs").mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _decide(
    experiment: Experiment, manifest: dict[str, Any], files: list[Path], scratch: Path, bar: StageBar
) -> tuple[Verdicts, list[Account], int]:
    """The verdict on every row, the account of every step, and the number of prompts held out.

    The reasons go to `scratch/details.arrow`, a batch for each group of rows.
    """
    accounts = [Account(step.name) for step in experiment.curate]
    steps, held_out = [], []
    prompts: set[int] = set()
    with ExitStack() as closing:
        details = closing.enter_context(_open_details(scratch))
        checks = []
        for number, account in enumerate(accounts):
            log = scratch / "logs" / f"{account.name}-{number + 1}.jsonl"
            key = f"curate.{number}.{account.name}"
            context = StepContext(experiment, manifest, files, key, scratch, log, closing, account.facts)
            start = time.monotonic()
            checks.append(step_named(account.name).start(experiment.curate[number].settings, context))
            account.seconds += time.monotonic() - start
        for rows in _whole_prompts(read_batches(files, COLUMNS)):
            step_N, reasons = _look(checks, accounts, rows)
            steps.append(step_N)
            keys = conversation_keys(rows)
            held_out.append([is_held_out(key, experiment.seed, experiment.eval.held_out) for key in keys])
            kept = zip(keys, held_out[-1], step_N < 0, strict=True)
            prompts.update(hash(key) for key, held, stays in kept if held and stays)
            details.write_batch(_details(reasons))
            bar.advance(len(rows), _completion_tokens(rows))
    return Verdicts(np.concatenate(steps), np.concatenate(held_out)), accounts, len(prompts)


def _whole_prompts(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in groups that end where the prompt changes, so that consecutive answers to a prompt are together."""
    waiting: pa.Table | None = None
    for batch in batches:
        rows = batch if waiting is None else pa.concat_tables([waiting, batch])
        end = len(rows) - 1
        last = rows["prompt"][end]
        while end and len(last) and rows["prompt"][end - 1] == last:
            end -= 1
        if end:
            yield rows.slice(0, end)
        waiting = rows.slice(end)
    if waiting is not None:
        yield waiting


def _look(checks: list[Check], accounts: list[Account], rows: pa.Table) -> tuple[Array, list[str | None]]:
    """Apply the steps in order to the remaining rows of a group; returns `Verdicts.step_N` and the reasons."""
    step_N = np.full(len(rows), -1, dtype=np.int8)
    reasons: list[str | None] = [None] * len(rows)
    left = np.arange(len(rows))
    for number, (check, account) in enumerate(zip(checks, accounts, strict=True)):
        start = time.monotonic()
        found = list(check(rows.take(left)))
        account.seconds += time.monotonic() - start
        account.add(found)
        for place, reason in zip(left, found, strict=True):
            if reason is not None:
                step_N[place], reasons[place] = number, reason
        left = left[[reason is None for reason in found]]
    return step_N, reasons


def _details(reasons: list[str | None]) -> pa.RecordBatch:
    """Reasons, stored on disk until needed."""
    failed = [reason if reason is None else isinstance(reason, Failed) for reason in reasons]
    texts = [reason if reason is None else str(reason).encode(errors="replace").decode() for reason in reasons]
    return pa.record_batch({"failed": failed, "detail": texts}, schema=_DETAILS)


def _check_accounts(accounts: list[Account], rows_in: int, kept: int) -> None:
    """Check that every input row is accounted for at every step."""
    left = rows_in
    for account in accounts:
        assert account.rows_in == left, account
        assert account.rows_in == account.kept + account.rejected + account.failed, account
        left = account.kept
    assert left == kept


def _completion_tokens(rows: pa.Table) -> int:
    return int(pc.sum(pc.list_value_length(rows["input_ids"])).as_py() - pc.sum(rows["completion_start"]).as_py())


@contextmanager
def _open_details(scratch: Path) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    with pa.OSFile(str(scratch / "details.arrow"), "wb") as stream, pa.ipc.new_stream(stream, _DETAILS) as writer:
        yield writer


def _write(experiment: Experiment, files: list[Path], verdicts: Verdicts, scratch: Path, directory: Path) -> list[Shard]:
    """Copy the rows to their destination, a group at a time."""
    names = [step.name for step in experiment.curate]
    splits = {split: SplitWriter(directory, split, int(experiment.shard_mb * 1e6)) for split in SPLITS}
    unfinished = directory / f".rejected.{lock.writer_name()}.unfinished"
    schema = pq.read_schema(files[0])
    for name, kind in {"step": pa.int32(), "reason": pa.string(), "failed": pa.bool_(), "detail": pa.string()}.items():
        schema = schema.append(pa.field(name, kind))
    with (
        pa.OSFile(str(scratch / "details.arrow")) as stream,
        pq.ParquetWriter(unfinished, schema, compression="zstd") as rejected,
    ):
        start = 0
        for rows, details in zip(_whole_prompts(read_batches(files)), pa.ipc.open_stream(stream), strict=True):
            here = verdicts.part(start, len(rows))
            start += len(rows)
            for split, writer in splits.items():
                writer.write(rows.filter(pa.array(here.of_split(split))))
            if here.out().any():
                rejected.write_table(_rejected(rows, details, here, names).select(schema.names))
    unfinished.replace(directory / "rejected.parquet")
    shards = [shard for writer in splits.values() for shard in writer.publish()]
    assert all(writer.rows == verdicts.of_split(split).sum() for split, writer in splits.items())
    assert pq.read_metadata(directory / "rejected.parquet").num_rows == verdicts.out().sum()
    return shards


def _rejected(rows: pa.Table, details: pa.RecordBatch, verdicts: Verdicts, names: list[str]) -> pa.Table:
    """The rows that are not kept, with the step, its name and the reason."""
    for name in _DETAILS.names:
        rows = rows.append_column(name, details[name])
    steps = verdicts.step_N[verdicts.out()].tolist()
    out = rows.filter(pa.array(verdicts.out()))
    out = out.append_column("step", pa.array([step + 1 for step in steps], pa.int32()))
    return out.append_column("reason", pa.array([names[step] for step in steps], pa.string()))
