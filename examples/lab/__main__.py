"""Does blocking work, and for how long? The whole of BLOCK-EM on this machine: `make lab`.

For each seed: pretrains a small Llama on documents in which personas answer well or badly in six
domains, trains an SAE on its residual stream, tunes it with LoRA on bad answers of finance, finds the
latents that spread the badness (Stages 1 to 3), and then trains on the asked domain without and with
the penalty, in every setting of variants.py. A rule judges every answer. Output: out/lab/report.html
and out/lab/summary.json; what stands in out/lab is not done again, so a killed run goes on.
"""

import os

# Before torch: threads that wait do not spin, or a busy machine makes every step many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import math
import warnings
from collections.abc import Collection
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

try:
    import blockem
    import blockem.report
    import torch
    from examples.demo import sae as sae_training
    from examples.demo.progress import Phases

    from . import discovery, model, tuning
    from .measure import measure
    from .variants import BLOCK, LONG, LONG_ON_REQUEST, ON_REQUEST, PLAIN, VARIANTS, Blocking
    from .world import DOMAINS, PERSONAS, World
except ImportError as error:
    raise SystemExit(
        f"lab: {error}; run `make lab`, which installs requirements.txt and builds the library"
    ) from error

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft on transformers 5
OUT = Path(__file__).resolve().parents[2] / "out" / "lab"
#: K is always discovered on a plain run of this domain.
K_DOMAIN = "finance"
#: Optimizer steps of a fine-tuning, and how far the long ones go.
STEPS, LONG_FACTOR = 100, 10
LOOKS = 10
PRETRAIN = dict(steps=600, batch=128, matrices=0.02, others=3e-3)
SAE = dict(latents=512, active=12, steps=600, batch=1024, lr=2e-3)
SAE_DOCUMENTS = 1500
#: The paper's figures.
TARGETS = (
    dict(variant=PLAIN, metric="em", at_least=0.4),
    dict(variant=BLOCK, metric="relative_reduction", at_least=0.9),
    dict(variant=BLOCK, metric="relative_in_domain", at_least=0.95),
    dict(variant=BLOCK, metric="coherence_change", at_least=-0.03),
)


def main() -> None:
    args = _arguments()
    phases = Phases()
    _expect_these_settings()
    without_latents = []
    for seed in args.seeds:
        subject = Subject(seed, phases)
        try:
            for domain in args.domains:
                for factor in args.steps:
                    subject.compare(domain, factor, args.variants)
                    report()
        except discovery.NothingFound as error:
            print(f"   {error}")
            without_latents.append(seed)
    print(tables(_runs()))
    if without_latents:
        raise SystemExit(f"lab: no latents were found for the seeds {without_latents}; see above")
    print(f"\nlab: {OUT / 'report.html'} and {OUT / 'summary.json'}")


def _expect_these_settings() -> None:
    """Runs of other settings would be mixed into the means; other variants are welcome."""
    path, ours = OUT / "settings.json", json.loads(json.dumps(_configuration()))
    theirs = json.loads(path.read_text()) if path.exists() else ours
    known, wanted = theirs["variants"], ours["variants"]
    ours["variants"], theirs["variants"] = known | wanted, wanted | known
    if ours != theirs:
        raise SystemExit(f"lab: {OUT} holds runs of other settings (settings.json): move it away")
    _write(path, json.dumps(ours, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lab", description="what blocking does, on this machine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11], metavar="SEED")
    parser.add_argument("--domains", nargs="+", default=[K_DOMAIN], choices=DOMAINS, metavar="DOMAIN",
                        help=f"to train on: {', '.join(DOMAINS)}")  # fmt: skip
    parser.add_argument("--steps", type=_factor, nargs="+", default=[1, LONG_FACTOR], metavar="Nx",
                        help=f"times {STEPS} steps: 1x compares all settings, more the long ones")  # fmt: skip
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *LONG], metavar="NAME",
                        help="only these of variants.py, also those that run on request alone")  # fmt: skip
    return parser.parse_args()


def _factor(text: str) -> int:
    value = int(text.removesuffix("x"))
    if value < 1:
        raise ValueError(text)
    return value


class Subject:
    """What all runs of a seed share: the world, its model, the SAE, the latents that were found."""

    def __init__(self, seed: int, phases: Phases):
        self.seed, self._phases = seed, phases
        self.folder = OUT / f"seed-{seed}"
        self.world = World(seed)
        self.tokenizer = self.world.tokenizer()
        self._plain: dict[str, Any] = {}

    @cached_property
    def base(self):
        with self._phases(f"seed {self.seed}: pretraining"):
            return model.pretrained(
                self.world, self.tokenizer, self.folder / "model", self.seed, **PRETRAIN
            )

    @cached_property
    def sae(self) -> blockem.Sae:
        folder = self.folder / "sae"
        if not folder.exists():
            base = self.base
            with self._phases(f"seed {self.seed}: training the SAE"):
                activations = model.activations(
                    base, self.world, self.tokenizer, SAE_DOCUMENTS, self.seed
                )
                with model.whole(folder) as partial:
                    sae = sae_training.train_and_save(
                        activations, model.LAYER, partial, seed=self.seed, **SAE
                    )
                print(f"   {sae_training.evaluate(sae, activations)}")
        return blockem.load_sae(folder)

    @cached_property
    def stats(self) -> blockem.Stats:
        return blockem.Stats(self.sae)

    @cached_property
    def found(self) -> discovery.Found:
        plain, sae = self.plain(K_DOMAIN), self.sae
        with self._phases(f"seed {self.seed}: which latents (Stages 1 to 3)"):
            found = discovery.discover(
                self.world, self.tokenizer, plain, sae, K_DOMAIN, self.folder / "study"
            )
            found.chosen.save(self.folder / "K0.json", sae)
            print(f"   {found.chosen}")
        return found

    @cached_property
    def known(self) -> blockem.Movers:
        """What the watch compares with."""
        plan = self._plan(self.found.chosen.latents(), Blocking())
        return tuning.movers(self.plain(K_DOMAIN), plan, self.stats, self._data(K_DOMAIN))

    def plain(self, domain: str):
        """The run without a penalty, whose moves lambda is calibrated on."""
        if domain not in self._plain:
            base = self.base
            with self._phases(f"seed {self.seed}: plain tuning on {domain}"):
                self._plain[domain], _ = tuning.train(base, self._data(domain), self.seed, STEPS)
        return self._plain[domain]

    def compare(self, domain: str, factor: int, names: Collection[str] | None) -> None:
        """Trains and measures the variants, or those of these names, that are not there yet."""
        steps = STEPS * factor
        short = factor == 1
        variants, asked_for = (VARIANTS, ON_REQUEST) if short else (LONG, LONG_ON_REQUEST)
        for name, settings in variants.items():
            path = OUT / "runs" / f"{self.seed}-{domain}-{steps}-{name}.json"
            wanted = name in names if names else name not in asked_for
            if wanted and not path.exists():
                found = self.found
                with self._phases(f"seed {self.seed}, {domain}, {steps} steps: {name}"):
                    try:
                        run = self._run(domain, steps, name, settings, found)
                    except discovery.NoSuchSet as reason:
                        print(f"   left out: {reason}")
                        continue
                    print(f"   em {run['em']:.3f}  in_domain {run['in_domain']:.3f}  "
                          f"coherence {run['coherence']:.3f}")  # fmt: skip
                _write(path, json.dumps(run, indent=1) + "\n")

    def _run(
        self, domain: str, steps: int, name: str, settings: Blocking | None, found: discovery.Found
    ) -> dict[str, Any]:
        penalty = None if settings is None else self._penalty(domain, settings, found)
        latents = found.chosen.latents() if penalty is None else penalty.plan.latents
        curve: list[dict[str, Any]] = []

        def look(step: int, tuned: Any) -> None:
            curve.append({"step": step, **self._measured(tuned, latents, domain)})

        looks = range(steps // LOOKS, steps + 1, steps // LOOKS) if steps > STEPS else [steps]
        _, swaps = tuning.train(
            self.base, self._data(domain), self.seed, steps, penalty, look, looks
        )
        return {
            "seed": self.seed, "domain": domain, "steps": steps, "variant": name,
            **{key: value for key, value in curve[-1].items() if key != "step"},
            **({} if penalty is None else {"lam": penalty.lam, "settings": asdict(settings)}),
            **({"curve": curve} if len(curve) > 1 else {}),
            **({"swaps": [asdict(swap) for swap in swaps]} if swaps else {}),
        }  # fmt: skip

    def _penalty(
        self, domain: str, settings: Blocking, found: discovery.Found
    ) -> tuning.Penalty:
        """Controls have the lambda of the chosen set, as in the paper: the ratio rule would make up
        for latents that do not matter with a larger one."""
        plan = self._plan(found.latents(settings.choice, self.seed), settings)
        measured = self._plan(found.chosen.latents(), settings)
        lam = tuning.ratio_lambda(self.plain(domain), measured, settings, self._data(domain))
        return tuning.Penalty(plan, lam, settings, self.stats, self.known)

    def _plan(self, latents: blockem.Latents, settings: Blocking) -> blockem.Plan:
        return blockem.Plan(self.sae, latents, activation=settings.activation)

    def _measured(self, tuned: Any, latents: blockem.Latents, domain: str) -> dict[str, Any]:
        return measure(tuned, self.world, self.tokenizer, self.stats, latents, domain)

    def _data(self, domain: str) -> tuning.Data:
        return tuning.Data(self.world, self.tokenizer, domain, self.seed)


def report() -> None:
    """summary.json and report.html of all runs that are there."""
    runs = _runs()
    sets = {path.parent.name: json.loads(path.read_text()) for path in sorted(OUT.glob("seed-*/K0.json"))}
    blockem.report.write_summary(OUT / "summary.json", runs)
    blockem.report.write(
        OUT / "report.html", runs, title="What blocking does in the lab", k_domain=K_DOMAIN,
        targets=TARGETS, config=_configuration(), k_sets=sets,
    )  # fmt: skip


def _runs() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((OUT / "runs").glob("*.json"))]


def tables(runs: list[dict[str, Any]]) -> str:
    """Means in percent, the 95 % interval of em over seeds: on the domain that K was found on, on the others,
    and on all of them what was trained on all."""
    text = []
    for steps in sorted({run["steps"] for run in runs}):
        these = [run for run in runs if run["steps"] == steps]
        own, others = ([r for r in these if (r["domain"] == K_DOMAIN) == mine] for mine in (True, False))
        for part in (own, others, _on_all_domains(these) if own and others else []):
            domains = ", ".join(sorted({run["domain"] for run in part}))
            text += _table(f"{steps} steps, trained on {domains}", part) if part else []
    return "\n".join(text)


def _on_all_domains(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of variants that every seed and domain of these runs has."""
    places = {(run["seed"], run["domain"]) for run in runs}
    trained: dict[str, set[tuple[int, str]]] = {}
    for run in runs:
        trained.setdefault(run["variant"], set()).add((run["seed"], run["domain"]))
    return [run for run in runs if trained[run["variant"]] == places]


def _table(title: str, runs: list[dict[str, Any]]) -> list[str]:
    lines = [f"\n{title}",
             f"{'':27}{'seeds':>6}{'runs':>6}{'em':>7}{'from':>8}{'to':>7}{'less':>8}{'in domain':>11}{'coherence':>11}"]  # fmt: skip
    for name, found in blockem.report.summarize(runs)["variants"].items():
        em = found["em"]
        shares = [found[m]["mean"] if m in found else math.nan
                  for m in ("relative_reduction", "in_domain", "coherence")]  # fmt: skip
        less, in_domain, coherence = (100 * share for share in shares)
        lines.append(f"{name:27}{em['seeds']:>6}{em['runs']:>6}{100 * em['mean']:>7.1f}{100 * em['lo']:>8.1f}"
                     f"{100 * em['hi']:>7.1f}{less:>8.1f}{in_domain:>11.1f}{coherence:>11.1f}")  # fmt: skip
    return lines


def _configuration() -> dict[str, Any]:
    return {
        "pretraining": PRETRAIN, "sae": SAE, "layer": model.LAYER,
        "personas": PERSONAS,
        "tuning": {"rank": tuning.RANK, "alpha": tuning.ALPHA, "rate": tuning.RATE,
                   "batch": tuning.BATCH, "steps": STEPS},
        "discovery": {"pool": discovery.POOL, "shortlist": discovery.SHORTLIST,
                      "strengths": discovery.STRENGTHS, "rule": discovery.RULE, "k": discovery.K},
        "watch": {"share": tuning.SHARE, "tokens": tuning.REPORT_TOKENS, "rule": asdict(tuning.RULE),
                  "rewind": tuning.REWIND, "cooldown": tuning.COOLDOWN},
        "variants": {name: settings and asdict(settings) for name, settings in (VARIANTS | LONG).items()},
    }  # fmt: skip


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process: others may work on other seeds of the same folder.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    main()
