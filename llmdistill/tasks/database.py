"""A SQLite database that queries can only read: models write them, so they are treated as hostile.

They run in a process that is killed when one takes too long (curation/verify.py), on a copy that nothing else needs.
"""

import sqlite3
import tempfile
import weakref
from pathlib import Path

from llmdistill.curation.verify import Worker
from llmdistill.errors import InputError

_SECONDS = 3.0  # for one query
_KILLED_SECONDS = 10.0  # for two and their comparison


class Database:
    """The tables that an SQL file creates.

    Args:
        script: the file.

    Raises:
        InputError: it cannot be read, does not run, or makes no table.
    """

    def __init__(self, script: Path) -> None:
        directory = tempfile.TemporaryDirectory(prefix="llmdistill-")
        weakref.finalize(self, directory.cleanup)
        self._file = Path(directory.name) / "database"
        connection = sqlite3.connect(self._file)
        try:
            connection.set_authorizer(_no_other_files)
            connection.executescript(script.read_text(encoding="utf-8"))
            connection.commit()
            found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'")
            self.definitions = [str(sql).strip() for (sql,) in found]
        except (sqlite3.Error, sqlite3.Warning, OSError, ValueError) as error:
            raise InputError(f"{script}: cannot be run by SQLite: {error}") from None
        finally:
            connection.close()
        if not self.definitions:
            raise InputError(f"{script}: creates no table")
        self.seconds = _SECONDS
        first = {"check": "sql", "database": str(self._file), "query": "SELECT 1", "seconds": _SECONDS}
        self._worker = Worker(_KILLED_SECONDS, first)
        weakref.finalize(self, self._worker.kill)

    def refused(self, query: str, target: str | None = None, ordered: bool = False) -> str | None:
        """Why a query is invalid: it does not run or, with a target, does not give the same rows; None if it is valid.

        Args:
            query: it.
            target: the right query.
            ordered: whether the order of rows counts.
        """
        request = {"check": "sql", "database": str(self._file), "query": query, "seconds": self.seconds}
        return self._worker.ask({**request, "target": target, "ordered": ordered})


def _no_other_files(action: int, *about: str | None) -> int:
    return sqlite3.SQLITE_DENY if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH) else sqlite3.SQLITE_OK
