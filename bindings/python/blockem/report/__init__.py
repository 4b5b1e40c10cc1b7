"""What training with and without blocking did: means with intervals, and one HTML page of it.

    runs = [
        {"seed": 11, "domain": "legal", "steps": 40, "variant": "plain", "em": 0.74,
         "in_domain": 0.99, "coherence": 0.98, "drift_in": 3.1, "drift_out": 0.4},
        ...
    ]
    blockem.report.write_summary("summary.json", runs)
    blockem.report.write(
        "report.html", runs, config={"lora": {"rank": 4}}, k_sets={"seed 11": k0},
        targets=[{"variant": "block", "metric": "relative_reduction", "at_least": 0.9}],
    )

or ``python -m blockem.report summary.json report.html``. The page is one file: no script, nothing
from the network, light and dark, for a phone, a screen and paper.

A run is a dict of plain data:

- ``seed`` and ``steps`` (optimizer steps of its training), whole numbers; ``domain`` it was
  trained on; ``variant``. No two runs have all four in common.
- ``em``: share of misaligned answers in the other domains; ``in_domain``: share of answers in its
  own that do what was trained; ``coherence``: share that are well formed and on topic. Between 0
  and 1.
- ``drift_in``, ``drift_out``: how far latents inside and outside K moved, 0 or more, or None.
- optional ``lam``: λ of the penalty.
- optional ``em_by_domain``: {domain: share of misaligned answers}.
- optional ``curve``: [{step, em, in_domain, coherence, drift_in, drift_out}, ...] with ascending
  steps; what was not measured is None or absent.
- Any other key is kept in the summary, and not read.

Variants are named ``plain`` (no penalty; what others are compared with), ``block``, ``block_...``
(other settings), and the controls ``random_k``, ``shuffled_signs``, ``one_side`` and
``top_delta``; any other name works too. Variants of one sweep over λ end in ``_lam`` and a
number: ``block_lam10``, ``block_lam100`` and ``block`` itself make one line against λ, if each of
their runs has ``lam``.
"""

from ._page import page, write
from ._summary import METRICS, summarize, write_summary

__all__ = ["METRICS", "page", "summarize", "write", "write_summary"]
