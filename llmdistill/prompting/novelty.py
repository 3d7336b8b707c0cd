"""How much of a text is contained in an earlier one: ROUGE-L against everything kept so far."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from rapidfuzz import process
from rapidfuzz.distance import Indel

from llmdistill.config.prompts import Novelty
from llmdistill.prompting.sources import read_files
from llmdistill.prompting.template import check_field
from llmdistill.tasks.rouge import rouge_words

_FIRST_CHARACTER = 0xE000  # past the surrogates, which no string may hold
_CHARACTERS = 0x110000 - _FIRST_CHARACTER


@dataclass
class Pool:
    """The kept texts, with their names.

    A text is held as a string with one character a word, so that ROUGE-L, F = 2 · LCS / (m + n) over words, is the
    normalised indel similarity of two strings, which rapidfuzz computes for a whole list at once. Only past a million
    different words do two of them share a character.
    """

    names: list[str] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _words: dict[str, str] = field(default_factory=dict)

    def nearest(self, text: str, at_least: float) -> tuple[float, str] | None:
        """The largest overlap with a text of the pool, and that text's name, if it is above `at_least`."""
        found = process.extractOne(
            self._encoded(text), self._texts, scorer=Indel.normalized_similarity, processor=None, score_cutoff=at_least
        )
        if found is None or found[1] <= at_least:
            return None
        return float(found[1]), self.names[found[2]]

    def add(self, text: str, name: str) -> None:
        """Add a text."""
        self._texts.append(self._encoded(text))
        self.names.append(name)

    def _encoded(self, text: str) -> str:
        words = rouge_words(text)
        for word in words:
            if word not in self._words:
                self._words[word] = chr(_FIRST_CHARACTER + len(self._words) % _CHARACTERS)
        return "".join(self._words[word] for word in words)


def read_others(settings: Novelty, key: str) -> Iterator[tuple[str, str]]:
    """Text and location of every row of the files in `against`.

    Raises:
        InputError: a file cannot be read, or a row lacks the field.
    """
    for file in settings.against:
        for entry in read_files(file, f"{key}.against"):
            entry.check()
            check_field(entry.fields, settings.field, entry.origin, f"{key}.against")
            yield str(entry.fields[settings.field]), entry.origin
