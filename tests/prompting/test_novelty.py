"""Overlap is ROUGE-L, against a formula of its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.prompting.novelty import Pool

WORDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9)


def rouge_l(a, b):
    """F of the longest common subsequence, by the table that defines it."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    precision, recall = table[-1][-1] / len(a), table[-1][-1] / len(b)
    return 2 * precision * recall / (precision + recall) if precision else 0.0


@given(st.lists(WORDS, min_size=1, max_size=6), WORDS, st.floats(0, 0.99))
def test_the_nearest_is_the_one_with_the_largest_overlap(pool, text, at_least):
    kept = Pool()
    for number, words in enumerate(pool):
        kept.add(" ".join(words), str(number))
    overlaps = [rouge_l(words, text) for words in pool]
    found = kept.nearest(" ".join(text), at_least)
    if max(overlaps) > at_least + 1e-9:
        assert found[0] == pytest.approx(max(overlaps))
        assert overlaps[int(found[1])] == pytest.approx(max(overlaps))
    elif max(overlaps) < at_least - 1e-9:
        assert found is None


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("Name three birds.", "name THREE birds!", 1),
        ("Name three birds.", "Name three more birds.", 6 / 7),
        ("鳥の名前を三つ", "鳥の名前を四つ", 6 / 7),
        ("Größe", "größe", 1),
    ],
)
def test_words_are_compared_without_case_and_punctuation(one, other, overlap):
    pool = Pool()
    pool.add(one, "it")
    assert pool.nearest(other, 0.1) == (pytest.approx(overlap), "it")


def test_nothing_is_near_to_an_empty_pool():
    assert Pool().nearest("anything", 0.5) is None
