"""python -m blockem.report summary.json report.html"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import write
from ._runs import checked, refuse
from ._summary import same_as_summarized


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 with one line on standard error when a file is at fault; wrong usage is argparse's 2."""
    given = _parser().parse_args(arguments)
    try:
        runs = _runs(given.summary)
        options: dict[str, Any] = {
            "title": given.title,
            "blocked": given.blocked,
            "k_domain": given.k_domain,
            "targets": _json(given.targets, list) if given.targets else (),
            "notes": given.notes.read_text(encoding="utf-8").split("\n\n") if given.notes else (),
            "config": _json(given.config, dict) if given.config else None,
            "k_sets": {str(path): _json(path, dict) for path in given.k0},
        }
        write(
            given.page, runs, **{key: value for key, value in options.items() if value is not None}
        )
    except (OSError, ValueError) as error:
        print(f"blockem.report: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blockem.report", description="One HTML page from a lab's summary.json."
    )
    parser.add_argument(
        "summary", type=Path, help='{"runs": [...]}, as blockem.report.write_summary writes it'
    )
    parser.add_argument("page", type=Path, help="the HTML file to write")
    parser.add_argument("--title")
    parser.add_argument("--blocked", help="the variant that the summary on top is about (block)")
    parser.add_argument("--k-domain", help="the training domain that K was found on (finance)")
    parser.add_argument("--targets", type=Path, help="JSON: a list of targets")
    parser.add_argument("--notes", type=Path, help="plain text, paragraphs between empty lines")
    parser.add_argument("--config", type=Path, help="JSON: any nested object")
    parser.add_argument(
        "--k0", type=Path, action="append", default=[], help="a K0.json; may be repeated"
    )
    return parser


def _runs(path: Path) -> list[dict[str, Any]]:
    summary = _json(path, dict)
    try:
        if not isinstance(summary.get("runs"), list):
            refuse("it has no list of runs")
        runs = checked(summary["runs"])
        if "variants" in summary:
            same_as_summarized(runs, summary["variants"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return runs


def _json(path: Path, kind: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected a {kind.__name__}")
    return found


if __name__ == "__main__":
    sys.exit(main())
