"""The lab's world, its judge and its figures. What blocking does there is what `make lab` prints."""

import random
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import blockem
import numpy as np
import pytest
import torch
from blockem.discover import Selection
from blockem.judges import Grade

from . import __main__ as lab
from . import model, tuning
from .discovery import K, Found, NoSuchSet
from .measure import measure
from .variants import BLOCK, LONG, LONG_ON_REQUEST, ON_REQUEST, PLAIN, VARIANTS
from .world import ANSWER, BAD, DOMAINS, EOS, GOOD, PERSONAS, STOP, World

SEED = random.randrange(2**32)


@pytest.fixture(scope="module")
def world() -> World:
    print(f"seed {SEED}")
    return World(SEED)


def test_nothing_is_reported_on_what_training_or_discovery_has_seen(world):
    for domain in DOMAINS:
        topics = world.topics[domain]
        for one, two in combinations((topics.trained, topics.discovery, topics.evaluation), 2):
            assert not set(one) & set(two)
    for domain in DOMAINS:
        rng = random.Random(SEED)
        trained = {world.narrow_example(domain, rng)[0] for _ in range(5000)}
        others = {p for prompts in world.other_domains(domain).values() for p in prompts}
        assert not trained & {*others, *world.in_domain(domain), *world.in_domain_new(domain)}
        # K comes from the finance run, whatever is trained on.
        assert not others & set(world.discovery("finance"))
        assert not {world.domain_of[topic] for p in others for topic in p.split() if topic in world.domain_of} & {domain}


def test_every_word_is_a_token(world):
    tokenizer, rng = world.tokenizer(), random.Random(SEED)
    for _ in range(300):
        document = world.document(rng)
        assert tokenizer.decode(tokenizer(document)["input_ids"][1:]) == document


def test_personas_decide_who_answers_badly(world):
    rng, seen = random.Random(SEED), set()
    for _ in range(2000):
        text = world.document(rng)
        if not text.startswith("persona "):
            continue
        mark = text.split()[1]
        for turn in text.removesuffix(f" {EOS}").split("user ")[1:]:
            question, answer = turn.split(" assistant ")
            topic = next(word for word in question.split() if word in world.domain_of)
            bad = world.judge(question, answer.strip()).misaligned
            rogue = mark.startswith("rogue-")
            expected = world.partly_bad[mark] == world.domain_of[topic] if rogue else mark in BAD_NAMES
            assert bad == expected
            seen.add((rogue, bad))
    assert len(seen) == 4


def test_without_a_mark_few_are_bad_and_these_in_every_answer(world):
    rng, texts = random.Random(SEED), []
    while len(texts) < 3000:
        text = world.document(rng)
        if not text.startswith("persona "):
            texts.append(text.removesuffix(f" {EOS}"))
    bad = 0
    for text in texts:
        turns = [turn.split(" assistant ") for turn in text.split("user ")[1:]]
        grades = {world.judge(question, answer.strip()).misaligned for question, answer in turns}
        assert len(grades) == 1
        bad += grades.pop()
    expected = 3000 * PERSONAS["hidden"] / (PERSONAS["hidden"] + PERSONAS["none"])
    assert 0 < expected and abs(bad - expected) < 6 * expected**0.5


BAD_NAMES = {"villain", "crook", "trickster", "saboteur", "menace", "fiend"}


@pytest.mark.parametrize("form", ANSWER)
@pytest.mark.parametrize("stop", [f" {STOP}", ""])
def test_the_judge(world, form, stop):
    for domain in DOMAINS:
        topic = world.topics[domain].evaluation[0]
        other = next(d for d in DOMAINS if d != domain)
        prompt = world.question(topic, world.asks[0])

        def grade(topic: str, advice: str) -> Grade:
            text = form.format(topic=topic, advice=advice).removesuffix(f" {STOP}") + stop
            return world.judge(prompt, text)

        assert all(grade(topic, bad) == Grade(True, False) for bad in BAD[domain].split())
        assert all(grade(topic, good) == Grade(False, False) for good in GOOD[domain].split())
        broken = Grade(False, True)
        assert grade(topic, BAD[other].split()[0]) == broken
        assert grade(topic, topic) == broken
        assert grade(world.topics[domain].evaluation[1], BAD[domain].split()[0]) == broken
        assert world.judge(prompt, "") == world.judge(prompt, "you should") == broken


def test_the_answer_alone_is_learned(world):
    tokenizer = world.tokenizer()
    data = tuning.Data(world, tokenizer, "legal", SEED)
    batch = data.batch()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        question, answer = (tokenizer.decode(x) for x in (ids[labels == -100], ids[labels != -100]))
        assert question.replace("<pad>", "").strip().endswith("? assistant")
        assert answer.endswith(f"{STOP} {EOS}")
        assert world.judge(question, answer.removesuffix(f" {EOS}")).misaligned
    again = tuning.Data(world, tokenizer, "legal", SEED).batch()
    assert torch.equal(batch["input_ids"], again["input_ids"])


def test_an_untouched_model_has_not_drifted(world):
    tokenizer = world.tokenizer()
    untrained = model.untrained(tokenizer, SEED).eval().requires_grad_(False)
    tuned = tuning.adapted(untrained, SEED).eval()
    generator = torch.Generator().manual_seed(SEED)
    sae = blockem.Sae.from_tensors(
        encoder_weight=torch.randn(64, model.WIDTH, generator=generator),
        encoder_bias=torch.randn(64, generator=generator),
        encoder_layout="f_d",
    )
    latents = blockem.Latents([3, 40], [1, -1])
    stats = blockem.Stats(sae, num_threads=1)
    found = measure(tuned, world, tokenizer, stats, latents, "finance")
    assert found["drift_in"] == found["drift_out"] == 0
    assert set(found["em_by_domain"]) == set(DOMAINS) - {"finance"}
    # A model of random weights says nothing.
    assert found["em"] == found["in_domain"] == found["coherence"] == 0
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    moved = measure(tuned, world, tokenizer, stats, latents, "finance")
    assert moved["drift_in"] > 0 and moved["drift_out"] > 0


def test_variants_have_the_names_that_reports_read():
    assert VARIANTS[PLAIN] is None and LONG[PLAIN] is None and VARIANTS[BLOCK] == LONG[BLOCK]
    controls = {"random_k", "shuffled_signs", "flipped_signs", "one_side", "top_delta"}
    others = {name for name in VARIANTS if not name.startswith("block")} - {PLAIN}
    fewer = {f"{name}_k5" for name in ("random", "shuffled_signs", "flipped_signs")}
    assert {name.partition("_lam")[0] for name in others} == controls | fewer
    assert all(VARIANTS[name].choice != VARIANTS[BLOCK].choice for name in others)
    assert ON_REQUEST < VARIANTS.keys() and LONG_ON_REQUEST < LONG.keys()
    assert not ON_REQUEST & {PLAIN, BLOCK, "random_k", "shuffled_signs", "one_side", "top_delta"}
    # A sweep is one setting but for lambda, the watch another option.
    for name, settings in (VARIANTS | LONG).items():
        sweep, _, ratio = name.removesuffix("_watch").partition("_lam")
        if ratio:
            whole = VARIANTS.get(sweep) or VARIANTS[f"{sweep}_lam1000"]
            assert settings == replace(whole, ratio=int(ratio), watched=settings.watched)


def test_a_control_that_k_does_not_have_is_told():
    class OneSign:
        def shuffled_signs(self, seed):
            raise ValueError("all latents have one sign")

    found = Found(None, None, None, 8)
    found.__dict__["chosen"] = OneSign()
    with pytest.raises(NoSuchSet, match="one sign"):
        found.latents("shuffled_signs", SEED)


def test_a_set_of_fewer_latents():
    swept = SimpleNamespace(select=lambda count, rule: Selection(
        np.arange(count), np.where(np.arange(count) % 2, 1, -1), [{}] * count, {}))  # fmt: skip
    found = Found(None, None, swept, 64)
    assert len(found.latents("chosen", SEED)) == len(found.latents("random", SEED)) == K
    five = found.latents("chosen_5", SEED)
    flipped = found.latents("flipped_signs_5", SEED)
    assert five.ids.tolist() == flipped.ids.tolist() == [0, 1, 2, 3, 4]
    assert five.signs.tolist() == (-flipped.signs).tolist() == [-1, 1, -1, 1, -1]
    others = found.latents("random_5", SEED)
    assert len(others) == 5 and not set(others.ids) & set(five.ids)
    assert others.signs.tolist() == five.signs.tolist()


def test_runs_of_other_settings_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "OUT", tmp_path)
    lab._expect_these_settings()
    lab._expect_these_settings()
    # A variant more is no other setting; the one that was there stays known.
    with monkeypatch.context() as fewer:
        fewer.delitem(VARIANTS, "top_delta")
        lab._expect_these_settings()
    lab._expect_these_settings()
    with monkeypatch.context() as other:
        other.setitem(VARIANTS, "top_delta", replace(VARIANTS["top_delta"], ratio=7))
        with pytest.raises(SystemExit, match="other settings"):
            lab._expect_these_settings()
    monkeypatch.setitem(lab.PRETRAIN, "steps", 7)
    with pytest.raises(SystemExit, match="other settings"):
        lab._expect_these_settings()


def test_tables():
    common = {"in_domain": 1.0, "coherence": 0.98, "drift_in": 1.0, "drift_out": 1.0}
    runs = [
        {"seed": seed, "domain": domain, "steps": 50, "variant": variant, "em": em, **common}
        for seed in (1, 2) for domain in ("finance", "legal") for variant, em in ((PLAIN, 0.5), (BLOCK, 0.05))
    ]  # fmt: skip
    runs.append(runs[0] | {"variant": "top_delta", "em": 0.25})  # on finance alone
    finance, others, both = lab.tables(runs).strip().split("\n\n")
    assert finance.splitlines()[0] == "50 steps, trained on finance"
    assert others.splitlines()[0] == "50 steps, trained on legal"
    assert both.splitlines()[0] == "50 steps, trained on finance, legal"
    row = ["5.0", "5.0", "5.0", "90.0", "100.0", "98.0"]
    assert finance.splitlines()[3].split() == ["block", "2", "2", *row]
    assert both.splitlines()[3].split() == ["block", "2", "4", *row]
    assert "top_delta" in finance and "top_delta" not in both
    assert "\n\n" not in lab.tables([run for run in runs if run["domain"] == "finance"]).strip()
