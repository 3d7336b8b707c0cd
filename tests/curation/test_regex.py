from tests.curation.steps import apply_step, table


def test_regex(tmp_path):
    rows = table(["The answer is 42.", "no number", "x\n7"])
    assert apply_step(tmp_path, {"regex": {"pattern": r"\d+"}}, rows)[0] == [None, "no match", None]
    assert apply_step(tmp_path, {"regex": {"pattern": r"\d+", "keep": "others"}}, rows)[0] == ["42", None, "7"]


def test_a_regular_expression_that_does_not_end_fails_its_row_only(tmp_path):
    rows = table(["a" * 60 + "!", "b"])
    first, second = apply_step(tmp_path, {"regex": {"pattern": r"^(a|aa)+$|^b$"}}, rows)[0]
    assert (type(first).__name__, first) == ("Failed", "took more than 1 s")
    assert second is None
