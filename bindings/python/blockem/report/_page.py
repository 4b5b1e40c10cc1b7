"""The page: what a lab's runs show, in one HTML file without scripts or anything from outside."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from . import _chart, _text
from ._chart import Line, Mark, Row, escaped
from ._k_sets import facts, k_sets_text
from ._runs import BLOCK, DRIFTS, FRACTIONS, PLAIN, Run, checked, refuse
from ._style import STYLE
from ._summary import (
    METRICS,
    Estimate,
    estimate,
    in_order,
    mean,
    pair,
    plain_runs,
    sweep_of,
    variants,
    write_whole,
)
from ._targets import targets_table

#: Metrics that compare a variant with plain, so that plain has none worth showing.
COMPARED = ("relative_reduction", "relative_in_domain", "coherence_change")
#: With more lines than this in a chart, bands hide each other.
BANDS = 6


def write(path: str | os.PathLike[str], runs: Iterable[Mapping[str, Any]], **options: Any) -> None:
    """Writes :func:`page` to a file, whole or not at all."""
    write_whole(path, page(runs, **options))


def page(
    runs: Iterable[Mapping[str, Any]],
    *,
    title: str = "BLOCK-EM: what blocking did",
    blocked: str = BLOCK,
    k_domain: str = "finance",
    targets: Sequence[Mapping[str, Any]] = (),
    notes: str | Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    k_sets: Mapping[str, Mapping[str, Any]] | None = None,
    drift_unit: str = "as the runs measure it",
) -> str:
    """The page as text; the same runs give the same page.

    runs: dicts as the module's description says.
    blocked: the variant that the summary on top compares with ``plain``.
    k_domain: the training domain that K was found on, which has lines of its own.
    targets: dicts {variant, metric, at_least or at_most, optional steps and note}: what was to be
        reached, with a note on why it was not. Without steps it is the shortest training that has
        plain and blocked.
    notes: paragraphs of plain text.
    config: any nested dict.
    k_sets: what K0.json holds, by a label such as "seed 11".
    drift_unit: the unit that the axes of drift state.

    Raises ArgumentError (also ValueError) that names the run and the key: a missing or unknown
    value, a fraction outside 0..1, NaN, two runs of one seed, domain, steps and variant; a target
    or K set that is no such thing.
    """
    made = _Page(checked(runs), blocked, k_domain, drift_unit)
    sections = [
        (
            "summary",
            "Summary",
            made.summary() + targets_table(targets, made.runs, made.main_length),
        ),
        ("notes", "Notes", _notes(notes)),
        ("lambda", "Against λ", made.each_length(made.against_lambda)),
        ("variants", "Variants and controls", made.each_length(made.bars)),
        ("domains", "By domain", made.each_length(made.domains)),
        ("training", "Over training", made.lengths_chart() + made.each_length(made.curves)),
        ("tables", "All numbers", made.each_length(made.table)),
        ("k", "The blocked latents", k_sets_text(k_sets or {})),
        ("config", "Configuration", facts(config) if config else ""),
        ("reading", "How to read this", METHOD),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{name}</h2>\n{content}</section>\n'
        for key, name, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escaped(title)}</h1>\n{made.lead()}<nav>{links}</nav></header>\n"
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


METHOD = """\
<p>Every number is the mean over runs, with a 95 % interval in brackets: what other seeds would
give on the same domains. Runs of one seed share their base model, SAE and K, so each seed counts
once in the interval (Student's t over seeds, cut off where a fraction ends). With a single seed
there is no interval. In the charts bars, lines and shapes are means, whiskers and bands are
intervals, and small dots are single seeds; the exact numbers appear under the pointer.</p>
<p><b>Misalignment</b> is the share of misaligned answers outside the training domain, <b>in-domain
adherence</b> the share of answers in the training domain that do what was trained,
<b>coherence</b> the share of answers that are well formed and on topic. <b>Reduction of
misalignment</b> and the other comparisons set each run against the <code>plain</code> run of the
same seed, domain and length of training.</p>
"""


class _Page:
    """Runs with the styles of their variants, and the sections that they fill."""

    def __init__(self, runs: list[Run], blocked: str, k_domain: str, drift_unit: str) -> None:
        self.runs = runs
        self.plain = plain_runs(runs)
        self.blocked = blocked
        self.k_domain = k_domain
        self.drift_unit = drift_unit
        self.names = in_order(runs)
        if blocked not in (*self.names, BLOCK):
            refuse(
                f"blocked is {blocked!r}, and no run is of this variant: there are "
                f"{', '.join(self.names)}"
            )
        self.lengths = sorted({run["steps"] for run in runs})
        self.styles = _styles(self.names, blocked)
        has = lambda length, name: any(
            run["steps"] == length and run["variant"] == name for run in runs
        )
        both = [n for n in self.lengths if has(n, PLAIN) and has(n, blocked)]
        self.main_length = (both or self.lengths)[0]

    def each_length(self, section: Callable[[list[Run]], str]) -> str:
        """A section for each length of training."""
        parts = []
        for length in self.lengths:
            content = section([run for run in self.runs if run["steps"] == length])
            if content and len(self.lengths) > 1:
                content = f"<h3>{_text.count(length, 'step')} of training</h3>\n{content}"
            parts.append(content)
        return "".join(parts)

    def lead(self) -> str:
        seeds = sorted({run["seed"] for run in self.runs})
        domains = escaped(_text.listed(_domains(self.runs, self.k_domain)))
        lengths = _text.listed(f"{n:,}" for n in self.lengths)
        return (
            f"<p>{_text.count(len(self.runs), 'run')} of {_text.count(len(self.names), 'variant')}: "
            f"{'seed' if len(seeds) == 1 else 'seeds'} {_text.listed(map(str, seeds))}; trained on "
            f"{domains}, for {lengths} steps.</p>\n"
        )

    # ---- Summary --------------------------------------------------------------------------------

    def summary(self) -> str:
        return self.each_length(self._cards)

    def _cards(self, runs: list[Run]) -> str:
        made = variants(runs)
        plain, blocked = made.get(PLAIN, {}), made.get(self.blocked, {})
        cards = [
            _card("Misalignment, unblocked", "em", plain),
            _card("Misalignment, blocked", "em", blocked),
            _card(_text.LABELS["relative_reduction"], "relative_reduction", blocked),
            _card(
                "In-domain adherence, blocked", "in_domain", blocked, plain, "relative_in_domain"
            ),
            _card("Coherence, blocked", "coherence", blocked, plain, "coherence_change"),
        ]
        if not any(cards):
            return ""
        own = [run for run in runs if run["variant"] in (PLAIN, self.blocked)]
        return (
            f'<div class="cards">{"".join(cards)}</div>\n'
            f"<p>{_code(self.blocked)} against {_code(PLAIN)}: {self._extent(own)}.</p>\n"
        )

    def _extent(self, runs: list[Run]) -> str:
        seeds, domains = {run["seed"] for run in runs}, _domains(runs, self.k_domain)
        return f"{_text.count(len(seeds), 'seed')}, trained on {escaped(_text.listed(domains))}"

    # ---- Charts ---------------------------------------------------------------------------------

    def against_lambda(self, runs: list[Run]) -> str:
        """Sweeps of at least two values of λ, on what they and plain were all run on."""
        parts = []
        for family, members in _sweeps(runs).items():
            by_name = {name: _of(runs, name) for name in (PLAIN, *members)}
            common = set.intersection(*({pair(r) for r in found} for found in by_name.values()))
            if not common:
                parts.append(
                    f"<p>The sweep of {_code(family)} is not drawn: no seed and domain has all its "
                    f"values of λ and {_code(PLAIN)}.</p>\n"
                )
                continue
            kept = {
                name: [r for r in found if pair(r) in common] for name, found in by_name.items()
            }
            xs = {name: statistics.median(r.get("lam") or 0.0 for r in kept[name]) for name in kept}
            x = _chart.logarithms("λ", xs.values())
            style = self.styles[next(iter(members))]
            charts = []
            for metric in FRACTIONS:
                points = [
                    (xs[n], mark)
                    for n in sorted(kept, key=lambda n: xs[n])
                    if (mark := self._mark(metric, kept[n], f"{n}, λ = {xs[n]:.4g}"))
                ]
                y = self._axis(metric, [mark for _, mark in points])
                charts.append(
                    _chart.lines(
                        f"{_text.LABELS[metric]} against λ, {family}", x, y, [Line(style, points)]
                    )
                )
            parts.append(
                f"<p>{_code(family)} by λ, 0 being {_code(PLAIN)}: {self._extent(kept[PLAIN])}.</p>\n"
                f"{_figure(charts)}"
            )
        return "".join(parts)

    def bars(self, runs: list[Run]) -> str:
        names = _unswept(runs)
        charts = []
        for metric in ("em", "relative_reduction", "in_domain", "coherence"):
            marks = {
                name: self._mark(metric, _of(runs, name), name)
                for name in names
                if not (metric in COMPARED and name == PLAIN)
            }
            found = {name: mark for name, mark in marks.items() if mark is not None}
            if not found:
                continue
            axis = self._axis(metric, found.values(), bars=True)
            rows = [
                Row(
                    name,
                    f"{_text.shown(metric, mark.mean)}{_interval(metric, mark)}",
                    [(self.styles[name], mark)],
                )
                for name, mark in found.items()
            ]
            charts.append(_chart.rows(f"{_text.LABELS[metric]} by variant", axis, rows, bars=True))
        return _figure(charts) + _uneven([run for run in runs if run["variant"] in names])

    def domains(self, runs: list[Run]) -> str:
        named = [n for n in (PLAIN, self.blocked) if any(r["variant"] == n for r in runs)]
        own = {n: _of(runs, n) for n in named}
        domains = _domains(runs, self.k_domain)
        charts = []
        if len(domains) > 1:
            for metric in FRACTIONS:
                mark = lambda n, domain: self._mark(
                    metric, [r for r in own[n] if r["domain"] == domain], f"{n}, {domain}"
                )
                rows = [self._row(d, [(n, mark(n, d)) for n in named]) for d in domains]
                axis = self._axis(metric, _marks(rows), by=" by training domain")
                charts.append(
                    _chart.rows(
                        f"{_text.LABELS[metric]} by training domain", axis, rows, bars=False
                    )
                )
        evaluated = _evaluated(runs, self.k_domain)
        if evaluated:
            rows = [
                self._row(domain, [(n, self._mark_evaluated(own[n], domain, n)) for n in named])
                for domain in evaluated
            ]
            axis = self._axis("em", _marks(rows), by=" by evaluated domain")
            charts.append(_chart.rows("Misalignment by evaluated domain", axis, rows, bars=False))
        if not charts:
            return ""
        text = self._legend(named) + _figure(charts)
        if len(domains) > 1:
            text += self._by_training_domain(runs, domains)
        if evaluated:
            text += "".join(self._matrix(n, own[n], domains, evaluated) for n in named)
            rest = [n for n in in_order(runs) if n not in named]
            tables = "".join(self._matrix(n, _of(runs, n), domains, evaluated) for n in rest)
            if tables:
                label = "The same of all other variants"
                text += f"<details><summary>{label}</summary>\n{tables}</details>\n"
        return text

    def _row(self, domain: str, lanes: list[tuple[str, Mark | None]]) -> Row:
        return Row(domain, "", [(self.styles[n], mark) for n, mark in lanes if mark is not None])

    def curves(self, runs: list[Run]) -> str:
        charts, drawn, names, bands = [], [], _unswept(runs), ""
        for metric in (*FRACTIONS, *DRIFTS):
            series = {}
            for name in names:
                points = _curve(metric, [r for r in _of(runs, name) if r.get("curve")], name)
                if points:
                    series[name] = points
            if not series:
                continue
            drawn = [n for n in names if n in series or n in drawn]
            marks = [mark for points in series.values() for _, mark in points]
            if len(series) > BANDS and any(mark.hi > mark.lo for mark in marks):
                bands = "<p>Too many lines for bands: the intervals appear under the pointer.</p>\n"
                marks = [Mark(m.mean, m.mean, m.mean, m.text) for m in marks]
                series = {n: [(at, Mark(m.mean, m.mean, m.mean, m.text)) for at, m in points]
                          for n, points in series.items()}  # fmt: skip
            x = _chart.steps("training step", runs[0]["steps"])
            charts.append(
                _chart.lines(
                    f"{_text.LABELS[metric]} over training", x, self._axis(metric, marks),
                    [Line(self.styles[n], points) for n, points in series.items()],
                )
            )  # fmt: skip
        if not charts:
            return ""
        return self._legend(drawn) + _figure(charts) + bands

    def lengths_chart(self) -> str:
        """Where runs ended by their length, on the seeds and domains that a variant has at each."""
        by_name: dict[str, dict[int, list[Run]]] = {}
        for name in self.names:
            groups: dict[int, list[Run]] = {}
            for run in _of(self.runs, name):
                groups.setdefault(run["steps"], []).append(run)
            common = set.intersection(
                *({(r["seed"], r["domain"]) for r in found} for found in groups.values())
            )
            if len(groups) > 1 and common:
                by_name[name] = {
                    n: [r for r in found if (r["seed"], r["domain"]) in common]
                    for n, found in sorted(groups.items())
                }
        if not by_name:
            return ""
        x = _chart.logarithms(
            "steps of training", [n for groups in by_name.values() for n in groups]
        )
        charts = []
        for metric in (*FRACTIONS, *DRIFTS):
            series = {}
            for name, groups in by_name.items():
                marks = [
                    (n, self._mark(metric, found, f"{name}, {n} steps"))
                    for n, found in groups.items()
                ]
                if any(mark is not None for _, mark in marks):
                    series[name] = [(float(n), mark) for n, mark in marks if mark is not None]
            if series:
                axis = self._axis(
                    metric, [mark for points in series.values() for _, mark in points]
                )
                found = [Line(self.styles[n], points) for n, points in series.items()]
                charts.append(
                    _chart.lines(f"{_text.LABELS[metric]} by length of training", x, axis, found)
                )
        return (
            "<h3>By length of training</h3>\n<p>Where each run ended.</p>\n"
            + self._legend(list(by_name)) + _figure(charts)
        )  # fmt: skip

    def _mark(self, metric: str, runs: list[Run], text: str) -> Mark | None:
        found = estimate(metric, runs, self.plain)
        if found is None:
            return None
        dots = []
        for seed in sorted({run["seed"] for run in runs}):
            own = estimate(metric, [r for r in runs if r["seed"] == seed], self.plain)
            if own is not None:
                dots.append(
                    (own["mean"], f"{text}, seed {seed}: {_text.shown(metric, own['mean'])}")
                )
        return _mark(metric, found, text, dots if len(dots) > 1 else [])

    def _mark_evaluated(self, runs: list[Run], domain: str, name: str) -> Mark | None:
        values = [
            (r["seed"], r["em_by_domain"][domain])
            for r in runs
            if r["domain"] != domain and domain in (r.get("em_by_domain") or {})
        ]
        found = mean(values, (0, 1))
        if found is None:
            return None
        text, dots = f"{name}, evaluated on {domain}", []
        for seed in sorted({seed for seed, _ in values}):
            own = statistics.fmean(value for s, value in values if s == seed)
            dots.append((own, f"{text}, seed {seed}: {_text.shown('em', own)}"))
        return _mark("em", found, text, dots if len(dots) > 1 else [])

    def _axis(
        self, metric: str, marks: Iterable[Mark], bars: bool = False, by: str = ""
    ) -> _chart.Axis:
        values = [v for m in marks for v in (m.lo, m.hi, m.mean, *(value for value, _ in m.dots))]
        label = _text.LABELS[metric] + by
        if metric in DRIFTS:
            return _chart.amounts(f"{label} ({self.drift_unit})", values)
        if metric in COMPARED:
            return _chart.percents(label, values, "% of plain's")
        return _chart.percents(label) if bars or metric == "em" else _chart.close_up(label, values)

    def _legend(self, names: Sequence[str]) -> str:
        items = "".join(
            f"<li>{_chart.swatch(self.styles[n])}<span>{escaped(n)}</span></li>" for n in names
        )
        return f'<ul class="legend">{items}</ul>\n'

    # ---- Tables ---------------------------------------------------------------------------------

    def table(self, runs: list[Run]) -> str:
        """Each variant over all domains, over the one that K was found on, and over the others."""
        own = [r for r in runs if r["domain"] == self.k_domain]
        others = [r for r in runs if r["domain"] != self.k_domain]
        parts = [("all", variants(runs))]
        if own and others:
            parts += [(self.k_domain, variants(own)), ("others", variants(others))]
        metrics = [m for m in METRICS if any(m in values for values in parts[0][1].values())]
        head = "".join(f'<th scope="col">{_text.LABELS[m]}</th>' for m in metrics)
        domain = '<th scope="col">Trained on</th>' if len(parts) > 1 else ""
        body = []
        for name in in_order(runs):
            lines = [(label, made[name]) for label, made in parts if name in made]
            rows = []
            for i, (label, values) in enumerate(lines):
                first = (
                    f'<th scope="rowgroup" rowspan="{len(lines)}">{_text.breaking(name)}</th>'
                    if i == 0
                    else ""
                )
                where = f'<th scope="row">{escaped(label)}</th>' if len(parts) > 1 else ""
                count = values["em"]["runs"]
                cells = "".join(
                    _cell(m, values, count, name == PLAIN and m in COMPARED) for m in metrics
                )
                rows.append(f"<tr>{first}{where}<td>{count}</td>{cells}</tr>\n")
            body.append(f"<tbody>{''.join(rows)}</tbody>\n")
        return _text.scrolled(
            "All variants",
            f'<table class="all"><thead><tr><th scope="col">Variant</th>{domain}'
            f'<th scope="col">Runs</th>{head}</tr></thead>\n{"".join(body)}</table>',
        )

    def _by_training_domain(self, runs: list[Run], domains: Sequence[str]) -> str:
        rows = []
        for name in in_order(runs):
            own = _of(runs, name)
            cells = [
                mean([(r["seed"], r["em"]) for r in own if r["domain"] == d], (0, 1))
                for d in domains
            ]
            rows.append((name, cells))
        return _heat("Misalignment by training domain", "Variant", domains, rows)

    def _matrix(
        self, name: str, runs: list[Run], domains: Sequence[str], evaluated: Sequence[str]
    ) -> str:
        rows = []
        for domain in domains:
            own = [r for r in runs if r["domain"] == domain and r.get("em_by_domain")]
            cells = [
                mean(
                    [(r["seed"], r["em_by_domain"][e]) for r in own if e in r["em_by_domain"]],
                    (0, 1),
                )
                for e in evaluated
            ]
            if any(cells):
                rows.append((domain, cells))
        if not rows:
            return ""
        return _heat(f"{name}: misalignment by evaluated domain", "Trained on", evaluated, rows)


# ---- Pieces of the page -------------------------------------------------------------------------


def _card(
    label: str,
    metric: str,
    values: Mapping[str, Estimate],
    plain: Mapping[str, Estimate] | None = None,
    compared: str = "",
) -> str:
    if metric not in values:
        return ""
    found, against = values[metric], ""
    if plain and metric in plain:
        against = f"<p>unblocked {_text.data(metric, plain[metric]['mean'])}"
        if compared in values:
            against += (
                f"; {_text.LABELS[compared].lower()} {_text.estimated(compared, values[compared])}"
            )
        against += "</p>"
    return (
        f'<div class="card"><p class="name">{label}</p>'
        f'<p class="big">{_text.data(metric, found["mean"])}</p>'
        f"<p>{_text.bracketed(metric, found) or 'one seed, no interval'}</p>{against}</div>"
    )


def _notes(notes: str | Sequence[str]) -> str:
    paragraphs = [notes] if isinstance(notes, str) else list(notes)
    return "".join(f'<p class="note">{escaped(p.strip())}</p>\n' for p in paragraphs if p.strip())


def _heat(
    caption: str,
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Estimate | None]]],
) -> str:
    """Fractions with a tint that grows with them."""
    body = []
    for name, cells in rows:
        found = []
        for column, cell in zip(columns, cells, strict=True):
            if cell is None:
                found.append("<td>–</td>")
                continue
            own = ' class="own"' if column == name else ""
            found.append(
                f'<td{own} style="background:rgb(213 94 0/{0.5 * cell["mean"]:.3f})">'
                f"{_text.data('em', cell['mean'])}{_text.small(_text.bracketed('em', cell))}</td>"
            )
        body.append(f'<tr><th scope="row">{_text.breaking(name)}</th>{"".join(found)}</tr>\n')
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in columns)
    return _text.scrolled(
        caption,
        f'<table class="heat"><caption>{escaped(caption)}</caption><thead><tr>'
        f'<th scope="col">{corner}</th>'
        f"{head}</tr></thead>\n<tbody>{''.join(body)}</tbody></table>",
    )


def _cell(metric: str, values: Mapping[str, Estimate], runs: float, trivial: bool) -> str:
    if metric not in values or trivial:
        return "<td>–</td>"
    found = values[metric]
    fewer = f"<small>of {found['runs']} runs</small>" if found["runs"] != runs else ""
    interval = _text.small(_text.bracketed(metric, found))
    return f"<td>{_text.data(metric, found['mean'])}{interval}{fewer}</td>"


def _interval(metric: str, mark: Mark) -> str:
    if mark.lo == mark.hi == mark.mean:
        return ""
    return f" [{_text.number(metric, mark.lo)}, {_text.number(metric, mark.hi)}]"


def _mark(metric: str, found: Estimate, text: str, dots: Sequence[tuple[float, str]]) -> Mark:
    lo, hi = found["lo"], found["hi"]
    interval = (
        f" [{_text.number(metric, lo)}, {_text.number(metric, hi)}]" if found["seeds"] > 1 else ""
    )
    seeds = _text.count(int(found["seeds"]), "seed")
    return Mark(
        found["mean"],
        lo,
        hi,
        f"{text}: {_text.shown(metric, found['mean'])}{interval}, {seeds}",
        dots,
    )


def _marks(rows: Iterable[Row]) -> list[Mark]:
    return [mark for row in rows for _, mark in row.lanes]


def _code(name: str) -> str:
    return f"<code>{escaped(name)}</code>"


def _figure(charts: Sequence[str]) -> str:
    """Charts side by side, as many as there is room for; an even number in twos."""
    if not charts:
        return ""
    kind = "charts twos" if len(charts) in (2, 4) else "charts"
    return f'<div class="{kind}">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>\n'


def _uneven(runs: list[Run]) -> str:
    """What a comparison of means must be told: not every variant has the same seeds and domains."""
    own = {n: {pair(run) for run in _of(runs, n)} for n in in_order(runs)}
    most = set.union(*own.values())
    fewer = [f"<code>{escaped(n)}</code> {len(found)}" for n, found in own.items() if found != most]
    if not fewer:
        return ""
    return (
        f"<p>Not every variant was run on all {len(most)} pairs of seed and domain: "
        f"{_text.listed(fewer)}. Means of different pairs are not comparable; the reduction is, since "
        "each run is set against its own plain run.</p>\n"
    )


# ---- What is in the runs ------------------------------------------------------------------------


def _styles(names: Sequence[str], blocked: str) -> dict[str, int]:
    """plain and the blocked variant have colours of their own; a sweep has one style."""
    others = (i for i in itertools.count(2) if i % _chart.COLOURS > 1)
    families = {PLAIN: 0, sweep_of(blocked): 1}
    for name in names:
        if sweep_of(name) not in families:
            families[sweep_of(name)] = next(others)
    return {name: families[sweep_of(name)] for name in names}


def _sweeps(runs: list[Run]) -> dict[str, list[str]]:
    """Variants by sweep, where there are at least two with a lambda, and plain."""
    families: dict[str, list[str]] = {}
    for name in in_order(runs):
        own = _of(runs, name)
        if name != PLAIN and all(run.get("lam") for run in own):
            families.setdefault(sweep_of(name), []).append(name)
    has_plain = any(run["variant"] == PLAIN for run in runs)
    return {family: names for family, names in families.items() if len(names) > 1 and has_plain}


def _unswept(runs: list[Run]) -> list[str]:
    """Variants but for the members of the sweeps, which look the same and have charts of their own."""
    swept = {name for family in _sweeps(runs).values() for name in family}
    return [name for name in in_order(runs) if name not in swept or sweep_of(name) == name]


def _curve(metric: str, runs: list[Run], name: str) -> list[tuple[float, Mark]]:
    """At the steps that all runs of the variant measured."""
    measured = [
        {p["step"]: p[metric] for p in run["curve"] if p.get(metric) is not None} for run in runs
    ]
    if not measured:
        return []
    points = []
    for step in sorted(set.intersection(*(set(found) for found in measured))):
        values = [(run["seed"], found[step]) for run, found in zip(runs, measured, strict=True)]
        if (made := mean(values, METRICS[metric])) is not None:
            points.append((float(step), _mark(metric, made, f"{name}, step {step}", [])))
    return points


def _of(runs: list[Run], variant: str) -> list[Run]:
    return [run for run in runs if run["variant"] == variant]


def _domains(runs: Iterable[Run], first: str) -> list[str]:
    """Training domains, the one that K was found on first."""
    return sorted({run["domain"] for run in runs}, key=lambda name: (name != first, name))


def _evaluated(runs: Iterable[Run], first: str) -> list[str]:
    found = {domain for run in runs for domain in run.get("em_by_domain") or {}}
    return sorted(found, key=lambda name: (name != first, name))
