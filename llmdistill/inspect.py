"""`llmdistill inspect`: what is in a dataset, at a glance."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from llmdistill import targets
from llmdistill.dataset import SPLITS, bytes_per_position, read_manifest, shard_files
from llmdistill.progress import console


def inspect(directory: Path) -> None:
    """Print counts, bytes a position, kept mass and a sample; the shards' checksums are verified on the way.

    Raises:
        InputError: there is no complete dataset of this schema, or a shard is damaged.
    """
    manifest = read_manifest(directory)
    files = {split: shard_files(directory, split) for split in SPLITS}
    everything = [file for split in files.values() for file in split]
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(manifest, everything):
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table, soft_wrap=False)
    for split, members in files.items():
        if members:
            entries = [entry for entry in manifest["shards"] if entry["split"] == split]
            rows, tokens, size = (sum(entry[key] for entry in entries) for key in ("rows", "tokens", "bytes"))
            text = f"{rows:,} rows · {tokens:,} completion tokens · {size / 1e6:,.1f} MB in {len(members)} shards"
            console.print(f"[bold]{split:<6}[/bold] {text}")
    _print_sample(everything[0])


def _facts(manifest: dict[str, Any], files: list[Path]) -> list[tuple[str, str]]:
    teacher, sampling, kept = manifest["teacher"], manifest["sampling"], manifest["targets"]
    facts = [
        ("teacher", f"{teacher['model']} by {teacher['engine']}, vocabulary {manifest['tokenizer']['vocab_size']:,}"),
        ("sampling", ", ".join(f"{key} {value}" for key, value in sampling.items()) or "unknown"),
        ("targets", ", ".join(str(value) if key == "kind" else f"{key} = {value}" for key, value in kept.items())),
    ]
    if kept["kind"] != "none":
        facts.append(("size", f"{bytes_per_position(files):.0f} bytes a position"))
    if kept["kind"] == "sampled":
        exact = np.concatenate([_column(file, "target_exact") for file in files])
        facts.append(("kept exactly", f"{exact.mean():.1f} of {kept['n']} tokens a position, the others by an unbiased draw"))
    if kept["kind"] == "topk":
        tail = np.concatenate([_column(file, "target_tail") for file in files])
        facts.append(("kept mass", f"{1 - tail.mean():.2%} on average, {1 - np.percentile(tail, 95):.2%} at the 5th percentile"))
    if manifest.get("rejected"):
        facts.append(("rejected", ", ".join(f"{number} {reason}" for reason, number in manifest["rejected"].items())))
    facts.append(("repeats", manifest["determinism"]))
    return facts


def _column(file: Path, name: str) -> targets.Array:
    column: targets.Array = pq.read_table(file, columns=[name])[name].combine_chunks().flatten().to_numpy()
    return column


def _print_sample(file: Path) -> None:
    row = pq.ParquetFile(file).read_row_group(0).slice(0, 1).to_pylist()[0]
    for message in [*row["prompt"], *row["completion"]]:
        console.print(Panel(escape(message["content"]), title=escape(message["role"]), title_align="left"), soft_wrap=False)
    length = len(row["input_ids"]) - row["completion_start"]
    console.print(
        f"row {row['id']} · {row['completion_start']} prompt tokens, {length} completion tokens, ended by {row['finish_reason']}"
    )
