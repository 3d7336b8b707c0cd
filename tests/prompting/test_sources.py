"""Every kind of source gives its rows with their place, and what is wrong is named with file and line."""

import datetime
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdistill.config.prompts import Prompts
from llmdistill.errors import InputError
from llmdistill.prompting.sources import read_source, source_hash
from tests.factories import make_row, write_rows


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Write a file in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def put(name, content):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return put


def read(**section):
    return [(entry.fields, entry.origin) for entry in read_source(Prompts(**section))]


def test_jsonl_lines_are_counted_with_the_blank_ones(put):
    put("a.jsonl", '{"q": 1}\n\n{"q": "two\u2028lines"}\n')
    assert read(source="a.jsonl") == [({"q": 1}, "a.jsonl line 1"), ({"q": "two\u2028lines"}, "a.jsonl line 3")]


@pytest.mark.parametrize(("name", "between"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_with_cells_over_several_lines(put, name, between):
    rows = ["q,topic", '"one, {{ }}\nmore",x', "", 'two,"says ""y"""']
    put(name, "\ufeff" + "\r\n".join(rows).replace(",", between))
    assert read(source=name) == [
        ({"q": f"one{between} {{{{ }}}}\nmore", "topic": "x"}, f"{name} line 2"),
        ({"q": "two", "topic": 'says "y"'}, f"{name} line 5"),
    ]


def test_parquet(put, tmp_path):
    table = pa.table({"q": ["one", None], "day": [datetime.date(2031, 4, 9)] * 2, "of": [{"a": [1]}, {"a": []}]})
    pq.write_table(table, tmp_path / "a.parquet")
    put("x", "")
    first, second = read(source="a.parquet")
    assert first == ({"q": "one", "day": datetime.date(2031, 4, 9), "of": {"a": [1]}}, "a.parquet row 1")
    assert second[0]["q"] is None


CALLS = [{"city": "Paris"}, {"zip": "75001"}]  # of one tool, with other arguments each
CALLING = [
    {"role": "user", "content": "Weather?"},
    *({"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": call}}]} for call in CALLS),
]
OFFERED = [
    {"function": {"name": "weather", "parameters": {"properties": {name: {"type": "string"} for name in call}}}} for call in CALLS
]


@pytest.mark.parametrize("name", ["messages", "prompt", "completion", "chosen", "talk"])
def test_what_only_other_objects_of_a_column_have_is_no_part_of_a_message(put, tmp_path, name):
    """Arrow gives every object of a column all the fields that one of them has."""
    row = {name: CALLING, "tools": OFFERED, "meta": {"a": None}, "none": None, "scores": [1.5, None]}
    table = pa.Table.from_pylist([row])
    assert table[name].to_pylist()[0][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris", "zip": None}
    pq.write_table(table, tmp_path / "a.parquet")
    ((fields, _),) = read(source="a.parquet")
    assert fields == row


def test_a_null_in_a_line_is_the_users_own(put):
    put("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "q", "name": None}]}))
    assert read(source="a.jsonl") == [({"messages": [{"role": "user", "content": "q", "name": None}]}, "a.jsonl line 1")]


def test_messages_of_the_hub_have_no_nulls_of_other_rows(put, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    put("x", "")
    Path("set").mkdir()
    pq.write_table(pa.Table.from_pylist([{"messages": CALLING, "tools": OFFERED}]), "set/train.parquet")
    ((fields, _),) = read(dataset={"path": "set"})
    assert fields == {"messages": CALLING, "tools": OFFERED}


def test_a_text_of_a_table_that_is_not_utf_8_is_a_row_that_cannot_be_read(put, tmp_path):
    put("x", "")
    text = pa.array([b"one", b"\xff", b"three"]).view(pa.string())
    pq.write_table(pa.table({"q": text}), tmp_path / "a.parquet")
    first, bad, last = read_source(Prompts(source="a.parquet"))
    assert (first.fields, last.fields) == ({"q": "one"}, {"q": "three"})
    assert (bad.origin, bad.refused, bad.unreadable) == ("a.parquet row 2", "contains text that is not UTF-8", True)


@pytest.mark.parametrize("name", ["passage", "heading"])
def test_a_field_that_each_passage_gets_is_not_overwritten(put, name):
    put("a.jsonl", json.dumps({"t": "text", name: "mine"}))
    (entry,) = read_source(Prompts(source="a.jsonl", passages={"field": "t", "min_size": 0}))
    assert (entry.refused, entry.unreadable) == (f"has a field {name}, which each passage gets; give it another name", True)
    (entry,) = read_source(Prompts(source="a.jsonl", passages={"field": name, "min_size": 0}))
    assert (entry.fields, entry.refused) == ({"t": "text", "passage": "mine", "heading": ""}, None)


def test_a_dataset_as_the_hub_has_it(put, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    put("set/data/train.jsonl", '{"q": "one"}\n{"q": "two"}\n{"q": "three"}\n')
    put("set/data/test.jsonl", '{"q": "four"}\n')
    put("set/README.md", "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: data/train.jsonl}\n---\n")
    found = read(dataset={"path": "set", "name": "main", "split": "train[1:]"})
    assert found == [({"q": "two"}, "set main train[1:] row 1"), ({"q": "three"}, "set main train[1:] row 2")]
    with pytest.raises(InputError, match=r"prompts\.dataset: cannot load set"):
        read(dataset={"path": "set", "name": "main", "split": "validation"})
    put("set/data/train.jsonl", '{"q": "five"}\n')  # `datasets` would give what the file held before
    assert read(dataset={"path": "set", "name": "main", "split": "train"}) == [({"q": "five"}, "set main train row 1")]
    assert not list((tmp_path / "cache").glob("local-*"))


def test_documents_know_their_place(put):
    put("docs/b.md", "# B\n\nSecond.\n\n## Part\n\nMore of it.\n")
    put("docs/sub/a.txt", "Plain text.\n")
    put("docs/.hidden.md", "not this one")
    put("docs/picture.png", "nor this")
    entries = list(read_source(Prompts(source="docs", passages={"size": 16, "min_size": 4})))
    assert [(entry.fields["passage"], entry.fields["heading"], entry.origin) for entry in entries] == [
        ("# B\n\nSecond.", "B", "docs/b.md lines 1–3"),
        ("## Part", "B › Part", "docs/b.md lines 5–5"),
        ("More of it.", "B › Part", "docs/b.md lines 7–7"),
        ("Plain text.", "", "docs/sub/a.txt lines 1–1"),
    ]
    assert entries[1].place == {"file": "docs/b.md", "lines": [5, 5], "characters": [14, 21]}
    assert entries[0].fields["document"] == "docs/b.md"
    assert [entry.refused for entry in entries] == [None] * 4
    (again, *_) = read_source(Prompts(source="docs/**/*.md", passages={"size": 16, "min_size": 4}))
    assert again.origin == "docs/b.md lines 1–3"


def test_what_is_too_short_or_empty_is_refused_with_the_reason(put):
    put("a.md", "Hi.")
    put("b.md", "\n")
    put("c.md", "long enough to stay")
    entries = list(read_source(Prompts(source="*.md", passages={"min_size": 10})))
    assert [entry.refused for entry in entries] == ["shorter than 10 characters", "empty", None]


def test_a_column_of_documents_is_cut_too(put):
    put("a.jsonl", json.dumps({"text": "# One\n\nfirst\n\n# Two\n\nsecond", "topic": "x"}))
    entries = list(read_source(Prompts(source="a.jsonl", passages={"field": "text", "size": 15, "min_size": 0})))
    assert [entry.fields for entry in entries] == [
        {"topic": "x", "passage": "# One\n\nfirst", "heading": "One"},
        {"topic": "x", "passage": "# Two\n\nsecond", "heading": "Two"},
    ]
    assert entries[1].place == {"file": "a.jsonl", "line": 1, "lines": [5, 7], "characters": [14, 27]}


def test_a_row_without_text_to_cut_stands_between_the_others(put):
    put("a.jsonl", '{"t": "one"}\n{"t": null}\n{"t": "three"}')
    first, bad, last = read_source(Prompts(source="a.jsonl", passages={"field": "t", "min_size": 0}))
    assert (first.fields["passage"], last.fields["passage"]) == ("one", "three")
    assert (bad.origin, bad.unreadable) == ("a.jsonl line 2", True)
    assert bad.refused == "has no text in t (prompts.passages.field), only t"


def test_a_limit_stops_reading(put):
    put("a.jsonl", '{"q": 1}\n{"q": 2}\nnot JSON')
    assert len(read(source="a.jsonl", limit=2)) == 2


@pytest.mark.parametrize(
    ("files", "section", "message"),
    [
        ({}, {"source": "a.jsonl"}, "a.jsonl: no such file (prompts.source)"),
        ({}, {"source": "*.md"}, "prompts.source: *.md matches no file"),
        ({"d/a.png": ""}, {"source": "d"}, "prompts.source: d contains no file that ends in one of .jsonl, .json, .csv"),
        ({"a.xlsx": ""}, {"source": "a.xlsx"}, "prompts.source: a.xlsx is not a file that ends in one of"),
        ({"d/a.md": "x", "d/b.csv": "x"}, {"source": "d"}, "both tables and documents (.csv, .md); use a glob such as *.csv"),
        ({"a.jsonl": "\n"}, {"source": "a.jsonl"}, "a.jsonl: contains no prompts"),
        ({"a.csv": "q,r\n"}, {"source": "a.csv"}, "a.csv: contains no prompts"),
        ({"a.csv": ""}, {"source": "a.csv"}, "a.csv: contains no prompts"),
        ({"a.csv": "q,q\n1,2\n"}, {"source": "a.csv"}, "a.csv line 1: the header has a duplicate column"),
        ({"a.csv": 'q\n"1\n2\n'}, {"source": "a.csv"}, "a.csv line 2: not valid CSV"),
        ({"a.csv": b"q\n\xff\n"}, {"source": "a.csv"}, "a.csv: cannot be read"),
        ({"a.md": b"\xff"}, {"source": "a.md"}, "a.md: cannot be read"),
        ({"a.parquet": "PAR1"}, {"source": "a.parquet"}, "a.parquet: cannot be read"),
        ({"a.jsonl": "{}"}, {"source": "a.jsonl", "passages": {}}, "prompts.passages.field is missing"),
        ({"a.md": "x"}, {"source": "a.md", "passages": {"field": "t"}}, "prompts.passages.field is t, but a.md holds documents"),
    ],
)
def test_a_wrong_source_is_named(put, files, section, message):
    for name, content in files.items():
        put(name, content)
    with pytest.raises(InputError) as error:
        read(**section)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "origin", "reason"),
    [
        ("a.csv", "q,r\n1,2\n3\n4,5\n", "a.csv line 3", "has 1 cells, but the header has 2"),
        ("a.jsonl", '{"q": "1", "r": "2"}\n[1]\n{"q": "4", "r": "5"}', "a.jsonl line 2", "must be a JSON object"),
        ("a.jsonl", '{"q": "1", "r": "2"}\n{"q": \n{"q": "4", "r": "5"}', "a.jsonl line 2", "not valid JSON"),
        ("a.json", '[{"q": "1", "r": "2"}, 3, {"q": "4", "r": "5"}]', "a.json line 2", "must be a JSON object"),
    ],
)
def test_a_row_that_cannot_be_read_stands_between_the_others(put, name, content, origin, reason):
    put(name, content)
    first, bad, last = read_source(Prompts(source=name))
    assert (first.fields, last.fields) == ({"q": "1", "r": "2"}, {"q": "4", "r": "5"})
    assert (bad.origin, bad.unreadable) == (origin, True)
    assert bad.refused.startswith(reason)


def test_utf_16_says_so_itself(put):
    for encoding in ("utf-16-le", "utf-16-be"):
        put("a.jsonl", ("\ufeff" + json.dumps({"q": "für"}, ensure_ascii=False)).encode(encoding))
        (entry,) = read_source(Prompts(source="a.jsonl"))
        assert entry.fields == {"q": "für"}


def test_a_limit_of_a_dataset_counts_prompts(tmp_path):
    """Of which it may have several answers, side by side."""
    rows = [make_row(f"Number {number // 3}.", [1, 2], np.array([3])) for number in range(30)]
    source = str(write_rows(tmp_path / "data", rows, "none"))
    found = [entry.fields["prompt"][0]["content"] for entry in read_source(Prompts(source=source, limit=4))]
    assert list(dict.fromkeys(found)) == [f"Number {number}." for number in range(4)]
    assert len(list(read_source(Prompts(source=source)))) == 30


def test_a_source_is_known_by_the_content_of_its_files(put):
    put("docs/a.md", "one")
    first = source_hash(Prompts(source="docs"))
    assert list(first) == ["docs"]
    put("docs/notes.png", "no document")
    assert source_hash(Prompts(source="docs")) == first
    put("docs/b.md", "two")
    assert source_hash(Prompts(source="docs")) != first
    known = source_hash(Prompts(source="docs"))
    Path("docs").rename("elsewhere")
    assert [*source_hash(Prompts(source=str(Path.cwd() / "elsewhere"))).values()] == [*known.values()]
    assert source_hash(Prompts(dataset={"path": "some/where", "revision": "v1"})) == {"some/where": "some/where@v1"}


def test_a_name_that_is_no_text_is_refused(put):
    file = b"docs/caf\xe9.txt"
    put("docs/a.txt", "Text.")
    with open(file, "wb") as written:  # noqa: PTH123 - a name in bytes
        written.write(b"Text.")
    with pytest.raises(InputError, match=r"prompts\.source: the name b'docs/caf\\xe9\.txt' is not UTF-8; rename the file"):
        read(source="docs")
