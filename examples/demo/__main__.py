"""The whole of BLOCK-EM's training stage on this machine: `make demo`.

Pretrains a small Llama, trains an SAE on its residual stream, fine-tunes it with LoRA on licence
texts, plain and with libblockem's penalty, and shows both runs side by side. Output: out/demo.
"""

import os

# Before torch: threads that wait do not spin, or a busy machine makes every step many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
import warnings
from pathlib import Path

try:
    import blockem
    import torch

    from . import corpus, drift, finetune, model, report
    from . import sae as sae_training
    from .progress import Phases
except ImportError as error:
    raise SystemExit(
        f"demo: {error}; run `make demo`, which installs requirements.txt and builds the library"
    ) from error

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft on transformers 5
OUT = Path(__file__).resolve().parents[2] / "out" / "demo"
SEED = 0
LAYER = model.LAYERS // 2  # 0-based: the output of the middle decoder block
K = 20
RATIO = 1.0  # lambda makes the plain run's drift cost RATIO times what tuning gains

PRETRAIN = dict(steps=800, batch=4, lr=2.5e-3)
SAE = dict(steps=500, batch=1024, lr=1e-3)
SAE_ROWS = 1200  # packed rows of pretraining text whose activations train the SAE
TUNE = dict(steps=150, batch=16, lr=4e-3)
TIMED_STEPS = 15
PROMPT = "This function returns"


def main() -> None:
    phases = Phases()
    OUT.mkdir(parents=True, exist_ok=True)
    print(f"libblockem demo: output in {OUT}, torch on {torch.get_num_threads()} threads")

    with phases("text and tokenizer"):
        texts = corpus.gather()
        print("   " + texts.describe())
        tokenizer = model.train_tokenizer(texts.general_train)
        rows = model.pack(tokenizer, texts.general_train)
        general = model.pack(tokenizer, texts.general_held)
        narrow = finetune.examples(tokenizer, texts.narrow_train)
        narrow_held = finetune.examples(tokenizer, texts.narrow_held)
        pad = tokenizer.pad_token_id
        # K is chosen on one half of the held-out texts and every figure comes from the other half.
        choose_on = finetune.batches(narrow_held[::2], 32, pad) + general_batches(general[::2])
        test_narrow = finetune.batches(narrow_held[1::2], 32, pad)
        test_general = general_batches(general[1::2])
        print(f"   {rows.numel()} tokens to pretrain on, {sum(map(len, narrow))} to fine-tune on")

    with phases("pretraining the base model"):
        base = model.new_model(tokenizer, SEED)
        print(
            f"   Llama: {model.LAYERS} blocks, width {model.WIDTH}, {base.num_parameters()} weights"
        )
        start_loss = model.mean_loss(base, general)
        pretrain_losses = model.pretrain(base, rows, seed=SEED, **PRETRAIN)
        held_loss = model.mean_loss(base, general)
        print(f"   held-out loss {start_loss:.3f} -> {held_loss:.3f}")
        print(f"   it writes: {model.write(base, tokenizer, PROMPT)}")

    with phases("training the SAE"):
        activations = sae_training.collect(base, LAYER, rows[:SAE_ROWS])
        sae = sae_training.train_and_save(activations, LAYER, OUT / "sae", seed=SEED, **SAE)
        held = sae_training.evaluate(sae, sae_training.collect(base, LAYER, general))
        del activations
        print(
            f"   saved by sae-lens to {OUT / 'sae'} "
            f"({sae.cfg.architecture()}, {sae.cfg.d_sae} latents)\n"
            f"   on held-out text: L0 {held.l0:.1f}, explained variance "
            f"{held.explained_variance:.3f}, {held.alive:.0%} of the latents fire"
        )

    with phases("plain LoRA fine-tuning"):
        plain = finetune.train(
            copy.deepcopy(base), narrow, LAYER, seed=SEED, blocking=None, **TUNE
        )
        plain.model.eval()

    with phases("choosing K and lambda from the plain run"):
        ids, signs = drift.top_movers(drift.measure(plain.model, LAYER, sae, choose_on), K)
        plan = make_plan(ids, signs)
        check_against_sae_lens(plan, sae, ids, model.hidden_states(base, LAYER, general[:32]))
        sample = finetune.batches(narrow[:64], 16, pad)
        gained = finetune.sft_loss(base, sample) - finetune.sft_loss(plain.model, sample)
        paid = finetune.penalty_of(plain.model, LAYER, plan, sample)
        if paid <= 0 or gained <= 0:
            raise SystemExit(
                f"demo: the plain run gained {gained} of SFT loss and moved K by {paid}; "
                "both must be above 0 to choose lambda"
            )
        lam = RATIO * gained / paid
        print(
            f"   K: {K} latents, {signs.count(1)} that rose (K_pos), {signs.count(-1)} that fell "
            f"(K_neg)\n   lambda = {RATIO:g} * {gained:.4f} (SFT loss that the plain run gained) / "
            f"{paid:.5f} (penalty that it would pay) = {lam:.4g}"
        )

    with phases("blocked LoRA fine-tuning"):
        blocked = finetune.train(
            copy.deepcopy(base), narrow, LAYER, seed=SEED,
            blocking=finetune.Blocking(plan, lam), **TUNE,
        )  # fmt: skip
        blocked.model.eval()
        if blocked.penalty[0] != 0.0:
            raise SystemExit(f"demo: the penalty at step 0 is {blocked.penalty[0]}, not exactly 0")
        print("   penalty at step 0, before any update: exactly 0")

    with phases("timing steps"):
        seconds = finetune.time_steps(
            copy.deepcopy(base), narrow, LAYER, seed=SEED,
            blocking=finetune.Blocking(plan, lam), **TUNE | {"steps": TIMED_STEPS},
        )  # fmt: skip

    with phases("measuring"):
        index, sign = torch.tensor(ids), torch.tensor(signs, dtype=torch.float32)
        measured = {
            name: report.measure_run(
                run, LAYER, sae, plan, index, sign, sample, test_narrow, test_general
            )
            for name, run in (("plain", plain), ("blocked", blocked))
        }
        summary = {
            "seed": SEED, "layer": LAYER, "lambda": lam, "ratio": RATIO,
            "library": blockem.__version__,
            "ids": ids, "signs": signs,
            "pretraining": {"held_loss_before": start_loss, "held_loss_after": held_loss},
            "sae": vars(held),
            "base": {
                "narrow_train_loss": finetune.sft_loss(base, sample),
                "narrow_held_loss": finetune.sft_loss(base, test_narrow),
                "general_held_loss": finetune.sft_loss(base, test_general),
            },
            **measured,
            "milliseconds": report.medians(seconds),
        }  # fmt: skip
    report.finish(summary, pretrain_losses, phases, OUT)


def general_batches(rows: torch.Tensor) -> list[finetune.Batch]:
    """Held-out general rows as data: every token but the first of a row counts."""
    labels = rows.clone()
    labels[:, 0] = finetune.IGNORED
    return [finetune.Batch(*part) for part in zip(rows.split(32), labels.split(32))]


def make_plan(ids: list[int], signs: list[int]) -> blockem.Plan:
    """Writes the authors' K0.json with its provenance and reads it back, as a trainer would."""
    path = OUT / "K0.json"
    sae = blockem.load_sae(OUT / "sae")
    latents = blockem.Latents(ids, signs)
    latents.save(path, plan=blockem.Plan(sae, latents))
    return blockem.Plan(sae, blockem.load_latents(path, sae), device="cpu")


def check_against_sae_lens(plan: blockem.Plan, sae, ids: list[int], hidden: torch.Tensor) -> None:
    """Both libraries read the same file: their latents must agree up to rounding."""
    ours, theirs = plan.encode(hidden), sae.encode(hidden)[..., ids]
    # A pre-activation within rounding of the threshold may open one gate and not the other.
    gates = ((ours > 0) != (theirs > 0)).sum().item()
    apart = (ours - theirs)[(ours > 0) == (theirs > 0)].abs().max().item()
    largest = theirs.abs().max().item()
    print(
        f"   blockem and sae-lens encode the same latents: largest difference {apart:.1e} "
        f"(largest latent {largest:.3g}), {gates} of {ours.numel()} gates differ"
    )
    if apart > 1e-4 * largest or gates > 1e-4 * ours.numel():
        raise SystemExit("demo: blockem's latents differ from those of sae-lens")


if __name__ == "__main__":
    main()
