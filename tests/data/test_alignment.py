"""Positions of one text in two tokenizations; the expected ones are told from the strings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.data.alignment import Side, Texts, align, chunks
from llmdistill.models.root_classes import Vocabulary, root_classes

THEIRS = [b"a", b"b", b"c", b"ab", b"\n", None, None]  # the last two are special, the last ends a text
OWN = [b"a", b"b", b"c", b"bc", b"abc", b"\n", None]


def longest(vocabulary):
    return lambda strings: [max((t for t in vocabulary if t and s.startswith(t)), key=len) for s in strings]


def sides():
    made = [Vocabulary(strings, [6], 7, longest(strings)) for strings in (THEIRS, OWN)]
    classes = root_classes(*made)
    return [
        Side(vocabulary.bytes_of, of, frozenset([6]))
        for vocabulary, of in zip(made, (classes.teacher_V, classes.student_V), strict=True)
    ]


def aligned(theirs, own, *starts):
    found = align(Texts(*sides(), np.array(theirs), np.array(own), *starts))
    return found.place_N.tolist(), found.inside, found.disagree


def test_positions_meet_where_tokens_begin_and_roots_agree():
    # ab|c|end and a|bc|end: bc begins inside ab.
    assert aligned([3, 2, 6], [0, 3, 6]) == ([0, -1, 2], 1, 0)
    # Both begin at the start, and ab and abc are of the class a.
    assert aligned([3, 2, 6], [4, 6]) == ([0, 2], 0, 0)
    assert aligned([0, 1, 2], [0, 1, 2]) == ([0, 1, 2], 0, 0)


def test_a_cut_text_has_no_end_and_an_end_meets_no_token():
    assert aligned([0, 1], [0, 1, 6]) == ([0, 1, -1], 1, 0)
    assert aligned([0, 1, 6], [0, 1]) == ([0, 1], 0, 0)
    assert aligned([0, 6], [0, 1]) == ([0, -1], 0, 1)


def test_white_space_in_front_is_passed_over():
    assert aligned([4, 0, 1, 6], [0, 1, 6]) == ([1, 2, 3], 0, 0)
    assert aligned([0, 1, 6], [5, 0, 1, 6]) == ([-1, 0, 1, 2], 1, 0)


def test_only_what_is_behind_the_first_difference_is_lost():
    """White space in front as well as a difference at the end, such as a line feed that one template strips."""
    assert aligned([4, 0, 1, 4, 6], [0, 1, 6]) == ([1, 2, -1], 0, 1)
    assert aligned([0, 1, 6], [5, 0, 1, 5, 6]) == ([-1, 0, 1, -1, -1], 2, 1)
    assert aligned([4, 0, 1, 2], [0, 1, 1]) == ([1, 2, -1], 0, 1)


def test_behind_a_difference_nothing_meets():
    assert aligned([0, 1, 2, 6], [0, 2, 2, 6]) == ([0, -1, -1, -1], 2, 1)


def test_the_position_behind_a_special_token_is_hard():
    assert aligned([0, 5, 1, 6], [0, 1, 6]) == ([0, -1, 3], 1, 0)


def test_a_token_in_front_of_the_text_moves_nothing():
    """Text without a prompt: one side begins with a special token, the other does not; places count the learnt ones."""
    assert aligned([5, 0, 1, 6], [0, 1, 6], 1, 1) == ([1, 2], 0, 0)
    assert aligned([0, 1, 6], [0, 1, 6], 1, 1) == ([0, 1], 0, 0)


def test_chunks_begin_and_end_on_both_sides():
    log_p = np.log([0.5, 0.25, 0.125])
    # ab|c|end and a|bc|end: abc is one chunk of 0.5 · 0.25.
    sizes, logprobs = chunks(Texts(*sides(), np.array([3, 2, 6]), np.array([0, 3, 6])), log_p)
    assert sizes.tolist() == [0, 2, 1]
    assert np.exp(logprobs) == pytest.approx([1, 0.125, 0.125])
    # The end is one only where both texts end.
    sizes, _ = chunks(Texts(*sides(), np.array([3, 2]), np.array([0, 3, 6])), log_p[:2])
    assert sizes.tolist() == [0, 2, 0]
    # Not across a special token, nor behind a difference.
    sizes, _ = chunks(Texts(*sides(), np.array([0, 5, 1]), np.array([0, 1])), log_p)
    assert sizes.tolist() == [1, 0]
    sizes, _ = chunks(Texts(*sides(), np.array([0, 1, 2]), np.array([0, 1, 2])), np.array([-1, np.nan, -2]))
    assert sizes.tolist() == [1, 0, 1]
    sizes, _ = chunks(Texts(*sides(), np.array([0, 1, 2]), np.array([0, 2, 2])), log_p)
    assert sizes.tolist() == [1, 0, 0]
    # One text goes on where the other has ended: its token there is no end.
    sizes, _ = chunks(Texts(*sides(), np.array([0, 1, 6]), np.array([0, 1, 2, 6])), log_p)
    assert sizes.tolist() == [1, 1, 0, 0]


@given(text=st.text("abc", min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_every_soft_position_begins_where_its_partner_does(text, seed):
    rng = np.random.default_rng(seed)
    teacher, student = sides()

    def encode(strings):
        ids, rest = [], text.encode()
        while rest:
            fitting = [number for number, string in enumerate(strings) if string and rest.startswith(string)]
            ids.append(int(rng.choice(fitting)))
            rest = rest[len(strings[ids[-1]]) :]
        return np.array([*ids, 6])

    theirs, own = encode(THEIRS), encode(OWN)
    texts = Texts(teacher, student, theirs, own)
    found = align(texts)
    assert found.counted["positions"] == len(own) == found.counted["soft"] + found.inside + found.disagree
    for position, place in enumerate(found.place_N.tolist()):
        before = teacher.bytes(theirs[:place])
        if place >= 0:
            assert before == student.bytes(own[:position])
            assert teacher.class_V[theirs[place]] == student.class_V[own[position]]
    log_p = rng.uniform(-3, 0, len(theirs))
    sizes, logprobs = chunks(texts, log_p)
    assert sizes.sum() == len(own)  # every token is in a chunk, and nothing of the teacher's is lost
    assert logprobs.sum() == pytest.approx(log_p.sum())
