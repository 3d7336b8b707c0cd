from tests.curation.steps import apply_step, table


def test_length_and_finish_reason_say_what_they_found(tmp_path):
    rows = table(["a"] * 3, ids=[[9], [9, 1, 2], [9, 1, 2, 3, 4]], reasons=["stop", "length", "stop"])
    assert apply_step(tmp_path, {"length": {"min_tokens": 1, "max_tokens": 3}}, rows)[0] == ["0 tokens", None, "4 tokens"]
    assert apply_step(tmp_path, {"finish_reason": None}, rows)[0] == [None, "length", None]
