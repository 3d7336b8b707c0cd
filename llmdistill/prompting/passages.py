"""Splits documents into passages: at headings, and between paragraphs if a section is too long."""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markdown_it import MarkdownIt

from llmdistill.config.prompts import Passages

Starts = Callable[[str], Sequence[int]]  # where each token of a text begins, in characters
# Where a paragraph that is too long may be cut, best first.
LINE_END = r"(?:\r\n|\n|\r(?!\n))"
_CUTS = (LINE_END, r"(?<=[.!?…])[\"”’)]*\s+|(?<=[。！？])", r"\s+")
_BLANK_LINES = re.compile(r"\s*[\r\n]")
_FRONT_MATTER = re.compile(rf"---{LINE_END}.*?{LINE_END}(---|\.\.\.){LINE_END}", re.DOTALL)
_HEADING_SEPARATOR = " › "


@dataclass(frozen=True)
class Passage:
    """A part of a document: `text[start:end]`, and the headings above it."""

    start: int
    end: int
    headings: tuple[str, ...]
    too_short: bool = False

    @property
    def heading(self) -> str:
        """The headings as one line."""
        return _HEADING_SEPARATOR.join(self.headings)


@dataclass(frozen=True)
class _Block:
    """A paragraph, a list, a table, …; `opens` if a section begins with it."""

    start: int
    end: int
    headings: tuple[str, ...]
    opens: bool = False


def split_text(text: str, markdown: bool, settings: Passages, token_starts: Starts | None = None) -> list[Passage]:
    """The passages of a document, in order.

    Without an overlap each character is in exactly one of them, but for white space around them and the front matter.

    Args:
        text: the document.
        markdown: whether it has headings, code and tables; else paragraphs stand between blank lines.
        settings: how large passages are.
        token_starts: where tokens begin, if tokens are counted.
    """
    starts = token_starts(text) if token_starts else range(len(text))

    def size(start: int, end: int) -> int:
        return bisect_left(starts, end) - bisect_left(starts, start)

    blocks = list(_markdown_blocks(text) if markdown else _paragraphs(text))
    passages: list[Passage] = []
    for section in _sections(blocks):
        pieces = [piece for block in section for piece in _pieces(text, block.start, block.end, size, settings.size)]
        passages += [Passage(start, end, section[-1].headings) for start, end in _pack(pieces, size, settings)]
    return list(_join(passages, size, settings))


def _markdown_blocks(text: str) -> Iterator[_Block]:
    """Top-level blocks by CommonMark with tables; a block extends to the start of the next one."""
    front = _FRONT_MATTER.match(text)
    offset = front.end() if front else 0
    tokens = MarkdownIt("commonmark").enable("table").parse(text[offset:])
    lines = [offset, *(offset + match.end() for match in re.finditer(LINE_END, text[offset:])), len(text)]
    opening = [(number, token) for number, token in enumerate(tokens) if token.level == 0 and token.map and token.nesting >= 0]
    if not opening:
        yield _Block(offset, len(text), ())
        return
    begins = [lines[token.map[0]] for _, token in opening if token.map]
    trail: list[tuple[int, str]] = []
    was_heading = False
    # What stands before the first block and is none, such as the definition of a link, goes with it.
    for (number, token), (start, end) in zip(opening, pairwise([offset, *begins[1:], len(text)]), strict=True):
        is_heading = token.type == "heading_open"
        if is_heading:
            level = int(token.tag[1])
            trail = [*((other, name) for other, name in trail if other < level), (level, tokens[number + 1].content)]
        yield _Block(start, end, tuple(name for _, name in trail), opens=is_heading and not was_heading)
        was_heading = is_heading


def _paragraphs(text: str) -> Iterator[_Block]:
    places = [0, *(match.end() for match in re.finditer(rf"{LINE_END}[ \t]*{LINE_END}\s*", text)), len(text)]
    return (_Block(start, end, ()) for start, end in pairwise(places) if start < end)


def _sections(blocks: list[_Block]) -> Iterator[list[_Block]]:
    places = [0, *(number for number, block in enumerate(blocks) if block.opens and number), len(blocks)]
    return (blocks[start:end] for start, end in pairwise(places) if start < end)


def _pieces(
    text: str, start: int, end: int, size: Callable[[int, int], int], most: int, cuts: Sequence[str] = _CUTS
) -> Iterator[tuple[int, int]]:
    """The block or, if it is too long, its lines, sentences, words, and finally as much of a word as fits.

    White space around them is in none, but what indents their first line.
    """
    end = start + len(text[start:end].rstrip())
    blank = _BLANK_LINES.match(text, start, end)
    start = blank.end() if blank else start
    if start == end:
        return
    if size(start, end) <= most:
        yield start, end
    elif cuts:
        places = [start, *(match.end() for match in re.compile(cuts[0]).finditer(text, start, end)), end]
        for a, b in pairwise(places):
            if a < b:
                yield from _pieces(text, a, b, size, most, cuts[1:])
    else:
        while start < end:
            stop = start + 1
            while stop < end and size(start, stop + 1) <= most:
                stop += 1
            yield start, stop
            start = stop


def _pack(pieces: list[tuple[int, int]], size: Callable[[int, int], int], settings: Passages) -> Iterator[tuple[int, int]]:
    """As many pieces at a time as fit; the next passage begins with as much of the last as the overlap allows."""
    first = 0
    while first < len(pieces):
        after = first + 1
        while after < len(pieces) and size(pieces[first][0], pieces[after][1]) <= settings.size:
            after += 1
        yield pieces[first][0], pieces[after - 1][1]
        if after == len(pieces):
            return
        shared = after
        while shared - 1 > first and size(pieces[shared - 1][0], pieces[after - 1][1]) <= settings.overlap:
            shared -= 1
        # What is shared must leave room for something new.
        while shared < after and size(pieces[shared][0], pieces[after][1]) > settings.size:
            shared += 1
        first = shared


def _join(passages: list[Passage], size: Callable[[int, int], int], settings: Passages) -> Iterator[Passage]:
    """Merge short passages with the next one, else the previous one; mark those that fit neither."""
    done: list[Passage] = []
    for passage in passages:
        last = done[-1] if done else None
        short = [one for one in (last, passage) if one and size(one.start, one.end) < settings.min_size]
        if last and short and size(last.start, passage.end) <= settings.size:
            common = [a for a, b in zip(last.headings, passage.headings, strict=False) if a == b]
            done[-1] = Passage(last.start, passage.end, tuple(common))
        else:
            done.append(passage)
    for passage in done:
        too_short = size(passage.start, passage.end) < settings.min_size
        yield Passage(passage.start, passage.end, passage.headings, too_short)
