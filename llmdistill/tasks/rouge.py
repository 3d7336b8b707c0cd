"""The words of ROUGE-L (Lin 2004), F = 2 · LCS / (m + n), which compares texts by their longest common subsequence."""

import re

# Of scripts that put no spaces between words, each character is one.
_ALONE = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


def rouge_words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return _WORD.findall(text.lower())
