"""The step of `curate` that finds nearly equal texts: MinHash finds candidates, the exact similarity decides."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmdistill.config.curate import NearDuplicates
from llmdistill.curation.steps import Array, Check, CurationStep, StepContext, all_rows, compared
from llmdistill.data.ngrams import jaccard, ngram_hashes, words

_PERMUTATIONS = 128
_MISSED = 0.05  # of the pairs that are just as similar as the threshold
_BUCKETS = 1 << 20
_FEW = 10  # rows that may share an n-gram, however few rows there are
_SHOWN = 20  # clusters


def near_duplicates(settings: NearDuplicates, context: StepContext) -> Check:
    """By the similarity to a row kept earlier.

    A row is compared with kept rows only, so that likeness is never handed on: where A is like B and B like C, C is
    compared with A. What is remembered of a kept row is its place in the index (some 7 kB); its n-grams are on the disk.
    """
    from datasketch import MinHash, MinHashLSH

    template = _boilerplate(settings, context)
    bands = best_bands(settings.threshold)
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=bands, hashfunc=lambda key: hashlib.sha256(key).digest()[:8])
    empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
    kept = _Sets(context.scratch / f"{context.key}.ngrams", context)
    ids: list[str] = []
    clusters: Counter[int] = Counter()
    beyond: Counter[int] = Counter()

    def check(rows: pa.Table) -> Iterator[str | None]:
        for identity, text in zip(rows["id"].to_pylist(), compared(rows, settings.of), strict=True):
            ngrams = np.unique(_ngrams(text, settings.ngram))
            own = ngrams[~template(ngrams)]
            own = own if len(own) else ngrams  # nothing but boilerplate: then that is what it says
            if not len(own):
                yield None
                continue
            sketch = empty.copy()
            sketch.update_batch((own & np.uint64(0xFFFFFFFF)).tolist())
            alike = {first: jaccard(own, kept[first]) for first in sorted(index.query(sketch))}
            first = max(alike, key=lambda first: alike[first], default=-1)
            if first < 0 or alike[first] < settings.threshold:
                index.insert(len(ids), sketch, check_duplication=False)
                kept.append(own)
                ids.append(identity)
                yield None
            elif clusters[first] >= settings.max_cluster:
                beyond[first] += 1
                yield None
            else:
                clusters[first] += 1
                yield f"similarity {alike[first]:.2f} to {ids[first]}"

    def tell() -> None:
        context.facts |= {
            "clusters": len(clusters),
            "kept_beyond_max_cluster": beyond.total(),
            "largest": [
                {"kept": ids[first], "rejected": size, "kept_beyond": beyond[first]}
                for first, size in clusters.most_common(_SHOWN)
            ],
        }

    context.closing.callback(tell)
    return check


def best_bands(threshold: float) -> tuple[int, int]:
    """Bands, and rows per band, of an index that misses few of the pairs at the threshold.

    It finds too many instead; they are compared one by one.
    """
    fitting = [
        (_PERMUTATIONS // size, size)
        for size in range(1, _PERMUTATIONS // 2 + 1)
        if (1 - threshold**size) ** (_PERMUTATIONS // size) <= _MISSED
    ]
    return fitting[-1]


def _ngrams(text: str, n: int) -> Array:
    """The word n-grams of a text; if it has fewer words, all of them as one."""
    found = words(text)
    return ngram_hashes(found, min(n, len(found))) if found else np.empty(0, dtype=np.uint64)


def _boilerplate(settings: NearDuplicates, context: StepContext) -> Any:
    """Identifies n-grams that occur in so many rows that they are boilerplate, in a pass over all rows.

    n-grams share a counter when the last bits of their numbers are equal; a text of a thousand n-grams adds one to a
    thousandth of the counters, far from the share that counts.
    """
    counts = np.zeros(_BUCKETS, dtype=np.uint32)
    total = 0
    for rows in all_rows(context):
        total += len(rows)
        for text in compared(rows, settings.of):
            counts[np.unique(_ngrams(text, settings.ngram) % np.uint64(_BUCKETS))] += 1
    limit = max(settings.boilerplate * total, _FEW)
    context.facts["boilerplate_ngrams"] = int((counts > limit).sum())
    return lambda ngrams: counts[ngrams % np.uint64(_BUCKETS)] > limit


class _Sets:
    """Arrays of numbers on disk, concatenated."""

    def __init__(self, file: Path, context: StepContext) -> None:
        self._stream = context.closing.enter_context(file.open("w+b"))
        self._ends = array("Q", [0])

    def append(self, numbers: Array) -> None:
        self._stream.seek(8 * self._ends[-1])
        self._stream.write(numbers.tobytes())
        self._ends.append(self._ends[-1] + len(numbers))

    def __getitem__(self, index: int) -> Array:
        start, end = self._ends[index], self._ends[index + 1]
        self._stream.seek(8 * start)
        return np.frombuffer(self._stream.read(8 * (end - start)), dtype=np.uint64)


STEP = CurationStep(near_duplicates, libraries={"datasketch": "curate"})
