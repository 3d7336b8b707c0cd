"""Words for ROUGE-L (Lin 2004), F = 2 · LCS / (m + n), which compares texts by their longest common subsequence."""

import regex

from llmdistill.data.ngrams import UNSPACED

_WORD = regex.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def rouge_words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    found: list[str] = _WORD.findall(text.lower())
    return found
