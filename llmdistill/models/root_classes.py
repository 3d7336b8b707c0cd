"""Root classes: a common partition of two vocabularies.

For a byte string b that is a student token, let φ(b) be the first token of the teacher's encoding of b, and for a teacher
token, ψ(b) the first of the student's. Each is a prefix of its argument. Apply φ and ψ alternately until reaching a string
that both vocabularies contain: the root. Every token of either vocabulary has exactly one root, so roots partition both, and
a distribution over either vocabulary is one over the classes. With a single vocabulary, every token is its own class.

Tokens that end a text are one class, by table. Special tokens that do not end a text, ids unknown to the tokenizer and tokens
without a root form one last class. The teacher's mass on it is dropped if the student has no such tokens.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmdistill.errors import InputError
from llmdistill.models.token_bytes import first_tokens, token_bytes
from llmdistill.runs import lock
from llmdistill.runs.files import check_shape, fsync_directory, read_json

Array = np.ndarray[Any, Any]
FILE = "classes.npz"  # in a dataset
_MANIFEST = "dataset.json"  # next to it


@dataclass(frozen=True)
class RootClasses:
    """The class of each token: numbers from 0, below `count`.

    Attributes:
        teacher_V: class of each of the teacher's tokens, over its output layer.
        student_V: class of each of the student's tokens, over its output layer.
    """

    teacher_V: Array
    student_V: Array

    @cached_property
    def count(self) -> int:
        """Number of classes."""
        return int(max(self.teacher_V.max(initial=-1), self.student_V.max(initial=-1))) + 1

    @property
    def dropped(self) -> int | None:
        """The class of special tokens, if the student has none: the teacher's probability of it cannot be learned."""
        last = self.count - 1
        return None if (self.student_V == last).any() else last

    @cached_property
    def members(self) -> tuple[Array, Array]:
        """The student's tokens sorted by class (V,), and the start of each class (C + 1,)."""
        order_V = np.argsort(self.student_V, kind="stable")
        sizes_C = np.bincount(self.student_V, minlength=self.count)
        return order_V, np.concatenate([[0], np.cumsum(sizes_C)])

    @classmethod
    def of_one_vocabulary(cls, teacher: int, student: int) -> "RootClasses":
        """Make every token its own class; those that pad the teacher's output layer beyond the student's are last.

        Args:
            teacher: size of the teacher's output layer.
            student: size of the student's.
        """
        return cls(np.minimum(np.arange(teacher), student), np.arange(student))

    @property
    def are_tokens(self) -> bool:
        """Whether they equal those of `of_one_vocabulary`."""
        same = type(self).of_one_vocabulary(len(self.teacher_V), len(self.student_V))
        return np.array_equal(self.teacher_V, same.teacher_V) and np.array_equal(self.student_V, same.student_V)

    @property
    def hash(self) -> str:
        """Hash of the content."""
        digest = hashlib.sha256()
        for values in (self.teacher_V, self.student_V):
            digest.update(values.astype("<i4").tobytes() + b"|")
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write the classes next to a dataset's shards."""
        save_classes({"": self}, directory)

    @classmethod
    def load(cls, directory: Path) -> "RootClasses":
        """Read the classes of a dataset with a single teacher.

        Raises:
            InputError: if they are missing, invalid, or those of several teachers.
        """
        found = load_classes(directory)
        if "" not in found:
            raise InputError(f"{directory / FILE}: contains classes of several teachers, {', '.join(found)}; use load_classes")
        return found[""]


def save_classes(by_teacher: "Mapping[str, RootClasses]", directory: Path) -> None:
    """Write the classes of each teacher next to a dataset's shards; the name of a single teacher is empty."""
    arrays: dict[str, Any] = {
        f"{side}{name and f'.{name}'}": values.astype(np.int32)
        for name, classes in by_teacher.items()
        for side, values in (("teacher", classes.teacher_V), ("student", classes.student_V))
    }
    with lock.written(directory / FILE) as unfinished, unfinished.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    fsync_directory(directory)


def load_classes(directory: Path) -> "dict[str, RootClasses]":
    """The classes of each of a dataset's teachers by name; the name of a single teacher is empty.

    Raises:
        InputError: if they are missing, invalid, or do not match the hashes in the `dataset.json` next to them.
    """
    file = directory / FILE
    try:
        with np.load(file, allow_pickle=False) as stored:
            names = [name.removeprefix("teacher").removeprefix(".") for name in stored.files if name.startswith("teacher")]
            found = {name: [stored[f"{side}{name and f'.{name}'}"] for side in ("teacher", "student")] for name in names}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        why = str(error) or type(error).__name__
        raise InputError(f"{file}: cannot be read: {why.splitlines()[0]}") from None
    sides = [side for pair in found.values() for side in pair]
    if not sides or not all(side.ndim == 1 and side.size and side.dtype.kind == "i" and side.min() >= 0 for side in sides):
        raise InputError(f"{file}: does not contain classes of two vocabularies")
    if len({len(student) for _, student in found.values()}) > 1:
        raise InputError(f"{file}: contains classes for students of different sizes")
    by_teacher = {name: RootClasses(*(side.astype(np.int64) for side in pair)) for name, pair in found.items()}
    _check_hashes(directory, by_teacher)
    return by_teacher


def _check_hashes(directory: Path, by_teacher: "Mapping[str, RootClasses]") -> None:
    """Refuse classes that differ from those with which the dataset's targets were aligned.

    Raises:
        InputError: names the file.
    """
    manifest = check_shape(directory / _MANIFEST, read_json(directory / _MANIFEST) or {}, {})
    alignment = check_shape(directory / _MANIFEST, manifest.get("alignment", {}), {}, "alignment")
    known = alignment.get("teachers") or {"": alignment}
    expected = {name: one["classes_hash"] for name, one in known.items() if "classes_hash" in one}
    if expected and expected != {name: classes.hash for name, classes in by_teacher.items()}:
        raise InputError(
            f"{directory / FILE}: the classes do not match their hash in {_MANIFEST} (alignment.classes_hash); "
            "the file was damaged or changed; remove the directory and run `retokenize` again"
        )


def by_name(classes: "RootClasses | Mapping[str, RootClasses]") -> "dict[str, RootClasses]":
    """The classes of each teacher by name; the name of a single teacher is empty."""
    return {"": classes} if isinstance(classes, RootClasses) else dict(classes)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and properties of its tokens.

    Attributes:
        bytes_of: each token's bytes by its id; None for special ones.
        end_ids: the tokens that end a text.
        size: size of the model's output layer, which may be padded.
        first: for some byte strings, the first token of their encoding, as bytes; empty if there is none.
    """

    bytes_of: Sequence[bytes | None]
    end_ids: Sequence[int]
    size: int
    first: Callable[[Sequence[bytes]], list[bytes]]

    @classmethod
    def of(cls, tokenizer: Any, end_ids: Sequence[int], size: int, key: str) -> "Vocabulary":
        """Build from a fast tokenizer of transformers.

        Raises:
            InputError: if the bytes of its tokens cannot be determined; names the key.
        """
        bytes_of = token_bytes(tokenizer, key)
        return cls(bytes_of, end_ids, size, lambda strings: first_tokens(tokenizer, bytes_of, strings))


def root_classes(teacher: Vocabulary, student: Vocabulary) -> RootClasses:
    """The classes of two vocabularies: first the roots in the order of their bytes, then two classes by table."""
    theirs, own = _strings(teacher), _strings(student)
    roots = _roots(theirs, own, teacher.first, student.first)
    number_of = {root: number for number, root in enumerate(sorted(set(roots.values())))}
    end, rest = len(number_of), len(number_of) + 1

    def classes(side: Vocabulary) -> Array:
        found = np.full(side.size, rest, dtype=np.int64)
        for token, string in enumerate(side.bytes_of[: side.size]):
            if string and string in roots:
                found[token] = number_of[roots[string]]
        found[[token for token in side.end_ids if token < side.size]] = end
        return found

    return RootClasses(classes(teacher), classes(student))


def _strings(side: Vocabulary) -> frozenset[bytes]:
    return frozenset(string for token, string in enumerate(side.bytes_of) if string and token not in side.end_ids)


def _roots(
    theirs: frozenset[bytes],
    own: frozenset[bytes],
    first_of_theirs: Callable[[Sequence[bytes]], list[bytes]],
    first_of_own: Callable[[Sequence[bytes]], list[bytes]],
) -> Mapping[bytes, bytes]:
    """The root of every string of either side that has one."""
    shared = theirs & own
    step = _steps(own - shared, first_of_theirs) | _steps(theirs - shared, first_of_own)
    roots = {string: string for string in shared}
    for string in sorted(step, key=len):  # a step leads to a shorter string
        if (root := roots.get(step[string])) is not None:
            roots[string] = root
    return roots


def _steps(strings: Iterable[bytes], first: Callable[[Sequence[bytes]], list[bytes]]) -> dict[bytes, bytes]:
    """For strings that the other side lacks, the first token of their encoding there."""
    ordered = sorted(strings)
    return {string: found for string, found in zip(ordered, first(ordered), strict=True) if found and len(found) < len(string)}
