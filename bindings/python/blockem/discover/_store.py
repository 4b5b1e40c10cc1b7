"""What a study has generated and graded, in one SQLite file."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..judges import Grade

#: Raised when the tables change.
_VERSION = 1

#: A prompt and its answer, as a judge sees them.
Pair = tuple[str, str]


class Store:
    """Answers by (condition, prompt), grades by (judge, pair), and single values. What a call
    stores is on the disk when it returns, all of it or nothing; what is there is never replaced.

    path: made if absent. Processes may share it.
    judge: what grades are kept by. None keeps them for this object's life only.
    """

    def __init__(self, path: Path, judge: str | None) -> None:
        self._judge = "" if judge is None else judge
        self._grades = "temp.grades" if judge is None else "main.grades"
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise ValueError(f"{path} is of version {version}, not {_VERSION}: take another folder")
        for setting in ("journal_mode=WAL", "synchronous=FULL", f"user_version={_VERSION}"):
            self._db.execute(f"PRAGMA {setting}")
        for table, columns, key in (
            ("main.answers", "condition TEXT, prompt TEXT, answer TEXT", "condition, prompt"),
            (self._grades, "judge TEXT, pair BLOB, misaligned INT, incoherent INT", "judge, pair"),
            ("main.kept", "name TEXT, value BLOB", "name"),
        ):
            self._db.execute(
                f"CREATE TABLE IF NOT EXISTS {table} ({columns}, PRIMARY KEY ({key})) WITHOUT ROWID"
            )

    def answers(self, condition: str) -> dict[str, str]:
        """By the prompt's key."""
        statement = "SELECT prompt, answer FROM answers WHERE condition = ?"
        return dict(self._db.execute(statement, (condition,)))

    def put_answers(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """(condition, prompt's key, answer)."""
        self._insert("main.answers", rows)

    def grades(self, pairs: Sequence[Pair]) -> dict[Pair, Grade]:
        """Of those pairs that have one."""
        found = {}
        for pair in pairs:
            row = self._db.execute(
                f"SELECT misaligned, incoherent FROM {self._grades} WHERE judge = ? AND pair = ?",
                (self._judge, _digest(pair)),
            ).fetchone()
            if row is not None:
                found[pair] = Grade(bool(row[0]), bool(row[1]))
        return found

    def put_grades(self, graded: Mapping[Pair, Grade]) -> None:
        rows = [
            (self._judge, _digest(pair), g.misaligned, g.incoherent) for pair, g in graded.items()
        ]
        self._insert(self._grades, rows)

    def value(self, name: str) -> bytes | None:
        row = self._db.execute("SELECT value FROM kept WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def put_value(self, name: str, value: bytes) -> None:
        self._insert("main.kept", [(name, value)])

    def _insert(self, table: str, rows: Iterable[tuple]) -> None:
        rows = list(rows)
        if not rows:
            return
        places = ", ".join("?" * len(rows[0]))
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({places})", rows)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _digest(pair: Pair) -> bytes:
    return hashlib.sha256(json.dumps(pair).encode()).digest()
