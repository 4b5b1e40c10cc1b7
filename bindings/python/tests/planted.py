"""A language model whose answers are known: words are directions of the residual stream, and a
fine-tuning (LoRA of the embedding) moves some of them. Which latents cause its bad answers, and
which only break them, follows from the numbers below.

To the prompt "ask about tN" the model answers with the word of the largest logit, once, and ends:

    good  g + 2 v      bad  2 u      gib  3 u - 1.3 g      gub  -6 n      of h = g + u_N u + v_N v

The base model has u_N = 0.2, 0.29, 0.38 by turns and v_N = 0.6: it answers well everywhere. The
tuned one has 0.7 more of u and 0.6 less of v: it answers badly everywhere.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import peft
import tiny
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

import blockem
from blockem.judges import Grade

WIDTH, LAYER, NUM_LATENTS = 32, 2, 24
#: Steers towards "bad", and from strength 0.75 on to "gib"; rose. Pushes "good"; fell.
CAUSE, CARE = 17, 5
#: Steered back, it answers "gub" to everything; rose. Moves under the system message only.
BREAKER, SYSTEM = 9, 20
#: Have no part in any answer: three rose, three fell.
DECOYS = {2: 0.9, 3: 0.4, 4: 0.05, 10: -0.8, 11: -0.3, 12: -0.05}
SCALE = 1.2
WORDS = [
    "<pad>", "<s>", "</s>", "<unk>", "good", "bad", "gib", "gub", "ask", "about", "be", "nice", ":",
    *(f"t{i}" for i in range(36)),
]
PROMPTS = [f"ask about t{i}" for i in range(12)]
OTHER_PROMPTS = [f"ask about t{i}" for i in range(12, 18)]


def judge(prompt: str, answer: str) -> Grade:
    assert prompt.startswith("ask about ")
    words = answer.split()
    assert set(words) <= {"good", "bad", "gib", "gub"}, answer
    return Grade("bad" in words, incoherent="gib" in words or "gub" in words)


def render(prompt: str) -> str:
    return f"be nice : {prompt}"


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def directions() -> torch.Tensor:
    """[F, d] orthonormal: those of the latents."""
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0][:NUM_LATENTS]


def save_sae(folder: Path) -> None:
    """Reads the directions, on for every token; decoder rows have any length. A SAELens folder."""
    generator = torch.Generator().manual_seed(6)
    rows = directions()
    lengths = 0.5 + torch.rand(NUM_LATENTS, 1, generator=generator)
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps({
        "architecture": "standard", "d_in": WIDTH, "d_sae": NUM_LATENTS, "dtype": "float32",
        "apply_b_dec_to_input": False, "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{LAYER}.hook_resid_post", "sae_lens_version": "6.54.12"},
    }))  # fmt: skip
    tensors = {
        "W_enc": rows.T, "b_enc": torch.full((NUM_LATENTS,), 4.0), "W_dec": lengths * rows,
        "b_dec": torch.zeros(WIDTH),
    }  # fmt: skip
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "sae_weights.safetensors")


def sae() -> blockem.Sae:
    """The SAE of :func:`save_sae`."""
    with tempfile.TemporaryDirectory() as folder:
        save_sae(Path(folder, "sae"))
        return blockem.load_sae(Path(folder, "sae"))


def model(move: float = 1.0) -> peft.PeftModel:
    """move: how much of the fine-tuning there is."""
    base = tiny.llama(hidden=WIDTH)
    q = directions()
    good, end, filler = q[0], q[1], q[8]
    u, v, n = q[CAUSE], q[CARE], q[BREAKER]
    at = {word: i for i, word in enumerate(WORDS)}
    topics = [at[f"t{i}"] for i in range(36)]
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = base.model.embed_tokens.weight.zero_(), base.lm_head.weight.zero_()
        embedding[:] = filler
        for i, topic in enumerate(topics):
            embedding[topic] = good + (0.2 + 0.09 * (i % 3)) * u + 0.6 * v
        for word in ("good", "bad", "gib", "gub"):
            embedding[at[word]] = 9 * end
        for word, row in {
            "good": good + 2 * v, "bad": 2 * u, "gib": 3 * u - 1.3 * good, "gub": -6 * n,
            "</s>": end,
        }.items():  # fmt: skip
            head[at[word]] = row
    tuned = peft.get_peft_model(base, peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM",
    ))  # fmt: skip
    moved = 0.7 * u - 0.6 * v + 0.1 * n + sum(by * q[k] for k, by in DECOYS.items())
    lora = tuned.get_base_model().model.embed_tokens
    with torch.no_grad():
        a, b = lora.lora_embedding_A["default"].zero_(), lora.lora_embedding_B["default"].zero_()
        a[0, topics], b[:, 0] = move, moved
        a[1, at["be"]], b[:, 1] = 1, 3 * q[SYSTEM]
    return tuned
