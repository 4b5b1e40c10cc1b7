"""Taking 20 latents out of a 2 GiB dictionary, from every container in both orientations:
blockem and sae-lens, side by side.

    python benches/load.py [--cases NAME …] [--rounds N] [--folder DIR] [--keep]
                                                        (needs the package in bindings/python, sae-lens)

The peer is sae-lens' own loader of that format, with its download replaced by the path of the file
(it reads the whole dictionary), then the same rows by indexing. Both start from the file on the disk
and end with the folded rows in memory. Every measurement is a fresh process, after its imports; the
two take turns. Warm: the file is in the page cache, where one read from front to back has put it.
Cold: its pages were dropped just before (posix_fadvise DONTNEED). Peak: the most resident memory
(VmHWM, mapped pages of the file included) above what there was before the load. Each file is made,
measured and removed before the next; --keep leaves them.

Prints medians and ratios; writes each case, with the load of the machine, to benches/results/load.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
D, F, K = 4096, 65_536, 20
LATENTS = [(i * 3271 + 17) % F for i in range(K)]


@dataclass(frozen=True)
class Case:
    """A file of a public format: how it is made, and how sae-lens reads it."""

    name: str
    container: str
    layout: str
    owner: str
    weights: str  # below the case's folder
    make: Callable[[Path, dict], None]
    peer: str  # in sae_lens.loading.pretrained_sae_loaders, or SAE.load_from_disk
    load: Callable[[Path], dict]  # the tensors of sae-lens
    b_dec_subtracted: bool = False
    cold: bool = True

    def path(self, folder: Path) -> Path:
        return folder / self.name / self.weights


# ---------------------------------------------------------------- files


def make_saelens(path: Path, t: dict) -> None:
    config = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
              "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
              "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.19.hook_resid_post"}}
    (path.parent / "cfg.json").write_text(json.dumps(config))
    save_safetensors({"W_enc": t["W_enc"].T, "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"]}, path)


def make_sparsify(path: Path, t: dict) -> None:
    config = {"activation": "topk", "d_in": D, "expansion_factor": F // D, "num_latents": F, "k": 32,
              "multi_topk": False, "normalize_decoder": True, "signed": False, "skip_connection": False, "transcode": False}
    (path.parent / "cfg.json").write_text(json.dumps(config))
    save_safetensors({"encoder.weight": t["W_enc"], "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}, path)


def save_safetensors(tensors: dict, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def make_gemma_scope(path: Path, t: dict, **how) -> None:
    """As numpy.savez and savez_compressed do it, but deflated quickly (level 1)."""
    import numpy as np

    arrays = {"W_dec": t["W_dec"], "W_enc": t["W_enc"].T.contiguous(), "b_dec": t["b_dec"], "b_enc": t["b_enc"],
              "threshold": t["b_enc"].abs()}
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, tensor in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, tensor.numpy())


def make_gemma_scope_deflated(path: Path, t: dict) -> None:
    make_gemma_scope(path, t, compression=zipfile.ZIP_DEFLATED, compresslevel=1)


def make_goodfire(path: Path, t: dict) -> None:
    import torch

    torch.save({"encoder_linear.weight": t["W_enc"], "encoder_linear.bias": t["b_enc"],
                "decoder_linear.weight": t["W_dec"].T.contiguous(), "decoder_linear.bias": t["b_dec"]}, path)


def make_dictionary_learning(path: Path, t: dict) -> None:
    import torch

    config = {"trainer": {"dict_class": "JumpReluAutoEncoder", "activation_dim": D, "dict_size": F, "layer": 19,
                          "lm_name": "meta-llama/Llama-3.1-8B", "submodule_name": "resid_post_layer_19"},
              "buffer": {"ctx_len": 1024}}
    (path.parent / "config.json").write_text(json.dumps(config))
    torch.save({"W_enc": t["W_enc"].T.contiguous(), "b_enc": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"],
                "threshold": t["b_enc"].abs()}, path)


# ---------------------------------------------------------------- sae-lens


def load_from_disk(folder: Path) -> dict:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    return {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "b_dec": sae.b_dec, "keep": sae}


def loader(name: str, repository: str, inside: str) -> Callable[[Path], dict]:
    """sae-lens' loader of a repository, which finds its files in our folder."""

    def load(folder: Path) -> dict:
        from sae_lens.loading import pretrained_sae_loaders as loaders

        def here(repo_id: str, filename: str, subfolder: str | None = None, **_) -> str:
            return str(folder / (subfolder or "") / filename)

        loaders.hf_hub_download = here
        return getattr(loaders, name)(repository, inside, "cpu", False, {"dtype": "float32"})[1]

    return load


CASES = [
    Case("safetensors-d-F", "safetensors", "[d, F]", "SAELens", "sae_weights.safetensors", make_saelens,
         "SAE.load_from_disk", load_from_disk, b_dec_subtracted=True),
    Case("safetensors-F-d", "safetensors", "[F, d]", "sparsify", "layers.19/sae.safetensors", make_sparsify,
         "sparsify_huggingface_loader", loader("sparsify_huggingface_loader", "EleutherAI/sae", "layers.19"),
         b_dec_subtracted=True),
    Case("npz-d-F", "npz", "[d, F]", "Gemma Scope", "layer_19/width_65k/average_l0_50/params.npz", make_gemma_scope,
         "gemma_2_sae_huggingface_loader",
         loader("gemma_2_sae_huggingface_loader", "google/gemma-scope-9b-pt-att", "layer_19/width_65k/average_l0_50")),
    Case("npz-deflated-d-F", "npz, deflated", "[d, F]", "Gemma Scope", "layer_19/width_65k/average_l0_50/params.npz",
         make_gemma_scope_deflated, "gemma_2_sae_huggingface_loader",
         loader("gemma_2_sae_huggingface_loader", "google/gemma-scope-9b-pt-att", "layer_19/width_65k/average_l0_50"),
         cold=False),
    Case("torch-F-d", "torch zip", "[F, d]", "Goodfire", "Llama-3.1-8B-Instruct-SAE-l19.pth", make_goodfire,
         "get_goodfire_huggingface_loader",
         loader("get_goodfire_huggingface_loader", "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth")),
    Case("torch-d-F", "torch zip", "[d, F]", "dictionary_learning", "resid_post_layer_19/trainer_0/ae.pt",
         make_dictionary_learning, "dictionary_learning_sae_huggingface_loader_1",
         loader("dictionary_learning_sae_huggingface_loader_1", "canrager/lm_sae", "resid_post_layer_19/trainer_0")),
]  # fmt: skip


# ---------------------------------------------------------------- measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "target" / "bench-sae")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=[case.name for case in CASES])
    parser.add_argument("--keep", action="store_true", help="leave the files")
    parser.add_argument("--child", choices=["blockem", "sae-lens"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = [case for case in CASES if case.name in args.cases]
    if args.child:
        return child(args.child, chosen[0], args.folder)
    results = {}
    for case in chosen:
        make(case, args.folder)
        result = describe(case, args.folder) | {"rounds": args.rounds, "load_before": os.getloadavg()[0]}
        for state in ["warm", "cold"] if case.cold else ["warm"]:
            result[state] = compare(case, args.folder, args.rounds, state)
            report(case, state, result[state])
        results[case.name] = result
        write(results)
        if not args.keep:
            shutil.rmtree(args.folder / case.name)


def make(case: Case, folder: Path) -> None:
    """A dictionary of the size of Goodfire's for Llama-3.1-8B, of random numbers: [F, d] both ways."""
    path = case.path(folder)
    if path.exists():
        return
    import torch

    print(f"making {path} ...", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    partial = path.with_name(path.name + ".partial")
    case.make(partial, tensors)
    partial.rename(path)
    os.sync()


def describe(case: Case, folder: Path) -> dict:
    return {"container": case.container, "layout": case.layout, "owner": case.owner, "peer": case.peer,
            "file_bytes": case.path(folder).stat().st_size}


def compare(case: Case, folder: Path, rounds: int, state: str) -> dict:
    """Medians over rounds in which the two take turns."""
    runs: dict[str, list[dict]] = {"blockem": [], "sae-lens": []}
    sums = []
    for _ in range(rounds):
        for name, collected in runs.items():
            prepare(case.path(folder), cold=state == "cold")
            command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--cases", case.name]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
            run = json.loads(out.decode().splitlines()[-1])
            sums.append(run.pop("checksum"))
            collected.append(run)
    assert max(sums) - min(sums) < 1e-5 * max(sums), f"{case.name}: the two took different rows: {sums}"
    medians = {name: {key: statistics.median(run[key] for run in of_one) for key in of_one[0]} for name, of_one in runs.items()}
    ours, theirs = medians["blockem"], medians["sae-lens"]
    return medians | {"time_ratio": theirs["seconds"] / ours["seconds"], "peak_ratio": theirs["peak_mib"] / ours["peak_mib"]}


def prepare(weights: Path, cold: bool) -> None:
    fd = os.open(weights, os.O_RDONLY)
    # Warm too: faults of an earlier run leave the cache in small pieces, which costs both more.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if not cold:
        buffer = bytearray(8 << 20)
        while os.readv(fd, [buffer]):
            pass
    os.close(fd)


def child(name: str, case: Case, folder: Path) -> None:
    """One load in this process, measured after the imports."""
    take = take_blockem if name == "blockem" else take_sae_lens
    place = folder / case.name
    if name == "blockem":
        import blockem  # noqa: F401
    else:
        import sae_lens  # noqa: F401
    import torch

    # From here on the peak is ours.
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    latents = take(case, place)
    seconds = time.perf_counter() - start
    peak = (memory("VmHWM") - before) / 2**20
    total = latents(torch.linspace(-1, 1, D))
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "checksum": total}))


def take_blockem(case: Case, place: Path) -> Callable:
    """The sum of the 20 latents of a hidden state, by rows that are in memory."""
    import blockem

    # Goodfire's file is opened itself: its folder holds nothing else that could tell.
    sae = blockem.load_sae(place / case.weights)
    plan = blockem.Plan(sae, blockem.Latents(LATENTS, [1] * K), activation="dense_relu")
    return lambda h: float(plan.encode(h[None]).double().sum())


def take_sae_lens(case: Case, place: Path) -> Callable:
    tensors = case.load(place)
    rows = tensors["W_enc"][:, LATENTS].T.contiguous()
    bias = tensors["b_enc"][LATENTS]
    if case.b_dec_subtracted:
        bias = bias - rows @ tensors["b_dec"]
    return lambda h: float((rows.double() @ h.double() + bias.double()).clamp(min=0).sum())


def memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {key} in /proc/self/status")


def report(case: Case, state: str, result: dict) -> None:
    ours, theirs = result["blockem"], result["sae-lens"]
    print(f"{case.container:14} {case.layout} {case.owner:20} {state}   "
          f"blockem {ours['seconds'] * 1e3:8.1f} ms {ours['peak_mib']:7.1f} MiB   "
          f"sae-lens {theirs['seconds'] * 1e3:8.1f} ms {theirs['peak_mib']:7.1f} MiB   "
          f"{result['time_ratio']:7.2f}x faster {result['peak_ratio']:7.1f}x smaller", flush=True)


def write(results: dict) -> None:
    """Cases that were measured now take the place of older ones."""
    path = ROOT / "benches" / "results" / "load.json"
    older = json.loads(path.read_text())["cases"] if path.exists() else {}
    cases = older | results
    path.write_text(json.dumps({
        "what": f"open an SAE, d_in {D}, d_sae {F}, float32, and take {K} latents: seconds and peak resident memory",
        "cases": {case.name: cases[case.name] for case in CASES if case.name in cases},
    }, indent=2) + "\n")


if __name__ == "__main__":
    main()
