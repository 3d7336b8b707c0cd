import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.errors import InputError
from llmdistill.tasks.generate import score, verdict
from tests.tasks.make import items, make_task


@pytest.mark.parametrize(
    ("answer", "target", "value"),
    [
        # Lin 2004, section 3.1: LCS 3 and 2 of four words each.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("The CAT, sat!", "the cat sat", 1),
        ("a b c d e f", "a c e", 2 * 3 / 9),
        ("我喜欢吃苹果和香蕉", "我喜欢吃苹果和梨", 2 * 7 / 17),  # each character is a word
        ("काला", "कील", 0),  # vowel signs are part of a word
        ("यह किताब है", "यह कलम है", 2 / 3),
        ("", "a", 0),
        ("?", "!", 0),
    ],
)
def test_rouge_l(answer, target, value):
    assert score(None, answer, target) == {"rouge_l": pytest.approx(value)}


def longest(one, other):
    """The longest common subsequence by the usual table."""
    above = [0] * (len(other) + 1)
    for a in one:
        row = [0]
        for place, b in enumerate(other):
            row.append(above[place] + 1 if a == b else max(above[place + 1], row[-1]))
        above = row
    return above[-1]


WORDS = st.lists(st.sampled_from(["ab", "b", "c", "dé"]), min_size=1, max_size=30)


@given(WORDS, WORDS)
def test_rouge_l_by_the_table(one, other):
    precision, recall = longest(one, other) / len(one), longest(one, other) / len(other)
    expected = 2 * precision * recall / (precision + recall) if precision else 0
    assert score(None, " ".join(one), " ".join(other))["rouge_l"] == pytest.approx(expected)


def test_an_answer_has_words(tmp_path):
    assert verdict(None, "Yes.") is None
    assert verdict(None, " …") == "has no word"
    task = make_task(tmp_path, "generate")
    with pytest.raises(InputError, match=r"line 1: output: has no word"):
        task.rules.check_outputs(task, items("…"))
