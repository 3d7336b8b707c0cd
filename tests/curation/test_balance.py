from tests.curation.steps import apply_step, table


def test_balance_keeps_the_first_of_each_value(tmp_path):
    topics = ["a", "b", "a", None, "a", ["x"], None, ["x"]]
    rows = table(["t"] * 8, fields=[{} if topic is None else {"topic": topic} for topic in topics])
    reasons, _ = apply_step(tmp_path, {"balance": {"max_rows": 1}}, rows, group=3)
    assert [reason is None for reason in reasons] == [True, True, False, True, False, True, False, False]
    assert reasons[2] == 'topic is "a", of which 1 are kept'
