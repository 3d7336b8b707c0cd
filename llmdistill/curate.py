"""`llmdistill curate`: filter a dataset and hold rows out, with every rejected row counted and kept with its reason."""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill import stage
from llmdistill.config import CurateStep, Duplicates, Experiment, FinishReason, Length, Repetition, Section
from llmdistill.dataset import MANIFEST, finished_shards, read_manifest, read_rows, remove_leftovers, write_manifest, write_shard
from llmdistill.errors import InputError
from llmdistill.progress import say

Array = np.ndarray[Any, Any]


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
    settings = experiment.model_dump(mode="json", include={"seed", "curate"}) | {"eval": {"held_out": experiment.eval.held_out}}
    inputs = {str(source / MANIFEST): stage.sha256(source / MANIFEST)}
    if stage.claim(directory, "curate", settings, inputs) == "done":
        say("curate", f"{directory} is finished")
        return

    rows = read_rows(source, "train")
    kept, rejected = _apply(experiment.curate, rows)
    train, test = _split(kept, experiment.eval.held_out, experiment.seed)
    if not len(train) or not len(test):
        raise InputError(
            f"{source}: {len(kept):,} rows are left after curation, {len(train):,} to train on and {len(test):,} held out; "
            "both need at least one: more prompts, weaker filters or another eval.held_out"
        )
    assert len(rows) == len(train) + len(test) + len(rejected)

    stage.begin(directory, "curate", settings, inputs, experiment.seed)
    for leftover in directory.glob("*.parquet"):  # curating is quick: it starts over
        leftover.unlink()
    remove_leftovers(directory)
    per_shard = experiment.generate.rows_per_shard
    for split, table in (("train", train), ("test", test)):
        count = -(-len(table) // per_shard)
        for index in range(count):
            write_shard(directory, split, index, count, table.slice(index * per_shard, per_shard))  # type: ignore[arg-type]
    _write_whole(rejected, directory / "rejected.parquet")
    reasons = {reason: rejected["reason"].to_pylist().count(reason) for reason in dict.fromkeys(rejected["reason"].to_pylist())}
    description = {key: manifest[key] for key in ("teacher", "tokenizer", "sampling", "targets", "seed", "determinism")}
    description |= {"source": inputs, "versions": stage.versions(), "rows_in": len(rows), "rejected": reasons}
    write_manifest(directory, finished_shards(directory, "train") + finished_shards(directory, "test"), description)
    stage.finish(directory, {"rows_in": len(rows), "kept": len(kept), "rejected": reasons})
    why = f" ({', '.join(f'{number} {reason}' for reason, number in reasons.items())})" if reasons else ""
    say("curate", f"{len(rows):,} in = {len(train):,} train + {len(test):,} held out + {len(rejected):,} rejected{why}")


def _apply(steps: list[CurateStep], rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows that pass every step, and the others with the step that rejected them."""
    rejected = []
    for step in steps:
        keep = np.fromiter(_FILTERS[type(step.settings)](rows, step.settings), dtype=bool, count=len(rows))
        rejected.append(_with_reason(rows.filter(pa.array(~keep)), step.name))
        rows = rows.filter(pa.array(keep))
    return rows, pa.concat_tables(rejected) if rejected else _with_reason(rows.slice(0, 0), "")


def _split(rows: pa.Table, held_out: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """Train and test rows by a hash of the prompt: all samples of a prompt on one side, at any size of the dataset."""

    def share(prompt: Any) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8]) / 2**64

    test = pa.array([share(prompt) < held_out for prompt in rows["prompt"].to_pylist()], pa.bool_())
    return rows.filter(pa.compute.invert(test)), rows.filter(test)


def _finish_reason(rows: pa.Table, settings: FinishReason) -> Iterator[bool]:
    return (reason in settings.keep for reason in rows["finish_reason"].to_pylist())


def _length(rows: pa.Table, settings: Length) -> Iterator[bool]:
    longest = settings.max_tokens or np.inf
    return (settings.min_tokens <= len(ids) <= longest for ids in _completions(rows))


def _repetition(rows: pa.Table, settings: Repetition) -> Iterator[bool]:
    return (repeated_share(ids, settings.ngram) <= settings.max_share for ids in _completions(rows))


def _duplicates(rows: pa.Table, settings: Duplicates) -> Iterator[bool]:
    seen: set[str] = set()
    for (message,) in rows["completion"].to_pylist():
        text = re.sub(r"\s+", " ", message["content"]).strip().lower()
        yield text not in seen
        seen.add(text)


_FILTERS: dict[type[Section], Callable[[pa.Table, Any], Iterator[bool]]] = {
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


def _with_reason(rows: pa.Table, reason: str) -> pa.Table:
    return rows.append_column("reason", pa.array([reason] * len(rows), pa.string()))


def _write_whole(table: pa.Table, file: Path) -> None:
    unfinished = file.with_name(f".{file.name}.unfinished")
    pq.write_table(table, unfinished, compression="zstd")
    shutil.move(unfinished, file)
