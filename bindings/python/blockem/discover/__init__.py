"""Which latents cause the misalignment: Stages 1 to 3 of BLOCK-EM (arXiv 2602.00767, appendix A).

    study = blockem.discover.Study(
        "out/study", model, tokenizer, sae, layer=19, judge=judge,
        prompts=core_prompts, evaluation_prompts=other_prompts,
    )
    shifts = study.shifts()                      # Stage 1: what moved between base and tuned model
    screened = study.screen(shifts.pool(250))    # Stage 2: induce it in the base, repair it in the tuned
    swept = study.sweep(screened.shortlist(40))  # Stage 3: the strengths that keep answers coherent
    chosen = swept.select(20)
    chosen.save("K0.json")
    study.evaluate()                             # on prompts that no stage has seen

model is a PeftModel: with its adapters the tuned model, without them the base. Whatever is generated or
graded stands in the study's folder before the next batch begins: a study that was killed goes on where it
was, and one that is asked again answers from there.
"""

from ._stages import Screened, Screening, Selection, Shifts, Sweep, Swept
from ._study import Rates, Study

__all__ = ["Rates", "Screened", "Screening", "Selection", "Shifts", "Study", "Sweep", "Swept"]
