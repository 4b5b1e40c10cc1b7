"""What a study has generated and graded, in one SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..judges import Grade


class Store:
    """Answers by (condition, prompt) and grades by (judge, prompt, answer). A call that stores returns when
    the file is on the disk; it survives a kill at any moment."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS answers (condition TEXT, prompt TEXT, answer TEXT NOT NULL, "
            "PRIMARY KEY (condition, prompt)) WITHOUT ROWID"
        )
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS grades (judge TEXT, prompt TEXT, answer TEXT, "
            "misaligned INTEGER NOT NULL, incoherent INTEGER NOT NULL, "
            "PRIMARY KEY (judge, prompt, answer)) WITHOUT ROWID"
        )

    def answers(self, condition: str) -> Mapping[str, str]:
        """By prompt."""
        return dict(self._db.execute("SELECT prompt, answer FROM answers WHERE condition = ?", (condition,)))

    def put_answers(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """(condition, prompt, answer), all or none."""
        self._all_or_none("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)

    def grades(self, judge: str, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Grade]:
        """Of those (prompt, answer) pairs that have one."""
        found = {}
        for pair in pairs:
            row = self._db.execute(
                "SELECT misaligned, incoherent FROM grades WHERE judge = ? AND prompt = ? AND answer = ?",
                (judge, *pair),
            ).fetchone()
            if row is not None:
                found[pair] = Grade(bool(row[0]), bool(row[1]))
        return found

    def put_grades(self, judge: str, graded: Mapping[tuple[str, str], Grade]) -> None:
        self._all_or_none(
            "INSERT OR REPLACE INTO grades VALUES (?, ?, ?, ?, ?)",
            [(judge, *pair, g.misaligned, g.incoherent) for pair, g in graded.items()],
        )

    def _all_or_none(self, statement: str, rows: Iterable[tuple]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(statement, rows)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
