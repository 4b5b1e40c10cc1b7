"""Stages 1 to 3 on a model in which the causal latents were planted, and what a study keeps."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import tiny
import torch
from planted import BREAKER, CARE, CAUSE, DECOYS, OTHER_PROMPTS, PROMPTS, SCALE, SYSTEM

import blockem
from blockem.discover import Rates, Selection, Shifts, Study, check_disjoint
from blockem.judges import Grade, HttpJudge

STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)


def study(
    folder: Path, model: Any = None, sae: Any = None, kind: type = Study, **settings: Any
) -> Study:
    settings = {
        "judge": planted.judge, "prompts": PROMPTS, "evaluation_prompts": OTHER_PROMPTS,
        "render": planted.render, "max_new_tokens": 3, "batch_size": 100, "scale": SCALE,
        "progress": False, "num_threads": 1,
    } | settings  # fmt: skip
    model, sae = model or planted.model(), sae or planted.sae()
    return kind(folder, model, planted.tokenizer(), sae, **settings)


def word(topic: int, tuned: bool, latent: int = -1, strength: float = 0.0) -> str:
    """The answer by the numbers of planted.py."""
    u, v, n = 0.2 + 0.09 * (topic % 3), 0.6, 0.0
    if tuned:
        u, v, n = u + 0.7, v - 0.6, n + 0.1
    push = strength * SCALE
    u += push * (latent == CAUSE)
    v += push * (latent == CARE)
    n += push * (latent == BREAKER)
    logits = {"good": 1 + 2 * v, "bad": 2 * u, "gib": 3 * u - 1.3, "gub": -6 * n}
    return max(logits, key=logits.get)


def expected(
    tuned: bool, latent: int = -1, strength: float = 0.0, topics: range = range(12)
) -> Rates:
    words = [word(i, tuned, latent, strength) for i in topics]
    incoherent = sum(w in ("gib", "gub") for w in words)
    return Rates(words.count("bad") / len(words), incoherent / len(words), len(words))


def test_the_stages_find_what_was_planted(tmp_path: Path) -> None:
    one, sae = study(tmp_path), planted.sae()
    shifts = one.shifts()
    # Of three tokens that count, the topic's moves. What moves before the prompt does not count.
    moved = np.zeros(planted.NUM_LATENTS)
    for latent, by in {CAUSE: 0.7, CARE: -0.6, BREAKER: 0.1, **DECOYS}.items():
        moved[latent] = by / 3
    np.testing.assert_allclose(shifts.delta, moved, atol=1e-6)
    assert abs(shifts.delta[SYSTEM]) < 1e-6
    pool = shifts.pool(5)
    assert set(pool.ids[:5].tolist()) == {2, CAUSE, 3, BREAKER, 4}
    assert set(pool.ids[5:9].tolist()) == {10, CARE, 11, 12}

    screening = one.screen(pool)
    assert screening.base == expected(False) == Rates(0, 0, 12)
    assert screening.tuned == expected(True) == Rates(1, 0, 12)
    for s in screening.latents:
        assert s.sign == (-1 if s.delta < 0 else 1)
        assert s.induced == expected(False, s.latent, s.sign * 0.7)
        assert s.repaired == expected(True, s.latent, -s.sign * 0.4)
        gains = s.induced.misaligned + 1 - s.repaired.misaligned
        assert s.score == pytest.approx(gains * (s.latent != BREAKER))
    assert {s.latent for s in screening.latents[:2]} == {CAUSE, CARE}
    assert all(s.score == 0 for s in screening.latents[2:])
    # To break the model would look like the best repair.
    fooled = {s.latent: s.score for s in one.screen(pool, allowance=1.0).latents}
    assert fooled[BREAKER] == max(fooled.values()) == 1

    shortlist = screening.shortlist(3)
    assert shortlist.ids[0] == CAUSE and shortlist.ids[3] == CARE and len(shortlist) == 6
    assert shortlist.signs.tolist() == [1, 1, 1, -1, -1, -1]
    assert sorted(screening.shortlist(40, min_score=0.01).ids.tolist()) == [CARE, CAUSE]

    swept = one.sweep(pool, strengths=STRENGTHS)
    for s in swept.latents:
        for a in STRENGTHS:
            assert s.induced[a] == expected(False, s.latent, s.sign * a)
            assert s.repaired[a] == expected(True, s.latent, -s.sign * a)
    by_id = {s.latent: s for s in swept.latents}
    for rule in ("repair", "combined"):
        chosen = swept.select(2, rule=rule)
        assert dict(zip(chosen.ids.tolist(), chosen.signs.tolist())) == {CAUSE: 1, CARE: -1}
        assert chosen.evidence[0]["score"] == by_id[chosen.ids[0]].score > 0

    unseen = one.evaluate()
    assert unseen == (expected(False, topics=range(6)), expected(True, topics=range(6)))
    heard = one.answers(tuned=False, latent=CAUSE, strength=0.7)
    assert [a.prompt for a in heard] == PROMPTS
    assert [a.answer for a in heard] == [word(i, False, CAUSE, 0.7) for i in range(12)]
    assert [a.grade.misaligned for a in heard] == [a.answer == "bad" for a in heard]

    chosen.save(tmp_path / "K0.json", sae)
    value = json.loads((tmp_path / "K0.json").read_text())
    assert (value["K_pos"], value["K_neg"]) == ([CAUSE], [CARE])
    evidence = {one["latent"]: one for one in value["selected_latents"]}
    assert evidence[CARE]["sign_group"] == "K_neg"
    assert evidence[CARE]["delta"] == pytest.approx(-0.2)
    assert evidence[CAUSE]["induced"]["0.7"]["misaligned"] == by_id[CAUSE].induced[0.7].misaligned
    assert value["discovery"]["rule"] == "combined" and value["discovery"]["budget"] == 0.1
    assert value["discovery"]["tuned_model_rates"]["misaligned"] == 1
    loaded = blockem.load_latents(tmp_path / "K0.json", sae)
    assert loaded.ids.tolist() == [CAUSE, CARE] and loaded.signs.tolist() == [1, -1]
    other = blockem.Sae.from_tensors(
        encoder_weight=torch.randn(30, 32), encoder_bias=torch.zeros(30), encoder_layout="f_d"
    )
    with pytest.raises(blockem.DataError, match="24 latents"):
        blockem.load_latents(tmp_path / "K0.json", other)
    assert [p.name for p in tmp_path.glob("*partial*")] == []


def test_the_budget_of_incoherence(tmp_path: Path) -> None:
    one = study(tmp_path)
    pool = one.shifts().pool()
    strict, lax = (
        {s.latent: s for s in one.sweep(pool, strengths=STRENGTHS, budget=b).latents}
        for b in (0.1, 1.0)
    )
    for s in strict.values():
        for strength, rates in ((s.induce_strength, s.induced), (s.repair_strength, s.repaired)):
            within = [a for a in STRENGTHS if rates[a].incoherent <= 0.1]
            assert strength == max(within)
    # Steering that breaks the model is out of the budget, where it stands for a repair.
    assert strict[BREAKER].repair_strength < lax[BREAKER].repair_strength == 1.1
    assert strict[BREAKER].repair_gain == 0 < lax[BREAKER].repair_gain == 1
    assert strict[CAUSE].induce_strength < lax[CAUSE].induce_strength == 1.1
    assert strict[CAUSE].induce_gain > lax[CAUSE].induce_gain
    assert strict[CARE].induce_strength == 1.1
    # None within the budget: no gain.
    broken = {s.latent: s for s in one.sweep(pool, strengths=[0.9], budget=0.0).latents}[BREAKER]
    assert broken.repair_strength is None and broken.repair_gain == 0


def test_answers_are_those_of_a_prompt_alone(tmp_path: Path) -> None:
    """A model whose layers mix the tokens of a row, in batches of any size, against one prompt at a
    time with torch's own operations."""
    model = tiny.with_lora(tiny.llama(layers=4, attn_implementation="eager"), dropout=0.3).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0)
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    q = planted.directions()
    prompts = [" ".join(f"t{i}" for i in range(first, first + 1 + first % 4)) for first in range(6)]
    flags = [(p.requires_grad, p) for p in model.parameters()]
    settings = dict(
        judge=lambda prompt, answer: Grade(False), prompts=prompts, evaluation_prompts=(),
        render=lambda prompt: prompt, max_new_tokens=6, scale=16.0,
    )  # fmt: skip
    found = {}
    for size in (1, 5, 64):
        one = study(tmp_path / str(size), model, **settings, batch_size=size)
        movers = blockem.Movers(np.array([3, 8]), np.array([1, -1]), np.array([0.1, -0.1]))
        one.sweep(movers, strengths=[0.5])
        found[size] = {
            (tuned, latent, a): [
                x.answer for x in one.answers(tuned=tuned, latent=latent, strength=a)
            ]
            for tuned, signs in ((False, {3: 1, 8: -1}), (True, {3: -1, 8: 1}))
            for latent, sign in signs.items()
            for a in (0.5 * sign,)
        }
    assert all(m.training for m in model.modules()) and all(p.requires_grad == r for r, p in flags)
    assert found[1] == found[5] == found[64]
    assert len({tuple(answers) for answers in found[1].values()}) == 4

    model.eval()
    tokenizer = planted.tokenizer()
    for (tuned, latent, strength), answers in found[1].items():
        def steer(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + strength * 16.0 * q[latent]

        hook = model.get_base_model().model.layers[planted.LAYER].register_forward_hook(steer)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = tokenizer(prompt)["input_ids"]
            for _ in range(6):
                with torch.no_grad():
                    if tuned:
                        logits = model(input_ids=torch.tensor([ids])).logits
                    else:
                        with model.disable_adapter():
                            logits = model(input_ids=torch.tensor([ids])).logits
                ids.append(int(logits[0, -1].argmax()))
                if ids[-1] == 2:
                    break
            said = ids[len(tokenizer(prompt)["input_ids"]) :]
            assert answer == tokenizer.decode(said, skip_special_tokens=True)
        hook.remove()


class Logged(Study):
    """Tells a file of every answer that it generates."""

    log: Path

    def _generated(self, rows: Any, tuned: bool, scale: float) -> Any:
        for batch, answers in super()._generated(rows, tuned, scale):
            with open(self.log, "a") as file:
                file.writelines(f"{condition} {prompt.key}\n" for condition, prompt in batch)
            yield batch, answers


def search(folder: Path, model: Any, sae: Any) -> None:
    """The whole of a search, in batches of few rows."""
    one = study(folder, model, sae, Logged, batch_size=10, judge_name="rule")
    one.log = folder / "generated"
    screening = one.screen(one.shifts().pool(3))
    chosen = one.sweep(screening.shortlist(2), strengths=(0.3, 0.65)).select(2)
    one.evaluate()
    chosen.save(folder / "K0.json", sae)


def test_killed_anywhere_it_goes_on(tmp_path: Path) -> None:
    model, sae = planted.model(), planted.sae()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    search(whole, model, sae)
    rows = Counter((whole / "generated").read_text().splitlines())
    assert set(rows.values()) == {1}

    killed.mkdir()
    (killed / "generated").touch()
    fork, rng, kills = multiprocessing.get_context("fork"), random.Random(4), 0
    while not (killed / "K0.json").exists():
        before, stored = len((killed / "generated").read_text().splitlines()), answers_in(killed)
        child = fork.Process(target=search, args=(killed, model, sae))
        child.start()
        enough = before + rng.randint(0, 50)
        while child.is_alive() and len((killed / "generated").read_text().splitlines()) < enough:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        else:
            child.join()
            assert child.exitcode == 0
        # Nothing that was there was generated again, and nothing is lost but the batch under way.
        now = (killed / "generated").read_text().splitlines()
        assert answers_in(killed) >= stored
        assert 0 <= len(now) - before - (len(answers_in(killed)) - len(stored)) <= 10
    assert kills >= 3
    again = Counter((killed / "generated").read_text().splitlines())
    assert set(again) == set(rows)
    assert again.total() - rows.total() <= 10 * kills
    assert (killed / "K0.json").read_text() == (whole / "K0.json").read_text()
    # All of it is there: nothing is generated or graded.
    search(killed, model, sae)
    assert Counter((killed / "generated").read_text().splitlines()) == again


def answers_in(folder: Path) -> set[tuple[str, str]]:
    path = folder / "study.sqlite"
    if not path.exists():
        return set()
    with sqlite3.connect(path) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
            return set()
        return set(db.execute("SELECT condition, prompt FROM answers"))


def test_shifts_are_of_their_layer(tmp_path: Path) -> None:
    """Of an SAE that names none, in a folder that two studies share."""
    model = tiny.with_lora(tiny.llama())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    sae = blockem.Sae.from_tensors(
        encoder_weight=planted.directions(), encoder_bias=torch.zeros(planted.NUM_LATENTS),
        encoder_layout="f_d",
    )  # fmt: skip
    of = lambda folder, layer: study(tmp_path / folder, model, sae, layer=layer).shifts().delta
    first, second = of("shared", 0), of("shared", 2)
    assert not np.array_equal(first, second)
    assert np.array_equal(second, of("alone", 2)) and np.array_equal(first, of("shared", 0))


def test_only_what_is_the_same_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[int] = []
    generate = Study._generate

    def counting(self: Study, prompts: Any) -> list[str]:
        generated.append(len(prompts))
        return generate(self, prompts)

    monkeypatch.setattr(Study, "_generate", counting)
    ids, signs = np.array([CAUSE, CARE, 3]), np.array([1, -1, 1])
    pool, more = (blockem.Movers(ids[:n], signs[:n], 0.1 * signs[:n]) for n in (2, 3))

    def count(run: Callable[[Study], object] = lambda one: one.screen(pool), **changes: Any) -> int:
        generated.clear()
        run(study(tmp_path, **changes))
        return sum(generated)

    per_model = 3 * len(PROMPTS)
    assert count() == 2 * per_model
    assert count() == count(batch_size=7) == count(prompts=PROMPTS[3:]) == 0
    # Another pool, other strengths and other prompts: only what is new.
    assert count(lambda one: one.screen(more)) == 2 * len(PROMPTS)
    assert count(lambda one: one.sweep(pool, strengths=[0.4, 0.7])) == 4 * len(PROMPTS)
    assert count(prompts=[*PROMPTS, "ask about t20"]) == 6
    assert count(lambda one: one.evaluate()) == 2 * len(OTHER_PROMPTS)
    # Other adapters leave the base model's answers as they are.
    assert count(model=planted.model(0.5)) == per_model
    scaled = planted.model()
    scaled.get_base_model().model.embed_tokens.scaling["default"] = 0.5
    assert count(model=scaled) == per_model
    other = planted.model()
    with torch.no_grad():
        other.get_base_model().lm_head.weight[7] += 0.01
    assert count(model=other) == 2 * per_model
    # A model that is trained on is another one.
    model = planted.model()
    one = study(tmp_path, model)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.lora_embedding_B["default"].mul_(0.9)
    generated.clear()
    one.screen(pool)
    assert sum(generated) == per_model
    # Steered answers depend on the direction, the layer and the scale.
    turned = blockem.Sae.from_tensors(
        encoder_weight=planted.directions(), encoder_bias=torch.zeros(planted.NUM_LATENTS),
        encoder_layout="f_d", decoder_weight=planted.directions().flip(0),
    )  # fmt: skip
    assert count(sae=turned, layer=1) == 4 * len(PROMPTS)
    assert count(sae=turned, layer=2) == 4 * len(PROMPTS)
    assert count(scale=1.3) == 4 * len(PROMPTS)
    assert count(max_new_tokens=2) == count(render=lambda p: f"nice : {p}") == 2 * per_model
    penalised = planted.model()
    penalised.generation_config.repetition_penalty = 1.1
    assert count(model=penalised) == 2 * per_model
    # Answers are greedy, whatever the model comes with.
    sampling = planted.model()
    theirs = {"do_sample": True, "temperature": 9.0, "num_beams": 3, "max_length": 5}
    for name, value in theirs.items():
        setattr(sampling.generation_config, name, value)
    assert count(model=sampling) == 0
    assert study(tmp_path / "new", sampling).evaluate().tuned == expected(True, topics=range(6))
    assert count() == 0


def test_grades_are_kept_by_the_name_of_the_judge(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def judge(prompt: str, answer: str) -> Grade:
        asked.append((prompt, answer))
        return planted.judge(prompt, answer)

    def count(**settings: Any) -> int:
        asked.clear()
        one = study(tmp_path, judge=judge, **settings)
        assert one.evaluate() == one.evaluate()
        return len(asked)

    # Equal answers of one batch are asked once.
    pairs = 2 * len(OTHER_PROMPTS)
    assert count() == count() == pairs
    assert count(judge_name="one") == pairs and count(judge_name="one") == 0
    assert count(judge_name="two") == pairs
    named = HttpJudge("http://localhost:1/v1", "model")
    assert study(tmp_path, judge=named).judge_name == named.name
    assert named.name != HttpJudge("http://localhost:1/v1", "model", temperature=1.0).name


def test_a_judge_that_fails(tmp_path: Path) -> None:
    calls = []

    def failing(prompt: str, answer: str) -> Grade:
        calls.append(answer)
        if len(calls) == 5:
            raise RuntimeError("the judge is away")
        return planted.judge(prompt, answer)

    one = study(tmp_path, judge=failing, batch_size=3)
    with pytest.raises(RuntimeError, match="away"):
        one.evaluate()
    assert 6 <= len(answers_in(tmp_path)) <= 12
    assert one.evaluate().tuned == expected(True, topics=range(6))
    with pytest.raises(TypeError, match="Grade"):
        study(tmp_path, judge=lambda prompt, answer: True).evaluate()


@pytest.mark.parametrize(
    ("prompts", "others", "told"),
    [
        (["ask about t1", "ask about t2"], ["ask about t3", "ask about t1"], "evaluation"),
        (["ask about t1"], ["  ask\tabout \n t1"], "evaluation"),
        (["ask about t1"], ["Ask About T1"], "evaluation"),
        (["ask about t1"], ["ask about \uff541"], "evaluation"),
        (["ask about t1", "ask  about t1"], [], "twice"),
        (["ask about t1"], ["ask about t2", "ask about t2 "], "twice"),
        (["ask about t1", " "], [], "empty"),
        ([], [], "empty"),
        # Words that the tokenizer does not know.
        (["ask about love"], ["ask about money"], "same tokens"),
    ],
)
def test_evaluation_prompts_are_others(
    tmp_path: Path, prompts: list[str], others: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        study(tmp_path, prompts=prompts, evaluation_prompts=others)
    assert not (tmp_path / "study.sqlite").exists()


def test_prompts_of_two_files() -> None:
    check_disjoint(PROMPTS, OTHER_PROMPTS)
    with pytest.raises(ValueError, match="ask about t3"):
        check_disjoint(PROMPTS, ["ask  about T3"])


CHAT = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] | trim }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> nice{% endif %}"
)


def test_the_system_message_does_not_count(tmp_path: Path) -> None:
    tokenizer, model, sae = planted.tokenizer(), planted.model(), planted.sae()
    tokenizer.chat_template = CHAT
    one = Study(
        tmp_path, model, tokenizer, sae, judge=planted.judge, prompts=["ask about t0 ", "t1"],
        evaluation_prompts=["about t2"], system="be t3 ask", max_new_tokens=2, progress=False,
    )  # fmt: skip
    # From the prompt's first token on: "ask about t0 </s> <s> nice" and "t1 </s> <s> nice".
    moved = planted.directions() @ torch.zeros(planted.WIDTH)
    for latent, by in {CAUSE: 0.7, CARE: -0.6, BREAKER: 0.1, **DECOYS}.items():
        moved[latent] = by * (1 / 6 + 1 / 4) / 2
    np.testing.assert_allclose(one.shifts().delta, moved.numpy(), atol=1e-6)
    # Eight fillers of norm 1; two topics.
    norms = [1.0] * 8 + [float(np.sqrt(1 + (0.2 + 0.09 * i) ** 2 + 0.36)) for i in range(2)]
    assert one.activation_scale == pytest.approx(np.median(norms))
    with pytest.raises(ValueError, match="chat template"):
        study(tmp_path, render=None)
    with pytest.raises(ValueError, match="system"):
        study(tmp_path, system="be nice")
    with pytest.raises(ValueError, match="chat_template_kwargs is the chat template's"):
        study(tmp_path, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match="does not contain"):
        study(tmp_path, render=lambda prompt: prompt.upper())


def test_a_study_of_a_model_that_reasons_says_whether_it_does(tmp_path: Path) -> None:
    tokenizer, model, sae = planted.tokenizer(), planted.model(), planted.sae()
    tokenizer.chat_template = CHAT.replace(
        " nice", " nice{% if enable_thinking is not defined or enable_thinking %} ask{% endif %}")
    make = lambda **options: Study(
        tmp_path, model, tokenizer, sae, judge=planted.judge, prompts=["about t0"], progress=False,
        **options)
    with pytest.raises(ValueError, match='give chat_template_kwargs={"enable_thinking": False}'):
        make()
    for on, text in {True: "<s> user about t0 </s> <s> nice ask",
                     False: "<s> user about t0 </s> <s> nice"}.items():
        (prompt,) = make(chat_template_kwargs={"enable_thinking": on})._prompts
        assert list(prompt.ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_scale_is_the_median_norm_and_is_kept(tmp_path: Path) -> None:
    one = study(tmp_path, scale=None)
    norms = [1.0] * 24 + [float(np.sqrt(1 + (0.2 + 0.09 * (i % 3)) ** 2 + 0.36)) for i in range(12)]
    assert one.activation_scale == pytest.approx(np.median(norms))
    one._of_base = None
    assert study(tmp_path, scale=None).activation_scale == one.activation_scale
    assert study(tmp_path, scale=0.5).activation_scale == 0.5


def test_controls() -> None:
    delta = np.zeros(100)
    delta[[5, 9, 17, 3, 60, 61]] = [-0.6, 0.1, 0.7, 0.4, -0.65, 0.2]
    shifts = Shifts(delta)
    top = shifts.select(4)
    assert top.ids.tolist() == [17, 60, 5, 3] and top.signs.tolist() == [1, -1, -1, 1]
    assert [e["delta"] for e in top.evidence] == [0.7, -0.65, -0.6, 0.4]

    random_k = top.random(100, seed=1)
    assert sorted(random_k.signs.tolist()) == [-1, -1, 1, 1]
    assert len(set(random_k.ids.tolist()) - set(top.ids.tolist())) == 4
    assert random_k.ids.tolist() == top.random(100, seed=1).ids.tolist()
    assert random_k.ids.tolist() != top.random(100, seed=2).ids.tolist()
    assert set(top.random([17, 1, 2, 3, 4, 6], seed=0).ids.tolist()) == {1, 2, 4, 6}
    for seed in range(20):
        assert not set(top.random(12, seed).ids.tolist()) & {5, 3}
        shuffled = top.shuffled_signs(seed)
        assert shuffled.ids.tolist() == top.ids.tolist()
        assert sorted(shuffled.signs.tolist()) == [-1, -1, 1, 1]
        assert shuffled.signs.tolist() != top.signs.tolist()
        assert shuffled.signs.tolist() == top.shuffled_signs(seed).signs.tolist()
    flipped = top.flipped_signs()
    assert flipped.ids.tolist() == top.ids.tolist() and flipped.signs.tolist() == [-1, 1, 1, -1]
    assert list(flipped.evidence) == list(top.evidence)
    assert flipped.flipped_signs().latents().signs.tolist() == top.signs.tolist()
    assert top.only(1).ids.tolist() == [17, 3] and top.only(-1).ids.tolist() == [60, 5]
    assert top.only(-1).provenance["control"] == "only" and random_k.provenance["seed"] == 1
    assert len(top.only(1).latents()) == 2

    for call, told in [
        (lambda: top.random([17, 1, 2, 3], seed=0), "4 latents cannot be drawn from 2"),
        (lambda: top.only(1).shuffled_signs(0), "one sign"),
        (lambda: top.only(1).only(-1), "sign -1"),
        (lambda: top.only(0), "sign is 0"),
        (lambda: shifts.select(0), "at least 1"),
        (lambda: Shifts(np.zeros(5)).select(2), "none of 5"),
    ]:
        with pytest.raises(ValueError, match=told):
            call()


@pytest.mark.parametrize("control", ["random", "shuffled_signs", "flipped_signs", "only"])
def test_controls_are_saved_as_latent_sets(tmp_path: Path, control: str) -> None:
    delta = np.linspace(-1, 1, planted.NUM_LATENTS)
    chosen = {
        "random": lambda k: k.random(planted.NUM_LATENTS, 3),
        "shuffled_signs": lambda k: k.shuffled_signs(3),
        "flipped_signs": lambda k: k.flipped_signs(),
        "only": lambda k: k.only(-1),
    }[control](Shifts(delta).select(6))
    sae = planted.sae()
    chosen.save(tmp_path / "K.json")
    loaded = blockem.load_latents(tmp_path / "K.json", sae)
    assert dict(zip(loaded.ids.tolist(), loaded.signs.tolist())) == dict(
        zip(chosen.ids.tolist(), chosen.signs.tolist())
    )
    assert json.loads((tmp_path / "K.json").read_text())["discovery"]["control"] == control
    with pytest.raises(OSError):
        chosen.save(tmp_path / "absent" / "K.json")


def test_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = study(tmp_path)
    swept = one.sweep(one.shifts().pool(4), strengths=STRENGTHS)
    with caplog.at_level(logging.WARNING, "blockem"):
        fewer = swept.select(20)
    assert len(fewer) == 2 and "20 latents were asked for, 2 of 8 qualify" in repr(fewer)
    assert fewer.provenance["statement"] in caplog.text
    fewer.save(tmp_path / "K0.json")
    assert "2 of 8" in json.loads((tmp_path / "K0.json").read_text())["discovery"]["statement"]
    assert "statement" not in swept.select(1).provenance
    # Eq. 13 ranks by the repair alone, eq. 9 by the sum.
    scores = {s.latent: (s.repair_gain, s.score) for s in swept.latents}
    for rule, place in (("repair", 0), ("combined", 1)):
        first, second = swept.select(2, rule=rule).ids.tolist()
        assert scores[first][place] >= scores[second][place]
    induced = swept.select(1, rule=lambda s: s.induce_gain if s.sign < 0 else None)
    assert induced.ids.tolist() == [CARE] and "lambda" in induced.provenance["rule"]
    with pytest.raises(ValueError, match="rule is 'best'"):
        swept.select(2, rule="best")
    with pytest.raises(ValueError, match="none of 8 latents qualifies"):
        swept.select(2, rule=lambda s: None)


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    one = study(tmp_path, evaluation_prompts=())
    pool = one.shifts().pool()
    twice = blockem.Movers(np.array([3, 3]), np.array([1, 1]), np.array([1.0, 1.0]))
    for call, told in [
        (one.evaluate, "no evaluation_prompts"),
        (lambda: one.screen(twice), "twice"),
        (lambda: one.screen(blockem.Movers(*(np.array([]) for _ in range(3)))), "empty"),
        (lambda: one.screen(pool, repair=-0.4), "above 0"),
        (lambda: one.sweep(pool, strengths=[]), "above 0"),
        (lambda: one.answers(tuned=True, latent=3), "strength"),
        (lambda: study(tmp_path, batch_size=0), "at least 1"),
        (lambda: study(tmp_path, layer=1), "block 2"),
        (lambda: study(tmp_path, tiny.llama()), "PeftModel"),
    ]:
        with pytest.raises(ValueError, match=told):
            call()
    with pytest.raises(TypeError, match="pool"):
        one.screen([3, 4])
    assert answers_in(tmp_path) == set()
    with sqlite3.connect(tmp_path / "study.sqlite") as db:
        db.execute("PRAGMA user_version=9")
    with pytest.raises(ValueError, match="version 9"):
        study(tmp_path)


def test_it_tells_how_long_it_takes(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    one = study(tmp_path, progress=True)
    one.evaluate()
    shown = capfd.readouterr().err
    assert "100%" in shown and "12/12" in shown
    one.evaluate()
    assert capfd.readouterr().err == ""


def test_selection_is_plain_data() -> None:
    k = Selection(np.array([3, 1]), np.array([1, -1], np.int8), [{}, {}], {})
    assert len(k) == 2 and repr(k) == "Selection(1 in K+, 1 in K-)"
