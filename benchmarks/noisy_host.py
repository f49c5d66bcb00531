"""Finding damaged captions in the very data that host and SAE were trained on.

    python benchmarks/noisy_host.py --out runs/noisy_host

A world without sibling pairs in which 30 % of the captions have one wrong attribute: a CLIP is trained on it, the SAE
on that CLIP's embeddings of it, and both are asked which pairs are damaged. AUROC by cosine, centred cosine and codes;
three seeds of the SAE.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from world_table import cell

from mmsae.activations import ActivationStore, extract
from mmsae.demo.command import fit_method
from mmsae.filtering.truth import Side, pair_scores
from mmsae.metrics.pairs.correlation import PairScorer
from mmsae.metrics.statistics import auroc
from mmsae.options import call
from mmsae.report.tables import markdown_table
from mmsae.sae import SAE
from mmsae.types import IMAGE, TEXT
from mmsae.world.generator.captions import damage
from mmsae.world.generator.data import generate
from mmsae.world.generator.shards import write_samples
from mmsae.world.models.command import pretrain_clip


def write_damaged(out, n, seed, share):
    """Shards of ``n`` samples, a share of them with one wrong attribute; ``(n,)`` which."""
    data = generate(n, seed, siblings=False)
    wrong = np.random.default_rng([seed, 9]).random(n) < share
    texts = np.where(wrong, damage(data.scenes, seed)[0], data.full).tolist()
    if not out.exists():
        write_samples(out, "noisy", data.images, texts, [{"uid": u} for u in data.uids], digits=7)
    return torch.from_numpy(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/noisy_host"))
    parser.add_argument("--n", type=int, default=16000)
    parser.add_argument("--steps", type=int, default=400, help="of the CLIP")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    wrong = write_damaged(args.out / "shards", args.n, 21, 0.3)
    if not (args.out / "clip").exists():
        call(pretrain_clip, shards=str(args.out / "shards"), out=str(args.out / "clip"), steps=args.steps)
    extract(f"local-dir:{args.out / 'clip'}", str(args.out / "shards"), args.out / "store")
    store = ActivationStore(args.out / "store")
    x = {m: store.load(modality=m) for m in (IMAGE, TEXT)}
    found = {}
    for name in ("paired_topk", "vl_sae", "shared_topk"):
        for seed in args.seeds:
            run = args.out / f"{name}_{seed}"
            if not (run / "sae").exists():
                fit_method(name, args.out / "store", run, 800, seed, False)
            sae = SAE.from_pretrained(run / "sae")
            with torch.no_grad():
                z = {m: sae.encode(x[m], m) for m in x}
            scorer = PairScorer.fit(z[IMAGE], z[TEXT], x[IMAGE], x[TEXT])
            for score, values in pair_scores(scorer, Side(z[IMAGE], x[IMAGE]), Side(z[TEXT], x[TEXT])).items():
                label = score if score.startswith("clip") else f"{name}, {score}"
                found.setdefault(label, []).append(auroc(values[~wrong], values[wrong]))
    print(markdown_table(["score", "AUROC"], [[label, cell(values)] for label, values in found.items()]))
    (args.out / "table.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
