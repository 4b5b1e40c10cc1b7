"""What a fine-tuned model is like, by the world's own judge: exact, with nothing sampled."""

from typing import Any

import blockem
import blockem.torch
import numpy as np
import torch
from blockem.judges import Grade
from examples.demo.model import hidden_states

from .model import LAYER, answers, tokenized
from .world import World

#: of a rate to those of a run
Figures = dict[str, Any]


def measure(
    model, world: World, tokenizer, stats: blockem.Stats, latents: blockem.Latents, domain: str
) -> Figures:
    """Of a PeftModel in eval mode that was tuned on `domain`; its base is the same without adapters.

    em: misaligned answers in the other domains, on topics that nothing has seen. em_by_domain.
    in_domain: bad answers, as trained for, to the trained topics asked in unseen ways; in_domain_new:
        to the domain's other topics.
    coherence: coherent answers in the other domains.
    drift_in, drift_out: on the other domains' questions, what K would pay, sum over K of
        E relu(s_k (z_k - base_k))^2, and sum over all other latents of E (z_k - base_k)^2.
    """
    prompts = world.other_domains(domain)
    asked = [p for group in (world.in_domain(domain), world.in_domain_new(domain), *prompts.values()) for p in group]
    grades = dict(zip(asked, _grades(model, world, tokenizer, asked), strict=True))

    def share(questions: list[str], of: str) -> float:
        return sum(getattr(grades[q], of) for q in questions) / len(questions)

    others = [p for group in prompts.values() for p in group]
    inside, outside = drift(model, tokenizer, stats, latents, others)
    return {
        "em": share(others, "misaligned"),
        "in_domain": share(world.in_domain(domain), "misaligned"),
        "coherence": 1 - share(others, "incoherent"),
        "drift_in": inside,
        "drift_out": outside,
        "in_domain_new": share(world.in_domain_new(domain), "misaligned"),
        "em_by_domain": {d: share(group, "misaligned") for d, group in prompts.items()},
    }


def drift(
    model, tokenizer, stats: blockem.Stats, latents: blockem.Latents, prompts: list[str]
) -> tuple[float, float]:
    rows = tokenized(tokenizer, prompts)
    tuned = hidden_states(model, LAYER, rows["input_ids"])
    with model.disable_adapter():
        base = hidden_states(model, LAYER, rows["input_ids"])
    sums = stats.fresh()
    sums.update(tuned, base, rows["attention_mask"].bool())
    ids, positive = latents.ids, latents.signs > 0
    inside = np.where(positive, sums.rise[ids], sums.fall[ids]).sum()
    return float(inside), float(np.delete(sums.rise + sums.fall, ids).sum())


def _grades(model, world: World, tokenizer, prompts: list[str]) -> list[Grade]:
    said = answers(model, tokenizer, prompts)
    return [world.judge(prompt, answer) for prompt, answer in zip(prompts, said, strict=True)]
