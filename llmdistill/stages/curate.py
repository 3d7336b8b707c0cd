"""`llmdistill curate`: filter a dataset and hold rows out, with every row accounted for.

The rows are read twice: once to decide what becomes of each, once to copy them to where they belong. What is held between
the two is one byte a row; why a row was rejected waits on the disk.
"""

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmdistill.config import Experiment
from llmdistill.config.curate import Contamination, JsonSchema, Judge
from llmdistill.config.shipped import find
from llmdistill.curation import best_of, contamination, duplicates, filters, judge, personal_data, verify, wording
from llmdistill.curation.steps import COLUMNS, Array, Check, Failed, Work
from llmdistill.data.dataset import (
    MANIFEST,
    SPLITS,
    Shard,
    SplitWriter,
    conversations,
    is_held_out,
    read_batches,
    read_manifest,
    shard_files,
    write_manifest,
)
from llmdistill.errors import InputError
from llmdistill.runs import record
from llmdistill.runs.progress import StageBar, say

STEPS: dict[str, Callable[[Any, Work], Check]] = {
    "finish_reason": filters.finish_reason,
    "length": filters.length,
    "language": filters.language,
    "repetition": filters.repetition,
    "refusals": wording.refusals,
    "malformed": wording.malformed,
    "math": verify.math,
    "python": verify.python,
    "json_schema": filters.json_schema,
    "regex": filters.by_regex,
    "judge": judge.judge,
    "best_of": best_of.best_of,
    "duplicates": duplicates.duplicates,
    "near_duplicates": duplicates.near_duplicates,
    "contamination": contamination.contamination,
    "personal_data": personal_data.personal_data,
    "balance": filters.balance,
}
_LIBRARIES = {  # module and extra
    "language": {"lingua": "curate"},
    "math": {"math_verify": "curate"},
    "json_schema": {"jsonschema": "curate"},
    "near_duplicates": {"datasketch": "curate"},
    "personal_data": {"presidio_analyzer": "personal-data"},
}


@dataclass
class Account:
    """What became of the rows that came to one step: in = kept + rejected + failed."""

    name: str
    rows_in: int = 0
    kept: int = 0
    rejected: int = 0
    failed: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """For `dataset.json`: nothing that is another one on the next run."""
        counts = {name: getattr(self, name) for name in ("name", "rows_in", "kept", "rejected", "failed")}
        return counts | ({"facts": self.facts} if self.facts else {})


def curate(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/curated` with the splits `train` and `test`, and `rejected.parquet`.

    Raises:
        InputError: there is no complete dataset, it is damaged, a step cannot be done, or nothing is left of the rows.
    """
    source, directory = experiment.directory("data"), experiment.directory("curated")
    step_inputs = _step_inputs(experiment)
    if dry_run:
        return _say_plan(experiment, source, directory)
    manifest = read_manifest(source)
    settings = experiment.model_dump(mode="json", include={"seed", "curate", "shard_mb"}) | {
        "eval": {"held_out": experiment.eval.held_out}
    }
    inputs = {str(source / MANIFEST): record.sha256(source / MANIFEST)} | step_inputs
    if record.claim(directory, "curate", settings, inputs) == "done":
        return say("curate", f"{directory} is finished")

    files = shard_files(source, "train")
    started = time.monotonic()
    rows = sum(shard["rows"] for shard in manifest["shards"] if shard["split"] == "train")
    with _scratch(Path(experiment.output)) as scratch, StageBar("curate", rows) as bar:
        verdicts, accounts = _decide(experiment, manifest, files, scratch, bar)
        train, test = (int((verdicts == 2 * len(accounts) + side).sum()) for side in (0, 1))
        _check_accounts(accounts, len(verdicts), train + test)
        if not train or (not test and experiment.eval.held_out):
            raise InputError(
                f"{source}: {_sum(accounts, train, test)}; both train and held out need at least one row: "
                "more prompts, weaker steps or another eval.held_out"
            )
        record.begin(directory, "curate", settings, inputs, experiment.seed)
        for leftover in [*directory.glob("*.parquet"), *directory.glob(".*.unfinished"), *directory.glob("*-*.jsonl")]:
            leftover.unlink()  # what was decided is gone, so writing starts over
        shards = _write(experiment, files, verdicts, scratch, directory)
        for log in sorted((scratch / "logs").iterdir()):
            shutil.move(log, directory / log.name)
        description = {key: manifest[key] for key in ("teacher", "tokenizer", "sampling", "targets", "seed", "determinism")}
        description |= {"prompts": manifest.get("prompts", [])}
        description |= {"source": inputs, "versions": record.versions(), "rows_in": len(verdicts)}
        write_manifest(directory, shards, description | {"steps": [account.described() for account in accounts]})
        record.finish(directory, _results(manifest, accounts, len(verdicts), train + test, time.monotonic() - started))
        bar.summary = _sum(accounts, train, test)


def _sum(accounts: list[Account], train: int, test: int) -> str:
    """The account in a line."""
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
    """For `run.json`."""
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
        say("curate", f"{rows:,} rows, {tokens:,} completion tokens, {size / 1e6:,.1f} MB of {source} through {steps}")
        say("curate", f"at most {rows:,} rows and as many bytes are kept, about {rows * held_out:,.0f} of them held out")
    else:
        say("curate", f"{source} (not there yet) through {steps}; holds out {held_out:.0%} of the prompts")
    say("curate", f"would write {directory}")


def _step_inputs(experiment: Experiment) -> dict[str, str]:
    """Path and hash of what the steps read beside the rows, after a look at whether each step can be done.

    Raises:
        InputError: a library or a file is missing.
    """
    inputs = {}
    for number, step in enumerate(experiment.curate):
        key, settings = f"curate.{number}.{step.name}", step.settings
        for library, extra in _LIBRARIES.get(step.name, {}).items():
            if importlib.util.find_spec(library) is None:
                raise InputError(f"{key} needs {library}, which is not installed: pip install 'llmdistill[{extra}]'")
        files: dict[str, str] = {}
        if isinstance(settings, Contamination):
            files = dict.fromkeys(settings.against, f"{key}.against")
        elif isinstance(settings, JsonSchema):
            files = {settings.file: f"{key}.file"}
        elif isinstance(settings, Judge):
            files = {settings.template: f"{key}.template"}
            inputs[settings.teacher.model] = record.model_fingerprint(settings.teacher.model, settings.teacher.revision)
        for path, name in files.items():
            if not find(path).is_file():
                raise InputError(f"{path}: no such file ({name})")
            inputs[path] = record.sha256(find(path))
    return inputs


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A directory beside those of the stages, gone afterwards."""
    for leftover in output.glob(".curate.*.unfinished"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = output / f".curate.{record.writer_name()}.unfinished"
    (scratch / "logs").mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _decide(
    experiment: Experiment, manifest: dict[str, Any], files: list[Path], scratch: Path, bar: StageBar
) -> tuple[Array, list[Account]]:
    """What becomes of every row, and the account of every step.

    A row's verdict is 2s if step s has rejected it, 2s + 1 if it has failed there, and with S steps 2S for train and
    2S + 1 for test. The reasons go to `scratch/details.arrow`, a batch for each group of rows.
    """
    accounts = [Account(step.name) for step in experiment.curate]
    verdicts = []
    share = experiment.eval.held_out
    with ExitStack() as closing:
        details = closing.enter_context(_open_details(scratch))
        checks = []
        for number, (step, account) in enumerate(zip(experiment.curate, accounts, strict=True)):
            log = scratch / "logs" / f"{step.name}-{number + 1}.jsonl"
            key = f"curate.{number}.{step.name}"
            work = Work(experiment, manifest, files, key, scratch, log, closing, account.facts)
            start = time.monotonic()
            checks.append(STEPS[step.name](step.settings, work))
            account.seconds += time.monotonic() - start
        for rows in _whole_prompts(read_batches(files, COLUMNS)):
            sides = [is_held_out(key, experiment.seed, share) for key in conversations(rows)]
            verdict = np.array(sides, dtype=np.uint8) + np.uint8(2 * len(checks))
            reasons: list[str | None] = [None] * len(rows)
            left = np.arange(len(rows))
            for number, (check, account) in enumerate(zip(checks, accounts, strict=True)):
                left = _apply(check, rows, left, number, account, verdict, reasons)
            verdicts.append(verdict)
            details.write_batch(pa.record_batch({"detail": pa.array(reasons, pa.string())}))
            bar.advance(len(rows), _completion_tokens(rows))
    return np.concatenate(verdicts), accounts


def _whole_prompts(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in groups that end where the prompt changes, so that all answers to one that stand together are in one."""
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


def _apply(
    check: Check, rows: pa.Table, left: Array, number: int, account: Account, verdict: Array, reasons: list[str | None]
) -> Array:
    """Let one step look at the rows of a group that are left; those that still are afterwards."""
    start = time.monotonic()
    found = list(check(rows.take(left)))
    account.seconds += time.monotonic() - start
    for place, reason in zip(left, found, strict=True):
        if reason is not None:
            verdict[place] = 2 * number + isinstance(reason, Failed)
            reasons[place] = str(reason).encode(errors="replace").decode()
    stays = np.array([reason is None for reason in found], dtype=bool)
    failed = sum(isinstance(reason, Failed) for reason in found)
    account.rows_in += len(left)
    account.kept += int(stays.sum())
    account.failed += failed
    account.rejected += len(found) - int(stays.sum()) - failed
    return left[stays]


def _check_accounts(accounts: list[Account], rows_in: int, kept: int) -> None:
    """Every row that came in is somewhere, at every step."""
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
    schema = pa.schema({"detail": pa.string()})
    with pa.OSFile(str(scratch / "details.arrow"), "wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        yield writer


def _write(experiment: Experiment, files: list[Path], verdicts: Array, scratch: Path, directory: Path) -> list[Shard]:
    """Copy the rows to where they belong, a group at a time."""
    names = np.array([step.name for step in experiment.curate] or [""])
    kept = 2 * len(experiment.curate)
    splits = [SplitWriter(directory, split, int(experiment.shard_mb * 1e6)) for split in SPLITS]
    unfinished = directory / f".rejected.{record.writer_name()}.unfinished"
    schema = pq.read_schema(files[0])
    for name, kind in {"step": pa.int32(), "reason": pa.string(), "failed": pa.bool_(), "detail": pa.string()}.items():
        schema = schema.append(pa.field(name, kind))
    with (
        pa.OSFile(str(scratch / "details.arrow")) as stream,
        pq.ParquetWriter(unfinished, schema, compression="zstd") as rejected,
    ):
        start = 0
        for rows, details in zip(_whole_prompts(read_batches(files)), pa.ipc.open_stream(stream), strict=True):
            verdict = verdicts[start : start + len(rows)]
            start += len(rows)
            for side, writer in enumerate(splits):
                writer.write(rows.filter(pa.array(verdict == kept + side)))
            out = verdict < kept
            if out.any():
                found = rows.append_column("detail", details["detail"]).filter(pa.array(out))
                steps = verdict[out] // 2
                found = found.append_column("step", pa.array(steps + 1, pa.int32()))
                found = found.append_column("reason", pa.array(names[steps].tolist(), pa.string()))
                found = found.append_column("failed", pa.array(verdict[out] % 2 == 1))
                rejected.write_table(found.select(schema.names))
    unfinished.replace(directory / "rejected.parquet")
    shards = [shard for writer in splits for shard in writer.publish()]
    assert [writer.rows for writer in splits] == [int((verdicts == kept + side).sum()) for side in range(len(splits))]
    assert pq.read_metadata(directory / "rejected.parquet").num_rows == int((verdicts < kept).sum())
    return shards
