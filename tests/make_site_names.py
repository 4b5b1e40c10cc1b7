"""Writes tests/data/sites.json: what TransformerLens' hooks read, found by their values.

For small models of four families, every hook of TransformerLens' bridge that fires is compared with
what Hugging Face's own modules take in and put out; the file says which of the sites (src/sae/site.rs)
has the same values. An empty list: none of them.

    .venv/bin/python tests/make_site_names.py

Made with transformer-lens 3.9.0 and transformers 5.23.0.
"""

import json
import warnings
from pathlib import Path

import torch
import transformers
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

OUT = Path(__file__).resolve().parent / "data" / "sites.json"
LAYERS, WIDTH = 2, 12
COMMON = dict(vocab_size=32, hidden_size=WIDTH, intermediate_size=20, num_hidden_layers=LAYERS)
HEADS = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=10)


def models() -> dict[str, torch.nn.Module]:
    t = transformers
    return {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**COMMON, **HEADS)),
        "gemma2": t.Gemma2ForCausalLM(t.Gemma2Config(**COMMON, **HEADS)),
        "olmo2": t.Olmo2ForCausalLM(t.Olmo2Config(**COMMON, num_attention_heads=2)),
        "gpt2": t.GPT2LMHeadModel(t.GPT2Config(vocab_size=32, n_embd=WIDTH, n_layer=LAYERS, n_head=2)),
    }


# Of each family: the blocks, the attention with its output projection, keys and values, the MLP with
# its last linear layer, the norms before both, those after both.
PARTS = {
    "llama": ("model.layers", "self_attn", "o_proj", "mlp", "down_proj",
              ("input_layernorm", "post_attention_layernorm"), ()),
    "gemma2": ("model.layers", "self_attn", "o_proj", "mlp", "down_proj",
               ("input_layernorm", "pre_feedforward_layernorm"),
               ("post_attention_layernorm", "post_feedforward_layernorm")),
    "olmo2": ("model.layers", "self_attn", "o_proj", "mlp", "down_proj", (),
              ("post_attention_layernorm", "post_feedforward_layernorm")),
    "gpt2": ("transformer.h", "attn", "c_proj", "mlp", "c_proj", ("ln_1", "ln_2"), ()),
}  # fmt: skip


def taken(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The input and the output of every module."""
    seen, first = {}, lambda x: x[0] if isinstance(x, tuple) else x

    def keep(name: str):
        def hook(_, args, kwargs, out):
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(given, torch.Tensor) and isinstance(first(out), torch.Tensor):
                seen[name] = (given.detach().clone(), first(out).detach().clone())

        return hook

    hooks = [
        m.register_forward_hook(keep(n), with_kwargs=True) for n, m in model.named_modules() if n
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def sites(family: str, seen: dict) -> list[tuple[str, int | None, torch.Tensor]]:
    """What each site is, by its definition; a site may have two, before and after a norm."""
    blocks, attention, projection, mlp, down, before, after = PARTS[family]
    found = [("embedding", None, seen[f"{blocks}.0"][0])]
    embed = "transformer.wte" if family == "gpt2" else "model.embed_tokens"
    found.append(("embedding", None, seen[embed][1]))
    for n in range(LAYERS):
        of = lambda name, n=n: seen[f"{blocks}.{n}.{name}"]
        block_in, block_out = seen[f"{blocks}.{n}"]
        attended, computed = of(attention)[1], of(mlp)[1]
        added = of(after[0])[1] if after else attended
        found += [
            ("block_output", n, block_out),
            ("attention_output", n, attended), ("attention_output", n, added),
            ("mlp_output", n, computed), ("mlp_output", n, of(after[1])[1] if after else computed),
            ("block_middle", n, block_in + added),
            ("attention_z", n, of(f"{attention}.{projection}")[0]),
            ("attention_input", n, of(attention)[0]), ("mlp_input", n, of(mlp)[0]),
            ("linear_input", n, of(f"{mlp}.{down}")[0]),
            ("linear_input", n, of(attention)[0]), ("linear_input", n, of(mlp)[0]),
        ]  # fmt: skip
        if family == "gpt2":
            _, k, v = of("attn.c_attn")[1].split(WIDTH, dim=-1)
        else:
            k, v = of(f"{attention}.k_proj")[1], of(f"{attention}.v_proj")[1]
        found += [("keys", n, k), ("values", n, v)]
        found += [("norm_output", n, normalized(family, of(norm)[0])) for norm in (*before, *after)]
    final = "transformer.ln_f" if family == "gpt2" else "model.norm"
    return [*found, ("norm_output", None, normalized(family, seen[final][0]))]


def normalized(family: str, x: torch.Tensor) -> torch.Tensor:
    """Before the norm's weight and bias."""
    x = x - x.mean(-1, keepdim=True) if family == "gpt2" else x
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def main() -> None:
    warnings.simplefilter("ignore")
    ids = torch.arange(7)[None]
    names: dict[str, dict[str, list]] = {}
    for family, model in models().items():
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.4)
        known = sites(family, taken(model.eval(), ids))
        bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
        bridge.set_use_hook_mlp_in(True)
        _, cache = bridge.run_with_cache(ids)
        names[family] = {}
        for name, value in cache.items():
            if not name.startswith(("blocks.1.", "hook_", "embed.", "pos_", "ln_final")):
                continue
            flat = value.reshape(*value.shape[:2], -1).float()
            same = lambda at: at.shape == flat.shape and torch.allclose(at, flat, 1e-3, 2e-4)
            fits = sorted({(site, -1 if n is None else n) for site, n, at in known if same(at)})
            names[family][name] = [[site, None if n < 0 else n] for site, n in fits]
    lines = [
        f' "{family}": {{\n' + ",\n".join(f"  {json.dumps(n)}: {json.dumps(s)}" for n, s in of.items()) + "\n }"
        for family, of in names.items()
    ]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
