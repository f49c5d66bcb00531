"""Several SAEs from one pass over the data, beside as many runs: seconds of CPU, and whether the weights are equal.

    python benchmarks/members.py --out runs/members

Four SAEs (two k, two seeds) are trained on a store, where a step is the cost, and on a stream through a small CLIP of
random weights, where the host is; each by ``mmsae fit`` for itself, then all by one. What ``mmsae fit`` takes to start
(imports, options, the host) is the time of a run of one step. One thread, and what worker processes take is counted.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mmsae.activations import write_store
from mmsae.shards import ShardWriter

K, SEEDS = (16, 32), (0, 1)
VISION = {"image_size": 64, "layers": 8, "width": 256, "head_width": 64, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4}


def inputs(out, rows, width, images):
    """The options of a store of pairs of random rows, and of a stream of noise through a CLIP."""
    store, shards, host = out / "store", out / "shards", out / "clip"
    if not store.exists():
        g = torch.Generator().manual_seed(0)
        write_store(store, {m: torch.randn(rows, width, generator=g) for m in ("image", "text")})
    if not shards.exists():
        draw = np.random.default_rng(0)
        with ShardWriter(shards, per_shard=images // 4) as w:
            for i in range(images):
                file = io.BytesIO()
                Image.fromarray(draw.integers(0, 255, (64, 64, 3), np.uint8)).save(file, "png")
                w.write(f"{i:05d}", {"png": file.getvalue(), "txt": f"number {i}"})
    host.mkdir(exist_ok=True)
    config = {"embed_dim": width, "vision_cfg": VISION, "text_cfg": TEXT}
    (host / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 64}}))
    stream = ["--data", "datamodules.StreamingActivations", "--data.shards", shards, "--data.host", f"local-dir:{host}"]
    stream += ["--data.allow_random", "true", "--data.batch_size", 128, "--data.read_batch", 128, "--data.workers", 0]
    stored = ["--data", "datamodules.CachedActivations", "--data.store", store, "--data.val_fraction", 0]
    return {"store": stored, "stream": [*stream, "--data.buffer_pairs", 512]}


def fit(run, data, steps, *options):
    """CPU seconds of ``mmsae fit`` and of what it starts, and seconds by the clock."""
    args = ["fit", "-c", "configs/run/store.yaml", "-c", "configs/sae/paired_topk.yaml", *data, *options]
    args += ["--model.sae.init_args.ratio", 4, "--trainer.max_steps", steps, "--trainer.default_root_dir", run]
    args += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--threads", 1]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "mmsae.cli", *map(str, args)], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return np.array([cpu, time.perf_counter() - start])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/members"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs=2, default=(100, 20), help="of the store, and of the stream")
    parser.add_argument("--only", choices=("store", "stream"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = inputs(options.out, options.rows, options.width, options.images)
    for (name, given), steps in zip(data.items(), options.steps, strict=True):
        if options.only not in (None, name):
            continue
        root = options.out / name
        begin = fit(root / "start", given, 1)
        alone = sum(
            fit(root / f"k{k}-seed{seed}", given, steps, "--model.sae.init_args.selector.init_args.k", k,
                "--seed_everything", seed)
            for k in K for seed in SEEDS
        )  # fmt: skip
        together = fit(root / "many", given, steps, "--axes.k", list(K), "--axes.seed", list(SEEDS))
        equal = True
        for member in (root / "many").glob("k*"):
            a, b = (load_file(r / "sae" / "sae_weights.safetensors") for r in (member, root / member.name))
            equal &= all(torch.equal(a[key], b[key]) for key in a)
        cpu, clock = (
            f"{alone[i]:.1f} s for 4 runs, {together[i]:.1f} s for one of 4, {begin[i]:.1f} s to start" for i in (0, 1)
        )
        print(f"{name}, {steps} steps: CPU {cpu}; clock {clock}; weights {'equal' if equal else 'differ'}", flush=True)


if __name__ == "__main__":
    main()
