"""The lab's world, its judge and its figures. What blocking does there is what `make lab` prints."""

import random
from itertools import combinations

import blockem
import pytest
import torch
from blockem.judges import Grade

from . import model, tuning
from .measure import measure
from .variants import BLOCK, LONG, PLAIN, VARIANTS
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
    controls = {"random_k", "shuffled_signs", "one_side", "top_delta"}
    assert {n for n in VARIANTS if not n.startswith("block")} == {PLAIN, *controls}
    assert all(VARIANTS[name].choice != VARIANTS[BLOCK].choice for name in controls)
