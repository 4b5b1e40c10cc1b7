"""Grades, while the next answers are generated."""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import Callable, Sequence

from ..judges import Judge, grade_all
from ._store import Pair, Store

#: A judge that is slower than the model keeps so many batches waiting before the model waits.
_AHEAD = 4


class Grading:
    """A context. The judge is called in one other thread; the store is written in the caller's.
    What the judge raises comes out of :meth:`add` or at the end."""

    def __init__(self, judge: Judge, store: Store, done: Callable[[int], None]) -> None:
        self._judge, self._store, self._done = judge, store, done
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "blockem-grading")
        self._asked: deque[tuple[concurrent.futures.Future, list[Pair], int]] = deque()
        self._waiting: set[Pair] = set()

    def __enter__(self) -> Grading:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def add(self, pairs: Sequence[Pair]) -> None:
        """Has them graded, those of them that are not; `done` hears of all."""
        self._settle(_AHEAD)
        known = self._store.grades(pairs)
        new = [p for p in dict.fromkeys(pairs) if p not in known and p not in self._waiting]
        if not new:
            self._done(len(pairs))
            return
        self._waiting.update(new)
        self._asked.append((self._thread.submit(grade_all, self._judge, new), new, len(pairs)))

    def _settle(self, ahead: int) -> None:
        """Stores the grades that there are, and waits while more than `ahead` batches have none."""
        while self._asked and (len(self._asked) > ahead or self._asked[0][0].done()):
            future, pairs, count = self._asked.popleft()
            self._store.put_grades(dict(zip(pairs, future.result(), strict=True)))
            self._waiting.difference_update(pairs)
            self._done(count)
