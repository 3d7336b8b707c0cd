from hypothesis import given, settings
from hypothesis import strategies as st

from tests.curation.steps import apply_step, table


def test_duplicates_up_to_case_and_white_space(tmp_path):
    rows = table(["a b", "c", " A\n B", "ａ b", "c."], prompts=["p", "p", "P", "q", "p"])
    assert apply_step(tmp_path, {"duplicates": None}, rows, group=2)[0] == [None, None, "as row0", "as row0", None]
    assert apply_step(tmp_path, {"duplicates": {"of": "conversation"}}, rows)[0] == [None, None, "as row0", None, None]


@given(st.lists(st.sampled_from(["a", "A ", "b", "c  d", "C D", ""]), max_size=20), st.randoms())
@settings(max_examples=30, deadline=None)
def test_of_equal_texts_one_stays_in_whatever_order(tmp_path_factory, texts, chance):
    directory = tmp_path_factory.mktemp("rows")
    kept = []
    for _ in range(2):
        reasons, _ = apply_step(directory, {"duplicates": None}, table(texts), group=3)
        kept.append(sorted(" ".join(text.lower().split()) for text, reason in zip(texts, reasons, strict=True) if reason is None))
        chance.shuffle(texts)
    assert kept[0] == kept[1] == sorted({" ".join(text.lower().split()) for text in texts})
