"""The step of `curate` that keeps test data out of the training data."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from llmdistill.config.curate import Contamination
from llmdistill.curation.steps import Array, Check, CurationStep, StepContext, answers
from llmdistill.data.jsonl import ending_of, open_text
from llmdistill.data.ngrams import ngram_hashes, normalised, words
from llmdistill.data.tables import TABLES, read_tables
from llmdistill.errors import InputError
from llmdistill.runs.inputs import file_input

_SHORTEST = 8  # words of a string that is looked for inside other text; with fewer, it could be anything's
_PUNCTUATION = re.compile(r"[.,;:!?…\"'“”‘’„¿¡。，、！？；：]")
_COMMON = 10  # different strings that share an n-gram; in more, it is the wording of the tasks, not one of them


@dataclass(frozen=True)
class _Text:
    """A string of test data, with its location."""

    origin: str
    text: str
    words: list[str]


@dataclass(frozen=True)
class _Index:
    """The n-grams of all test strings of one length, sorted; for each, the string and position it comes from."""

    n: int
    hashes: Array
    texts: Array
    places: Array


def inputs(settings: Contamination, key: str) -> dict[str, str]:
    """The files with test data.

    Raises:
        InputError: one is missing, cannot be read, or has none of the fields.
    """
    found: dict[str, str] = {}
    for file in settings.against:
        found |= file_input(file, f"{key}.against")
        for _ in _parts(settings, file, key):
            pass
    return found


def contamination(settings: Contamination, context: StepContext) -> Check:
    """By word n-grams shared with the files; every pair of a row and a string that share one is logged."""
    trees = (tree for file in settings.against for tree in _parts(settings, file, context.key))
    # A string that stands there several times, as a question does before several answers to it, is one.
    distinct: dict[str, _Text] = {}
    for origin, tree in trees:
        for text in _strings(tree, origin):
            distinct.setdefault(_whole(text.text), text)
    texts = list(distinct.values())
    if not texts:
        raise InputError(f"{context.key}.against: {', '.join(settings.against)}: contain no text")
    searched = [text for text in texts if len(text.words) >= min(_SHORTEST, settings.ngram)]
    indices, common = _indices(searched, settings.ngram)
    context.facts |= {"strings": len(searched), "short_strings": len(texts) - len(searched), "common_ngrams": common}
    log = context.closing.enter_context(context.log.open("w", encoding="utf-8", errors="replace"))

    def check(rows: pa.Table) -> Iterator[str | None]:
        for identity, prompt, answer in zip(rows["id"].to_pylist(), rows["prompt"].to_pylist(), answers(rows), strict=True):
            found = []
            for message in prompt:
                text, its = message["content"], words(message["content"])
                matches = list(_matches(its, indices, searched))
                same = distinct.get(_whole(text))  # also where all of its n-grams are common
                if same and same.origin not in {origin for origin, _, _ in matches}:
                    matches.append((same.origin, normalised(text), 1))
                found += [("prompt", *match) for match in matches]
            found += [("completion", *match) for match in _matches(words(answer), indices, searched)]
            for where, item, ngram, count in found:
                entry = {"id": identity, "in": where, "item": item, "ngram": ngram, "shared_ngrams": count}
                log.write(json.dumps(entry, ensure_ascii=False) + "\n")
            yield f"{found[0][1]}: {found[0][2]}" if found else None

    return check


def _whole(text: str) -> str:
    """A key that is equal for texts that differ only in case, white space and sentence punctuation; 12 + 7 is not 12 - 7."""
    plain = normalised(text)
    return " ".join(_PUNCTUATION.sub(" ", plain).split()) or plain


def _indices(texts: list[_Text], longest: int) -> tuple[list[_Index], int]:
    """The n-grams to search for, by length, and the number left out as too common."""
    indices, left_out = [], 0
    for n in sorted({min(longest, len(text.words)) for text in texts}):
        numbers = [number for number, text in enumerate(texts) if min(longest, len(text.words)) == n]
        found = [ngram_hashes(texts[number].words, n) for number in numbers]
        hashes = np.concatenate(found)
        owners = np.repeat(numbers, [len(part) for part in found])
        places = np.concatenate([np.arange(len(part)) for part in found])
        pairs = np.unique(np.stack([hashes, owners.astype(np.uint64)]), axis=1)
        common = _common(pairs, texts)
        left_out += len(common)
        kept = ~np.isin(hashes, common)
        order = np.argsort(hashes[kept], kind="stable")
        indices.append(_Index(n, hashes[kept][order], owners[kept][order], places[kept][order]))
    return indices, left_out


def _common(pairs: Array, texts: list[_Text]) -> Array:
    """The n-grams that occur in too many different strings.

    Strings that differ in one number are one, as those of a question with the number of a sample are.

    Args:
        pairs: each n-gram with the number of each string that has it, in their order.
        texts: the strings.
    """
    hashes, owners = pairs
    values, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    often = counts > _COMMON
    is_common: dict[bytes, bool] = {}
    found = []
    for value, start, count in zip(values[often], first[often], counts[often], strict=True):
        its = owners[start : start + count]
        key = its.tobytes()
        if key not in is_common:
            is_common[key] = _are_many([texts[number].words for number in its])
        if is_common[key]:
            found.append(value)
    return np.array(found, dtype=np.uint64)


def _are_many(strings: Iterable[list[str]]) -> bool:
    """Whether more than a few of them differ from each other in more than one number."""
    different: list[Counter[str]] = []
    for string in strings:
        bag = Counter(string)
        if not any(_is_number(bag - other) and _is_number(other - bag) for other in different):
            different.append(bag)
            if len(different) > _COMMON:
                return True
    return False


def _is_number(bag: Counter[str]) -> bool:
    """Whether it is at most a single number."""
    return bag.total() <= 1 and all(word.isdecimal() for word in bag)


def _matches(found: list[str], indices: list[_Index], texts: list[_Text]) -> Iterator[tuple[str, str, int]]:
    """The test strings that share an n-gram with some words: location, first shared n-gram, and number of them."""
    for index in indices:
        hashes = ngram_hashes(found, index.n)
        first = np.searchsorted(index.hashes, hashes, side="left")
        last = np.searchsorted(index.hashes, hashes, side="right")
        shared: dict[int, list[str]] = {}
        for place in np.flatnonzero(last > first):
            ngram = found[place : place + index.n]
            for entry in range(first[place], last[place]):
                text, start = texts[index.texts[entry]], index.places[entry]
                if text.words[start : start + index.n] == ngram:
                    shared.setdefault(int(index.texts[entry]), []).append(" ".join(ngram))
        for number, ngrams in shared.items():
            yield texts[number].origin, ngrams[0], len(ngrams)


def _parts(settings: Contamination, file: str, key: str) -> Iterator[tuple[str, Any]]:
    """What to search for from a file, each part with its location.

    Raises:
        InputError: it cannot be read, or a part of it has none of the fields.
    """
    for origin, tree in _read(Path(file), f"{key}.against"):
        if settings.fields is None:
            yield origin, tree
            continue
        chosen = {name: tree[name] for name in settings.fields if name in tree} if isinstance(tree, dict) else {}
        if not chosen:
            raise InputError(f"{origin}: has no field {' or '.join(settings.fields)} ({key}.fields)")
        yield origin, chosen


def _read(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    """The contents of a file, each part with its location: the rows of a table, the lines of a text and all of it."""
    ending = ending_of(file)
    if ending in TABLES and ending != ".json":
        yield from _table(file, key)
        return
    try:
        with open_text(file, "\n") as stream:
            content = stream.read()
        tree = yaml.safe_load(content) if ending in (".yaml", ".yml") else content
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read ({key}): {' '.join(str(error).split())}") from None
    if ending == ".json":
        try:
            tree = json.loads(content)
        except RecursionError:
            raise InputError(f"{file}: cannot be read ({key}): too many levels") from None
        except ValueError:  # not one value: then one a line
            yield from _table(file, key)
            return
    if isinstance(tree, list):
        yield from ((f"{file} entry {number}", entry) for number, entry in enumerate(tree, start=1))
        return
    yield str(file), tree
    if tree is content:
        lines = enumerate(content.split("\n"), start=1)
        yield from ((f"{file} line {number}", line) for number, line in lines if line.strip())


def _table(file: Path, key: str) -> Iterator[tuple[str, Any]]:
    for entry in read_tables(str(file), key):
        entry.check()
        yield entry.origin, entry.fields


def _strings(tree: Any, origin: str) -> Iterator[_Text]:
    """Every string in it, with its location."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _strings(value, f"{origin} {name}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _strings(value, f"{origin} {number}")
    elif isinstance(tree, str):
        yield _Text(origin, tree, words(tree))


STEP = CurationStep(contamination, inputs)
