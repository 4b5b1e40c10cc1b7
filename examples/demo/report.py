"""What both runs measured: the table, out/demo/summary.json and out/demo/demo.png."""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import torch

from . import drift, finetune

OURS = ("blockem: reference", "blockem: penalty", "blockem: gradient")
MOVERS = 20
PLAIN, BLOCKED, OTHER = "#c44e52", "#2a6fbb", "#9aa5b1"


def measure_run(run, layer, sae, plan, ids, signs, train_sample, narrow, general) -> dict:
    """Every figure of one run; `narrow` and `general` are texts that neither K nor tuning saw."""
    on_narrow = drift.measure(run.model, layer, sae, narrow)
    on_general = drift.measure(run.model, layer, sae, general)
    outside = on_narrow.outside(ids)
    return {
        "narrow_train_loss": finetune.sft_loss(run.model, train_sample),
        "narrow_held_loss": finetune.sft_loss(run.model, narrow),
        "general_held_loss": finetune.sft_loss(run.model, general),
        "K_on_narrow": on_narrow.blocked(ids, signs),
        "K_on_general": on_general.blocked(ids, signs),
        "K_shift_on_narrow": (signs * on_narrow.shift[ids]).tolist(),
        "outside_l2_on_narrow": outside.norm().item(),
        "outside_l2_on_general": on_general.outside(ids).norm().item(),
        "outside_largest_on_narrow": outside.abs().max().item(),
        "outside_movers_on_narrow": outside.abs().topk(MOVERS).indices.tolist(),
        "penalty_curve": finetune.penalty_curve(run, layer, plan, narrow),
        "sft_curve": run.sft,
    }


def medians(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each part of a step, for each kind of step."""
    return {
        kind: {part: 1e3 * statistics.median(values) for part, values in parts.items()}
        for kind, parts in seconds.items()
    }


def finish(summary: dict, pretrain_losses: list[float], phases, out: Path) -> None:
    summary["phases_seconds"] = phases.seconds
    summary["pretraining"]["losses"] = pretrain_losses
    _print_table(summary)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _plot(summary, pretrain_losses, out / "demo.png")
    print("\n== time by phase (wall s / CPU s)")
    for name, spent in phases.seconds.items():
        print(f"   {name:44s} {spent['wall']:7.1f} {spent['cpu']:7.1f}")
    total = {key: sum(s[key] for s in phases.seconds.values()) for key in ("wall", "cpu")}
    print(f"   {'total':44s} {total['wall']:7.1f} {total['cpu']:7.1f}")
    print(f"\nwrote demo.png, summary.json, K0.json and sae/ to {out}")


def _print_table(summary: dict) -> None:
    base, plain, blocked = summary["base"], summary["plain"], summary["blocked"]

    def line(label, plain_value, blocked_value, base_value=None, form=".4f"):
        cells = [
            f"{'' if value is None else format(value, form):>10s}"
            for value in (base_value, plain_value, blocked_value)
        ]
        print(f"   {label:52s}{''.join(cells)}")

    def both(label, key, sub=None, of_base=False):
        values = [run[key][sub] if sub else run[key] for run in (plain, blocked)]
        line(label, *values, base[key] if of_base else 0.0)

    k = len(summary["ids"])
    print(f"\n== side by side: the same start, data and order; lambda = {summary['lambda']:.4g}")
    print(f"   {'':52s}{'base':>10s}{'plain':>10s}{'blocked':>10s}")
    both("SFT loss, narrow text, training rows", "narrow_train_loss", of_base=True)
    both("SFT loss, narrow text, held out", "narrow_held_loss", of_base=True)
    both("loss on general text, held out", "general_held_loss", of_base=True)
    print(f"   drift of the {k} blocked latents in the bad direction")
    both("  narrow held out: penalty (loss_sum / count)", "K_on_narrow", "penalty")
    both("  narrow held out: mean signed shift", "K_on_narrow", "signed_shift")
    both("  narrow held out: length, bad direction", "K_on_narrow", "bad_l2")
    both("  narrow held out: length, free direction", "K_on_narrow", "free_l2")
    both("  general held out: penalty (loss_sum / count)", "K_on_general", "penalty")
    both("  general held out: mean signed shift", "K_on_general", "signed_shift")
    print("   drift outside K (length of the vector of mean shifts)")
    both("  narrow held out", "outside_l2_on_narrow")
    both("  general held out", "outside_l2_on_general")
    both("  narrow held out: largest mover", "outside_largest_on_narrow")
    shared = set(plain["outside_movers_on_narrow"]) & set(blocked["outside_movers_on_narrow"])
    print(f"   {len(shared)} of the {MOVERS} largest movers outside K are the same in both runs")
    _print_rerouting(plain, blocked)

    ms = [summary["milliseconds"][kind] for kind in ("plain", "blocked")]
    print("   median milliseconds per step, plain and blocked steps taken in turns")
    line("  whole step", *(m["step"] for m in ms), form=".2f")
    for part in ("base forward", *OURS):
        line(f"  of it {part}", 0.0, ms[1][part], form=".2f")
    ours = sum(ms[1][part] for part in OURS)
    print(
        f"   of a blocked step, {ours / ms[1]['step']:.1%} is libblockem and "
        f"{ms[1]['base forward'] / ms[1]['step']:.1%} the base model's forward pass "
        "(which a cached reference saves)"
    )


def _print_rerouting(plain: dict, blocked: dict) -> None:
    for texts in ("narrow", "general"):
        key = f"outside_l2_on_{texts}"
        change = blocked[key] / plain[key] - 1
        verdict = "more (rerouting)" if change > 0 else "not more"
        print(f"   {texts} text: drift outside K is {verdict} than in the plain run ({change:+.0%})")


def _plot(summary: dict, pretrain_losses: list[float], path: Path) -> None:
    plain, blocked = summary["plain"], summary["blocked"]
    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "font.size": 9}
    )
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    figure.suptitle(
        f"libblockem demo: LoRA on licence texts, plain and with {len(summary['ids'])} latents "
        f"blocked at layer {summary['layer']} (λ = {summary['lambda']:.3g})",
        fontsize=13,
    )
    _plot_pretraining(axes[0, 0], pretrain_losses, summary["pretraining"])
    _plot_sft(axes[0, 1], plain, blocked)
    _plot_penalty(axes[0, 2], plain, blocked)
    _plot_latents(axes[1, 0], summary)
    _plot_inside_outside(axes[1, 1], plain, blocked)
    _plot_time(axes[1, 2], **summary["milliseconds"])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_pretraining(axis, losses: list[float], held: dict) -> None:
    axis.plot(losses, color=OTHER, linewidth=0.6, alpha=0.6, label="each step")
    axis.plot(*_smooth(losses, 25), color="black", linewidth=1.4, label="mean of 25 steps")
    after = held["held_loss_after"]
    axis.axhline(after, color="black", linestyle=":", label=f"held out at the end: {after:.2f}")
    axis.set(title="Base model: loss on general text", xlabel="step", ylabel="loss per token")
    axis.legend(frameon=False)


def _plot_sft(axis, plain: dict, blocked: dict) -> None:
    for run, color, name in ((plain, PLAIN, "plain"), (blocked, BLOCKED, "blocked")):
        axis.plot(run["sft_curve"], color=color, linewidth=0.6, alpha=0.35)
        label = f"{name} (held out at the end: {run['narrow_held_loss']:.2f})"
        axis.plot(*_smooth(run["sft_curve"], 9), color=color, linewidth=1.6, label=label)
    axis.set(title="SFT loss on licence texts", xlabel="step", ylabel="loss per token")
    axis.legend(frameon=False)


def _plot_penalty(axis, plain: dict, blocked: dict) -> None:
    for run, color, name in ((plain, PLAIN, "plain"), (blocked, BLOCKED, "blocked")):
        steps, values = zip(*run["penalty_curve"])
        axis.plot(steps, values, color=color, marker="o", markersize=4, label=name)
        axis.annotate(
            f"{values[-1]:.3g}", (steps[-1], values[-1]), textcoords="offset points",
            xytext=(-2, 7), ha="right", color=color,
        )  # fmt: skip
    axis.set(
        title="Penalty on held-out licence texts",
        xlabel="step", ylabel="mean per token of Σₖ relu(sₖ(z − z_base))²",
    )  # fmt: skip
    axis.legend(frameon=False, loc="upper left")


def _plot_latents(axis, summary: dict) -> None:
    places = torch.arange(len(summary["ids"]))
    for offset, name, color in ((-0.2, "plain", PLAIN), (0.2, "blocked", BLOCKED)):
        heights = summary[name]["K_shift_on_narrow"]
        axis.bar(places + offset, heights, width=0.4, color=color, label=name)
    labels = [f"{i}{'+' if s > 0 else '−'}" for i, s in zip(summary["ids"], summary["signs"])]
    axis.set_xticks(places, labels, rotation=90, fontsize=8)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(
        title="Each blocked latent, held-out licence texts",
        xlabel="latent and its bad direction",
        ylabel="mean shift in the bad direction",
    )  # fmt: skip
    axis.legend(frameon=False)


def _plot_inside_outside(axis, plain: dict, blocked: dict) -> None:
    groups = [
        f"{part}\n{texts}"
        for texts in ("licences", "general")
        for part in ("K, bad\ndirection", "K, free\ndirection", "outside\nK")
    ]

    def heights(run: dict) -> list[float]:
        values = []
        for texts in ("narrow", "general"):
            inside = run[f"K_on_{texts}"]
            values += [inside["bad_l2"], inside["free_l2"], run[f"outside_l2_on_{texts}"]]
        return values

    places = torch.arange(len(groups))
    for offset, run, color in ((-0.2, plain, PLAIN), (0.2, blocked, BLOCKED)):
        name = "plain" if run is plain else "blocked"
        bars = axis.bar(places + offset, heights(run), width=0.4, color=color, label=name)
        axis.bar_label(bars, fmt="%.2g", padding=2, fontsize=8)
    axis.set_xticks(places, groups, fontsize=8)
    axis.set(title="Drift in K and outside K, held-out texts", ylabel="‖mean shift of latents‖₂")
    axis.margins(y=0.2)
    axis.legend(frameon=False, ncols=2, loc="upper right")


def _plot_time(axis, plain: dict, blocked: dict) -> None:
    ours = sum(blocked[part] for part in OURS)
    base = blocked["base forward"]
    own = blocked["step"] - ours - base
    axis.bar(["plain", "blocked"], [plain["step"], own], width=0.55, color=OTHER,
             label="model, loss, optimizer")  # fmt: skip
    axis.bar("blocked", base, bottom=own, width=0.55, color="#e0a458",
             label=f"base forward for the reference: {base:.1f} ms")  # fmt: skip
    axis.bar("blocked", ours, bottom=own + base, width=0.55, color=BLOCKED,
             label=f"libblockem: {ours:.2f} ms ({ours / blocked['step']:.1%})")  # fmt: skip
    for place, run in enumerate((plain, blocked)):
        axis.annotate(f"{run['step']:.0f} ms", (place, run["step"]), ha="center",
                      textcoords="offset points", xytext=(0, 3))  # fmt: skip
    axis.set(title="Time of a step (median)", ylabel="milliseconds")
    axis.margins(y=0.42)
    axis.set_xlim(-0.6, 1.6)
    axis.legend(frameon=False, loc="upper left")


def _smooth(values: list[float], window: int) -> tuple[list[int], list[float]]:
    """Centred moving mean: (steps, means)."""
    window = min(window, len(values))
    means = torch.tensor(values).unfold(0, window, 1).mean(1).tolist()
    return [i + window // 2 for i in range(len(means))], means
