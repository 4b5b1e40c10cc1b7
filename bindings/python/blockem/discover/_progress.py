"""A line on standard error: what is done, of what, and the time left."""

from __future__ import annotations

import sys
import time

_BAR = 24


class Progress:
    """A context; nothing is shown for work that is already done, or where it is not wanted."""

    def __init__(self, what: str, total: int, shown: bool) -> None:
        self._what, self._total, self._shown = what, total, shown and total > 0
        self._done, self._start, self._told = 0, time.monotonic(), 0.0
        self._tty = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown and self._tty:
            print(file=sys.stderr)

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        # A terminal shows a moving line, a log a line now and then.
        is_due = self._done == self._total or now - self._told > (0.2 if self._tty else 30)
        if self._shown and self._done and is_due:
            self._told = now
            left = (now - self._start) / self._done * (self._total - self._done)
            bar = ("#" * (_BAR * self._done // self._total)).ljust(_BAR, ".")
            line = f"{self._what} [{bar}] {self._done} of {self._total}, {_span(left)} left"
            start, end = ("\r", "") if self._tty else ("", "\n")
            print(f"{start}{line:<79}", end=end, file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds % 60:02} s"
