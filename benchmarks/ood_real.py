"""Zero-shot classification and OOD detection on photographs and on the generated world, from shards to tables.

    python benchmarks/ood_real.py --out runs/ood_real

A small CLIP is trained on CIFAR-10 and Tiny-ImageNet, two SAEs on CIFAR-10 alone: one on the features before the
projection, one on the embeddings of images and captions. ID is CIFAR-10: its last two training shards, which neither
saw, are for fitting and choosing, its test shards are scored against Tiny-ImageNet without the classes that it shares
(near), digits, garments and drawn shapes (far). The same is done on the generated world with a CLIP of its own.
The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from ood_real_table import write_tables

from mmsae.activations import extract
from mmsae.evaluation.ood.command import ood
from mmsae.evaluation.zeroshot.command import zeroshot
from mmsae.options import call
from mmsae.shards import expand
from mmsae.world.generator.ood import FAR, NEAR, write_ood_sets
from mmsae.world.generator.shards import write_world
from mmsae.world.models.command import pretrain_clip

DATA = Path("../shared/data")
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
TEMPLATES = ["a photo of a {}", "a small photo of a {}", "a blurry photo of a {}", "a low resolution photo of a {}",
             "a picture of a {}", "this is a {}", "an image showing a {}"]  # fmt: skip
SAE = "--model.sae.init_args."
FITS = {  # SAE: recipe, and what it needs beyond a store
    "trunk": ("topk_pooled", ["--data.init_args.sites", '{"image": "image.pooled"}', "--trainer.max_steps", "1500"]),
    "embed": (
        "shared_topk",
        ["--data.init_args.sites", '{"image": "image.embed", "text": "text.embed"}', "--trainer.max_steps", "1500",
         f"{SAE}d_sae", "256", f"{SAE}selector.init_args.k", "16"],
    ),
}  # fmt: skip


def fit(name: str, store: Path, run: Path, seed: int) -> None:
    """One of :data:`FITS`."""
    recipe, more = FITS[name]
    train(f"configs/train/world_{recipe}.yaml", store, run, seed, [*more, "--trainer.val_check_interval", "500"])


def train(recipe: str, store: Path, run: Path, seed: int, more: Sequence[str]) -> None:
    """``mmsae fit`` of a recipe, unless its SAE is there; it prints to ``run/log.txt``."""
    from mmsae.training.cli import run as mmsae

    if (run / "sae").exists():
        return
    args = ["fit", "-c", recipe, "--data.store", str(store), *more]
    args += ["--trainer.default_root_dir", str(run), "--seed_everything", str(seed)]
    args += ["--trainer.enable_progress_bar", "false"]
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        mmsae(args)


def photographs(out: Path, data: Path, clip_steps: int, seed: int) -> None:
    """CLIP, SAEs, zero-shot and OOD on CIFAR-10 and the sets beside it."""
    train = expand(str(data / "cifar10" / "cifar10-train-*.tar.gz"))
    held, train = train[-2:], train[:-2]
    test = str(data / "cifar10" / "cifar10-test-*.tar.gz")
    seen = [*train, *expand(str(data / "tiny_imagenet" / "tiny_imagenet-train-*.tar.gz"))]
    clip, store = out / "clip", out / "store"
    host = f"local-dir:{clip}"
    if not clip.exists():
        call(pretrain_clip, shards=seen, out=str(clip), steps=clip_steps, seed=seed, progress=False)
    extract(host, train, store, sites=["image.embed", "text.embed", "image.pooled"], workers=0, progress=False)
    for name, content in (("classes", CLASSES), ("templates", TEMPLATES)):
        (out / f"{name}.txt").write_text("\n".join(content) + "\n")
    sets = {
        "tiny_imagenet": data / "tiny_imagenet" / "tiny_imagenet-val-*.tar.gz",
        "mnist": data / "mnist" / "*.tar.gz",
        "clothing": data / "clothing" / "*.tar.gz",
        "nlvr": data / "nlvr" / "*.tar.gz",
    }
    names = {"classes": str(out / "classes.txt"), "templates": str(out / "templates.txt"), "host": host}
    for name in FITS:
        fit(name, store, out / f"sae_{name}", seed)
        sae = str(out / f"sae_{name}" / "sae")
        once(
            out / f"zeroshot_{name}",
            lambda folder, sae=sae: call(zeroshot, sae, test, folder, tune=held, progress=False, **names),
        )
        once(
            out / f"ood_{name}",
            lambda folder, sae=sae: call(ood,
                sae, test, [f"{k}={v}" for k, v in sets.items()], folder, near=["tiny_imagenet"], train=held,
                ood_label="wnid", exclude="configs/eval/cifar10_overlap.txt", progress=False, **names,
            ),
        )  # fmt: skip


def world(out: Path, clip_steps: int, seed: int) -> None:
    """The same on generated scenes: 30 classes of colour and shape against digits, noise and a checkerboard."""
    shards, clip, store = out / "shards", out / "clip", out / "store"
    if not clip.exists():
        write_world(shards, 20000, 1, "train", progress=False)
        call(pretrain_clip, shards=str(shards), out=str(clip), steps=clip_steps, seed=seed, progress=False)
    host = f"local-dir:{clip}"
    extract(host, expand(str(shards))[:10], store, sites=["image.embed", "text.embed", "image.pooled"], workers=0,
            progress=False)  # fmt: skip
    sets = {name: str(out / "sets" / name) for name in ("id", *FAR, *NEAR)}
    if not (out / "sets").exists():
        write_ood_sets(out / "sets", 4000, 7)
    (out / "templates.txt").write_text("a {}\n")
    for name in FITS:
        fit(name, store, out / f"sae_{name}", seed)
        sae, own = str(out / f"sae_{name}" / "sae"), {"host": host, "label": "class"}
        once(
            out / f"zeroshot_{name}",
            lambda folder, sae=sae, own=own: call(
                zeroshot, sae, sets["id"], folder, templates=str(out / "templates.txt"), progress=False, **own
            ),
        )
        once(
            out / f"ood_{name}",
            lambda folder, sae=sae, own=own: call(ood,
                sae, sets["id"], [f"{k}={sets[k]}" for k in (*FAR, *NEAR)], folder, near=list(NEAR), progress=False,
                **own,
            ),
        )  # fmt: skip


def once(folder: Path, work: Callable[[str], object]) -> None:
    """Run ``work`` unless its results are there."""
    if not (folder / "results.json").exists():
        work(str(folder))
    print(folder, flush=True)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run everything that is not done yet; returns the path of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ood_real"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--clip-steps", type=int, default=1000, help="of the CLIP on photographs")
    parser.add_argument("--world-steps", type=int, default=400, help="of the CLIP on the generated world; 0: no world")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    photographs(args.out, args.data, args.clip_steps, args.seed)
    if args.world_steps:
        world(args.out / "world", args.world_steps, args.seed)
    tables = write_tables(args.out, {"": "tiny_imagenet", **({"world": NEAR[0]} if args.world_steps else {})})
    print(f"{time.process_time() - start:.0f} CPU-seconds: {tables}")
    return tables


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
