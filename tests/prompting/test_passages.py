"""Documents cut into passages: nothing lost, nothing twice, nothing too long, at headings first."""

from bisect import bisect_left
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.config.prompts import Passages
from llmdistill.prompting.passages import split_text

DOCUMENT = """---
title: not part of it
---

# Garden

A line about the garden.

## Tools

The shed is open on Saturdays.

```bash
# this is no heading
dig --deep
```

### Machines

| machine | deposit |
| --- | --- |
| tiller | 80 |

Water
-----

Water comes from the roof.
"""
BLOCKS = st.sampled_from(
    [
        "# One",
        "## Two",
        "### Three\n",
        "A sentence. Another one! A third?",
        "word " * 30,
        "x" * 90,
        "- a\n- b\n- c",
        "> said",
        "",
        "日本語。" * 9,
    ]
)
DOCUMENTS = st.lists(BLOCKS | st.text("ab#. \n-`|", max_size=30), max_size=12).map("\n\n".join)
SIZES = st.tuples(st.integers(5, 120), st.integers(0, 100), st.integers(0, 60)).filter(lambda s: s[1] < s[0] and s[2] < s[0])


def texts(document, **settings):
    return [document[passage.start : passage.end] for passage in split_text(document, True, Passages(**settings))]


def test_a_document_is_cut_at_its_headings():
    passages = split_text(DOCUMENT, True, Passages(size=200, min_size=0))
    assert [(passage.heading, DOCUMENT[passage.start : passage.end].split("\n")[0]) for passage in passages] == [
        ("Garden", "# Garden"),
        ("Garden › Tools", "## Tools"),
        ("Garden › Tools › Machines", "### Machines"),
        ("Garden › Water", "Water"),
    ]
    assert "# this is no heading" in texts(DOCUMENT, size=200, min_size=0)[1]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("markdown", [True, False])
def test_other_ends_of_lines_cut_at_the_same_places(end, markdown):
    document = "---\ntitle: t\n---\n" + DOCUMENT
    settings = Passages(size=200, min_size=0)
    wanted = [(p.heading, document[p.start : p.end]) for p in split_text(document, markdown, settings)]
    other = document.replace("\n", end)
    found = [(p.heading, other[p.start : p.end].replace(end, "\n")) for p in split_text(other, markdown, settings)]
    if end == "\r":
        assert found == wanted
    else:  # each end of a line has one more character
        assert [heading for heading, _ in found][:1] == [heading for heading, _ in wanted][:1]
        assert "".join("".join(text.split()) for _, text in found) == "".join("".join(text.split()) for _, text in wanted)


def test_line_ends_that_are_mixed_lose_nothing():
    text = "# A\r\rpara one\r\r# B\r\n\npara two\r"
    passages = split_text(text, True, Passages(size=200, min_size=0))
    assert [(p.heading, text[p.start : p.end]) for p in passages] == [("A", "# A\r\rpara one"), ("B", "# B\r\n\npara two")]


def test_a_short_one_is_joined_to_its_neighbour_under_the_heading_that_both_have():
    passages = split_text(DOCUMENT, True, Passages(size=200, min_size=60))
    assert [(passage.heading, passage.too_short) for passage in passages] == [("Garden", False), ("Garden", False)]
    (alone,) = split_text("Hello.", True, Passages(size=200, min_size=60))
    assert alone.too_short


def test_a_heading_stays_with_the_heading_below_it():
    assert texts("# One\n\n## Two\n\ntext\n\n## Three\n\nmore", size=30, min_size=0) == [
        "# One\n\n## Two\n\ntext",
        "## Three\n\nmore",
    ]


def test_a_section_that_is_too_long_is_cut_between_paragraphs_then_sentences_then_words():
    assert texts("aa bb.\n\ncc dd.\n\nee", size=15, min_size=0) == ["aa bb.\n\ncc dd.", "ee"]
    assert texts("One two. Three four. Five six.", size=21, min_size=0) == ["One two. Three four.", "Five six."]
    assert texts("one two three four", size=9, min_size=0) == ["one two", "three", "four"]
    assert texts("abcdefgh", size=3, min_size=0) == ["abc", "def", "gh"]


def test_an_overlap_repeats_whole_pieces_of_a_section_that_was_cut():
    assert texts("aa.\n\nbb.\n\ncc.\n\ndd.", size=9, overlap=5, min_size=0) == ["aa.\n\nbb.", "bb.\n\ncc.", "cc.\n\ndd."]
    assert texts("# A\n\naa.\n\n# B\n\nbb.", size=12, overlap=9, min_size=0) == ["# A\n\naa.", "# B\n\nbb."]


def test_plain_text_has_paragraphs_and_no_headings():
    text = "# no heading\nhere\n\n\nnext one\n"
    passages = split_text(text, False, Passages(size=17, min_size=0))
    assert [(text[p.start : p.end], p.heading) for p in passages] == [("# no heading\nhere", ""), ("next one", "")]


def test_tokens_are_counted_where_they_begin():
    text = "a b c d e f g"
    passages = split_text(text, False, Passages(size=3, unit="tokens", min_size=0), lambda text: range(0, len(text), 2))
    assert [text[p.start : p.end] for p in passages] == ["a b c", "d e f", "g"]


@pytest.mark.parametrize("markdown", [True, False])
@given(document=DOCUMENTS, sizes=SIZES)
def test_nothing_is_lost_nothing_twice_and_nothing_too_long(markdown, document, sizes):
    size, least, _ = sizes
    passages = split_text(document, markdown, Passages(size=size, min_size=least))
    spans = [(passage.start, passage.end) for passage in passages]
    assert all(end - start <= size for start, end in spans)
    outside = [0, *(offset for span in spans for offset in span), len(document)]
    assert outside == sorted(outside), "in order and apart"
    assert not "".join(document[a:b] for a, b in zip(outside[::2], outside[1::2], strict=True)).strip()
    assert all(passage.too_short == (passage.end - passage.start < least) for passage in passages)


@given(document=DOCUMENTS, sizes=SIZES)
def test_an_overlap_is_no_larger_than_was_asked_and_loses_nothing(document, sizes):
    size, _, overlap = sizes
    passages = split_text(document, True, Passages(size=size, overlap=overlap, min_size=0))
    for passage, after in pairwise(passages):
        assert passage.start < after.start
        assert passage.end - after.start <= overlap
        assert passage.end < after.end
        assert not document[passage.end : max(passage.end, after.start)].strip()
    assert all(passage.end - passage.start <= size for passage in passages)


@given(document=DOCUMENTS, size=st.integers(1, 30))
def test_no_passage_has_more_tokens_than_asked(document, size):
    starts = [offset for offset in range(len(document)) if offset == 0 or document[offset - 1] in " \n."]
    for passage in split_text(document, True, Passages(size=size, unit="tokens", min_size=0), lambda _: starts):
        assert bisect_left(starts, passage.end) - bisect_left(starts, passage.start) <= size
