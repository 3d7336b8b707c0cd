"""Comparison of texts: ignoring case and white space, and by word n-grams as 64-bit numbers."""

import unicodedata
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex

Array = np.ndarray[Any, Any]

# Chinese characters, Japanese kana, Thai, Lao, Burmese and Khmer are written without spaces: each character is a word of its own.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Combining marks, such as the vowel signs of Hindi, are parts of a word; `re` takes them for punctuation.
_WORD = regex.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: no n-gram loses its first words to overflow


def normalised(text: str) -> str:
    """Text without differences in case, white space and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def words(text: str) -> list[str]:
    """The words and numbers of a text, without case, punctuation and differences in Unicode form."""
    found: list[str] = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return found


def ngram_hashes(words: Sequence[str], n: int) -> Array:
    """The n-grams of some words, in their order; empty if there are fewer words.

    Two different n-grams have the same number with a probability of about 2⁻³²: what depends on their being equal has to
    look at the words.
    """
    count = len(words) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    hashes = _mix(np.fromiter((zlib.crc32(word.encode(errors="replace")) for word in words), dtype=np.uint64, count=len(words)))
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * _MULTIPLIER + hashes[offset : offset + count]
    return _mix(total)


def jaccard(a: Array, b: Array) -> float:
    """|a ∩ b| / |a ∪ b| of two sorted arrays without repeats; 1 if both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0


def _mix(values: Array) -> Array:
    """Mix all 64 bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
