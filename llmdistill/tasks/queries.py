"""Runs a query that a model wrote, in a separate process: see database.py. Needs only the standard library.

What a query may do is a list of what is allowed, not of what is forbidden. The file is opened read-only; memory, strings and
the result are bounded. The time limit is looked at between operations of SQLite: one that takes long, as printf can, is ended
with the process.
"""

import math
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = tuple[Any, ...]

_ROWS, _CHARACTERS = 10_000, 10_000_000  # of a result
_STRING = 100_000  # bytes of one value
_MEMORY = 512 << 20  # bytes that SQLite may take
_OPERATIONS = 100  # between two looks at the time
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = {"load_extension", "fts3_tokenizer"}
_TOLERANCE = 1e-9
_EXPLAINS = re.compile(r"(?:\s|--[^\n]*+(?:\n|$)|/\*.*?\*/)*+explain\b", re.IGNORECASE | re.DOTALL)  # in linear time


class QueryError(Exception):
    """The reason why there is no result."""


def check_query(database: str, query: str, seconds: float, target: str | None = None, ordered: bool = False) -> str | None:
    """Why a query is invalid: it does not run or, with a target, does not give the same rows.

    Args:
        database: the file.
        query: it.
        seconds: for each of the two.
        target: the right query.
        ordered: whether the order of rows counts.
    """
    try:
        found = read_rows(database, query, seconds)
    except QueryError as error:
        return str(error)
    if target is None or same_rows(found, read_rows(database, target, seconds), ordered):
        return None
    return "gives different rows"


def read_rows(database: str, query: str, seconds: float) -> list[Row]:
    """The rows of one query.

    Raises:
        QueryError: it does not run, does more than read, takes too long, or gives too much.
    """
    if _EXPLAINS.match(query):
        raise QueryError("is not a query")
    refused: list[int] = []

    def authorise(action: int, first: str | None, second: str | None, *where: str | None) -> int:
        if action in _ALLOWED and not (action == sqlite3.SQLITE_FUNCTION and second in _FORBIDDEN_FUNCTIONS):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_PRAGMA and first == "data_version":  # which full-text search looks at
            return sqlite3.SQLITE_OK
        refused.append(action)
        return sqlite3.SQLITE_DENY

    connection = sqlite3.connect(f"{Path(database).as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
    try:
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute(f"PRAGMA hard_heap_limit = {_MEMORY}")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _STRING)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, _STRING)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0)
        for table in _virtual_tables(connection):
            with suppress(sqlite3.Error):  # of a module that is not there: no other query needs it
                connection.execute(f"SELECT * FROM {table} LIMIT 0")  # noqa: S608, a name in quotes
        connection.set_authorizer(authorise)
        deadline = time.monotonic() + seconds
        connection.set_progress_handler(lambda: time.monotonic() > deadline, _OPERATIONS)
        return _fetched(connection.execute(query))
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
        if refused:
            raise QueryError("does more than read the tables") from None
        if str(error) == "interrupted":
            raise QueryError(f"takes more than {seconds:g} s") from None
        raise QueryError(f"does not run: {error or type(error).__name__}") from None
    finally:
        connection.close()


def _virtual_tables(connection: sqlite3.Connection) -> list[str]:
    """Tables that SQLite declares on first use, which looks like a change of the schema."""
    declared = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE VIRTUAL TABLE%'"
    own = ['"' + name.replace('"', '""') + '"' for (name,) in connection.execute(declared)]
    return ["json_each('[]')", "json_tree('[]')", *own]


def _fetched(cursor: sqlite3.Cursor) -> list[Row]:
    if cursor.description is None:
        raise QueryError("is not a query")
    rows: list[Row] = []
    size = 0
    for row in cursor:
        rows.append(row)
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        if len(rows) > _ROWS or size > _CHARACTERS:
            raise QueryError(f"returns more than {_ROWS:,} rows or {_CHARACTERS:,} characters")
    return rows


def same_rows(found: Sequence[Row], wanted: Sequence[Row], ordered: bool) -> bool:
    """Whether two results have the same rows, as lists if they are ordered, else as multisets; floats within 1e-9."""
    if len(found) != len(wanted):
        return False
    if ordered:
        return all(_same(one, other) for one, other in zip(found, wanted, strict=True))
    # What is equal to the bit is the most; of the rest, each row takes a partner, which sorting brings near the front.
    one, other = Counter(found), Counter(wanted)
    ours, theirs = (sorted((left).elements(), key=_sort_key) for left in (one - other, other - one))
    for row in ours:
        partner = next((place for place, candidate in enumerate(theirs) if _same(row, candidate)), None)
        if partner is None:
            return False
        del theirs[partner]
    return True


def _same(one: Row, other: Row) -> bool:
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        if isinstance(a, int | float) and isinstance(b, int | float) and isinstance(a + b, float)
        else a == b
        for a, b in zip(one, other, strict=True)
    )


def _sort_key(row: Row) -> list[tuple[str, Any]]:
    """A sort key that makes rows of any types comparable: NULLs, numbers, text and blobs are separate."""
    return [
        ("", 0) if value is None else ("number" if isinstance(value, int | float) else type(value).__name__, value)
        for value in row
    ]
