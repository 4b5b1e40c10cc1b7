"""Runs as plain data: what they hold, and the errors about what they should not."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from .. import _ffi
from .._library import fail

FRACTIONS = ("em", "in_domain", "coherence")
DRIFTS = ("drift_in", "drift_out")
IDENTITY = ("seed", "domain", "steps", "variant")
PLAIN, BLOCK = "plain", "block"
CONTROLS = ("random_k", "shuffled_signs", "flipped_signs", "one_side", "top_delta")

Run = dict[str, Any]


def checked(runs: Iterable[Mapping[str, Any]]) -> list[Run]:
    """The runs as dicts of Python's own numbers.

    Raises ArgumentError that names the run and the key.
    """
    found: list[Run] = []
    places: dict[tuple[Any, ...], int] = {}
    for i, run in enumerate(runs):
        if not isinstance(run, Mapping):
            refuse(f"run {i} is a {type(run).__name__}; expected a dict")
        run = _run(_Place(i, run), run)
        key = identity(run)
        if key in places:
            refuse(
                f"{_Place(i, run)} is there twice: run {places[key]} has the same seed, domain, steps "
                "and variant"
            )
        places[key] = i
        found.append(run)
    if not found:
        refuse("there are no runs")
    return found


def identity(run: Run) -> tuple[Any, ...]:
    return tuple(run[key] for key in IDENTITY)


def refuse(message: str) -> NoReturn:
    fail(_ffi.STATUS_INVALID_ARGUMENT, message)


class _Place:
    """Where a value stands, for the messages."""

    def __init__(self, index: int, run: Mapping[str, Any]) -> None:
        known = ", ".join(f"{key} {run[key]!r}" for key in IDENTITY if key in run)
        self.text = f"run {index} ({known})" if known else f"run {index}"

    def __str__(self) -> str:
        return self.text

    def refuse(self, key: str, value: object, expected: str) -> NoReturn:
        refuse(f"{self}: {key} is {value!r}; expected {expected}")


def _run(place: _Place, run: Mapping[str, Any]) -> Run:
    missing = [key for key in (*IDENTITY, *FRACTIONS, *DRIFTS) if key not in run]
    if missing:
        refuse(f"{place} has no {', '.join(missing)}")
    made: Run = {}
    for key, value in run.items():
        if key in ("seed", "steps"):
            made[key] = _whole(place, key, value)
        elif key in ("domain", "variant"):
            made[key] = _name(place, key, value)
        elif key in FRACTIONS:
            made[key] = _number(place, key, value, most=1)
        elif key in DRIFTS:
            made[key] = None if value is None else _number(place, key, value)
        elif key == "lam":
            made[key] = None if value is None else _number(place, key, value)
        elif key == "em_by_domain":
            made[key] = None if value is None else _by_domain(place, key, value)
        elif key == "curve":
            made[key] = None if value is None else _curve(place, value, run["steps"])
        else:
            made[key] = _other(place, key, value)
    if made["steps"] < 0:
        place.refuse("steps", made["steps"], "0 or more")
    if made["variant"] == PLAIN and made.get("lam"):
        place.refuse("lam", made["lam"], "0 or nothing: the variant plain has no penalty")
    return made


def _whole(place: _Place, key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        place.refuse(key, value, "a whole number")
    return int(value)


def _number(place: _Place, key: str, value: object, most: float = math.inf) -> float:
    expected = "a number, 0 or more" if most == math.inf else "a fraction between 0 and 1"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        place.refuse(key, value, expected)
    number = float(value)
    if not (math.isfinite(number) and 0 <= number <= most):
        place.refuse(key, value, expected)
    return number


def _name(place: _Place, key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        place.refuse(key, value, "a name")
    return str(value)


def _by_domain(place: _Place, key: str, value: object) -> dict[str, float]:
    if not isinstance(value, Mapping):
        place.refuse(key, value, "a dict of fractions by domain")
    return {
        _name(place, f"a domain in {key}", domain): _number(
            place, f"{key}[{domain!r}]", share, most=1
        )
        for domain, share in value.items()
    }


def _curve(place: _Place, value: object, steps: int) -> list[dict[str, Any]]:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        place.refuse("curve", value, "a list of points {step, em, ...}")
    made: list[dict[str, Any]] = []
    for i, point in enumerate(value):
        name = f"curve[{i}]"
        if not isinstance(point, Mapping) or "step" not in point:
            place.refuse(name, point, "a dict with a step")
        step = _whole(place, f"{name}['step']", point["step"])
        least = made[-1]["step"] + 1 if made else 0
        if not least <= step <= steps:
            place.refuse(
                f"{name}['step']", step, f"{least} to {steps}: ascending, within the run's steps"
            )
        checked_point: dict[str, Any] = {"step": step}
        for key, found in point.items():
            label = f"{name}[{key!r}]"
            if key in FRACTIONS:
                checked_point[key] = None if found is None else _number(place, label, found, most=1)
            elif key in DRIFTS:
                checked_point[key] = None if found is None else _number(place, label, found)
            elif key != "step":
                checked_point[key] = _other(place, label, found)
        made.append(checked_point)
    return made


def _other(place: _Place, key: object, value: Any) -> Any:
    """What the report does not read is kept if JSON can hold it."""
    if not isinstance(key, str):
        refuse(f"{place} has the key {key!r}; expected names")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        place.refuse(key, value, f"data for JSON ({error})")
    return value
