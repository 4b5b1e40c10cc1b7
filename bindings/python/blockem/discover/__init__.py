"""Which latents cause the misalignment: Stages 1 to 3 of BLOCK-EM (arXiv 2602.00767, appendices A.2
to A.4).

    study = blockem.discover.Study(
        "out/study", model, tokenizer, sae, judge=judge,
        prompts=core_prompts, evaluation_prompts=other_prompts,
    )
    shifts = study.shifts()                        # Stage 1: what moved from base to tuned model
    screening = study.screen(shifts.pool(250))     # Stage 2: induce in the base, repair the tuned
    swept = study.sweep(screening.shortlist(40))   # Stage 3: strengths that keep answers coherent
    chosen = swept.select(20)
    chosen.save("K0.json", sae)
    study.evaluate()                               # on prompts that no stage has seen

model is a PeftModel: with its adapters the tuned model, without them the base. A condition is one
of the two with at most one latent steered, at every position of prompt and answer; its strength is
in units of the base model's activation scale (the median norm of the layer's output). Rates are
shares of the answers to a set of prompts, between 0 and 1.

Answers are in the study's folder before the next batch begins, their grades soon after, while the
next answers are generated: a study that was killed goes on where it was, and one that is asked again
answers from there. Many conditions share a batch. No answer reads another's row; but the kernels
that multiply a batch's matrices depend on its shape, so that an answer may fall the other way at a
near tie in another batch, as anywhere with transformers. What stands in the folder is never
generated again, so a study's numbers stay.

The controls of the paper are made of a selection by :meth:`Selection.random`,
:meth:`Selection.shuffled_signs` and :meth:`Selection.only`, and of Stage 1 alone by
:meth:`Shifts.select`. :meth:`Selection.flipped_signs` is a stricter one.
"""

from ._prompts import check_disjoint
from ._stages import Rates, Screened, Screening, Selection, Shifts, Sweep, Swept
from ._study import STRENGTHS, Answer, Evaluation, Study

__all__ = [
    "STRENGTHS",
    "Answer",
    "Evaluation",
    "Rates",
    "Screened",
    "Screening",
    "Selection",
    "Shifts",
    "Study",
    "Sweep",
    "Swept",
    "check_disjoint",
]
