"""Which latents cause the misalignment of a plain run: BLOCK-EM's Stages 1 to 3."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import blockem
from blockem.discover import Screening, Selection, Shifts, Study, Swept

from .model import ANSWER_TOKENS
from .world import World

#: Candidates of either sign from Stage 1, and how many of those of Stage 2 are swept.
POOL, SHORTLIST = 100, 25
#: Of Phase A and B, and of the sweep, in activation scales.
INDUCE, REPAIR, STRENGTHS = 0.7, 0.4, (0.15, 0.3, 0.45)
#: How much more incoherent than the tuned model answers may be.
INCOHERENCE = 0.1
#: One latent alone does not induce misalignment in so small a model, so that eq. 13's filter would leave none.
RULE = "combined"
K = 20


class NothingFound(Exception):
    """No latent repairs anything: perhaps the plain run's misalignment did not spread."""


class NoSuchSet(Exception):
    """A control that this K does not have: signs that are all the same cannot be shuffled."""


@dataclass(frozen=True)
class Found:
    """The latents of a study, and the paper's controls."""

    shifts: Shifts
    screening: Screening
    swept: Swept
    d_sae: int

    @cached_property
    def chosen(self) -> Selection:
        """K."""
        return self._select(K)

    def latents(self, choice: str, seed: int) -> blockem.Latents:
        """chosen, random, shuffled_signs, flipped_signs, positive or top_delta; with _N, of the N best."""
        name, _, count = choice.rpartition("_")
        name, count = (name, int(count)) if count.isdecimal() else (choice, K)
        chosen = lambda: self.chosen if count == K else self._select(count)
        sets = {
            "chosen": chosen,
            "random": lambda: chosen().random(self.d_sae, seed),
            "shuffled_signs": lambda: chosen().shuffled_signs(seed),
            "flipped_signs": lambda: chosen().flipped_signs(),
            "positive": lambda: chosen().only(1),
            "top_delta": lambda: self.shifts.select(count),
        }
        try:
            return sets[name]().latents()
        except ValueError as error:
            raise NoSuchSet(str(error)) from error

    def _select(self, count: int) -> Selection:
        return self.swept.select(count, rule=RULE)


def discover(world: World, tokenizer, model, sae: blockem.Sae, domain: str, folder: Path) -> Found:
    """model: a PeftModel that was tuned on `domain` without a penalty. Answers are kept in the folder."""
    study = Study(
        folder, model, tokenizer, sae,
        judge=world.judge, judge_name="the world's rule",
        prompts=world.discovery(domain),
        evaluation_prompts=[p for prompts in world.other_domains(domain).values() for p in prompts],
        render=str, add_special_tokens=True, max_new_tokens=ANSWER_TOKENS, batch_size=1024,
    )  # fmt: skip
    shifts = study.shifts()
    screening = study.screen(shifts.pool(POOL), induce=INDUCE, repair=REPAIR)
    budget = screening.tuned.incoherent + INCOHERENCE
    swept = study.sweep(screening.shortlist(SHORTLIST), strengths=STRENGTHS, budget=budget)
    found = Found(shifts, screening, swept, sae.d_sae)
    try:
        found.chosen
    except ValueError as error:
        raise NothingFound(str(error)) from error
    return found
