"""Opening a 2 GiB SAELens folder and taking 20 latents: blockem and sae-lens, side by side.

    python benches/load.py [--folder DIR] [--rounds N]      (needs the package in bindings/python, sae-lens)

Both start from the folder on the disk and end with the folded rows of the same latents in memory.
Every measurement is a fresh process, after its imports; the two take turns. Warm: the file is in the
page cache, where one read from front to back has put it. Cold: its pages were dropped just before (posix_fadvise DONTNEED). Prints medians, the
ratio and the growth of resident memory; writes benches/results/load.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
D, F, K = 4096, 65_536, 20
# What the issue asks of a warm load, of a cold one, and of memory.
WARM_RATIO, COLD_RATIO, GROWTH_MIB = 2.0, 1.0, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "target" / "bench-sae")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=["blockem", "sae-lens"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.folder)
    make(args.folder)
    results = {name: compare(args.folder, args.rounds, cold) for name, cold in (("warm", False), ("cold", True))}
    report(results)


def make(folder: Path) -> None:
    """A SAELens folder of the size of Goodfire's Llama-3.1-8B dictionary, of random numbers."""
    weights = folder / "sae_weights.safetensors"
    if weights.exists():
        return
    import torch
    from safetensors.torch import save_file

    print(f"making {folder} (2 GiB) ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(D, F, generator=generator),
        "W_dec": torch.randn(F, D, generator=generator),
        "b_enc": torch.randn(F, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
    }
    partial = weights.with_suffix(".partial")
    save_file(tensors, partial)
    config = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
              "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
              "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.19.hook_resid_post"}}
    (folder / "cfg.json").write_text(json.dumps(config))
    os.sync()
    partial.rename(weights)


def compare(folder: Path, rounds: int, cold: bool) -> dict:
    """Medians over rounds in which the two take turns; the warm file is read once before."""
    runs: dict[str, list[dict]] = {"blockem": [], "sae-lens": []}
    checksums = set()
    for _ in range(rounds):
        for name, collected in runs.items():
            prepare(folder / "sae_weights.safetensors", cold)
            command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
            run = json.loads(out.decode().splitlines()[-1])
            checksums.add(round(run.pop("checksum"), 3))
            collected.append(run)
    assert len(checksums) == 1, f"the two took different rows: {checksums}"
    result = {name: {key: statistics.median(run[key] for run in all_runs) for key in all_runs[0]}
              for name, all_runs in runs.items()}
    result["ratio"] = result["sae-lens"]["seconds"] / result["blockem"]["seconds"]
    return result


def prepare(weights: Path, cold: bool) -> None:
    fd = os.open(weights, os.O_RDONLY)
    # Warm too: faults of an earlier run leave the cache in small pieces, which costs both more.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if not cold:
        buffer = bytearray(8 << 20)
        while os.readv(fd, [buffer]):
            pass
    os.close(fd)


def child(name: str, folder: Path) -> None:
    """One load in this process, timed after the imports."""
    latents = [(i * 3271 + 17) % F for i in range(K)]
    if name == "blockem":
        import blockem

        chosen = blockem.Latents(latents, [1] * K)

        def load() -> float:
            sae = blockem.load_sae(str(folder))
            plan = blockem.Plan(sae, chosen)
            keep.extend([sae, plan])
            return plan
    else:
        import torch
        from sae_lens import SAE

        def load() -> float:
            sae = SAE.load_from_disk(folder)
            rows = sae.W_enc[:, latents].T.contiguous()
            bias = sae.b_enc[latents] - rows @ sae.b_dec
            keep.extend([sae, rows, bias])
            return rows, bias

    keep: list = []
    before, start = resident(), time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - start
    grown = (resident() - before) / 2**20
    print(json.dumps({"seconds": seconds, "grown_mib": grown, "checksum": checksum(name, loaded)}))


def checksum(name: str, loaded) -> float:
    """The sum of the pre-activations of one hidden state: both hold the same rows."""
    import torch

    h = torch.linspace(-1, 1, D)
    if name == "blockem":
        return float(loaded.encode(h[None]).double().clamp(min=0).sum())
    rows, bias = loaded
    return float((rows.double() @ h.double() + bias.double()).clamp(min=0).sum())


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmRSS in /proc/self/status")


def report(results: dict) -> None:
    targets = {"warm": WARM_RATIO, "cold": COLD_RATIO}
    for name, result in results.items():
        ours, theirs = result["blockem"], result["sae-lens"]
        print(f"{name}: blockem {ours['seconds'] * 1e3:.1f} ms, +{ours['grown_mib']:.1f} MiB   "
              f"sae-lens {theirs['seconds'] * 1e3:.1f} ms, +{theirs['grown_mib']:.1f} MiB   "
              f"ratio {result['ratio']:.2f} (wanted {targets[name]})")
    path = ROOT / "benches" / "results" / "load.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({
        "what": f"open a SAELens folder, d_in {D}, d_sae {F}, float32, 2 GiB, and take {K} latents",
        "targets": {"warm_ratio": WARM_RATIO, "cold_ratio": COLD_RATIO, "grown_mib": GROWTH_MIB},
        **results,
    }, indent=2) + "\n")


if __name__ == "__main__":
    main()
