import pytest

from llmdistill.errors import InputError
from tests.tasks.make import items, make_task


def test_classify(tmp_path):
    task = make_task(tmp_path, "classify")
    rules = task.rules
    assert rules.verdict(task, " good\n") is None
    assert rules.verdict(task, "Good") == "not a label: Good"
    assert rules.verdict(task, "x" * 100) == f"not a label: {'x' * 60}…"
    assert [rules.score(task, answer, "good")["accuracy"] for answer in ("good", "good ", "bad", "Good")] == [1, 1, 0, 0]
    pairs = [("good", "good"), ("bad", "good"), ("good", "good"), ("bad", "bad"), ("who knows", "bad"), ("good", "bad")]
    assert rules.tables(task, pairs) == {"confusion": {"labels": ["good", "bad", "(no label)"], "counts": [[2, 1, 0], [1, 1, 1]]}}
    rules.check_outputs(task, items("good", "bad", "good", "bad"))
    with pytest.raises(InputError, match=r"line 2: output: not a label: ugly"):
        rules.check_outputs(task, items("good", "ugly"))
    with pytest.raises(InputError, match=r"with a single example.*\ntest.jsonl line 2: 'bad'$"):
        rules.check_outputs(task, items("good", "bad", "good"))
