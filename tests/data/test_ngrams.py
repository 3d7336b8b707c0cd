import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.data.ngrams import jaccard, ngram_hashes, words

WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd", "é", "7"]), max_size=12)


def tuples(words, n):
    return [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]


def test_words_are_what_people_read():
    assert words("Don't  STOP—3.5 km, naïve ﬁne!") == ["don", "t", "stop", "3", "5", "km", "naïve", "fine"]
    assert words("東京へ行く to Rome") == ["東", "京", "へ", "行", "く", "to", "rome"]
    assert words("यह किस नदी के किनारे है؟ مَرْحَبًا") == ["यह", "किस", "नदी", "के", "किनारे", "है", "مَرْحَبًا"]
    assert words("ภาษาไทย") == list("ภาษาไทย")
    assert words("snake_case … \n\t") == ["snake", "case"]


@given(WORDS, WORDS, st.integers(1, 5))
def test_ngrams_are_equal_where_their_words_are(a, b, n):
    hashes = np.concatenate([ngram_hashes(a, n), ngram_hashes(b, n)])
    want = tuples(a, n) + tuples(b, n)
    assert len(hashes) == len(want)
    for i in range(len(want)):
        for j in range(i):
            assert (hashes[i] == hashes[j]) == (want[i] == want[j])


@given(WORDS, WORDS, st.integers(1, 3))
def test_jaccard_against_sets_of_words(a, b, n):
    one, other = set(tuples(a, n)), set(tuples(b, n))
    want = len(one & other) / len(one | other) if one | other else 1.0
    assert jaccard(np.unique(ngram_hashes(a, n)), np.unique(ngram_hashes(b, n))) == want
