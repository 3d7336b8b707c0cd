import json

import numpy as np
import pytest

from llmdistill.curation.filters import repeated_line_share, repeated_share
from llmdistill.errors import InputError
from tests.curation.steps import apply_step, table

ENGLISH = (
    "The tide rises and falls because the moon pulls at the sea, and because the earth turns under that pull "
    "twice a day; the sun helps a little, most of all when it stands in one line with the moon."
)
GERMAN = (
    "Ebbe und Flut entstehen, weil der Mond am Meer zieht und die Erde sich unter diesem Zug dreht; die Sonne "
    "hilft ein wenig, vor allem dann, wenn sie mit dem Mond in einer Linie steht und beide gemeinsam wirken."
)
JAPANESE = "潮の満ち引きは、月が海を引っぱる力と地球の自転によって一日に二回起こります。" * 4


def test_repeated_share():
    assert repeated_share(np.array([1, 2, 3, 4]), 2) == 0
    assert repeated_share(np.array([1, 2, 1, 2, 1]), 2) == pytest.approx(2 / 4)
    assert repeated_share(np.array([7]), 2) == 0


def test_repeated_line_share():
    assert repeated_line_share("one\ntwo\nthree") == 0
    assert repeated_line_share("1. Wash it\n2. wash  it\n- Wash it\nDry it") == pytest.approx(14 / 27)  # of 7, 7, 7 and 6
    assert repeated_line_share("\n\n \n") == 0


def test_length_and_finish_reason_say_what_they_found(tmp_path):
    rows = table(["a"] * 3, ids=[[9], [9, 1, 2], [9, 1, 2, 3, 4]], reasons=["stop", "length", "stop"])
    assert apply_step(tmp_path, {"length": {"min_tokens": 1, "max_tokens": 3}}, rows)[0] == ["0 tokens", None, "4 tokens"]
    assert apply_step(tmp_path, {"finish_reason": None}, rows)[0] == [None, "length", None]


def test_repetition_of_tokens_and_of_lines(tmp_path):
    lines = "A good line.\nAnother one.\n" * 3
    rows = table(["fine", lines, "fine"], ids=[[9, 1, 2, 3, 4], [9, 1, 2, 3, 4], [9, 5, 5, 5, 5, 5]])
    reasons, _ = apply_step(tmp_path, {"repetition": {"ngram": 2, "max_share": 0.5, "max_line_share": 0.6}}, rows)
    assert reasons == [None, "67% of it in repeated lines", "75% of its 2-grams are repeats"]


def test_language_of_the_prose(tmp_path):
    lines = "wert = berechne(der_wert, und_noch_ein_wert)  # Ergebnis der Rechnung\n" * 8
    code = f"Here it is:\n```python\n{lines}```\n{ENGLISH}"
    short = "Ebbe und Flut macht der Mond."
    quoting = f"{ENGLISH} The German word for it is “Gezeiten”, and in French it is called “la marée”."
    rows = table([ENGLISH, GERMAN, JAPANESE, code, short, quoting, "12 + 30 = 42", ""])
    assert apply_step(tmp_path, {"language": {"keep": ["en"]}}, rows)[0] == [None, "de", "ja", None, None, None, None, None]
    assert apply_step(tmp_path, {"language": {"keep": ["de", "ja"]}}, rows)[0][:3] == ["en", None, None]
    asked = table([GERMAN, GERMAN], prompts=["Put this into German: …", "Say it in French: …"])
    assert apply_step(tmp_path, {"language": {"keep": ["en"]}}, asked)[0] == [None, "de"]
    with pytest.raises(InputError, match=r"curate\.0\.language\.keep: english is no language that lingua knows, which are af, "):
        apply_step(tmp_path, {"language": {"keep": ["english"]}}, rows)


def test_regex(tmp_path):
    rows = table(["The answer is 42.", "no number", "x\n7"])
    assert apply_step(tmp_path, {"regex": {"pattern": r"\d+"}}, rows)[0] == [None, "no match", None]
    assert apply_step(tmp_path, {"regex": {"pattern": r"\d+", "keep": "others"}}, rows)[0] == ["42", None, "7"]


def test_a_regular_expression_that_does_not_end_fails_its_row_only(tmp_path):
    rows = table(["a" * 60 + "!", "b"])
    first, second = apply_step(tmp_path, {"regex": {"pattern": r"^(a|aa)+$|^b$"}}, rows)[0]
    assert (type(first).__name__, first) == ("Failed", "took more than 1 s")
    assert second is None


def test_json_schema(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(
        json.dumps(
            {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}
        )
    )
    answers = [
        '{"age": 3}',
        'Here it is:\n```json\n{"age": 3}\n```\nDone.',
        '{"age": "3"}',
        '{"years": 3}',
        "three",
        '{"age": NaN}',
        "[" * 100_000,
        '```\n{"age": 1}\n```\nor\n```\n{"age": 2}\n```',
    ]
    reasons, _ = apply_step(tmp_path, {"json_schema": {"file": str(file)}}, table(answers))
    assert reasons[:2] == [None, None]
    assert reasons[2] == "$.age: '3' is not of type 'integer'"
    assert reasons[3].startswith("$: ")
    assert all(reason.startswith("no JSON: ") for reason in reasons[4:])


def test_a_schema_is_checked_and_fetches_nothing(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "objekt"}')
    with pytest.raises(InputError, match=r"schema\.json: no JSON schema: 'objekt' is not valid"):
        apply_step(tmp_path, {"json_schema": {"file": str(file)}}, table(["{}"]))
    file.write_text('{"$ref": "http://127.0.0.1:9/schema.json"}')
    with pytest.raises(InputError, match=r"refers to http://127.0.0.1:9/schema.json, which is not in it"):
        apply_step(tmp_path, {"json_schema": {"file": str(file)}}, table(["{}"]))


def test_balance_keeps_the_first_of_each_value(tmp_path):
    topics = ["a", "b", "a", None, "a", ["x"], None, ["x"]]
    rows = table(["t"] * 8, fields=[{} if topic is None else {"topic": topic} for topic in topics])
    reasons, _ = apply_step(tmp_path, {"balance": {"max_rows": 1}}, rows, group=3)
    assert [reason is None for reason in reasons] == [True, True, False, True, False, True, False, False]
    assert reasons[2] == 'topic is "a", of which there are 1'
