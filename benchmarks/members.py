"""Several SAEs from one pass over the data, beside as many runs: seconds of CPU, and whether the weights are equal.

    python benchmarks/members.py --out runs/members

Four SAEs (two k, two seeds) are trained on a store, where a step is the cost, and on a stream through a small CLIP of
random weights, where the host is; then six SAEs (two k) on three layers of one vision tower, stored and streamed; each
by ``mmsae fit`` for itself, then all by one. Last, ``mmsae extract`` stores the three layers, one by one and together.
What ``mmsae fit`` takes to start (imports, options, the host) is the time of a run of one step; with ``--here`` nothing
is imported again, all runs being in this process. One thread, and what worker processes take is counted.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mmsae.activations import write_store
from mmsae.activations.spec import name_sites
from mmsae.cli import main as mmsae
from mmsae.shards import ShardWriter
from mmsae.training.members.options import Members, as_args
from mmsae.types import Site

AXES = {"k": [16, 32], "seed": [0, 1]}
HERE = False  # whether all runs are in this process
SMALL = ["--data.batch_size", 32, "--data.read_batch", 32, "--data.buffer_pairs", 64, "--model.normaliser_rows", 64]
LAYERS = [f"visual.transformer.resblocks.{i}:out[cls]" for i in (2, 4, 6)]
VISION = {"image_size": 64, "layers": 8, "width": 256, "head_width": 64, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 4}


def inputs(out, rows, width, images):
    """``{case: (options of the data, recipe of the SAE, axes)}``, of random rows, and of noise through a CLIP."""
    store, layers, shards, host = out / "store", out / "layers", out / "shards", out / "clip"
    g = torch.Generator().manual_seed(0)
    if not store.exists():
        write_store(store, {m: torch.randn(rows, width, generator=g) for m in ("image", "text")})
    if not layers.exists():
        sites = name_sites([Site("", layer.split(":")[0], tokens="cls", width=width) for layer in LAYERS])
        write_store(layers, {n: torch.randn(rows, width, generator=g) for n in sites}, sites=sites)
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
    stream += ["--data.buffer_pairs", 512]
    stored = ["--data", "datamodules.CachedActivations", "--data.val_fraction", 0, "--data.store"]
    sites = {"sites": [{"image": layer} for layer in LAYERS], "k": AXES["k"]}
    return {
        "store": ([*stored, store], "paired_topk", AXES),
        "stream": (stream, "paired_topk", AXES),
        "layers stored": ([*stored, layers], "topk", sites),
        "layers streamed": ([*stream, *SMALL], "topk", sites),
    }


def measured(args):
    """CPU seconds of an ``mmsae`` command and of what it starts, and seconds by the clock."""
    if HERE:
        start = np.array([time.process_time(), time.perf_counter()])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            mmsae(list(map(str, args)))
        return np.array([time.process_time(), time.perf_counter()]) - start
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "mmsae.cli", *map(str, args)], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return np.array([cpu, time.perf_counter() - start])


def fit(run, sae, data, steps, *options):
    """What an ``mmsae fit`` takes."""
    args = ["fit", "-c", "configs/run/store.yaml", "-c", f"configs/sae/{sae}.yaml", *data, *options]
    args += ["--model.sae.init_args.ratio", 4, "--trainer.max_steps", steps, "--trainer.default_root_dir", run]
    return measured([*args, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--threads", 1])


def trained(root, data, sae, axes, steps):
    """Print what the runs of a case take."""
    members = Members(axes=axes).options()
    first = as_args(next(iter(members.values())))
    if HERE:
        fit(root / "first", sae, data, 1, *first)  # what is done once in a process
    begin = fit(root / "start", sae, data, 1, *first)
    alone = sum(fit(root / name, sae, data, steps, *as_args(own)) for name, own in members.items())
    together = fit(root / "many", sae, data, steps, "--axes", json.dumps(axes))
    equal = True
    for name in members:
        a, b = (load_file(r / name / "sae" / "sae_weights.safetensors") for r in (root / "many", root))
        equal &= all(torch.equal(a[key], b[key]) for key in a)
    n = len(members)
    cpu, clock = (
        f"{alone[i]:.1f} s for {n} runs ({alone[i] / n:.1f} s each), {together[i]:.1f} s for one of {n}, "
        f"{begin[i]:.1f} s to start"
        for i in (0, 1)
    )
    print(f"{root.name}, {steps} steps: CPU {cpu}; clock {clock}; weights {'equal' if equal else 'differ'}", flush=True)


def stored(out):
    """Print what it takes to store three layers, one by one and together."""

    def extract(name, *sites):
        args = ["extract", "--host", f"local-dir:{out / 'clip'}", "--allow-random-weights", "--shards", out / "shards"]
        shutil.rmtree(out / name, ignore_errors=True)
        return measured([*args, "--workers", 0, "--out", out / name, "--sites", *sites])[0]

    alone = [extract(f"layer{i}", layer) for i, layer in enumerate(LAYERS)]
    together = extract("together", *LAYERS)
    print(f"extract: CPU {', '.join(f'{s:.1f}' for s in alone)} s one by one, {together:.1f} s together", flush=True)


def main():
    global HERE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/members"))
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs=2, default=(100, 20), help="of the store, and of the stream")
    parser.add_argument("--only", choices=("store", "stream", "layers stored", "layers streamed", "extract"))
    parser.add_argument("--here", action="store_true", help="all runs in this process")
    options = parser.parse_args()
    HERE = options.here
    options.out.mkdir(parents=True, exist_ok=True)
    for name, case in inputs(options.out, options.rows, options.width, options.images).items():
        if options.only in (None, name):
            trained(options.out / "runs" / name, *case, options.steps["stream" in name])
    if options.only in (None, "extract"):
        stored(options.out)


if __name__ == "__main__":
    main()
