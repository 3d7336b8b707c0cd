"""Speed and memory of writing, checking, shuffling and collating large datasets, on one core.

    python benchmarks/dataset.py

The rows are synthetic (Zipf-like ids, 16 sampled targets per position, 100 to 900 completion tokens), written by what
`curate` writes with and read by what training reads with: `load_dataset`, a shuffling `DataLoader`, `DistillCollator`. Every
size runs in a process of its own. Memory is the highest resident set, with all that is mapped from files, and the
highest that is not; the second is what cannot be given back to the system.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from found import argument_parser, report

VOCAB, N = 151_936, 16
SIZES = (1_000_000, 3_000_000, 10_000_000)
SMOKE_SIZES = (10_000,)


def main() -> None:
    """Print a row a size, and the aims from the largest."""
    parser = argument_parser(__doc__)
    parser.add_argument("--positions", type=int, nargs="*", default=SIZES)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    columns = ("positions", "shards", "GB", "write", "checksum", "open", "read", "inspect s", "resident GB", "anonymous GB")
    print("| " + " | ".join(columns) + " |\n|" + " ---: |" * len(columns))
    table = []
    for positions in SMOKE_SIZES if arguments.smoke else arguments.positions:
        command = [sys.executable, __file__, "--one", str(positions)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
        last = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()[-1]
        table.append(json.loads(last))
        print("| " + " | ".join(f"{table[-1][name]:,.10g}" for name in columns) + " |", flush=True)
    aims = {"read_positions_a_second": table[-1]["read"], "resident_gb": table[-1]["resident GB"]}
    print("\nwrite, checksum, open and read in positions per second")
    report({"table": table}, aims, arguments.json)


def measure(positions: int) -> dict[str, float]:
    """Every step over a dataset of so many positions."""
    memory = Memory()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["HF_DATASETS_CACHE"] = f"{directory}/cache"
        data = Path(directory) / "data"
        found: dict[str, float] = {"positions": positions}
        found |= write(data, positions)
        found |= read(data, positions)
    return {**found, **memory.stop()}


def write(data: Path, positions: int) -> dict[str, float]:
    """Stream rows into shards of the default size, and write the manifest."""
    from llmdistill.config import Experiment
    from llmdistill.data.manifest import write_manifest
    from llmdistill.data.rows import rows_to_table
    from llmdistill.data.shard_writer import SplitWriter

    default = Experiment.model_fields["shard_mb"].default
    writer = SplitWriter(data, "train", int(default * 1e6))
    generator = np.random.default_rng(0)
    seconds, done = 0.0, 0
    while done < positions:
        rows = synthetic_rows(generator, min(positions - done, 100_000), done)
        done += sum(len(row.completion_ids) for row in rows)
        start = time.perf_counter()
        writer.write(rows_to_table(rows, VOCAB))
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    shards = writer.publish()
    write_manifest(data, shards, synthetic.described("sampled", VOCAB, n=N))
    seconds += time.perf_counter() - start
    size = sum(shard.file.stat().st_size for shard in shards)
    return {"shards": len(shards), "GB": round(size / 1e9, 3), "write": round(positions / seconds)}


def read(data: Path, positions: int) -> dict[str, float]:
    """Check, open, inspect, and collate every row once in a random order."""
    import torch

    from llmdistill import load_dataset
    from llmdistill.data.collator import DistillCollator
    from llmdistill.data.dataset import shard_files
    from llmdistill.data.inspect import inspect

    torch.set_num_threads(1)
    start = time.perf_counter()
    shard_files(data, "train")
    checked = time.perf_counter() - start
    start = time.perf_counter()
    dataset = load_dataset(data)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    inspect(data)
    inspected = time.perf_counter() - start
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True, collate_fn=DistillCollator(pad_token_id=0))
    start, seen = time.perf_counter(), 0
    for batch in loader:
        seen += len(batch["target_entropy"])
    seconds = time.perf_counter() - start
    assert seen == sum(entry["tokens"] for entry in json.loads((data / "dataset.json").read_text())["shards"])
    speeds = {"checksum": seen / checked, "open": seen / opened, "read": seen / seconds}
    return {**{name: round(speed) for name, speed in speeds.items()}, "inspect s": round(inspected, 2)}


def synthetic_rows(generator: np.random.Generator, positions: int, number: int) -> list[Any]:
    """Rows with so many positions together, or a few more."""
    from llmdistill.data.rows import Row
    from llmdistill.data.targets import Sampled

    lengths: list[int] = []
    while sum(lengths) < positions:
        lengths.append(int(generator.integers(100, 900)))
    total = sum(lengths)
    ids_NK = (VOCAB ** generator.random((total, N + 8))).astype(np.int64)
    ids_NK = (ids_NK + np.arange(N + 8) * 131) % VOCAB  # nearly always distinct, as a sample is
    ids_NK = np.sort(ids_NK, axis=1)[:, :N]
    exact_N = generator.integers(1, 9, total)
    logprobs_NK = np.sort(-3 - 2 * generator.random((total, N)), axis=1)[:, ::-1].astype(np.float32)
    is_exact_NK = np.arange(N) < exact_N[:, None]
    for mask in (is_exact_NK, ~is_exact_NK):
        ids_NK[mask] = np.sort(np.where(mask, ids_NK, VOCAB), axis=1)[np.sort(mask, axis=1)[:, ::-1]]
    kept = Sampled(ids_NK, logprobs_NK, exact_N, generator.random(total).astype(np.float32))
    rows, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        row = Sampled(*(getattr(kept, field)[part] for field in ("ids_NK", "logweights_NK", "exact_N", "entropy_N")))
        text = " ".join(map(str, ids_NK[part, 0]))
        messages = [{"role": "user", "content": "a question"}], [{"role": "assistant", "content": text}]
        prompt = generator.integers(0, VOCAB, 50).tolist()
        rows.append(Row(f"{number}-{start}", *messages, prompt, ids_NK[part, 0], "stop", logprobs_NK[part, 0], row))
        start += length
    return rows


class Memory:
    """The highest memory of this process, looked at fifty times a second."""

    def __init__(self) -> None:
        self.highest = {"VmRSS": 0, "RssAnon": 0}
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while self.running:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.highest:
                    self.highest[name] = max(self.highest[name], int(value.split()[0]))
            time.sleep(0.02)

    def stop(self) -> dict[str, float]:
        """In GB."""
        self.running = False
        self.thread.join()
        return {name: round(self.highest[key] / 1e6, 2) for name, key in (("resident GB", "VmRSS"), ("anonymous GB", "RssAnon"))}


if __name__ == "__main__":
    main()
