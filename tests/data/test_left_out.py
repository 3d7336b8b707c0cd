"""Rows that a stage could not use: what is kept of them, and how many may be unreadable."""

import json
import math

import pyarrow.parquet as pq
import pytest

from llmdistill.config.rows import RowReading
from llmdistill.data.left_out import LeftOut
from llmdistill.errors import InputError, UnreadableError, UnusableError


def kept(tmp_path, fields):
    left_out = LeftOut()
    left_out.add(UnusableError("no", "a.jsonl line 1"), fields)
    left_out.write(tmp_path / "rejected.parquet")
    (row,) = pq.read_table(tmp_path / "rejected.parquet").to_pylist()
    assert (row["place"], row["reason"]) == ("a.jsonl line 1", "no")
    return row["row"]


def test_a_row_is_kept_as_json(tmp_path):
    text = kept(tmp_path, {"prompt": "\ud83d für", "score": math.nan, "of": [math.inf, 1.5], "api_key": "sk-SECRET"})
    assert json.loads(text, parse_constant=pytest.fail) == {"prompt": "? für", "score": None, "of": [None, 1.5], "api_key": None}


def test_a_row_is_kept_as_text_of_a_length_that_can_be_read(tmp_path):
    picture = {"image": {"bytes": bytes(1_000_000), "path": None}, "prompt": "q"}
    assert json.loads(kept(tmp_path, picture)) == {"image": {"bytes": "<1,000,000 bytes>", "path": None}, "prompt": "q"}
    text = kept(tmp_path, {"prompt": "x" * 10_000})
    assert text.startswith('{"prompt": "xxx')
    assert text.endswith(f"… ({10_000 + len(json.dumps({'prompt': ''})) - 4000:,} more characters)")
    assert len(text) < 4050


def test_the_share_that_cannot_be_read_is_of_all_rows():
    """Also of those that are neither used nor left out."""
    left_out = LeftOut(RowReading(max_bad_rows=0.1))
    left_out.add(UnreadableError("not valid JSON", "a.jsonl line 1"))
    with pytest.raises(InputError, match=r"a.jsonl line 1: not valid JSON; 1 of 6 rows cannot be read"):
        left_out.check_share(used=5)
    left_out.seen = 501
    left_out.check_share(used=5)
    left_out.seen = 9
    with pytest.raises(InputError, match="1 of 9 rows"):
        left_out.check_share(used=5)


def test_what_is_left_out_is_said_of_all_rows(capsys):
    left_out = LeftOut()
    left_out.seen = 100
    left_out.add(UnusableError("no", "a.jsonl line 1"))
    left_out.close("score", used=5)
    assert "left out 1 of 100 rows: a.jsonl line 1: no" in capsys.readouterr().out
