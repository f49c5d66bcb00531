"""Set selection on the generated world: how near does each way of choosing come to a target's concepts?

    mmsae bench filter --out runs/bench_filter --quick
    python benchmarks/selection.py --clip runs/bench_filter/clip --sae runs/bench_filter/pair_sae

The pool are 16,000 pictures, a tenth is chosen; the target are the pictures of a red object on dark ground among 3,200
others, every other one to match and the rest to test on. Codes of pictures and of captions, and of an untrained SAE.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from mmsae import load_pair
from mmsae.filtering.choose import SMOOTH
from mmsae.filtering.passes import to_items
from mmsae.filtering.selection import (
    Items,
    Objective,
    distribution,
    kl,
    lazy_greedy,
    modular,
    random_set,
    stochastic_greedy,
    two_stage,
)
from mmsae.filtering.selection_exchange import exchange
from mmsae.report.tables import markdown_table
from mmsae.sae import random_control
from mmsae.world.generator.data import WorldData, generate
from mmsae.world.generator.scene import CONCEPTS
from mmsae.world.measure.host import embed_images, embed_texts

WANTED = ("red", "dark")
B, PER_TAR = 1600, 1000


def wanted(data: WorldData) -> np.ndarray:
    """``(n,)`` bool: pictures of the target's kind."""
    return data.concepts[:, [CONCEPTS.index(name) for name in WANTED]].all(1)


def choose(items: Items, o: Objective) -> dict[str, np.ndarray]:
    """``{way: rows}``."""
    greedy = lazy_greedy(items, o, B).rows
    parts = [items.take(np.arange(lo, min(lo + PER_TAR, items.n))) for lo in range(0, items.n, PER_TAR)]
    staged = two_stage(parts, o, B, B / items.n).rows
    chance = random_set(items, o, B).rows
    return {
        "random": chance,
        "modular": modular(items, o, B).rows,
        "stochastic greedy": stochastic_greedy(items, o, B).rows,
        "greedy": greedy,
        "two stages": staged,
        "greedy, then swaps": exchange(items, o, greedy).rows,
        "random, then swaps": exchange(items, o, chance).rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True)
    parser.add_argument("--sae", required=True)
    args = parser.parse_args()
    sae, host = load_pair(args.sae, f"local-dir:{args.clip}", device="cpu")
    pool, others = generate(16_000, 21), generate(3_200, 22)
    rows = np.flatnonzero(wanted(others))
    share = wanted(pool)
    x = {"image": [embed_images(host, d.images) for d in (pool, others)]}
    x["text"] = [embed_texts(host, d.full) for d in (pool, others)]
    print(f"{len(rows)} pictures of the target, {share.mean():.1%} of the pool are such\n")
    rows_shown = []
    saes = {"image": (sae, "image"), "text": (sae, "text"), "image, untrained": (random_control(sae, 0), "image")}
    for name, (model, modality) in saes.items():
        with torch.no_grad():
            codes = [model.encode(v, modality) for v in x[modality]]
        items = to_items(codes[0], np.array(pool.uids))
        goal = to_items(codes[1], np.array(others.uids))
        p, held = (distribution(goal.take(rows[i::2]).mass(model.d_sae), SMOOTH) for i in range(2))
        found = {
            way: (own, *(kl(q, items.take(own).mass(model.d_sae)) for q in (p, held)))
            for way, own in choose(items, Objective(p)).items()
        }
        base = found["random"][1:]
        for way, (own, near, tested) in found.items():
            cells = [f"{near:.3f}", f"{near / base[0]:.2f}", f"{tested:.3f}", f"{tested / base[1]:.2f}"]
            rows_shown.append([name, way, *cells, f"{share[own].mean():.2f}"])
    head = ["codes", "chosen by", "KL", "of random's", "held-out KL", "of random's", "share of the target's kind"]
    print(markdown_table(head, rows_shown))


if __name__ == "__main__":
    main()
