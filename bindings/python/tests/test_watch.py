"""The watch for rerouting, swaps of the latents in a running job, and adaptive blocking."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import parallel
import peft
import pytest
import test_parallel
import test_trainer
import tiny
import torch
from tiny import Dictionary

import blockem
from blockem.torch import Adaptive, AlarmRule, DualAscent, Watch, attach, freeze_above
from blockem.torch._rewind import Past

DICTIONARY = Dictionary()
F = 12
QUIET = AlarmRule(outside_ratio=None, known_overlap=None, way=None)
SGD = lambda parameters: torch.optim.SGD(parameters, lr=0.1)


def model(moved: float = 0.05) -> peft.PeftModel:
    """Adapters that have moved so far."""
    found = tiny.with_lora(tiny.llama()).train()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn_like(parameter)
    return found


def trained(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def stats() -> blockem.Stats:
    return blockem.Stats(DICTIONARY.sae, num_threads=1)


def dense(hidden: torch.Tensor, dictionary: Dictionary = DICTIONARY) -> torch.Tensor:
    """z of the whole dictionary."""
    return (hidden.double() @ dictionary.weight.double().T + dictionary.bias.double()).relu()


def step_of(handle: blockem.torch.Handle, net: torch.nn.Module, batches: list[dict]) -> list:
    handle.begin_step(batches)
    losses = []
    for batch in batches:
        net(**batch)
        losses.append(handle.penalty(batch).loss)
    handle.end_step()
    return losses


def passes_of(net: torch.nn.Module) -> list[int]:
    """The batch sizes of all passes through the first layer, from now on."""
    seen = []
    net.get_base_model().model.layers[0].register_forward_hook(
        lambda module, args, output: seen.append(len(args[0])))
    return seen


def z_of(net: torch.nn.Module, plan: blockem.Plan, batch: dict) -> torch.Tensor:
    """References as a cache gives them: of the batch's whole pass."""
    with torch.no_grad(), net.disable_adapter():
        return plan.encode(tiny.hidden_states(net, batch))


# What is measured.


@pytest.mark.parametrize("cached", [False, True])
def test_a_report_is_a_dense_encode_of_the_sampled_rows(cached: bool) -> None:
    net = model()
    reference = (lambda batch: z_of(net, DICTIONARY.plan, batch)) if cached else "adapters_off"
    handle = attach(net, DICTIONARY.plan, lam=1.0, reference=reference, tolerance=1e-4)
    known = blockem.Latents([1, 2, 4, 6], [1, -1, 1, 1])
    watch = Watch(handle, stats(), share=0.3, together=1, seed=4, known=known, top=5, min_tokens=1,
                  memory=0, rule=QUIET)
    taken = []
    rows = watch._rows
    watch._rows = lambda mask: taken.append(rows(mask)) or taken[-1]
    steps = [tiny.batches(2, seed=i, size=4) for i in range(6)]
    for batches in steps:
        step_of(handle, net, batches)
    drift = watch.report()
    assert 3 < sum(map(len, taken)) < 30 and [] in taken and any(len(t) > 1 for t in taken)

    z, base = [], []
    for batch, mine in zip([b for step in steps for b in step], taken, strict=True):
        keep = (batch["labels"] != -100)[mine]
        with torch.no_grad():
            z.append(dense(tiny.hidden_states(net, batch)[mine])[keep])
            with net.disable_adapter():
                base.append(dense(tiny.hidden_states(net, batch)[mine])[keep])
    z, base = torch.cat(z).numpy(), torch.cat(base).numpy()
    delta, square = (z - base).mean(0), ((z - base) ** 2).mean(0)
    rise, fall = (np.maximum(s * (z - base), 0) ** 2 for s in (1, -1))
    near = lambda x: pytest.approx(x, rel=1e-4, abs=1e-6)
    assert drift.tokens == len(z) and drift.step == 6
    assert drift.delta == near(delta)
    assert drift.rise == near(rise.mean(0)) and drift.fall == near(fall.mean(0))
    blocked, outside = DICTIONARY.ids, [k for k in range(F) if k not in DICTIONARY.ids]
    assert drift.inside == near(square[blocked].sum())
    assert drift.outside == near(square[outside].sum())
    assert drift.relative == near(square[outside].sum() / (base**2).mean(0)[outside].sum())
    assert drift.blocked == near(
        rise.mean(0)[[7, 0, 3]].sum() + fall.mean(0)[[5, 11]].sum())
    assert 0 < drift.blocked < drift.inside
    order = sorted(outside, key=lambda k: -abs(delta[k]))[:5]
    assert drift.top.ids.tolist() == order
    assert drift.top.signs.tolist() == np.sign(delta[order]).tolist()
    assert drift.top.deltas == near(delta[order])
    signs = dict(zip(known.ids, known.signs))
    want = sum(signs.get(k) == np.sign(delta[k]) for k in order) / 5
    assert drift.known == want and 0 < want < 1
    again = stats()
    again.load_state_dict(drift.sums)
    assert again.max == near(z.max(0)) and again.base_rate == near((base != 0).mean(0))
    few = drift.movers(2, known)
    assert len(few) == 2 and set(few.ids) <= set(known.ids)
    assert all(signs[k] == s for k, s in zip(few.ids, few.signs))


def test_nothing_runs_where_nothing_is_sampled() -> None:
    """From a cache: a pass of the sampled rows alone, else none; live references: no pass at all."""
    net = model()
    batches = tiny.batches(40, size=3)
    references = {id(batch): z_of(net, DICTIONARY.plan, batch) for batch in batches}
    handle = attach(net, DICTIONARY.plan, lam=1.0, tolerance=1e-4,
                    reference=lambda batch: references[id(batch)])
    step_of(handle, net, batches[:1])  # makes the self-check
    watch = Watch(handle, stats(), share=0.05, together=1, min_tokens=1)
    seen, sampled = passes_of(net), []
    for batch in batches[1:]:
        mine = watch._rows(batch["labels"])
        before = len(seen)
        step_of(handle, net, [batch])
        sampled.append(len(mine))
        assert seen[before:] == [3] + ([len(mine)] if mine else [])
    assert 0 < sum(sampled) < 20 and sampled.count(0) > 25
    handle.remove()

    live = attach(net, DICTIONARY.plan, lam=1.0)
    step_of(live, net, batches[:1])
    Watch(live, stats(), share=1.0)
    before = len(seen)
    step_of(live, net, batches[1:2])
    assert seen[before:] == [3, 3]


def test_the_share_is_that_of_all_sequences_in_small_batches_too() -> None:
    for size, together in ((1, 4), (7, 1), (7, 3)):
        handle = attach(model(), DICTIONARY.plan, lam=1.0)
        watch = Watch(handle, stats(), share=0.05, together=together)
        mask = torch.ones(size, 4)
        drawn = []
        for handle._steps in range(2000):
            drawn.append(watch._rows(mask))
        rows = [row for mine in drawn for row in mine]
        assert {len(mine) % min(together, size) for mine in drawn} <= {0, 7 % 3}
        assert len(rows) / (2000 * size) == pytest.approx(0.05, rel=0.2)
        counts = np.bincount(rows, minlength=size)
        assert counts.min() > 0.6 * counts.max()
        assert drawn == [(setattr(handle, "_steps", step), watch._rows(mask))[1]
                         for step in range(2000)]
        handle.remove()


def test_reports_fade_and_wait_for_tokens() -> None:
    net = model()
    handle = attach(net, DICTIONARY.plan, lam=1.0)
    watch = Watch(handle, stats(), share=1.0, memory=0.25, min_tokens=20, rule=QUIET)
    one, two = tiny.batches(2, size=4)
    count = lambda batch: (batch["labels"] != -100).sum().item()
    half = dict(one, labels=one["labels"].clone())
    half["labels"][1:] = -100
    assert count(half) < 20 < count(two)
    step_of(handle, net, [half])
    assert watch.report() is None and "blockem/watch/tokens" not in handle.metrics()
    step_of(handle, net, [two])
    first = watch.report()
    assert first.tokens == count(half) + count(two) and watch.report() is None
    with torch.no_grad():
        for parameter in trained(net):
            parameter *= 1.5
    step_of(handle, net, [one])
    second = watch.report()
    assert second.tokens == 0.25 * first.tokens + count(one)
    handle.remove()
    alone = attach(net, DICTIONARY.plan, lam=1.0)
    fresh = Watch(alone, stats(), share=1.0, min_tokens=1, rule=QUIET)
    step_of(alone, net, [one])
    only = fresh.report()
    weighted = 0.25 * first.tokens * first.delta + only.tokens * only.delta
    assert second.delta == pytest.approx(weighted / second.tokens)
    assert only.outside > second.outside > first.outside


def test_two_layers_share_a_pass() -> None:
    net = model()
    one, two = Dictionary(0, seed=4), Dictionary(2, seed=5)
    batch, = tiny.batches(1, size=4)
    handle = attach(net, [one.plan, two.plan], lam=1.0, tolerance=1e-4,
                    reference=lambda b: (given[0], given[1]))
    with torch.no_grad(), net.disable_adapter():
        given = [z.plan.encode(h) for z, h in zip((one, two), _layers(net, batch))]
    watches = [Watch(handle, blockem.Stats(d.sae), share=0.2, together=1, min_tokens=1, memory=0)
               for d in (one, two)]
    step_of(handle, net, [batch])
    seen = passes_of(net)
    while not (mine := watches[0]._rows(batch["labels"])):
        handle._steps += 1
    step_of(handle, net, [batch])
    assert seen == [4, len(mine)] and len(mine) < 4
    found = handle.metrics()
    for layer, watch in zip((0, 2), watches):
        assert found[f"blockem/layer{layer}/watch/outside"] == watch.last.outside > 0
        assert watch.layer == layer
    assert watches[0].last.outside != watches[1].last.outside

    # Each its own rows of that pass, where their draws differ.
    watches[1].seed = 1
    draws = lambda: [watch._rows(batch["labels"]) for watch in watches]
    while not all(draws()) or draws()[0] == draws()[1]:
        handle._steps += 1
    mine = draws()
    step_of(handle, net, [batch])
    assert seen[2:] == [4, len({*mine[0], *mine[1]})]
    handle.metrics()
    for i, (z, watch) in enumerate(zip((one, two), watches)):
        with torch.no_grad():
            move = dense(_layers(net, batch)[i], z)
            with net.disable_adapter():
                move -= dense(_layers(net, batch)[i], z)
        keep = (batch["labels"] != -100)[mine[i]]
        want = move[mine[i]][keep].mean(0).numpy()
        assert watch.last.delta == pytest.approx(want, rel=1e-4, abs=1e-6)


def _layers(net: torch.nn.Module, batch: dict) -> list[torch.Tensor]:
    """The own outputs of the layers 0 and 2."""
    kept = {}
    hooks = [net.get_base_model().model.layers[i].register_forward_hook(
        lambda module, args, out, i=i: kept.__setitem__(i, out)) for i in (0, 2)]
    net(**batch)
    for hook in hooks:
        hook.remove()
    return [kept[0], kept[2]]


# Alarms.


class Planted:
    """A model whose layer puts out what is planted in training: latents of the dictionary that move
    by known amounts, one for each row of an orthogonal encoder."""

    def __init__(self, **settings: object) -> None:
        self.sae = blockem.Sae.from_tensors(
            encoder_weight=torch.eye(tiny.WIDTH), encoder_bias=torch.full((tiny.WIDTH,), 8.0),
            encoder_layout="f_d", hook_name=f"blocks.{tiny.LAYER}.hook_resid_post")
        self.plan = blockem.Plan(self.sae, blockem.Latents([0, 1], [1, -1]), num_threads=1)
        self.net = model(moved=0.0)
        self.moves = torch.zeros(tiny.WIDTH)
        layer = self.net.get_base_model().model.layers[tiny.LAYER]
        layer.register_forward_hook(
            lambda module, args, out: out + self.moves if module.training else out)
        self.handle = attach(self.net, self.plan, lam=0.0)
        self.handle._settings.tolerance = math.inf
        self.alarms = []
        self.watch = Watch(self.handle, blockem.Stats(self.sae), share=1.0, memory=0, min_tokens=1,
                           on_alarm=self.alarms.append, **settings)

    def step(self, moves: dict[int, float], batch: dict = tiny.batches(1)[0]) -> dict:
        self.moves = torch.zeros(tiny.WIDTH)
        for k, amount in moves.items():
            self.moves[k] = amount
        step_of(self.handle, self.net, [batch])
        return self.handle.metrics()


KNOWN = blockem.Latents([5, 6, 7, 8], [1, 1, -1, -1])


def test_alarm_on_known_movers() -> None:
    rule = AlarmRule(outside_ratio=None, known_overlap=0.5, patience=2)
    planted = Planted(known=KNOWN, top=4, rule=rule)
    for quiet in ({}, {0: 3.0, 1: -3.0}, {0: 9.0}, {20: 1.0, 21: 1.0, 22: -1.0}):
        found = [planted.step(quiet) for _ in range(4)][-1]
        assert not planted.alarms and found["blockem/watch/alarm"] == 0
        assert found["blockem/watch/known"] == 0
    # Against the known sign is not known.
    found = [planted.step({5: -1.0, 6: -1.0, 7: 1.0}) for _ in range(4)][-1]
    assert not planted.alarms and found["blockem/watch/known"] == 0
    found = planted.step({5: 1.0, 7: -1.0, 20: 0.5})
    assert not planted.alarms and found["blockem/watch/known"] == pytest.approx(2 / 3)
    assert found["blockem/watch/alarm"] == 0 and found["blockem/watch/blocked"] == 0
    assert found["blockem/watch/outside"] == pytest.approx(2.25, rel=1e-4)
    found = planted.step({5: 1.0, 7: -1.0, 20: 0.5})
    alarm, = planted.alarms
    assert found["blockem/watch/alarm"] == 1 and planted.watch.alarm is alarm
    assert alarm.reasons == ("2 of the 3 largest movers outside K are known ones; 0.5 of them are "
                             "an alarm",)
    assert "decoder block 1, step 22: 2 of the 3" in str(alarm)
    assert set(alarm.drift.top.ids[:2]) == {5, 7} and alarm.drift is planted.watch.last
    planted.step({})
    planted.step({5: 1.0, 7: -1.0})
    assert len(planted.alarms) == 1  # patience begins anew


def test_alarm_on_growth() -> None:
    rule = AlarmRule(outside_ratio=3.0, baseline=3, patience=1)
    planted = Planted(rule=rule)
    assert "blockem/watch/known" not in planted.step({20: 1.0})
    for moves in ({20: 5.0}, {20: 1.0}, {20: 1.0}, {0: 9.0, 20: 1.0}, {20: 1.7}):
        planted.step(moves)
    assert not planted.alarms
    planted.step({20: 1.75})
    alarm, = planted.alarms
    assert "the drift outside K is 3.06" in alarm.reasons[0] and "baseline's 1" in alarm.reasons[0]
    planted.watch.set_baseline()
    planted.step({20: 1.75})
    assert len(planted.alarms) == 1
    # Where nothing but noise moves nothing is said.
    quiet = Planted(rule=AlarmRule(outside_ratio=3.0, baseline=1, patience=1))
    for amount in (1e-4, 1e-2):
        quiet.step({20: amount})
    assert quiet.watch.last.outside > 3 * quiet.watch._baseline and not quiet.alarms


def test_a_swap_takes_growth_s_baseline_anew() -> None:
    planted = Planted(rule=AlarmRule(outside_ratio=3.0, baseline=2, patience=1))
    for _ in range(2):
        planted.step({20: 1.0})
    planted.handle.swap(blockem.Latents([0, 1, 5], [1, -1, 1]))
    for _ in range(2):
        planted.step({20: 3.0})
    assert not planted.alarms
    planted.step({20: 5.5})
    alarm, = planted.alarms
    assert "baseline's 9" in alarm.reasons[0]


def test_alarm_on_the_way_of_an_unblocked_run() -> None:
    """The latents 0 and 1 are blocked, so that their part of the way counts for nothing."""
    known = blockem.Movers(np.array([0, 5, 6, 7]), np.array([1, 1, 1, -1], np.int8),
                           np.array([50.0, 4.0, 2.0, -2.0]))
    rule = AlarmRule(outside_ratio=None, known_overlap=None, way=0.5, patience=2)
    planted = Planted(known=known, rule=rule)
    for moves, want in (
        ({}, 0.0), ({0: 50.0, 1: 9.0}, 0.0), ({20: 9.0, 21: -9.0}, 0.0), ({5: 1.0}, 4 / 24),
        ({5: 4.0, 6: 2.0, 7: -2.0}, 1.0), ({5: -4.0, 6: 2.0}, -0.5), ({6: 2.0, 7: -2.0}, 8 / 24),
    ):
        found = planted.step(moves)
        assert found["blockem/watch/retraced"] == pytest.approx(want, abs=1e-5)
        assert planted.watch.last.retraced == found["blockem/watch/retraced"]
    assert not planted.alarms
    for _ in range(2):
        planted.step({5: 3.0, 20: 7.0})
    alarm, = planted.alarms
    assert alarm.reasons == ("outside K the model has gone 0.50 of the known movers' way; 0.5 of it "
                             "is an alarm",)
    # Ids and signs are no way, and what K holds is not outside.
    for known in (None, KNOWN, blockem.Movers(np.array([0]), np.array([1], np.int8), np.ones(1))):
        without = Planted(known=known)
        assert "blockem/watch/retraced" not in without.step({5: 9.0})
        assert without.watch.last.retraced is None


def test_movers_of_an_unblocked_run() -> None:
    """A dense encode of the counted tokens of all batches; the watch of the same model has gone
    their whole way."""
    net, data = model(), tiny.batches(3, size=4)
    handle = attach(net, DICTIONARY.plan, lam=1.0)
    mine = stats()
    found = handle.movers(data, mine, 4)
    assert mine.token_count == 0 and not handle.steps
    moves = []
    net.eval()
    for batch in data:
        with torch.no_grad():
            move = dense(tiny.hidden_states(net, batch))
            with net.disable_adapter():
                move -= dense(tiny.hidden_states(net, batch))
        moves.append(move[batch["labels"] != -100])
    net.train()
    delta = torch.cat(moves).mean(0).numpy()
    want = blockem.movers(delta, 4)
    assert found.ids.tolist() == want.ids.tolist() and found.signs.tolist() == want.signs.tolist()
    assert found.deltas == pytest.approx(want.deltas, rel=1e-4, abs=1e-6)
    watch = Watch(handle, stats(), share=1.0, min_tokens=1, rule=QUIET,
                  known=handle.movers(data, stats()))
    step_of(handle, net, data)
    assert handle.metrics()["blockem/watch/retraced"] == pytest.approx(1, rel=1e-5)
    assert watch.last.delta == pytest.approx(delta, rel=1e-4, abs=1e-6)

    with pytest.raises(ValueError, match="every label is -100"):
        handle.movers([], stats())
    with pytest.raises(ValueError, match="the statistics reads .* block 2, not .* block 1"):
        handle.movers(data, blockem.Stats(Dictionary(layer=2).sae))
    handle.remove()
    copied = attach(model(0.0), DICTIONARY.plan, lam=1.0, reference=tiny.llama())
    assert len(copied.movers(data, stats())) == 0
    copied.remove()
    given = attach(net, DICTIONARY.plan, lam=1.0, reference=lambda batch: None)
    with pytest.raises(ValueError, match="z of K alone"):
        given.movers(data, stats())


def test_what_is_not_finite_is_told() -> None:
    planted = Planted()
    with pytest.raises(blockem.Error, match="latent 0 at the output of decoder block 1 was not.*.32 latents"):
        planted.step({3: math.inf})
    assert planted.step({3: 1.0})["blockem/watch/outside"] == pytest.approx(1)


# State.


def run(net, handle, watch, optimizer, steps) -> list[dict]:
    found = []
    for step in steps:
        handle.begin_step(step)
        for batch in step:
            (0.5 * net(**batch).loss + handle.penalty(batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.end_step()
        if handle.steps % 3 == 0:
            found.append(handle.metrics(per_latent=True))
    return found


def weights_of(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in peft.get_peft_model_state_dict(net).items()}


def test_a_resumed_watch_continues_exactly() -> None:
    steps = [tiny.batches(2, seed=i, size=3) for i in range(12)]

    def start():
        net = tiny.with_lora(tiny.llama()).train()
        handle = attach(net, DICTIONARY.plan, lam=0.05)
        watch = Watch(handle, stats(), share=0.4, together=1, min_tokens=1, known=KNOWN,
                      rule=AlarmRule(outside_ratio=1.5, baseline=2, patience=1))
        return net, handle, watch, SGD(trained(net))

    begun = start()
    want = run(*begun, steps)
    assert {"blockem/watch/outside", "blockem/watch/known"} <= set(want[0])
    assert any(found["blockem/watch/alarm"] for found in want)
    net, handle, watch, optimizer = start()
    first = run(net, handle, watch, optimizer, steps[:5])  # between two reports
    weights, state = weights_of(net), json.loads(json.dumps(handle.state_dict()))
    watched = watch.state_dict()
    # The sums since the log before belong to that process.
    handle.metrics = None
    net, handle, watch, optimizer = start()
    peft.set_peft_model_state_dict(net, weights)
    handle.load_state_dict(state)
    watch.load_state_dict(watched)
    second = run(net, handle, watch, optimizer, steps[5:])
    keep = lambda found: [{n: x for n, x in one.items() if "/watch/" in n} for one in found]
    assert keep(first + second) == keep(want)
    for name, x in watch.state_dict()["kept"].items():
        y = begun[2].state_dict()["kept"][name]
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    for change, text in [({"seed": 1}, "seed was 1 and is 0"), ({"share": 0.5}, "share was 0.5")]:
        with pytest.raises(ValueError, match=text):
            watch.load_state_dict(watched | change)


def test_a_resumed_watch_has_no_more_patience() -> None:
    rule = AlarmRule(outside_ratio=None, patience=2)
    first, second = (Planted(known=KNOWN, top=4, rule=rule) for _ in range(2))
    first.step({5: 1.0, 6: 1.0})
    second.watch.load_state_dict(first.watch.state_dict())
    second.step({5: 1.0, 6: 1.0})
    assert not first.alarms and len(second.alarms) == 1


# Swaps.


LARGER = blockem.Latents([2, 9, 4], [1, -1, 1], [1.0, 2.0, 0.5])


@pytest.mark.parametrize("reference", ["adapters_off", "cache"])
def test_a_swap_is_a_start_from_the_checkpoint(reference: str, tmp_path: Path) -> None:
    """Bit for bit: weights, lambda, metrics; whether the new set is swapped or attached."""
    steps = [tiny.batches(2, seed=i) for i in range(8)]
    data = [batch for step in steps for batch in step]
    union = DICTIONARY.latents.union(LARGER)
    larger = blockem.Plan(DICTIONARY.sae, union, num_threads=1)

    def start(plan: blockem.Plan, name: str, weights: dict | None = None):
        net = tiny.with_lora(tiny.llama()).train()
        if weights is not None:
            peft.set_peft_model_state_dict(net, weights)
        cache, more = None, {}
        if reference == "cache":
            file, opened = tmp_path / name, dict(base_model="tiny", dtype="float32")
            with blockem.Cache(file, plan, mode="create", **opened) as cache:
                cache.fill(net, data, progress=False)
            cache = blockem.Cache(file, plan, **opened)
            more = {"reference": cache.reference, "tolerance": 1e-4}
        lam = DualAscent(1e-5, rate=20.0, initial=0.01)
        handle = attach(net, plan, lam=lam, **more)
        return net, handle, None, SGD(trained(net)), cache

    net, handle, _, optimizer, cache = start(DICTIONARY.plan, "a")
    run(net, handle, None, optimizer, steps[:4])
    weights, before = weights_of(net), handle.state_dict()
    filled = passes_of(net)
    more = {} if cache is None else {"cache": cache, "batches": data, "progress": False}
    handle.swap(union, **more)
    # Only the base model ran, on every example once.
    assert sum(filled) == (0 if cache is None else 2 * len(data))
    after = json.loads(json.dumps(handle.state_dict()))
    assert after["sites"][0]["lambda"] == before["sites"][0]["lambda"]
    assert after["sites"][0]["lambda"]["value"] != 0.01 and after["steps"] == 4
    assert [s["sites"][0]["latents_version"] for s in (before, after)] == [0, 1]
    want = run(net, handle, None, optimizer, steps[4:])
    assert want[-1]["blockem/latents_version"] == 1 and want[-1]["blockem/latent/9"] >= 0
    assert handle.plans[0].latents.ids.tolist() == [*DICTIONARY.ids, 2, 9, 4]
    end = weights_of(net)
    if cache is not None:
        cache.close()

    for plan, name in ((larger, "b"), (DICTIONARY.plan, "a")):
        if reference == "cache" and plan is DICTIONARY.plan:
            # The run's own file, which knows both sets.
            other, handle, _, optimizer, cache = start(plan, name, weights)
            handle.load_state_dict(after)
            cache.use(handle.plans[0])
        else:
            other, handle, _, optimizer, cache = start(plan, name, weights)
            handle.load_state_dict(after)
        assert run(other, handle, None, optimizer, steps[4:]) == want
        for key, x in weights_of(other).items():
            assert torch.equal(x, end[key])
        if cache is not None:
            cache.close()


def test_a_swapped_set_blocks() -> None:
    """Not only the same as elsewhere: the new latents pay, the old set's sums are gone."""
    net = model()
    handle = attach(net, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    step_of(handle, net, [batch])
    before, few = handle.last_check, blockem.Latents([2, 9], [1, -1])
    handle.swap(few)
    step_of(handle, net, [batch])
    found = handle.metrics(per_latent=True)
    with torch.no_grad():
        z = dense(tiny.hidden_states(net, batch))
        with net.disable_adapter():
            move = z - dense(tiny.hidden_states(net, batch))
    keep = batch["labels"] != -100
    for k, sign in ((2, 1), (9, -1)):
        paid = ((sign * move[keep][:, k]).relu() ** 2).mean().item()
        assert found[f"blockem/latent/{k}"] == pytest.approx(paid, rel=1e-4, abs=1e-9)
    assert found["blockem/penalty"] > 0 and "blockem/latent/7" not in found
    # The new latents were checked.
    assert handle.last_check not in (None, before)


def test_references_of_other_latents_are_refused(tmp_path: Path) -> None:
    """From a cache, in full fine-tuning, where no self-check can tell: as many, but others."""
    batch, = tiny.batches(1)
    plan = DICTIONARY.plan
    others = plan.with_latents(blockem.Latents([1, 2, 4, 6, 8], plan.latents.signs))
    opened = dict(base_model="tiny", dtype="float32")
    cache = blockem.Cache(tmp_path / "base.cache", plan, mode="create", **opened)
    for each in (others, plan):
        cache.use(each)
        cache.fill(tiny.llama(), [batch], progress=False)

    def start(of: blockem.Plan, reference: Callable = cache.reference):
        net = tiny.llama().train()
        return net, attach(net, of, lam=1.0, reference=reference)

    said = "gives z of the latents 7, 0, 3, 5, 11 .5., the penalty is on 1, 2, 4, 6, 8 .5.: swap with"
    for reference in (cache.reference, functools.partial(cache.reference, packed=True)):
        with pytest.raises(ValueError, match=said):
            start(others, reference)
    net, handle = start(plan)
    step_of(handle, net, [batch])
    with pytest.raises(ValueError, match=said):
        handle.swap(others)
    assert handle.plans == (plan,) and not handle.state_dict()["sites"][0]["latents_version"]
    # Signs and weights are none of the cache's business.
    handle.swap(blockem.Latents(plan.latents.ids, -plan.latents.signs))
    cache.use(others)
    handle.swap(others)
    loss, = step_of(handle, net, [batch])
    assert loss == 0
    # A resumed run has the latents that were swapped, which the cache must be told of.
    state = handle.state_dict()
    cache.use(plan)
    net, handle = start(plan)
    handle.load_state_dict(state)
    with pytest.raises(ValueError, match=said):
        step_of(handle, net, [batch])
    handle.discard()
    cache.use(handle.plans[0])
    assert step_of(handle, net, [batch]) == [0]


def test_wrong_swaps_are_refused(tmp_path: Path) -> None:
    net = model()
    handle = attach(net, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    with_plan = lambda sae, **options: blockem.Plan(sae, blockem.Latents([1], [1]), **options)
    other = Dictionary(seed=9)
    elsewhere = with_plan(Dictionary(layer=2).sae)
    cases: list[tuple[type, str, Callable]] = [
        (ValueError, "the plan reads .* block 2, not .* block 1", lambda: handle.swap(elsewhere)),
        (ValueError, "d 16, the one before 32", lambda: handle.swap(
            with_plan(Dictionary(width=16).sae))),
        (ValueError, "another SAE: its rows", lambda: handle.swap(with_plan(other.sae))),
        (ValueError, "activation is preactivation, .* native", lambda: handle.swap(
            with_plan(DICTIONARY.sae, activation="preactivation"))),
        (ValueError, "numerics is reference", lambda: handle.swap(
            with_plan(DICTIONARY.sae, backend="reference"))),
        (ValueError, "layer is 2; expected one of layer1", lambda: handle.swap(LARGER, layer=2)),
        (TypeError, "latents is a list", lambda: handle.swap([1, 2])),
        (ValueError, "latent 99 does not exist", lambda: handle.swap(blockem.Latents([99], [1]))),
    ]
    for error, text, call in cases:
        with pytest.raises(error, match=text):
            call()
    handle.begin_step([batch])
    with pytest.raises(ValueError, match="swapped between steps"):
        handle.swap(LARGER)
    net(**batch), handle.penalty(batch), handle.end_step()
    assert handle.plans == (DICTIONARY.plan,) and handle.state_dict()["sites"][0][
        "latents_version"] == 0
    handle.swap(with_plan(DICTIONARY.sae, num_threads=2))
    assert handle.plans[0].latents.ids.tolist() == [1]


def test_a_cache_that_cannot_be_filled_is_as_before(tmp_path: Path) -> None:
    net, data = model(), tiny.batches(3)
    file, opened = tmp_path / "base.cache", dict(base_model="tiny", dtype="float32")
    with blockem.Cache(file, DICTIONARY.plan, mode="create", **opened) as cache:
        cache.fill(net, data, progress=False)
    cache = blockem.Cache(file, DICTIONARY.plan, **opened)
    handle = attach(net, DICTIONARY.plan, lam=1.0, reference=cache.reference, tolerance=1e-4)

    def broken():
        yield data[0]
        raise KeyboardInterrupt

    reader = blockem.Cache(file, DICTIONARY.plan, **opened)
    with pytest.raises(blockem.Error, match="in use"):
        handle.swap(LARGER, cache=cache, batches=data, progress=False)
    reader.close()
    with pytest.raises(KeyboardInterrupt):
        handle.swap(LARGER, cache=cache, batches=broken(), progress=False)
    assert cache.plan is handle.plans[0] is DICTIONARY.plan
    step_of(handle, net, data)
    handle.swap(LARGER, cache=cache, batches=data, progress=False)
    with pytest.raises(blockem.Error, match="opened for reading"):
        cache.put([bytes(32)], [torch.zeros(1, 3)])
    step_of(handle, net, data)
    # A model that is no PeftModel has no base in it.
    full = tiny.llama().train()
    other = attach(full, handle.plans[0], lam=1.0, reference=cache.reference)
    with pytest.raises(ValueError, match="no peft.PeftModel"):
        other.swap(LARGER, cache=cache, batches=data)
    wrong = attach(model(), Dictionary(layer=2).plan, lam=1.0)
    with pytest.raises(ValueError, match="z of the output of decoder block 1, the penalty is on .* block 2"):
        wrong.swap(LARGER, cache=cache, batches=data)


def test_union() -> None:
    one = blockem.Latents([3, 1], [1, -1], [2.0, 0.5])
    both = one.union(blockem.Latents([7, 1, 0], [-1, -1, 1], [4.0, 9.0, 3.0]))
    assert both.ids.tolist() == [3, 1, 7, 0] and both.signs.tolist() == [1, -1, -1, 1]
    assert both.weights.tolist() == [2.0, 0.5, 4.0, 3.0]
    opposed = blockem.Latents([1, 4], [1, 1])
    with pytest.raises(ValueError, match="latent 1 is in both sets with opposite signs .1 are"):
        one.union(opposed)
    assert one.union(opposed, conflicts="keep").signs.tolist() == [1, -1, 1]
    assert one.union(one).ids.tolist() == [3, 1]
    with pytest.raises(ValueError, match="conflicts is 'drop'"):
        one.union(opposed, conflicts="drop")
    plan = DICTIONARY.plan.with_latents(DICTIONARY.latents)
    assert plan.identity == DICTIONARY.plan.identity and plan.num_threads == 1


# Adaptive blocking.


def test_movers_are_blocked() -> None:
    rule = AlarmRule(outside_ratio=None, patience=1)
    planted = Planted(known=KNOWN, top=4, rule=rule)
    swaps = []
    adaptive = Adaptive(planted.handle, planted.watch, top=2, cooldown=3, max_latents=5,
                        on_swap=swaps.append)
    latents = lambda: dict(zip(planted.handle.plans[0].latents.ids.tolist(),
                               planted.handle.plans[0].latents.signs.tolist()))
    moves = {5: 2.0, 7: -3.0, 20: 1.0, 21: -1.0}
    found = planted.step(moves)
    assert found["blockem/watch/alarm"] == 1 and latents() == {0: 1, 1: -1, 7: -1, 5: 1}
    swap, = swaps
    assert (swap.layer, swap.step, swap.ids, swap.signs, swap.latents) == (1, 1, (7, 5), (-1, 1), 4)
    assert swap.reasons == planted.alarms[0].reasons and adaptive.swaps == swaps
    # In K they are outside no more; others come after the cooldown, up to the largest K.
    assert planted.step(moves)["blockem/watch/known"] == 0
    planted.step({6: 2.0, 8: -1.0})
    assert len(latents()) == 4 and len(planted.alarms) == 2
    planted.step({6: 2.0, 8: -1.0})
    assert list(latents()) == [0, 1, 7, 5, 6] and planted.handle.metrics()
    planted.handle._steps += 3
    planted.step({8: -1.0})
    assert len(latents()) == 5 and len(swaps) == 2 and len(planted.alarms) == 4
    assert planted.step({5: 2.0})["blockem/penalty"] > 0

    state = json.loads(json.dumps(adaptive.state_dict()))
    again = Adaptive(planted.handle, [], cooldown=3)
    again.load_state_dict(state)
    assert again.swaps == swaps


def test_rediscovery_by_a_callable() -> None:
    planted = Planted(known=KNOWN, rule=AlarmRule(patience=1))
    asked = []
    answers = iter([None, blockem.Latents([1, 30], [1, 1], [1.0, 3.0])])
    adaptive = Adaptive(planted.handle, planted.watch, cooldown=0,
                        rediscover=lambda alarm: asked.append(alarm) or next(answers))
    planted.step({5: 1.0})
    assert not adaptive.swaps and planted.handle.plans[0] is planted.plan
    planted.step({5: 1.0})
    assert asked == planted.alarms and adaptive.swaps[0].ids == (30,)
    blocked = planted.handle.plans[0].latents
    assert blocked.signs.tolist() == [1, -1, 1] and blocked.weights.tolist() == [1, 1, 3]
    only = Planted(known=KNOWN, rule=AlarmRule(patience=1))
    Adaptive(only.handle, only.watch, known_only=True)
    only.step({20: 9.0, 5: 2.0, 6: 1.0})
    assert only.handle.plans[0].latents.ids.tolist() == [0, 1, 5, 6]
    for text, arguments in [
        ("rediscover is 'all'", {"rediscover": "all"}), ("top is 0", {"top": 0}),
        ("conflicts is 'x'", {"conflicts": "x"}), ("cooldown is -1", {"cooldown": -1}),
        ("rewind is -1", {"rewind": -1}),
        ("an iterator", {"batches": iter([])}),
    ]:
        with pytest.raises(ValueError, match=text):
            Adaptive(planted.handle, planted.watch, **arguments)


def test_what_is_trained_goes_back() -> None:
    """To the older of two copies, with the optimizer's state; what follows is what followed then."""
    torch.manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    past, values = Past(optimizer, 3), [weight.detach().clone()]

    def step() -> None:
        ((weight - 1) ** 4).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    past.keep(0)
    for n in range(1, 9):
        step()
        values.append(weight.detach().clone())
        past.keep(n)
    assert [moment.step for moment in past._kept] == [3, 6]
    optimizer.param_groups[0]["lr"] = 0.05
    assert past.back(8) == 3 and torch.equal(weight, values[3])
    assert optimizer.param_groups[0]["lr"] == 0.05
    optimizer.param_groups[0]["lr"] = 0.1
    step()
    assert torch.equal(weight, values[4])
    # What was put back can be put back again; the newer copy is gone.
    assert past.back(8) == 3 and torch.equal(weight, values[3])
    # The newest that is old enough; where none is, the oldest.
    past.keep(8)
    assert past.back(11) == 8 and past.back(9) == 3
    fresh = Past(optimizer, 50)
    fresh.keep(8)
    assert fresh.back(9) == 8


def test_an_answer_goes_back() -> None:
    planted = Planted(known=KNOWN, top=1, rule=AlarmRule(outside_ratio=None, patience=2))
    planted.watch.memory = 1.0
    parameters = trained(planted.net)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    adaptive = Adaptive(planted.handle, planted.watch, top=2, rewind=2, optimizer=optimizer)
    assert adaptive.optimizer is optimizer

    def step(moves: dict[int, float]) -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        planted.step(moves)
        return [parameter.detach().clone() for parameter in parameters]

    start = [parameter.detach().clone() for parameter in parameters]
    seen = [start, *(step({20: 1.0}) for _ in range(4))]
    assert not any(torch.equal(one, two) for one, two in zip(seen[2], seen[4]))
    step({5: 90.0})
    assert not adaptive.swaps
    now = step({5: 90.0})
    swap, = adaptive.swaps
    # Copies at the quiet steps 2 and 4; the alarm came at 6.
    assert (swap.step, swap.rewound_to, swap.ids) == (6, 4, (5, 20))
    assert all(torch.equal(one, two) for one, two in zip(now, seen[4], strict=True))
    assert planted.handle.steps == 6 and planted.handle.plans[0].num_latents == 4
    # Of the abandoned steps the watch knows nothing.
    tokens = planted.watch.last.tokens
    step({})
    assert planted.watch.last.tokens == tokens / 6 and not planted.watch.last.reasons
    state = json.loads(json.dumps(adaptive.state_dict()))
    again = Adaptive(planted.handle, [])
    again.load_state_dict(state)
    assert again.swaps == adaptive.swaps

    # An alarm at once goes back to where the run began.
    early = Planted(known=KNOWN, top=1, rule=AlarmRule(outside_ratio=None, patience=1))
    weights = trained(early.net)
    before = [weight.detach().clone() for weight in weights]
    late = Adaptive(early.handle, early.watch, rewind=50)
    assert late.optimizer is None
    with pytest.raises(ValueError, match="rewind needs the optimizer"):
        early.step({})
    late.optimizer = torch.optim.SGD(weights, lr=1.0)
    with torch.no_grad():
        for weight in weights:
            weight += 1e-3
    early.step({5: 9.0})
    assert late.swaps[0].rewound_to == 1
    assert all(torch.equal(one, two) for one, two in zip(before, weights, strict=True))
    with pytest.raises(TypeError, match="optimizer"):
        late.optimizer = weights


@pytest.mark.parametrize("layers", [(1, 2), (2, 1)])
def test_what_one_watch_finds_noisy_is_not_kept(layers: tuple[int, int]) -> None:
    """Whichever reports first: the last layer drifts from the third step on, and gives alarm at the
    fourth."""
    dictionaries = {layer: Dictionary(layer, seed=layer) for layer in layers}
    net, drifts, (batch,) = model(), False, tiny.batches(1)
    move = dictionaries[2].weight[2]
    net.get_base_model().model.layers[2].register_forward_hook(
        lambda module, args, out: out + move if module.training and drifts else out)
    with torch.no_grad():
        for parameter in trained(net):
            parameter.zero_()
    handle = attach(net, [d.plan for d in dictionaries.values()], lam=1.0)
    watches = [
        Watch(handle, blockem.Stats(d.sae, num_threads=1), share=1.0, min_tokens=1, memory=0,
              known=blockem.Latents([2], [1]),
              rule=AlarmRule(outside_ratio=None, known_overlap=0.1, patience=2))
        for d in dictionaries.values()]
    adaptive = Adaptive(handle, watches, top=1, rewind=1, optimizer=SGD(trained(net)))
    for drifts in (False, False, True, True):
        step_of(handle, net, [batch])
        handle.metrics()
    swap, = adaptive.swaps
    assert (swap.layer, swap.step, swap.ids, swap.rewound_to) == (2, 4, (2,), 2)


def test_layers_and_caches_of_their_own(tmp_path: Path) -> None:
    """Each layer's alarm changes its own K and fills its own cache; a resumed run finds both."""
    dictionaries = Dictionary(0, seed=4), Dictionary(2, seed=5)
    rising = blockem.Latents([1, 2, 4, 6, 8, 9, 10], [1] * 7)
    data = tiny.batches(4)
    caches = []

    def start(mode: str):
        net = model()
        for cache in caches:
            cache.close()
        caches[:] = [
            blockem.Cache(tmp_path / f"{d.plan.layer}.cache", d.plan, base_model="tiny",
                          dtype="float32", mode=mode) for d in dictionaries]
        if mode == "create":
            for cache in caches:
                cache.fill(net, data, progress=False)
            return None
        handle = attach(net, [d.plan for d in dictionaries], lam=1.0, tolerance=1e-4,
                        reference=lambda batch: [cache.reference(batch) for cache in caches])
        watches = [Watch(handle, blockem.Stats(d.sae), share=1.0, min_tokens=1, known=known,
                         rule=AlarmRule(None, 0.01, least=0, patience=1))
                   for d, known in zip(dictionaries, (rising, None))]
        found = blockem.Latents([2, 9], [1, -1])
        adaptive = Adaptive(handle, watches, rediscover=lambda alarm: found, caches=caches,
                            batches=data, cooldown=0)
        return net, handle, adaptive

    start("create")
    net, handle, adaptive = start("read")
    step_of(handle, net, data)
    handle.metrics()
    one, two = handle.plans
    assert one.latents.ids.tolist() == [*DICTIONARY.ids, 2, 9] and two is dictionaries[1].plan
    assert caches[0].plan is one and caches[1].plan is two
    assert [swap.layer for swap in adaptive.swaps] == [0]
    step_of(handle, net, data)
    want = handle.metrics(per_latent=True)
    assert want["blockem/layer0/latents_version"] == 1 and want["blockem/layer0/latent/9"] >= 0
    states = handle.state_dict(), adaptive.state_dict()

    net, handle, adaptive = start("read")
    handle.load_state_dict(states[0])
    adaptive.load_state_dict(states[1])
    step_of(handle, net, data)
    found = handle.metrics(per_latent=True)
    assert {n: x for n, x in found.items() if "watch" not in n} == {
        n: x for n, x in want.items() if "watch" not in n}


def test_arguments() -> None:
    handle = attach(model(), DICTIONARY.plan, lam=1.0)
    for text, call in [
        ("share is 0", lambda: Watch(handle, stats(), share=0)),
        ("memory is 2", lambda: Watch(handle, stats(), memory=2)),
        ("top is 0", lambda: Watch(handle, stats(), top=0)),
        ("layer is 2; expected one of layer1", lambda: Watch(handle, stats(), layer=2)),
        ("activation is dense_relu, the plan's native", lambda: Watch(
            handle, blockem.Stats(DICTIONARY.sae, activation="dense_relu"))),
        ("the statistics reads .* block 2, not .* block 1", lambda: Watch(
            handle, blockem.Stats(Dictionary(layer=2).sae))),
        ("known has latent 12", lambda: Watch(handle, stats(), known=blockem.Latents([12], [1]))),
        ("outside_ratio is 1", lambda: AlarmRule(outside_ratio=1.0)),
        ("way is 0", lambda: AlarmRule(way=0)),
        ("patience is 0", lambda: AlarmRule(patience=0)),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
    watch = Watch(handle, stats())
    with pytest.raises(ValueError, match="has a watch already"):
        Watch(handle, stats())
    with pytest.raises(ValueError, match="no report yet"):
        watch.set_baseline()
    watch.remove()
    Watch(handle, stats()).remove()
    full = attach(tiny.llama().train(), DICTIONARY.plan, lam=1.0, reference=lambda batch: None)
    with pytest.raises(ValueError, match="give base"):
        Watch(full, stats())


def test_a_base_of_the_caller_s() -> None:
    """Full fine-tuning from given references: the base model's hidden states of the sampled rows."""
    base, batch = tiny.llama(), tiny.batches(1, size=4)[0]
    with torch.no_grad():
        z = DICTIONARY.plan.encode(tiny.hidden_states(base, batch))
    found = []
    for given in (True, False):
        net = tiny.llama().train()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        asked = []

        def hidden(rows: dict) -> torch.Tensor:
            asked.append(len(rows["input_ids"]))
            return tiny.hidden_states(base, rows)

        handle = attach(net, DICTIONARY.plan, lam=1.0,
                        reference=(lambda b: z) if given else base, tolerance=math.inf)
        watch = Watch(handle, stats(), share=0.5, together=1, min_tokens=1,
                      base=hidden if given else None)
        step_of(handle, net, [batch])
        found.append(watch.report())
        handle._steps = 0
        assert asked == ([len(watch._rows(batch["labels"]))] if given else [])
    assert found[0].delta == pytest.approx(found[1].delta, rel=1e-4, abs=1e-6)
    assert found[0].outside > 0


def test_freeze_above() -> None:
    net = model()
    batch, = tiny.batches(1)
    net(**batch).loss.backward()
    before = [p.clone() for p in net.parameters()]
    frozen = freeze_above(net, tiny.LAYER)
    assert len(frozen.names) == 14 and all("layers.2." in name for name in frozen.names)
    assert frozen.trainable == sum(p.numel() for p in trained(net))
    assert "14 parameters of the layers above frozen" in str(frozen)
    handle = attach(net, DICTIONARY.plan, lam=1.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    handle.begin_step([batch])
    (net(**batch).loss + handle.penalty(batch).loss).backward()
    optimizer.step()
    moved = {n for (n, p), b in zip(net.named_parameters(), before) if not torch.equal(p, b)}
    assert moved and not any("layers.2." in name for name in moved)
    # The base pass turns adapters off and on; they stay frozen.
    assert not any(p.requires_grad for n, p in net.named_parameters() if "layers.2." in n)
    frozen.undo()
    assert sum(p.requires_grad for n, p in net.named_parameters() if "layers.2." in n) == 14
    for layer, text in ((2, "nothing to freeze"), (7, "layer 7 does not exist")):
        with pytest.raises(ValueError, match=text):
            freeze_above(net, layer)
    only = tiny.llama().requires_grad_(False)
    only.model.layers[2].requires_grad_(True)
    with pytest.raises(ValueError, match="nothing would be left to train"):
        freeze_above(only, 1)


def test_what_is_frozen_stays_so_when_peft_turns_adapters_on_again() -> None:
    """peft's own context requires gradients of all active adapters when it ends."""
    net, (batch,) = model(), tiny.batches(1)
    optimizer = torch.optim.AdamW(trained(net), lr=0.1)
    frozen = freeze_above(net, tiny.LAYER)
    before = [p.clone() for p in frozen.parameters]

    def step() -> None:
        net(**batch).loss.backward()
        optimizer.step()

    step()
    with net.disable_adapter():
        net(**batch)
    assert all(p.requires_grad for p in frozen.parameters)
    step()
    assert all(map(torch.equal, frozen.parameters, before))
    frozen.undo()
    step()
    assert not any(map(torch.equal, frozen.parameters, before))


# On several ranks.


@pytest.fixture(scope="module")
def ranks() -> dict[str, dict]:
    """What two processes found."""
    names = "; ".join(parallel.WATCHES)
    return {name: test_parallel.run(names, 2)[name] for name in parallel.WATCHES}


def same_report(found: dict, want: dict) -> None:
    """That of several ranks, and after its state was loaded, is that of one process."""
    for i in range(2):
        assert found["tokens"][i] == want["tokens"][0] > 0
        for name in ("delta", "rise", "fall"):
            assert found[name][i] == pytest.approx(want[name][0], rel=1e-4, abs=1e-6)
        for row in (3, 7):  # the maxima
            assert found["sums"][i]["state"][row] == pytest.approx(
                want["sums"][0]["state"][row], rel=1e-4, abs=1e-6)
    assert np.abs(want["delta"][0]).max() > 1e-2


def test_ranks_with_different_rows_report_as_one(ranks: dict) -> None:
    found = ranks["watch, rows"]
    one = parallel.watched(parallel.step_of(2), parallel.model(), 1.0)
    same_report(found[1.0], parallel.of_report(one))
    # Sampled: every rank's own rows by the same draws, one after the other here.
    sums = parallel.watched(parallel.shards(2)[0], parallel.model(), 0.5)
    other = parallel.watched(parallel.shards(2)[1], parallel.model(), 0.5)
    sums.stats.merge(other.stats)
    assert sums._batch == other._batch == 2
    same_report(found[0.5], parallel.of_report(sums))
    assert found[0.5]["tokens"][0] < found[1.0]["tokens"][0]


@pytest.mark.parametrize("case", [case for case in parallel.WATCHES if case != "watch, rows"])
def test_ranks_that_share_rows_report_as_one(case: str, ranks: dict) -> None:
    local = lambda batch: parallel.padded(batch, 2)
    one = parallel.watched(parallel.step_of(2), parallel.model(), 0.5, local=local)
    if "given" not in case:
        want = parallel.moved_by(one, map(local, parallel.step_of(2)))
        assert ranks[case]["moved"] == pytest.approx(want, rel=1e-4, abs=1e-6)
        assert np.abs(want).max() > 1e-2
    same_report(ranks[case], parallel.of_report(one))


def test_ranks_swap_with_a_cache_that_they_share(ranks: dict) -> None:
    found = ranks["watch, rows"]
    first, second = found["said"]
    why = "ArgumentError: the batch has no input_ids, by which a cache knows its examples"
    assert first == why
    assert second == f"ArgumentError: the first rank could not fill the cache: {why}"
    handle = attach(parallel.model(), DICTIONARY.plan, lam=1.0)
    handle.swap(DICTIONARY.latents.union(blockem.Latents([2, 9], [1, -1])))
    step_of(handle, handle._model, parallel.step_of(2))
    assert found["metrics"] == pytest.approx(handle.metrics(per_latent=True), rel=1e-4, abs=1e-7)
    assert found["metrics"]["blockem/latent/2"] > 0 and found["metrics"]["blockem/penalty"] > 0


# In a trainer.


def test_a_trainer_watches_swaps_and_resumes(tmp_path: Path) -> None:
    known = blockem.Latents([1, 2, 4, 6, 8, 9, 10], [1, 1, 1, 1, 1, 1, 1])

    def make(rewind: int = 0) -> torch.nn.Module:
        return test_trainer.trainer(
            test_trainer.BlockedTrainer, tmp_path,
            penalty=dict(plan=DICTIONARY.plan, lam=DualAscent(1e-4, rate=20.0, initial=0.01)),
            watch=dict(stats=stats(), share=0.5, together=1, min_tokens=1, known=known,
                       rule=AlarmRule(outside_ratio=None, known_overlap=0.2, least=0, patience=1)),
            adaptive=dict(top=1, cooldown=2, rewind=rewind),
            args={"save_strategy": "steps", "save_steps": 3, "max_steps": 7})

    whole = make()
    whole.train()
    versions = test_trainer.logged(whole, "blockem/latents_version")
    assert versions[0] == 0 and versions[-1] >= 2 and len(whole.adaptive.swaps) >= 2
    assert len(test_trainer.logged(whole, "blockem/watch/outside")) >= 5
    folder = tmp_path / "checkpoint-3"
    assert json.loads((folder / "blockem.json").read_text())["sites"][0]["latents_version"] >= 1
    resumed = make()
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.adaptive.swaps == whole.adaptive.swaps
    for name in ("penalty", "lambda", "latents_version", "watch/outside", "watch/known",
                 "watch/tokens", "watch/alarm"):
        name = f"blockem/{name}"
        assert test_trainer.logged(resumed, name) == test_trainer.logged(whole, name), name
    (folder / "blockem_watch.pt").unlink()
    with pytest.raises(FileNotFoundError, match="blockem_watch.pt"):
        make().train(resume_from_checkpoint=str(folder))
    back = make(rewind=1)
    assert back.adaptive.optimizer is None
    back.train()
    swap = back.adaptive.swaps[0]
    assert swap.rewound_to is not None and swap.rewound_to <= swap.step - 1
    assert isinstance(back.adaptive.optimizer, torch.optim.Optimizer)


def test_a_resumed_trainer_goes_back_to_before_its_checkpoint(tmp_path: Path) -> None:
    """In the middle of an alarm's patience, to where the whole run went."""
    known = blockem.Latents([1, 2, 4, 6, 8, 9, 10], [1] * 7)

    def make() -> test_trainer.BlockedTrainer:
        return test_trainer.trainer(
            test_trainer.BlockedTrainer, tmp_path, penalty=dict(plan=DICTIONARY.plan, lam=1.0),
            watch=dict(stats=stats(), share=1, min_tokens=1, memory=0, known=known,
                       rule=AlarmRule(outside_ratio=None, known_overlap=0.2, least=0, patience=4)),
            adaptive=dict(top=1, cooldown=0, rewind=1),
            args={"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch",
                  "learning_rate": 1e-3})

    whole, resumed = make(), make()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.adaptive.swaps == whole.adaptive.swaps
    swap = whole.adaptive.swaps[0]
    assert swap.rewound_to == 1 and swap.step > 3
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
