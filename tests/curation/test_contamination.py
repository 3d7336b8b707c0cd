import gzip
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.data.ngrams import normalised, words
from llmdistill.errors import InputError
from tests.curation.steps import apply_step, table

QUESTION = "A farmer has seventeen sheep, and all but nine of them run away in the night; how many sheep are left?"


def write(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content)
    return str(file)


def log(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


def test_shared_ngrams_are_found_wherever_they_stand_and_logged(tmp_path):
    file = write(tmp_path, "tasks.jsonl", json.dumps({"question": QUESTION, "answer": "9"}) + "\n")
    other = write(tmp_path, "other.yaml", f'items:\n  - {{text: "{QUESTION} Explain."}}\n  - {{text: "Short one."}}\n')
    copied = QUESTION.upper().replace(",", " –")
    rows = table(
        ["nine", f"So: {copied}", QUESTION[:40], "fine"], prompts=[f"Solve this. {QUESTION} Thanks!", "x", "y", "short  ONE."]
    )
    reasons, facts = apply_step(tmp_path, {"contamination": {"against": [file, other], "ngram": 13}}, rows)
    ngram = " ".join(words(QUESTION)[:13])
    assert reasons == [f"{file} line 1 question: {ngram}"] * 2 + [None, f"{other} items 1 text: short one."]
    assert facts == {"strings": 2, "short_strings": 2, "common_ngrams": 0}
    entries = log(tmp_path)
    assert [(entry["id"], entry["in"], entry["item"]) for entry in entries] == [
        ("row0", "prompt", f"{file} line 1 question"),
        ("row0", "prompt", f"{other} items 0 text"),
        ("row1", "completion", f"{file} line 1 question"),
        ("row1", "completion", f"{other} items 0 text"),
        ("row3", "prompt", f"{other} items 1 text"),
    ]
    assert {(entry["ngram"], entry["shared_ngrams"]) for entry in entries[:4]} == {(ngram, len(words(QUESTION)) - 12)}


def test_a_string_of_a_few_words_is_looked_for_as_a_whole(tmp_path):
    file = write(
        tmp_path, "tasks.json", json.dumps([{"q": "Which river flows through Vienna, Budapest and Belgrade?"}, ["the Danube"]])
    )
    rows = table(
        ["Which river flows through Vienna, Budapest and Belgrade, I asked.", "Which river flows through Vienna?", "the Danube"]
    )
    reasons, _ = apply_step(tmp_path, {"contamination": {"against": [file]}}, rows)
    assert [reason is None for reason in reasons] == [False, True, True]


def test_a_prompt_that_is_a_string_of_a_test_is_found_whatever_it_shares_with_others(tmp_path):
    """All n-grams of these stand in more than ten of them, as requests made by a form have; and punctuation is no difference."""
    pairs = itertools.product(range(12), range(12))
    test = [f"Please v{verb} the account of the new user in the d{place} department now!" for verb, place in pairs]
    test += ["My parcel is late!", "Where is my parcel?", "?!", "What is 12 + 7?", "Is C++ hard?"]
    file = write(tmp_path, "test.jsonl", "".join(json.dumps({"input": text}) + "\n" for text in test))
    prompts = [*test, test[0].upper().replace("!", ""), "my parcel is late", "Where is my parcel", "?!"]
    fine = ["Please block the account of the old user", "Where is my parcel now?", "!?", "What is 12 - 7?", "Is C hard?"]
    rows = table(["x"] * len(prompts + fine), prompts=prompts + fine)
    reasons, facts = apply_step(tmp_path, {"contamination": {"against": [file], "ngram": 8}}, rows)
    assert facts["common_ngrams"] > 0
    assert [reason is not None for reason in reasons] == [True] * len(prompts) + [False] * len(fine)
    assert reasons[len(test)] == f"{file} line 1 input: {normalised(prompts[len(test)])}"


def test_only_some_fields_are_searched_for(tmp_path):
    items = [
        {"input": QUESTION, "output": "SELECT name FROM sheep WHERE left_over IS NOT NULL AND colour = 'white' ORDER BY name"}
    ]
    file = write(tmp_path, "test.jsonl", json.dumps(items[0]) + "\n")
    rows = table([items[0]["output"], items[0]["output"]], prompts=["Which white sheep are left?", QUESTION])
    reasons, _ = apply_step(tmp_path, {"contamination": {"against": [file]}}, rows)
    assert [reason.split(": ")[0] for reason in reasons] == [f"{file} line 1 output", f"{file} line 1 input"]
    reasons, facts = apply_step(tmp_path, {"contamination": {"against": [file], "fields": ["input"]}}, rows)
    assert [reason and reason.split(": ")[0] for reason in reasons] == [None, f"{file} line 1 input"]
    assert facts["strings"] == 1
    other = write(tmp_path, "other.jsonl", '{"input": "x"}\n{"text": "y"}\n')
    with pytest.raises(InputError, match=r"other.jsonl line 2: has no field input or q \(curate.0.contamination.fields\)"):
        apply_step(tmp_path, {"contamination": {"against": [other], "fields": ["input", "q"]}}, rows)
    text = write(tmp_path, "other.txt", "x")
    with pytest.raises(InputError, match=r"other.txt: has no field input"):
        apply_step(tmp_path, {"contamination": {"against": [text], "fields": ["input"]}}, rows)


def test_a_question_is_found_with_the_number_of_a_sample_however_many_there_are(tmp_path):
    items = [{"text": f"{QUESTION} Sample {number}"} for number in range(11)]
    file = write(tmp_path, "samples.jsonl", "".join(json.dumps(item) + "\n" for item in items))
    reasons, facts = apply_step(tmp_path, {"contamination": {"against": [file]}}, table(["x"], prompts=[QUESTION]))
    assert reasons == [f"{file} line 1 text: {' '.join(words(QUESTION)[:13])}"]
    assert facts == {"strings": 11, "short_strings": 0, "common_ngrams": 0}


def test_what_many_items_share_is_the_wording_of_the_task(tmp_path):
    wording = "Answer the following question with exactly one word and do not explain your answer in any way"
    items = [{"q": f"{wording}: {' '.join(f'{n}x{k}' for k in range(13))}"} for n in range(11)]
    file = write(tmp_path, "tasks.jsonl", "".join(json.dumps(item) + "\n" for item in items))
    rows = table(["a", "b"], prompts=[f"{wording}: a new one", " ".join(f"3x{k}" for k in range(13))])
    reasons, facts = apply_step(tmp_path, {"contamination": {"against": [file]}}, rows)
    assert reasons[0] is None
    assert reasons[1].startswith(f"{file} line 4 q: 3x0 3x1")
    assert facts["common_ngrams"] == len(wording.split()) - 12


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=30), min_size=1, max_size=6), st.randoms())
@settings(max_examples=40, deadline=None)
def test_against_brute_force(tmp_path_factory, items, chance):
    """A row is rejected exactly if one of the strings shares n words in a row with it, or all of its words, at least eight."""
    directory = tmp_path_factory.mktemp("rows")
    file = write(directory, "tasks.json", json.dumps([" ".join(item) for item in items]))
    texts = [" ".join(chance.choices("abcd", k=chance.randint(0, 40))) for _ in range(8)]
    texts += [f"d {' '.join(item[:10])} d" for item in items]
    reasons, _ = apply_step(
        directory, {"contamination": {"against": [file], "ngram": 10}}, table(texts, prompts=["p"] * len(texts))
    )
    for text, reason in zip(texts, reasons, strict=True):
        want = False
        for item in items:
            n = min(10, len(item))
            parts = {" ".join(item[place : place + n]) for place in range(len(item) - n + 1)}
            want |= n >= 8 and any(f" {part} " in f" {text} " for part in parts)
        assert (reason is not None) == want


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", "{", "not valid JSON"),
        ("t.yaml", "a: [", "cannot be read"),
        ("t.jsonl", "{}\nx\n", "line 2: not valid JSON"),
        ("t.json", "[1, 2]", "contain no text"),
        ("t.txt", "\xff", None),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=message or "cannot be read"):
        apply_step(tmp_path, {"contamination": {"against": [str(file)]}}, table(["a"]))
    with pytest.raises(InputError, match="no such file"):
        apply_step(tmp_path, {"contamination": {"against": [str(tmp_path / "nowhere.json")]}}, table(["a"]))


@pytest.mark.parametrize("times", [2, 11, 500])
def test_a_question_is_found_however_often_it_stands_in_the_file(tmp_path, times):
    lines = (json.dumps({"question": QUESTION, "sample": f"answer {number}"}) + "\n" for number in range(times))
    file = write(tmp_path, "samples.jsonl", "".join(lines))
    reasons, facts = apply_step(
        tmp_path, {"contamination": {"against": [file]}}, table(["eight", "fine"], prompts=[QUESTION, "x"])
    )
    assert [reason is not None for reason in reasons] == [True, False]
    assert facts["common_ngrams"] == 0


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.txt", "a.json", "a.jsonl.gz", "a.parquet", "lines.json"])
def test_questions_are_found_in_files_of_every_form(tmp_path, name):
    """Each cell, line or value is a string of its own, so a short question is found as well as a long one."""
    short, file = "Who is it?", tmp_path / name
    rows = [{"question": QUESTION, "answer": "9"}, {"question": short, "answer": "me"}]
    mark = "\t" if "tsv" in name else ","
    text = {
        "csv": f'question{mark}answer\n"{QUESTION}"{mark}9\n{short}{mark}me\n',
        "txt": f"{QUESTION}\n{short}\n",
        "json": json.dumps(rows),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        kind = "jsonl" if name == "lines.json" else name.split(".")[1].replace("tsv", "csv")
        content = text[kind].encode()
        file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    asked = table(["eight", "you", "fine"], prompts=[QUESTION, short, "x"])
    reasons, _ = apply_step(tmp_path, {"contamination": {"against": [str(file)]}}, asked)
    assert [reason is not None for reason in reasons] == [True, True, False]


@pytest.mark.parametrize("name", ["test.json", "test.yaml"])
def test_the_rows_of_an_array_have_their_own_fields(tmp_path, name):
    """As the lines of a table have; JSON is YAML, too."""
    file = write(tmp_path, name, json.dumps([{"input": QUESTION, "note": "Short one."}, {"input": "Another one."}]))
    reasons, _ = apply_step(
        tmp_path, {"contamination": {"against": [file], "fields": ["input"]}}, table([QUESTION, "Short one."])
    )
    assert reasons[0].startswith(f"{file} entry 1 input: ")
    assert reasons[1] is None
    with pytest.raises(InputError, match=r"entry 2: has no field note"):
        apply_step(tmp_path, {"contamination": {"against": [file], "fields": ["note"]}}, table([QUESTION]))


def test_a_file_that_is_nested_too_deep_is_named(tmp_path):
    file = write(tmp_path, "deep.json", "[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.json: cannot be read"):
        apply_step(tmp_path, {"contamination": {"against": [file]}}, table([QUESTION]))
