"""SAEs on pretrained hosts: what a feature means and what is out of distribution, at equal data, three seeds.

    python benchmarks/real_hosts.py --hosts FOLDER --data FOLDER --out runs/real_hosts

Hosts are timm folders: an EfficientNet-Lite0 of ImageNet (its embeddings and the maps of its last blocks) and a
ViT-S/14 (its last patches). SAEs learn from the first five training shards of Tiny-ImageNet (5,000 images; the ViT's
from 300, and their cards are of fewer), detectors are fitted on the same images, settings are chosen on another shard,
and everything is scored on the validation shard and on sets of other kinds. Each image goes through a host once for all
SAEs and controls.
The same command goes on where it was stopped. ``--quick``: one case, one seed, few pictures and heads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from ood_real import once, train
from real_hosts_table import write_report

from mmsae.activations import extract
from mmsae.evaluation.card.command import evaluate
from mmsae.evaluation.ood.command import ood
from mmsae.options import call
from mmsae.shards import FaultLog, ShardWriter, expand, read_shards

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
        limit: Test and OOD images per set; 0: no OOD detection.
        images: Images of each set of the card; 0: all.
        learn: Images that the SAEs learn from; 0: all of the shards.
    """

    host: str
    site: str
    shards: str
    d_sae: int
    steps: int
    limit: int = 500
    images: int = 0
    learn: int = 0


CASES = {
    "embeddings": Case("lite0", "image.pooled", "00000[0-4]", 3072, 1000),
    "maps": Case("lite0", "blocks.6:out[all]", "00000[0-4]", 2560, 2000, 0, 3000),
    "patches": Case("dinov2_s14", "blocks.11:out[patches]", "000000", 1536, 1000, 0, 200, 300),
}


def part_of(shards: str, n: int, out: Path) -> str:
    """The first n samples of some shards as a shard of their own, bytes unchanged."""
    if not out.exists():
        with ShardWriter(out, out.name, per_shard=n) as writer:
            for sample in islice(read_shards(expand(shards), FaultLog(), need=("image",), decode=False), n):
                writer.write(sample.key, {**sample.raw, "json": {**sample.meta, "uid": sample.uid}})
    return str(out)


def suite_of(case: Case, out: Path) -> str:
    """The suite, with as many images of each set as a case asks for."""
    if not case.images:
        return SUITE
    content = yaml.safe_load(Path(SUITE).read_text())
    content["data"] = {name: {**one, "limit": case.images} for name, one in content["data"].items()}
    content["trees"] = {name: str(Path(SUITE).with_name(file).resolve()) for name, file in content["trees"].items()}
    content["classes"] = str(Path(SUITE).with_name(content["classes"]).resolve())
    path = out / "suite.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return str(path)


def run(name: str, case: Case, args: argparse.Namespace) -> None:
    """Store, SAEs, cards and OOD tables of one case; what is done is skipped."""
    tiny, host = args.data / "tiny_imagenet", f"timm:local-dir:{args.hosts / case.host}"
    shards = str(tiny / f"tiny_imagenet-train-{case.shards}.tar.gz")
    if case.learn:
        shards = part_of(shards, case.learn, args.out / f"part_{name}")
    sites = list(dict.fromkeys(c.site for c in CASES.values() if (c.host, c.shards) == (case.host, case.shards)))
    store, cache = args.out / f"store_{case.host}", str(args.out / "cache")
    extract(host, shards, store, sites=sites, batch_size=args.batch_size, dtype="float16", workers=0, progress=False)
    steps = str(200 if args.quick else case.steps)
    size = [f"{SAE}ratio", "null", f"{SAE}d_sae", str(case.d_sae)]
    more = ["--data.init_args.sites", f'{{"image": "{case.site}"}}', "--trainer.max_steps", steps, *size]
    suite = suite_of(case, args.out / name)
    for seed in args.seeds:
        folder = args.out / name / str(seed)
        train("configs/train/topk_store.yaml", store, folder, seed, more)
        shared = {"host": host, "batch_size": args.batch_size, "seed": seed, "cache": cache, "progress": False}
        sae, limit = str(folder / "sae"), 100 if args.quick else case.limit

        def detect(out: str, sae: str = sae, limit: int = limit, shared: dict = shared) -> object:
            return call(
                ood, sae, str(tiny / "tiny_imagenet-val-*.tar.gz"), [f"{k}={args.data / v}" for k, v in SETS.items()],
                out, train=shards, val=str(tiny / "tiny_imagenet-train-000006.tar.gz"), limit=limit,
                fit_limit=500 if args.quick else 5000, scores=SCORES, label="wnid", **shared,
            )  # fmt: skip

        def card(out: str, sae: str = sae, shared: dict = shared) -> object:
            heads = HEADS[:2] if args.quick else HEADS
            options = {"root": str(args.data), "heads": heads, "quick": args.quick, "gallery": 12}
            return call(evaluate, sae, suite, out, **options, **shared)

        if case.limit:
            once(folder / "ood", detect)
        once(folder / "card", card)


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
