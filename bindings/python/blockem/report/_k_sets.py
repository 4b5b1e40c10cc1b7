"""K sets with the evidence of their latents, and nested dicts."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import _text
from ._chart import escaped
from ._runs import refuse

#: The evidence of BLOCK-EM's Stages 1 to 3, by its key in K0.json.
EVIDENCE = {
    "delta": "Δ",
    "score": "Score",
    "induce_strength": "Induces at α",
    "induce_gain": "Induces (points)",
    "repair_strength": "Repairs at α",
    "repair_gain": "Repairs (points)",
}
EVIDENCE_TEXT = """\
<p>Δ is how far a latent's mean moved from the base model to the misaligned one. A latent induces
what steering along it adds to the misalignment of the base model, and repairs what steering
against it takes off that of the misaligned one, at the strength α.</p>
"""


def k_sets_text(k_sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Every set with its evidence, folded unless it is the only one."""
    parts = [EVIDENCE_TEXT] if k_sets else []
    for label, found in k_sets.items():
        count, table = _k_set(f"k_sets[{label!r}]", found)
        rest = {k: v for k, v in found.items() if k not in ("K_pos", "K_neg", "selected_latents")}
        opened = " open" if len(k_sets) == 1 else ""
        parts.append(
            f"<details{opened}><summary>{escaped(label)}: {count}</summary>\n{table}"
            f"{facts(rest) if rest else ''}</details>\n"
        )
    return "".join(parts)


def _k_set(place: str, found: Mapping[str, Any]) -> tuple[str, str]:
    """How many latents of each sign, and their table."""
    sides: dict[int, str] = {}
    for side in ("K_pos", "K_neg"):
        ids = found.get(side) if isinstance(found, Mapping) else None
        if not isinstance(ids, Sequence) or any(
            isinstance(i, bool) or not isinstance(i, int) for i in ids
        ):
            refuse(f"{place} has no list of latents {side}")
        for latent in ids:
            if latent in sides:
                refuse(f"{place}: latent {latent} is there twice")
            sides[latent] = side
    evidence = {}
    for i, latent in enumerate(found.get("selected_latents") or []):
        number = latent.get("latent") if isinstance(latent, Mapping) else None
        if (
            not isinstance(number, int)
            or number not in sides
            or latent.get("sign_group", sides[number]) != sides[number]
        ):
            refuse(
                f"{place}['selected_latents'][{i}] is not in K_pos or K_neg as it says: {latent!r}"
            )
        evidence[number] = latent
    columns = [key for key in EVIDENCE if any(key in latent for latent in evidence.values())]
    rows = []
    for latent in [*evidence, *(i for i in sides if i not in evidence)]:
        values = [_evidence(evidence.get(latent, {}).get(key), key) for key in columns]
        sign = "K+" if sides[latent] == "K_pos" else "K−"
        rows.append(f'<tr><th scope="row">{latent}</th><td>{sign}</td>{"".join(values)}</tr>\n')
    head = "".join(f'<th scope="col">{EVIDENCE[key]}</th>' for key in columns)
    up = sum(side == "K_pos" for side in sides.values())
    table = (
        '<table class="k"><thead><tr><th scope="col">Latent</th><th scope="col">Side</th>'
        f"{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table>"
    )
    return f"{up} latents in K+, {len(sides) - up} in K−", _text.scrolled("Blocked latents", table)


def _evidence(value: object, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        return "<td>–</td>"
    if key.endswith("gain"):
        shown = _text.signed(100 * float(value), "+.1f")
    else:
        shown = _text.signed(float(value), "+.3g" if key == "delta" else ".3g")
    return f'<td><data value="{float(value)!r}">{shown}</data></td>'


def facts(found: Mapping[str, Any]) -> str:
    """A nested dict as lines of dotted keys."""
    rows = "".join(
        f'<tr><th scope="row">{_text.breaking(key)}</th><td>{escaped(value)}</td></tr>\n'
        for key, value in _flat("", found)
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>\n'


def _flat(before: str, found: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in found.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(f"{name}.", value)
        elif isinstance(value, str):
            yield name, value
        else:
            yield name, json.dumps(value, ensure_ascii=False, default=str)
