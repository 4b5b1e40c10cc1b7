"""Reference caches: the bits of encoding again, through padding, packing, adapters and growth."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import blockem

BASE = "tiny llama, seed 0"
D, LAYER = 16, 1


@contextmanager
def raises(name: str, text: str) -> Iterator[None]:
    with pytest.raises(blockem.Error, match=text) as info:
        yield
    assert info.value.name == name


def make_plan(
    ids: list[int], seed: int = 0, hook: str = f"blocks.{LAYER}.hook_resid_post", **options: object
) -> blockem.Plan:
    rng = torch.Generator().manual_seed(seed)
    sae = blockem.Sae.from_tensors(
        encoder_weight=torch.randn(64, D, generator=rng),
        encoder_bias=torch.randn(64, generator=rng),
        hook_name=hook,
    )
    return blockem.Plan(sae, blockem.Latents(ids, [1] * len(ids)), **options)


@pytest.fixture
def plan() -> blockem.Plan:
    return make_plan([3, 17, 40])


def open_cache(path: Path, plan: blockem.Plan, mode: str = "create", **other: object) -> blockem.Cache:
    options = {"base_model": BASE, "dtype": "float32", "mode": mode} | other
    return blockem.Cache(path / "base.cache", plan, **options)


def llama(**config: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=D, intermediate_size=24, **(small | config))
    )


def live(model: nn.Module, plan: blockem.Plan, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """z of a whole forward pass, by Hugging Face's own hidden states."""
    model.eval()
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[LAYER + 1]
    return plan.encode(hidden)


def padded(lengths: list[int], seed: int = 1, left: bool = False) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, 50, (len(lengths), width), generator=rng)
    at = torch.arange(width)
    n = torch.tensor(lengths)[:, None]
    mask = at >= width - n if left else at < n
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.clone()}


def rows(z: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    return [z[i, :n] for i, n in enumerate(lengths)]


def test_what_is_put_comes_back(tmp_path: Path, plan: blockem.Plan) -> None:
    hidden = np.random.default_rng(0).standard_normal((7, D)).astype(np.float32)
    z = plan.encode(hidden)
    with open_cache(tmp_path, plan) as cache:
        key = cache.key([5, 6, 7, 8, 9, 10, 11])
        assert key == cache.key(torch.arange(5, 12), np.arange(7)) and len(key) == 32
        assert key != cache.key([5, 6, 7, 8, 9, 10, 12])
        assert cache.missing([key]).all() and len(cache) == 0
        assert cache.put([key], [z]) == 3
        assert cache.put([key], [torch.zeros(7, 3)]) == 0
        assert not cache.missing([key]).any() and len(cache) == 1
        out = np.full((3, 8), np.nan, np.float32).T  # [8, 3], columns dense
        cache.get([key], [out[:7]])
        np.testing.assert_array_equal(out[:7], z)
        assert np.isnan(out[7]).all()
        assert "1 examples" in repr(cache)
    assert "closed" in repr(cache)
    with raises("INVALID_ARGUMENT", "closed"):
        len(cache)
    again = open_cache(tmp_path, plan, "read", base_model=None, dtype=None)
    assert (again.base_model, again.layer, again.dtype) == (BASE, LAYER, "float32")
    assert again.numerics == plan.numerics


def test_refusals(tmp_path: Path, plan: blockem.Plan) -> None:
    with pytest.raises(OSError, match="base.cache"):
        open_cache(tmp_path, plan, "read")
    with raises("INVALID_ARGUMENT", "base_model"):
        open_cache(tmp_path, plan, base_model=None)
    with raises("INVALID_ARGUMENT", "mode is 'append'"):
        open_cache(tmp_path, plan, "append")
    with raises("INVALID_ARGUMENT", "dtype is 'int8'"):
        open_cache(tmp_path, plan, dtype="int8")
    with raises("INVALID_ARGUMENT", "layer is 7.*layer 1"):
        open_cache(tmp_path, plan, layer=7)
    with open_cache(tmp_path, plan, dtype=torch.float32) as cache:
        with raises("CACHE_BUSY", "in use"):
            open_cache(tmp_path, plan, "read")
        with pytest.raises(TypeError, match=r"keys\[1\] is no key"):
            cache.missing([bytes(32), "key"])
        with raises("SHAPE", "1 keys and 0 arrays"):
            cache.put([bytes(32)], [])
        with raises("SHAPE", r"expected \[T, 3\]"):
            cache.put([bytes(32)], [np.zeros((2, 4), np.float32)])
        with raises("DTYPE", "float64"):
            cache.put([bytes(32)], [np.zeros((2, 3))])
        with raises("LAYOUT", "negative"):
            cache.put([bytes(32)], [np.zeros((2, 3), np.float32)[::-1]])
        with raises("NON_FINITE", "token 1, column 2"):
            cache.put([bytes(32)], [torch.tensor([[0, 0, 0], [0, 0, torch.nan]])])
        with pytest.raises(TypeError, match="whole numbers"):
            cache.key([1.5])
        with pytest.raises(TypeError, match="open it in each process"):
            pickle.dumps(cache)
        cache.put([bytes(32)], [torch.ones(1, 3)])
        with raises("CACHE_MISS", "example 0 .key 0101.*Run the base model"):
            cache.get([b"\1" * 32], [torch.ones(1, 3)])
        frozen = np.zeros((1, 3), np.float32)
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            cache.get([bytes(32)], [frozen])
    for stale in ({"base_model": "seed 1"}, {"dtype": "bfloat16"}):
        with raises("CACHE_STALE", "expected"):
            open_cache(tmp_path, plan, "read", **stale)
    with raises("CACHE_STALE", "reference-1"):
        open_cache(tmp_path, make_plan([3], backend="reference"), "read")
    with raises("CACHE_STALE", "another SAE"):
        open_cache(tmp_path, make_plan([3, 17, 40], seed=9), "read")


def test_fill_has_the_bits_of_a_whole_forward_pass(tmp_path: Path, plan: blockem.Plan) -> None:
    model, lengths = llama(), [9, 4, 7]
    batch = padded(lengths)
    model.train()
    passes = []
    model.model.layers[2].register_forward_hook(lambda *_: passes.append(1))
    with open_cache(tmp_path, plan) as cache:
        assert cache.fill(model, [batch], progress=False) == 3
        assert not passes, "the pass went on after the layer"
        assert all(m.training for m in model.modules())
        assert cache.fill(model, [batch], progress=False) == 0
    cache = open_cache(tmp_path, plan, "read")
    reference = cache.reference(batch)
    expected = live(model, plan, batch)
    for got, want in zip(rows(reference, lengths), rows(expected, lengths), strict=True):
        assert torch.equal(got, want)
    assert reference[1, 4:].eq(0).all() and reference[2, 7:].eq(0).all()

    # The same examples in another batch, order and padding.
    other = {name: torch.cat([x[[2, 0]], torch.zeros(2, 3, dtype=x.dtype)], 1) for name, x in batch.items()}
    again = cache.reference(other)
    assert torch.equal(again[0, :7], reference[2, :7]) and torch.equal(again[1, :9], reference[0])


def test_a_cache_has_the_site_that_the_sae_reads(tmp_path: Path, plan: blockem.Plan) -> None:
    sites = {
        "mlp_output": ("blocks.1.hook_mlp_out", 1),
        "attention_z": ("blocks.1.attn.hook_z", 1),
        "embedding": ("blocks.0.hook_resid_pre", None),
    }
    for site, (hook, layer) in sites.items():
        folder = tmp_path / site
        folder.mkdir()
        reads = make_plan([3, 17, 40], hook=hook)
        with open_cache(folder, reads) as cache:
            assert (cache.site, cache.layer) == (site, layer) and site in repr(cache)
            with raises("CACHE_STALE", f"site '{site}', expected 'block_output'"):
                cache.use(plan)
        with raises("CACHE_STALE", f"site '{site}', expected 'block_output'"):
            open_cache(folder, plan, "read")
        with raises("INVALID_ARGUMENT", f"site is mlp_input, and the plan's SAE reads {site}"):
            open_cache(folder, reads, "read", site="mlp_input")
        assert open_cache(folder, reads, "read", site=site).site == site
    with raises("INVALID_ARGUMENT", "site is 'the moon'"):
        open_cache(tmp_path, plan, site="the moon")


def test_fill_goes_on_where_it_was(tmp_path: Path, plan: blockem.Plan) -> None:
    model = llama()
    batches = [padded([5, 3], seed=s) for s in range(4)]

    def interrupted() -> Iterator[dict]:
        yield from batches[:2]
        raise KeyboardInterrupt

    cache = open_cache(tmp_path, plan)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(model, interrupted(), progress=False)
    assert len(cache) == 4
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    assert cache.fill(model, batches, progress=False) == 4
    assert seen == [2, 2], "only the examples that were not there were run"


def test_growth_runs_what_is_missing(tmp_path: Path, plan: blockem.Plan) -> None:
    model, batch = llama(), padded([6, 6])
    with open_cache(tmp_path, plan) as cache:
        cache.fill(model, [batch], progress=False)
    more = make_plan([40, 5, 3])
    with open_cache(tmp_path, more, "write") as cache:
        with raises("CACHE_MISS", "lacks z of the latents 5; 2 of the 2"):
            cache.reference(batch)
        assert cache.fill(model, [batch], progress=False) == 2
        assert torch.equal(cache.reference(batch), live(model, more, batch))


def test_left_padding_and_positions_are_other_examples(tmp_path: Path, plan: blockem.Plan) -> None:
    model = llama()
    right, left = padded([3, 6]), padded([3, 6], left=True)
    left["input_ids"][0, 3:] = right["input_ids"][0, :3]
    with open_cache(tmp_path, plan) as cache:
        cache.fill(model, [right], progress=False)
        with raises("CACHE_MISS", "positions"):
            cache.reference(left)
        # With positions as in the row that was filled it is the same example.
        places = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        left["input_ids"][1] = right["input_ids"][1]
        z = cache.reference(left | {"position_ids": places})
        assert torch.equal(z[0, 3:], cache.reference(right)[0, :3]) and z[0, :3].eq(0).all()


def test_padding_between_tokens(tmp_path: Path, plan: blockem.Plan) -> None:
    batch = padded([6, 4])
    batch["attention_mask"][0, 2:4] = 0
    with open_cache(tmp_path, plan) as cache:
        cache.fill(llama(), [batch], progress=False)
        z = cache.reference(batch)
    expected = live(llama(), plan, batch)
    kept = batch["attention_mask"].bool()
    assert torch.equal(z[kept], expected[kept]) and z[~kept].eq(0).all()


def test_packed_rows(tmp_path: Path, plan: blockem.Plan) -> None:
    model, lengths = llama(), [4, 2]
    apart = padded(lengths)
    ids = torch.cat([apart["input_ids"][0, :4], apart["input_ids"][1, :2]])[None]
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]])}
    with open_cache(tmp_path, plan) as cache:
        cache.fill(model, [apart], progress=False)
        z = cache.reference(packed, packed=True)
        assert torch.equal(z[0, :4], cache.reference(apart)[0])
        assert torch.equal(z[0, 4:], cache.reference(apart)[1, :2])
        with raises("CACHE_MISS", "positions"):
            cache.reference(packed)
        with raises("INVALID_ARGUMENT", "position_ids"):
            cache.reference(apart, packed=True)


def test_adapters_are_off(tmp_path: Path, plan: blockem.Plan) -> None:
    from peft import LoraConfig, get_peft_model

    base, batch = llama(), padded([5, 5])
    expected, digest = live(base, plan, batch), blockem.base_model_digest(base)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], lora_dropout=0.5
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with open_cache(tmp_path, plan, base_model=digest) as cache:
        cache.fill(model, [batch], progress=False)
        assert torch.equal(cache.reference(batch), expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert not torch.equal(live(model, plan, batch), expected), "the adapters do nothing"
    assert blockem.base_model_digest(model) == digest


def test_digest_of_a_base_model() -> None:
    digest = blockem.base_model_digest(llama())
    assert digest == blockem.base_model_digest(llama()) and len(digest) == 64
    changed = llama()
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    others = [changed, llama().bfloat16(), llama(num_hidden_layers=2)]
    assert digest not in map(blockem.base_model_digest, others)
    with raises("INVALID_ARGUMENT", "meta"):
        blockem.base_model_digest(llama().to("meta"))


def test_hidden_of_another_dtype_is_refused(tmp_path: Path, plan: blockem.Plan) -> None:
    batch = padded([4])
    with open_cache(tmp_path, plan) as cache:
        with raises("CACHE_STALE", "bfloat16.*float32"):
            cache.fill(llama().bfloat16(), [batch], progress=False)
        with raises("INVALID_ARGUMENT", "name the list"):
            cache.fill(nn.Linear(2, 2), [batch], progress=False)
        assert len(cache) == 0


def test_bfloat16(tmp_path: Path, plan: blockem.Plan) -> None:
    model, batch = llama().bfloat16(), padded([6, 6])
    with open_cache(tmp_path, plan, dtype=torch.bfloat16) as cache:
        cache.fill(model, [batch], progress=False)
        assert torch.equal(cache.reference(batch), live(model, plan, batch))


def test_progress(tmp_path: Path, plan: blockem.Plan, capfd: pytest.CaptureFixture) -> None:
    with open_cache(tmp_path, plan) as cache:
        cache.fill(llama(), [padded([4])] * 3)
    assert "reference cache" in capfd.readouterr().err


def test_processes(tmp_path: Path, plan: blockem.Plan) -> None:
    with open_cache(tmp_path, plan) as cache:
        cache.put([bytes(32)], [torch.ones(2, 3)])
    readers = [open_cache(tmp_path, plan, "read") for _ in range(2)]
    code = (
        "import blockem, torch, test_cache as t, pathlib, sys\n"
        "cache = t.open_cache(pathlib.Path(sys.argv[1]), t.make_plan([3, 17, 40]), 'read')\n"
        "out = torch.zeros(2, 3); cache.get([bytes(32)], [out]); assert out.eq(1).all()\n"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": path}
    )
    with raises("CACHE_BUSY", "in use"):
        open_cache(tmp_path, plan, "write")

    pid = os.fork()
    if pid == 0:
        # A child of fork is refused, and opens its own.
        try:
            readers[0].get([bytes(32)], [torch.zeros(2, 3)])
        except blockem.Error as error:
            out = torch.zeros(2, 3)
            open_cache(tmp_path, plan, "read").get([bytes(32)], [out])
            os._exit(0 if error.name == "FORKED" and out.eq(1).all() else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    readers[1].get([bytes(32)], [torch.zeros(2, 3)])


def test_training_from_the_cache_follows_training_with_a_base_pass(tmp_path: Path) -> None:
    """The penalty of every step is that of autograd with a live base, with no base pass at all."""
    import tiny

    dictionary, lam = tiny.Dictionary(), 0.05
    steps = [tiny.batches(2, seed=i) for i in range(6)]

    def sgd(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.3)

    want = tiny.reference_training(
        tiny.with_lora(tiny.llama()), dictionary, steps, lam, sgd
    )
    cache = open_cache(tmp_path, dictionary.plan)
    assert cache.fill(tiny.llama(), [batch for step in steps for batch in step], progress=False)
    model = tiny.with_lora(tiny.llama()).train()
    handle = blockem.torch.attach(
        model, dictionary.plan, lam=lam, reference=cache.reference, tolerance=1e-4
    )
    bases = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: bases.append(1))
    found = tiny.attached_training(model, handle, steps, sgd)
    assert max(want) > 1e-4
    assert found == pytest.approx(want, rel=1e-3, abs=1e-7)
    # Each batch once, and the self-check's pass.
    assert len(bases) <= 2 * len(steps) + 1
    handle.remove()
    cache.close()
