"""Maps positions of a text in a student's tokens to those of the same text in a teacher's tokens.

Positions are matched by where their tokens begin, in bytes. The student's token at such a place has the teacher's
distribution as its soft target if a teacher's token begins there, too, and the roots of both tokens agree (`root_classes`).
Everywhere else it is learned as a hard label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Side:
    """A tokenizer as seen from text.

    Attributes:
        bytes_of: each token's bytes by its id; None for special tokens.
        class_V: each token's root class.
        end_ids: the tokens that end a text.
    """

    bytes_of: Sequence[bytes | None]
    class_V: Array
    end_ids: frozenset[int]

    @cached_property
    def length_V(self) -> Array:
        """Number of bytes of each token; 0 for special ones."""
        return np.array([len(string or b"") for string in self.bytes_of], dtype=np.int64)

    @cached_property
    def _flat(self) -> tuple[Array, Array]:
        """The bytes of all tokens, concatenated, and the start of each."""
        buffer = np.frombuffer(b"".join(string or b"" for string in self.bytes_of), dtype=np.uint8)
        return buffer, np.cumsum(self.length_V) - self.length_V

    def bytes(self, ids: Array) -> bytes:
        """The text of tokens, without special ones."""
        buffer, first_V = self._flat
        lengths_T = self.length_V[ids]
        inside = np.repeat(first_V[ids] - self.begins(ids), lengths_T) + np.arange(lengths_T.sum())
        return buffer[inside].tobytes()

    def begins(self, ids: Array) -> Array:
        """The start of each token, in bytes."""
        lengths_T = self.length_V[ids]
        begins_T: Array = np.cumsum(lengths_T) - lengths_T
        return begins_T

    def is_silent(self, ids: Array) -> Array:
        """Whether each token is a special one that does not end a text."""
        return (self.length_V[ids] == 0) & ~np.isin(ids, list(self.end_ids))


@dataclass(frozen=True)
class Alignment:
    """For each position of a student's text, shape (N,), the teacher's position, or why there is none.

    Attributes:
        place_N: which of the teacher's positions; −1 where the label is hard.
        inside: positions that begin inside a teacher's token, or whose text is not the teacher's.
        disagree: positions where the roots of the two tokens differ.
    """

    place_N: Array
    inside: int
    disagree: int
    SORTS: ClassVar = ("positions", "soft", "inside", "disagree")
    """What is counted."""

    @property
    def counted(self) -> dict[str, int]:
        """The number of positions, in total and by category."""
        soft = int((self.place_N >= 0).sum())
        return dict(zip(self.SORTS, (len(self.place_N), soft, self.inside, self.disagree), strict=True))


_SORTS = {
    "soft": "with a soft target",
    "inside": "inside a teacher token",
    "disagree": "where the two tokens have different roots",
}


def shares(counts: Mapping[str, int]) -> str:
    """In words, from the counts of many rows: the number of positions, in total and by category."""
    total = max(counts["positions"], 1)
    return f"of {counts['positions']:,} positions " + ", ".join(f"{counts[n] / total:.1%} {what}" for n, what in _SORTS.items())


@dataclass(frozen=True)
class Texts:
    """One text in two tokenizations.

    A text that one side has with other white space in front, as some chat templates strip it, is matched behind that. Where
    the texts differ otherwise, positions after the first difference have no partner.

    Attributes:
        teacher: how its tokens read.
        student: how its own read.
        their_ids: the teacher's tokens.
        own_ids: the student's.
        their_start: the teacher's first position with a distribution; what is before it counts for the places alone.
        own_start: the student's first position that is learned.
    """

    teacher: Side
    student: Side
    their_ids: Array
    own_ids: Array
    their_start: int = 0
    own_start: int = 0

    @cached_property
    def met(self) -> tuple[int, int, int]:
        """The bytes of the teacher's text, how many the student's shares, and the offset in the student's."""
        theirs, own = self.teacher.bytes(self.their_ids), self.student.bytes(self.own_ids)
        their_text, own_text = theirs.lstrip(), own.lstrip()
        in_front = len(theirs) - len(their_text)
        return len(theirs), in_front + _common(their_text, own_text), in_front - (len(own) - len(own_text))


def align(texts: Texts) -> Alignment:
    """Match the positions of one text in two tokenizations."""
    (size, same, shift), student = texts.met, texts.student
    ids_N, begins_N = texts.own_ids[texts.own_start :], student.begins(texts.own_ids)[texts.own_start :] + shift
    reached_N = (begins_N >= 0) & (begins_N <= same) & ~student.is_silent(ids_N)
    place_at = _places(texts.teacher, texts.their_ids, texts.their_start, size)
    place_N = np.where(reached_N, place_at[begins_N * reached_N], -1)
    met_N = place_N >= 0
    class_M = texts.teacher.class_V[texts.their_ids[texts.their_start :][place_N[met_N]]]
    agrees_N = np.zeros_like(met_N)
    agrees_N[met_N] = student.class_V[ids_N[met_N]] == class_M
    return Alignment(np.where(agrees_N, place_N, -1), int((~met_N).sum()), int((met_N & ~agrees_N).sum()))


def _places(side: Side, ids: Array, start: int, size: int) -> Array:
    """For each byte of a text, and its end, the position whose token begins there; −1 if none does.

    After a special token that does not end a text, the position has seen what the student does not see.
    """
    begins_T, numbers_T, silent_T = side.begins(ids), np.arange(len(ids)) - start, side.is_silent(ids)
    place_at = np.full(size + 1, -1, dtype=np.int64)
    told_T = ~silent_T & (numbers_T >= 0)
    place_at[begins_T[told_T]] = numbers_T[told_T]
    place_at[begins_T[silent_T & (numbers_T >= 0)]] = -1
    return place_at


def _common(a: bytes, b: bytes) -> int:
    """Number of bytes that two texts share at the start."""
    size = min(len(a), len(b))
    different = np.flatnonzero(np.frombuffer(a, np.uint8, size) != np.frombuffer(b, np.uint8, size))
    return int(different[0]) if len(different) else size


def told_chunks(contents: Sequence[bytes], logprobs_N: Array, student: Side, own_ids: Array, ended: bool) -> tuple[Array, Array]:
    """`chunks` of a text for which the teacher gave the bytes of tokens and their log-probabilities, but no ids.

    Args:
        contents: of each of the teacher's tokens.
        logprobs_N: of each; NaN where it is unknown.
        student: how the student's tokens read.
        own_ids: those of the text.
        ended: whether the last of the teacher's is its end token, of no bytes.
    """
    teacher = Side(contents, np.empty(0), frozenset([len(contents) - 1] if ended else []))
    return chunks(Texts(teacher, student, np.arange(len(contents)), own_ids), logprobs_N)


def chunks(texts: Texts, logprobs_N: Array) -> tuple[Array, Array]:
    """The shortest stretches of text that begin and end with a token on both sides (Minixhofer et al. 2025, arXiv 2503.20083).

    The probability of such a chunk is the product of its tokens', in either tokenization. Those with special tokens inside,
    with a token whose log-probability is unknown (NaN), or after the first difference of the texts, are not chunks.

    Args:
        texts: the text.
        logprobs_N: the teacher's log-probabilities of its tokens from `their_start` on.

    Returns:
        At the student's last token of each chunk how many of its tokens it has, else 0; and the teacher's log-probability of
        it there, else 0. Both (N,).
    """
    size, same, shift = texts.met
    begins_T = _bounds(texts.teacher, texts.their_ids, texts.their_start)
    begins_N = _bounds(texts.student, texts.own_ids, texts.own_start) + shift
    bounds = np.intersect1d(begins_T, begins_N)
    own_size = int(texts.student.length_V[texts.own_ids].sum()) + shift
    both_end = begins_T[-1] > size == same == own_size < begins_N[-1]
    bounds = bounds[bounds <= same + both_end]
    first_T, first_N = np.searchsorted(begins_T[:-1], bounds), np.searchsorted(begins_N[:-1], bounds)
    unusable = (
        (texts.teacher.is_silent(texts.their_ids[texts.their_start :]) | np.isnan(logprobs_N), first_T),
        (texts.student.is_silent(texts.own_ids[texts.own_start :]), first_N),
    )
    whole = (np.diff(first_T) > 0) & (np.diff(first_N) > 0)
    for bad, first in unusable:
        whole &= np.diff(np.concatenate([[0], np.cumsum(bad)])[first]) == 0
    sums = np.diff(np.concatenate([[0.0], np.cumsum(np.nan_to_num(logprobs_N))])[first_T])
    sizes_N, found_N = np.zeros(len(begins_N) - 1, dtype=np.int64), np.zeros(len(begins_N) - 1)
    ends = first_N[1:][whole] - 1
    sizes_N[ends], found_N[ends] = np.diff(first_N)[whole], sums[whole]
    return sizes_N, found_N


def _bounds(side: Side, ids: Array, start: int) -> Array:
    """The start of each token from `start` on, in bytes, and the end of the last; an end token counts as one byte."""
    begins_T = side.begins(ids)
    ended = len(ids) > 0 and int(ids[-1]) in side.end_ids
    return np.append(begins_T[start:], int(side.length_V[ids].sum()) + ended)
