"""Overhead of many shards and workers: coordination on a disk and on a slow file system, and a simulated cluster.

    python benchmarks/scale.py

Coordination is measured with the package's own functions on directories of many small shards. The slow file system is this
disk with a delay before every operation on it that Python or Arrow begins (opening, listing, renaming, removing).
The cluster is simulated: the times of shards are drawn from the completion lengths of a real dataset, what else is assumed is
printed. Utilisation is the time in which workers make shards that are kept, as a share of the time for which they hold their
machines: actors until the end, a task of an array until its share is made.
"""

import heapq
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import synthetic
from found import argument_parser, report

from llmdistill.data.manifest import describe_shard, write_manifest
from llmdistill.data.rows import Row, rows_to_table
from llmdistill.data.shard_writer import finished_shards, write_shard
from llmdistill.data.shards import Share
from llmdistill.data.targets import Sampled

WORKERS = 1000
SHARDS = 100_000
ROWS = 1024  # a shard
SPEED = 2500.0  # tokens a second of a worker
START = 180.0  # seconds until an engine writes
MTBF = 24 * 3600.0  # seconds between failures of a worker
SLOW = (0.02, 3.0)  # share of the workers, and how much slower they are
DELAY = 0.005  # seconds of an operation on the slow file system


def main() -> None:
    """Print the tables and the aims."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 10, 1000, 100_000])
    parser.add_argument("--lengths", type=Path, help="a dataset whose completion lengths give the shard times")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    workers, shards, stored = (10, 1000, 16) if smoke else (WORKERS, SHARDS, ROWS)
    found = {"store": store(stored), "coordination": [], "cluster": []}
    tokens, seconds = found["store"]["tokens"], found["store"]["seconds"]
    print(f"a shard of {stored:,} rows, {tokens:,} tokens: encoded and stored in {seconds:.2f} s,")
    print(f"while an engine with {SPEED:,.0f} tokens/s needs {tokens / SPEED:,.0f} s to generate it\n")
    print("| shards | | a worker finds its own (1 of 10) | listing all | completing the dataset | memory |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for count in [1, 10] if smoke else arguments.shards:
        for where, delay in (("disk", 0.0), (f"{1000 * DELAY:.0f} ms an operation", DELAY)):
            row = {"shards": count, "where": where, **coordination(count, delay)}
            found["coordination"].append(row)
            print(f"| {count:,} | {where} | {clock(row['own'])} | {clock(row['list'])} | {clock(row['complete'])} | "
                  f"{row['memory'] / 2**20:,.0f} MiB |", flush=True)  # fmt: skip
    lengths = completion_lengths(arguments.lengths)
    print(
        f"\n{workers:,} workers, {shards:,} shards of {ROWS:,} rows; {SPEED:,.0f} tokens/s, {START:.0f} s to start an engine, "
        f"{SLOW[0]:.0%} of the workers {SLOW[1]:g}× slower, a failure every {MTBF / 3600:.0f} h of a worker\n"
    )
    print("| distribution of shards | utilisation | shards lost per failure | total time |\n| --- | ---: | ---: | ---: |")
    for name, tasks in (
        ("handed out one by one (Ray)", None),
        (f"an array of {workers:,}", workers),
        (f"an array of {10 * workers:,}", 10 * workers),
    ):
        row = {"way": name, **cluster(lengths, tasks, workers, shards)}
        found["cluster"].append(row)
        print(f"| {name} | {row['utilisation']:.1%} | {row['lost']:.2f} | {row['hours']:.1f} h |", flush=True)
    best = found["cluster"][0]
    aims = {"utilisation": best["utilisation"], "lost_shards_a_failure": best["lost"]}
    aims["store_share"] = found["store"]["seconds"] / (found["store"]["tokens"] / SPEED)
    print()
    report(found, aims, arguments.json)


def clock(seconds):
    return f"{1000 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def rows(count, length):
    """Rows with sampled targets of a vocabulary of 49,152 tokens."""
    generator = np.random.default_rng(0)
    for number in range(count):
        ids = generator.integers(0, 49_152, (length, 16))
        logprobs = np.log(generator.dirichlet(np.ones(16), length)).astype(np.float32)
        text = [{"role": "assistant", "content": "word " * length}]
        targets = Sampled.from_kept(ids, logprobs)
        yield Row(f"{number:032x}", text, text, ids[:8, 0], ids[:, 0], "stop", logprobs[:, 0], targets)


def store(count):
    """Seconds to encode and store one shard of so many rows, median of three."""
    made, seconds = list(rows(count, 200)), []
    for turn in range(3):
        with tempfile.TemporaryDirectory() as directory:
            start = time.perf_counter()
            write_shard(Path(directory), "train", turn, 3, rows_to_table(made, 49_152))
            seconds.append(time.perf_counter() - start)
    return {"tokens": count * 200, "seconds": statistics.median(seconds)}


DELAYED = {"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "glob.glob"}
delays = {"seconds": 0.0}


def wait(event, _):
    if delays["seconds"] and event in DELAYED:
        time.sleep(delays["seconds"])


sys.addaudithook(wait)


def coordination(count, delay):
    """Seconds of what a worker does beside its shards."""
    directory = Path(tempfile.mkdtemp(prefix="scale-"))
    read = pq.read_metadata

    def slowly(file, *arguments, **named):
        time.sleep(delays["seconds"])
        return read(file, *arguments, **named)

    try:
        pq.read_metadata = slowly
        first = write_shard(directory, "train", 0, count, rows_to_table(list(rows(2, 4)), 49_152))
        source = first.file
        for index in range(1, count):
            file = directory / first.file.name.replace("-00000-of", f"-{index:05d}-of", 1)
            if index % 10_000:
                os.link(source, file)
            else:  # a file has so many names at most
                source = Path(shutil.copy(first.file, file))
        delays["seconds"] = delay
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def timed(work):
            start = time.perf_counter()
            result = work()
            return time.perf_counter() - start, result

        own, missing = timed(lambda: list(Share(0, min(10, count)).shards("scale", directory, count)))
        listed, there = timed(lambda: finished_shards(directory, "train"))
        assert not missing
        assert len(there) == count
        if count > 10_000 and delay:  # a footer of each is read: as many as need not be waited for
            sample = there[:1000]
            complete = timed(lambda: [describe_shard(shard) for shard in sample])[0] * count / len(sample)
        else:
            complete, _ = timed(lambda: write_manifest(directory, there, synthetic.described("sampled", 49_152, n=16)))
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        return {"own": own, "list": listed, "complete": complete, "memory": memory}
    finally:
        delays["seconds"] = 0.0
        pq.read_metadata = read
        shutil.rmtree(directory)


def completion_lengths(directory):
    """Of a real dataset; without one, those of the demo's first 240 answers cut at 512 tokens: log-normal around 180."""
    if directory:
        files = sorted(directory.glob("*.parquet"))
        tables = [pq.read_table(file, columns=["token_logprobs"]) for file in files]
        return np.concatenate([[len(row) for row in table["token_logprobs"].to_pylist()] for table in tables])
    generator = np.random.default_rng(0)
    return np.clip(generator.lognormal(np.log(180), 0.7, 10_000), 1, 512)


def cluster(lengths, tasks, workers, shards):
    """Simulate until every shard is there; with tasks, each has a fixed share of the shards and starts its own engine."""
    generator = np.random.default_rng(0)
    work = generator.choice(lengths, (shards, ROWS)).sum(1) / SPEED
    slowness = np.where(generator.random(workers) < SLOW[0], SLOW[1], 1.0)
    shares = [list(range(shards))[::-1]] if tasks is None else [list(range(task, shards, tasks))[::-1] for task in range(tasks)]
    waiting = list(range(len(shares)))[::-1]
    events = [(0.0, worker) for worker in range(workers)]  # when a worker is free
    heapq.heapify(events)
    fails_at = generator.exponential(MTBF, workers)
    task_of: dict[int, int | None] = dict.fromkeys(range(workers))
    useful = held = lost = failures = 0.0
    end = 0.0
    started = set()
    while events:
        now, worker = heapq.heappop(events)
        if tasks is None:
            share, begin = shares[0], 0.0 if worker in started else START
        else:
            begin = 0.0
            task = task_of[worker]
            if task is None or not shares[task]:
                task = task_of[worker] = waiting.pop() if waiting else None
                begin = START
            if task is None:
                continue
            share = shares[task]
        if not share:
            continue
        started.add(worker)
        shard = share.pop()
        seconds = begin + work[shard] * slowness[worker]
        held += min(seconds, fails_at[worker] - now)
        if now + seconds > fails_at[worker]:
            share.append(shard)
            failures += 1
            lost += max(fails_at[worker] - now - begin, 0) / (work[shard] * slowness[worker])
            started.discard(worker)
            back = fails_at[worker] + START  # the machine comes back, or another does
            fails_at[worker] = back + generator.exponential(MTBF)
            heapq.heappush(events, (back, worker))
            continue
        useful += work[shard] * slowness[worker]
        end = max(end, now + seconds)
        heapq.heappush(events, (now + seconds, worker))
    held = workers * end if tasks is None else held
    return {"utilisation": useful / held, "lost": lost / max(failures, 1), "hours": end / 3600}


if __name__ == "__main__":
    main()
