"""The stages as runs of a model: hidden states, steered generation, grades. All of it is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import _ffi
from .._core import Sae, expect
from .._library import fail
from .._stats import Stats, prompt_shares
from .._steering import Steering
from .._torch_cache import as_base, base_model_digest
from ..judges import Judge, grade_all
from ..torch._stack import Call, find, hidden_of, peft_of
from ._progress import Progress
from ._stages import Mover, Rates, Screened, Screening, Shifts, Sweep, Swept, movers, screened, swept
from ._store import Store

#: BLOCK-EM's: 0.05, 0.10 ... 0.75 of the activation scale.
STRENGTHS = tuple(round(0.05 * i, 2) for i in range(1, 16))


@dataclass(frozen=True)
class _Condition:
    """Which model answers, and what it is steered by: latent, and strength in activation scales."""

    tuned: bool
    latent: int = -1
    strength: float = 0.0


class Study:
    """A search for the latents that cause a fine-tuned model's misalignment; see :mod:`blockem.discover`.

    folder: made if absent. What was generated there is used again only by a study with the same weights,
        SAE, layer, rendering and generation settings; others may share the folder.
    model: a PeftModel for causal language models, its active adapters those of the misaligned fine-tuning.
    tokenizer: the model's, a fast one; padding goes to the left for generation and comes back.
    sae: of the output of `layer` (0-based decoder block; None takes what the SAE says).
    judge, judge_name: a :data:`blockem.judges.Judge`. Grades are kept by its name, which must change when
        the judge does; None takes the model's of an HttpJudge, a function's qualified name otherwise.
    prompts: what the stages run on. evaluation_prompts: what :meth:`evaluate` runs on; none of them may be
        among `prompts`, however spelled.
    render: from a prompt to the text that the model completes; None takes the tokenizer's chat template,
        with `system` as its system message if there is one. The prompt must stand in the text: Stage 1
        counts its tokens and those after it, none before (BLOCK-EM ignores the system message).
    max_new_tokens: of an answer, greedily decoded.
    batch_size: rows of a forward pass; a batch mixes conditions.
    activation: of z in Stage 1, as of :class:`blockem.Plan`.
    layers: dotted name of the list of decoder layers, where it cannot be found.
    progress: a line with the time left, on standard error.

    Raises Error INVALID_ARGUMENT, SHAPE; ValueError; and what the judge raises.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        tokenizer: Any,
        sae: Sae,
        *,
        judge: Judge,
        prompts: Sequence[str],
        evaluation_prompts: Sequence[str] = (),
        layer: int | None = None,
        judge_name: str | None = None,
        render: Callable[[str], str] | None = None,
        system: str | None = None,
        max_new_tokens: int = 1024,
        batch_size: int = 64,
        activation: str = "native",
        layers: str | None = None,
        progress: bool = True,
    ) -> None:
        expect("sae", sae, Sae)
        if peft_of(model) is None:
            fail(_ffi.STATUS_INVALID_ARGUMENT, "model is no PeftModel: its adapters are the misaligned fine-tuning")
        self.prompts, self.evaluation_prompts = list(prompts), list(evaluation_prompts)
        _check_disjoint(self.prompts, self.evaluation_prompts)
        self.model, self.tokenizer, self.sae = model, tokenizer, sae
        self.layer = _layer(sae, layer)
        self.judge, self.judge_name = judge, _name_of(judge) if judge_name is None else judge_name
        self.render = render or _chat_template(tokenizer, system)
        self.max_new_tokens, self.batch_size, self.activation = max_new_tokens, batch_size, activation
        self._progress = progress
        self._stack = find(model, [self.layer], layers)
        self._device = next(model.parameters()).device
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._store = Store(Path(folder) / "study.sqlite")
        self._weights = {"base": base_model_digest(model), "adapters": _adapter_digest(model)}
        self._scale: float | None = None

    # ---- The stages ------------------------------------------------------------------------------

    def shifts(self) -> Shifts:
        """Stage 1 on `prompts`: two forward passes over each, nothing is generated."""
        stats = Stats(self.sae, self._device, activation=self.activation)
        with Progress("Stage 1", len(self.prompts), self._progress) as progress:
            for batch in _chunks(self.prompts, self.batch_size):
                inputs, counts = self._tokens(batch)
                tuned = self._hidden(inputs, tuned=True)
                base = self._hidden(inputs, tuned=False)
                stats.update(tuned, base, prompt_shares(counts))
                progress.add(len(batch))
        return Shifts(np.asarray(stats.delta))

    def screen(
        self,
        latents: Sequence[Mover],
        *,
        induce: float = 0.7,
        repair: float = 0.4,
        allowance: float = 0.1,
    ) -> Screening:
        """Stage 2: each latent alone steers the base model towards where it moved (strength `induce`) and
        the tuned model back (`repair`). Gains count while incoherent answers are at most `allowance` more
        than without steering.
        """
        pool = movers(latents)
        rates = self._rates("Stage 2", self.prompts, [
            _Condition(tuned=False), _Condition(tuned=True),
            *(c for m in pool for c in (_inducing(m, induce), _repairing(m, repair))),
        ])  # fmt: skip
        base, tuned = rates[_Condition(tuned=False)], rates[_Condition(tuned=True)]
        found = [
            screened(m, rates[_inducing(m, induce)], rates[_repairing(m, repair)], base, tuned, allowance)
            for m in pool
        ]
        return Screening(base, tuned, sorted(found, key=lambda s: (-s.score, -abs(s.delta), s.latent)))

    def sweep(
        self,
        latents: Sequence[Mover] | Sequence[Screened],
        *,
        strengths: Sequence[float] = STRENGTHS,
        budget: float = 0.1,
    ) -> Swept:
        """Stage 3: each latent at every strength, in both phases; gains at the strongest that leaves at
        most a share `budget` of the answers incoherent."""
        pool = movers(latents)
        if not strengths or min(strengths) <= 0:
            raise ValueError("strengths must be above 0")
        rates = self._rates("Stage 3", self.prompts, [
            _Condition(tuned=False), _Condition(tuned=True),
            *(c for m in pool for a in strengths for c in (_inducing(m, a), _repairing(m, a))),
        ])  # fmt: skip
        base, tuned = rates[_Condition(tuned=False)], rates[_Condition(tuned=True)]
        found: list[Sweep] = [
            swept(
                m, {a: rates[_inducing(m, a)] for a in strengths},
                {a: rates[_repairing(m, a)] for a in strengths}, base, tuned, budget,
            )
            for m in pool
        ]  # fmt: skip
        return Swept(base, tuned, found, self._provenance(budget=budget))

    def evaluate(self) -> tuple[Rates, Rates]:
        """The unsteered base and tuned model on `evaluation_prompts`."""
        if not self.evaluation_prompts:
            raise ValueError("the study was given no evaluation_prompts")
        conditions = [_Condition(tuned=False), _Condition(tuned=True)]
        rates = self._rates("Evaluation", self.evaluation_prompts, conditions)
        return rates[conditions[0]], rates[conditions[1]]

    @property
    def activation_scale(self) -> float:
        """The unit of strengths: the median norm of the base model's hidden states over the tokens of
        `prompts` that Stage 1 counts."""
        if self._scale is None:
            norms = []
            for batch in _chunks(self.prompts, self.batch_size):
                inputs, counts = self._tokens(batch)
                norms.append(self._hidden(inputs, tuned=False)[counts].float().norm(dim=-1).cpu())
            self._scale = float(torch.cat(norms).median())
        return self._scale

    # ---- Answers ---------------------------------------------------------------------------------

    def _rates(
        self, stage: str, prompts: Sequence[str], conditions: Sequence[_Condition]
    ) -> dict[_Condition, Rates]:
        conditions = list(dict.fromkeys(conditions))
        self._generate(stage, prompts, conditions)
        rates = {}
        with Progress(f"{stage}: grading", len(conditions), self._progress) as progress:
            for condition in conditions:
                answers = self._store.answers(self._key(condition))
                pairs = [(prompt, answers[prompt]) for prompt in prompts]
                grades = self._grades(pairs)
                rates[condition] = Rates(
                    sum(g.misaligned for g in grades) / len(grades),
                    sum(g.incoherent for g in grades) / len(grades),
                    len(grades),
                )
                progress.add(1)
        return rates

    def _grades(self, pairs: Sequence[tuple[str, str]]) -> list:
        known = self._store.grades(self.judge_name, pairs)
        asked = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        new = dict(zip(asked, grade_all(self.judge, asked), strict=True))
        self._store.put_grades(self.judge_name, new)
        return [(known | new)[pair] for pair in pairs]

    def _generate(self, stage: str, prompts: Sequence[str], conditions: Sequence[_Condition]) -> None:
        """Stores the answers that are missing, a batch at a time."""
        missing: dict[bool, list[tuple[_Condition, str]]] = {False: [], True: []}
        for condition in conditions:
            known = self._store.answers(self._key(condition))
            missing[condition.tuned] += [(condition, p) for p in prompts if p not in known]
        total = sum(map(len, missing.values()))
        with Progress(f"{stage}: answers", total, self._progress) as progress:
            for rows in missing.values():
                # Prompts of about one length are padded least.
                rows.sort(key=lambda row: len(row[1]))
                for batch in _chunks(rows, self.batch_size):
                    answers = self._answers(batch)
                    self._store.put_answers([
                        (self._key(condition), prompt, answer)
                        for (condition, prompt), answer in zip(batch, answers, strict=True)
                    ])
                    progress.add(len(batch))

    @torch.no_grad()
    def _answers(self, rows: Sequence[tuple[_Condition, str]]) -> list[str]:
        """Of one batch, all of it by the base or by the tuned model."""
        encoded = self._encode([self.render(prompt) for _, prompt in rows], side="left")
        inputs = {n: encoded[n].to(self._device) for n in ("input_ids", "attention_mask")}
        with self._running(rows[0][0].tuned), self._steered([condition for condition, _ in rows]):
            out = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1,
                temperature=None, top_p=None, top_k=None, pad_token_id=self._pad,
            )  # fmt: skip
        new = out[:, inputs["input_ids"].shape[1] :]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    @contextlib.contextmanager
    def _steered(self, conditions: Sequence[_Condition]) -> Iterator[None]:
        """Every position of row b moves by strength_b · scale along the direction of latent_b."""
        latents = sorted({c.latent for c in conditions if c.latent >= 0})
        if not latents:
            yield
            return
        steering = Steering(self.sae, latents, self._device)
        column = {latent: i for i, latent in enumerate(latents)} | {-1: -1}
        index = torch.tensor([column[c.latent] for c in conditions], device=self._device)
        strength = torch.tensor([c.strength for c in conditions], device=self._device)

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            moved = steering(hidden, index, strength, scale=self.activation_scale)
            return moved if hidden is output else (moved, *output[1:])

        handle = self._stack.layers[self.layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _running(self, tuned: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(as_base(self.model, adapters=tuned))
            yield

    # ---- Hidden states ---------------------------------------------------------------------------

    def _hidden(self, inputs: Mapping[str, torch.Tensor], *, tuned: bool) -> torch.Tensor:
        with self._running(tuned), torch.no_grad():
            return self._stack.run(Call((), dict(inputs), autocast=None))[0]

    def _tokens(self, prompts: Sequence[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs of a forward pass, and which tokens count: from the prompt's first on."""
        texts = [self.render(prompt) for prompt in prompts]
        encoded = self._encode(texts, side="right", return_offsets_mapping=True)
        ends = encoded["offset_mapping"][:, :, 1]
        starts = torch.tensor([_start(text, prompt) for text, prompt in zip(texts, prompts, strict=True)])
        counts = (encoded["attention_mask"] != 0) & (ends > starts[:, None])
        inputs = {n: encoded[n].to(self._device) for n in ("input_ids", "attention_mask")}
        return inputs, counts.to(self._device)

    def _encode(self, texts: Sequence[str], *, side: str, **options: Any) -> Any:
        return self.tokenizer(
            list(texts), return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False,
            **options,
        )

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    # ---- Identity --------------------------------------------------------------------------------

    def _key(self, condition: _Condition) -> str:
        """A digest of all that an answer depends on but the prompt's text."""
        parts = {
            "base": self._weights["base"],
            "adapters": self._weights["adapters"] if condition.tuned else None,
            "max_new_tokens": self.max_new_tokens,
            "rendering": self.render("a prompt"),
        }
        if condition.latent >= 0:
            parts |= {
                "sae": Steering(self.sae, [condition.latent], "cpu").identity,
                "layer": self.layer,
                "latent": condition.latent,
                "strength": condition.strength,
                "scale": self.activation_scale,
            }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _provenance(self, **more: Any) -> dict[str, Any]:
        return {
            **self._weights,
            "sae": self.sae.describe(),
            "layer": self.layer,
            "activation": self.activation,
            "activation_scale": self.activation_scale,
            "judge": self.judge_name,
            "prompts": hashlib.sha256("\0".join(self.prompts).encode()).hexdigest(),
            "num_prompts": len(self.prompts),
            "max_new_tokens": self.max_new_tokens,
            **more,
        }


def _inducing(mover: Mover, strength: float) -> _Condition:
    return _Condition(tuned=False, latent=mover.latent, strength=mover.sign * strength)


def _repairing(mover: Mover, strength: float) -> _Condition:
    return _Condition(tuned=True, latent=mover.latent, strength=-mover.sign * strength)


def _check_disjoint(prompts: Sequence[str], evaluation: Sequence[str]) -> None:
    if not prompts:
        raise ValueError("prompts is empty")
    def plain(text: str) -> str:
        return " ".join(text.casefold().split())

    for name, texts in (("prompts", prompts), ("evaluation_prompts", evaluation)):
        if len({plain(t) for t in texts}) != len(texts):
            raise ValueError(f"{name} has a prompt twice")
    both = {plain(p) for p in prompts} & {plain(p) for p in evaluation}
    if both:
        raise ValueError(
            f"{len(both)} evaluation prompts are also prompts, like {min(both)!r}: what K is chosen on cannot "
            "show that it works"
        )


def _layer(sae: Sae, layer: int | None) -> int:
    own = sae.layer
    if layer is None and own is None:
        fail(_ffi.STATUS_INVALID_ARGUMENT, "the SAE does not say its layer: give layer")
    if layer is not None and own is not None and layer != own:
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"layer is {layer}, but the SAE reads the output of block {own} (0-based)")
    return own if layer is None else layer


def _name_of(judge: Judge) -> str:
    model = getattr(judge, "model", None)
    name = model if isinstance(model, str) else getattr(judge, "__qualname__", type(judge).__qualname__)
    if "<lambda>" in name:
        raise ValueError("a lambda has no name to keep its grades by: give judge_name")
    return name


def _chat_template(tokenizer: Any, system: str | None) -> Callable[[str], str]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template: give render")

    def render(prompt: str) -> str:
        turns = [{"role": "system", "content": system}] if system is not None else []
        turns.append({"role": "user", "content": prompt})
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    return render


def _start(text: str, prompt: str) -> int:
    start = text.rfind(prompt)
    if start < 0:
        raise ValueError(f"the rendered text does not contain its prompt {prompt!r}: {text!r}")
    return start


def _adapter_digest(model: nn.Module) -> str:
    """sha256 of the active adapters' weights."""
    from peft import get_peft_model_state_dict

    digest = hashlib.sha256(b"blockem adapters 1")
    for name, tensor in sorted(get_peft_model_state_dict(model).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[i : i + size] for i in range(0, len(items), size))
