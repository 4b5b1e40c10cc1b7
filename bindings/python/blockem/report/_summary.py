"""Means over runs with 95 % intervals."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ._runs import BLOCK, CONTROLS, DRIFTS, FRACTIONS, PLAIN, Run, checked, refuse

#: Each metric with its bounds; what compares runs with plain follows what it compares.
METRICS: dict[str, tuple[float, float]] = {
    "em": (0, 1),
    "relative_reduction": (-math.inf, 1),
    "in_domain": (0, 1),
    "relative_in_domain": (0, math.inf),
    "coherence": (0, 1),
    "coherence_change": (-1, 1),
    "drift_in": (0, math.inf),
    "drift_out": (0, math.inf),
}

Estimate = dict[str, float]
Variants = dict[str, dict[str, Estimate]]


def summarize(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """{"runs": [...], "variants": {name: {metric: {mean, lo, hi, runs, seeds}}}}.

    A variant has all runs of its name, whatever their domain and steps. Metrics:

    - ``em``, ``in_domain``, ``coherence``, ``drift_in``, ``drift_out``: the mean over the runs
      that have the value.
    - ``relative_reduction``: 1 - sum of em / sum of em in the plain runs of the same seed, domain
      and steps. Of the sums, so that a plain run that is hardly misaligned does not outweigh the
      others.
    - ``relative_in_domain``: sum of in_domain / sum of it in the same plain runs.
    - ``coherence_change``: the mean of coherence minus the plain run's.

    lo and hi are a 95 % interval for other seeds on the same domains. A seed is a cluster, since
    its runs share a base model, an SAE and K: the interval is Student's t with (seeds - 1)
    degrees of freedom on the linearised variance between seeds, which is the usual interval on
    the seeds' means where each seed has as many runs. It is cut off at the metric's bounds. (A
    percentile bootstrap over as few as five seeds is too narrow.) With one seed there is no
    interval: lo = mean = hi, and ``seeds`` is 1.

    ``runs`` and ``seeds`` say what an estimate is made of. A metric that no run has, or whose
    divisor is 0, is left out.

    Raises ArgumentError as :func:`blockem.report.write` does.
    """
    found = checked(runs)
    return {"runs": found, "variants": variants(found)}


def write_summary(
    path: str | os.PathLike[str], runs: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Writes :func:`summarize` as JSON, whole or not at all, and returns it."""
    summary = summarize(runs)
    write_whole(path, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return summary


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file in one step: a reader or a kill never sees half of it."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def variants(runs: list[Run]) -> Variants:
    """Every metric of every variant."""
    plain = plain_runs(runs)
    return {
        name: estimates([run for run in runs if run["variant"] == name], plain)
        for name in in_order(runs)
    }


def estimates(runs: list[Run], plain: dict[tuple[Any, ...], Run]) -> dict[str, Estimate]:
    made = {metric: estimate(metric, runs, plain) for metric in METRICS}
    return {metric: found for metric, found in made.items() if found is not None}


def estimate(metric: str, runs: list[Run], plain: dict[tuple[Any, ...], Run]) -> Estimate | None:
    """None where there is nothing to take the mean of."""
    if metric in FRACTIONS or metric in DRIFTS:
        return mean([(run["seed"], run[metric]) for run in runs], METRICS[metric])
    pairs = [(run, plain[pair(run)]) for run in runs if pair(run) in plain]
    if metric == "relative_reduction":
        terms = [(run["seed"], other["em"] - run["em"], other["em"]) for run, other in pairs]
    elif metric == "relative_in_domain":
        terms = [(run["seed"], run["in_domain"], other["in_domain"]) for run, other in pairs]
    else:
        terms = [(run["seed"], run["coherence"] - other["coherence"], 1.0) for run, other in pairs]
    return ratio(terms, METRICS[metric])


def mean(
    values: Iterable[tuple[int, float | None]], bounds: tuple[float, float]
) -> Estimate | None:
    """Of (seed, value); None does not count."""
    return ratio([(seed, value, 1.0) for seed, value in values if value is not None], bounds)


def ratio(terms: list[tuple[int, float, float]], bounds: tuple[float, float]) -> Estimate | None:
    """sum of a / sum of b over (seed, a, b), with its interval over seeds."""
    whole = math.fsum(b for _, _, b in terms)
    if whole == 0:
        return None
    value = math.fsum(a for _, a, _ in terms) / whole
    seeds = sorted({seed for seed, _, _ in terms})
    half = 0.0
    if len(seeds) > 1:
        # How far each seed is from the common ratio: sum of a - value * b.
        rests = [math.fsum(a - value * b for s, a, b in terms if s == seed) for seed in seeds]
        variance = math.fsum(rest**2 for rest in rests) * len(seeds) / (len(seeds) - 1)
        half = student(len(seeds) - 1) * math.sqrt(variance) / whole
    least, most = bounds
    cut: Callable[[float], float] = lambda x: min(max(x, least), most)
    return {
        "mean": cut(value),
        "lo": cut(value - half),
        "hi": cut(value + half),
        "runs": len(terms),
        "seeds": len(seeds),
    }


@functools.lru_cache
def student(freedom: int, coverage: float = 0.95) -> float:
    """The half-width of Student's t: |t| stays below it with this probability."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < coverage:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < coverage else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| < t): the finite series for whole degrees of freedom (Abramowitz, Stegun 26.7.3-4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(freedom // 2):
        total += term
        term *= square * (2 * i + 1 + odd) / (2 * i + 2 + odd)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total


def pair(run: Run) -> tuple[Any, ...]:
    """What a run shares with its plain run."""
    return run["seed"], run["domain"], run["steps"]


def plain_runs(runs: list[Run]) -> dict[tuple[Any, ...], Run]:
    return {pair(run): run for run in runs if run["variant"] == PLAIN}


def sweep_of(variant: str) -> str:
    """The sweep over λ of a variant: its name without `_lam` and a number at the end."""
    return re.sub(r"_lam_?\d[^_]*\Z", "", variant)


def in_order(runs: list[Run]) -> list[str]:
    """Names of variants: plain, block, its settings (a sweep by lambda), the controls, any others."""
    names: dict[str, float] = {}
    for run in runs:
        names.setdefault(run["variant"], run.get("lam") or 0.0)

    def place(name: str) -> tuple[Any, ...]:
        groups = [
            name == PLAIN,
            name == BLOCK,
            name.startswith(f"{BLOCK}_"),
            name in CONTROLS,
            True,
        ]
        control = CONTROLS.index(name) if name in CONTROLS else 0
        return groups.index(True), control, sweep_of(name), names[name], name

    return sorted(names, key=place)


def same_as_summarized(runs: list[Run], found: object) -> None:
    """Refuses `variants` of a file that are not those of its runs."""
    made = variants(runs)
    if not isinstance(found, Mapping) or set(found) != set(made):
        refuse("its variants are not those of its runs: write it with blockem.report.write_summary")
    for name, metrics in made.items():
        for metric, values in metrics.items():
            for key, value in values.items():
                try:
                    other = found[name][metric][key]
                    same = math.isclose(other, value, rel_tol=1e-9, abs_tol=1e-12)
                except (KeyError, TypeError):
                    other, same = None, False
                if not same:
                    refuse(
                        f"variants[{name!r}][{metric!r}][{key!r}] is {other!r}, and its runs give "
                        f"{value!r}: write it with blockem.report.write_summary"
                    )
