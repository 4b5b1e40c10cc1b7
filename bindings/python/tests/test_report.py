"""blockem.report: means and intervals, and the page in HTML, in XML and in a browser."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blockem
from blockem import report
from blockem.report import _chart, _style, _summary
from blockem.report.__main__ import main

DOMAINS = ("finance", "health", "legal", "education", "career", "automotive")
SEEDS = (11, 12, 13, 14, 15)
#: misalignment, adherence, coherence, drift inside and outside K that the made-up runs scatter around
LEVELS = {
    "plain": (0.76, 0.99, 0.985, 0.041, 0.0021),
    "block": (0.093, 0.97, 0.97, 0.0006, 0.0029),
    "block_frozen_above": (0.05, 0.975, 0.972, 0.0005, 0.0026),
    "block_preactivation": (0.14, 0.95, 0.96, 0.0004, 0.0031),
    "block_lam10": (0.61, 0.99, 0.985, 0.021, 0.0022),
    "block_lam100": (0.37, 0.985, 0.98, 0.008, 0.0024),
    "block_lam1000": (0.18, 0.98, 0.975, 0.002, 0.0027),
    "block_lam100000": (0.08, 0.83, 0.87, 0.0001, 0.0030),
    "random_k": (0.74, 0.99, 0.984, 0.001, 0.0021),
    "shuffled_signs": (0.58, 0.97, 0.97, 0.02, 0.0024),
    "one_side": (0.29, 0.98, 0.975, 0.015, 0.0025),
    "top_delta": (0.21, 0.975, 0.972, 0.004, 0.0027),
}
LONG = {
    "plain": (0.88, 1.0, 0.98, 0.062, 0.0035),
    "block": (0.42, 1.0, 0.97, 0.0011, 0.0071),
    "block_watch": (0.12, 0.985, 0.965, 0.0012, 0.0040),
    "block_adaptive": (0.07, 0.98, 0.963, 0.0012, 0.0038),
}
TARGETS = [
    {"variant": "plain", "metric": "em", "at_least": 0.4},
    {
        "variant": "block",
        "metric": "relative_reduction",
        "at_least": 0.9,
        "note": "Coverage of K: see the notes.",
    },
    {"variant": "block", "metric": "relative_in_domain", "at_least": 0.95},
    {"variant": "block", "metric": "coherence_change", "at_least": -0.03},
    {"variant": "block_adaptive", "metric": "relative_reduction", "at_least": 0.9, "steps": 400},
]
HOSTILE = (
    "\"><script>alert('x')</script><img src=x onerror=alert(1)>&lt;</svg></style>]]>\x00\x0b\ud800"
)


def made_up(seed: int = 0) -> list[dict[str, Any]]:
    """Runs as a lab gives them: seeds scatter, domains differ, long runs have curves."""
    draw = random.Random(seed)
    lift = {d: draw.uniform(-0.2, 0.2) for d in DOMAINS}
    runs = []
    for run_seed, domain in itertools.product(SEEDS, DOMAINS):
        luck = draw.gauss(0, 0.12)
        for steps, levels in ((40, LEVELS), (400, LONG)):
            for variant, level in levels.items():
                if "_lam" in variant and domain not in ("finance", "legal"):
                    continue
                runs.append(
                    _made_up(draw, run_seed, domain, steps, variant, level, lift[domain] + luck)
                )
    return runs


def _made_up(
    draw: random.Random,
    seed: int,
    domain: str,
    steps: int,
    variant: str,
    level: tuple[float, ...],
    shift: float,
) -> dict[str, Any]:
    cut = lambda x: min(max(x, 0.0), 1.0)
    em, in_domain, coherence, drift_in, drift_out = level
    em = cut(em * (1 + shift + draw.gauss(0, 0.15)))
    run = {
        "seed": seed, "domain": domain, "steps": steps, "variant": variant, "em": em,
        "in_domain": cut(in_domain + draw.gauss(0, 0.01)), "coherence": cut(coherence + draw.gauss(0, 0.008)),
        "drift_in": drift_in * draw.uniform(0.7, 1.3), "drift_out": drift_out * draw.uniform(0.8, 1.2),
        "em_by_domain": {d: cut(em + draw.gauss(0, 0.05)) for d in DOMAINS if d != domain},
        "seconds": 12.5,
    }  # fmt: skip
    if variant != "plain":
        run["lam"] = float(variant.partition("_lam")[2] or 10_000)
    points = range(0, steps + 1, max(steps // 20, 5))
    rise = lambda step, to: to * (1 - math.exp(-4 * step / steps))
    run["curve"] = [
        {
            "step": step, "em": rise(step, em), "in_domain": rise(step, run["in_domain"]),
            "coherence": 1 - rise(step, 1 - run["coherence"]), "drift_in": rise(step, run["drift_in"]),
            "drift_out": rise(step, run["drift_out"]),
        }
        for step in points
    ]  # fmt: skip
    return run


def k0(seed: int = 0) -> dict[str, Any]:
    draw = random.Random(seed)
    ids = draw.sample(range(1024), 20)
    return {
        "K_pos": ids[:11],
        "K_neg": ids[11:],
        "selected_latents": [
            {
                "latent": latent, "sign_group": "K_pos" if i < 11 else "K_neg",
                "delta": draw.uniform(0.02, 0.4) * (1 if i < 11 else -1), "score": draw.uniform(0.1, 0.9),
                "induce_strength": 0.55, "induce_gain": draw.uniform(0, 0.2),
                "repair_strength": 0.4, "repair_gain": draw.uniform(0.1, 0.7),
            }
            for i, latent in enumerate(ids)
        ],
        "discovery": {"rule": "repair", "candidates": 80, "prompts": {"selection": 44, "held_out": 29}},
    }  # fmt: skip


def whole_page(runs: list[dict[str, Any]]) -> str:
    return report.page(
        runs,
        title="The lab: blocking in six domains",
        targets=TARGETS,
        notes=["Blocking 20 latents leaves 9 %: K holds half of what moves.\nTried: K of 80, freezing above.", "Second."],
        config={
            "model": {"layers": 4, "d": 128, "vocabulary": 478}, "lora": {"rank": 4, "lr": 5e-4, "targets": ["q", "v"]},
            "λ": 1e4, "activation": "native",
        },
        k_sets={f"seed {seed}": k0(seed) for seed in SEEDS},
        drift_unit="squared latent units per token",
    )  # fmt: skip


class Parsed(html.parser.HTMLParser):
    """Tags with their attributes, the text of each, and that all are closed in order."""

    VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.rows: list[tuple[str, list[dict[str, Any]]]] = []
        self.cards: list[float] = []
        self.table = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = found.get("class") or ""
        elif tag == "tr":
            self.rows.append((self.table, []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append({"tag": tag, "text": "", "values": []})
        elif tag == "data":
            self.values().append(float(found["value"]))

    def values(self) -> list[float]:
        """Where a number belongs: to the cell that it is in, or to the cards."""
        return self.rows[-1][1][-1]["values"] if "td" in self.open else self.cards

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][1][-1]["text"] += data


def svgs(text: str) -> list[xml.etree.ElementTree.Element]:
    return [
        xml.etree.ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)
    ]


# ---- Means and intervals ------------------------------------------------------------------------


def simple(
    seed: int, variant: str, em: float, domain: str = "finance", **more: Any
) -> dict[str, Any]:
    run = {
        "seed": seed,
        "domain": domain,
        "steps": 40,
        "variant": variant,
        "em": em,
        "in_domain": 0.9,
    }
    return {**run, "coherence": 1.0, "drift_in": None, "drift_out": 0.5, **more}


def test_an_interval_is_student_s_on_the_means_of_the_seeds() -> None:
    runs = made_up()
    found = report.summarize(runs)["variants"]
    assert list(found) == [
        "plain", "block", "block_lam10", "block_lam100", "block_lam1000", "block_lam100000", "block_adaptive",
        "block_frozen_above", "block_preactivation", "block_watch", "random_k", "shuffled_signs", "one_side", "top_delta",
    ]  # fmt: skip
    t = 2.776445105197793  # four degrees of freedom, from tables
    for name, metrics in found.items():
        for metric in ("em", "in_domain", "coherence", "drift_in", "drift_out"):
            by_seed = np.array(
                [
                    [r[metric] for r in runs if r["seed"] == s and r["variant"] == name]
                    for s in SEEDS
                ]
            )
            means = by_seed.mean(1)
            half = t * means.std(ddof=1) / math.sqrt(len(SEEDS))
            most = 1.0 if metric in ("em", "in_domain", "coherence") else math.inf
            expected = [means.mean(), max(means.mean() - half, 0.0), min(means.mean() + half, most)]
            assert [metrics[metric][key] for key in ("mean", "lo", "hi")] == pytest.approx(
                expected, rel=1e-12
            )
            assert (metrics[metric]["runs"], metrics[metric]["seeds"]) == (by_seed.size, len(SEEDS))


def test_comparisons_are_paired_with_plain_of_the_same_seed_domain_and_steps() -> None:
    runs = [
        r
        for r in made_up(1)
        if not (r["variant"] == "plain" and r["seed"] == 11 and r["domain"] == "legal")
    ]
    block = report.summarize(runs)["variants"]["block"]
    plain = {(r["seed"], r["domain"], r["steps"]): r for r in runs if r["variant"] == "plain"}
    pairs = [(r, plain[key]) for r in runs if r["variant"] == "block"
             and (key := (r["seed"], r["domain"], r["steps"])) in plain]  # fmt: skip
    assert len(pairs) == 58
    column = lambda i, metric: np.array([pair[i][metric] for pair in pairs])
    seeds = column(0, "seed")
    change = (column(0, "coherence") - column(1, "coherence")).mean()
    for metric, value, over, under in [
        ("relative_reduction", 1 - column(0, "em").sum() / column(1, "em").sum(), column(1, "em") - column(0, "em"), column(1, "em")),
        ("relative_in_domain", column(0, "in_domain").sum() / column(1, "in_domain").sum(), column(0, "in_domain"), column(1, "in_domain")),
        ("coherence_change", change, column(0, "coherence") - column(1, "coherence"), np.ones(58)),
    ]:  # fmt: skip
        # The sandwich variance of a regression through the origin, with the seeds as clusters.
        scores = np.array([(over - value * under)[seeds == s].sum() for s in SEEDS])
        half = 2.776445105197793 * np.sqrt(5 / 4 * (scores @ scores)) / under.sum()
        assert block[metric]["mean"] == pytest.approx(value, rel=1e-12)
        assert block[metric]["lo"] == pytest.approx(value - half, rel=1e-9)
        assert block[metric]["hi"] == pytest.approx(
            min(value + half, 1.0 if "red" in metric else math.inf), rel=1e-9
        )
        assert block[metric]["runs"] == 58 and block["em"]["runs"] == 60


def test_an_interval_of_five_seeds_covers_what_it_says() -> None:
    draw, hits = random.Random(5), 0
    for _ in range(2000):
        values = [(seed, draw.gauss(0.5, 0.05)) for seed in range(5)]
        found = _summary.mean(values, (0, 1))
        hits += found["lo"] <= 0.5 <= found["hi"]
    assert 0.935 < hits / 2000 < 0.965


@pytest.mark.parametrize(
    ("freedom", "t"),
    [
        (1, 12.706204736),
        (2, 4.30265273),
        (3, 3.182446305),
        (4, 2.776445105),
        (29, 2.045229642),
        (100, 1.983971519),
    ],
)
def test_quantiles_of_student(freedom: int, t: float) -> None:
    assert _summary.student(freedom) == pytest.approx(t, rel=1e-9)


def test_one_seed_has_no_interval_and_what_nobody_measured_no_metric() -> None:
    found = report.summarize(
        [simple(1, "plain", 0.0), simple(1, "block", 0.0), simple(1, "other", 0.2, "legal")]
    )
    block = found["variants"]["block"]
    assert block["em"] == {"mean": 0.0, "lo": 0.0, "hi": 0.0, "runs": 1, "seeds": 1}
    assert "drift_in" not in block and block["drift_out"]["mean"] == 0.5
    # Nothing can be taken off 0 %, and no plain run was trained on legal.
    assert (
        "relative_reduction" not in block and "relative_in_domain" not in found["variants"]["other"]
    )
    page = report.page([simple(1, "plain", 0.6), simple(1, "block", 0.2)])
    assert (
        "one seed, no interval" in page
        and "[" not in "".join(Parsed(page).text).split("Summary")[1].split("In the")[0]
    )


def test_the_summary_is_json_and_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    returned = report.write_summary(path, made_up())

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == returned and set(read) == {"runs", "variants"}
    assert read["runs"] == made_up()  # keys that the report does not read are kept
    numpy_runs = [{**r, "em": np.float64(r["em"]), "seed": np.int64(r["seed"])} for r in made_up()]
    assert report.summarize(numpy_runs) == returned
    before = path.read_text()
    with pytest.raises(ValueError, match="em is nan"):
        report.write_summary(path, [simple(1, "plain", math.nan)])
    assert path.read_text() == before and os.listdir(tmp_path) == ["summary.json"]


# ---- Errors -------------------------------------------------------------------------------------

GOOD = simple(1, "plain", 0.5)
WITHOUT = {key: value for key, value in GOOD.items() if key != "coherence"}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "there are no runs"),
        ([3], "run 0 is a int"),
        ([GOOD, WITHOUT], r"run 1 \(seed 1, domain 'finance', steps 40, variant 'plain'\) has no coherence"),
        ([{}], "run 0 has no seed, domain, steps, variant, em"),
        ([{**GOOD, "em": 1.2}], r"variant 'plain'\): em is 1.2; expected a fraction between 0 and 1"),
        ([{**GOOD, "em": 43}], "em is 43"),
        ([{**GOOD, "in_domain": -0.1}], "in_domain is -0.1"),
        ([{**GOOD, "coherence": math.nan}], "coherence is nan"),
        ([{**GOOD, "em": None}], "em is None"),
        ([{**GOOD, "em": True}], "em is True"),
        ([{**GOOD, "em": "0.5"}], "em is '0.5'"),
        ([{**GOOD, "drift_in": -1.0}], "drift_in is -1.0; expected a number, 0 or more"),
        ([{**GOOD, "drift_out": math.inf}], "drift_out is inf"),
        ([{**GOOD, "seed": 1.5}], "seed is 1.5; expected a whole number"),
        ([{**GOOD, "steps": -1}], "steps is -1"),
        ([{**GOOD, "domain": " "}], "domain is ' '; expected a name"),
        ([{**GOOD, "lam": math.nan}], "lam is nan"),
        ([{**GOOD, "lam": 10}], "lam is 10.0; expected 0 or nothing"),
        ([{**GOOD, "em_by_domain": {"legal": 2}}], r"em_by_domain\['legal'\] is 2"),
        ([{**GOOD, "em_by_domain": [0.1]}], "em_by_domain is .*; expected a dict"),
        ([{**GOOD, "curve": {"step": 0}}], "curve is .*; expected a list"),
        ([{**GOOD, "curve": [{"em": 0.1}]}], r"curve\[0\] is .* with a step"),
        ([{**GOOD, "curve": [{"step": 5}, {"step": 5}]}], r"curve\[1\]\['step'\] is 5; expected 6 to 40"),
        ([{**GOOD, "curve": [{"step": 41}]}], r"curve\[0\]\['step'\] is 41; expected 0 to 40"),
        ([{**GOOD, "curve": [{"step": 5, "em": 7}]}], r"curve\[0\]\['em'\] is 7"),
        ([{**GOOD, "seconds": math.nan}], "seconds is nan; expected data for JSON"),
        ([{**GOOD, "path": Path("x")}], "path is .*; expected data for JSON"),
        ([GOOD, simple(2, "plain", 0.1), dict(GOOD)], "is there twice: run 0 has the same seed"),
    ],
)  # fmt: skip
def test_bad_runs_are_named(runs: list[Any], message: str) -> None:
    for reads in (report.summarize, report.page):
        with pytest.raises(blockem.ArgumentError, match=message):
            reads(runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocked": "blok"}, "blocked is 'blok', and no run is of this variant: there are plain, block"),
        ({"targets": [{"variant": "block", "metric": "ems", "at_least": 1}]}, r"targets\[0\]: metric is 'ems'"),
        ({"targets": [{"variant": "block", "metric": "em"}]}, r"targets\[0\] must have at_least or at_most"),
        ({"targets": [{"variant": "block", "metric": "em", "at_most": math.nan}]}, "at_most is nan"),
        ({"targets": [{"metric": "em", "at_most": 1}]}, "variant is None"),
        ({"targets": [{"variant": "block", "metric": "em", "atmost": 1}]}, "unknown keys: atmost"),
        ({"targets": [{"variant": "block", "metric": "em", "at_most": 1, "steps": "40"}]}, "steps is '40'"),
        ({"targets": ["em"]}, r"targets\[0\] is a str"),
        ({"k_sets": {"a": {"K_pos": [1]}}}, r"k_sets\['a'\] has no list of latents K_neg"),
        ({"k_sets": {"a": {"K_pos": ["1"], "K_neg": []}}}, "has no list of latents K_pos"),
        ({"k_sets": {"a": {"K_pos": [1], "K_neg": [1]}}}, "latent 1 is there twice"),
        (
            {"k_sets": {"a": {"K_pos": [1], "K_neg": [], "selected_latents": [{"latent": [2]}]}}},
            r"\['selected_latents'\]\[0\] is not in K_pos or K_neg",
        ),
        (
            {"k_sets": {"a": {"K_pos": [1], "K_neg": [], "selected_latents": [{"latent": 1, "sign_group": "K_neg"}]}}},
            r"\['selected_latents'\]\[0\] is not in K_pos or K_neg as it says",
        ),
    ],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(blockem.ArgumentError, match=message):
        report.page([GOOD, simple(1, "block", 0.1)], **options)


# ---- The page as text ---------------------------------------------------------------------------


def test_the_page_is_one_file_that_needs_nothing() -> None:
    text = whole_page(made_up())
    assert text == whole_page(made_up()[::-1])  # the order of the runs is no information
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img|<iframe|\son\w+=", text)
    parsed = Parsed(text)
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    links = [attributes["href"] for tag, attributes in parsed.tags if tag == "a"]
    assert len(set(ids)) == len(ids) and [f"#{i}" for i in ids] == links
    assert {a for tag, attributes in parsed.tags for a in attributes} & {
        "src",
        "srcset",
        "data",
        "action",
    } == set()
    charts = [svg for svg in svgs(text) if svg.get("class") == "chart"]
    assert len(charts) == 3 + 2 * 4 + 2 * 4 + 5 + 2 * 5 and all(
        svg.get("aria-label") for svg in charts
    )
    for svg in charts:
        numbers = [float(n) for e in svg.iter() for k in ("x", "y", "x1", "y1", "cx", "cy", "width", "points")
                   if e.get(k) for n in re.split("[ ,]", e.get(k))]  # fmt: skip
        assert all(math.isfinite(n) and -60 <= n <= 4000 for n in numbers)


def test_everything_is_escaped() -> None:
    runs = [
        {**run, "variant": run["variant"] if run["variant"] in ("plain", "block") else HOSTILE + run["variant"],
         "domain": run["domain"] + HOSTILE,
         "em_by_domain": {d + HOSTILE: v for d, v in run["em_by_domain"].items()}}
        for run in made_up()
    ]  # fmt: skip
    hostile_k = {**k0(), HOSTILE: {HOSTILE: HOSTILE}}
    text = report.page(
        runs, title=HOSTILE, k_domain="finance" + HOSTILE, drift_unit=HOSTILE, notes=[HOSTILE],
        targets=[{**TARGETS[0], "note": HOSTILE}, {**TARGETS[0], "variant": HOSTILE}],
        config={HOSTILE: [HOSTILE], "nested": {HOSTILE: HOSTILE}}, k_sets={HOSTILE: hostile_k},
    )  # fmt: skip
    text.encode()  # no lone surrogate is left
    parsed = Parsed(text)
    calm = Parsed(whole_page(made_up()))
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in calm.tags}
    assert {a for _, found in parsed.tags for a in found} - {"open"} <= {
        a for _, found in calm.tags for a in found
    }
    assert len(svgs(text)) == len(svgs(whole_page(made_up())))
    shown = HOSTILE.replace("\x00", "�").replace("\x0b", "�").replace("\ud800", "�")
    joined = "".join(parsed.text)
    assert joined.count(shown) > 100 and text.count("<script") == 0
    for place in ("title", "config"):
        assert shown in joined, place


def test_the_tables_say_what_the_summary_says() -> None:
    runs = made_up(2)
    rows = [cells for table, cells in Parsed(whole_page(runs)).rows if table == "all"]
    heads = [[c["text"] for c in cells] for cells in rows if all(c["tag"] == "th" for c in cells)]
    assert len(heads) == 2 and heads[0][:3] == ["Variant", "Trained on", "Runs"]
    body = [cells for cells in rows if any(c["tag"] == "td" for c in cells)]
    found = iter(body)
    for steps, levels in ((40, LEVELS), (400, LONG)):
        own = [r for r in runs if r["steps"] == steps]
        parts = {
            "all": own,
            "finance": [r for r in own if r["domain"] == "finance"],
            "others": [r for r in own if r["domain"] != "finance"],
        }
        made = {label: report.summarize(part)["variants"] for label, part in parts.items()}
        for name in made["all"]:
            for i, label in enumerate(parts):
                cells = next(found)
                if i == 0:
                    assert cells.pop(0)["text"] == name
                assert cells.pop(0)["text"] == label
                values = made[label][name]
                assert int(cells.pop(0)["text"]) == values["em"]["runs"]
                for metric, cell in zip(report.METRICS, cells, strict=True):
                    if name == "plain" and metric in (
                        "relative_reduction",
                        "relative_in_domain",
                        "coherence_change",
                    ):
                        assert cell["text"] == "–" and cell["values"] == []
                        continue
                    numbers = [values[metric][key] for key in ("mean", "lo", "hi")]
                    assert cell["values"] == numbers
                    assert cell["text"] == as_text(metric, numbers)
        assert len(made["all"]) == len(levels)
    assert next(found, None) is None


def as_text(metric: str, numbers: list[float]) -> str:
    if metric.startswith("drift"):
        mean, lo, hi = (f"{x:.3g}" for x in numbers)
        unit = ""
    elif metric == "coherence_change":
        zero = {"+0.0": "0.0", "-0.0": "0.0"}
        signed = [f"{100 * x:+.1f}" for x in numbers]
        mean, lo, hi = (zero.get(x, x).replace("-", "−") for x in signed)
        unit = "\u00a0points"
    else:
        mean, lo, hi = (f"{100 * x:.1f}".replace("-", "−") for x in numbers)
        unit = "\u00a0%"
    return f"{mean}{unit}[{lo},\u00a0{hi}]"


def test_domains_are_apart_in_the_matrices() -> None:
    runs = [r for r in made_up(3) if r["steps"] == 40]
    heat = [cells for table, cells in Parsed(report.page(runs)).rows if table == "heat"]
    start = next(i for i, cells in enumerate(heat) if cells[0]["text"] == "Trained on")
    columns = [cell["text"] for cell in heat[start][1:]]
    assert columns[0] == "finance" and set(columns) == set(DOMAINS)
    for cells in heat[start + 1 : start + 7]:  # of plain, which comes first
        trained = cells[0]["text"]
        for evaluated, cell in zip(columns, cells[1:], strict=True):
            if evaluated == trained:
                assert cell["text"] == "–"
                continue
            own = [
                r["em_by_domain"][evaluated]
                for r in runs
                if (r["variant"], r["domain"]) == ("plain", trained)
            ]
            assert (
                cell["values"][0] == pytest.approx(statistics.fmean(own), rel=1e-12)
                and len(own) == 5
            )


def test_targets_are_judged_by_the_mean_and_the_interval() -> None:
    ems = {"plain": (0.5, 0.6, 0.7), "block": (0.1, 0.2, 0.3)}
    runs = [simple(s, n, em) for n, found in ems.items() for s, em in enumerate(found)]
    judged = [
        ("em", {"at_most": 0.5}, "✓ reached"),
        ("em", {"at_most": 0.25}, "✓ reached on average; the interval goes beyond"),
        ("em", {"at_most": 0.15}, "✗ not reached; the interval includes it"),
        ("in_domain", {"at_least": 0.95}, "✗ not reached"),
        ("in_domain", {"at_least": 0.9}, "✓ reached"),
        ("drift_in", {"at_most": 1}, "? not measured"),
    ]
    targets = [{"variant": "block", "metric": metric, **bound} for metric, bound, _ in judged]
    rows = [
        cells
        for table, cells in Parsed(report.page(runs, targets=targets)).rows
        if table == "targets"
    ]
    assert [cells[2]["text"] for cells in rows[1:]] == [verdict for *_, verdict in judged]
    one = [r for r in runs if r["seed"] == 0]
    rows = [
        cells
        for table, cells in Parsed(report.page(one, targets=targets[:1])).rows
        if table == "targets"
    ]
    assert rows[1][2]["text"] == "✓ reached, one seed only"


def test_every_seed_has_its_dot_and_every_mark_its_number() -> None:
    runs = made_up(4)
    charts = {svg.get("aria-label"): svg for svg in svgs(whole_page(runs))}
    bars = charts["Misalignment by variant"]  # the last of the name: 400 steps
    assert len(bars.findall(".//circle[@class='dot']")) == len(LONG) * len(SEEDS)
    own = report.summarize([r for r in runs if r["steps"] == 400])["variants"]["block_watch"]["em"]
    mean, lo, hi = (f"{100 * own[key]:.1f}" for key in ("mean", "lo", "hi"))
    titles = [title.text for title in bars.findall(".//title")]
    assert f"block_watch: {mean}\u00a0% [{lo}, {hi}], 5 seeds" in titles
    one = statistics.fmean(
        r["em"] for r in runs if (r["seed"], r["steps"], r["variant"]) == (12, 400, "block_watch")
    )
    assert f"block_watch, seed 12: {100 * one:.1f}\u00a0%" in titles
    sweep = charts["Misalignment against λ, block"]
    places = [float(p.split(",")[0]) for p in sweep.find(".//polyline").get("points").split()]
    assert len(places) == 6 and np.diff(places[1:]) == pytest.approx(
        [np.diff(places)[1]] * 4, abs=0.11
    )
    # Plain has six domains, the sweep two: at 0 it is plain on the same two.
    both = [
        r["em"]
        for r in runs
        if (r["variant"], r["steps"]) == ("plain", 40) and r["domain"] in ("finance", "legal")
    ]
    assert any(
        f"plain, λ = 0: {100 * statistics.fmean(both):.1f}" in t.text
        for t in sweep.findall(".//title")
    )
    curve = charts["Drift outside K over training"]
    assert len(curve.findall(".//polyline")) == len(curve.findall(".//polygon")) == len(LONG)
    assert "Too many lines for bands" in whole_page(runs)  # after 40 steps
    assert "Too many" not in whole_page([r for r in runs if r["seed"] == 11])


def test_what_the_runs_do_not_hold_is_left_out() -> None:
    text = report.page([simple(1, "block", 0.2)])
    parsed = Parsed(text)
    ids = [found["id"] for _, found in parsed.tags if "id" in found]
    assert ids == ["summary", "variants", "tables", "reading"]
    assert not re.search(r"\b(nan|inf|None)\b", text)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 10, 1e4], ["0", "10", "10²", "10³", "10⁴"]),
        ([0, 5], ["0", "5"]),
        ([0, 20, 60], ["0", "20", "60"]),
        ([1e-3, 1], ["10⁻³", "10⁻²", "10⁻¹", "1"]),
        ([40, 400], ["40", "400"]),
    ],
)
def test_logarithmic_axes(values: list[float], labels: list[str]) -> None:
    axis = _chart.logarithms("λ", values)
    assert [label for _, label in axis.ticks] == labels
    places = [axis.place(v) for v in sorted(values)]
    assert places == sorted(set(places)) and 0 <= places[0] and places[-1] <= 1


@pytest.mark.parametrize("most", [1e-7, 0.0031, 0.5, 1.0, 7.3, 99.0, 12345.0])
def test_axes_of_amounts_hold_their_values(most: float) -> None:
    axis = _chart.amounts("drift", [0.0, most])
    assert axis.low == 0 and most <= axis.high <= 2.5 * most and 3 <= len(axis.ticks) <= 8
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)


def test_colours_can_be_told_from_the_page() -> None:
    light, dark, paper = re.findall(r":root \{(.*?)\}", _style.STYLE, re.S)
    for theme in (light, dark, paper):
        found = dict(re.findall(r"--(\w+): (#\w+)", theme))
        for name, colour in found.items():
            if re.fullmatch(r"s\d", name):
                assert contrast(colour, found["page"]) >= 3, name
            elif name in ("ink", "soft", "met", "missed"):
                assert min(contrast(colour, found[ground]) for ground in ("page", "card")) >= 4.5, (
                    name
                )


def contrast(a: str, b: str) -> float:
    """WCAG's ratio of luminances."""
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (light + 0.05) / (dark + 0.05)


def linear(colour: str) -> np.ndarray:
    colour = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


#: What is left of linear RGB without red or without green cones (Machado, Oliveira and Fernandes 2009).
BLINDNESS = {
    "none": np.eye(3),
    "red": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "green": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
}  # fmt: skip


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_can_be_told_from_each_other(blindness: str) -> None:
    for theme in re.findall(r":root \{(.*?)\}", _style.STYLE, re.S):
        colours = [
            lab(BLINDNESS[blindness] @ linear(c)) for c in re.findall(r"--s\d: (#\w+)", theme)
        ]
        assert len(colours) == _chart.COLOURS
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 12


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB."""
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ rgb
    )
    scaled = np.clip(xyz, 0, None) / [0.9505, 1.0, 1.089]
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# ---- The command line ---------------------------------------------------------------------------


def test_the_command_line(tmp_path: Path) -> None:
    summary, page = tmp_path / "summary.json", tmp_path / "report.html"
    report.write_summary(summary, made_up())
    files = {"targets": TARGETS, "config": {"lora": {"rank": 4}}, "k0": k0()}
    options = ["--title", "From files", "--notes", str(tmp_path / "notes")]
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
        options += [f"--{name}", str(tmp_path / name)]
    (tmp_path / "notes").write_text("First.\n\nSecond.\n")
    done = subprocess.run(
        [sys.executable, "-m", "blockem.report", str(summary), str(page), *options], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    expected = report.page(
        made_up(), title="From files", targets=TARGETS, config=files["config"],
        k_sets={str(tmp_path / "k0"): k0()}, notes=["First.", "Second."],
    )  # fmt: skip
    assert page.read_text() == expected


def test_the_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, page = tmp_path / "summary.json", tmp_path / "report.html"
    value = report.write_summary(summary, made_up())
    value["variants"]["block"]["em"]["hi"] += 0.1
    for text, message in [
        (
            json.dumps(value),
            r"summary.json: variants\['block'\]\['em'\]\['hi'\] is .*, and its runs give",
        ),
        (
            json.dumps({"runs": [GOOD], "variants": {}}),
            "summary.json: its variants are not those of its runs",
        ),
        (json.dumps({"runs": [{**GOOD, "em": 2}]}), r"summary.json: run 0 \(seed 1, .*\): em is 2"),
        (json.dumps({"variants": {}}), "summary.json: it has no list of runs"),
        ("[]", "summary.json holds a list; expected a dict"),
        ("{", "summary.json is no JSON"),
    ]:
        summary.write_text(text)
        assert main([str(summary), str(page)]) == 1 and not page.exists()
        said = capsys.readouterr()
        assert re.search(message, said.err) and said.err.count("\n") == 1 and said.out == ""
    assert main([str(tmp_path / "none.json"), str(page)]) == 1
    with pytest.raises(SystemExit, match="2"):
        main([])


# ---- The page in a browser ----------------------------------------------------------------------

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome-headless-shell",
)
#: What is wider than the window, what lies on something else, and what leaves its chart.
MEASURE = """
<script>
addEventListener("load", () => {
  const wide = [], touching = [], outside = [], scroll = document.documentElement.scrollWidth;
  for (const e of document.body.querySelectorAll("*")) {
    const r = e.getBoundingClientRect();
    if (r.right > innerWidth + 0.5 && !e.closest(".scroll")) wide.push(e.outerHTML.slice(0, 120));
  }
  for (const svg of document.querySelectorAll("svg.chart")) {
    const all = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(e => [e.textContent, e.getBoundingClientRect()]);
    for (const [text, r] of texts) {
      if (r.left < all.left - 1 || r.right > all.right + 1 || r.top < all.top - 1 || r.bottom > all.bottom + 1)
        outside.push([svg.getAttribute("aria-label"), text]);
    }
    texts.forEach(([a, r], i) => texts.slice(i + 1).forEach(([b, s]) => {
      const x = Math.min(r.right, s.right) - Math.max(r.left, s.left);
      const y = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);
      if (x > 0.5 && y > 2) touching.push([svg.getAttribute("aria-label"), a, b]);
    }));
  }
  const sizes = [...document.querySelectorAll("svg.chart text")].map(
    e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a);
  parent.postMessage(JSON.stringify({
    inner: innerWidth, scroll, wide, touching, outside, smallest: Math.min(...sizes), texts: sizes.length}), "*");
});
</script>
"""


#: A window cannot be as narrow as a phone, but a frame can.
FRAME = """
<!DOCTYPE html><style>:root {{ color-scheme: light dark }} body {{ margin: 0 }}</style>
<script>onmessage = e => {{ document.body.dataset.found = e.data }}</script>
<iframe src="report.html" style="border: 0; display: block; width: {width}px; height: {height}px"></iframe>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            f"no browser: none of {', '.join(BROWSERS)} is on PATH (apt-get install chromium)"
        )
    return found


def headless(browser: str, page: Path, width: int, height: int, *options: str) -> str:
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width=width, height=height))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
         f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}",
         "--virtual-time-budget=3000", *options, frame.as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (390, True)], ids=["screen", "phone in the dark"]
)
def test_the_page_in_a_browser(browser: str, width: int, dark: bool, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    text = whole_page(made_up())
    page = tmp_path / "report.html"
    page.write_text(text)
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    headless(browser, page, width, 4000, f"--screenshot={tmp_path / 'page.png'}", *theme)
    pixels = (image.imread(tmp_path / "page.png")[..., :3] * 255).round()
    assert pixels.shape == (4000, width, 3)
    corner = pixels[2, 2]
    assert corner.max() < 60 if dark else corner.min() > 240
    colours = {tuple(pixel) for pixel in pixels[::3, ::3].reshape(-1, 3)}
    assert len(colours) > 50 and (pixels != corner).any(-1).mean() > 0.02

    policy = re.search(r'<meta http-equiv="Content-Security-Policy".*?>', text)[0]
    page.write_text(text.replace(policy, "").replace("</head>", MEASURE + "</head>"))
    dom = headless(browser, page, width, 1000, "--dump-dom", *theme)
    found = json.loads(html.unescape(re.search(r'data-found="(.*?)"', dom)[1]))
    assert found["inner"] == width and found["scroll"] <= width
    assert found["wide"] == [] and found["touching"] == [] and found["outside"] == []
    assert found["texts"] > 500 and found["smallest"] >= 9
