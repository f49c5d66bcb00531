"""SAEs on pretrained hosts: what a feature means and what is out of distribution, at equal data, three seeds.

    python benchmarks/real_hosts.py --hosts FOLDER --data FOLDER --out runs/real_hosts

Hosts are timm folders: an EfficientNet-Lite0 of ImageNet (its embeddings and the maps of its last blocks) and a
ViT-S/14 (its last patches). SAEs learn from the first five training shards of Tiny-ImageNet (5,000 images; the ViT's
from one), detectors are fitted on the same images, settings are chosen on another shard, and everything is scored on
the validation shard and on sets of other kinds. Each image goes through a host once for all SAEs and controls.
The same command goes on where it was stopped. ``--quick``: one case, one seed, few pictures and heads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from ood_real import once, train
from real_hosts_table import write_report

from mmsae.activations import extract
from mmsae.evaluation.card.command import evaluate
from mmsae.evaluation.ood.command import ood
from mmsae.options import call

SAE = "--model.sae.init_args."
SUITE = "configs/eval/tiny_imagenet.yaml"
HEADS = ["core", "monosemantic", "top_images", "probes", "ontology", "absorbed", "localised"]
SCORES = ["msp", "energy", "vim", "mds", "rmds", "knn", "recon", "rarity"]
SETS = {  # OOD sets
    "digits": "mnist/mnist-train-000000.tar.gz",
    "garments": "clothing/clothing-000000.tar.gz",
    "drawings": "nlvr/nlvr-dev-000000.tar.gz",
    "photographs": "captioned_vi/captioned_vi-000000.tar.gz",
}


class Case(NamedTuple):
    """A host, where it is read, and the SAEs there.

    Attributes:
        host: Folder of the host.
        site: Where.
        shards: Training shards of Tiny-ImageNet.
        d_sae: Latents; 32 are on per row.
        steps: Of 512 rows.
        limit: Test and OOD images per set.
        quick: Whether cards are of at most 1,500 images a set, for a host that is slow.
    """

    host: str
    site: str
    shards: str
    d_sae: int
    steps: int
    limit: int = 500
    quick: bool = False


CASES = {
    "embeddings": Case("lite0", "image.pooled", "00000[0-4]", 3072, 1000),
    "maps": Case("lite0", "blocks.6:out[all]", "00000[0-4]", 2560, 2000),
    "patches": Case("dinov2_s14", "blocks.11:out[patches]", "000000", 3072, 2000, 250, quick=True),
}


def run(name: str, case: Case, args: argparse.Namespace) -> None:
    """Store, SAEs, cards and OOD tables of one case; what is done is skipped."""
    tiny, host = args.data / "tiny_imagenet", f"timm:local-dir:{args.hosts / case.host}"
    shards = str(tiny / f"tiny_imagenet-train-{case.shards}.tar.gz")
    sites = list(dict.fromkeys(c.site for c in CASES.values() if (c.host, c.shards) == (case.host, case.shards)))
    store, cache = args.out / f"store_{case.host}", str(args.out / "cache")
    extract(host, shards, store, sites=sites, batch_size=args.batch_size, dtype="float16", workers=0, progress=False)
    for seed in args.seeds:
        folder = args.out / name / str(seed)
        more = [
            "--data.init_args.sites",
            f'{{"image": "{case.site}"}}',
            "--trainer.max_steps",
            str(200 if args.quick else case.steps),
        ]
        more += [f"{SAE}ratio", "null", f"{SAE}d_sae", str(case.d_sae)]
        train("configs/train/topk_store.yaml", store, folder, seed, more)
        shared = {"host": host, "batch_size": args.batch_size, "seed": seed, "cache": cache, "progress": False}
        sae, limit = str(folder / "sae"), 100 if args.quick else case.limit
        once(
            folder / "ood",
            lambda out, sae=sae, shared=shared, limit=limit: call(ood,
                sae, str(tiny / "tiny_imagenet-val-*.tar.gz"), [f"{k}={args.data / v}" for k, v in SETS.items()], out,
                train=shards, val=str(tiny / "tiny_imagenet-train-000006.tar.gz"), limit=limit,
                fit_limit=500 if args.quick else 5000, scores=SCORES, label="wnid", **shared,
            ),
        )  # fmt: skip
        once(
            folder / "card",
            lambda out, sae=sae, shared=shared: call(
                evaluate,
                sae,
                SUITE,
                out,
                root=str(args.data),
                heads=HEADS[:2] if args.quick else HEADS,
                quick=args.quick or case.quick,
                gallery=12,
                **shared,
            ),
        )


def main(argv: Sequence[str] | None = None) -> Path:
    """Run everything that is not done yet; returns the path of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=Path, required=True, help="folder of the hosts' folders")
    parser.add_argument("--data", type=Path, required=True, help="folder of tiny_imagenet and of the OOD sets")
    parser.add_argument("--out", type=Path, default=Path("runs/real_hosts"))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass")
    parser.add_argument("--report", type=Path, default=None, help="where the tables go; default: OUT/real_hosts.md")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if args.quick:
        args.cases, args.seeds = args.cases[:1], args.seeds[:1]
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    for name in args.cases:
        run(name, CASES[name], args)
    path = write_report(args.out, args.report or args.out / "real_hosts.md")
    print(f"{time.process_time() - start:.0f} CPU-seconds: {path}")
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
