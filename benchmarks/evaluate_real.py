"""The benchmark card on photographs: hosts and SAEs as in real_input.py, then `mmsae evaluate` with two suites.

    python benchmarks/evaluate_real.py

CIFAR-10 with shifted targets (configs/eval/cifar10.yaml) and Tiny-ImageNet with its hypernyms
(configs/eval/tiny_imagenet.yaml). A CLIP and a PairedTopK are trained on each; what is in the folders is reused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from real_input import DATA, prepare, trained

from mmsae.evaluation.card.command import evaluate

TINY = DATA.parent / "tiny_imagenet"
CASES = {  # suite: train and test shards, folder
    "tiny_imagenet": (TINY / "tiny_imagenet-train-*.tar.gz", TINY / "tiny_imagenet-val-*.tar.gz", "real_input_tiny"),
    "cifar10": (DATA / "cifar10-train-*.tar.gz", DATA / "cifar10-test-*.tar.gz", "real_input"),
}


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Train what is not there and write one card per suite; returns their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate_real"))
    parser.add_argument("--hosts", type=Path, default=Path("runs"), help="folder of the runs of real_input.py")
    parser.add_argument("--suites", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--clip-steps", type=int, default=800)
    parser.add_argument("--size", default="256:8", help="latents:k")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    pages = []
    for suite in args.suites:
        train, test, folder = CASES[suite]
        out = args.hosts / folder
        out.mkdir(parents=True, exist_ok=True)
        size = tuple(int(v) for v in args.size.split(":"))
        host = argparse.Namespace(
            train=str(train), test=str(test), val=None, out=out, host=None, clip_steps=args.clip_steps, image_size=32,
            clip_seed=0, progress=False,
        )  # fmt: skip
        prepare(host)
        setting = {"lr": args.lr, "steps": args.steps}
        trained(out, "paired_topk", size, setting, args.seed)
        name = f"paired_topk_{size[0]}_{size[1]}_{args.lr:g}_{args.steps}_{args.seed}"
        sae = out / "sae" / name / "sae"
        path = f"configs/eval/{suite}.yaml"
        pages.append(
            evaluate(str(sae), path, str(args.out / suite), root=str(DATA.parent), quick=args.quick, seed=args.seed)
        )
    return pages


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(main()))
