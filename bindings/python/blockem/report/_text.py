"""Numbers, names and tables as text of the page."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ._chart import escaped
from ._runs import DRIFTS
from ._summary import Estimate

LABELS = {
    "em": "Misalignment",
    "relative_reduction": "Reduction of misalignment",
    "in_domain": "In-domain adherence",
    "relative_in_domain": "Adherence relative to plain",
    "coherence": "Coherence",
    "coherence_change": "Change of coherence",
    "drift_in": "Drift inside K",
    "drift_out": "Drift outside K",
}


def estimated(metric: str, found: Estimate) -> str:
    """The mean and its interval."""
    return f"{data(metric, found['mean'])} {bracketed(metric, found)}".rstrip()


def bracketed(metric: str, found: Estimate) -> str:
    """The interval, if there is one."""
    if found["seeds"] == 1:
        return ""
    lo, hi = (data(metric, found[key], unit=False) for key in ("lo", "hi"))
    return f"[{lo},\u00a0{hi}]"


def small(text: str) -> str:
    return f"<small>{text}</small>" if text else ""


def data(metric: str, value: float, unit: bool = True) -> str:
    """A number as it is read, with its exact value for programs."""
    text = shown(metric, value) if unit else number(metric, value)
    return f'<data value="{value!r}">{text}</data>'


def shown(metric: str, value: float) -> str:
    """A number with its unit."""
    unit = "" if metric in DRIFTS else "\u00a0points" if metric == "coherence_change" else "\u00a0%"
    return number(metric, value) + unit


def number(metric: str, value: float) -> str:
    if metric in DRIFTS:
        return f"{value:.3g}"
    return signed(100 * value, "+.1f" if metric == "coherence_change" else ".1f")


def signed(value: float, form: str) -> str:
    """With a real minus sign, and none before 0."""
    text = format(value, form)
    if float(text) == 0:
        text = format(0.0, form.removeprefix("+"))
    return text.replace("-", "−")


def scrolled(label: str, table: str) -> str:
    """A table that scrolls by itself where the page is too narrow for it."""
    name = escaped(label)
    return f'<div class="scroll" role="region" aria-label="{name}" tabindex="0">{table}</div>\n'


def breaking(name: str) -> str:
    """A name that may be broken where its words meet."""
    return re.sub("([_./])", r"\1<wbr>", escaped(name))


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def listed(words: Iterable[str]) -> str:
    """a, b and c"""
    *most, last = list(words)
    return f"{', '.join(most)} and {last}" if most else last
