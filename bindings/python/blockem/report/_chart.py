"""Charts as SVG text: lines over an axis, and rows of bars or marks.

One chart is WIDTH wide and is never scaled far from that, so its text stays as large as the
page's. A variant has one style on the whole page: a colour and a shape, so that no chart is read
by colour alone.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH = 380
COLOURS = 8
#: What a character takes up in a wide font, at the charts' size of 11; and in bold.
CHARACTER, BOLD = 6.2, 7.2
SHAPES = (
    '<circle r="4"/>',
    '<rect x="-3.6" y="-3.6" width="7.2" height="7.2"/>',
    '<path d="M0-4.8 4.6 3.4H-4.6z"/>',
    '<path d="M0-5.2 5.2 0 0 5.2-5.2 0z"/>',
    '<path d="M0 4.8 4.6-3.4H-4.6z"/>',
    '<path d="M-4.6-2 0-5 4.6-2 3 4.4H-3z"/>',
)
DASHES = ("", "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Axis:
    """What is drawn along a side; values outside low..high are not expected."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool = False
    #: a logarithmic axis with a place of its own for 0, left of a gap
    zero: bool = False

    def place(self, value: float) -> float:
        """From 0 at the start to 1 at the end."""
        if not self.logarithmic:
            return (value - self.low) / (self.high - self.low)
        start = 0.16 if self.zero else 0.0
        if value == 0:
            return 0.0
        if self.low == self.high:
            return (start + 1) / 2
        return start + (1 - start) * math.log(value / self.low) / math.log(self.high / self.low)


@dataclass(frozen=True)
class Mark:
    """An estimate, the text that it shows under the pointer, and the seeds it is the mean of."""

    mean: float
    lo: float
    hi: float
    text: str
    dots: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Line:
    style: int
    points: Sequence[tuple[float, Mark]]


@dataclass(frozen=True)
class Row:
    label: str
    value: str
    lanes: Sequence[tuple[int, Mark]]


def percents(label: str, values: Iterable[float] = (), unit: str = "% of answers") -> Axis:
    """0 to 100 %, and further down if there are values below 0."""
    ticks = _round_ticks(min([0.0, *values]), 1.0)
    return Axis(f"{label} ({unit})", ticks[0], 1.0, [(t, _signed(f"{100 * t:.0f}")) for t in ticks])


def close_up(label: str, values: Iterable[float]) -> Axis:
    """The part of 0 to 100 % where the values are; the label says where it starts. Not for bars."""
    low = max([start for start in (0.0, 0.5, 0.8, 0.9) if start <= min([1.0, *values])])
    if low == 0:
        return percents(label)
    ticks = [(t, f"{100 * t:.0f}") for t in (low + i * (1 - low) / 5 for i in range(6))]
    return Axis(f"{label} (%, from {100 * low:.0f})", low, 1.0, ticks)


def amounts(label: str, values: Iterable[float]) -> Axis:
    """From 0 to a round number that holds all values."""
    most = max([0.0, *values]) or 1.0
    ticks = _round_ticks(0.0, most)
    if ticks[-1] < most:
        ticks.append(2 * ticks[-1] - ticks[-2])
    return Axis(label, 0.0, ticks[-1], [(t, f"{t:.6g}") for t in ticks])


def steps(label: str, most: int) -> Axis:
    ticks = _round_ticks(0.0, most or 1)
    return Axis(label, 0.0, most or 1, [(t, f"{t:,.6g}") for t in ticks])


def logarithms(label: str, values: Iterable[float]) -> Axis:
    """Decades, or the values themselves where they span less than two; 0 has a place of its own."""
    values = sorted(set(values))
    above = [v for v in values if v > 0]
    ticks = [(v, f"{v:.4g}") for v in above]
    if above[-1] >= 100 * above[0]:
        decades = range(
            math.ceil(math.log10(above[0]) - 1e-9), math.floor(math.log10(above[-1]) + 1e-9) + 1
        )
        ticks = [(10.0**n, _power(n)) for n in decades]
    if values[0] == 0:
        ticks = [(0.0, "0"), *ticks]
    return Axis(label, above[0], above[-1], ticks, logarithmic=True, zero=values[0] == 0)


def lines(name: str, x: Axis, y: Axis, series: Sequence[Line]) -> str:
    """Means as lines with their intervals as bands, and a dot for each seed."""
    height, left, right, top, bottom = 252, 44, 14, 26, 42
    across = lambda value: left + x.place(value) * (WIDTH - left - right)
    down = lambda value: height - bottom - y.place(value) * (height - top - bottom)
    parts = [_text(0, 11, y.label, "start", "label", WIDTH / BOLD)]
    for value, label in y.ticks:
        parts.append(_line("grid", left, down(value), WIDTH - right, down(value)))
        parts.append(_text(left - 6, down(value) + 4, label, "end"))
    base = height - bottom
    for value, label in _apart(x, WIDTH - left - right):
        parts.append(_line("tick", across(value), base, across(value), base + 4))
        parts.append(_text(across(value), base + 17, label, "middle"))
    parts.append(_line("axis", left, base, WIDTH - right, base))
    if x.zero:
        cut = left + 0.08 * (WIDTH - left - right)
        for shift in (-3, 3):
            parts.append(_line("tick", cut + shift - 3, base + 5, cut + shift + 3, base - 5))
    parts.append(_text((left + WIDTH - right) / 2, height - 5, x.label, "middle", "label"))
    for line in series:
        places = [(across(at), mark) for at, mark in line.points]
        parts.append(_opened(line.style))
        if len(places) > 1:
            edge = [(px, down(m.hi)) for px, m in places] + [
                (px, down(m.lo)) for px, m in places[::-1]
            ]
            if any(m.hi > m.lo for _, m in places):
                parts.append(f'<polygon class="band" points="{_points(edge)}"/>')
            dash = DASHES[line.style // COLOURS % len(DASHES)]
            dashed = f' stroke-dasharray="{dash}"' if dash else ""
            middle = _points((px, down(m.mean)) for px, m in places)
            parts.append(f'<polyline class="line" points="{middle}"{dashed}/>')
        elif places and places[0][1].hi > places[0][1].lo:
            px, only = places[0]
            parts.append(_line("whisker", px, down(only.lo), px, down(only.hi)))
        for px, mark in places:
            parts += [_dot(px, down(value), text) for value, text in mark.dots]
        # Shapes that touch would hide the line that they are to tell apart.
        step = max(1, math.ceil(len(places) / 16))
        for i, (px, mark) in enumerate(places):
            shown = (len(places) - 1 - i) % step == 0
            parts.append(_shape(line.style, px, down(mark.mean), mark.text, shown))
        parts.append("</g>")
    return _svg(name, height, parts)


def rows(name: str, x: Axis, found: Sequence[Row], bars: bool) -> str:
    """A label with a value above each row's lanes: bars from 0, or marks."""
    right, title, head, lane = 12, 22, 17, 14
    left = max(8.0, CHARACTER * len(x.ticks[0][1]) / 2 + 4)
    across = lambda value: left + x.place(value) * (WIDTH - left - right)
    parts = [_text(0, 11, x.label, "start", "label", WIDTH / BOLD)]
    ticks = _apart(x, WIDTH - left - right)
    top = title
    for row in found:
        room = (WIDTH - right - CHARACTER * len(row.value)) / BOLD - 1
        parts.append(_text(0, top + 12, row.label, "start", "row", room))
        parts.append(_text(WIDTH - right, top + 12, row.value, "end", "value"))
        start, end = top + head, top + head + lane * len(row.lanes)
        # Nothing runs through the words.
        parts += [_line("grid", across(value), start, across(value), end) for value, _ in ticks]
        zero = across(max(0.0, x.low))
        parts.append(_line("axis", zero, start - 1, zero, end + 1))
        for i, (style, mark) in enumerate(row.lanes):
            parts += _lane(across, start + lane * (i + 0.5), style, mark, bars)
        top = end + 7
    parts += [_text(across(value), top + 10, label, "middle") for value, label in ticks]
    return _svg(name, top + 16, parts)


def _lane(
    across: Callable[[float], float], middle: float, style: int, mark: Mark, bar: bool
) -> list[str]:
    parts = [_opened(style)]
    if bar:
        start, end = sorted((across(0.0), across(mark.mean)))
        parts.append(
            f'<rect class="bar" x="{start:.1f}" y="{middle - 6:.1f}" width="{end - start:.1f}" '
            f'height="12">{_title(mark.text)}</rect>'
        )
    if mark.hi > mark.lo:
        parts.append(_line("whisker", across(mark.lo), middle, across(mark.hi), middle))
        for value in (mark.lo, mark.hi):
            parts.append(_line("whisker", across(value), middle - 4, across(value), middle + 4))
    parts += [_dot(across(value), middle, text) for value, text in mark.dots]
    parts.append(_shape(style, across(mark.mean), middle, mark.text, shown=True))
    return [*parts, "</g>"]


def swatch(style: int) -> str:
    """A style's line and shape, for a legend."""
    dash = DASHES[style // COLOURS % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        '<svg class="swatch" viewBox="0 0 32 12" width="32" height="12" aria-hidden="true">'
        f'{_opened(style)}<polyline class="line" points="0,6 32,6"{dashed}/>'
        f'<g transform="translate(16 6)" class="shape">{_form(style)}</g></g></svg>'
    )


def escaped(value: object) -> str:
    """Text for HTML and for SVG as XML; characters that XML does not have become U+FFFD."""
    text = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value))
    return html.escape(text)


def _svg(name: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escaped(name)}">'
        + "".join(parts)
        + "</svg>"
    )


def _opened(style: int) -> str:
    return f'<g class="s{style % COLOURS}">'


def _form(style: int) -> str:
    return SHAPES[style % len(SHAPES)]


def _shape(style: int, x: float, y: float, text: str, shown: bool) -> str:
    # What is not drawn can still be pointed at.
    form = _form(style) if shown else '<circle r="4" class="ghost"/>'
    return f'<g transform="translate({x:.1f} {y:.1f})" class="shape">{form}{_title(text)}</g>'


def _dot(x: float, y: float, text: str) -> str:
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.4">{_title(text)}</circle>'


def _title(text: str) -> str:
    return f"<title>{escaped(text)}</title>"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(
    x: float, y: float, text: str, anchor: str, kind: str = "number", room: float = math.inf
) -> str:
    cut, title = text, ""
    if len(text) > room:
        cut, title = text[: max(int(room) - 1, 1)] + "…", _title(text)
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escaped(cut)}{title}</text>"
    )


def _points(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _apart(axis: Axis, length: float) -> list[tuple[float, str]]:
    """The ticks whose labels do not touch their neighbours'."""
    kept: list[tuple[float, str]] = []
    end = -math.inf
    for value, label in axis.ticks:
        half = CHARACTER * len(label) / 2
        place = axis.place(value) * length
        if place - half > end + 6:
            kept.append((value, label))
            end = place + half
    return kept


def _round_ticks(low: float, high: float) -> list[float]:
    """About five round numbers, the first at or below low, the last at or below high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _power(n: int) -> str:
    if 0 <= n <= 1:
        return str(10**n)
    return "10" + str(n).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
