"""Reading an activation store: samples a second, shuffled and in order, beside what a training step needs.

    python benchmarks/loader.py --rows 200000 --width 512 --out runs/loader_store

Writes a bfloat16 store of pairs of random rows (kept for the next run), then times whole passes of the loader that
``mmsae fit`` uses (workers 0, batches of 512 pairs): medians of CPU time over the rounds, warm page cache. The step is
that of PairedTopK at ratio 8, k 32 on the same batches.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from mmsae.activations import ActivationStore, StoreLoader, write_store
from mmsae.sae import SAE, AuxK, CodeCosine, Dictionary, LossContext, Normaliser, Reconstruction, TopK, UsageTracker


def passes(store, shuffle, batch, rounds):
    seconds = []
    for epoch in range(rounds + 1):
        loader = StoreLoader(store, batch, seed=0, shuffle=shuffle)
        loader.epoch = epoch
        start, n = time.process_time(), 0
        for tokens in loader:
            n += len(tokens.x["image"])
        seconds.append((time.process_time() - start) / n)
    return 1 / statistics.median(seconds[1:])


def step_rate(width, batch, rounds):
    dictionaries = {m: Dictionary() for m in ("image", "text")}
    normaliser = Normaliser(unit_in=True, centre=True, unit_out=True)
    sae = SAE(width, ratio=8, normaliser=normaliser, selector=TopK(32), dictionaries=dictionaries)
    x = {m: torch.randn(batch, width) for m in ("image", "text")}
    sae.fit_normaliser(x)
    usage, terms = UsageTracker(sae.d_sae, sae.modalities), [Reconstruction(), AuxK(), CodeCosine()]
    optimizer = torch.optim.Adam(sae.parameters(), 1e-3, fused=True)
    seconds = []
    for _ in range(rounds + 2):
        start = time.process_time()
        out = sae(x)
        loss = torch.stack([t(out, LossContext(sae, usage)) for t in terms]).sum()
        usage.update({m: o.codes for m, o in out.items()})
        optimizer.zero_grad()
        loss.backward()
        sae.remove_parallel_grad_()
        optimizer.step()
        sae.project_()
        seconds.append(time.process_time() - start)
    return batch / statistics.median(seconds[2:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/loader_store"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.out.exists():
        g = torch.Generator().manual_seed(0)
        rows = {m: torch.randn(args.rows, args.width, generator=g) for m in ("image", "text")}
        write_store(args.out, rows, dtype="bfloat16", rows_per_shard=50_000)
    store = ActivationStore(args.out, verify=False)
    shuffled, ordered = (passes(store, s, args.batch, args.rounds) for s in (True, False))
    step = step_rate(args.width, args.batch, args.rounds)
    report = {
        "shuffled_pairs_per_cpu_s": shuffled,
        "ordered_pairs_per_cpu_s": ordered,
        "step_pairs_per_cpu_s": step,
        "shuffled_over_step": shuffled / step,
        "share_of_step": step / shuffled,
    }
    print(json.dumps({k: float(f"{v:.4g}") for k, v in report.items()}, indent=2))


if __name__ == "__main__":
    main()
