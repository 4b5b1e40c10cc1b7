"""What was to be reached, and whether it was."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from . import _text
from ._chart import escaped
from ._runs import Run, refuse
from ._summary import METRICS, Estimate, variants


def targets_table(targets: Sequence[Mapping[str, Any]], runs: list[Run], main_length: int) -> str:
    """Which targets were reached; those without steps are of the main length of training."""
    if not targets:
        return ""
    rows = [_target(f"targets[{i}]", target, runs, main_length) for i, target in enumerate(targets)]
    return "<h3>Targets</h3>\n" + _text.scrolled(
        "Targets",
        '<table class="targets"><thead><tr><th scope="col">Target</th><th scope="col">Measured</th>'
        '<th scope="col">Verdict</th></tr></thead>\n<tbody>' + "".join(rows) + "</tbody></table>",
    )


def _target(place: str, target: Mapping[str, Any], runs: list[Run], main_length: int) -> str:
    if not isinstance(target, Mapping):
        refuse(f"{place} is a {type(target).__name__}; expected a dict")
    known = {"variant", "metric", "at_least", "at_most", "steps", "note"}
    if unknown := [str(key) for key in target if key not in known]:
        refuse(f"{place} has unknown keys: {', '.join(unknown)}")
    bounds = [key for key in ("at_least", "at_most") if key in target]
    metric, name = target.get("metric"), target.get("variant")
    if metric not in METRICS:
        refuse(f"{place}: metric is {metric!r}; expected one of {', '.join(METRICS)}")
    if not isinstance(name, str):
        refuse(f"{place}: variant is {name!r}; expected a name")
    if len(bounds) != 1:
        refuse(f"{place} must have at_least or at_most, and not both")
    bound = target[bounds[0]]
    if isinstance(bound, bool) or not isinstance(bound, numbers.Real) or not math.isfinite(bound):
        refuse(f"{place}: {bounds[0]} is {bound!r}; expected a number")
    length = target.get("steps", main_length)
    if isinstance(length, bool) or not isinstance(length, int):
        refuse(f"{place}: steps is {length!r}; expected a whole number")
    same = [run for run in runs if run["steps"] == length]
    found = variants(same).get(name, {}).get(metric)
    sign = "≥" if bounds[0] == "at_least" else "≤"
    where = (
        f", {_text.count(length, 'step')}" if any(run["steps"] != length for run in runs) else ""
    )
    wanted = f"{_text.LABELS[metric]} {sign} {_text.data(metric, float(bound))}"
    if found is None:
        verdict, measured = ("open", "? not measured"), "–"
    else:
        verdict, measured = _verdict(found, bounds[0], float(bound)), _text.estimated(metric, found)
    note = f'<p class="note">{escaped(target["note"])}</p>' if target.get("note") else ""
    return (
        f"<tr><td><code>{escaped(name)}</code>{where}: {wanted}{note}</td><td>{measured}</td>"
        f'<td class="{verdict[0]}">{verdict[1]}</td></tr>\n'
    )


def _verdict(found: Estimate, kind: str, bound: float) -> tuple[str, str]:
    """By the mean; what the interval leaves open is said."""
    turn = 1 if kind == "at_least" else -1
    reached = turn * (found["mean"] - bound) >= 0
    ends = turn * (found["lo"] - bound) >= 0, turn * (found["hi"] - bound) >= 0
    text = "✓ reached" if reached else "✗ not reached"
    if found["seeds"] == 1:
        text += ", one seed only"
    elif not all(ends) and reached:
        text += " on average; the interval goes beyond"
    elif any(ends) and not reached:
        text += "; the interval includes it"
    return ("met" if reached else "missed"), text
