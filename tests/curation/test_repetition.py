import numpy as np
import pytest

from llmdistill.curation.repetition import repeated_line_share, repeated_share
from tests.curation.steps import apply_step, table


def test_repeated_share():
    assert repeated_share(np.array([1, 2, 3, 4]), 2) == 0
    assert repeated_share(np.array([1, 2, 1, 2, 1]), 2) == pytest.approx(2 / 4)
    assert repeated_share(np.array([7]), 2) == 0


def test_repeated_line_share():
    assert repeated_line_share("one\ntwo\nthree") == 0
    assert repeated_line_share("1. Wash it\n2. wash  it\n- Wash it\nDry it") == pytest.approx(14 / 27)  # of 7, 7, 7 and 6
    assert repeated_line_share("\n\n \n") == 0


def test_repetition_of_tokens_and_of_lines(tmp_path):
    lines = "A good line.\nAnother one.\n" * 3
    rows = table(["fine", lines, "fine"], ids=[[9, 1, 2, 3, 4], [9, 1, 2, 3, 4], [9, 5, 5, 5, 5, 5]])
    reasons, _ = apply_step(tmp_path, {"repetition": {"ngram": 2, "max_share": 0.5, "max_line_share": 0.6}}, rows)
    assert reasons == [None, "67% of it in repeated lines", "75% of its 2-grams are repeats"]
