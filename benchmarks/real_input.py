"""SAEs on photographs, from shards to a table: host, stores, four methods beside a random SAE, three seeds.

    python benchmarks/real_input.py --out runs/real_input
    python benchmarks/real_input.py --train 'SHARDS-train-*.tar' --test 'SHARDS-test-*.tar' --out DIR

The shards need captions that say the class, and ``cls`` or ``class`` in json. The last tenth of the train shards
(``--val`` names others) is kept from the host and from the SAEs: learning rate and steps of each method, and alpha, are
chosen there. The test shards are only scored. All methods get equal size, k, inputs (centred per modality) and pairs.
The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from real_input_table import RANDOM, markdown

from mmsae.activations import extract
from mmsae.bench.multimodal.data import Split, class_prompts, load_split, score_split
from mmsae.files import atomic_file
from mmsae.hosts import Host, load_host
from mmsae.metrics import both_ways, fvu, groups_of, pair_report
from mmsae.options import call
from mmsae.sae import SAE, random_control
from mmsae.shards import expand
from mmsae.types import IMAGE, TEXT, InputError
from mmsae.world.models.command import pretrain_clip

DATA = Path("../shared/data/cifar10")
SAE_ARGS = "--model.sae.init_args."
CENTRED = [a for part in ("unit_in", "centre", "unit_out") for a in (f"{SAE_ARGS}normaliser.init_args.{part}", "true")]


def coupling(**arguments: float) -> list[str]:
    """Other arguments of PairedTopK's coupling. A list is replaced as a whole; the rest of it is the recipe's."""
    terms = {"Reconstruction": {}, "AuxK": {"dead_after": 200000}, "CodeCosine": arguments}
    return ["--model.losses", json.dumps([{"class_path": f"mmsae.sae.{c}", "init_args": a} for c, a in terms.items()])]


METHODS = {  # row of the table: recipe, and what it needs beyond sizes
    "paired_topk": ("paired_topk", []),
    "paired_topk λ .03": ("paired_topk", coupling(coefficient=0.03)),
    "paired_topk shuffled": ("paired_topk", coupling(coefficient=0.1, shuffled=0.5)),
    "vl_sae": ("vl_sae", CENTRED),
    "shared_topk": ("shared_topk", []),
    "dual_topk": ("dual_topk", []),
}
SELECTION_SEED = 100  # not among the reported seeds


def fit(name: str, store: Path, run: Path, size: tuple[int, int], lr: float, steps: int, seed: int) -> list[str]:
    """``mmsae fit`` of a recipe, unless its SAE is there; it prints to ``run/log.txt``. Returns the command."""
    from mmsae.training.cli import run as mmsae

    (recipe, more), (d_sae, k) = METHODS[name], size
    args = ["fit", "-c", f"configs/train/{recipe}_store.yaml", "--data.store", str(store)]
    args += ["--trainer.default_root_dir", str(run), f"{SAE_ARGS}ratio", "null", f"{SAE_ARGS}d_sae", str(d_sae)]
    args += [f"{SAE_ARGS}selector.init_args.k", str(k), *more]
    args += ["--model.optimizer.init_args.lr", str(lr), "--trainer.max_steps", str(steps)]
    args += ["--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
    if not (run / "sae").exists():
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.val_check_interval", str(min(1000, steps))]
        quiet += ["--ckpt_path", "last"]  # a run that was stopped goes on; without a checkpoint it starts
        run.mkdir(parents=True, exist_ok=True)
        with (run / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            mmsae([*args, *quiet])
    return ["mmsae", *args]


def trained(out: Path, name: str, size: tuple[int, int], setting: dict[str, Any], seed: int) -> tuple[SAE, list[str]]:
    """The SAE of one run, trained unless it is there, and the command that trains it."""
    lr, steps = setting["lr"], setting["steps"]
    run = out / "sae" / f"{name.replace(' λ', '').replace(' ', '_')}_{size[0]}_{size[1]}_{lr:g}_{steps}_{seed}"
    command = fit(name, out / "store" / "train", run, size, lr, steps, seed)
    return SAE.from_pretrained(run / "sae"), command


@torch.no_grad()
def select(args: argparse.Namespace, name: str, size: tuple[int, int], val: Split) -> dict[str, Any]:
    """Learning rate and steps of a method, with the grid they come from.

    The lowest FVU (mean of both modalities) on the validation shards, among settings whose codes there give no warning;
    among all if all do. Without that condition FVU may choose codes that are alike for every pair.
    """
    grid = []
    for steps in args.steps:
        for lr in args.lr:
            setting = {"lr": lr, "steps": steps}
            if len(args.steps) * len(args.lr) > 1:
                sae, _ = trained(args.out, name, size, setting, SELECTION_SEED)
                z = {m: sae.encode(x, m) for m, x in val.x.items()}
                setting["fvu"] = statistics.fmean(fvu(sae.decode(c, m), val.x[m]) for m, c in z.items())
                setting["warnings"] = pair_report(z[IMAGE], z[TEXT], same=val.labels, ks=(1,))["warnings"]
            grid.append(setting)
    return {"chosen": min(grid, key=lambda s: (bool(s.get("warnings")), s.get("fvu"))), "grid": grid}


def prepare(args: argparse.Namespace) -> tuple[Host, dict[str, list[str]]]:
    """The host, and the shards of every split, with the stores written."""
    train, test = expand(args.train), expand(args.test)
    if args.val:
        val = expand(args.val)
    else:
        if len(train) < 2:
            raise InputError(f"--train has {len(train)} shard, 2 are needed to keep one for validation; or give --val")
        kept = max(1, len(train) // 10)
        train, val = train[:-kept], train[-kept:]
    shards = {"train": train, "val": val, "test": test}
    recipe = {"host": args.host, "clip": [args.clip_steps, args.image_size, args.clip_seed], "shards": shards}
    settings = args.out / "settings.json"
    if settings.exists() and (found := json.loads(settings.read_text())) != recipe:
        raise InputError(f"{args.out} holds a run of {found}, this one is {recipe}: give another --out")
    with atomic_file(settings) as temp:
        temp.write_text(json.dumps(recipe))
    clip = args.out / "clip"
    if not args.host and not clip.exists():
        call(
            pretrain_clip, shards=train, out=str(clip), steps=args.clip_steps, image_size=args.image_size,
            seed=args.clip_seed, progress=args.progress,
        )  # fmt: skip
    host = load_host(args.host or f"local-dir:{clip}")
    for split, paths in shards.items():
        extract(host, paths, args.out / "store" / split, workers=0, progress=args.progress)
    return host, shards


def first_commands(args: argparse.Namespace, shards: dict[str, list[str]]) -> list[list[str]]:
    """What :func:`prepare` did, as typed."""
    name, commands = args.host or f"local-dir:{args.out / 'clip'}", []
    if not args.host:
        clip = ["mmsae", "pretrain-clip", "--shards", json.dumps(shards["train"]), "--out", str(args.out / "clip")]
        sizes = {"--steps": args.clip_steps, "--image-size": args.image_size, "--seed": args.clip_seed}
        commands.append([*clip, *(str(a) for pair in sizes.items() for a in pair)])
    for split, paths in shards.items():
        extraction = ["mmsae", "extract", "--host", name, "--shards", json.dumps(paths)]
        commands.append([*extraction, "--out", str(args.out / "store" / split)])
    return commands


def main(argv: Sequence[str] | None = None) -> Path:
    """Run everything that is not done yet; returns the path of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=str(DATA / "cifar10-train-*.tar.gz"), help="path, glob or brace pattern")
    parser.add_argument("--val", help="validation shards; default: the last tenth of --train")
    parser.add_argument("--test", default=str(DATA / "cifar10-test-*.tar.gz"))
    parser.add_argument("--out", type=Path, default=Path("runs/real_input"))
    parser.add_argument("--host", help="a host by name instead of pretraining one")
    parser.add_argument("--clip-steps", type=int, default=800)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--clip-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the SAEs")
    parser.add_argument("--sizes", nargs="+", default=["48:4", "256:8"], help="latents:k")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="one, or a grid")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 3000], help="one, or a grid")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    host, shards = prepare(args)
    train, classes = load_split(args.out / "store" / "train", shards["train"])
    val, test = (load_split(args.out / "store" / s, shards[s], classes)[0] for s in ("val", "test"))
    prompts = class_prompts(host, train, len(classes))
    results: dict[str, Any] = {"seeds": args.seeds, "sizes": {}, "commands": first_commands(args, shards)}
    for size in (tuple(map(int, s.split(":"))) for s in args.sizes):
        scores: dict[str, list] = {name: [] for name in (*METHODS, RANDOM)}
        settings = {name: select(args, name, size, val) for name in METHODS}
        for seed in args.seeds:
            for name in METHODS:
                sae, command = trained(args.out, name, size, settings[name]["chosen"], seed)
                if seed == args.seeds[0]:
                    results["commands"].append(command)
                scores[name].append(score_split(sae, train, val, test, prompts))
                if name == "shared_topk":  # tied: its random atoms fit its random encoder
                    scores[RANDOM].append(score_split(random_control(sae, seed), train, val, test, prompts))
                print(f"F {size[0]}, k {size[1]}, seed {seed}: {name} done", flush=True)
        results["sizes"][f"F {size[0]}, k {size[1]}"] = {"settings": settings, "scores": scores}
    results["host"] = {
        "name": args.host or f"local-dir:{args.out / 'clip'}",
        "classes": len(classes),
        "captions": len(set(train.captions)),
        **{s: len(v.labels) for s, v in (("train", train), ("val", val), ("test", test))},
        **{key: scores["paired_topk"][0][key] for key in ("zero_shot", "wrong_class")},
        "recall": {
            "class": scores["paired_topk"][0]["recall"]["embedding"],
            "caption": both_ways(test.x[IMAGE], test.x[TEXT], groups_of(test.captions)),
        },
    }
    table = args.out / "table.md"
    for path, content in ((args.out / "results.json", json.dumps(results, indent=1)), (table, markdown(results))):
        with atomic_file(path) as temp:
            temp.write_text(content)
    print(table)
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
