"""Progress lines while a phase runs, and the time of each phase."""

import os
import time
from contextlib import contextmanager

LINE_EVERY_S = 5.0


class Phases:
    """Announces each phase and keeps its wall and CPU seconds."""

    def __init__(self):
        self.seconds: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str):
        print(f"\n== {name}", flush=True)
        wall, cpu = time.perf_counter(), _cpu_seconds()
        yield
        spent = {"wall": time.perf_counter() - wall, "cpu": _cpu_seconds() - cpu}
        self.seconds[name] = spent
        print(f"   done in {spent['wall']:.1f} s", flush=True)


class Progress:
    """Prints `step i/n` with a few figures at the first step, every few seconds and at the last."""

    def __init__(self, steps: int):
        self.steps = steps
        self.start = time.perf_counter()
        self.printed = 0.0

    def step(self, done: int, **figures: float) -> None:
        now = time.perf_counter()
        if done not in (1, self.steps) and now - self.printed < LINE_EVERY_S:
            return
        self.printed = now
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"   step {done:4d}/{self.steps}  {now - self.start:5.1f} s  {shown}", flush=True)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system
