"""LoRA fine-tuning of a small language model with the penalty in the loop, in JAX.

A causal transformer (equinox) learns one made-up language and is then fine-tuned on another by LoRA
adapters (optax): once plain, once with BLOCK-EM's penalty on the latents that rose or fell most
under plain fine-tuning. The dictionary has random rows; put your SAE there.

    python examples/jax/lora.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import blockem
import blockem.jax

VOCABULARY, WIDTH, HEADS, BLOCKS, RANK = 64, 64, 4, 3, 4
#: The decoder block whose output the SAE reads.
LAYER = 1
SENTENCES, LENGTH = 16, 24
#: The first token of a sentence cannot be predicted.
PROMPT = 1
LATENTS, BLOCKED = 256, 12


class Linear(eqx.Module):
    """x W^T, and with adapters x (W + B A)^T."""

    weight: jax.Array
    down: jax.Array | None = None
    up: jax.Array | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.weight.T
        return y if self.down is None else y + (x @ self.down.T) @ self.up.T

    @staticmethod
    def random(key: jax.Array, inputs: int, outputs: int) -> Linear:
        return Linear(jax.random.normal(key, (outputs, inputs)) / np.sqrt(inputs))


class Block(eqx.Module):
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        self.qkv = Linear.random(keys[0], WIDTH, 3 * WIDTH)
        self.out = Linear.random(keys[1], WIDTH, WIDTH)
        self.up = Linear.random(keys[2], WIDTH, 2 * WIDTH)
        self.down = Linear.random(keys[3], 2 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, d] to [T, d]."""
        split = self.qkv(norm(x)).reshape(len(x), 3, HEADS, WIDTH // HEADS)
        seen = jax.nn.dot_product_attention(*jnp.moveaxis(split, 1, 0), is_causal=True)
        x = x + self.out(seen.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(norm(x))))


class Model(eqx.Module):
    embedding: jax.Array
    positions: jax.Array
    blocks: list[Block]
    head: Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, BLOCKS + 3)
        self.embedding = jax.random.normal(keys[0], (VOCABULARY, WIDTH))
        self.positions = 0.1 * jax.random.normal(keys[1], (LENGTH, WIDTH))
        self.blocks = [Block(key) for key in keys[3:]]
        self.head = Linear.random(keys[2], WIDTH, VOCABULARY)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [T, V], and what the SAE reads: the output [T, d] of block LAYER."""
        x = self.embedding[tokens] + self.positions
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == LAYER:
                hidden = x
        return self.head(norm(x)), hidden


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def sentences(seed: int, factor: int, shift: int, steps: int) -> jax.Array:
    """[steps, B, T]: the next token is factor * token + shift, one time in ten any."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCABULARY, size=(steps, SENTENCES, LENGTH))
    noise = rng.random(tokens.shape) < 0.1
    for t in range(1, LENGTH):
        following = (factor * tokens[..., t - 1] + shift) % VOCABULARY
        tokens[..., t] = np.where(noise[..., t], tokens[..., t], following)
    return jnp.asarray(tokens, jnp.int32)


def task_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def pretrain(model: Model, steps: int = 250) -> Model:
    optimizer = optax.adam(3e-3)

    @eqx.filter_value_and_grad
    def loss(model: Model, tokens: jax.Array) -> jax.Array:
        return task_loss(jax.vmap(model)(tokens)[0], tokens)

    @eqx.filter_jit
    def step(model: Model, state: optax.OptState, tokens: jax.Array) -> tuple:
        value, grads = loss(model, tokens)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state, value

    state = optimizer.init(model)
    for tokens in sentences(1, factor=3, shift=1, steps=steps):
        model, state, value = step(model, state, tokens)
    print(f"base model after {steps} steps: loss {value:.3f}")
    return model


def with_adapters(model: Model, key: jax.Array) -> Model:
    """Adapters on every block's matrices; B is 0, so that the model is still its base."""

    def adapted(layer: Linear, key: jax.Array) -> Linear:
        outputs, inputs = layer.weight.shape
        down = jax.random.normal(key, (RANK, inputs)) / np.sqrt(inputs)
        return Linear(layer.weight, down, jnp.zeros((outputs, RANK)))

    def layers(model: Model) -> list[Linear]:
        return [x for b in model.blocks for x in (b.qkv, b.out, b.up, b.down)]

    keys = jax.random.split(key, 4 * BLOCKS)
    return eqx.tree_at(layers, model, [adapted(x, k) for x, k in zip(layers(model), keys)])


def adapters(model: Model) -> Model:
    """True at what fine-tuning trains."""
    frozen = jax.tree.map(lambda _: False, model)
    trained = lambda m: [x for b in m.blocks for y in (b.qkv, b.out, b.up, b.down)
                         for x in (y.down, y.up)]
    return eqx.tree_at(trained, frozen, replace_fn=lambda _: True)


class Run(NamedTuple):
    model: Model
    losses: np.ndarray
    penalties: np.ndarray


#: hidden [B, T, d], reference [B, T, K] and mask [B, T] to loss_sum and count.
Penalty = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def finetune(
    base: Model,
    batches: jax.Array,
    encode: Callable[[jax.Array], jax.Array],
    penalty: Penalty,
    lam: float,
) -> Run:
    """LoRA fine-tuning on [steps, B, T], with lam times the penalty on the tokens of the answer."""
    model = with_adapters(base, jax.random.key(2))
    trained, frozen = eqx.partition(model, adapters(model))
    optimizer = optax.adam(3e-3)
    mask = jnp.broadcast_to(jnp.arange(LENGTH) >= PROMPT, batches.shape[1:])

    @eqx.filter_jit
    def reference_of(tokens: jax.Array) -> jax.Array:
        return encode(jax.vmap(base)(tokens)[1])

    @eqx.filter_jit
    def step(
        trained: Model, state: optax.OptState, tokens: jax.Array, reference: jax.Array
    ) -> tuple:
        def loss(trained: Model) -> tuple[jax.Array, tuple]:
            logits, hidden = jax.vmap(eqx.combine(trained, frozen))(tokens)
            loss_sum, count = penalty(hidden, reference, mask)
            task = task_loss(logits, tokens)
            return task + lam * loss_sum / count, (task, loss_sum / count)

        grads, values = jax.grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(trained, updates), state, values

    state, values = optimizer.init(trained), []
    for tokens in batches:
        trained, state, value = step(trained, state, tokens, reference_of(tokens))
        values.append(value)
    losses, penalties = np.array(values).T
    return Run(eqx.combine(trained, frozen), losses, penalties)


def dictionary() -> dict[str, np.ndarray]:
    """Encoder rows [F, d] and biases [F] of random directions: most latents are mostly off."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((LATENTS, WIDTH)).astype(np.float32) / np.sqrt(WIDTH)
    return {"encoder_weight": rows, "encoder_bias": np.full(LATENTS, -0.5, np.float32)}


def moved_most(sae: blockem.Sae, base: Model, tuned: Model, tokens: jax.Array) -> blockem.Latents:
    """K+: the latents that rose most under fine-tuning; K-: those that fell most."""
    everything = blockem.Plan(sae, blockem.Latents(np.arange(LATENTS), np.ones(LATENTS, int)))
    means = [
        np.asarray(blockem.jax.encode(everything, jax.vmap(model)(tokens)[1])).mean((0, 1))
        for model in (base, tuned)
    ]
    order = np.argsort(means[0] - means[1])
    ids = np.concatenate([order[: BLOCKED // 2], order[-(BLOCKED // 2) :]])
    return blockem.Latents(ids, np.repeat([1, -1], BLOCKED // 2))


def main(steps: int = 150, lam: float = 30.0) -> None:
    base = pretrain(Model(jax.random.key(0)))
    batches = sentences(4, factor=5, shift=2, steps=steps)
    sae = blockem.Sae.from_tensors(**dictionary(), encoder_layout="f_d")

    # Plain fine-tuning shows which latents move; only then is there something to block.
    def none(hidden: jax.Array, reference: jax.Array, mask: jax.Array) -> tuple:
        return jnp.zeros(()), mask.sum()

    scout = finetune(base, batches, lambda hidden: hidden[..., :0], none, 0.0)
    plan = blockem.Plan(sae, moved_most(sae, base, scout.model, batches[-1]))
    print(plan)

    encode = lambda hidden: blockem.jax.encode(plan, hidden)
    penalty = lambda *arrays: blockem.jax.penalty(plan, *arrays)
    runs = {
        "plain": finetune(base, batches, encode, penalty, 0.0),
        "blocked": finetune(base, batches, encode, penalty, lam),
    }
    print(f"{'':8} {'loss':>15} {'penalty':>17}")
    for name, run in runs.items():
        print(f"{name:8} {run.losses[0]:6.3f} -> {run.losses[-1]:5.3f} "
              f"{run.penalties[0]:6.4f} -> {run.penalties[-1]:6.4f}")


if __name__ == "__main__":
    main()
