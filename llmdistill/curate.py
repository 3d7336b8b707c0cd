"""`llmdistill curate`: filter a dataset and hold rows out, with every rejected row counted and kept with its reason."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill import stage
from llmdistill.config import Experiment
from llmdistill.config_curate import Duplicates, FinishReason, Length, Repetition
from llmdistill.dataset import (
    MANIFEST,
    SPLITS,
    Shard,
    SplitWriter,
    is_held_out,
    read_batches,
    read_manifest,
    shard_files,
    write_manifest,
)
from llmdistill.errors import InputError
from llmdistill.progress import say
from llmdistill.section import Section

Array = np.ndarray[Any, Any]
Filter = Callable[[pa.Table], Iterator[bool]]  # whether each row of a group stays; groups come in order


def curate(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/curated` with the splits `train` and `test`, and `rejected.parquet`.

    Raises:
        InputError: there is no complete dataset, it is damaged, or nothing is left of it.
    """
    source, directory = experiment.directory("data"), experiment.directory("curated")
    steps = ", ".join(step.name for step in experiment.curate) or "no filters"
    if dry_run:
        say("curate", f"{source} through {steps}; holds out {experiment.eval.held_out:.0%} of the prompts")
        say("curate", f"would write {directory}")
        return
    manifest = read_manifest(source)
    settings = experiment.model_dump(mode="json", include={"seed", "curate", "shard_mb"}) | {
        "eval": {"held_out": experiment.eval.held_out}
    }
    inputs = {str(source / MANIFEST): stage.sha256(source / MANIFEST)}
    if stage.claim(directory, "curate", settings, inputs) == "done":
        say("curate", f"{directory} is finished")
        return

    files = shard_files(source, "train")
    verdicts = _judge(experiment, files)
    counts = [int((verdicts == verdict).sum()) for verdict in range(len(experiment.curate) + 2)]
    *rejected, train, test = counts
    if not train or not test:
        raise InputError(
            f"{source}: {train + test:,} rows are left after curation, {train:,} to train on and {test:,} held out; "
            "both need at least one: more prompts, weaker filters or another eval.held_out"
        )
    stage.begin(directory, "curate", settings, inputs, experiment.seed)
    for leftover in [*directory.glob("*.parquet"), *directory.glob(".*.unfinished")]:  # curating is quick: it starts over
        leftover.unlink()
    shards = _write(experiment, files, verdicts, directory)
    names = [step.name for step in experiment.curate]
    reasons = {name: sum(n for n, step in zip(rejected, names, strict=True) if step == name) for name in names}
    reasons = {name: number for name, number in reasons.items() if number}
    description = {key: manifest[key] for key in ("teacher", "tokenizer", "sampling", "targets", "seed", "determinism")}
    description |= {"source": inputs, "versions": stage.versions(), "rows_in": len(verdicts), "rejected": reasons}
    write_manifest(directory, shards, description)
    stage.finish(directory, {"rows_in": len(verdicts), "kept": train + test, "rejected": reasons})
    why = f" ({', '.join(f'{number:,} {reason}' for reason, number in reasons.items())})" if reasons else ""
    say("curate", f"{len(verdicts):,} in = {train:,} train + {test:,} held out + {sum(rejected):,} rejected{why}")


def _judge(experiment: Experiment, files: list[Path]) -> Array:
    """What becomes of every row: the number of the step that rejects it, or after those, 0 for train and 1 for test.

    Rows are read a group at a time; what is held is one byte a row, and what a step itself remembers.
    """
    filters = [_FILTERS[type(step.settings)](step.settings) for step in experiment.curate]
    verdicts = []
    for rows in read_batches(files, ["prompt", "completion", "input_ids", "completion_start", "finish_reason"]):
        share = experiment.eval.held_out
        sides = [is_held_out(prompt, experiment.seed, share) for prompt in rows["prompt"].to_pylist()]
        verdict = np.array(sides, dtype=np.uint8) + len(filters)
        left = np.arange(len(rows))
        for number, keep in enumerate(filters):
            passed = np.fromiter(keep(rows.take(left)), dtype=bool, count=len(left))
            verdict[left[~passed]] = number
            left = left[passed]
        verdicts.append(verdict)
    return np.concatenate(verdicts)


def _write(experiment: Experiment, files: list[Path], verdicts: Array, directory: Path) -> list[Shard]:
    """Copy the rows to where they belong, a group at a time."""
    names = np.array([step.name for step in experiment.curate] or [""])
    splits = [SplitWriter(directory, split, int(experiment.shard_mb * 1e6)) for split in SPLITS]
    unfinished = directory / f".rejected.{stage.writer_name()}.unfinished"
    schema = pq.read_schema(files[0])
    with pq.ParquetWriter(unfinished, schema.append(pa.field("reason", pa.string())), compression="zstd") as rejected:
        start = 0
        for rows in read_batches(files):
            verdict = verdicts[start : start + len(rows)]
            start += len(rows)
            for number, writer in enumerate(splits, start=len(experiment.curate)):
                writer.write(rows.filter(pa.array(verdict == number)))
            out = verdict < len(experiment.curate)
            if out.any():
                reason = pa.array(names[verdict[out]].tolist(), pa.string())
                rejected.write_table(rows.filter(pa.array(out)).append_column("reason", reason))
    unfinished.replace(directory / "rejected.parquet")
    return [shard for writer in splits for shard in writer.publish()]


def _finish_reason(settings: FinishReason) -> Filter:
    return lambda rows: (reason in settings.keep for reason in rows["finish_reason"].to_pylist())


def _length(settings: Length) -> Filter:
    longest = settings.max_tokens or np.inf
    return lambda rows: (settings.min_tokens <= len(ids) <= longest for ids in _completions(rows))


def _repetition(settings: Repetition) -> Filter:
    return lambda rows: (repeated_share(ids, settings.ngram) <= settings.max_share for ids in _completions(rows))


def _duplicates(settings: Duplicates) -> Filter:
    seen: set[bytes] = set()

    def is_first_of_its_kind(rows: pa.Table) -> Iterator[bool]:
        for (message,) in rows["completion"].to_pylist():
            text = re.sub(r"\s+", " ", message["content"]).strip().lower()
            digest = hashlib.sha256(text.encode(errors="replace")).digest()[:16]
            is_first = digest not in seen
            seen.add(digest)
            yield is_first

    return is_first_of_its_kind


_FILTERS: dict[type[Section], Callable[[Any], Filter]] = {
    FinishReason: _finish_reason,
    Length: _length,
    Repetition: _repetition,
    Duplicates: _duplicates,
}


def repeated_share(ids: Array, ngram: int) -> float:
    """The share of n-grams that stood earlier in the sequence; 0 if there are none."""
    if len(ids) < ngram:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(ids, ngram)
    return 1 - len(np.unique(windows, axis=0)) / len(windows)


def _completions(rows: pa.Table) -> Iterator[Array]:
    starts = rows["completion_start"].to_pylist()
    return (np.asarray(ids.values)[start:] for ids, start in zip(rows["input_ids"], starts, strict=True))
