import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.errors import InputError
from llmdistill.tasks.queries import same_rows
from llmdistill.tasks.sql import is_ordered
from llmdistill.tasks.task import read_task
from tests.tasks.make import SQL, items, make_task, write_task


@pytest.fixture
def task(tmp_path):
    return make_task(tmp_path, "sql")


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("SELECT name FROM people WHERE age = 31", "SELECT name AS n FROM people WHERE age > 30 ORDER BY height", 0),
        ("SELECT name FROM people WHERE age = 31 ORDER BY height", "SELECT name FROM people WHERE age > 30 ORDER BY height", 1),
        ("SELECT name FROM people WHERE age = 31 ORDER BY name", "SELECT name FROM people WHERE age > 30", 1),
        ("SELECT name FROM people WHERE age = 31 ORDER BY name DESC", "SELECT name FROM people WHERE age > 30", 1),
        ("SELECT age FROM people", "SELECT DISTINCT age FROM people", 0),  # a multiset, no set
        ("SELECT height FROM people WHERE name = 'Cat'", "SELECT 0.1 + 0.2", 1),
        ("SELECT 0.30001", "SELECT 0.3", 0),
        ("SELECT 31.0", "SELECT age FROM people WHERE name = 'Ann'", 1),
        ("SELECT '31'", "SELECT 31", 0),
        ("SELECT NULL", "SELECT age FROM people WHERE name = 'Dan'", 1),
        ("SELECT 0", "SELECT NULL", 0),
        ("SELECT 1, 2", "SELECT 1", 0),
        ("```sql\nSELECT 1;\n```", "SELECT 1; -- one", 1),
        ("SELECT nothing", "SELECT 1", 0),
    ],
)
def test_execution_accuracy(task, answer, target, right):
    assert task.rules.score(task, answer, target) == {"execution_accuracy": right}


def test_rows_that_differ_in_the_last_bits_find_their_partners():
    """Sorted by the first column, the rows would be paired the other way round."""
    low, high = 0.3, 0.1 + 0.2
    assert low < high
    assert same_rows([(low, "b"), (high, "a")], [(low, "a"), (high, "b")], ordered=False)
    assert not same_rows([(low, "b"), (high, "b")], [(low, "a"), (high, "b")], ordered=False)
    mixed = [(None,), (b"x",), ("x",), (2,), (1.5,), (b"",)]
    assert same_rows(mixed, mixed[::-1], ordered=False)
    assert not same_rows(mixed, mixed[::-1], ordered=True)
    assert not same_rows(mixed, [*mixed[:-1], ("",)], ordered=False)


VALUES = st.none() | st.integers(-3, 3) | st.sampled_from([0.1, 2.5, -1e6]) | st.sampled_from(["a", "b", ""]) | st.just(b"a")


@given(st.lists(st.tuples(VALUES, VALUES), max_size=8), st.randoms(use_true_random=False))
def test_the_order_and_the_last_bits_of_rows_do_not_count(rows, random):
    def near(value):
        return value * (1 + random.uniform(-1, 1) * 1e-12) if isinstance(value, float) else value

    shuffled = [tuple(map(near, row)) for row in random.sample(rows, len(rows))]
    assert same_rows(shuffled, rows, ordered=False)
    assert not same_rows([*shuffled, (1, 1)], rows, ordered=False)
    if rows:
        changed = [*shuffled[1:], (*shuffled[0][:1], "another")]
        assert not same_rows(changed, rows, ordered=False)


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER  BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
        ("WITH x AS (SELECT (1) FROM t ORDER BY a) SELECT a FROM x", False),
        ("SELECT 'order by' FROM t -- order by a", False),
        ('SELECT "order by" /* ORDER BY */ FROM [order by]', False),
        ("SELECT ')' FROM t ORDER BY (a)", True),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
    ],
)
def test_where_order_counts(query, ordered):
    assert is_ordered(query) == ordered


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO people VALUES ('Eve', 1, 1)",
        "DELETE FROM people",
        "UPDATE people SET age = 0",
        "DROP TABLE people",
        "CREATE TABLE more (a)",
        "CREATE TEMP TABLE more (a)",
        "ATTACH '{}/stolen' AS stolen",
        "VACUUM INTO '{}/stolen'",
        "PRAGMA writable_schema = ON",
        "PRAGMA table_info(people)",
        "SELECT load_extension('{}/stolen')",
        "BEGIN",
        "WITH x AS (SELECT 1) DELETE FROM people",
    ],
)
def test_a_query_can_only_read(task, tmp_path, query):
    before = sorted(file.name for file in tmp_path.iterdir())
    assert task.rules.verdict(task, query.replace("{}", str(tmp_path))) is not None
    there = "SELECT 'Ann', 31 UNION ALL SELECT 'Bob', 22 UNION ALL SELECT 'Cat', 31 UNION ALL SELECT 'Dan', NULL"
    assert task.database.refused("SELECT name, age FROM people", there) is None
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_what_sqlite_declares_when_it_is_first_used_can_be_read(tmp_path):
    """JSON's table-valued functions, and tables of a full-text index."""
    file = write_task(tmp_path, "sql")
    more = """CREATE VIRTUAL TABLE "two"" notes" USING fts5(text);
    INSERT INTO "two"" notes" VALUES ('hello there'), ('bye');"""
    (tmp_path / "people.sql").write_text(SQL + more)
    task = read_task(file, "eval.tasks")
    queries = {
        "SELECT p.name, j.value FROM people p, json_each('[1, 2]') j WHERE p.age = 22": "SELECT 'Bob', 1 UNION SELECT 'Bob', 2",
        "SELECT count(*) FROM json_tree('{\"a\": [1]}')": "SELECT 3",
        'SELECT text FROM "two"" notes" WHERE text MATCH \'hello\'': "SELECT 'hello there'",
    }
    for query, same in queries.items():
        assert task.rules.verdict(task, query) is None
        assert task.rules.score(task, query, same) == {"execution_accuracy": 1}
    assert "does more than read" in task.rules.verdict(task, 'INSERT INTO "two"" notes" VALUES (1)')


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("EXPLAIN SELECT 1", "is not a query"),
        ("-- so\n /* it */ explain query plan SELECT 1", "is not a query"),
        ("SELECT 1; DROP TABLE people", "does not run: You can only execute one statement at a time"),
        ("SELECT nowhere", "does not run: no such column: nowhere"),
        ("Who knows", 'does not run: near "Who": syntax error'),
        ("", "is not a query"),
        ("-- nothing", "is not a query"),
        ("SELECT ?", "does not run: Incorrect number of bindings"),
        ("SELECT '\0'", "does not run: "),
        ("SELECT '\ud800'", "does not run: "),
        ("DELETE FROM people", "does more than read the tables"),
        ("SELECT zeroblob(2000000000)", "does not run: string or blob too big"),
        ("SELECT " + "1+" * 5000 + "1", "does not run: Expression tree is too large"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n", "returns more than 10,000 rows"),
        (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 500) SELECT hex(zeroblob(40000)) FROM n",
            "returns more than 10,000 rows or 10,000,000 characters",
        ),
    ],
)
def test_why_a_query_is_not_accepted(task, query, why):
    assert why in task.rules.verdict(task, query)


@pytest.mark.parametrize(
    "query",
    [
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT count(*) FROM n",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n ORDER BY i DESC",
        "WITH RECURSIVE n(b) AS (SELECT zeroblob(90000) UNION ALL SELECT zeroblob(90000) FROM n) SELECT max(b) FROM n",
        "SELECT count(*) FROM " + ", ".join(f"people p{n}" for n in range(20)),
    ],
)
def test_what_never_ends_is_ended(task, query):
    task.database.seconds = 0.3
    start = time.monotonic()
    assert task.rules.verdict(task, query) in ("takes more than 0.3 s", "does not run: out of memory")
    assert time.monotonic() - start < 5


def test_one_operation_that_takes_long_is_ended_with_its_process(task):
    """The time limit is looked at between operations only; the next query has a process of its own."""
    task.database._worker.timeout_s = 1.0
    start = time.monotonic()
    assert task.rules.verdict(task, "SELECT printf('%.*c', 2000000000, 'x')") == "killed after 1 s"
    assert time.monotonic() - start < 10
    assert task.rules.verdict(task, "SELECT 1") is None


def test_operations_on_the_longest_strings_are_short(task):
    task.database.seconds = 0.3
    half = "replace(hex(zeroblob(24000)), '0', 'a')"
    for query in (f"SELECT instr({half} || {half}, {half} || 'b')", f"SELECT {half} || {half} LIKE '{'%a' * 400}%b'"):
        assert task.rules.verdict(task, f"{query} FROM people p, people q, people r") in (None, "takes more than 0.3 s")


def test_outputs_are_checked_by_line(task):
    task.rules.check_outputs(task, items("SELECT 1"))
    with pytest.raises(InputError) as error:
        task.rules.check_outputs(task, items("SELECT 1", "DROP TABLE people", json.dumps({"sql": 1})))
    first, second = str(error.value).splitlines()
    assert first == "test.jsonl line 2: output: does more than read the tables"
    assert second.startswith("test.jsonl line 3: output: does not run: ")
